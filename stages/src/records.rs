//! Records of a file of rows, one after another: JSON objects a line each, the objects of one JSON list, or the lines of a
//! table (CSV, TSV) whose first line names the columns; plain or gzipped. Or the rows of a Parquet file.
//!
//! Which of these a file is, its bytes say, never its name; only text whose lines are documents has to be called that. Only what the caller keeps of a record stays in memory, a
//! record has a largest size, and what is packed may not unfold without end. All records are looked at, and errors name the lines of the
//! first few that are wrong and count the others.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::rc::Rc;

use anyhow::{Result, anyhow, bail};
use contract::files::{self, Input};
use flate2::bufread::MultiGzDecoder;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use serde_json::{Map, Value as Json};

use crate::parquet_rows;

/// The forms that are read, for messages.
pub(crate) const FORMS: &str =
    "rows are read from JSON lines, a JSON list, CSV or TSV, each plain or gzipped, and from Parquet";

/// Most bytes of one record: a book has one or two million.
const RECORD: u64 = 64 << 20;
/// Bytes that a packed file may unfold to in any case...
const UNFOLDED: u64 = 256 << 20;
/// ...and beyond them, times its own size. Text shrinks to a third or a tenth; zeros and blanks to a thousandth.
const RATIO: u64 = 100;
/// Records that are wrong and shown.
const SHOWN: usize = 5;
/// Records that are wrong before the rest is not looked at any more.
const ENOUGH: usize = 1000;

/// A record and where it stands.
#[derive(Debug)]
pub(crate) struct Record {
    /// Values by column, in the order of the file. An empty cell of a table is null.
    pub(crate) fields: Map<String, Json>,
    /// For messages: `FILE:LINE`, or `FILE, record N` in a list.
    pub(crate) place: String,
}

/// Hands every record of a file to `take`, in order. Blank lines are passed over.
///
/// Errors when the file cannot be read, and when records are wrong: by themselves, or because `take` says so. Errors of
/// `take` should name the record's place.
pub(crate) fn read(path: &Path, take: impl FnMut(Record) -> Result<()>) -> Result<()> {
    read_as(None, path, take)
}

/// The column of a document, in a file whose lines are documents.
pub(crate) const TEXT: &str = "text";
/// What stands for a line break in a document that is one line, as in the corpora of the reference programs.
const LINE_BREAK: &str = "<@x(x!>";

/// As [`read`], of a file of text whose lines are documents: each is a record with a `text`, in which `<@x(x!>` has become a
/// line break.
pub(crate) fn read_documents(path: &Path, take: impl FnMut(Record) -> Result<()>) -> Result<()> {
    read_as(Some(Form::Documents), path, take)
}

fn read_as(form: Option<Form>, path: &Path, take: impl FnMut(Record) -> Result<()>) -> Result<()> {
    let name = path.display().to_string();
    let mut reader =
        Reader { form: form.unwrap_or(Form::Lines), wrong: Wrong::default(), take, gauge: Rc::default(), name };
    match reader.read(path, form.is_some()) {
        Ok(()) | Err(Stop::Enough) => reader.wrong.conclude(&reader.name, reader.form),
        Err(Stop::Unreadable(error)) => Err(unreadable(path, error)),
        Err(Stop::Refused(error)) => Err(error),
    }
}

/// What the bytes of a file say it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Lines,
    List,
    Table,
    /// Text, of which each line is a document.
    Documents,
}

/// Why a file is not read on.
enum Stop {
    Unreadable(io::Error),
    Refused(anyhow::Error),
    /// Too many records are wrong.
    Enough,
}

/// Why rows of Parquet are not read on.
enum Broken {
    Stop(Stop),
    File(anyhow::Error),
}

impl From<anyhow::Error> for Broken {
    fn from(error: anyhow::Error) -> Self {
        Broken::File(error)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Unreadable(error)
    }
}

struct Reader<F> {
    name: String,
    form: Form,
    take: F,
    wrong: Wrong,
    gauge: Rc<Gauge>,
}

impl<F: FnMut(Record) -> Result<()>> Reader<F> {
    /// `is_told` where the form is given, and the bytes are not asked.
    fn read(&mut self, path: &Path, is_told: bool) -> Result<(), Stop> {
        let input = files::open(path, files::ROWS).map_err(Stop::Refused)?;
        let size = input.size();
        let mut input = BufReader::new(input);
        if input.fill_buf()?.starts_with(parquet_rows::MAGIC) {
            return self.parquet(input.into_inner(), size);
        }
        let packed = input.fill_buf()?.starts_with(&[0x1f, 0x8b]);
        let stream: Box<dyn Read> = if packed {
            self.gauge.most.set(UNFOLDED.max(size.saturating_mul(RATIO)));
            Box::new(MultiGzDecoder::new(input))
        } else {
            Box::new(input)
        };
        let mut stream = BufReader::new(Metered { stream, gauge: Rc::clone(&self.gauge) });
        let (head, skipped) = head(&mut stream)?;
        let text = form(&head).map_err(|what| Stop::Refused(anyhow!("`{}` {what}; {FORMS}", self.name)))?;
        if !is_told {
            self.form = text;
        }
        let header = Header::of(&head);
        let stream = Cursor::new(head).chain(stream);
        match self.form {
            Form::Lines | Form::Documents => self.lines(stream, skipped),
            Form::List => self.list(stream),
            Form::Table => self.table(stream, &header, skipped),
        }
    }

    fn lines(&mut self, mut stream: impl BufRead, skipped: u64) -> Result<(), Stop> {
        let mut bytes = Vec::new();
        for number in skipped + 1.. {
            bytes.clear();
            self.gauge.new_record();
            if stream.read_until(b'\n', &mut bytes)? == 0 {
                break;
            }
            let place = format!("{}:{number}", self.name);
            let Ok(line) = str::from_utf8(&bytes) else {
                self.is_wrong(not_text(&place, &bytes))?;
                continue;
            };
            // Files that were joined have a byte-order mark within.
            let line = line.trim_start_matches('\u{feff}').trim();
            if line.is_empty() {
                continue;
            }
            if self.form == Form::Documents {
                let text = str::from_utf8(&bytes).unwrap_or(line).trim_end_matches(['\r', '\n']);
                let text = text.trim_start_matches('\u{feff}').replace(LINE_BREAK, "\n");
                self.record(Record { fields: Map::from_iter([(TEXT.to_owned(), text.into())]), place })?;
                continue;
            }
            match serde_json::from_str(line) {
                Ok(element) => self.element(element, place)?,
                Err(error) => {
                    let hint = if error.is_eof() { ", where the line ends; a row stands on one line" } else { "" };
                    let (message, column) = (files::json_message(&error), error.column());
                    self.is_wrong(anyhow!("`{place}` is not JSON: {message} at column {column}{hint}"))?;
                }
            }
        }
        Ok(())
    }

    fn parquet(&mut self, input: Input, size: u64) -> Result<(), Stop> {
        if self.form == Form::Documents {
            return Err(Stop::Refused(anyhow!("`{}` is a Parquet file, not text", self.name)));
        }
        let mut number = 0_usize;
        let name = self.name.clone();
        let read = parquet_rows::each(input.into_file(), UNFOLDED.max(size.saturating_mul(RATIO)), |fields| {
            number += 1;
            let place = format!("{name}, row {number}");
            self.record(Record { fields, place }).map_err(Broken::Stop)
        });
        read.map_err(|broken| match broken {
            Broken::Stop(stop) => stop,
            Broken::File(error) => Stop::Refused(anyhow!("cannot read `{name}`: {error:#}")),
        })
    }

    fn list(&mut self, stream: impl BufRead) -> Result<(), Stop> {
        let mut deserializer = serde_json::Deserializer::from_reader(stream);
        let mut stop = None;
        let mut index = 0_usize;
        let mut take = |element| {
            self.gauge.new_record();
            index += 1;
            let place = format!("{}, record {index}", self.name);
            self.element(element, place).map_err(|reason| stop = Some(reason)).is_ok()
        };
        let read = Elements(&mut take).deserialize(&mut deserializer).and_then(|()| deserializer.end());
        match (read, stop) {
            (_, Some(stop)) => Err(stop),
            (Ok(()), None) => Ok(()),
            (Err(error), None) if error.is_io() => Err(Stop::Unreadable(error.into())),
            (Err(error), None) => {
                let (line, column) = (error.line(), error.column());
                let message = files::json_message(&error);
                self.is_wrong(anyhow!(
                    "`{}` is not a JSON list: {message} at line {line}, column {column}, after {index} records",
                    self.name
                ))
            }
        }
    }

    fn table(&mut self, stream: impl BufRead, header: &Header, skipped: u64) -> Result<(), Stop> {
        let mut reader = csv::ReaderBuilder::new().delimiter(header.delimiter).has_headers(false).from_reader(stream);
        let mut cells = csv::ByteRecord::new();
        let mut names: Option<Vec<String>> = None;
        loop {
            self.gauge.new_record();
            let before = reader.position().line();
            let read = reader.read_byte_record(&mut cells);
            let line = skipped + header.first_line(before, reader.position().line(), &cells);
            let place = format!("{}:{line}", self.name);
            let fields = match (read, &names) {
                (Ok(false), _) => return Ok(()),
                (Ok(true), None) => {
                    names = Some(columns(&cells, &place).map_err(Stop::Refused)?);
                    continue;
                }
                (Ok(true), Some(names)) => fields(names, &cells, &place),
                (Err(error), _) => match error.into_kind() {
                    csv::ErrorKind::Io(error) => return Err(Stop::Unreadable(error)),
                    csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                        Err(anyhow!("`{place}` has {len} cells, but the first line names {expected_len} columns"))
                    }
                    other => Err(anyhow!("`{place}` is not a line of a table: {other:?}")),
                },
            };
            match fields {
                Ok(fields) => self.record(Record { fields, place })?,
                Err(error) => self.is_wrong(error)?,
            }
        }
    }

    fn element(&mut self, element: Element, place: String) -> Result<(), Stop> {
        match element {
            Element::Object(fields) => self.record(Record { fields, place }),
            Element::Doubled(key) => self.is_wrong(anyhow!("`{place}` has the key `{key}` twice; which one holds?")),
            Element::Other(what) => self.is_wrong(anyhow!("`{place}` is not a JSON object, but {what}")),
        }
    }

    fn record(&mut self, record: Record) -> Result<(), Stop> {
        (self.take)(record).or_else(|error| self.is_wrong(error))
    }

    fn is_wrong(&mut self, error: anyhow::Error) -> Result<(), Stop> {
        self.wrong.count += 1;
        if self.wrong.shown.len() < SHOWN {
            self.wrong.shown.push(error);
        }
        if self.wrong.count < ENOUGH { Ok(()) } else { Err(Stop::Enough) }
    }
}

/// Records that are wrong.
#[derive(Default)]
struct Wrong {
    shown: Vec<anyhow::Error>,
    count: usize,
}

impl Wrong {
    fn conclude(mut self, name: &str, form: Form) -> Result<()> {
        // Any text is a table of sorts, so say how it came to be taken for one.
        let why = match form {
            Form::Table => format!("; its first line was taken for the names of columns, as {FORMS}"),
            Form::Lines | Form::List | Form::Documents => String::new(),
        };
        if self.count <= 1 {
            return self.shown.pop().map_or(Ok(()), |error| Err(anyhow!("{error:#}{why}")));
        }
        let count = if self.count < ENOUGH { self.count.to_string() } else { format!("{ENOUGH} or more") };
        let mut text = format!("{count} rows of `{name}` cannot be used{why}:");
        for error in &self.shown {
            text += &format!("\n  {error:#}");
        }
        if self.count > self.shown.len() {
            text += &format!("\n  and {} more", self.count - self.shown.len());
        }
        bail!(text)
    }
}

/// What is read: bytes since the last record, and in all.
struct Gauge {
    record: Cell<u64>,
    all: Cell<u64>,
    /// Most in all.
    most: Cell<u64>,
}

impl Default for Gauge {
    fn default() -> Self {
        Gauge { record: Cell::new(0), all: Cell::new(0), most: Cell::new(u64::MAX) }
    }
}

impl Gauge {
    fn new_record(&self) {
        self.record.set(0);
    }

    fn add(&self, bytes: u64) -> io::Result<()> {
        self.record.set(self.record.get() + bytes);
        self.all.set(self.all.get() + bytes);
        if self.record.get() > RECORD {
            return Err(io::Error::other(format!(
                "it holds more than {} without a row in them",
                files::in_words(RECORD)
            )));
        }
        if self.all.get() > self.most.get() {
            let most = files::in_words(self.most.get());
            return Err(io::Error::other(format!("it unfolds to more than {most}, which no file of text does")));
        }
        Ok(())
    }
}

struct Metered<R> {
    stream: R,
    gauge: Rc<Gauge>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.gauge.add(read as u64)?;
        Ok(read)
    }
}

/// An I/O error of the disk stays one; damaged or hostile content is the person's affair.
fn unreadable(path: &Path, error: io::Error) -> anyhow::Error {
    if error.raw_os_error().is_some() {
        return files::cannot("read", path, error);
    }
    let name = path.display();
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
            anyhow!("cannot read `{name}` as gzip, which it begins as; it may be cut short: {error}")
        }
        _ => anyhow!("cannot read `{name}`: {error}"),
    }
}

/// The beginning of a stream, without a byte-order mark, up to a length that shows more than white space; and the lines
/// before it that held nothing else.
fn head(stream: &mut impl Read) -> io::Result<(Vec<u8>, u64)> {
    let mut lines = 0;
    let mut first = true;
    loop {
        let mut head = Vec::new();
        stream.take(4096).read_to_end(&mut head)?;
        if std::mem::take(&mut first) && head.starts_with(files::BYTE_ORDER_MARK) {
            head.drain(..files::BYTE_ORDER_MARK.len());
        }
        if head.is_empty() || !head.iter().all(u8::is_ascii_whitespace) {
            return Ok((head, lines));
        }
        lines += head.iter().filter(|byte| **byte == b'\n').count() as u64;
    }
}

/// What a file is that begins so, or what it is instead of text.
fn form(head: &[u8]) -> Result<Form, &'static str> {
    const OTHERS: [(&[u8], &str); 9] = [
        (parquet_rows::MAGIC, "is a Parquet file that is packed once more"),
        (b"PK\x03\x04", "is a zip archive or a spreadsheet"),
        (b"\x28\xb5\x2f\xfd", "is packed with zstd"),
        (b"\xfd7zXZ\0", "is packed with xz"),
        (b"BZh", "is packed with bzip2"),
        (b"\x1f\x8b", "is gzipped twice"),
        (b"ARROW1", "is an Arrow file"),
        (b"\xff\xfe", "is text in UTF-16; save it as UTF-8"),
        (b"\xfe\xff", "is text in UTF-16; save it as UTF-8"),
    ];
    if let Some((_, what)) = OTHERS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(what);
    }
    if head.contains(&0) {
        return Err("is no text");
    }
    Ok(match head.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') | None => Form::Lines,
        Some(b'[') => Form::List,
        Some(_) => Form::Table,
    })
}

/// What the first line of a table shows of its form.
struct Header {
    delimiter: u8,
    /// Whether lines end in `\r\n`.
    returns: bool,
}

impl Header {
    fn of(head: &[u8]) -> Self {
        let begin = head.iter().position(|byte| !b" \r\n".contains(byte)).unwrap_or(0);
        let line = head[begin..].split(|byte| *byte == b'\n').next().unwrap_or_default();
        let delimiter = [b'\t', b',', b';'].into_iter().find(|delimiter| line.contains(delimiter)).unwrap_or(b',');
        Header { delimiter, returns: line.ends_with(b"\r") }
    }

    /// The line that a record begins on, by the lines that the reader was on before and after it. The reader counts blank
    /// lines to the record after them, and leaves the second half of `\r\n` to the next.
    fn first_line(&self, before: u64, after: u64, cells: &csv::ByteRecord) -> u64 {
        let within = cells.iter().flatten().filter(|byte| **byte == b'\n').count() as u64;
        let last = if self.returns { after } else { after.saturating_sub(1) };
        last.saturating_sub(within).max(before)
    }
}

fn columns(header: &csv::ByteRecord, place: &str) -> Result<Vec<String>> {
    let mut columns: Vec<String> = Vec::with_capacity(header.len());
    for (index, cell) in header.iter().enumerate() {
        let name = str::from_utf8(cell).map_err(|_| not_text(place, cell))?.trim();
        let name = if name.is_empty() { format!("column {}", index + 1) } else { name.to_owned() };
        if columns.contains(&name) {
            bail!("`{place}` names the column `{name}` twice; which one holds?");
        }
        columns.push(name);
    }
    Ok(columns)
}

/// A table cannot tell an empty text from none.
fn fields(columns: &[String], cells: &csv::ByteRecord, place: &str) -> Result<Map<String, Json>> {
    let cells = columns.iter().zip(cells).map(|(column, cell)| {
        let text = str::from_utf8(cell).map_err(|_| not_text(place, cell))?;
        Ok((column.clone(), if text.is_empty() { Json::Null } else { Json::from(text) }))
    });
    cells.collect()
}

fn not_text(place: &str, bytes: &[u8]) -> anyhow::Error {
    let at = str::from_utf8(bytes).map_or_else(|error| error.valid_up_to(), str::len);
    let byte = bytes.get(at).copied().unwrap_or_default();
    anyhow!("`{place}` is not text in UTF-8: byte {} is 0x{byte:02x}; save the file as UTF-8", at + 1)
}

/// A JSON value that should be a record.
enum Element {
    Object(Map<String, Json>),
    /// An object with this key twice.
    Doubled(String),
    /// Something else, in words.
    Other(&'static str),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Element, A::Error> {
                let mut fields = Map::new();
                let mut doubled = None;
                while let Some((key, value)) = map.next_entry::<String, Json>()? {
                    if fields.contains_key(&key) {
                        doubled = doubled.or(Some(key));
                    } else {
                        fields.insert(key, value);
                    }
                }
                Ok(doubled.map_or(Element::Object(fields), Element::Doubled))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
                while list.next_element::<de::IgnoredAny>()?.is_some() {}
                Ok(Element::Other("a list"))
            }

            fn visit_str<E: de::Error>(self, _: &str) -> Result<Element, E> {
                Ok(Element::Other("a text"))
            }

            fn visit_bool<E: de::Error>(self, _: bool) -> Result<Element, E> {
                Ok(Element::Other("true or false"))
            }

            fn visit_u64<E: de::Error>(self, _: u64) -> Result<Element, E> {
                Ok(Element::Other("a number"))
            }

            fn visit_i64<E: de::Error>(self, _: i64) -> Result<Element, E> {
                Ok(Element::Other("a number"))
            }

            fn visit_f64<E: de::Error>(self, _: f64) -> Result<Element, E> {
                Ok(Element::Other("a number"))
            }

            fn visit_unit<E: de::Error>(self) -> Result<Element, E> {
                Ok(Element::Other("null"))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

/// The elements of a list, handed on one by one until the receiver has had enough.
struct Elements<'a>(&'a mut dyn FnMut(Element) -> bool);

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(element) = list.next_element()? {
            if !(self.0)(element) {
                return Err(A::Error::custom("enough"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::testing::Scratch;

    fn gzip(bytes: impl AsRef<[u8]>) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes.as_ref()).unwrap();
        encoder.finish().unwrap()
    }

    fn records(path: &Path) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        read(path, |record| {
            records.push(record);
            Ok(())
        })?;
        Ok(records)
    }

    fn values(path: &Path) -> Vec<Json> {
        records(path).unwrap().into_iter().map(|record| Json::Object(record.fields)).collect()
    }

    fn error(path: &Path) -> String {
        format!("{:#}", records(path).unwrap_err())
    }

    #[test]
    fn lines_lists_tables_and_gzip_give_the_same_records_under_any_name() {
        let scratch = Scratch::new();
        let mark = "\u{feff}";
        let texts = [
            "{\"a\":\"1\"}\n\n{\"a\":\"\u{2028}\"}\r\n".to_owned(),
            "\n[{\"a\":\"1\"},\n{\"a\":\"\u{2028}\"}]".to_owned(),
            "a\n1\n\u{2028}".to_owned(),
            "a\r\n\"1\"\r\n\r\n\"\u{2028}\"\r\n".to_owned(),
            "\n".repeat(5000) + "{\"a\":\"1\"}\n{\"a\":\"\u{2028}\"}",
            " ".repeat(5000) + "[{\"a\":\"1\"},{\"a\":\"\u{2028}\"}]",
        ];
        for text in texts {
            let marked = format!("{mark}{text}");
            let contents = [text.clone().into_bytes(), marked.clone().into_bytes(), gzip(&text), gzip(&marked)];
            for (content, name) in contents.iter().flat_map(|c| ["a.jsonl", "a.gz", "a", "a.csv"].map(|name| (c, name)))
            {
                let file = scratch.file(name, content);
                assert_eq!(values(&file), [json!({"a": "1"}), json!({"a": "\u{2028}"})], "{text:?} as {name}");
            }
        }
    }

    #[test]
    fn members_of_a_gzip_are_read_on_and_marks_within_are_no_text() {
        let scratch = Scratch::new();
        let joined = [gzip("{\"a\":1}\n"), gzip("\u{feff}{\"a\":2}")].concat();
        assert_eq!(values(&scratch.file("a", joined)), [json!({"a": 1}), json!({"a": 2})]);
    }

    #[test]
    fn places_are_those_an_editor_shows() {
        let scratch = Scratch::new();
        let places = |text: String| {
            let records = records(&scratch.file("a", text)).unwrap();
            records.iter().map(|r| r.place.rsplit('/').next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(places("\n{}\n\n{}".into()), ["a:2", "a:4"]);
        assert_eq!(places("\n".repeat(9000) + "{}"), ["a:9001"]);
        assert_eq!(places("[{},\n{}]".into()), ["a, record 1", "a, record 2"]);
        for end in ["\n", "\r\n"] {
            assert_eq!(places(["x", "1", "\"2\n3\"", "4", ""].join(end)), ["a:2", "a:3", "a:5"], "{end:?}");
        }
    }

    #[test]
    fn separators_of_tables_are_found_and_empty_cells_are_null() {
        let scratch = Scratch::new();
        for separator in [",", ";", "\t"] {
            let text = ["a", "b\n1", "\"x;,\t\"\"y\"\"\"\n", "2\n"].join(separator);
            let expected = [json!({"a": "1", "b": "x;,\t\"y\""}), json!({"a": null, "b": "2"})];
            assert_eq!(values(&scratch.file("a", text)), expected, "{separator:?}");
        }
        // As pandas writes an index.
        assert_eq!(values(&scratch.file("a", "\ta\n0\tx\n")), [json!({"column 1": "0", "a": "x"})]);
    }

    #[test]
    fn everything_wrong_is_found_in_one_pass() {
        let scratch = Scratch::new();
        let text = b"{}\n{\"a\"\n[]\n3\n{\"a\":1,\"a\":2}\n{\"b\":\"\xff\"}\n{\"c\":1}\nx\n".to_vec();
        let path = scratch.file("a.jsonl", text);
        let mut seen = 0;
        let error = read(&path, |record| {
            seen += 1;
            if record.fields.contains_key("c") { Err(anyhow!("`{}` has a `c`", record.place)) } else { Ok(()) }
        });
        let error = format!("{:#}", error.unwrap_err()).replace(&scratch.path().display().to_string(), "");
        assert_eq!(seen, 2);
        assert_eq!(
            error.lines().collect::<Vec<_>>(),
            [
                "7 rows of `/a.jsonl` cannot be used:",
                "  `/a.jsonl:2` is not JSON: EOF while parsing an object at column 4, where the line ends; a row stands \
                 on one line",
                "  `/a.jsonl:3` is not a JSON object, but a list",
                "  `/a.jsonl:4` is not a JSON object, but a number",
                "  `/a.jsonl:5` has the key `a` twice; which one holds?",
                "  `/a.jsonl:6` is not text in UTF-8: byte 7 is 0xff; save the file as UTF-8",
                "  and 2 more",
            ]
        );
    }

    #[test]
    fn errors_name_the_file_and_the_line() {
        let scratch = Scratch::new();
        assert!(error(&scratch.path().join("none.jsonl")).contains("there is no file"));
        assert!(error(scratch.path()).contains("is a folder, expected a file of rows"));
        assert!(error(&scratch.file("a.jsonl", "{}\n\n{\"a\"")).contains("a.jsonl:3` is not JSON"));
        assert!(error(&scratch.file("a.json", "[{},")).contains("a.json` is not a JSON list: EOF"));
        assert!(
            error(&scratch.file("a.json", "[{},3]")).contains("a.json, record 2` is not a JSON object, but a number")
        );
        assert!(error(&scratch.file("a.json", "[{}]\n[{}]")).contains("trailing characters at line 2"));
        assert!(error(&scratch.file("a.csv", "a,b\n1\n")).contains("a.csv:2` has 1 cells, but the first line names 2"));
        assert!(error(&scratch.file("a.csv", "a,a\n1,2\n")).contains("a.csv:1` names the column `a` twice"));
        assert!(
            error(&scratch.file("a.csv", b"a,b\n1,\xe9\n")).contains("a.csv:2` is not text in UTF-8: byte 1 is 0xe9")
        );
        let whole = gzip("{\"a\":1}\n".repeat(500));
        let cut = error(&scratch.file("a", &whole[..whole.len() / 2]));
        assert!(cut.contains("a` as gzip, which it begins as; it may be cut short"), "{cut}");
    }

    #[test]
    fn the_lines_of_a_text_are_documents_where_that_is_said() {
        let scratch = Scratch::new();
        let text = "\u{feff}{a}<@x(x!>  b, c \r\n\n[\"d\"]";
        for content in [text.as_bytes().to_vec(), gzip(text)] {
            let path = scratch.file("a.txt", content);
            let mut found = Vec::new();
            let take = |record: Record| {
                found.push((record.place.rsplit_once(':').unwrap().1.to_owned(), record.fields["text"].clone()));
                Ok(())
            };
            read_documents(&path, take).unwrap();
            assert_eq!(found, [("1".to_owned(), json!("{a}\n  b, c ")), ("3".to_owned(), json!("[\"d\"]"))]);
        }
        let error = read_documents(&scratch.file("a.txt", b"PAR1"), |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("is a Parquet file, not text"), "{error}");
    }

    #[test]
    fn what_is_no_text_is_named_with_the_forms_that_are_read() {
        let scratch = Scratch::new();
        let cases: [(&[u8], &str); 5] = [
            (&gzip(b"PAR1\x15\x04"), "is a Parquet file that is packed once more"),
            (b"PK\x03\x04", "zip"),
            (b"\xff\xfea\0", "UTF-16"),
            (b"ab\0c", "no text"),
            (&gzip(gzip("{}")), "gzipped twice"),
        ];
        for (content, expected) in cases {
            let error = error(&scratch.file("a", content));
            assert!(error.contains(expected) && error.contains("JSON lines, a JSON list, CSV or TSV"), "{error}");
        }
    }

    #[test]
    fn what_unfolds_without_end_is_left_early() {
        let scratch = Scratch::new();
        let blanks = error(&scratch.file("a", gzip(vec![b' '; 80 << 20])));
        assert!(blanks.contains("more than 64.0 MiB without a row"), "{blanks}");
        let open = error(&scratch.file("a", gzip([&b"a,b\n\""[..], &vec![b'x'; 80 << 20]].concat())));
        assert!(open.contains("more than 64.0 MiB without a row"), "{open}");
        let lines = error(&scratch.file("a", gzip([&b"{}"[..], &vec![b'\n'; 300 << 20]].concat())));
        assert!(lines.contains("unfolds to more than 256.0 MiB"), "{lines}");
    }

    proptest! {
        #[test]
        fn any_rows_read_back_from_every_form(rows in prop::collection::vec(("\\PC{1,12}", "[a-z,;\t\"' \n\r]{1,9}"), 1..6)) {
            let scratch = Scratch::new();
            let rows: Vec<Json> = rows.into_iter().map(|(a, b)| json!({"a": a, "b b": b})).collect();
            let lines = rows.iter().map(|row| format!("{row}\n")).collect::<String>();
            prop_assert_eq!(&values(&scratch.file("a", &lines)), &rows);
            prop_assert_eq!(&values(&scratch.file("a", gzip(serde_json::to_string_pretty(&rows).unwrap()))), &rows);
            for delimiter in *b",\t;" {
                let mut table = csv::WriterBuilder::new().delimiter(delimiter).from_writer(Vec::new());
                table.write_record(["a", "b b"]).unwrap();
                for row in &rows {
                    table.write_record([row["a"].as_str().unwrap(), row["b b"].as_str().unwrap()]).unwrap();
                }
                prop_assert_eq!(&values(&scratch.file("a", table.into_inner().unwrap())), &rows);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "[\\[\\]{}\",:a1\n]{0,60}") {
            let scratch = Scratch::new();
            let _ = records(&scratch.file("a", &bytes));
            let _ = records(&scratch.file("a", gzip(&bytes)));
            let _ = records(&scratch.file("a", &text));
        }
    }
}
