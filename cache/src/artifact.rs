//! Artifacts as folders: a tree of links to blobs, in which everybody can read without knowing of the store; or a copy
//! somewhere else.
//!
//! Blobs are what is kept; a tree can be built again from them at any time.

use std::fs;
use std::path::{Path, PathBuf};

use crate::digest::FileEntry;
use crate::error::{Result, StoreError};
use crate::record::Artifact;
use crate::source;
use crate::store::{Care, Condition, Store};

impl Store {
    /// Where the folder of an artifact is, to name it: nobody has looked whether it is there and whole.
    pub fn artifact_place(&self, artifact: &Artifact) -> PathBuf {
        self.tree_path(&artifact.digest)
    }

    /// The folder of an artifact, readable in place, all of whose bytes have just been hashed. Nobody may write there.
    ///
    /// A damaged folder is built again from the artifact's blobs. When a blob is damaged too, it is removed, so that the
    /// next lookup is a miss, and the error is [`StoreError::Corrupt`].
    pub fn open_artifact(&self, artifact: &Artifact) -> Result<PathBuf> {
        self.open_with(artifact, Care::HashedNow)
    }

    /// Errs when an artifact that was [opened](Store::open_artifact) is not as it was then. Bytes are read again only where
    /// the times of a file show that it was touched.
    pub fn check_artifact(&self, artifact: &Artifact) -> Result<()> {
        self.open_with(artifact, Care::HashedThisBoot).map(drop)
    }

    fn open_with(&self, artifact: &Artifact, care: Care) -> Result<PathBuf> {
        check_form(artifact)?;
        let tree = self.tree_path(&artifact.digest);
        if !self.tree_is_whole(&tree, artifact, care)? {
            self.check_blobs(artifact, care)?;
            self.build_tree(artifact)?;
        }
        Ok(tree)
    }

    /// Copies an artifact to the folder `to`, where nothing is yet. Bytes are hashed on their way, so that the copy holds
    /// what was published, or the error is [`StoreError::Corrupt`]. It is asked often whether to `go_on`; if not, the error
    /// is [`StoreError::Stopped`]. What was copied before an error stays.
    pub fn copy_artifact(&self, artifact: &Artifact, to: &Path, go_on: &dyn Fn() -> bool) -> Result<()> {
        check_form(artifact)?;
        fs::create_dir_all(to).map_err(StoreError::io("make folder", to))?;
        for file in &artifact.files {
            let blob = self.blob_path(&file.digest);
            let copied = source::copy_file(&blob, &to.join(&file.path), go_on);
            let reason = match copied {
                Ok(found) if found == (file.digest, file.bytes) => continue,
                Ok((digest, _)) => format!("expected {}, got {}", file.digest.short(), digest.short()),
                Err(StoreError::Changed { .. }) => "somebody writes to it".into(),
                Err(StoreError::Io { path, .. }) if path == blob && !blob.exists() => MISSING.into(),
                Err(error) => return Err(error),
            };
            self.drop_damaged(&blob, file)?;
            return Err(StoreError::Corrupt { artifact: artifact.digest, file: file.path.clone(), reason });
        }
        Ok(())
    }

    /// Whether a folder holds the files of an artifact and nothing else.
    pub(crate) fn tree_is_whole(&self, tree: &Path, artifact: &Artifact, care: Care) -> Result<bool> {
        let found = match files_in(tree) {
            Ok(found) => found,
            Err(error) => return error.into_damage().map(|_| false),
        };
        if !found.iter().map(|(name, _)| name).eq(artifact.files.iter().map(|file| &file.path)) {
            return Ok(false);
        }
        for ((_, path), file) in found.iter().zip(&artifact.files) {
            if !matches!(self.inspect(path, file, care)?, Condition::Whole) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Builds the tree of an artifact from its blobs, which are whole. A damaged one is replaced; a whole one stays, for
    /// somebody may be reading there.
    pub(crate) fn build_tree(&self, artifact: &Artifact) -> Result<()> {
        let tree = self.tree_path(&artifact.digest);
        let _guard = self.lock_tree(&artifact.digest)?;
        if self.tree_is_whole(&tree, artifact, Care::HashedThisBoot)? {
            return Ok(());
        }
        let scratch = self.begin_scratch()?;
        let draft = scratch.path.join("tree");
        self.disk.make_folder(&draft)?;
        for file in &artifact.files {
            let path = draft.join(&file.path);
            self.make_parent(&path)?;
            self.disk.link(&self.blob_path(&file.digest), &path)?;
        }
        self.make_parent(&tree)?;
        scratch.discard(&tree)?;
        // Not done when another machine was faster: its tree is as good.
        self.disk.rename_new(&draft, &tree)?;
        drop(scratch);
        // Names have come and gone, and with them the blobs' times of change; nobody wrote to them.
        for file in &artifact.files {
            self.stamp(&self.blob_path(&file.digest), file.digest);
        }
        Ok(())
    }

    /// Looks at the blobs of an artifact. Removes all that are damaged, and errs with the first.
    fn check_blobs(&self, artifact: &Artifact, care: Care) -> Result<()> {
        let mut first = None;
        for file in &artifact.files {
            let blob = self.blob_path(&file.digest);
            let reason = match self.inspect(&blob, file, care)? {
                Condition::Whole => continue,
                Condition::Missing => MISSING.into(),
                Condition::Damaged(reason) => {
                    self.drop_damaged(&blob, file)?;
                    reason
                }
            };
            first.get_or_insert(StoreError::Corrupt { artifact: artifact.digest, file: file.path.clone(), reason });
        }
        first.map_or(Ok(()), Err)
    }

    /// Removes a blob that is damaged, so that the next lookup is a miss. In a store that cannot be written it stays, and is
    /// read again whenever it is looked at.
    fn drop_damaged(&self, blob: &Path, file: &FileEntry) -> Result<()> {
        match self.remove_blob(blob) {
            // Whatever is remembered of it, it is not as it should be.
            Err(error) if error.is_read_only() => self.inspect(blob, file, Care::HashedNow).map(drop),
            removed => removed,
        }
    }

    /// Removes whatever is in a blob's place.
    pub(crate) fn remove_blob(&self, blob: &Path) -> Result<()> {
        tracing::warn!(blob = %blob.display(), "a damaged file is removed from the store");
        if fs::symlink_metadata(blob).is_ok_and(|metadata| metadata.is_dir()) {
            return self.disk.remove_folder(blob);
        }
        self.disk.remove_file(blob)
    }
}

/// What is said of a file that is gone.
const MISSING: &str = "it is missing";

/// What a record says of an artifact must be right before any path is made of it.
fn check_form(artifact: &Artifact) -> Result<()> {
    match artifact.fault() {
        Some(reason) => Err(StoreError::Corrupt { artifact: artifact.digest, file: ".".into(), reason }),
        None => Ok(()),
    }
}

/// The plain files below a folder, as (path inside with `/`, path), sorted by the bytes of the former.
///
/// Errors on anything that is neither file nor folder, links included: what they lead to is not in the folder.
pub(crate) fn files_in(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    let mut folders = vec![(String::new(), folder.to_path_buf())];
    while let Some((prefix, folder)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(StoreError::io("list", &folder))? {
            let entry = entry.map_err(StoreError::io("list", &folder))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(StoreError::io("look at", &path))?;
            let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else {
                return Err(StoreError::Name { path });
            };
            if kind.is_dir() {
                folders.push((name + "/", path));
            } else if kind.is_file() {
                files.push((name, path));
            } else {
                return Err(StoreError::NotPlain { path });
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}
