//! Files at addresses of the web, in a cache of our own under the names of their digests.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use contract::{FileDigest, WebFile};

use crate::checksum::Checksum;
use crate::http::{lock, make, settle};
use crate::{Remote, Tell};

pub(crate) fn fetch(remote: &Remote, file: &WebFile, tell: Tell) -> Result<PathBuf> {
    file.check().map_err(|text| anyhow!(text))?;
    let name = match &file.digest {
        FileDigest::Sha256(digits) => format!("sha256-{digits}"),
        FileDigest::Blake3(digits) => format!("blake3-{digits}"),
    };
    let checksum = Checksum::from(&file.digest);
    let folder = remote.settings.own.join("web");
    let (whole, partial) = (folder.join(&name), folder.join(format!("{name}.incomplete")));
    make(&folder)?;
    let _lock = lock(&folder.join(format!("{name}.lock")))?;
    if whole.is_file() && checksum.check(&whole)?.is_ok() {
        return Ok(whole);
    }
    settle(Some(&checksum), &partial, &whole, || remote.client.download(&file.url, &partial, None, tell))
        .with_context(|| format!("cannot fetch `{file}`"))?;
    Ok(whole)
}

#[cfg(test)]
mod tests;
