//! An allocator's books, without the memory: what it would have taken from the device after some requests.

use std::collections::BTreeMap;

/// The allocator of a card begins every buffer at a multiple of so many bytes.
const ALIGNMENT: usize = 512;

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Weights,
    Adapters,
    Gradients,
    Optimizer,
    BlockInputs,
    BlockPeak,
    DenseWeights,
    Logits,
    Workspace,
}

/// A buffer that is in use. One that is never handed back lives as long as the run.
#[derive(Debug)]
#[must_use = "a buffer is kept or given back"]
pub(super) struct Buffer(usize);

/// The books.
#[derive(Debug)]
pub(super) struct Ledger {
    /// Whether a buffer serves requests of its own size only; else free memory serves any request.
    exact: bool,
    /// Free buffers by size, or under 0 the free bytes.
    free: BTreeMap<usize, usize>,
    taken: BTreeMap<Part, usize>,
    /// What all memory that is still to be taken stands under, if that is settled.
    rest: Option<Part>,
}

impl Ledger {
    pub(super) fn new(exact: bool) -> Self {
        Self { exact, free: BTreeMap::new(), taken: BTreeMap::new(), rest: None }
    }

    /// A buffer; if memory has to be taken from the device for it, that stands under `part`.
    pub(super) fn take(&mut self, part: Part, bytes: usize) -> Buffer {
        let bytes = if self.exact { bytes.next_multiple_of(ALIGNMENT) } else { bytes };
        let free = self.free.entry(if self.exact { bytes } else { 0 }).or_default();
        let reused = if self.exact { bytes * usize::from(*free > 0) } else { bytes.min(*free) };
        *free -= if self.exact { usize::from(*free > 0) } else { reused };
        *self.taken.entry(self.rest.unwrap_or(part)).or_default() += bytes - reused;
        Buffer(bytes)
    }

    /// From now on all memory that is taken stands under this part.
    pub(super) fn put_rest_under(&mut self, part: Part) {
        self.rest = Some(part);
    }

    pub(super) fn give(&mut self, buffers: impl IntoIterator<Item = Buffer>) {
        for Buffer(bytes) in buffers {
            let (key, count) = if self.exact { (bytes, 1) } else { (0, bytes) };
            *self.free.entry(key).or_default() += count;
        }
    }

    /// Bytes taken for a part.
    pub(super) fn of(&self, part: Part) -> usize {
        self.taken.get(&part).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_allocator_reuses_equal_sizes_only() {
        let after = |exact| {
            let mut ledger = Ledger::new(exact);
            let first = ledger.take(Part::BlockPeak, 1024);
            ledger.give([first]);
            let buffers = [600, 100].map(|bytes| ledger.take(Part::Logits, bytes));
            ledger.give(buffers);
            [ledger.of(Part::BlockPeak), ledger.of(Part::Logits)]
        };
        assert_eq!(after(true), [1024, 512], "600 bytes become 1,024, and 100 become 512");
        assert_eq!(after(false), [1024, 0]);
    }
}
