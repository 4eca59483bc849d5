//! The order in which rows are trained on: shuffled anew each epoch, and resumable at any row.
//!
//! An epoch's order is a function of seed and epoch alone, so a cursor of three numbers is the whole state. The
//! shuffle is written out here because a library's may change between versions, and a resumed run would then see
//! some rows twice and others never.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

/// A place in the endless stream of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// The stream's seed.
    pub seed: u64,
    /// Full passes done.
    pub epoch: u64,
    /// Rows taken in this pass.
    pub position: u64,
}

/// The order of one epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowOrder {
    rows: Vec<usize>,
}

impl RowOrder {
    /// The order of `n_rows` rows in an epoch.
    #[must_use]
    pub fn new(n_rows: usize, seed: u64, epoch: u64) -> Self {
        let mut rows: Vec<usize> = (0..n_rows).collect();
        shuffle(&mut rows, &mut generator(seed, epoch));
        Self { rows }
    }

    /// The rows.
    #[must_use]
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }
}

/// An endless stream of row indices; every epoch holds every row once.
#[derive(Clone, Debug)]
pub struct RowStream {
    order: RowOrder,
    cursor: Cursor,
}

impl RowStream {
    /// The stream from its beginning.
    #[must_use]
    pub fn new(n_rows: usize, seed: u64) -> Self {
        Self::resume(n_rows, Cursor { seed, epoch: 0, position: 0 })
    }

    /// The stream from a cursor on. It continues identically if `n_rows` is the same as before.
    #[must_use]
    pub fn resume(n_rows: usize, cursor: Cursor) -> Self {
        Self { order: RowOrder::new(n_rows, cursor.seed, cursor.epoch), cursor }
    }

    /// Where the stream stands.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next rows. A batch may cross the end of an epoch; no rows at all yield none.
    pub fn next(&mut self, count: usize) -> Vec<usize> {
        let total = self.order.rows.len();
        let mut taken = Vec::with_capacity(count);
        while total > 0 && taken.len() < count {
            let from = (self.cursor.position as usize).min(total);
            let to = total.min(from + count - taken.len());
            taken.extend_from_slice(&self.order.rows[from..to]);
            self.cursor.position = to as u64;
            if to == total {
                self.cursor.epoch += 1;
                self.cursor.position = 0;
                self.order = RowOrder::new(total, self.cursor.seed, self.cursor.epoch);
            }
        }
        taken
    }
}

/// A generator for one purpose of one seed.
pub(crate) fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    generator
}

/// Fisher and Yates' shuffle with Lemire's multiplication in place of a modulus.
pub(crate) fn shuffle<T>(items: &mut [T], generator: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        let scaled = u128::from(generator.next_u64()) * (last as u128 + 1);
        items.swap(last, (scaled >> 64) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_holds_every_row_once_in_another_order() {
        let mut stream = RowStream::new(10, 3);
        let (first, second) = (stream.next(10), stream.next(10));
        let sorted = |rows: &[usize]| {
            let mut rows = rows.to_vec();
            rows.sort_unstable();
            rows
        };
        assert_eq!(sorted(&first), (0..10).collect::<Vec<_>>());
        assert_eq!(sorted(&second), (0..10).collect::<Vec<_>>());
        assert_ne!(first, second);
        assert_ne!(first, RowStream::new(10, 4).next(10));
    }

    #[test]
    fn a_resumed_stream_goes_on_as_if_it_had_not_stopped() {
        for stop in 0..25 {
            let mut whole = RowStream::new(7, 11);
            whole.next(stop);
            let text = serde_json::to_string(&whole.cursor()).unwrap();
            let mut resumed = RowStream::resume(7, serde_json::from_str(&text).unwrap());
            assert_eq!(whole.next(20), resumed.next(20), "stopped after {stop}");
        }
    }

    #[test]
    fn step_size_does_not_change_the_order() {
        let (mut ones, mut threes) = (RowStream::new(8, 0), RowStream::new(8, 0));
        let one_by_one: Vec<usize> = (0..30).flat_map(|_| ones.next(1)).collect();
        let by_three: Vec<usize> = (0..10).flat_map(|_| threes.next(3)).collect();
        assert_eq!(one_by_one, by_three);
        assert_eq!(ones.cursor(), threes.cursor());
        assert!(RowStream::new(0, 0).next(3).is_empty());
    }
}
