//! The reference programs' binary datasets: `PREFIX_0.bin`, `PREFIX_0.idx`, then `_1`, `_2` and so on.
//!
//! The `.bin` holds the ids of all records one after another; a record is the prompt, a separator and the response with
//! its end token, or the prompt alone. Ids are u16 where the vocabulary allows it, else i32; the separator is the largest
//! value of that type. The `.idx`, little-endian: magic, u64 version 1, u8 type code, u64 records, u64 documents, i32
//! length of each record, i64 byte offset of each, i64 first record of each document.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use contract::{End, Row, files};

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const VERSION: u64 = 1;
const U16: u8 = 8;
const I32: u8 = 4;
const U32: u8 = 9;
/// From this vocabulary size on, ids are written as i32.
const WIDE: u32 = 65_500;

/// Prompt ids and response ids of one record.
pub type Record = (Vec<u32>, Vec<u32>);

/// Writes `rows` as `PREFIX_0.bin` and `PREFIX_0.idx` for a vocabulary of `size` ids. A row without response is written as
/// a prompt alone.
pub fn write(prefix: &Path, rows: &[Row], size: u32) -> Result<()> {
    let (code, width, separator) = if size < WIDE { (U16, 2, u32::from(u16::MAX)) } else { (I32, 4, i32::MAX as u32) };
    let (mut bin, mut lengths, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        offsets.extend((bin.len() as i64).to_le_bytes());
        let separator = (!row.response.is_empty()).then_some(separator);
        let ids = row.prompt.iter().chain(&separator).chain(&row.response);
        let mut length = 0_i32;
        for &id in ids {
            bin.extend_from_slice(&id.to_le_bytes()[..width]);
            length += 1;
        }
        let largest = row.prompt.iter().chain(&row.response).max();
        if let Some(largest) = largest.filter(|id| **id >= size) {
            bail!("row {} holds the id {largest}, but the vocabulary has {size}", row.id);
        }
        lengths.extend(length.to_le_bytes());
    }
    let mut idx = MAGIC.to_vec();
    idx.extend(VERSION.to_le_bytes());
    idx.push(code);
    idx.extend((rows.len() as u64).to_le_bytes());
    idx.extend(1_u64.to_le_bytes());
    idx.extend(lengths);
    idx.extend(offsets);
    idx.extend(0_i64.to_le_bytes());
    contract::value::write(&shard(prefix, 0, "bin"), &bin)?;
    contract::value::write(&shard(prefix, 0, "idx"), &idx)
}

/// Whether there is such a dataset.
pub fn exists(prefix: &Path) -> bool {
    shard(prefix, 0, "idx").is_file()
}

/// Reads all shards of a dataset, in order. Errors name the file that is missing, cut short or of an unknown type.
pub fn read(prefix: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for index in 0.. {
        let (bin, idx) = (shard(prefix, index, "bin"), shard(prefix, index, "idx"));
        if index > 0 && !idx.is_file() {
            break;
        }
        let ids = files::read(&bin, files::TOKENS)?;
        let header = files::read(&idx, files::TOKENS)?;
        let shard = read_shard(&ids, &header);
        records.extend(shard.with_context(|| format!("cannot read `{}` by `{}`", bin.display(), idx.display()))?);
    }
    Ok(records)
}

/// A record as a dataset row: it ended by itself when its last id is the end token.
pub fn row(id: u64, (prompt, response): Record, end: u32, references: Vec<String>) -> Row {
    let end = if response.last() == Some(&end) { End::Stop } else { End::Length };
    Row { id, prompt, response, end, log_probs: None, references, family: None }
}

fn shard(prefix: &Path, index: usize, extension: &str) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(format!("_{index}.{extension}"));
    name.into()
}

fn read_shard(bin: &[u8], idx: &[u8]) -> Result<Vec<Record>> {
    let mut rest = idx;
    ensure!(take::<9>(&mut rest)? == *MAGIC, "the index does not begin with `MMIDIDX`");
    let version = u64::from_le_bytes(take(&mut rest)?);
    ensure!(version == VERSION, "expected version {VERSION} of the index, got {version}");
    let [code] = take(&mut rest)?;
    let (width, separator) = match code {
        U16 => (2, u32::from(u16::MAX)),
        I32 => (4, i32::MAX as u32),
        U32 => (4, u32::MAX),
        other => bail!("expected ids of type {U16} (u16), {I32} (i32) or {U32} (u32), got type {other}"),
    };
    let count = u64::from_le_bytes(take(&mut rest)?) as usize;
    take::<8>(&mut rest)?; // Documents: records are read one by one, whatever they were grouped in.
    ensure!(count <= rest.len() / 12, "the index is cut short: {count} records do not fit in it");
    let (lengths, rest) = rest.split_at(4 * count);
    let offsets = &rest[..8 * count];
    // Records that share bytes would unfold a small file to one of any size.
    let ids = lengths.chunks_exact(4).map(|length| length.try_into().map_or(0, i32::from_le_bytes));
    let bytes: u64 = ids.map(|length| u64::try_from(length).unwrap_or(0) * width as u64).sum();
    ensure!(
        bytes <= bin.len() as u64,
        "the index tells of {bytes} bytes, and there are {}: one lies beyond the end, or the files are of different datasets",
        bin.len()
    );
    let mut records = Vec::with_capacity(count);
    for (length, offset) in lengths.chunks_exact(4).zip(offsets.chunks_exact(8)) {
        let length = i32::from_le_bytes(length.try_into().expect("chunks are of size 4"));
        let offset = i64::from_le_bytes(offset.try_into().expect("chunks are of size 8"));
        let bytes = usize::try_from(offset).ok().zip(usize::try_from(length).ok());
        let bytes = bytes.and_then(|(offset, length)| bin.get(offset..offset.checked_add(length * width)?));
        let bytes = bytes.with_context(|| {
            format!("record {} lies beyond the end: the file is cut short or of another dataset", records.len())
        })?;
        let ids: Vec<u32> = bytes
            .chunks_exact(width)
            .map(|id| {
                let mut word = [0; 4];
                word[..width].copy_from_slice(id);
                u32::from_le_bytes(word)
            })
            .collect();
        records.push(match ids.iter().position(|id| *id == separator) {
            Some(at) => (ids[..at].to_vec(), ids[at + 1..].to_vec()),
            None => (ids, Vec::new()),
        });
    }
    Ok(records)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>().context("the index is cut short")?;
    *rest = tail;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::shared_data;

    fn example(prompt: &[u32], response: &[u32]) -> Row {
        row(0, (prompt.to_vec(), response.to_vec()), 2, Vec::new())
    }

    fn round_trip(rows: &[Row], size: u32) -> Vec<Record> {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("train");
        write(&prefix, rows, size).unwrap();
        assert!(exists(&prefix));
        read(&prefix).unwrap()
    }

    #[test]
    fn rows_read_back_equal_in_both_widths() {
        let rows = [example(&[5, 7], &[9, 2]), example(&[1], &[]), example(&[65_000], &[3])];
        let expected: Vec<Record> = rows.iter().map(|r| (r.prompt.clone(), r.response.clone())).collect();
        assert_eq!(round_trip(&rows, 65_499), expected);
        assert_eq!(round_trip(&rows, 128_256), expected);
        let wide = [example(&[65_535, 100_000], &[65_535])];
        assert_eq!(round_trip(&wide, 128_256), [(vec![65_535, 100_000], vec![65_535])]);
    }

    #[test]
    fn a_row_says_how_it_ended() {
        assert_eq!(example(&[1], &[4, 2]).end, End::Stop);
        assert_eq!(example(&[1], &[4]).end, End::Length);
    }

    #[test]
    fn shards_are_chained() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("train");
        write(&folder.path().join("next"), &[example(&[8], &[2])], 9).unwrap();
        write(&prefix, &[example(&[7], &[2])], 9).unwrap();
        for extension in ["bin", "idx"] {
            let next = folder.path().join(format!("next_0.{extension}"));
            fs::rename(next, shard(&prefix, 1, extension)).unwrap();
        }
        assert_eq!(read(&prefix).unwrap(), [(vec![7], vec![2]), (vec![8], vec![2])]);
    }

    #[test]
    fn an_id_outside_of_the_vocabulary_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = write(&folder.path().join("x"), &[example(&[9], &[2])], 9).unwrap_err().to_string();
        assert!(error.contains("the id 9, but the vocabulary has 9"), "{error}");
    }

    #[test]
    fn a_damaged_pair_is_an_error_and_never_a_panic() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("train");
        write(&prefix, &[example(&[5, 7], &[9, 2]), example(&[1], &[2])], 20).unwrap();
        let (bin, idx) = (shard(&prefix, 0, "bin"), shard(&prefix, 0, "idx"));
        let (good_bin, good_idx) = (fs::read(&bin).unwrap(), fs::read(&idx).unwrap());
        fs::write(&bin, &good_bin[..good_bin.len() - 1]).unwrap();
        let error = format!("{:#}", read(&prefix).unwrap_err());
        assert!(error.contains("train_0.bin") && error.contains("lies beyond the end"), "{error}");
        fs::write(&bin, &good_bin).unwrap();
        // The last 8 bytes hold the documents, which nothing needs.
        for length in 0..good_idx.len() - 8 {
            fs::write(&idx, &good_idx[..length]).unwrap();
            let error = format!("{:#}", read(&prefix).unwrap_err());
            assert!(error.contains("cut short"), "{length}: {error}");
        }
        let mut negative = good_idx.clone();
        negative[34..38].copy_from_slice(&(-1_i32).to_le_bytes());
        fs::write(&idx, &negative).unwrap();
        assert!(read(&prefix).is_err());
    }

    #[test]
    fn the_reference_files_are_written_again_byte_for_byte() {
        let Some(data) = shared_data("golden") else { return };
        let records = read(&data.join("gpt2-valid")).unwrap();
        assert_eq!(records.len(), 1000);
        let rows: Vec<Row> = records.into_iter().map(|record| row(0, record, 50256, Vec::new())).collect();
        assert!(rows.iter().all(|row| row.end == End::Stop));
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("valid");
        write(&prefix, &rows, 50257).unwrap();
        for extension in ["bin", "idx"] {
            let written = fs::read(shard(&prefix, 0, extension)).unwrap();
            assert_eq!(written, fs::read(data.join(format!("gpt2-valid_0.{extension}"))).unwrap(), "{extension}");
        }
    }
}
