//! Files of weights, mapped into memory, whichever format they have.
//!
//! The format is told by the first bytes and not by the name. What it trades: a file that another program cuts while it
//! is open ends this one with a bus error, as with every mapped file; what is read and not looked at through the map ends in an error. What it refuses: pipes and devices.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;

use crate::error::Place;
use crate::{WeightsError, header, pytorch};

/// Every tensor of a file by name, its offsets counted from the start of the file and inside it.
pub(crate) type Tensors = BTreeMap<String, TensorInfo>;

/// A file whose header has been checked.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
}

impl MappedFile {
    /// Maps a file and reads its header.
    pub(crate) fn open(place: Place<'_>) -> Result<(Self, Tensors), WeightsError> {
        // Asked before the file is opened: opening a named pipe would wait for a writer.
        let metadata = fs::metadata(place.path).map_err(|source| place.read(source))?;
        if !metadata.is_file() {
            return Err(place.header("it is no regular file"));
        }
        let file = File::open(place.path).map_err(|source| place.read(source))?;
        // SAFETY: the map is read-only and this program never writes to a file in place (`write_atomic` puts a new
        // file under the old name, which leaves this one as it was). Bytes are only ever copied out and checked, none
        // is trusted to stay: the header is parsed into owned values once. Another program that cuts the file short
        // meanwhile causes a bus error, which ends this program; the module's documentation says so.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| place.read(source))?;
        let tensors = tensors_of(&map, place)?;
        Ok((Self { path: place.path.to_owned(), file, map }, tensors))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Reads bytes from an offset on, without their pages becoming ones of this process: many threads fill memory that is there
    /// several times as fast in this way as through the map.
    #[cfg(unix)]
    pub(crate) fn read_at(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset as u64)
    }

    #[cfg(not(unix))]
    pub(crate) fn read_at(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        out.copy_from_slice(&self.map[offset..offset + out.len()]);
        Ok(())
    }

    /// Tells the kernel that these bytes are done with. Costs memory only if it fails, so the answer is dropped.
    #[cfg(unix)]
    pub(crate) fn release(&self, start: usize, end: usize) {
        use memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is a read-only view of a file that nobody here writes, so a page that is dropped comes back
        // from the file with the same bytes. No borrow of the window is alive in this thread, and a reader in another
        // thread, or of a neighbouring tensor on the same page, sees those same bytes before and after.
        let _ = unsafe { self.map.unchecked_advise_range(DontNeed, start, end - start) };
    }

    #[cfg(not(unix))]
    pub(crate) fn release(&self, _start: usize, _end: usize) {}
}

/// The tensors of a file's bytes.
pub(crate) fn tensors_of(bytes: &[u8], place: Place<'_>) -> Result<Tensors, WeightsError> {
    if pytorch::is_pytorch(bytes) { pytorch::parse(bytes, place) } else { header::parse(bytes, place) }
}
