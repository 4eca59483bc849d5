//! Attention on tensor cores, for f16 and bf16 with heads of 64 or 128. On Hopper those of 128 have kernels of their own, in
//! `hopper`.
//!
//! A cube of four planes has a tile of queries, 16 or 32 rows a plane, by which tiles of keys and values pass through
//! shared memory; scores and sums stay in registers. Where shared memory has room, the next keys and values are on their
//! way all the time that the present ones are worked on, and the softmax runs beside the products; where it has less,
//! values come while scores are computed, and the next keys while values are gathered. What it trades: registers, of
//! which a unit takes up to 255, and the last bits of weights below 2^-118 of the greatest. What it refuses: other
//! dtypes and widths, and rows that cannot be read 16 bytes at a time.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::device::{HIDDEN, Tiled, Tokens, dims};
use super::ranges::{FULL, SKIP};
use super::tiles::{
    Build, Chunk, Gate, Line, PassingKeys, RANGE, Sums, UNITS, flush, gather, greatest_of_four, head_of,
    hide, load, next, operands, own_tokens, rate_of, scores, stage, sum_of_four, weight, zeros,
};
use crate::device::vector_width;

/// Queries or keys for which there is one tile code.
pub(super) const EDGE: usize = 64;
/// Bytes of shared memory that a multiprocessor needs so that two cubes with two tiles of keys and values each fit.
const ROOMY: usize = 200 << 10;
/// Keys that pass at once.
const KEYS: usize = 64;

/// Whether the device has what these kernels need, for some dtype.
pub(super) fn on_device<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    !client.properties().features.matmul.ldmatrix.is_empty()
}

/// How the kernels are to be built if this device and these tensors can take this way.
pub(super) fn build<R: CubeRuntime>(tensors: &[&CubeTensor<R>]) -> Option<Build> {
    let first = tensors[0];
    let kind = match first.dtype {
        DType::F16 => FloatKind::F16,
        DType::BF16 => FloatKind::BF16,
        _ => return None,
    };
    let width = dims(first)[3];
    if !matches!(width, 64 | 128) || vector_width(width, tensors) != 8 {
        return None;
    }
    let features = &first.client.properties().features;
    let dtype = ElemType::Float(kind).into();
    let single = ElemType::Float(FloatKind::F32).into();
    let config = MmaConfig { a_type: dtype, b_type: dtype, cd_type: single, m: 16, n: 8, k: 16 };
    let depth = if !features.matmul.ldmatrix.contains(&dtype) {
        return None;
    } else if features.matmul.mma.contains(&config) {
        16
    } else if kind == FloatKind::F16 {
        // Turing has these products in half the depth, and CubeCL does not list them.
        8
    } else {
        return None;
    };
    let copies = features.copy_async && depth == 16;
    let roomy = first.client.properties().hardware.max_shared_memory_size >= ROOMY;
    Some(Build { chunks: width / 8, depth, copies, roomy: copies && roomy })
}

/// One cube for each `rows` rows of each head: the heads' tiles of one place side by side, as what they have to do
/// differs by place and the longest should begin first.
pub(super) fn grid<R: CubeRuntime>(x: &CubeTensor<R>, rows: usize) -> CubeCount {
    let [b, heads, t, _] = dims(x);
    CubeCount::Static(heads as u32, t.div_ceil(rows) as u32, b as u32)
}

pub(super) fn scale_of(build: Build) -> f32 {
    1.0 / ((build.chunks * 8) as f32).sqrt()
}

/// Writes `o` and `lse` of queries, keys and values; see [`super::device::forward`].
pub(super) fn forward<R: CubeRuntime>(
    [q, k, v]: [&CubeTensor<R>; 3],
    index: &Tiled<R>,
    o: &CubeTensor<R>,
    lse: &CubeTensor<R>,
    build: Build,
) {
    // SAFETY: rows past the end are read as the last one and not written, chunks of 8 elements are aligned as `build`
    // requires, and each tile has a code.
    unsafe {
        flash_forward::launch_unchecked::<R>(
            &q.client,
            grid(q, build.queries()),
            CubeDim::new_1d(UNITS),
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            index.queries(),
            index.keys(),
            index.ranges.codes.clone().into_tensor_arg(),
            index.ranges.rows.clone().into_tensor_arg(),
            o.clone().into_tensor_arg(),
            lse.clone().into_tensor_arg(),
            scale_of(build),
            build,
            q.dtype.into(),
        );
    }
}

/// Codes of a tile of queries: those of its first and its last 64 rows, and those of this plane's rows; the range of
/// key tiles that any of them meets.
#[derive(CubeType)]
pub(super) struct QueryTile {
    pub(super) first: Line,
    pub(super) last: Line,
    pub(super) own: Line,
    pub(super) start: usize,
    pub(super) end: usize,
}

#[cube]
impl QueryTile {
    pub(super) fn new(
        codes: &Tensor<i32>,
        rows: &Tensor<i32>,
        batch: usize,
        tile: usize,
        #[comptime] blocks: usize,
    ) -> QueryTile {
        let tiles = codes.shape(1);
        let first = batch * tiles + tile * blocks;
        let last = batch * tiles + min(tile * blocks + (blocks - 1), tiles - 1);
        let own = if UNIT_POS < 64 { first } else { last };
        QueryTile {
            first: Line { start: first * codes.shape(2), stride: 1usize },
            last: Line { start: last * codes.shape(2), stride: 1usize },
            own: Line { start: own * codes.shape(2), stride: 1usize },
            start: min(rows[first * 2], rows[last * 2]) as usize,
            end: max(rows[first * 2 + 1], rows[last * 2 + 1]) as usize,
        }
    }
}

/// How far peaks may be behind, in units of [`rate_of`]: 8 powers of two. Weights are taken relative to as much above
/// the peak, so that none exceeds 1, and sums are seldom rescaled.
const SLACK: f32 = 8.0 / RANGE;

/// What belongs to this unit's rows: the greatest score that shifts the softmax, and the sum of its own weights.
#[derive(CubeType)]
struct Softmax {
    peaks: Array<f32>,
    totals: Array<f32>,
}

#[cube]
impl Softmax {
    fn new(#[comptime] blocks: usize) -> Softmax {
        let mut peaks = Array::<f32>::new(comptime!(blocks * 2));
        let mut totals = Array::<f32>::new(comptime!(blocks * 2));
        #[unroll]
        for half in 0..blocks * 2 {
            peaks[half] = f32::new(HIDDEN);
            totals[half] = f32::new(0.0);
        }
        Softmax { peaks, totals }
    }

    /// Takes the peaks of 64 more scores and shrinks sums and totals where they grew, if one grew by much.
    fn raise(
        &mut self,
        values: &Sums,
        sums: &mut Sums,
        rate: f32,
        #[comptime] blocks: usize,
        #[comptime] chunks: usize,
    ) {
        let slack = f32::new(SLACK) / rate;
        let mut tops = Array::<f32>::new(comptime!(blocks * 2));
        let mut grew = false;
        #[unroll]
        for half in 0..blocks * 2 {
            let first = comptime!(half / 2 * KEYS / 8);
            let mut top = self.peaks[half];
            #[unroll]
            for n in 0..KEYS / 8 {
                let pair = values.index(comptime!(first + n))[half % 2];
                top = max(top, max(pair[0], pair[1]));
            }
            tops[half] = greatest_of_four(top);
            grew = grew || tops[half] > self.peaks[half] + slack;
        }
        if plane_any(grew) {
            #[unroll]
            for half in 0..blocks * 2 {
                let shrink = weight(self.peaks[half], rate, shift_of(tops[half], rate, f32::new(0.0)));
                self.peaks[half] = tops[half];
                self.totals[half] = self.totals[half] * shrink;
                #[unroll]
                for n in 0..chunks {
                    let sum = comptime!(half / 2 * chunks + n);
                    sums.index_mut(sum)[half % 2] = sums.index(sum)[half % 2] * Vector::new(shrink);
                }
            }
        }
    }

    /// Scores become weights, which are added to the totals.
    fn soften(&mut self, values: &mut Sums, rate: f32, #[comptime] blocks: usize) {
        #[unroll]
        for half in 0..blocks * 2 {
            let shift = shift_of(self.peaks[half], rate, f32::new(SLACK));
            let mut total = self.totals[half];
            #[unroll]
            for n in 0..KEYS / 8 {
                let sum = comptime!(half / 2 * KEYS / 8 + n);
                let pair = values.index(sum)[half % 2];
                let mut weights = Vector::<f32, Const<2>>::empty();
                weights[0] = weight(pair[0], rate, shift);
                weights[1] = weight(pair[1], rate, shift);
                total += weights[0] + weights[1];
                values.index_mut(sum)[half % 2] = weights;
            }
            self.totals[half] = total;
        }
    }
}

/// Where all is hidden so far the shift is 0, so that hidden scores weigh nothing.
#[cube]
fn shift_of(peak: f32, rate: f32, slack: f32) -> f32 {
    select(peak < f32::new(-1e29), f32::new(0.0), fma(peak, rate, slack))
}

/// Writes lse of this unit's rows, the first of which is `row`, and gives what their sums are to be multiplied by.
#[cube]
fn finish(
    softmax: &Softmax,
    lse: &mut Tensor<f32>,
    line: usize,
    row: usize,
    scale: f32,
    #[comptime] blocks: usize,
) -> Array<f32> {
    let mut factors = Array::<f32>::new(comptime!(blocks * 2));
    #[unroll]
    for half in 0..blocks * 2 {
        let total = sum_of_four(softmax.totals[half]);
        let some = softmax.peaks[half] > f32::new(-1e29);
        factors[half] = select(some, 1.0 / total, f32::new(0.0));
        let query = row + half * 8;
        if UNIT_POS_PLANE % 4 == 0 && query < lse.shape(2) {
            let sum = fma(softmax.peaks[half], scale, total.ln()) + f32::new(SLACK) / rate_of(1.0f32);
            lse[line * lse.shape(2) + query] = select(some, sum, f32::new(HIDDEN));
        }
    }
    factors
}

#[cube(launch_unchecked, fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
fn flash_forward<F: Float>(
    q: &Tensor<Chunk>,
    k: &Tensor<Chunk>,
    v: &Tensor<Chunk>,
    queries: &Tokens,
    keys: &Tokens,
    codes: &Tensor<i32>,
    rows: &Tensor<i32>,
    o: &mut Tensor<Chunk>,
    lse: &mut Tensor<f32>,
    scale: f32,
    #[comptime] build: Build,
    #[define(F)] _dtype: StorageType,
) {
    let (blocks, size) = comptime!((build.blocks(), build.queries()));
    let stages = comptime!(if build.roomy { 2usize } else { 1usize });
    // The last tiles of a causal row have the most to do and begin first.
    let tile = (codes.shape(1) - 1) / blocks - CUBE_POS_Y as usize;
    let (head, batch) = (CUBE_POS_X as usize, CUBE_POS_Z as usize);
    let group = head / (q.shape(1) / k.shape(1));
    let row = UNIT_POS as usize / 32 * (blocks * 16);
    let own = tile * size + row + UNIT_POS_PLANE as usize / 4;
    let mut near = SharedMemory::<Chunk>::new_aligned(comptime!(size * build.chunks), 128usize);
    let mut passing = PassingKeys::new(stages, KEYS, build);
    let at = QueryTile::new(codes, rows, batch, tile, blocks);
    let mut step = next(codes, &at.first, &at.last, at.start, at.end, 1usize);
    let (k_head, v_head) = (head_of(k, batch, group), head_of(v, batch, group));
    let gate = Gate::new(build);
    load(q, &head_of(q, batch, head), tile * size, &mut near, 0usize, size, build);
    if comptime!(build.copies) {
        passing.load_keys(k, &k_head, keys, batch, step, 0usize, KEYS, build);
    }
    if comptime!(stages == 2) {
        passing.load_values(v, &v_head, step, 0usize, KEYS, build);
    }
    gate.commit();
    let mine = own_tokens(queries, batch, tile * size, size);
    let (mut sums, mut p) = (zeros(blocks * build.chunks), zeros(blocks * KEYS / 8));
    let (mut softmax, rate) = (Softmax::new(blocks), rate_of(scale));
    let mut turn = 0usize;
    while step < at.end {
        let code = at.own.code(codes, step);
        let following = next(codes, &at.first, &at.last, step + 1, at.end, 1usize);
        gate.wait();
        if comptime!(stages == 1) {
            passing.load_values(v, &v_head, step, turn, KEYS, build);
        } else if following < at.end {
            passing.load_keys(k, &k_head, keys, batch, following, 1 - turn, KEYS, build);
            passing.load_values(v, &v_head, following, 1 - turn, KEYS, build);
        }
        if comptime!(!build.copies) {
            passing.load_keys(k, &k_head, keys, batch, step, turn, KEYS, build);
            sync_cube();
        }
        gate.commit();
        if code != SKIP {
            scores::<F>(&mut p, &near, row, &passing.keys, turn * KEYS, KEYS, blocks, build);
            if code != FULL {
                let (tokens, first, total) = (&passing.tokens, step * KEYS, k_head.last + 1);
                hide(&mut p, &mine, row, tokens, turn, first, total, size, KEYS, blocks, true);
            }
            softmax.raise(&p, &mut sums, rate, blocks, build.chunks);
            softmax.soften(&mut p, rate, blocks);
        }
        if comptime!(build.copies && stages == 1) {
            gate.wait();
            if following < at.end {
                passing.load_keys(k, &k_head, keys, batch, following, turn, KEYS, build);
            }
            gate.commit();
        }
        if code != SKIP {
            let weights = operands::<F>(&p, KEYS, blocks);
            gather::<F>(&mut sums, &weights, &passing.values, turn * KEYS, KEYS, blocks, build);
        }
        step = following;
        if comptime!(stages == 2) {
            turn = 1 - turn;
        }
    }
    let factors = finish(&softmax, lse, batch * q.shape(1) + head, own, scale, blocks);
    gate.wait();
    stage::<F>(&sums, &factors, row, &mut near, blocks, build);
    sync_cube();
    flush(&near, o, &head_of(o, batch, head), tile * size, size, build);
}
