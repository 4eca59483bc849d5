//! Attention on tensor cores, for f16 and bf16 with heads of 64 or 128.
//!
//! A cube of four planes has a tile of 64 queries (for the gradient of keys: of 64 keys), 16 rows a plane. Scores and
//! sums stay in registers; the tiles of the other side pass through shared memory, the next one being read into
//! registers while the present one is worked on. Products are `m16n8k16` instructions, or pairs of `m16n8k8` where
//! `depth` is 8 (Turing). What it trades: registers, of which a unit takes up to 255. What it refuses: other dtypes and
//! widths, and rows that cannot be read 16 bytes at a time.
//!
//! Fragments, with g = lane / 4 and c = 2 (lane mod 4): an accumulator of 16 × 8 holds `[0]` = (g, c), (g, c + 1) and
//! `[1]` = the same of row g + 8. A left operand of 16 × 16 holds `[0]` = (g, c), `[1]` = (g + 8, c), `[2]` = (g, c + 8),
//! `[3]` = (g + 8, c + 8), two elements each: two accumulators side by side, rounded, are a left operand. Two right
//! operands of 16 × 8 side by side hold `[0]`, `[1]` = elements (c, g), (c + 8, g) of the first, `[2]`, `[3]` of the second.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::SEPARATE;
use super::device::{HIDDEN, Index, Tokens, dims, vector_width};
use super::ranges::{FULL, SKIP};

/// Rows of a cube's tile, and keys or queries for which there is one tile code.
pub(super) const EDGE: usize = 64;
/// Four planes of 32 units.
const UNITS: u32 = 128;
/// Keys that pass at once in the forward pass.
const AHEAD: usize = 64;
/// Keys or queries that pass at once in the backward pass.
const BACK: usize = 32;

type Pair<F> = Vector<F, Const<2>>;
/// Eight elements of 16 bits, moved as 16 bytes.
type Chunk = Vector<u32, Const<4>>;
type Tile = SharedMemory<Chunk>;

/// The `depth` of the products if this device and these tensors can take this way: 16, or 8.
pub(super) fn depth<R: CubeRuntime>(tensors: &[&CubeTensor<R>]) -> Option<usize> {
    let first = tensors[0];
    let kind = match first.dtype {
        DType::F16 => FloatKind::F16,
        DType::BF16 => FloatKind::BF16,
        _ => return None,
    };
    if !matches!(dims(first)[3], 64 | 128) || vector_width(tensors) != 8 {
        return None;
    }
    let features = &first.client.properties().features.matmul;
    let dtype = ElemType::Float(kind).into();
    let single = ElemType::Float(FloatKind::F32).into();
    let config = MmaConfig { a_type: dtype, b_type: dtype, cd_type: single, m: 16, n: 8, k: 16 };
    if !features.ldmatrix.contains(&dtype) {
        None
    } else if features.mma.contains(&config) {
        Some(16)
    } else {
        // Turing has these products in half the depth, and CubeCL does not list them.
        (kind == FloatKind::F16).then_some(8)
    }
}

fn grid<R: CubeRuntime>(x: &CubeTensor<R>) -> CubeCount {
    let [b, heads, t, _] = dims(x);
    CubeCount::Static(t.div_ceil(EDGE) as u32, heads as u32, b as u32)
}

fn scale_of(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

/// Writes `o` and `lse` of queries, keys and values; see [`super::device::forward`].
pub(super) fn forward<R: CubeRuntime>(
    [q, k, v]: [&CubeTensor<R>; 3],
    index: &Index<R>,
    o: &CubeTensor<R>,
    lse: &CubeTensor<R>,
    depth: usize,
) {
    let width = dims(q)[3];
    // SAFETY: rows past the end are read as 0 and not written, chunks of 8 elements are aligned as `depth` requires,
    // and each tile has a code.
    unsafe {
        flash_forward::launch_unchecked::<R>(
            &q.client,
            grid(q),
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
            scale_of(width),
            width,
            depth,
            q.dtype.into(),
        );
    }
}

/// Writes the joined gradient; see [`super::device::backward`].
pub(super) fn backward<R: CubeRuntime>(
    [q, k, v]: [&CubeTensor<R>; 3],
    grad: &CubeTensor<R>,
    [lse, along]: [&CubeTensor<R>; 2],
    index: &Index<R>,
    joined: &CubeTensor<R>,
    depth: usize,
) {
    let width = dims(q)[3];
    let columns = index.ranges.columns();
    // SAFETY: as in `forward`; each cube writes its own rows and heads of the joined gradient.
    unsafe {
        flash_query_gradient::launch_unchecked::<R>(
            &q.client,
            grid(q),
            CubeDim::new_1d(UNITS),
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            grad.clone().into_tensor_arg(),
            index.queries(),
            index.keys(),
            index.ranges.codes.clone().into_tensor_arg(),
            index.ranges.rows.clone().into_tensor_arg(),
            lse.clone().into_tensor_arg(),
            along.clone().into_tensor_arg(),
            joined.clone().into_tensor_arg(),
            scale_of(width),
            width,
            depth,
            q.dtype.into(),
        );
        flash_key_gradient::launch_unchecked::<R>(
            &q.client,
            grid(k),
            CubeDim::new_1d(UNITS),
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            grad.clone().into_tensor_arg(),
            index.queries(),
            index.keys(),
            index.ranges.codes.clone().into_tensor_arg(),
            columns.into_tensor_arg(),
            lse.clone().into_tensor_arg(),
            along.clone().into_tensor_arg(),
            joined.clone().into_tensor_arg(),
            scale_of(width),
            width,
            depth,
            q.dtype.into(),
        );
    }
}

/// Place in a tile of a chunk of 8 elements: chunks of a row are permuted by the row modulo 8, so that the same
/// column of eight rows lies in eight different sets of banks. `row` is a multiple of 8 before `within`.
#[cube]
fn place(row: usize, within: usize, chunk: usize, #[comptime] chunks: usize) -> usize {
    row * chunks + within * chunks + (chunk ^ (within % 8))
}

/// Left operand: 16 rows from `row`, 16 columns from `16 step`; transposed, the right operands of 16 rows from `row`
/// and 16 columns from `16 step`, where rows run along the sum.
#[cube]
fn fragment<F: Float>(
    tile: &Tile,
    row: usize,
    #[comptime] step: usize,
    #[comptime] transposed: bool,
    #[comptime] chunks: usize,
) -> Array<Pair<F>> {
    let lane = UNIT_POS_PLANE as usize;
    let at = row * chunks + lane % 16 * chunks + ((lane / 16 ^ (lane % 8)) ^ (step * 2));
    let definition = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    // SAFETY: the place holds 16 bytes, eight elements of F.
    let slice = unsafe { tile.slice(at, at + 1).downcast_unchecked::<Vector<F, Const<8>>>() };
    definition.load_matrix::<Vector<F, Const<8>>, Const<2>>(&slice, MatrixIdent::A, 4usize, transposed)
}

/// Right operands where columns run along the sum: 16 rows from `row`, 16 columns from `16 step`.
#[cube]
fn fragment_of_rows<F: Float>(
    tile: &Tile,
    row: usize,
    #[comptime] step: usize,
    #[comptime] chunks: usize,
) -> Array<Pair<F>> {
    let lane = UNIT_POS_PLANE as usize;
    let within = lane / 16 * 8 + lane % 8;
    let at = row * chunks + within * chunks + ((lane / 8 % 2 ^ (lane % 8)) ^ (step * 2));
    let definition = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    // SAFETY: the place holds 16 bytes, eight elements of F.
    let slice = unsafe { tile.slice(at, at + 1).downcast_unchecked::<Vector<F, Const<8>>>() };
    definition.load_matrix::<Vector<F, Const<8>>, Const<2>>(&slice, MatrixIdent::B, 4usize, false)
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
fn zeros(#[comptime] count: usize) -> Sequence<Array<Pair<f32>>> {
    let mut sums = Sequence::<Array<Pair<f32>>>::new();
    #[unroll]
    for _ in 0..count {
        let mut sum = Array::<Pair<f32>>::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }
    sums
}

/// Sums `a bᵀ`: 16 rows of `a` from `row`, the first `columns` rows of `b`.
#[cube]
fn scores<F: Float>(
    a: &Tile,
    row: usize,
    b: &Tile,
    #[comptime] columns: usize,
    #[comptime] chunks: usize,
    #[comptime] depth: usize,
) -> Sequence<Array<Pair<f32>>> {
    let mut sums = zeros(columns / 8);
    #[unroll]
    for step in 0..chunks / 2 {
        let left = fragment::<F>(a, row, step, false, chunks);
        #[unroll]
        for n in 0..columns / 16 {
            let right = fragment_of_rows::<F>(b, n * 16, step, chunks);
            multiply::<F>(&left, &right, 0usize, sums.index_mut(n * 2), depth);
            multiply::<F>(&left, &right, 2usize, sums.index_mut(n * 2 + 1), depth);
        }
    }
    sums
}

/// `sums += p b`: p 16 × `rows` in registers, b the first `rows` rows of a tile.
#[cube]
fn gather<F: Float>(
    sums: &mut Sequence<Array<Pair<f32>>>,
    p: &Sequence<Array<Pair<f32>>>,
    b: &Tile,
    #[comptime] rows: usize,
    #[comptime] chunks: usize,
    #[comptime] depth: usize,
) {
    #[unroll]
    for step in 0..rows / 16 {
        let mut left = Array::<Pair<F>>::new(4usize);
        #[unroll]
        for i in 0..4usize {
            left[i] = Vector::cast_from(p.index(step * 2 + i / 2)[i % 2]);
        }
        #[unroll]
        for n in 0..chunks / 2 {
            let right = fragment::<F>(b, step * 16, n, true, chunks);
            multiply::<F>(&left, &right, 0usize, sums.index_mut(n * 2), depth);
            multiply::<F>(&left, &right, 2usize, sums.index_mut(n * 2 + 1), depth);
        }
    }
}

/// A head of a tensor: where it begins and how far its rows are apart, in chunks, and its last row.
#[derive(CubeType)]
struct Head {
    base: usize,
    stride: usize,
    last: usize,
}

#[cube]
fn head_of(x: &Tensor<Chunk>, batch: usize, head: usize) -> Head {
    let base = (batch * x.stride(0) + head * x.stride(1)) / 8;
    Head { base, stride: x.stride(2) / 8, last: x.shape(2) - 1 }
}

/// Reads this unit's chunks of `rows` rows of a head from `first` on. Past the end it reads the last row again, of
/// which nobody makes use: keys and queries that are not there are hidden.
#[cube]
fn fetch(
    held: &mut Array<Chunk>,
    from: &Tensor<Chunk>,
    head: &Head,
    first: usize,
    #[comptime] rows: usize,
    #[comptime] chunks: usize,
) {
    let start = head.base + UNIT_POS as usize % chunks;
    let row = first + UNIT_POS as usize / chunks;
    #[unroll]
    for i in 0..comptime!(rows * chunks / 128) {
        held[i] = from[start + min(row + i * (128 / chunks), head.last) * head.stride];
    }
}

/// Writes what [`fetch`] read to a tile.
#[cube]
fn put(held: &Array<Chunk>, to: &mut Tile, #[comptime] rows: usize, #[comptime] chunks: usize) {
    let start = place(0usize, UNIT_POS as usize / chunks, UNIT_POS as usize % chunks, chunks);
    #[unroll]
    for i in 0..comptime!(rows * chunks / 128) {
        to[start + i * 128] = held[i];
    }
}

/// Copies 64 rows of a head to a tile.
#[cube]
fn load(from: &Tensor<Chunk>, head: &Head, first: usize, to: &mut Tile, #[comptime] chunks: usize) {
    let mut held = Array::<Chunk>::new(64 * chunks / 128);
    fetch(&mut held, from, head, first, 64usize, chunks);
    put(&held, to, 64usize, chunks);
}

/// Document and position of token `i`; past the end, and where a query stands in the document that nobody is in,
/// a document that no key has.
#[cube]
fn token(tokens: &Tokens, batch: usize, i: usize, #[comptime] query: bool) -> (i32, i32) {
    let mut document = SEPARATE.runtime();
    let mut position = i32::new(0);
    if i < tokens.documents.shape(1) {
        document = tokens.documents[batch * tokens.documents.stride(0) + i * tokens.documents.stride(1)];
        position = tokens.positions[batch * tokens.positions.stride(0) + i * tokens.positions.stride(1)];
    }
    if comptime!(query) {
        if document == SEPARATE {
            document = comptime!(SEPARATE - 1).runtime();
        }
    }
    (document, position)
}

/// The first of the codes from `step` on that says that there is something to do; a tile has `parts` steps.
#[cube]
fn next(
    codes: &Tensor<i32>,
    start: usize,
    stride: usize,
    step: usize,
    end: usize,
    #[comptime] parts: usize,
) -> usize {
    let mut found = step;
    while found < end && codes[start + found / parts * stride] == SKIP {
        found += parts;
    }
    found
}

/// Writes rounded sums to the rows of a tile from `row` on, two elements at a time.
#[cube]
fn stage<F: Float>(
    sums: &Sequence<Array<Pair<f32>>>,
    factors: &Array<f32>,
    row: usize,
    to: &mut Tile,
    #[comptime] chunks: usize,
) {
    let lane = UNIT_POS_PLANE as usize;
    let mut words = to.to_slice_mut().with_vector_size::<Const<1>>();
    let start = (row + lane / 4) * chunks;
    #[unroll]
    for n in 0..chunks {
        let at = (start + (n ^ (lane / 4))) * 4 + lane % 4;
        #[unroll]
        for half in 0..2usize {
            let pair = Pair::<F>::cast_from(sums.index(n)[half] * Vector::new(factors[half]));
            words[at + half * (8 * chunks * 4)] = Vector::<u32, Const<1>>::reinterpret(pair);
        }
    }
}

/// Copies rows of a tile to a head from row `first` on.
#[cube]
fn flush(tile: &Tile, to: &mut Tensor<Chunk>, head: &Head, first: usize, #[comptime] chunks: usize) {
    let at = place(0usize, UNIT_POS as usize / chunks, UNIT_POS as usize % chunks, chunks);
    let start = head.base + UNIT_POS as usize % chunks;
    let row = first + UNIT_POS as usize / chunks;
    #[unroll]
    for i in 0..comptime!(64 * chunks / 128) {
        if row + i * (128 / chunks) <= head.last {
            to[start + (row + i * (128 / chunks)) * head.stride] = tile[at + i * 128];
        }
    }
}

/// Greatest of the four units that share rows.
#[cube]
fn greatest_of_four(x: f32) -> f32 {
    let y = max(x, plane_shuffle_xor(x, 1));
    max(y, plane_shuffle_xor(y, 2))
}

#[cube]
fn sum_of_four(x: f32) -> f32 {
    let y = x + plane_shuffle_xor(x, 1);
    y + plane_shuffle_xor(y, 2)
}

/// Hides scores of rows that do not see columns. `mine` are documents and positions of this unit's two rows, `theirs`
/// those of the columns. `by_rows`: rows are queries; else columns are.
#[cube]
fn hide(
    values: &mut Sequence<Array<Pair<f32>>>,
    mine: &Array<i32>,
    theirs: &SharedMemory<i32>,
    hidden: f32,
    #[comptime] columns: usize,
    #[comptime] by_rows: bool,
) {
    let column = UNIT_POS_PLANE as usize % 4 * 2;
    #[unroll]
    for n in 0..columns / 8 {
        #[unroll]
        for j in 0..2usize {
            let document = theirs[n * 8 + column + j];
            let position = theirs[columns + n * 8 + column + j];
            #[unroll]
            for half in 0..2usize {
                let mut seen = mine[half] == document && mine[2 + half] >= position;
                if comptime!(!by_rows) {
                    seen = mine[half] == document && mine[2 + half] <= position;
                }
                let mut pair = values.index(n)[half];
                pair[j] = select(seen, pair[j], hidden);
                values.index_mut(n)[half] = pair;
            }
        }
    }
}

/// Documents and positions of this unit's two rows.
#[cube]
fn own_tokens(tokens: &Tokens, batch: usize, row: usize, #[comptime] query: bool) -> Array<i32> {
    let mut mine = Array::<i32>::new(4usize);
    #[unroll]
    for half in 0..2usize {
        let (document, position) = token(tokens, batch, row + half * 8, query);
        mine[half] = document;
        mine[2 + half] = position;
    }
    mine
}

/// Reads document and position of this unit's one of `count` tokens from `first` on.
#[cube]
fn fetch_tokens(
    held: &mut Array<i32>,
    tokens: &Tokens,
    batch: usize,
    first: usize,
    #[comptime] count: usize,
    #[comptime] query: bool,
) {
    let (document, position) = token(tokens, batch, first + UNIT_POS as usize % count, query);
    held[0] = document;
    held[1] = position;
}

/// Writes what [`fetch_tokens`] read: documents, then positions.
#[cube]
fn put_tokens(held: &Array<i32>, to: &mut SharedMemory<i32>, #[comptime] count: usize) {
    let i = UNIT_POS as usize;
    if i < count {
        to[i] = held[0];
        to[count + i] = held[1];
    }
}

/// One step of the softmax over 64 keys: scores become weights, sums and totals shrink as the peaks grow.
#[cube]
fn soften(
    values: &mut Sequence<Array<Pair<f32>>>,
    sums: &mut Sequence<Array<Pair<f32>>>,
    peaks: &mut Array<f32>,
    totals: &mut Array<f32>,
    scale: f32,
    #[comptime] chunks: usize,
) {
    #[unroll]
    for half in 0..2usize {
        let mut top = peaks[half];
        #[unroll]
        for n in 0..AHEAD / 8 {
            let pair = values.index(n)[half];
            top = max(top, max(pair[0], pair[1]));
        }
        top = greatest_of_four(top);
        // Where all is hidden so far the shift is 0, so that hidden scores weigh nothing.
        let shift = select(top < f32::new(-1e29), f32::new(0.0), top * scale);
        let shrink = fma(peaks[half], scale, -shift).exp();
        peaks[half] = top;
        let mut total = totals[half] * shrink;
        #[unroll]
        for n in 0..AHEAD / 8 {
            let pair = values.index(n)[half];
            let mut weights = Vector::<f32, Const<2>>::empty();
            weights[0] = fma(pair[0], scale, -shift).exp();
            weights[1] = fma(pair[1], scale, -shift).exp();
            total += weights[0] + weights[1];
            values.index_mut(n)[half] = weights;
        }
        totals[half] = total;
        #[unroll]
        for n in 0..chunks {
            sums.index_mut(n)[half] = sums.index(n)[half] * Vector::new(shrink);
        }
    }
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
    #[comptime] width: usize,
    #[comptime] depth: usize,
    #[define(F)] _dtype: StorageType,
) {
    let chunks = comptime!(width / 8);
    // The last tiles of a causal row have the most to do and begin first.
    let tile = codes.shape(1) - 1 - CUBE_POS_X as usize;
    let (head, batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let group = head / (q.shape(1) / k.shape(1));
    let row = UNIT_POS as usize / 32 * 16;
    let own = row + UNIT_POS_PLANE as usize / 4;
    let mut near = SharedMemory::<Chunk>::new_aligned(64 * chunks, 128usize);
    let mut far = SharedMemory::<Chunk>::new_aligned(AHEAD * chunks, 128usize);
    let mut values = SharedMemory::<Chunk>::new_aligned(AHEAD * chunks, 128usize);
    let mut theirs = SharedMemory::<i32>::new(2 * AHEAD);
    let line = batch * codes.shape(1) + tile;
    let codes_at = line * codes.shape(2);
    let end = rows[line * 2 + 1] as usize;
    let mut step = next(codes, codes_at, 1usize, rows[line * 2] as usize, end, 1usize);
    let (k_head, v_head) = (head_of(k, batch, group), head_of(v, batch, group));
    let mine = own_tokens(queries, batch, tile * 64 + own, true);
    load(q, &head_of(q, batch, head), tile * 64, &mut near, chunks);
    let mut sums = zeros(chunks);
    let mut peaks = Array::<f32>::new(2usize);
    let mut totals = Array::<f32>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        peaks[half] = f32::new(HIDDEN);
        totals[half] = f32::new(0.0);
    }
    if step < end {
        load(k, &k_head, step * 64, &mut far, chunks);
    }
    let mut held = Array::<Chunk>::new(AHEAD * chunks / 128);
    let mut held_tokens = Array::<i32>::new(2usize);
    fetch_tokens(&mut held_tokens, keys, batch, step * 64, AHEAD, false);
    while step < end {
        put_tokens(&held_tokens, &mut theirs, AHEAD);
        sync_cube();
        let code = codes[codes_at + step];
        fetch(&mut held, v, &v_head, step * 64, AHEAD, chunks);
        let mut p = scores::<F>(&near, row, &far, AHEAD, chunks, depth);
        put(&held, &mut values, AHEAD, chunks);
        if code != FULL {
            hide(&mut p, &mine, &theirs, f32::new(HIDDEN), AHEAD, true);
        }
        sync_cube();
        step = next(codes, codes_at, 1usize, step + 1, end, 1usize);
        fetch_tokens(&mut held_tokens, keys, batch, step * 64, AHEAD, false);
        soften(&mut p, &mut sums, &mut peaks, &mut totals, scale, chunks);
        // After the last step this reads what nobody uses.
        fetch(&mut held, k, &k_head, step * 64, AHEAD, chunks);
        gather::<F>(&mut sums, &p, &values, AHEAD, chunks, depth);
        put(&held, &mut far, AHEAD, chunks);
    }
    let mut factors = Array::<f32>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        let total = sum_of_four(totals[half]);
        let some = total > 0.0;
        factors[half] = select(some, 1.0 / total, f32::new(0.0));
        let query = tile * 64 + own + half * 8;
        if UNIT_POS_PLANE % 4 == 0 && query < q.shape(2) {
            let sum = peaks[half] * scale + total.ln();
            lse[(batch * q.shape(1) + head) * q.shape(2) + query] = select(some, sum, f32::new(HIDDEN));
        }
    }
    sync_cube();
    stage::<F>(&sums, &factors, row, &mut near, chunks);
    sync_cube();
    flush(&near, o, &head_of(o, batch, head), tile * 64, chunks);
}

/// `exp(scale · score - lse)`, 0 where hidden, and `P ∘ (dP - D)`, both in place; `norms` and `means` are those of
/// this unit's two rows.
#[cube]
fn slopes_of_rows(
    p: &mut Sequence<Array<Pair<f32>>>,
    slopes: &mut Sequence<Array<Pair<f32>>>,
    norms: &Array<f32>,
    means: &Array<f32>,
    scale: f32,
) {
    #[unroll]
    for n in 0..BACK / 8 {
        #[unroll]
        for half in 0..2usize {
            let score = p.index(n)[half];
            let mut slope = slopes.index(n)[half];
            #[unroll]
            for j in 0..2usize {
                let weight = fma(score[j], scale, -norms[half]).exp();
                slope[j] = weight * (slope[j] - means[half]);
            }
            slopes.index_mut(n)[half] = slope;
        }
    }
}

/// As [`slopes_of_rows`], with norms and means of columns, side by side in shared memory.
#[cube]
fn slopes_of_columns(
    p: &mut Sequence<Array<Pair<f32>>>,
    slopes: &mut Sequence<Array<Pair<f32>>>,
    statistics: &SharedMemory<f32>,
    scale: f32,
) {
    let column = UNIT_POS_PLANE as usize % 4 * 2;
    #[unroll]
    for n in 0..BACK / 8 {
        #[unroll]
        for j in 0..2usize {
            let norm = statistics[n * 8 + column + j];
            let mean = statistics[BACK + n * 8 + column + j];
            #[unroll]
            for half in 0..2usize {
                let mut score = p.index(n)[half];
                let mut slope = slopes.index(n)[half];
                let weight = fma(score[j], scale, -norm).exp();
                slope[j] = weight * (slope[j] - mean);
                score[j] = weight;
                p.index_mut(n)[half] = score;
                slopes.index_mut(n)[half] = slope;
            }
        }
    }
}

/// A head of the joined gradient `[b, t, heads, w]`.
#[cube]
fn joined_head(x: &Tensor<Chunk>, batch: usize, head: usize) -> Head {
    let base = (batch * x.stride(0) + head * x.stride(2)) / 8;
    Head { base, stride: x.stride(1) / 8, last: x.shape(1) - 1 }
}

#[cube]
fn both(value: f32) -> Array<f32> {
    let mut factors = Array::<f32>::new(2usize);
    factors[0] = value;
    factors[1] = value;
    factors
}

#[cube(launch_unchecked, fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
fn flash_query_gradient<F: Float>(
    q: &Tensor<Chunk>,
    k: &Tensor<Chunk>,
    v: &Tensor<Chunk>,
    grad: &Tensor<Chunk>,
    queries: &Tokens,
    keys: &Tokens,
    codes: &Tensor<i32>,
    rows: &Tensor<i32>,
    lse: &Tensor<f32>,
    along: &Tensor<f32>,
    joined: &mut Tensor<Chunk>,
    scale: f32,
    #[comptime] width: usize,
    #[comptime] depth: usize,
    #[define(F)] _dtype: StorageType,
) {
    let chunks = comptime!(width / 8);
    let tile = codes.shape(1) - 1 - CUBE_POS_X as usize;
    let (head, batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let group = head / (q.shape(1) / k.shape(1));
    let row = UNIT_POS as usize / 32 * 16;
    let own = row + UNIT_POS_PLANE as usize / 4;
    let mut near = SharedMemory::<Chunk>::new_aligned(64 * chunks, 128usize);
    let mut upstream = SharedMemory::<Chunk>::new_aligned(64 * chunks, 128usize);
    let mut far = SharedMemory::<Chunk>::new_aligned(BACK * chunks, 128usize);
    let mut values = SharedMemory::<Chunk>::new_aligned(BACK * chunks, 128usize);
    let mut theirs = SharedMemory::<i32>::new(2 * BACK);
    let line = batch * codes.shape(1) + tile;
    let codes_at = line * codes.shape(2);
    let end = rows[line * 2 + 1] as usize * 2;
    let mut step = next(codes, codes_at, 1usize, rows[line * 2] as usize * 2, end, 2usize);
    let (k_head, v_head) = (head_of(k, batch, group), head_of(v, batch, group));
    let mine = own_tokens(queries, batch, tile * 64 + own, true);
    load(q, &head_of(q, batch, head), tile * 64, &mut near, chunks);
    load(grad, &head_of(grad, batch, head), tile * 64, &mut upstream, chunks);
    let mut norms = Array::<f32>::new(2usize);
    let mut means = Array::<f32>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        let query = min(tile * 64 + own + half * 8, q.shape(2) - 1);
        let statistic = (batch * q.shape(1) + head) * q.shape(2) + query;
        // A row that sees nothing has only hidden scores, which have to stay far below its norm.
        norms[half] = max(lse[statistic], f32::new(-1e20));
        means[half] = along[statistic];
    }
    let mut sums = zeros(chunks);
    let mut held_k = Array::<Chunk>::new(BACK * chunks / 128);
    let mut held_v = Array::<Chunk>::new(BACK * chunks / 128);
    fetch(&mut held_k, k, &k_head, step * BACK, BACK, chunks);
    fetch(&mut held_v, v, &v_head, step * BACK, BACK, chunks);
    let mut held_tokens = Array::<i32>::new(2usize);
    fetch_tokens(&mut held_tokens, keys, batch, step * BACK, BACK, false);
    while step < end {
        put(&held_k, &mut far, BACK, chunks);
        put(&held_v, &mut values, BACK, chunks);
        put_tokens(&held_tokens, &mut theirs, BACK);
        sync_cube();
        let code = codes[codes_at + step / 2];
        step = next(codes, codes_at, 1usize, step + 1, end, 2usize);
        fetch_tokens(&mut held_tokens, keys, batch, step * BACK, BACK, false);
        fetch(&mut held_k, k, &k_head, step * BACK, BACK, chunks);
        fetch(&mut held_v, v, &v_head, step * BACK, BACK, chunks);
        let mut p = scores::<F>(&near, row, &far, BACK, chunks, depth);
        if code != FULL {
            hide(&mut p, &mine, &theirs, f32::new(HIDDEN), BACK, true);
        }
        let mut slopes = scores::<F>(&upstream, row, &values, BACK, chunks, depth);
        slopes_of_rows(&mut p, &mut slopes, &norms, &means, scale);
        gather::<F>(&mut sums, &slopes, &far, BACK, chunks, depth);
        sync_cube();
    }
    stage::<F>(&sums, &both(scale), row, &mut near, chunks);
    sync_cube();
    flush(&near, joined, &joined_head(joined, batch, head), tile * 64, chunks);
}

/// Reads norm and mean of this unit's query; past the end those of the last one, which are not used.
#[cube]
fn fetch_statistics(
    held: &mut Array<f32>,
    lse: &Tensor<f32>,
    along: &Tensor<f32>,
    start: usize,
    first: usize,
    last: usize,
) {
    let at = start + min(first + UNIT_POS as usize % BACK, last);
    held[0] = max(lse[at], f32::new(-1e20));
    held[1] = along[at];
}

/// Writes what [`fetch_statistics`] read: norms, then means.
#[cube]
fn put_statistics(held: &Array<f32>, to: &mut SharedMemory<f32>) {
    let i = UNIT_POS as usize;
    if i < BACK {
        to[i] = held[0];
        to[BACK + i] = held[1];
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
    #[comptime] width: usize,
    #[comptime] depth: usize,
    #[define(F)] _dtype: StorageType,
) {
    let chunks = comptime!(width / 8);
    let (tile, group, batch) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let members = q.shape(1) / k.shape(1);
    let row = UNIT_POS as usize / 32 * 16;
    let mut near = SharedMemory::<Chunk>::new_aligned(64 * chunks, 128usize);
    let mut values = SharedMemory::<Chunk>::new_aligned(64 * chunks, 128usize);
    let mut far = SharedMemory::<Chunk>::new_aligned(BACK * chunks, 128usize);
    let mut upstream = SharedMemory::<Chunk>::new_aligned(BACK * chunks, 128usize);
    let mut theirs = SharedMemory::<i32>::new(2 * BACK);
    let mut statistics = SharedMemory::<f32>::new(2 * BACK);
    let line = batch * codes.shape(2) + tile;
    let codes_at = batch * codes.shape(1) * codes.shape(2) + tile;
    let end = columns[line * 2 + 1] as usize * 2;
    let mine = own_tokens(keys, batch, tile * 64 + row + UNIT_POS_PLANE as usize / 4, false);
    load(k, &head_of(k, batch, group), tile * 64, &mut near, chunks);
    load(v, &head_of(v, batch, group), tile * 64, &mut values, chunks);
    let (mut key_sums, mut value_sums) = (zeros(chunks), zeros(chunks));
    let mut held_q = Array::<Chunk>::new(BACK * chunks / 128);
    let mut held_g = Array::<Chunk>::new(BACK * chunks / 128);
    let mut held_tokens = Array::<i32>::new(2usize);
    let mut held_statistics = Array::<f32>::new(2usize);
    for member in 0..members {
        let head = group * members + member;
        let (q_head, g_head) = (head_of(q, batch, head), head_of(grad, batch, head));
        let start = (batch * q.shape(1) + head) * q.shape(2);
        let mut step = next(codes, codes_at, codes.shape(2), columns[line * 2] as usize * 2, end, 2usize);
        fetch_tokens(&mut held_tokens, queries, batch, step * BACK, BACK, true);
        fetch_statistics(&mut held_statistics, lse, along, start, step * BACK, q_head.last);
        fetch(&mut held_q, q, &q_head, step * BACK, BACK, chunks);
        fetch(&mut held_g, grad, &g_head, step * BACK, BACK, chunks);
        while step < end {
            put(&held_q, &mut far, BACK, chunks);
            put(&held_g, &mut upstream, BACK, chunks);
            put_tokens(&held_tokens, &mut theirs, BACK);
            put_statistics(&held_statistics, &mut statistics);
            sync_cube();
            let code = codes[codes_at + step / 2 * codes.shape(2)];
            step = next(codes, codes_at, codes.shape(2), step + 1, end, 2usize);
            fetch_tokens(&mut held_tokens, queries, batch, step * BACK, BACK, true);
            fetch_statistics(&mut held_statistics, lse, along, start, step * BACK, q_head.last);
            fetch(&mut held_q, q, &q_head, step * BACK, BACK, chunks);
            fetch(&mut held_g, grad, &g_head, step * BACK, BACK, chunks);
            let mut p = scores::<F>(&near, row, &far, BACK, chunks, depth);
            if code != FULL {
                hide(&mut p, &mine, &theirs, f32::new(HIDDEN), BACK, false);
            }
            let mut slopes = scores::<F>(&values, row, &upstream, BACK, chunks, depth);
            slopes_of_columns(&mut p, &mut slopes, &statistics, scale);
            gather::<F>(&mut value_sums, &p, &upstream, BACK, chunks, depth);
            gather::<F>(&mut key_sums, &slopes, &far, BACK, chunks, depth);
            sync_cube();
        }
    }
    stage::<F>(&key_sums, &both(scale), row, &mut near, chunks);
    stage::<F>(&value_sums, &both(f32::new(1.0)), row, &mut values, chunks);
    sync_cube();
    flush(&near, joined, &joined_head(joined, batch, q.shape(1) + group), tile * 64, chunks);
    flush(&values, joined, &joined_head(joined, batch, q.shape(1) + k.shape(1) + group), tile * 64, chunks);
}
