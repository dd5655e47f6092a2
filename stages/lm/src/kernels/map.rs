//! Files as memory.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// The bytes of a file, read by the system when they are first looked at, and given up again when memory is short.
///
/// A file that is changed meanwhile changes what is read from it, and one that is cut short ends the process: files of the
/// store are neither.
pub(crate) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the bytes are only read, and as numbers of which any bits are one; see above for who might change them.
    unsafe { Mmap::map(file) }
}
