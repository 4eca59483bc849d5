//! The gradients of attention on tensor cores; see [`super::flash`] for what they trade and refuse.
//!
//! Scores are recomputed twice: where queries are the rows, for their gradient, and where keys are, for theirs, so that
//! each sum stays in the registers of one plane and nothing is added atomically. Two tiles of the other side take turns
//! in shared memory: one is copied while the other is worked on. The first kernel also computes D, for itself and for the
//! second.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::device::{Tiled, Tokens, dims};
use super::flash::{QueryTile, grid, scale_of};
use super::ranges::{FULL, SKIP};
use super::tiles::{
    Build, Chunk, Gate, Line, PassingKeys, Sums, UNITS, flush, gather, head_of, hide, joined_head, load,
    load_number, load_tokens, next, operands, own_tokens, rate_of, row_products, scores, stage, weight,
    zeros,
};
use crate::device::uninitialized;

/// Keys that pass at once by queries.
const KEYS: usize = 32;
/// Keys of a tile where keys are the rows.
const OWN_KEYS: usize = 64;

impl Build {
    /// Queries that pass at once by keys.
    fn passing(self) -> usize {
        if self.copies { 64 } else { 32 }
    }

    /// Tiles of the other side in shared memory.
    fn stages(self) -> usize {
        if self.copies { 2 } else { 1 }
    }
}

/// Writes the joined gradient; see [`super::device::backward`].
pub(super) fn backward<R: CubeRuntime>(
    [q, k, v]: [&CubeTensor<R>; 3],
    [o, grad]: [&CubeTensor<R>; 2],
    lse: &CubeTensor<R>,
    index: &Tiled<R>,
    joined: &CubeTensor<R>,
    build: Build,
) {
    let [b, h, t, _] = dims(q);
    let along = uninitialized(q, [b, h, t], DType::F32);
    // SAFETY: as in `flash::forward`; the first kernel writes all of `along`, which the second reads; each cube writes its own rows and heads of the joined gradient.
    unsafe {
        flash_query_gradient::launch_unchecked::<R>(
            &q.client,
            grid(q, build.queries()),
            CubeDim::new_1d(UNITS),
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            o.clone().into_tensor_arg(),
            grad.clone().into_tensor_arg(),
            index.queries(),
            index.keys(),
            index.ranges.codes.clone().into_tensor_arg(),
            index.ranges.rows.clone().into_tensor_arg(),
            lse.clone().into_tensor_arg(),
            along.clone().into_tensor_arg(),
            joined.clone().into_tensor_arg(),
            scale_of(build),
            build,
            q.dtype.into(),
        );
        flash_key_gradient::launch_unchecked::<R>(
            &q.client,
            grid(k, OWN_KEYS),
            CubeDim::new_1d(UNITS),
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            grad.clone().into_tensor_arg(),
            index.queries(),
            index.keys(),
            index.ranges.codes.clone().into_tensor_arg(),
            index.ranges.columns.clone().into_tensor_arg(),
            lse.clone().into_tensor_arg(),
            along.clone().into_tensor_arg(),
            joined.clone().into_tensor_arg(),
            scale_of(build),
            build,
            q.dtype.into(),
        );
    }
}

/// `P ∘ (dP - D)` in place of dP, with P = `exp(scale · score - lse)`, 0 where hidden; `norms` and `means` are those of
/// this unit's rows.
#[cube]
fn slopes_of_rows(
    p: &Sums,
    slopes: &mut Sums,
    norms: &Array<f32>,
    means: &Array<f32>,
    rate: f32,
    #[comptime] blocks: usize,
) {
    #[unroll]
    for n in 0..blocks * KEYS / 8 {
        let block = comptime!(n / (KEYS / 8));
        #[unroll]
        for half in 0..2usize {
            let score = p.index(n)[half];
            let mut slope = slopes.index(n)[half];
            #[unroll]
            for j in 0..2usize {
                let weight = weight(score[j], rate, norms[block * 2 + half]);
                slope[j] = weight * (slope[j] - means[block * 2 + half]);
            }
            slopes.index_mut(n)[half] = slope;
        }
    }
}

/// Scores become P, and dP becomes `P ∘ (dP - D)`, with norms, then means of columns in shared memory from `place` on.
#[cube]
fn slopes_of_columns(
    p: &mut Sums,
    slopes: &mut Sums,
    statistics: &SharedMemory<f32>,
    place: usize,
    rate: f32,
    #[comptime] columns: usize,
) {
    let column = UNIT_POS_PLANE as usize % 4 * 2;
    #[unroll]
    for n in 0..columns / 8 {
        #[unroll]
        for j in 0..2usize {
            // A query that sees nothing has only hidden scores, which have to stay far below its norm.
            let norm = max(statistics[place + n * 8 + column + j], f32::new(-1e20)) * rate_of(1.0f32);
            let mean = statistics[place + columns + n * 8 + column + j];
            #[unroll]
            for half in 0..2usize {
                let mut score = p.index(n)[half];
                let mut slope = slopes.index(n)[half];
                let weight = weight(score[j], rate, norm);
                slope[j] = weight * (slope[j] - mean);
                score[j] = weight;
                p.index_mut(n)[half] = score;
                slopes.index_mut(n)[half] = slope;
            }
        }
    }
}

/// lse of this unit's rows in the units of [`rate_of`]; `own` is the first of them.
#[cube]
fn norms_of(
    lse: &Tensor<f32>,
    batch: usize,
    head: usize,
    own: usize,
    #[comptime] blocks: usize,
) -> Array<f32> {
    let line = (batch * lse.shape(1) + head) * lse.shape(2);
    let mut norms = Array::<f32>::new(comptime!(blocks * 2));
    #[unroll]
    for half in 0..blocks * 2 {
        let query = min(own + half * 8, lse.shape(2) - 1);
        // A row that sees nothing has only hidden scores, which have to stay far below its norm.
        norms[half] = max(lse[line + query], f32::new(-1e20)) * rate_of(1.0f32);
    }
    norms
}

/// D of this unit's rows; this plane's begin at `row`.
#[cube]
fn means_of(products: &SharedMemory<f32>, row: usize, #[comptime] blocks: usize) -> Array<f32> {
    let mut means = Array::<f32>::new(comptime!(blocks * 2));
    #[unroll]
    for half in 0..blocks * 2 {
        means[half] = products[row + UNIT_POS_PLANE as usize / 4 + half * 8];
    }
    means
}

#[cube]
fn all(value: f32, #[comptime] count: usize) -> Array<f32> {
    let mut factors = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        factors[i] = value;
    }
    factors
}

#[cube(launch_unchecked, fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
fn flash_query_gradient<F: Float>(
    q: &Tensor<Chunk>,
    k: &Tensor<Chunk>,
    v: &Tensor<Chunk>,
    o: &Tensor<Chunk>,
    grad: &Tensor<Chunk>,
    queries: &Tokens,
    keys: &Tokens,
    codes: &Tensor<i32>,
    rows: &Tensor<i32>,
    lse: &Tensor<f32>,
    along: &mut Tensor<f32>,
    joined: &mut Tensor<Chunk>,
    scale: f32,
    #[comptime] build: Build,
    #[define(F)] _dtype: StorageType,
) {
    let (blocks, size, stages) = comptime!((build.blocks(), build.queries(), build.stages()));
    let tile = (codes.shape(1) - 1) / blocks - CUBE_POS_Y as usize;
    let (head, batch) = (CUBE_POS_X as usize, CUBE_POS_Z as usize);
    let group = head / (q.shape(1) / k.shape(1));
    let row = UNIT_POS as usize / 32 * (blocks * 16);
    let own = tile * size + row + UNIT_POS_PLANE as usize / 4;
    let mut near = SharedMemory::<Chunk>::new_aligned(comptime!(size * build.chunks), 128usize);
    let mut upstream = SharedMemory::<Chunk>::new_aligned(comptime!(size * build.chunks), 128usize);
    let mut passing = PassingKeys::new(stages, KEYS, build);
    let at = QueryTile::new(codes, rows, batch, tile, blocks);
    let end = at.end * 2;
    let mut step = next(codes, &at.first, &at.last, at.start * 2, end, 2usize);
    let (k_head, v_head) = (head_of(k, batch, group), head_of(v, batch, group));
    let gate = Gate::new(build);
    load(q, &head_of(q, batch, head), tile * size, &mut near, 0usize, size, build);
    load(grad, &head_of(grad, batch, head), tile * size, &mut upstream, 0usize, size, build);
    if comptime!(build.copies) {
        passing.load_keys(k, &k_head, keys, batch, step, 0usize, KEYS, build);
        passing.load_values(v, &v_head, step, 0usize, KEYS, build);
    }
    gate.commit();
    let mine = own_tokens(queries, batch, tile * size, size);
    let products = row_products::<F>(o, grad, batch, head, tile * size, along, size, build);
    sync_cube();
    let (norms, means) = (norms_of(lse, batch, head, own, blocks), means_of(&products, row, blocks));
    let (mut sums, rate) = (zeros(blocks * build.chunks), rate_of(scale));
    let (mut p, mut slopes) = (zeros(blocks * KEYS / 8), zeros(blocks * KEYS / 8));
    let mut turn = 0usize;
    while step < end {
        let code = at.own.code(codes, step / 2);
        let following = next(codes, &at.first, &at.last, step + 1, end, 2usize);
        gate.wait();
        // With one tile the present one is copied, with two the next one is.
        let (copied, to) = if comptime!(build.copies) { (following, 1 - turn) } else { (step, turn) };
        if copied < end {
            passing.load_keys(k, &k_head, keys, batch, copied, to, KEYS, build);
            passing.load_values(v, &v_head, copied, to, KEYS, build);
        }
        gate.commit();
        if comptime!(!build.copies) {
            sync_cube();
        }
        if code != SKIP {
            scores::<F>(&mut p, &near, row, &passing.keys, turn * KEYS, KEYS, blocks, build);
            if code != FULL {
                let (tokens, first, total) = (&passing.tokens, step * KEYS, k_head.last + 1);
                hide(&mut p, &mine, row, tokens, turn, first, total, size, KEYS, blocks, true);
            }
            scores::<F>(&mut slopes, &upstream, row, &passing.values, turn * KEYS, KEYS, blocks, build);
            slopes_of_rows(&p, &mut slopes, &norms, &means, rate, blocks);
            let inner = operands::<F>(&slopes, KEYS, blocks);
            gather::<F>(&mut sums, &inner, &passing.keys, turn * KEYS, KEYS, blocks, build);
        }
        step = following;
        if comptime!(build.copies) {
            turn = 1 - turn;
        }
    }
    gate.wait();
    stage::<F>(&sums, &all(scale, blocks * 2), row, &mut near, blocks, build);
    sync_cube();
    flush(&near, joined, &joined_head(joined, batch, head), tile * size, size, build);
}

/// Rows of queries that pass by keys, with what belongs to them; two of each if copies are made beside the arithmetic.
#[derive(CubeType)]
struct Passing {
    far: SharedMemory<Chunk>,
    upstream: SharedMemory<Chunk>,
    tokens: SharedMemory<i32>,
    statistics: SharedMemory<f32>,
}

#[cube]
impl Passing {
    fn new(#[comptime] build: Build) -> Passing {
        let rows = comptime!(build.stages() * build.passing());
        Passing {
            far: SharedMemory::<Chunk>::new_aligned(comptime!(rows * build.chunks), 128usize),
            upstream: SharedMemory::<Chunk>::new_aligned(comptime!(rows * build.chunks), 128usize),
            tokens: SharedMemory::<i32>::new(rows * 2),
            statistics: SharedMemory::<f32>::new(rows * 2),
        }
    }

    /// Copies the queries from `first` on of a head to the place of a turn.
    #[allow(clippy::too_many_arguments)]
    fn load(
        &mut self,
        q: &Tensor<Chunk>,
        grad: &Tensor<Chunk>,
        queries: &Tokens,
        lse: &Tensor<f32>,
        along: &Tensor<f32>,
        batch: usize,
        head: usize,
        first: usize,
        turn: usize,
        #[comptime] build: Build,
    ) {
        let count = comptime!(build.passing());
        let (to, unit) = (turn * count, UNIT_POS as usize);
        load(q, &head_of(q, batch, head), first, &mut self.far, to, count, build);
        load(grad, &head_of(grad, batch, head), first, &mut self.upstream, to, count, build);
        load_tokens(queries, batch, first, &mut self.tokens, to * 2, count, build);
        if unit < count {
            let query = min(first + unit, q.shape(2) - 1);
            let at = (batch * q.shape(1) + head) * q.shape(2) + query;
            load_number::<f32>(lse, at, &mut self.statistics, to * 2 + unit, build);
            load_number::<f32>(along, at, &mut self.statistics, to * 2 + count + unit, build);
        }
    }
}

#[cube(launch_unchecked, fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
fn flash_key_gradient<F: Float>(
    q: &Tensor<Chunk>,
    k: &Tensor<Chunk>,
    v: &Tensor<Chunk>,
    grad: &Tensor<Chunk>,
    queries: &Tokens,
    keys: &Tokens,
    codes: &Tensor<i32>,
    columns: &Tensor<i32>,
    lse: &Tensor<f32>,
    along: &Tensor<f32>,
    joined: &mut Tensor<Chunk>,
    scale: f32,
    #[comptime] build: Build,
    #[define(F)] _dtype: StorageType,
) {
    let (count, parts) = comptime!((build.passing(), 64 / build.passing()));
    let (group, tile, batch) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let members = q.shape(1) / k.shape(1);
    let row = UNIT_POS as usize / 32 * 16;
    let mut near = SharedMemory::<Chunk>::new_aligned(comptime!(OWN_KEYS * build.chunks), 128usize);
    let mut values = SharedMemory::<Chunk>::new_aligned(comptime!(OWN_KEYS * build.chunks), 128usize);
    let mut theirs = Passing::new(build);
    let at = (batch * codes.shape(2) + tile) * 2;
    let line = Line { start: batch * codes.shape(1) * codes.shape(2) + tile, stride: codes.shape(2) };
    let (start, end) = (columns[at] as usize * parts, columns[at + 1] as usize * parts);
    let gate = Gate::new(build);
    load(k, &head_of(k, batch, group), tile * OWN_KEYS, &mut near, 0usize, OWN_KEYS, build);
    load(v, &head_of(v, batch, group), tile * OWN_KEYS, &mut values, 0usize, OWN_KEYS, build);
    let mine = own_tokens(keys, batch, tile * OWN_KEYS, OWN_KEYS);
    let (mut key_sums, mut value_sums) = (zeros(build.chunks), zeros(build.chunks));
    let (mut p, mut slopes) = (zeros(count / 8), zeros(count / 8));
    let mut turn = 0usize;
    let rate = rate_of(scale);
    for member in 0..members {
        let head = group * members + member;
        let mut step = next(codes, &line, &line, start, end, parts);
        if comptime!(build.copies) {
            theirs.load(q, grad, queries, lse, along, batch, head, step * count, turn, build);
        }
        gate.commit();
        while step < end {
            let code = line.code(codes, step / parts);
            let following = next(codes, &line, &line, step + 1, end, parts);
            gate.wait();
            let (copied, to) = if comptime!(build.copies) { (following, 1 - turn) } else { (step, turn) };
            if copied < end {
                theirs.load(q, grad, queries, lse, along, batch, head, copied * count, to, build);
            }
            gate.commit();
            if comptime!(!build.copies) {
                sync_cube();
            }
            scores::<F>(&mut p, &near, row, &theirs.far, turn * count, count, 1usize, build);
            if code != FULL {
                let (tokens, first, total) = (&theirs.tokens, step * count, q.shape(2));
                hide(&mut p, &mine, row, tokens, turn, first, total, OWN_KEYS, count, 1usize, false);
            }
            scores::<F>(&mut slopes, &values, row, &theirs.upstream, turn * count, count, 1usize, build);
            slopes_of_columns(&mut p, &mut slopes, &theirs.statistics, turn * (2 * count), rate, count);
            let weights = operands::<F>(&p, count, 1usize);
            let inner = operands::<F>(&slopes, count, 1usize);
            gather::<F>(&mut value_sums, &weights, &theirs.upstream, turn * count, count, 1usize, build);
            gather::<F>(&mut key_sums, &inner, &theirs.far, turn * count, count, 1usize, build);
            step = following;
            if comptime!(build.copies) {
                turn = 1 - turn;
            }
        }
    }
    gate.wait();
    stage::<F>(&key_sums, &all(scale, 2usize), row, &mut near, 1usize, build);
    stage::<F>(&value_sums, &all(f32::new(1.0), 2usize), row, &mut values, 1usize, build);
    sync_cube();
    let heads = q.shape(1) + group;
    flush(&near, joined, &joined_head(joined, batch, heads), tile * OWN_KEYS, OWN_KEYS, build);
    let heads = heads + k.shape(1);
    flush(&values, joined, &joined_head(joined, batch, heads), tile * OWN_KEYS, OWN_KEYS, build);
}
