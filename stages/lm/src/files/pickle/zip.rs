//! The archive in which `torch.save` puts a pickle and its storages: a ZIP file whose entries are stored as they are.
//!
//! Source: PKWARE, "APPNOTE.TXT - .ZIP File Format Specification", 6.3.10, sections 4.3 to 4.5.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use anyhow::{Context, bail, ensure};
use contract::Result;
use contract::files::in_words;
use indexmap::IndexMap;

/// What an archive that is not empty begins with.
pub(super) const MAGIC: &[u8; 4] = b"PK\x03\x04";

const ENTRY: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;
const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;

/// Most bytes of the directory: some 200 are needed for a tensor.
const DIRECTORY: u64 = 64 << 20;

/// Where an entry's bytes lie in the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Place {
    pub(super) start: u64,
    pub(super) size: u64,
}

/// The numbers of a record, one after another.
struct Record<'a>(&'a [u8]);

impl<'a> Record<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).context("its directory is cut off")?;
        self.0 = rest;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(self.take(N)?);
        Ok(u64::from_le_bytes(bytes))
    }
}

fn read(file: &File, from: u64, count: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count as usize];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes)
}

/// The entries of an archive of `size` bytes, by name. No more than the directory is read.
///
/// Errors where an entry is compressed, lies outside of the file or on another one.
pub(super) fn entries(file: &File, size: u64) -> Result<IndexMap<String, Place>> {
    let (count, start, end) = directory(file, size)?;
    let length = end.checked_sub(start).context("its directory ends before it begins")?;
    ensure!(
        length <= DIRECTORY,
        "its directory has {}, and at most {} are read",
        in_words(length),
        in_words(DIRECTORY)
    );
    // The fixed part of an entry.
    ensure!(count <= length / 46, "its directory has no room for {count} entries");
    let bytes = read(file, start, length)?;
    let mut rest = Record(&bytes);
    let mut entries = IndexMap::with_capacity(count as usize);
    for _ in 0..count {
        let (name, place) = entry(file, &mut rest, start)?;
        ensure!(entries.insert(name.clone(), place).is_none(), "entry `{name}` is there twice");
    }
    let mut places: Vec<(&String, &Place)> = entries.iter().collect();
    places.sort_by_key(|(_, place)| place.start);
    for pair in places.windows(2) {
        let [(one, first), (other, second)] = pair else { unreachable!("windows are of size 2") };
        ensure!(first.start + first.size <= second.start, "entries `{one}` and `{other}` overlap");
    }
    Ok(entries)
}

/// How many entries the directory has, where it begins, and where it ends at the latest.
fn directory(file: &File, size: u64) -> Result<(u64, u64, u64)> {
    // The record at the end has 22 bytes, and a comment behind it.
    let tail_start = size.saturating_sub(22 + 0xffff);
    let tail = read(file, tail_start, size - tail_start)?;
    let is_end = |at: &usize| {
        let record = &tail[*at..];
        record.starts_with(&END.to_le_bytes())
            && usize::from(u16::from_le_bytes([record[20], record[21]])) == record.len() - 22
    };
    let at = (0..(tail.len() + 1).saturating_sub(22)).rev().find(is_end).context("its directory is missing")?;
    let mut record = Record(&tail[at + 4..]);
    let [disk, first_disk] = [record.number::<2>()?, record.number::<2>()?];
    let (_, count) = (record.number::<2>()?, record.number::<2>()?);
    let (length, start) = (record.number::<4>()?, record.number::<4>()?);
    let end = tail_start + at as u64;
    if count != 0xffff && length != 0xffff_ffff && start != 0xffff_ffff {
        ensure!(disk == 0 && first_disk == 0, "it is one of several parts");
        ensure!(start.checked_add(length).is_some_and(|stop| stop <= end), "its directory lies outside of it");
        return Ok((count, start, start + length));
    }
    let locator = end.checked_sub(20).map(|from| read(file, from, 20)).context("its directory is cut off")??;
    let mut locator = Record(&locator);
    ensure!(locator.number::<4>()? == u64::from(LOCATOR_64), "its directory is cut off");
    locator.take(4)?;
    let from = locator.number::<8>()?;
    ensure!(from.checked_add(56).is_some_and(|stop| stop <= end), "its directory lies outside of it");
    let record = read(file, from, 56)?;
    let mut record = Record(&record);
    ensure!(record.number::<4>()? == u64::from(END_64), "its directory is cut off");
    record.take(8 + 2 + 2 + 4 + 4 + 8)?;
    let (count, length, start) = (record.number::<8>()?, record.number::<8>()?, record.number::<8>()?);
    ensure!(start.checked_add(length).is_some_and(|stop| stop <= end), "its directory lies outside of it");
    Ok((count, start, start + length))
}

/// The next entry of the directory, which itself begins at `directory`.
fn entry(file: &File, rest: &mut Record<'_>, directory: u64) -> Result<(String, Place)> {
    ensure!(rest.number::<4>()? == u64::from(ENTRY), "its directory is damaged");
    rest.take(2 + 2)?;
    let (flags, method) = (rest.number::<2>()?, rest.number::<2>()?);
    rest.take(2 + 2 + 4)?;
    let (mut packed, mut size) = (rest.number::<4>()?, rest.number::<4>()?);
    let lengths = [rest.number::<2>()?, rest.number::<2>()?, rest.number::<2>()?];
    rest.take(2 + 2 + 4)?;
    let mut from = rest.number::<4>()?;
    let [name, extra, _] =
        [rest.take(lengths[0] as usize)?, rest.take(lengths[1] as usize)?, rest.take(lengths[2] as usize)?];
    let name = String::from_utf8(name.to_vec()).context("the name of an entry is not UTF-8")?;
    let mut extra = Record(extra);
    while extra.0.len() >= 4 {
        let (kind, length) = (extra.number::<2>()?, extra.number::<2>()?);
        let mut field = Record(extra.take(length as usize)?);
        if kind == 1 {
            // Those that have no room in 32 bits, in this order.
            for number in [&mut size, &mut packed, &mut from].into_iter().filter(|number| **number == 0xffff_ffff) {
                *number = field.number::<8>()?;
            }
        }
    }
    ensure!(flags & 1 == 0, "entry `{name}` is encrypted");
    ensure!(
        method == 0 && packed == size,
        "entry `{name}` is compressed, to {} of {}: `torch.save` stores numbers as they are",
        in_words(packed),
        in_words(size)
    );
    ensure!(from.checked_add(30).is_some_and(|stop| stop <= directory), "entry `{name}` lies outside of the file");
    let local = read(file, from, 30)?;
    let mut local = Record(&local);
    ensure!(local.number::<4>()? == u64::from(LOCAL), "entry `{name}` is not where the directory says");
    local.take(22)?;
    let start = from + 30 + local.number::<2>()? + local.number::<2>()?;
    ensure!(
        start.checked_add(size).is_some_and(|stop| stop <= directory),
        "entry `{name}` of {} ends behind the file",
        in_words(size)
    );
    Ok((name, Place { start, size }))
}

/// Writes an archive, an entry after another.
pub(super) struct Writer<W: Write> {
    out: W,
    written: u64,
    directory: Vec<u8>,
    count: u64,
}

/// Where the bytes of an entry begin: at a multiple of this, so that readers can map them.
const ALIGNMENT: u64 = 64;

impl<W: Write> Writer<W> {
    pub(super) fn new(out: W) -> Self {
        Writer { out, written: 0, directory: Vec::new(), count: 0 }
    }

    /// Behind so many bytes of something else.
    #[cfg(test)]
    pub(super) fn behind(written: u64, out: W) -> Self {
        Writer { written, ..Writer::new(out) }
    }

    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    pub(super) fn entry(&mut self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        let (from, size) = (self.written, bytes.len() as u64);
        let sum = crc32fast::hash(bytes);
        let is_large = size >= 0xffff_ffff;
        let in_32_bits = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        // Version 4.5 knows sizes of 64 bits; the date is the first there is, 1980-01-01.
        let version: u16 = if is_large || from >= 0xffff_ffff { 45 } else { 20 };
        let common = [
            &version.to_le_bytes()[..],
            &[0, 0, 0, 0, 0, 0, 0x21, 0],
            &sum.to_le_bytes(),
            &in_32_bits(size).to_le_bytes(),
            &in_32_bits(size).to_le_bytes(),
            &(name.len() as u16).to_le_bytes(),
        ]
        .concat();
        let mut extra = Vec::new();
        if is_large {
            extra.extend([1_u16.to_le_bytes(), 16_u16.to_le_bytes()].concat());
            extra.extend([size.to_le_bytes(), size.to_le_bytes()].concat());
        }
        // As PyTorch does, a field of its own fills up to the alignment.
        let filled = from + 30 + name.len() as u64 + extra.len() as u64 + 4;
        let filling = filled.next_multiple_of(ALIGNMENT) - filled;
        extra.extend(b"FB");
        extra.extend((filling as u16).to_le_bytes());
        extra.extend(std::iter::repeat_n(b'Z', filling as usize));
        let local =
            [&LOCAL.to_le_bytes()[..], &common, &(extra.len() as u16).to_le_bytes(), name.as_bytes(), &extra].concat();
        self.put(&local)?;
        self.put(bytes)?;

        let mut large: Vec<u8> = Vec::new();
        if is_large {
            large.extend([size.to_le_bytes(), size.to_le_bytes()].concat());
        }
        if from >= 0xffff_ffff {
            large.extend(from.to_le_bytes());
        }
        if !large.is_empty() {
            large.splice(0..0, [1_u16.to_le_bytes(), (large.len() as u16).to_le_bytes()].concat());
        }
        self.directory.extend(ENTRY.to_le_bytes());
        self.directory.extend(version.to_le_bytes());
        self.directory.extend(&common);
        self.directory.extend((large.len() as u16).to_le_bytes());
        self.directory.extend([0; 2 + 2 + 2 + 4]);
        self.directory.extend(in_32_bits(from).to_le_bytes());
        self.directory.extend(name.as_bytes());
        self.directory.extend(large);
        self.count += 1;
        Ok(())
    }

    pub(super) fn finish(mut self) -> std::io::Result<()> {
        let (start, directory, count) = (self.written, std::mem::take(&mut self.directory), self.count);
        let length = directory.len() as u64;
        self.put(&directory)?;
        let from = self.written;
        let large = [
            &END_64.to_le_bytes()[..],
            &44_u64.to_le_bytes(),
            &[45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &count.to_le_bytes(),
            &count.to_le_bytes(),
            &length.to_le_bytes(),
            &start.to_le_bytes(),
        ]
        .concat();
        self.put(&large)?;
        self.put(&[&LOCATOR_64.to_le_bytes()[..], &[0; 4], &from.to_le_bytes(), &1_u32.to_le_bytes()].concat())?;
        let in_16_bits = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        let in_32_bits = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
        let end = [
            &END.to_le_bytes()[..],
            &[0; 4],
            &in_16_bits,
            &in_16_bits,
            &in_32_bits(length),
            &in_32_bits(start),
            &[0; 2],
        ]
        .concat();
        self.put(&end)?;
        self.out.flush()
    }
}

/// The directory that holds the pickle: the entry that ends in `/data.pkl`, without that.
pub(super) fn root(entries: &IndexMap<String, Place>) -> Result<&str> {
    let mut roots = entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
    match (roots.next(), roots.next()) {
        (Some(root), None) => Ok(root),
        (None, _) => bail!("it holds no `data.pkl`: it is a ZIP file of something else"),
        (Some(one), Some(other)) => bail!("it holds two pickles, `{one}/data.pkl` and `{other}/data.pkl`"),
    }
}
