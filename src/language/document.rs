//! Finds the file and reads it with all that it includes into one tree.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use contract::files;

use crate::ground::source::{Source, Span};
use crate::language::diagnostic::{Diagnostic, Diagnostics, Problems, did_you_mean};
use crate::language::read;
use crate::language::yaml::{self, Entry, Map, Node};

/// Sections of a pipeline file.
pub(crate) const SECTIONS: [&str; 10] =
    ["version", "name", "include", "conventions", "params", "stages", "profiles", "variants", "ablations", "report"];

/// A file that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it is on disk, or its name among the shipped ones.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
    /// Whether it is compiled in.
    pub shipped: bool,
}

/// Finds a pipeline: a path; one that begins nowhere in particular and is not there is looked for below `pipelines/`, then among the shipped ones; `-` is
/// standard input, as are the paths under which a shell hands on a pipe.
///
/// Errors when it is nowhere or cannot be read.
pub fn find_file(file: &Path, shipped: &[(&str, &str)]) -> Result<Found, Diagnostics> {
    if is_stream(file) {
        let text = read_stream(file)?;
        return Ok(Found { path: file.to_owned(), text, shipped: false });
    }
    let bare = file.components().all(|part| matches!(part, Component::Normal(_)));
    let places = [Some(file.to_owned()), bare.then(|| Path::new("pipelines").join(file))];
    if let Some(path) = places.into_iter().flatten().find(|path| path.is_file()) {
        return read_file(&path).map(|text| Found { path, text, shipped: false });
    }
    let name = file.display().to_string();
    if let Some((_, text)) = shipped.iter().find(|(known, _)| bare && *known == name) {
        return Ok(Found { path: file.to_owned(), text: (*text).to_owned(), shipped: true });
    }
    // A folder, a pipe, a device: said as what it is.
    if file.exists() {
        return read_file(file).map(|text| Found { path: file.to_owned(), text, shipped: false });
    }
    let near = Path::new("pipelines").read_dir().into_iter().flatten().flatten();
    let near: Vec<String> = near.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let with_ending = format!("{name}.yaml");
    let known: Vec<&str> = shipped.iter().map(|(name, _)| *name).chain(near.iter().map(String::as_str)).collect();
    let hint = match known.contains(&with_ending.as_str()) || Path::new(&with_ending).is_file() {
        true => format!("did you mean `{with_ending}`?"),
        false => did_you_mean(&name, "pipeline", known.into_iter().filter(|name| name.ends_with(".yaml"))),
    };
    Err(Diagnostic::new(format!("no pipeline `{name}`: there is no such file"), hint).into())
}

/// Whether a path leads to something that can be read once only.
fn is_stream(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let handed_on = path == Path::new("/dev/stdin") || path.starts_with("/dev/fd") || path.starts_with("/proc/self/fd");
    path == Path::new("-") || handed_on && fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Streams are read to their end when they are first asked for: a command may look at its pipeline twice.
fn read_stream(path: &Path) -> Result<String, Diagnostics> {
    static READ: Mutex<BTreeMap<PathBuf, String>> = Mutex::new(BTreeMap::new());
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(text) = read.get(path) {
        return Ok(text.clone());
    }
    let is_input = path == Path::new("-");
    let name = if is_input { "standard input".to_owned() } else { path.display().to_string() };
    let bytes = match is_input {
        true => files::read_stream(std::io::stdin().lock(), &name, files::PIPELINE),
        false => {
            fs::File::open(path).map_err(Into::into).and_then(|file| files::read_stream(file, &name, files::PIPELINE))
        }
    };
    let text = bytes.and_then(|bytes| files::text(bytes, &name));
    let text = text
        .map_err(|error| Diagnostics::from(Diagnostic::new(format!("{error:#}"), "a pipeline is a text in UTF-8")))?;
    read.insert(path.to_owned(), text.clone());
    Ok(text)
}

fn read_file(path: &Path) -> Result<String, Diagnostics> {
    let hint = "a pipeline is a text file in UTF-8 that you may read";
    files::read_text(path, files::PIPELINE).map_err(|error| Diagnostic::new(format!("{error:#}"), hint).into())
}

/// Writes a copy of a shipped pipeline and of what it includes into `folder`, to start from. Gives the files written.
///
/// Errors when the name is unknown or a file of that name is already there.
pub fn init(name: &str, shipped: &[(&str, &str)], folder: &Path) -> Result<Vec<PathBuf>, Diagnostics> {
    let mut names = vec![name.to_owned()];
    let mut written = Vec::new();
    while let Some(name) = names.pop() {
        let Some((_, text)) = shipped.iter().find(|(known, _)| *known == name) else {
            let hint = did_you_mean(&name, "pipeline", shipped.iter().map(|(name, _)| *name));
            return Err(Diagnostic::new(format!("unknown pipeline `{name}`"), hint).into());
        };
        let path = folder.join(&name);
        let refused = |error: std::io::Error| {
            let hint = "choose another folder, or move the file that is there away";
            Diagnostics::from(Diagnostic::new(format!("cannot write `{}`: {error}", path.display()), hint))
        };
        fs::create_dir_all(path.parent().unwrap_or(folder)).map_err(refused)?;
        let mut file = fs::File::create_new(&path).map_err(refused)?;
        std::io::Write::write_all(&mut file, text.as_bytes()).map_err(refused)?;
        written.push(path);
        let tree = yaml::parse(&Source::new(name.clone(), *text))?;
        let included = tree.get("include").map(|node| read::texts(node, "include", &mut Problems::default()));
        let beside = |text: read::Text| plain(&Path::new(&name).parent().unwrap_or(Path::new("")).join(text.value));
        let included = included.into_iter().flatten().map(|text| beside(text).display().to_string());
        names.extend(included.filter(|other| !folder.join(other).exists()));
    }
    Ok(written)
}

/// Reads `file` with all that it includes. The tree holds the sections of [`SECTIONS`] but `include`.
pub(crate) fn load(file: &Path, shipped: &[(&str, &str)]) -> Result<Node, Diagnostics> {
    let found = find_file(file, shipped)?;
    let mut problems = Problems::default();
    let mut reader = Reader { shipped, open: Vec::new(), problems: &mut problems };
    let tree = reader.read(found);
    if let Some(tree) = &tree {
        check_version(tree, &mut problems);
    }
    match tree {
        Some(tree) => problems.finish(tree),
        None => Err(Diagnostics { diagnostics: problems.0 }),
    }
}

fn check_version(tree: &Node, problems: &mut Problems) {
    let hint = "write `version: 1` at the top";
    match tree.get("version") {
        None => problems.push(
            Diagnostic::new("the pipeline does not say its `version`", hint)
                .at(Span { end: tree.span.start, ..tree.span.clone() }, "expected before this"),
        ),
        Some(node) if node.to_json() != 1 => {
            let message = format!("this program reads `version: 1`, got {}", node.describe());
            problems.push(Diagnostic::new(message, hint).at(node.span.clone(), "another version"));
        }
        Some(_) => {}
    }
}

struct Reader<'a> {
    shipped: &'a [(&'a str, &'a str)],
    /// The files that are being read, outermost first, and where each includes the next.
    open: Vec<(PathBuf, Span)>,
    problems: &'a mut Problems,
}

impl Reader<'_> {
    fn read(&mut self, found: Found) -> Option<Node> {
        let source = Source::new(found.path.display().to_string(), found.text);
        let mut tree = self.problems.keep(yaml::parse(&source))?;
        if matches!(tree.value, yaml::Value::Null) {
            tree = Node::empty_map(tree.span);
        }
        read::check_keys(read::mapping(&tree, "the pipeline", self.problems)?, "a pipeline", &SECTIONS, self.problems);
        let include = tree.map_mut().and_then(|map| map.shift_remove("include"));
        let included = include.map(|entry| read::texts(&entry.node, "include", self.problems)).unwrap_or_default();
        // Later files win over earlier ones, and this one over all that it includes.
        for file in included.into_iter().rev() {
            if let Some(below) = self.include(&found.path, found.shipped, &source, &file) {
                merge(&mut tree, below, 0);
            }
        }
        Some(tree)
    }

    fn include(&mut self, from: &Path, shipped: bool, source: &Arc<Source>, file: &read::Text) -> Option<Node> {
        let path = plain(&from.parent().unwrap_or(Path::new("")).join(&file.value));
        self.open.push((plain(from), file.span.clone()));
        let result = if let Some(first) = self.open.iter().position(|(open, _)| *open == path) {
            let circle: Vec<String> = self.open[first..].iter().map(|(open, _)| open.display().to_string()).collect();
            let message = format!("files include each other in a circle: {} -> {}", circle.join(" -> "), circle[0]);
            let mut diagnostic = Diagnostic::new(message, "move what both need into a third file");
            for (_, span) in &self.open[first..self.open.len() - 1] {
                diagnostic = diagnostic.also(span.clone(), "included here");
            }
            self.problems.push(diagnostic.at(file.span.clone(), "closes the circle"));
            None
        } else {
            self.open_file(&path, shipped, source, file)
        };
        self.open.pop();
        result
    }

    fn open_file(&mut self, path: &Path, shipped: bool, source: &Arc<Source>, file: &read::Text) -> Option<Node> {
        let name = path.display().to_string();
        let text = if shipped {
            let text = self.shipped.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned());
            text.ok_or_else(|| "it is not among the shipped ones".to_owned())
        } else if !path.exists() {
            Err("there is no such file".to_owned())
        } else {
            files::read_text(path, files::PIPELINE).map_err(|error| format!("{error:#}"))
        };
        match text {
            Ok(text) => self.read(Found { path: path.to_owned(), text, shipped }),
            Err(error) => {
                let message = format!("cannot read `{name}`, which `{}` includes: {error}", source.name);
                let hint = "the path of an included file is relative to the file that includes it";
                self.problems.push(Diagnostic::new(message, hint).at(file.span.clone(), "included here"));
                None
            }
        }
    }
}

/// `path` without `.` and, where it can be done, `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if plain.file_name().is_some() => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

/// Fills `tree` with what it lacks of `below`. A stage that says its `kind` or `loop` stands as it is: settings of two
/// different stages are never mixed.
fn merge(tree: &mut Node, below: Node, depth: usize) {
    let says_what_it_is = depth >= 2 && ["kind", "loop"].iter().any(|key| tree.get(key).is_some());
    if says_what_it_is || below.map().is_none() {
        return;
    }
    let Some(map) = tree.map_mut() else { return };
    let yaml::Value::Map(below) = below.value else { return };
    let own = std::mem::take(map);
    *map = merged(own, below, depth);
}

/// Included entries stand first, as if they were written above.
fn merged(mut own: Map, below: Map, depth: usize) -> Map {
    let mut result = Map::new();
    for (key, entry) in below {
        let entry = match own.shift_remove(&key) {
            Some(Entry { key: span, mut node }) => {
                merge(&mut node, entry.node, depth + 1);
                Entry { key: span, node }
            }
            None => entry,
        };
        result.insert(key, entry);
    }
    result.extend(own);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn the_including_file_wins_and_later_includes_win_over_earlier_ones() {
        let folder = folder(&[
            ("main.yaml", "version: 1\ninclude: [parts/a.yaml, parts/b.yaml]\nparams: {x: 1}\n"),
            ("parts/a.yaml", "params: {x: 2, y: 2, z: 2}\nstages: {s: {kind: a, with: {k: 1}}}\n"),
            ("parts/b.yaml", "include: ../c.yaml\nparams: {y: 3}\nstages: {s: {kind: b}}\n"),
            ("c.yaml", "params: {w: 4, y: 4}\n"),
        ]);
        let tree = load(&folder.path().join("main.yaml"), &[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(
            tree.to_json(),
            json!({"version": 1, "params": {"x": 1, "y": 3, "z": 2, "w": 4}, "stages": {"s": {"kind": "b"}}})
        );
    }

    #[test]
    fn a_circle_of_includes_is_printed() {
        let folder = folder(&[("a.yaml", "version: 1\ninclude: [b.yaml]\n"), ("b.yaml", "include: [./a.yaml]\n")]);
        let error = load(&folder.path().join("a.yaml"), &[]).unwrap_err().diagnostics.remove(0);
        assert!(error.message.contains("a.yaml -> ") && error.message.ends_with("a.yaml"), "{}", error.message);
    }

    #[test]
    fn what_is_no_pipeline_file_is_refused_before_it_is_read() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};

        let folder = folder(&[("empty", "")]);
        mknodat(CWD, folder.path().join("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        fs::write(folder.path().join("mark.yaml"), "\u{feff}version: 1\nname: marked\n").unwrap();
        fs::write(folder.path().join("latin.yaml"), b"version: 1\nname: caf\xe9\n").unwrap();
        fs::File::create(folder.path().join("huge")).unwrap().set_len(50 << 20).unwrap();
        for (name, expected) in [
            ("pipe", "is a pipe, expected a pipeline file"),
            ("/dev/zero", "is a device"),
            (".", "is a folder"),
            ("huge", "is too large for a pipeline file: it has 50.0 MiB, and at most 4.0 MiB are read"),
            ("latin.yaml", "latin.yaml:2` is not text in UTF-8: it holds the byte 0xe9"),
        ] {
            let path = folder.path().join(name);
            let error = load(&path, &[]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            let main = folder.path().join("main.yaml");
            fs::write(&main, format!("version: 1\ninclude: [{name}]\n")).unwrap();
            let error = load(&main, &[]).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("main.yaml:2:11"), "{error}");
        }
        assert!(load(&folder.path().join("mark.yaml"), &[]).is_ok());
    }

    #[test]
    fn a_bare_name_is_looked_for_among_the_shipped_pipelines_with_their_includes() {
        let shipped = [("one.yaml", "version: 1\ninclude: [two.yaml]\n"), ("two.yaml", "params: {x: 2}\n")];
        let tree = load(Path::new("one.yaml"), &shipped).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(tree.to_json(), json!({"params": {"x": 2}, "version": 1}));
        let error = find_file(Path::new("oen.yaml"), &shipped).unwrap_err();
        assert_eq!(error.diagnostics[0].hint, "did you mean `one.yaml`?");
        assert!(find_file(Path::new("./one.yaml"), &shipped).is_err(), "a path is not a bare name");
        let below = [("parts/one.yaml", "version: 1\ninclude: [../two.yaml]\n"), shipped[1]];
        let tree = load(Path::new("parts/one.yaml"), &below).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(tree.to_json()["params"], json!({"x": 2}));
    }

    #[test]
    fn init_copies_a_pipeline_with_its_includes_and_overwrites_nothing() {
        let shipped = [("one.yaml", "version: 1\ninclude: [two.yaml]\n"), ("two.yaml", "params: {x: 2}\n")];
        let folder = folder(&[]);
        assert_eq!(init("one.yaml", &shipped, folder.path()).unwrap().len(), 2);
        assert_eq!(fs::read_to_string(folder.path().join("two.yaml")).unwrap(), shipped[1].1);
        assert!(init("one.yaml", &shipped, folder.path()).unwrap_err().to_string().contains("cannot write"));
    }
}
