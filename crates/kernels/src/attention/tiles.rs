//! Tiles in shared memory, and what planes do with them on tensor cores.
//!
//! A tile has rows of `chunks` times eight elements. Products are `m16n8k16` instructions, or pairs of `m16n8k8` where
//! `depth` is 8 (Turing). A plane works on `blocks` times 16 rows at once, so that a right operand that was read once
//! is used `blocks` times: shared memory is what bounds these kernels.
//!
//! Fragments, with g = lane / 4 and c = 2 (lane mod 4): an accumulator of 16 × 8 holds `[0]` = (g, c), (g, c + 1) and
//! `[1]` = the same of row g + 8. A left operand of 16 × 16 holds `[0]` = (g, c), `[1]` = (g + 8, c), `[2]` = (g, c + 8),
//! `[3]` = (g + 8, c + 8), two elements each: two accumulators side by side, rounded, are a left operand. Two right
//! operands of 16 × 8 side by side hold `[0]`, `[1]` = elements (c, g), (c + 8, g) of the first, `[2]`, `[3]` of the second.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::barrier::{Barrier, copy_async};
use cubecl::prelude::*;

use super::SEPARATE;
use super::device::{HIDDEN, Tokens};
use super::ranges::SKIP;

/// Units of a cube: four planes of 32.
pub(super) const UNITS: u32 = 128;

pub(super) type Pair<F> = Vector<F, Const<2>>;
/// Eight elements of 16 bits, moved as 16 bytes.
pub(super) type Chunk = Vector<u32, Const<4>>;
pub(super) type Tile = SharedMemory<Chunk>;
/// Accumulators of 16 × 8, those of a block side by side, blocks one after the other.
pub(super) type Sums = Sequence<Array<Pair<f32>>>;

/// How the kernels are built for a device, fixed when they are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Build {
    /// Chunks of a row.
    pub(super) chunks: usize,
    /// Depth of a product.
    pub(super) depth: usize,
    /// Copies to shared memory run beside the arithmetic, and there is room for larger tiles.
    pub(super) copies: bool,
    /// Two cubes of the forward pass with two tiles of keys and of values each find room on a multiprocessor.
    pub(super) roomy: bool,
}

/// Right operands that are read before the products that need them: a plane waits for what it reads, and where two
/// planes share a scheduler nobody fills the gap.
const AHEAD: usize = 2;

impl Build {
    /// Blocks of 16 queries of a plane where queries are the rows.
    pub(super) fn blocks(self) -> usize {
        if self.copies { 2 } else { 1 }
    }

    /// Queries of a tile where queries are the rows.
    pub(super) fn queries(self) -> usize {
        self.blocks() * 64
    }
}

/// What units wait at until all have arrived and what was copied is there.
#[derive(CubeType)]
pub(super) struct Gate {
    barrier: ComptimeOption<Shared<Barrier>>,
}

#[cube]
impl Gate {
    pub(super) fn new(#[comptime] build: Build) -> Gate {
        if comptime!(build.copies) {
            let barrier = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
            Gate { barrier: ComptimeOption::new_Some(barrier) }
        } else {
            Gate { barrier: ComptimeOption::new_None() }
        }
    }

    /// All copies that this unit began belong to the next wait.
    pub(super) fn commit(&self) {
        #[comptime]
        match &self.barrier {
            ComptimeOption::Some(barrier) => barrier.commit_copy_async(),
            ComptimeOption::None => {}
        }
    }

    pub(super) fn wait(&self) {
        #[comptime]
        match &self.barrier {
            ComptimeOption::Some(barrier) => barrier.arrive_and_wait(),
            ComptimeOption::None => sync_cube(),
        }
    }
}

/// Place in a tile of a chunk: chunks of a row are permuted by the row modulo 8, so that the same column of eight rows
/// lies in eight different sets of banks.
#[cube]
fn place(row: usize, chunk: usize, #[comptime] chunks: usize) -> usize {
    row * chunks + (chunk ^ (row % 8))
}

/// Where this lane finds its part of a left operand of rows from the start of a tile, step 0; transposed, of right
/// operands whose rows run along the sum. Step i is at the same place, xor 2 i.
#[cube]
fn left_place(#[comptime] chunks: usize) -> usize {
    let lane = UNIT_POS_PLANE as usize;
    place(lane % 16, lane / 16, chunks)
}

/// As [`left_place`], of right operands whose columns run along the sum.
#[cube]
fn right_place(#[comptime] chunks: usize) -> usize {
    let lane = UNIT_POS_PLANE as usize;
    place(lane / 16 * 8 + lane % 8, lane / 8 % 2, chunks)
}

#[cube]
fn read<F: Float>(
    tile: &Tile,
    at: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] transposed: bool,
) -> Array<Pair<F>> {
    let definition = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    // SAFETY: the place holds 16 bytes, eight elements of F.
    let slice = unsafe { tile.slice(at, at + 1).downcast_unchecked::<Vector<F, Const<8>>>() };
    definition.load_matrix::<Vector<F, Const<8>>, Const<2>>(&slice, ident, 4usize, transposed)
}

/// `sum += a b` for one right operand of 16 × 8, which are `b[first]` and `b[first + 1]`.
#[cube]
fn multiply<F: Float>(
    a: &Array<Pair<F>>,
    b: &Array<Pair<F>>,
    #[comptime] first: usize,
    sum: &mut Array<Pair<f32>>,
    #[comptime] depth: usize,
) {
    if comptime!(depth == 16) {
        let definition = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
        let mut right = Array::<Pair<F>>::new(2usize);
        right[0] = b[first];
        right[1] = b[first + 1];
        definition.execute_inplace(a, &right, sum);
    } else {
        let definition = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 8usize);
        #[unroll]
        for half in 0..2usize {
            let mut left = Array::<Pair<F>>::new(2usize);
            let mut right = Array::<Pair<F>>::new(1usize);
            left[0] = a[half * 2];
            left[1] = a[half * 2 + 1];
            right[0] = b[first + half];
            definition.execute_inplace(&left, &right, sum);
        }
    }
}

#[cube]
pub(super) fn zeros(#[comptime] count: usize) -> Sums {
    let mut sums = Sums::new();
    #[unroll]
    for _ in 0..count {
        let mut sum = Array::<Pair<f32>>::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }
    sums
}

#[cube]
fn clear(sums: &mut Sums) {
    #[unroll]
    for n in 0..sums.len() {
        let sum = sums.index_mut(n);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
    }
}

/// `sums = a bᵀ`: `blocks` times 16 rows of `a` from `row`, `columns` rows of `b` from `first`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn scores<F: Float>(
    sums: &mut Sums,
    a: &Tile,
    row: usize,
    b: &Tile,
    first: usize,
    #[comptime] columns: usize,
    #[comptime] blocks: usize,
    #[comptime] build: Build,
) {
    let chunks = comptime!(build.chunks);
    let parts = comptime!(columns / 16);
    let total = comptime!(parts * chunks / 2);
    let from_a = left_place(chunks) + row * chunks;
    let from_b = right_place(chunks) + first * chunks;
    clear(sums);
    let mut lefts = Sequence::<Array<Pair<F>>>::new();
    let mut rights = Sequence::<Array<Pair<F>>>::new();
    #[unroll]
    for i in 0..comptime!(total + AHEAD) {
        if comptime!(i < total) {
            let (step, n) = comptime!((i / parts, i % parts));
            if comptime!(n == 0) {
                #[unroll]
                for block in 0..blocks {
                    let at = (from_a ^ comptime!(step * 2)) + comptime!(block * 16 * chunks);
                    lefts.push(read::<F>(a, at, MatrixIdent::A, false));
                }
            }
            let at = (from_b ^ comptime!(step * 2)) + comptime!(n * 16 * chunks);
            rights.push(read::<F>(b, at, MatrixIdent::B, false));
        }
        if comptime!(i >= AHEAD) {
            let now = comptime!(i - AHEAD);
            let (step, n) = comptime!((now / parts, now % parts));
            let right = rights.index(now);
            #[unroll]
            for block in 0..blocks {
                let left = lefts.index(comptime!(step * blocks + block));
                let sum = comptime!(block * columns / 8 + n * 2);
                multiply::<F>(left, right, 0usize, sums.index_mut(sum), build.depth);
                multiply::<F>(left, right, 2usize, sums.index_mut(comptime!(sum + 1)), build.depth);
            }
        }
    }
}

/// Left operands of `blocks` times 16 × `columns`, rounded from accumulators: those of a depth of 16 side by side.
#[cube]
pub(super) fn operands<F: Float>(
    p: &Sums,
    #[comptime] columns: usize,
    #[comptime] blocks: usize,
) -> Sequence<Array<Pair<F>>> {
    let mut lefts = Sequence::<Array<Pair<F>>>::new();
    #[unroll]
    for step in 0..columns / 16 {
        #[unroll]
        for block in 0..blocks {
            let mut left = Array::<Pair<F>>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                let sum = comptime!(block * columns / 8 + step * 2 + i / 2);
                left[i] = Vector::cast_from(p.index(sum)[i % 2]);
            }
            lefts.push(left);
        }
    }
    lefts
}

/// `sums += p b`: p `blocks` times 16 × `rows` in registers, b `rows` rows of a tile from `first`.
#[cube]
pub(super) fn gather<F: Float>(
    sums: &mut Sums,
    p: &Sequence<Array<Pair<F>>>,
    b: &Tile,
    first: usize,
    #[comptime] rows: usize,
    #[comptime] blocks: usize,
    #[comptime] build: Build,
) {
    let chunks = comptime!(build.chunks);
    let parts = comptime!(chunks / 2);
    let total = comptime!(rows / 16 * parts);
    let from_b = left_place(chunks) + first * chunks;
    let mut rights = Sequence::<Array<Pair<F>>>::new();
    #[unroll]
    for i in 0..comptime!(total + AHEAD) {
        if comptime!(i < total) {
            let at = (from_b ^ comptime!(i % parts * 2)) + comptime!(i / parts * 16 * chunks);
            rights.push(read::<F>(b, at, MatrixIdent::A, true));
        }
        if comptime!(i >= AHEAD) {
            let now = comptime!(i - AHEAD);
            let (step, n) = comptime!((now / parts, now % parts));
            let right = rights.index(now);
            #[unroll]
            for block in 0..blocks {
                let left = p.index(comptime!(step * blocks + block));
                let sum = comptime!(block * chunks + n * 2);
                multiply::<F>(left, right, 0usize, sums.index_mut(sum), build.depth);
                multiply::<F>(left, right, 2usize, sums.index_mut(comptime!(sum + 1)), build.depth);
            }
        }
    }
}

/// A head of a tensor: where it begins and how far its rows are apart, in chunks, and its last row.
#[derive(CubeType)]
pub(super) struct Head {
    base: usize,
    stride: usize,
    pub(super) last: usize,
}

#[cube]
pub(super) fn head_of(x: &Tensor<Chunk>, batch: usize, head: usize) -> Head {
    let base = (batch * x.stride(0) + head * x.stride(1)) / 8;
    Head { base, stride: x.stride(2) / 8, last: x.shape(2) - 1 }
}

/// A head of the joined gradient `[b, t, heads, w]`.
#[cube]
pub(super) fn joined_head(x: &Tensor<Chunk>, batch: usize, head: usize) -> Head {
    let base = (batch * x.stride(0) + head * x.stride(2)) / 8;
    Head { base, stride: x.stride(1) / 8, last: x.shape(1) - 1 }
}

/// Copies `rows` rows of a head from `first` on to a tile's rows from `to_row` on, a multiple of 8. Past the end it
/// reads the last row again, of which nobody makes use: keys and queries that are not there are hidden.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn load(
    from: &Tensor<Chunk>,
    head: &Head,
    first: usize,
    to: &mut Tile,
    to_row: usize,
    #[comptime] rows: usize,
    #[comptime] build: Build,
) {
    let chunks = comptime!(build.chunks);
    let start = head.base + UNIT_POS as usize % chunks;
    let row = first + UNIT_POS as usize / chunks;
    let put = place(UNIT_POS as usize / chunks, UNIT_POS as usize % chunks, chunks) + to_row * chunks;
    #[unroll]
    for i in 0..comptime!(rows * chunks / 128) {
        let at = start + min(row + i * (128 / chunks), head.last) * head.stride;
        if comptime!(build.copies) {
            copy_async(&from.slice(at, at + 1), &mut to.slice_mut(put + i * 128, put + i * 128 + 1), 4u32);
        } else {
            to[put + i * 128] = from[at];
        }
    }
}

/// `rowsum(a ∘ b)` of `rows` rows from `first` on of a head, to shared memory, and to `out` `[b, h, t]`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn row_products<F: Float>(
    a: &Tensor<Chunk>,
    b: &Tensor<Chunk>,
    batch: usize,
    head: usize,
    first: usize,
    out: &mut Tensor<f32>,
    #[comptime] rows: usize,
    #[comptime] build: Build,
) -> SharedMemory<f32> {
    let chunks = comptime!(build.chunks);
    let (a_head, b_head) = (head_of(a, batch, head), head_of(b, batch, head));
    let line = (batch * out.shape(1) + head) * out.shape(2);
    let mut products = SharedMemory::<f32>::new(rows);
    let chunk = UNIT_POS as usize % chunks;
    #[unroll]
    for i in 0..comptime!(rows * chunks / 128) {
        let place = UNIT_POS as usize / chunks + i * (128 / chunks);
        let row = min(first + place, a_head.last);
        let x = Vector::<F, Const<8>>::reinterpret(a[a_head.base + chunk + row * a_head.stride]);
        let y = Vector::<F, Const<8>>::reinterpret(b[b_head.base + chunk + row * b_head.stride]);
        let mut sum = f32::new(0.0);
        #[unroll]
        for j in 0..8usize {
            sum = fma(f32::cast_from(x[j]), f32::cast_from(y[j]), sum);
        }
        // The chunks of a row are those of neighbours.
        #[unroll]
        for step in 0..comptime!(chunks.ilog2()) {
            sum += plane_shuffle_xor(sum, comptime!(1u32 << step));
        }
        if chunk == 0 {
            products[place] = sum;
            if first + place <= a_head.last {
                out[line + first + place] = sum;
            }
        }
    }
    products
}

/// Copies one number of `count` units to shared memory.
#[cube]
pub(super) fn load_number<N: Numeric>(
    from: &Tensor<N>,
    at: usize,
    to: &mut SharedMemory<N>,
    to_place: usize,
    #[comptime] build: Build,
) {
    if comptime!(build.copies) {
        copy_async(&from.slice(at, at + 1), &mut to.slice_mut(to_place, to_place + 1), 1u32);
    } else {
        to[to_place] = from[at];
    }
}

/// Copies documents of `count` tokens from `first` on, then their positions, to `to` from `to_place` on. Past the end
/// it copies the last token's.
#[cube]
pub(super) fn load_tokens(
    tokens: &Tokens,
    batch: usize,
    first: usize,
    to: &mut SharedMemory<i32>,
    to_place: usize,
    #[comptime] count: usize,
    #[comptime] build: Build,
) {
    let unit = UNIT_POS as usize;
    let i = min(first + unit % count, tokens.documents.shape(1) - 1);
    if unit < count {
        let at = batch * tokens.documents.stride(0) + i * tokens.documents.stride(1);
        load_number::<i32>(&tokens.documents, at, to, to_place + unit, build);
        let at = batch * tokens.positions.stride(0) + i * tokens.positions.stride(1);
        load_number::<i32>(&tokens.positions, at, to, to_place + count + unit, build);
    }
}

/// Keys and values that pass by queries, and the keys' tokens; a place for each turn.
#[derive(CubeType)]
pub(super) struct PassingKeys {
    pub(super) keys: Tile,
    pub(super) values: Tile,
    pub(super) tokens: SharedMemory<i32>,
}

#[cube]
impl PassingKeys {
    pub(super) fn new(#[comptime] stages: usize, #[comptime] count: usize, #[comptime] build: Build) -> Self {
        let size = comptime!(stages * count * build.chunks);
        PassingKeys {
            keys: SharedMemory::<Chunk>::new_aligned(size, 128usize),
            values: SharedMemory::<Chunk>::new_aligned(size, 128usize),
            tokens: SharedMemory::<i32>::new(comptime!(stages * 2 * count)),
        }
    }

    /// Copies the keys of a step and their tokens to the place of a turn.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn load_keys(
        &mut self,
        k: &Tensor<Chunk>,
        head: &Head,
        tokens: &Tokens,
        batch: usize,
        step: usize,
        turn: usize,
        #[comptime] count: usize,
        #[comptime] build: Build,
    ) {
        load(k, head, step * count, &mut self.keys, turn * count, count, build);
        load_tokens(tokens, batch, step * count, &mut self.tokens, turn * (2 * count), count, build);
    }

    /// Copies the values of a step to the place of a turn.
    pub(super) fn load_values(
        &mut self,
        v: &Tensor<Chunk>,
        head: &Head,
        step: usize,
        turn: usize,
        #[comptime] count: usize,
        #[comptime] build: Build,
    ) {
        load(v, head, step * count, &mut self.values, turn * count, count, build);
    }
}

/// Documents of `count` tokens from `first` on, then their positions, to shared memory: those of the rows. Past the
/// end, and for the document that nobody is in, a document that no token has.
#[cube]
pub(super) fn own_tokens(
    tokens: &Tokens,
    batch: usize,
    first: usize,
    #[comptime] count: usize,
) -> SharedMemory<i32> {
    let mut own = SharedMemory::<i32>::new(comptime!(count * 2));
    let (unit, row) = (UNIT_POS as usize, first + UNIT_POS as usize);
    if unit < count {
        own[unit] = comptime!(SEPARATE - 1).runtime();
        if row < tokens.documents.shape(1) {
            let document =
                tokens.documents[batch * tokens.documents.stride(0) + row * tokens.documents.stride(1)];
            own[unit] = select(document == SEPARATE, comptime!(SEPARATE - 1).runtime(), document);
            own[count + unit] =
                tokens.positions[batch * tokens.positions.stride(0) + row * tokens.positions.stride(1)];
        }
    }
    own
}

/// Hides scores of rows that do not see columns. `own` is what [`own_tokens`] gave of `count` rows, of which this
/// plane's begin at `row`; `theirs` holds the columns' tokens at the place of a turn; the first is number `first` of
/// `total`. `by_rows`: rows are queries; else columns are.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn hide(
    values: &mut Sums,
    own: &SharedMemory<i32>,
    row: usize,
    theirs: &SharedMemory<i32>,
    turn: usize,
    first: usize,
    total: usize,
    #[comptime] count: usize,
    #[comptime] columns: usize,
    #[comptime] blocks: usize,
    #[comptime] by_rows: bool,
) {
    let lane = UNIT_POS_PLANE as usize;
    let mut mine = Array::<i32>::new(comptime!(blocks * 4));
    #[unroll]
    for half in 0..blocks * 2 {
        mine[half] = own[row + lane / 4 + half * 8];
        mine[blocks * 2 + half] = own[count + row + lane / 4 + half * 8];
    }
    let (place, column) = (turn * (2 * columns), lane % 4 * 2);
    #[unroll]
    for n in 0..columns / 8 {
        #[unroll]
        for j in 0..2usize {
            let at = n * 8 + column + j;
            // No row is in this document.
            let document = select(first + at < total, theirs[place + at], SEPARATE.runtime());
            let position = theirs[place + columns + at];
            #[unroll]
            for half in 0..blocks * 2 {
                let own = mine[blocks * 2 + half];
                let mut seen = mine[half] == document && own >= position;
                if comptime!(!by_rows) {
                    seen = mine[half] == document && own <= position;
                }
                let sum = comptime!(half / 2 * columns / 8 + n);
                let mut pair = values.index(sum)[half % 2];
                pair[j] = select(seen, pair[j], f32::new(HIDDEN));
                values.index_mut(sum)[half % 2] = pair;
            }
        }
    }
}

/// Where the codes of a cube's tiles lie: those of a tile of 64 rows, and how far the next one of the other side is.
#[derive(CubeType)]
pub(super) struct Line {
    pub(super) start: usize,
    pub(super) stride: usize,
}

#[cube]
impl Line {
    pub(super) fn code(&self, codes: &Tensor<i32>, tile: usize) -> i32 {
        codes[self.start + tile * self.stride]
    }
}

/// The first step from `step` on in which one of two lines has something to do; a tile has `parts` steps.
#[cube]
pub(super) fn next(
    codes: &Tensor<i32>,
    a: &Line,
    b: &Line,
    step: usize,
    end: usize,
    #[comptime] parts: usize,
) -> usize {
    let mut found = step;
    while found < end && a.code(codes, found / parts) == SKIP && b.code(codes, found / parts) == SKIP {
        found += parts;
    }
    found
}

/// Writes rounded sums to the rows of a tile from `row` on, two elements at a time; row of block b, half h is times
/// `factors[2 b + h]`.
#[cube]
pub(super) fn stage<F: Float>(
    sums: &Sums,
    factors: &Array<f32>,
    row: usize,
    to: &mut Tile,
    #[comptime] blocks: usize,
    #[comptime] build: Build,
) {
    let chunks = comptime!(build.chunks);
    let lane = UNIT_POS_PLANE as usize;
    let mut words = to.to_slice_mut().with_vector_size::<Const<1>>();
    let start = place(row + lane / 4, 0usize, chunks) * 4 + lane % 4;
    #[unroll]
    for n in 0..chunks {
        let at = start ^ (n * 4);
        #[unroll]
        for half in 0..blocks * 2 {
            let sum = sums.index(comptime!(half / 2 * chunks + n))[half % 2];
            let pair = Pair::<F>::cast_from(sum * Vector::new(factors[half]));
            words[at + half * (8 * chunks * 4)] = Vector::<u32, Const<1>>::reinterpret(pair);
        }
    }
}

/// Copies `rows` rows of a tile to a head from row `first` on.
#[cube]
pub(super) fn flush(
    tile: &Tile,
    to: &mut Tensor<Chunk>,
    head: &Head,
    first: usize,
    #[comptime] rows: usize,
    #[comptime] build: Build,
) {
    let chunks = comptime!(build.chunks);
    let at = place(UNIT_POS as usize / chunks, UNIT_POS as usize % chunks, chunks);
    let start = head.base + UNIT_POS as usize % chunks;
    let row = first + UNIT_POS as usize / chunks;
    #[unroll]
    for i in 0..comptime!(rows * chunks / 128) {
        if row + i * (128 / chunks) <= head.last {
            to[start + (row + i * (128 / chunks)) * head.stride] = tile[at + i * 128];
        }
    }
}

/// Greatest of the four units that share rows.
#[cube]
pub(super) fn greatest_of_four(x: f32) -> f32 {
    let y = max(x, plane_shuffle_xor(x, 1));
    max(y, plane_shuffle_xor(y, 2))
}

#[cube]
pub(super) fn sum_of_four(x: f32) -> f32 {
    let y = x + plane_shuffle_xor(x, 1);
    y + plane_shuffle_xor(y, 2)
}

/// Powers of two that a weight may be below 1; what would be less is 2^-126.
pub(super) const RANGE: f32 = 126.0;

/// What scores, and what they are subtracted from, are multiplied by for [`weight`]; `scale` is that of the softmax.
#[cube]
pub(super) fn rate_of(scale: f32) -> f32 {
    scale * comptime!(std::f32::consts::LOG2_E / RANGE).runtime()
}

/// `exp(scale · score - shift)` at most 1, with `rate` and `shift` in units of 2^-126 (see [`rate_of`]): kept in bounds
/// in which the exponential is one instruction.
#[cube]
pub(super) fn weight(score: f32, rate: f32, shift: f32) -> f32 {
    let behind = min(max(fma(score, -rate, shift), f32::new(0.0)), f32::new(1.0));
    f32::powf(f32::new(2.0), behind * comptime!(-RANGE).runtime())
}
