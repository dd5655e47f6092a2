//! What files outside of the pipeline hold, as keys say it: of local ones a digest, of the hub a commit, of the web the digest
//! that names them.

use std::path::PathBuf;
use std::sync::LazyLock;

use anyhow::Result;
use cache::Store;
use contract::{FileDigest, HubPath, Location, Source};
use remote::{Remote, Settings};

use crate::plan::key::SourcePart;

/// The way to what is elsewhere. One for the process, which so sees a branch at one commit from its beginning to its end.
pub(crate) static REMOTE: LazyLock<Remote> = LazyLock::new(|| Remote::new(Settings::from_env()));

/// What a source holds. Files are hashed where the store does not remember them; nothing is fetched, and the hub is asked
/// what a branch is.
pub(crate) fn of(source: &Source, store: &Store) -> Result<SourcePart> {
    match &source.at {
        Location::Local(path) => {
            Ok(SourcePart::Content { content: store.digest_files(path, &|name| source.takes(name))? })
        }
        Location::Hub(at) => {
            let HubPath { repository, path, .. } = at;
            Ok(SourcePart::Hub { hub: repository.clone(), commit: REMOTE.commit(at)?, path: path.clone() })
        }
        Location::Web(file) => Ok(match &file.digest {
            FileDigest::Blake3(digits) => SourcePart::Content { content: digits.parse()? },
            FileDigest::Sha256(digits) => SourcePart::Sha256 { sha256: digits.clone() },
        }),
    }
}

/// Where the files of the hub lie on this machine, if all that are read are here already.
pub(crate) fn at_hand(source: &Source) -> Option<PathBuf> {
    let Location::Hub(at) = &source.at else { return None };
    REMOTE.cached(at, &REMOTE.commit(at).ok()?, &|names| source.choose(names))
}

#[cfg(test)]
mod tests {
    use contract::WebFile;
    use serde_json::json;

    use super::*;

    /// What stands in keys is what is read back, and it is the same whoever serves it and whatever it is called there.
    #[test]
    fn in_a_key_stands_what_names_the_content_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let digits = "0f".repeat(32);
        let web = |url: &str, digest| Location::Web(WebFile { url: url.into(), digest });
        let hub = |text: &str| Location::Hub(HubPath::parse(text).unwrap());
        let commit = "0a".repeat(20);
        std::fs::write(folder.path().join("file"), "bytes").unwrap();
        let cases = [
            (hub(&format!("a/b@{commit}")), json!({"hub": "a/b", "commit": commit})),
            (
                hub(&format!("datasets/a/b@{commit}/c/d")),
                json!({"hub": "datasets/a/b", "commit": commit, "path": "c/d"}),
            ),
            (web("https://x.org/a", FileDigest::Blake3(digits.clone())), json!({"content": digits})),
            (web("https://y.org/b", FileDigest::Sha256(digits.clone())), json!({"sha256": digits})),
            (Location::Local(folder.path().join("file")), json!({"content": cache::Digest::of(b"bytes")})),
        ];
        for (at, expected) in cases {
            let part = of(&Source::at(&["model"], at), &store).unwrap();
            assert_eq!(serde_json::to_value(&part).unwrap(), expected);
            assert_eq!(serde_json::from_value::<SourcePart>(expected).unwrap(), part);
        }
    }
}
