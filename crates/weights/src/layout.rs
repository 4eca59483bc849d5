//! Where a tensor's bytes lie: in one run, or in the shards of a model that was split between cards.
//!
//! Both give the bytes row by row in the order in which this project computes, a few at a time, so that no reader cares
//! which it was. What it trades: rows one by one for what was split, which is slower than one run. What it refuses:
//! nothing; whoever makes a layout has checked it against the files.

use std::io;
use std::ops::Range;

use crate::mapped::MappedFile;

/// Bytes that are shown before their pages are handed back; a multiple of every element's size.
const WINDOW_BYTES: usize = 4 << 20;

/// Where a tensor lies; the offsets are of whole files and inside them.
#[derive(Debug)]
pub(crate) enum Layout {
    /// One run of one file.
    Run {
        /// Its number.
        file: usize,
        /// From the first byte to the end.
        bytes: Range<usize>,
    },
    /// Equal matrices, one a shard.
    Joined(Joined),
}

/// A matrix made of equal matrices.
#[derive(Debug)]
pub(crate) struct Joined {
    /// File number and first byte of every part, in order.
    pub(crate) parts: Vec<(usize, usize)>,
    /// Rows of one part.
    pub(crate) rows: usize,
    /// Bytes in a row of one part.
    pub(crate) row_bytes: usize,
    /// Whether the parts stand side by side; else one below the other.
    pub(crate) side_by_side: bool,
    /// Rows of a head in which partners of the rotary embedding are neighbours. They come out with all first
    /// partners before all second ones.
    pub(crate) head: Option<usize>,
}

impl Layout {
    /// The file in which it begins.
    pub(crate) fn file(&self) -> usize {
        match self {
            Self::Run { file, .. } => *file,
            Self::Joined(joined) => joined.parts.first().map_or(0, |&(file, _)| file),
        }
    }

    /// Shows all bytes in order, each window with its offset in the tensor, and hands their pages back.
    pub(crate) fn for_each_window(&self, files: &[MappedFile], mut visit: impl FnMut(usize, &[u8])) {
        match self {
            Self::Run { file, bytes } => {
                let file = &files[*file];
                for window in bytes.clone().step_by(WINDOW_BYTES) {
                    let end = bytes.end.min(window + WINDOW_BYTES);
                    visit(window - bytes.start, &file.bytes()[window..end]);
                    file.release(window, end);
                }
            }
            Self::Joined(joined) => joined.for_each_row(files, visit),
        }
    }

    /// Reads bytes of the tensor from an offset in it on. They must be there.
    ///
    /// # Errors
    /// If the system does not give them, with the number of the file.
    pub(crate) fn read_at(
        &self,
        files: &[MappedFile],
        offset: usize,
        out: &mut [u8],
    ) -> Result<(), (usize, io::Error)> {
        match self {
            Self::Run { file, bytes } => {
                files[*file].read_at(bytes.start + offset, out).map_err(|source| (*file, source))
            }
            Self::Joined(joined) => joined.read_at(files, offset, out),
        }
    }
}

impl Joined {
    /// The row of the file's matrix that comes out at `row`.
    fn source(&self, row: usize) -> usize {
        let Some(head) = self.head else { return row };
        let (start, place, half) = (row / head * head, row % head, head / 2);
        start + if place < half { 2 * place } else { 2 * (place - half) + 1 }
    }

    /// File number and first byte of a row of a part, by its place among all of them as they come out.
    fn place(&self, number: usize) -> (usize, usize) {
        let (part, row) = if self.side_by_side {
            (number % self.parts.len(), self.source(number / self.parts.len()))
        } else {
            let row = self.source(number);
            (row / self.rows, row % self.rows)
        };
        let (file, start) = self.parts[part];
        (file, start + row * self.row_bytes)
    }

    /// Reads bytes from an offset on, row by row.
    fn read_at(
        &self,
        files: &[MappedFile],
        mut offset: usize,
        mut out: &mut [u8],
    ) -> Result<(), (usize, io::Error)> {
        while !out.is_empty() {
            let (file, start) = self.place(offset / self.row_bytes);
            let inside = offset % self.row_bytes;
            let (next, rest) = out.split_at_mut(out.len().min(self.row_bytes - inside));
            files[file].read_at(start + inside, next).map_err(|source| (file, source))?;
            offset += next.len();
            out = rest;
        }
        Ok(())
    }

    fn for_each_row(&self, files: &[MappedFile], mut visit: impl FnMut(usize, &[u8])) {
        for number in 0..self.parts.len() * self.rows {
            let (file, start) = self.place(number);
            visit(number * self.row_bytes, &files[file].bytes()[start..start + self.row_bytes]);
        }
        for &(file, start) in &self.parts {
            files[file].release(start, start + self.rows * self.row_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_told_apart_inside_their_head() {
        let joined =
            Joined { parts: vec![(0, 0)], rows: 12, row_bytes: 1, side_by_side: false, head: Some(6) };
        let order: Vec<usize> = (0..12).map(|row| joined.source(row)).collect();
        assert_eq!(order, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }
}
