//! What the kernels are given, byte for byte as `kernels.cu` declares it, and how their work is shared out.

use super::driver::Limits;

/// Columns that lie in one group of four scales.
pub(super) const GROUP: usize = 256;
/// Rows of a tile.
pub(super) const TILE: usize = 16;
/// Ranks of a correction come in multiples of this: others are filled up with zeros.
pub(super) const RANKS: usize = 64;
/// Layers that share an input at most.
pub(super) const MOST_PARTS: usize = 3;
/// Shared memory of a block, in bytes, below which it has no room for a table of 64 KiB.
const SMALL_SHARED: usize = 80 << 10;
/// `MOST_ATTENTION_SPLITS`.
const MOST_ATTENTION_SPLITS: usize = 8;
/// Pieces that a factor A is cut into, so that a piece is about as much to read as a tile of a packed weight.
const LOW_RANK_PIECES: usize = 4;

/// `Part`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    pub(super) codes: u64,
    pub(super) scale_codes: u64,
    pub(super) scales: u64,
    pub(super) offset: u64,
    pub(super) dense: u64,
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) lora_scale: f32,
    pub(super) rows: i32,
    pub(super) rank: i32,
    pub(super) first_row: i32,
    pub(super) first_rank: i32,
}

/// `Product`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Product {
    pub(super) parts: [Part; MOST_PARTS],
    pub(super) part_count: i32,
    pub(super) n: i32,
    pub(super) inner: i32,
    pub(super) rows: i32,
    pub(super) ranks: i32,
    pub(super) tiles: i32,
    pub(super) team: i32,
    pub(super) splits: i32,
    pub(super) chunk: i32,
    pub(super) a_chunks: i32,
    pub(super) source: i32,
    pub(super) target: i32,
    pub(super) residual: u64,
    pub(super) norm: u64,
    pub(super) epsilon: f32,
    pub(super) rows_in: u64,
    pub(super) to: u64,
    pub(super) to_activated: u64,
    pub(super) low_rank: u64,
    pub(super) partials: u64,
    pub(super) arrived: u64,
    pub(super) ready: u64,
    pub(super) pairs: u64,
    pub(super) dynamic: u64,
}

/// `Attend`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Attend {
    pub(super) joined: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) lengths: u64,
    pub(super) tables: u64,
    pub(super) frequencies: u64,
    pub(super) attended: u64,
    pub(super) log_sums: u64,
    pub(super) result: u64,
    pub(super) arrived: u64,
    pub(super) table: i32,
    pub(super) page_tokens: i32,
    pub(super) heads: i32,
    pub(super) key_heads: i32,
    pub(super) splits: i32,
    pub(super) scale: f32,
}

/// Tiles of eight rows of the input: kernels exist for 1, 2 and 4.
pub(super) fn row_tiles(n: usize) -> usize {
    n.div_ceil(8).next_power_of_two()
}

/// `THREADS`.
pub(super) const THREADS: usize = 512;

/// `TABLE_ROW`: bytes between the rows of the table of pairs, of which there are 256.
pub(super) fn table_row(limits: &Limits) -> usize {
    if limits.shared_of_block > SMALL_SHARED { 256 } else { 128 }
}

/// How one product is shared out among blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) splits: usize,
    /// Columns of a block at most.
    pub(super) chunk: usize,
    pub(super) a_chunks: usize,
    /// Bytes of a block's shared memory.
    pub(super) shared: usize,
}

impl Share {
    /// For a product of n rows, with as few splits as the card's shared memory allows; `None` if that is more than it has
    /// multiprocessors, since splits wait for each other, or if it does not even hold 256 columns of the rows.
    pub(super) fn new(n: usize, inner: usize, ranks: usize, limits: &Limits) -> Option<Self> {
        let groups = inner / GROUP;
        let share = |splits: usize| {
            let chunk = groups.div_ceil(splits) * GROUP;
            let a_chunks = LOW_RANK_PIECES.div_ceil(splits);
            Self { splits, chunk, a_chunks, shared: shared_bytes(n, chunk, ranks, limits) }
        };
        (1..=groups.min(limits.processors)).map(share).find(|share| share.shared <= limits.shared_of_block)
    }
}

/// `lay_out`.
fn shared_bytes(n: usize, chunk: usize, ranks: usize, limits: &Limits) -> usize {
    let tokens = 8 * row_tiles(n);
    let words = 256 * table_row(limits) / 4 + 256 + THREADS / 32 * TILE * tokens + 16;
    4 * words + 2 * n * (ranks + 8) + 2 * n * (chunk + 8)
}

/// Rows above which the residual stream is normalised once and not by every block of a product.
pub(super) const NORMALISED_BY_BLOCKS: usize = 8;

/// Warps that share out a tile: as few as keep all that are there busy, for those wait for each other.
pub(super) fn team(tiles: usize, warps: usize, most: usize) -> usize {
    let mut team = most;
    while team > 1 && warps / team < tiles {
        team /= 2;
    }
    team
}

/// Blocks that share out the places of one sequence and head: as many as keep the card busy with few sequences.
pub(super) fn attention_splits(n: usize, heads: usize, limits: &Limits) -> usize {
    (4 * limits.processors / (n * heads)).clamp(1, MOST_ATTENTION_SPLITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Limits = Limits { compute_capability: 90, processors: 132, shared_of_block: 232_448 };
    const T4: Limits = Limits { compute_capability: 75, processors: 40, shared_of_block: 65_536 };

    #[test]
    fn every_batch_of_seven_billion_has_a_share_on_large_and_small_cards() {
        for limits in [H100, T4] {
            for n in 1..=32 {
                for (inner, ranks) in [(4096, 192), (4096, 64), (4096, 128), (11_008, 64), (4096, 0)] {
                    let share = Share::new(n, inner, ranks, &limits);
                    // Four tiles of rows leave no room on a T4, and two leave the widest products too many splits.
                    let Some(share) = share else {
                        let most = if inner > 4096 { 12 } else { 16 };
                        assert!(limits.compute_capability == 75 && n > most, "{n} {inner} {ranks}");
                        continue;
                    };
                    assert!(share.splits <= limits.processors);
                    assert!(share.shared <= limits.shared_of_block);
                    assert!(share.chunk * share.splits >= inner && share.chunk % GROUP == 0);
                }
            }
        }
        assert_eq!(Share::new(1, 4096, 192, &H100).unwrap().splits, 1);
        assert_eq!(Share::new(32, 4096, 64, &H100).unwrap().splits, 3);
    }

    #[test]
    fn teams_are_small_where_there_are_many_tiles() {
        assert_eq!([256, 768, 1376, 5000].map(|tiles| team(tiles, 2112, 8)), [8, 2, 1, 1]);
    }

    #[test]
    fn structures_have_the_sizes_that_the_kernels_expect() {
        assert_eq!([size_of::<Part>(), size_of::<Product>(), size_of::<Attend>()], [80, 384, 104]);
    }
}
