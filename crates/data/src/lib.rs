//! Clue files to clean clues, splits and packed batches.
//!
//! The stages in order: [`read_clues`], [`clean`], [`split`], (tokenizing, in `buzzer-text`), [`pack`], then
//! [`RowStream`] and [`Batch::collate`]. Each stage returns what it did with every row, and the numbers add up. What
//! it trades: a whole corpus stands in host memory, which at Jeopardy's size is a few hundred megabytes. What it
//! refuses: to guess at a damaged file, to cut a document short unless asked for wrapped rows, and to print anything.

mod batch;
mod clean;
mod date;
mod error;
mod fingerprint;
mod format;
mod markup;
mod order;
mod pack;
mod read;
mod scan;
mod split;

pub use batch::Batch;
pub use clean::{CleanReport, Cleaned, Clue, DropReason, clean};
pub use date::Date;
pub use error::DataError;
pub use fingerprint::hash_rows;
pub use format::{Format, ReadOptions};
pub use order::{Cursor, RowOrder, RowStream};
pub use pack::{LossOn, PackOptions, PackReport, Packed, PackedRow, Packing, pack};
pub use read::{RawClues, read_clues};
pub use split::{Split, split};
