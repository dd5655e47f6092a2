//! Artifacts as folders: a tree of links to blobs, in which everybody can read without knowing of the store.
//!
//! Blobs are what is kept; a tree can be built again from them at any time.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};
use crate::record::Artifact;
use crate::store::{Care, Condition, Store};

impl Store {
    /// The folder of an artifact, readable in place. Its bytes were hashed since the machine booted and its files have not
    /// changed since. Nobody may write there.
    ///
    /// A damaged folder is built again from the artifact's blobs. When a blob is damaged too, it is removed, so that the
    /// next lookup is a miss, and the error is [`StoreError::Corrupt`].
    pub fn open_artifact(&self, artifact: &Artifact) -> Result<PathBuf> {
        if let Some(reason) = artifact.fault() {
            return Err(StoreError::Corrupt { artifact: artifact.digest, file: ".".into(), reason });
        }
        let tree = self.tree_path(&artifact.digest);
        if !self.tree_is_whole(&tree, artifact, Care::HashedThisBoot)? {
            self.check_blobs(artifact)?;
            self.build_tree(artifact)?;
        }
        Ok(tree)
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
        self.disk.rename_new(&draft, &tree).map(drop)
    }

    /// Hashes the blobs of an artifact that were not hashed since the machine booted. Removes all that are damaged, and
    /// errs with the first.
    fn check_blobs(&self, artifact: &Artifact) -> Result<()> {
        let mut first = None;
        for file in &artifact.files {
            let blob = self.blob_path(&file.digest);
            let reason = match self.inspect(&blob, file, Care::HashedThisBoot)? {
                Condition::Whole => continue,
                Condition::Missing => "it is missing from the store".into(),
                Condition::Damaged(reason) => {
                    self.remove_blob(&blob)?;
                    reason
                }
            };
            first.get_or_insert(StoreError::Corrupt { artifact: artifact.digest, file: file.path.clone(), reason });
        }
        first.map_or(Ok(()), Err)
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
