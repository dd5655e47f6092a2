//! Records of JSON: one a line, or the elements of one list; plain or gzipped.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};
use flate2::read::MultiGzDecoder;
use serde_json::Value as Json;

/// A record and where it stands, for messages: `FILE:LINE`, or `FILE, record N` in a list.
pub struct Record {
    /// What was read.
    pub json: Json,
    /// Where.
    pub place: String,
}

/// Reads all records of a file, gzipped where it begins as gzip does. Blank lines are passed over; errors name the line.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = read_text(path)?;
    let name = path.display();
    if text.trim_start().starts_with('[') {
        let list: Vec<Json> = serde_json::from_str(&text).with_context(|| format!("`{name}` is not a JSON list"))?;
        let record = |(index, json)| Record { json, place: format!("{name}, record {}", index + 1) };
        return Ok(list.into_iter().enumerate().map(record).collect());
    }
    let mut records = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{name}:{}", index + 1);
        let json = serde_json::from_str(line).with_context(|| format!("`{place}` is not JSON"))?;
        records.push(Record { json, place });
    }
    Ok(records)
}

fn read_text(path: &Path) -> Result<String> {
    let context = || format!("cannot read `{}`", path.display());
    let mut file = BufReader::new(File::open(path).with_context(context)?);
    let mut text = String::new();
    if file.fill_buf().with_context(context)?.starts_with(&[0x1f, 0x8b]) {
        let read = MultiGzDecoder::new(file).read_to_string(&mut text);
        read.with_context(|| format!("cannot read `{}` as gzip; it may be cut short", path.display()))?;
    } else {
        file.read_to_string(&mut text).with_context(context)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;
    use crate::testing::Scratch;

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn lines_lists_and_gzip_give_the_same_records() {
        let scratch = Scratch::new();
        let (lines, list) = ("{\"a\":1}\n\n{\"a\":\"\u{2028}\"}\r\n", "\n[{\"a\":1},\n{\"a\":\"\u{2028}\"}]");
        let files = [
            scratch.file("a.jsonl", lines),
            scratch.file("a.json", list),
            scratch.file("a.jsonl.gz", gzip(lines)),
            scratch.file("a.json.gz", gzip(list)),
        ];
        for file in files {
            let records = read(&file).unwrap();
            assert_eq!(
                records.iter().map(|r| &r.json).collect::<Vec<_>>(),
                [&serde_json::json!({"a": 1}), &serde_json::json!({"a": "\u{2028}"})]
            );
            let place = &records[1].place;
            assert!(place.ends_with(":3") || place.ends_with(", record 2"), "{place}");
        }
    }

    #[test]
    fn errors_name_the_file_and_the_line() {
        let scratch = Scratch::new();
        let error = |path: &Path| format!("{:#}", read(path).err().unwrap());
        assert!(error(&scratch.path().join("none.jsonl")).contains("none.jsonl"));
        assert!(error(&scratch.file("a.jsonl", "{}\n\n{\"a\"")).contains("a.jsonl:3` is not JSON"));
        assert!(error(&scratch.file("a.json", "[{},")).contains("a.json` is not a JSON list"));
        let whole = gzip(&"{\"a\":1}\n".repeat(500));
        let cut = error(&scratch.file("a.jsonl.gz", &whole[..whole.len() / 2]));
        assert!(cut.contains("a.jsonl.gz` as gzip; it may be cut short"), "{cut}");
        assert_eq!(read(&scratch.file("b.jsonl.gz", "{}")).unwrap().len(), 1, "bytes decide, not the name");
    }
}
