//! What the kernel is given, byte for byte as `kernels.cu` declares it, and how its work and its shared memory are shared out.

use crate::Heads;
use crate::limits::Limits;

/// Columns that lie in one group of four scales.
pub(super) const GROUP: usize = 256;
/// Rows of a tile of one tensor core instruction.
const TILE: usize = 16;
/// Rows of a tile at most, and what layers that share an input have a multiple of.
pub(super) const MOST_TILE_ROWS: usize = 2 * TILE;
/// Ranks of a correction come in multiples of this: others are filled up with zeros.
pub(super) const RANKS: usize = 64;
/// Layers that share an input at most.
pub(super) const MOST_PARTS: usize = 3;
/// `COUNT_BITS`: terms of a sum over an inner dimension, 64 columns each, are counted in so many bits.
pub(super) const COUNT_BITS: u32 = 10;
/// `THREADS`.
pub(super) const THREADS: usize = 512;
/// `WARPS`.
const WARPS: usize = THREADS / 32;
/// Shared memory in which threads choose a token: what each found, its logit, and the sum of its weights.
const CHOICE_BYTES: usize = 3 * 4 * THREADS;
/// `SQUARES_APART`: sums of squares, of 64 bits each, are so many of them apart.
pub(super) const SQUARES_APART: usize = 16;
/// `MOST_ATTENTION_SPLITS`.
const MOST_ATTENTION_SPLITS: usize = 4;
/// Where the table of pairs begins in shared memory if its rows are 256 bytes apart: an address of a pair is put together from bytes
/// then.
const WIDE_TABLE: usize = 1 << 16;
/// Tiles that a block has sums of at a time at most: one for each warp to finish.
const MOST_ROUND: usize = WARPS;
/// Columns of a slice and how many slices a warp has in shared memory, the best first, where a warp has columns of its own.
const RINGS_BY_COLUMNS: [(usize, usize); 9] =
    [(256, 3), (256, 2), (256, 1), (128, 3), (128, 2), (128, 1), (64, 3), (64, 2), (64, 1)];
/// The same where a warp has tiles of its own: as many columns as possible on their way, and of these the most slices.
const RINGS_BY_TILES: [(usize, usize); 9] =
    [(256, 3), (256, 2), (128, 3), (128, 2), (256, 1), (64, 3), (64, 2), (128, 1), (64, 1)];
/// The same where a slice is only fetched when it is waited for.
const RINGS_OF_ONE: [(usize, usize); 3] = [(256, 1), (128, 1), (64, 1)];
/// The first cards that copy into shared memory without a register between.
const ASYNCHRONOUS_COPIES: usize = 80;

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
    pub(super) unused: i32,
}

impl Part {
    /// One that is not there: it begins after all rows and ranks.
    pub(super) fn absent() -> Self {
        Self { first_row: i32::MAX, first_rank: i32::MAX, ..Self::default() }
    }
}

/// `Product`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Product {
    pub(super) parts: [Part; MOST_PARTS],
    pub(super) norm: u64,
    pub(super) rows_in: u64,
    pub(super) to: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) epsilon: f32,
    pub(super) inner: i32,
    pub(super) rows: i32,
    pub(super) ranks: i32,
    pub(super) source: i32,
    pub(super) target: i32,
    pub(super) attends: i32,
    pub(super) unused: [i32; 3],
}

/// `Step`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Step {
    pub(super) products: u64,
    pub(super) barrier: u64,
    pub(super) embedding: u64,
    pub(super) ids: u64,
    pub(super) residual: u64,
    pub(super) normalised: u64,
    pub(super) activated: u64,
    pub(super) low_rank: u64,
    pub(super) pairs: u64,
    pub(super) dynamic: u64,
    pub(super) logits: u64,
    pub(super) choices: u64,
    pub(super) joined: u64,
    pub(super) lengths: u64,
    pub(super) tables: u64,
    pub(super) turns: u64,
    pub(super) attended: u64,
    pub(super) log_sums: u64,
    pub(super) result: u64,
    pub(super) partial: u64,
    pub(super) arrived: u64,
    pub(super) squares: u64,
    pub(super) count: i32,
    pub(super) n: i32,
    pub(super) d: i32,
    pub(super) vocabulary: i32,
    pub(super) round: i32,
    pub(super) work_bytes: i32,
    pub(super) most_low_rank: i32,
    pub(super) table: i32,
    pub(super) page_shift: i32,
    pub(super) heads: i32,
    pub(super) key_heads: i32,
    pub(super) splits: i32,
    pub(super) scale: f32,
    pub(super) most_tiles: i32,
}

/// What decides how a program's steps are shared out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    /// Ranks of the layers of a product at most.
    pub(super) ranks: usize,
    /// Rows of the layers of a product at most.
    pub(super) rows: usize,
    /// Columns of the residual stream.
    pub(super) hidden: usize,
    pub(super) heads: Heads,
    /// Whether scales are stored as they are.
    pub(super) plain: bool,
}

impl Needs {
    /// Tiles of a product at most, where warps are not by columns.
    pub(super) fn most_tiles(&self) -> usize {
        self.rows.div_ceil(MOST_TILE_ROWS)
    }
}

/// What a kernel is compiled for, besides dtypes and the width of heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Variant {
    /// `TILES`: tiles of eight tokens.
    pub(super) tiles: usize,
    /// `ONE`: whether there is one token only, which takes less code.
    pub(super) one: bool,
    /// `TABLE_ROW`: bytes between the rows of the table of pairs, of which there are 256.
    pub(super) table_row: usize,
    /// `SLICE`: columns that a warp multiplies at a time.
    pub(super) slice: usize,
    /// `DEPTH`: slices of a warp in shared memory.
    pub(super) depth: usize,
    /// `CHUNK`: columns of a group, whose inputs a block has in shared memory, where warps are not by columns.
    pub(super) chunk: usize,
}

impl Variant {
    /// `BY_COLUMNS`.
    fn by_columns(self) -> bool {
        self.tiles == 1
    }

    /// Columns of the inputs that the warps of a block hold together, where they are by columns.
    fn columns(self) -> usize {
        WARPS * self.slice
    }

    /// Whether the blocks normalise rows of so many columns for themselves.
    pub(super) fn normalises_here(self, columns: usize) -> bool {
        self.by_columns() && columns <= self.columns()
    }

    /// `ROW_TILES`.
    fn row_tiles(self) -> usize {
        if self.by_columns() { 1 } else { 2 }
    }

    /// `RING`: bytes of a warp's slices.
    fn ring(self, plain: bool) -> usize {
        let scales = if plain { self.slice.max(128) } else { 128 };
        self.depth * self.row_tiles() * (8 * self.slice + scales)
    }

    /// Bytes of the sums that the groups of columns leave of a product of so many rows and columns.
    pub(super) fn partial_bytes(self, rows: usize, columns: usize) -> usize {
        if self.by_columns() {
            return 0;
        }
        let tile_rows = self.row_tiles() * TILE;
        columns.div_ceil(self.chunk) * rows.next_multiple_of(tile_rows) * 8 * self.tiles * size_of::<f32>()
    }

    /// Those that might do for n tokens, the best first.
    fn candidates(n: usize, limits: &Limits) -> impl Iterator<Item = Self> {
        let tiles = row_tiles(n);
        let rings: &[(usize, usize)] = match (limits.compute_capability < ASYNCHRONOUS_COPIES, tiles) {
            (true, _) => &RINGS_OF_ONE,
            (false, 1) => &RINGS_BY_COLUMNS,
            (false, _) => &RINGS_BY_TILES,
        };
        let shapes = move || {
            [256, 128]
                .into_iter()
                .flat_map(move |table_row| rings.iter().map(move |&(slice, depth)| (table_row, slice, depth)))
        };
        // Fewer columns in a group mean more sums to add up; where warps are by columns there are no groups.
        let chunks = if tiles == 1 { vec![0] } else { [1, 2, 4, 8].map(|part| 4096 / tiles / part).to_vec() };
        chunks.into_iter().flat_map(move |chunk| {
            shapes().filter(move |&(_, slice, _)| chunk == 0 || slice <= chunk).map(
                move |(table_row, slice, depth)| Self { tiles, one: n == 1, table_row, slice, depth, chunk },
            )
        })
    }
}

/// How a step of n tokens is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) variant: Variant,
    /// Tiles that a block has sums of at a time, where warps are by columns.
    pub(super) round: usize,
    /// Blocks that share out the places of one sequence and head.
    pub(super) splits: usize,
    /// Bytes for sums, inputs and attention.
    pub(super) work: usize,
    /// Bytes of a block's shared memory.
    pub(super) shared: usize,
}

impl Share {
    /// `None` if the card has too little shared memory.
    pub(super) fn new(n: usize, needs: &Needs, limits: &Limits) -> Option<Self> {
        Variant::candidates(n, limits).find_map(|variant| Self::of(variant, n, needs, limits))
    }

    fn of(variant: Variant, n: usize, needs: &Needs, limits: &Limits) -> Option<Self> {
        let tokens = 8 * variant.tiles;
        let Heads { queries, width, .. } = needs.heads;
        let joined = queries * width;
        // The splits are joined by all blocks, for themselves.
        let splits = match variant.normalises_here(joined) {
            true => (limits.processors / (n * queries)).clamp(1, MOST_ATTENTION_SPLITS),
            false => 1,
        };
        let rest = limits.shared_of_block.checked_sub(fixed_bytes(variant, n, needs, limits)?)?;
        let units = (n * queries * splits).div_ceil(limits.processors);
        let mut work = attention_bytes(width, units).max(CHOICE_BYTES);
        let mut round = 0;
        if variant.by_columns() {
            let here = [(needs.hidden, true), (joined, splits > 1)];
            let held = here.into_iter().filter(|&(columns, used)| used && variant.normalises_here(columns));
            work = work.max(held.map(|(columns, _)| 2 * n * (columns + 8)).max().unwrap_or(0));
            // Two sets of sums, so that one is written while the other is read.
            let tile = 2 * 4 * WARPS * TILE * if n == 1 { 1 } else { tokens };
            round = (rest / tile).min(MOST_ROUND);
            work = work.max(round * tile);
        } else {
            work = work.max(2 * tokens * (variant.chunk + 8));
        }
        let work = work.next_multiple_of(16);
        let fits = work <= rest && (round > 0 || !variant.by_columns());
        fits.then(|| Self { variant, round, splits, work, shared: limits.shared_of_block - rest + work })
    }

    /// Times that the blocks of a step meet.
    pub(super) fn meetings(&self, products: &[Product], from_residual: i32) -> u32 {
        let of = |product: &Product| {
            let apart = product.source == from_residual
                && self.variant.by_columns()
                && !self.variant.normalises_here(product.inner as usize);
            1 + product.attends as u32 + u32::from(apart)
        };
        1 + products.iter().map(of).sum::<u32>()
    }
}

/// `lay_out`: bytes of a block's shared memory without what is shared out; `None` where the table has no place.
fn fixed_bytes(variant: Variant, n: usize, needs: &Needs, limits: &Limits) -> Option<usize> {
    let ring = variant.ring(needs.plain);
    let (table, rings) = if variant.table_row == 256 {
        // Rings lie on both sides of the table.
        let before = WIDE_TABLE.checked_sub(limits.reserved_shared)?;
        (before + 256 * variant.table_row, WARPS - (before / ring).min(WARPS))
    } else {
        (256 * variant.table_row, WARPS)
    };
    let tokens = 8 * variant.tiles;
    // Levels of scales, three products with their offsets and units, lengths, positions of streams, and sums of squares.
    let small = 4 * 256 + 3 * size_of::<Product>() + 4 * (12 + 8 + tokens + 5 * WARPS + 2 * 4 * WARPS);
    Some(table + rings * ring + small + 2 * n * (needs.ranks + 8))
}

/// `AttentionRoom`, and `Prepared` for each unit of a block.
fn attention_bytes(width: usize, units: usize) -> usize {
    4 * (2 * WARPS + WARPS * width) + units * (4 * width + 2 * 2 * width)
}

/// Tiles of eight rows of the input: kernels exist for 1, 2 and 4.
pub(super) fn row_tiles(n: usize) -> usize {
    n.div_ceil(8).next_power_of_two()
}

/// The bytes of values without gaps, as words.
///
/// # Safety
/// `T` has no bytes that are not set, and a size that is a multiple of four.
pub(super) unsafe fn words<T>(values: &[T]) -> Vec<i32> {
    // SAFETY: the caller's; four bytes are read where they stand.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    bytes.as_chunks::<4>().0.iter().map(|&word| i32::from_ne_bytes(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Limits =
        Limits { compute_capability: 90, processors: 132, shared_of_block: 232_448, reserved_shared: 1024 };
    const L4: Limits =
        Limits { compute_capability: 89, processors: 58, shared_of_block: 101_376, reserved_shared: 1024 };
    const T4: Limits =
        Limits { compute_capability: 75, processors: 40, shared_of_block: 65_536, reserved_shared: 0 };
    const SEVEN_BILLION: Needs = Needs {
        ranks: 192,
        rows: 32_000,
        hidden: 4096,
        heads: Heads { queries: 32, keys: 32, width: 128 },
        plain: false,
    };

    #[test]
    fn every_batch_of_seven_billion_has_a_share_on_large_and_small_cards() {
        for (limits, most) in [(H100, 32), (L4, 32), (T4, 8)] {
            for n in 1..=32 {
                let share = Share::new(n, &SEVEN_BILLION, &limits);
                assert_eq!(share.is_some(), n <= most, "{n} on {limits:?}");
                let Some(share) = share else { continue };
                assert!(share.shared <= limits.shared_of_block);
                let units = (n * 32 * share.splits).div_ceil(limits.processors);
                assert!(share.work >= attention_bytes(128, units) && share.work.is_multiple_of(16));
                if n > 8 {
                    assert!(
                        share.work >= 2 * row_tiles(n) * 8 * (share.variant.chunk + 8) && share.splits == 1
                    );
                }
            }
        }
    }

    #[test]
    fn one_answer_on_a_large_card_fetches_three_slices_ahead() {
        let share = Share::new(1, &SEVEN_BILLION, &H100).unwrap();
        let expected = Variant { tiles: 1, one: true, table_row: 256, slice: 256, depth: 3, chunk: 0 };
        assert_eq!((share.variant, share.round, share.splits), (expected, 16, 4));
        let share = Share::new(32, &SEVEN_BILLION, &H100).unwrap();
        let expected = Variant { tiles: 4, one: false, table_row: 256, slice: 128, depth: 2, chunk: 1024 };
        assert_eq!(share.variant, expected);
    }

    #[test]
    fn groups_of_columns_leave_sums_of_whole_tiles_of_32_rows() {
        let many = Variant { tiles: 4, one: false, table_row: 256, slice: 128, depth: 2, chunk: 1024 };
        assert_eq!(many.partial_bytes(4096, 11008), 11 * 4096 * 32 * 4);
        assert_eq!(many.partial_bytes(33, 1024), 64 * 32 * 4);
        assert_eq!(Variant { tiles: 1, chunk: 0, ..many }.partial_bytes(4096, 11008), 0);
    }

    #[test]
    fn blocks_meet_once_a_product_and_where_it_needs_more() {
        let (residual, rows) = (0, 1);
        let product = |source, inner, attends| Product { source, inner, attends, ..Product::default() };
        let products = [product(residual, 4096, 0), product(rows, 4096, 1), product(residual, 8192, 0)];
        let one = Share::new(1, &SEVEN_BILLION, &H100).unwrap();
        assert_eq!(one.meetings(&products, residual), 1 + 1 + 2 + 2);
        let many = Share::new(32, &SEVEN_BILLION, &H100).unwrap();
        assert_eq!(many.meetings(&products, residual), 1 + 1 + 2 + 1);
    }

    #[test]
    fn structures_have_the_sizes_that_the_kernel_expects() {
        assert_eq!([size_of::<Part>(), size_of::<Product>(), size_of::<Step>()], [80, 320, 232]);
    }
}
