//! Reading files that people name.
//!
//! A path from a pipeline or the command line may lead to anything: a folder, a pipe that nobody writes to, a device
//! without end, a file of a hundred gigabytes where a page was meant. Every reader of such a path comes through here. What
//! is no regular file is refused by its metadata, before it is opened; what is larger than files of its sort can
//! sensibly be is refused by its size; and of the rest no more than the limit is read, even where it grows meanwhile.
//!
//! A path that leads nowhere or elsewhere is a mistake of the person: its error has no [`io::Error`] in its chain. A disk that
//! fails has one.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use rustix::fs::{Mode, OFlags};
use serde::de::DeserializeOwned;

use crate::Result;

/// A sort of file, and how large such a file can sensibly be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What it is called in messages, with its article.
    pub what: &'static str,
    /// Most bytes.
    pub bytes: u64,
}

/// A pipeline or what it includes: written by hand, and held in memory several times over while it is read.
pub const PIPELINE: Limit = Limit { what: "a pipeline file", bytes: 4 << 20 };
/// JSON that describes a model or a tokenizer: `config.json`, `tokenizer_config.json`, an index of weights.
pub const SETTINGS: Limit = Limit { what: "a settings file", bytes: 64 << 20 };
/// A `tokenizer.json`, or a vocabulary with its merges. Those of 256 thousand tokens have some 35 MiB.
pub const TOKENIZER: Limit = Limit { what: "a tokenizer file", bytes: 512 << 20 };
/// Rows of text, read one after another.
pub const ROWS: Limit = Limit { what: "a file of rows", bytes: 1 << 40 };
/// Ids of a tokenised data set or their index, read whole.
pub const TOKENS: Limit = Limit { what: "a token file", bytes: 64 << 30 };
/// Weights of a model.
pub const WEIGHTS: Limit = Limit { what: "a file of weights", bytes: 4 << 40 };

/// An open regular file that gives no more bytes than its limit.
#[derive(Debug)]
pub struct Input {
    file: File,
    name: String,
    limit: Limit,
    read: u64,
    /// Bytes it had when it was opened.
    size: u64,
}

impl Input {
    /// Bytes it had when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file itself, for who goes to and fro in it, by its size.
    pub fn into_file(self) -> File {
        self.file
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.read += read as u64;
        if self.read > self.limit.bytes {
            return Err(io::Error::other(TooLarge::new(&self.name, self.limit, None)));
        }
        Ok(read)
    }
}

/// More bytes than a file of its sort can sensibly have.
#[derive(Debug)]
struct TooLarge(String);

impl TooLarge {
    fn new(name: &str, limit: Limit, size: Option<u64>) -> Self {
        let Limit { what, bytes } = limit;
        let size = size.map_or("it has more".into(), |size| format!("it has {}", in_words(size)));
        TooLarge(format!("`{name}` is too large for {what}: {size}, and at most {} are read", in_words(bytes)))
    }
}

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TooLarge {}

/// Opens a file that must be regular and within its limit.
pub fn open(path: &Path, limit: Limit) -> Result<Input> {
    let name = path.display().to_string();
    check(path, &fs::metadata(path).map_err(|error| cannot("find", path, error))?, limit)?;
    // Not blocking: a pipe that took the file's place meanwhile would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| cannot("read", path, error.into()))?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(|error| cannot("look at", path, error))?;
    check(path, &metadata, limit)?;
    Ok(Input { file, name, limit, read: 0, size: metadata.len() })
}

/// Reads a file whole.
pub fn read(path: &Path, limit: Limit) -> Result<Vec<u8>> {
    let input = open(path, limit)?;
    let capacity = input.size;
    whole(input, capacity, path)
}

/// Reads a stream that is no file, such as standard input, to its end. `name` is what messages call it.
pub fn read_stream(stream: impl Read, name: &str, limit: Limit) -> Result<Vec<u8>> {
    let bytes = whole(stream.take(limit.bytes + 1), 0, Path::new(name))?;
    if bytes.len() as u64 > limit.bytes {
        bail!(TooLarge::new(name, limit, None).0);
    }
    Ok(bytes)
}

/// Reads a text file whole, without the byte-order mark that some editors begin it with.
///
/// Errors where it is not UTF-8 name the line.
pub fn read_text(path: &Path, limit: Limit) -> Result<String> {
    text(read(path, limit)?, &path.display().to_string())
}

/// Reads a JSON file. Errors name line and column.
pub fn read_json<T: DeserializeOwned>(path: &Path, limit: Limit) -> Result<T> {
    json(&read_text(path, limit)?, &path.display().to_string())
}

/// Parses JSON that came from the file called `name`. Errors name line and column.
pub fn json<T: DeserializeOwned>(text: &str, name: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        let message = json_message(&error);
        let sort = if error.is_data() { "is not what it should be" } else { "is not JSON" };
        anyhow!("`{name}:{}:{}` {sort}: {message}", error.line(), error.column())
    })
}

/// What a JSON error says, without the place at its end.
pub fn json_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).unwrap_or(&text).to_owned()
}

/// The text that some bytes are, without a byte-order mark. `name` is what messages call the file.
pub fn text(mut bytes: Vec<u8>, name: &str) -> Result<String> {
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let bytes = error.as_bytes();
        let line = 1 + bytes[..valid].iter().filter(|byte| **byte == b'\n').count();
        anyhow!(
            "`{name}:{line}` is not text in UTF-8: it holds the byte 0x{:02x}; save the file as UTF-8",
            bytes[valid]
        )
    })
}

/// What some editors begin a file in UTF-8 with. It is no part of the text.
pub const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// A number of things as people say it: `1 row`, `2 rows`.
pub fn counted(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// A number of bytes as people say it: `1.5 KiB`.
pub fn in_words(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.1} {}", UNITS[unit]) }
}

fn check(path: &Path, metadata: &Metadata, limit: Limit) -> Result<()> {
    let (name, what) = (path.display(), limit.what);
    if !metadata.is_file() {
        let kind = metadata.file_type();
        let is = match () {
            () if kind.is_dir() => "a folder",
            () if kind.is_fifo() => "a pipe",
            () if kind.is_socket() => "a socket",
            () => "a device",
        };
        bail!("`{name}` is {is}, expected {what}");
    }
    if metadata.len() > limit.bytes {
        bail!(TooLarge::new(&name.to_string(), limit, Some(metadata.len())).0);
    }
    Ok(())
}

fn whole(mut stream: impl Read, size: u64, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // Room is asked for, not taken for granted: a size on disk says nothing of the memory there is.
    let reserved = usize::try_from(size).ok().and_then(|size| bytes.try_reserve_exact(size).ok());
    reserved.with_context(|| format!("`{}` has {}, more than there is memory for", path.display(), in_words(size)))?;
    match stream.read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(cannot("read", path, error)),
    }
}

/// An error that says what could not be done, and of whose making it is.
pub fn cannot(what: &str, path: &Path, error: io::Error) -> anyhow::Error {
    use io::ErrorKind::{InvalidFilename, InvalidInput, NotADirectory, NotFound, PermissionDenied};
    let name = path.display();
    if error.get_ref().is_some_and(|inner| inner.is::<TooLarge>()) {
        return anyhow!("{error}");
    }
    match error.kind() {
        NotFound => anyhow!("there is no file `{name}`{}", looked_for(path)),
        PermissionDenied | NotADirectory | InvalidFilename | InvalidInput => anyhow!("cannot {what} `{name}`: {error}"),
        _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            anyhow!("cannot {what} `{name}`: {error}")
        }
        _ => anyhow::Error::new(error).context(format!("cannot {what} `{name}`")),
    }
}

/// Where a relative path was looked for: nobody sees it from the path.
pub fn looked_for(path: &Path) -> String {
    match std::env::current_dir() {
        Ok(folder) if path.is_relative() => {
            format!("; paths begin in the folder that `pipeline` was started in, `{}`", folder.display())
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::path::PathBuf;

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    const SMALL: Limit = Limit { what: "a small file", bytes: 10 };

    fn error(path: &Path) -> String {
        let error = read(path, SMALL).unwrap_err();
        assert!(!error.chain().any(|cause| cause.is::<io::Error>()), "the person's mistake, not the disk's: {error:?}");
        format!("{error:#}")
    }

    #[test]
    fn what_is_no_regular_file_is_refused_before_it_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        mknodat(CWD, path("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        std::os::unix::fs::symlink(path("pipe"), path("link")).unwrap();
        std::os::unix::fs::symlink("round", path("round")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        let cases: [(PathBuf, &str); 8] = [
            (path("pipe"), "is a pipe, expected a small file"),
            (path("link"), "is a pipe"),
            (path("socket"), "is a socket"),
            (path("."), "is a folder"),
            ("/dev/zero".into(), "`/dev/zero` is a device, expected a small file"),
            (path("round"), "round"),
            (path("nowhere"), "there is no file"),
            ("nul\0.json".into(), "nul"),
        ];
        for (path, expected) in cases {
            let error = error(&path);
            assert!(error.contains(expected), "{error}");
        }
        assert!(error(Path::new("no/where")).contains("paths begin in the folder that `pipeline` was started in, `/"));
    }

    #[test]
    fn no_more_than_the_limit_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for length in [0, 1, 9, 10] {
            fs::write(&path, vec![b'x'; length]).unwrap();
            assert_eq!(read(&path, SMALL).unwrap().len(), length);
            assert_eq!(read_stream(&vec![b'x'; length][..], "-", SMALL).unwrap().len(), length);
        }
        fs::write(&path, "12345678901").unwrap();
        assert!(error(&path).contains("is too large for a small file: it has 11 B, and at most 10 B are read"));
        // A file of holes takes no room on disk and has any size.
        OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(error(&path).contains("it has 1.0 TiB"));
        let stream = read_stream(io::repeat(b' '), "standard input", SMALL).unwrap_err().to_string();
        assert!(stream.contains("`standard input` is too large for a small file: it has more"), "{stream}");
    }

    #[test]
    fn a_file_that_grows_while_it_is_read_ends_at_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "1234").unwrap();
        let input = open(&path, SMALL).unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(&[b'x'; 100]).unwrap();
        let error = whole(input, 4, &path).unwrap_err().to_string();
        assert!(error.contains("is too large for a small file: it has more"), "{error}");
    }

    #[test]
    fn text_and_json_name_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let text = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            read_text(&path, SETTINGS).map_err(|error| error.to_string())
        };
        assert_eq!(text(b"\xef\xbb\xbfone").unwrap(), "one");
        assert_eq!(text("zwölf\r\n".as_bytes()).unwrap(), "zwölf\r\n");
        let error = text(b"one\ntwo\xff").unwrap_err();
        assert!(error.contains("a.json:2` is not text in UTF-8: it holds the byte 0xff"), "{error}");
        let json = |text: &str| {
            fs::write(&path, text).unwrap();
            read_json::<std::collections::BTreeMap<String, u32>>(&path, SETTINGS).map_err(|error| error.to_string())
        };
        assert_eq!(json("\u{feff}{\"a\": 1}").unwrap()["a"], 1);
        let error = json("{\n  \"a\": 1,\n}").unwrap_err();
        assert!(error.contains("a.json:3:1` is not JSON: trailing comma"), "{error}");
        let error = json("{\"a\": -1}").unwrap_err();
        assert!(error.contains("a.json:1:8` is not what it should be: invalid value"), "{error}");
    }

    #[test]
    fn sizes_read_well() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")];
        for (bytes, expected) in cases {
            assert_eq!(in_words(bytes), expected);
        }
    }
}
