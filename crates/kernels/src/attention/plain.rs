//! Attention in f32 arithmetic, for any runtime, dtype and head width.
//!
//! A cube of 16 × 16 units has a tile of 16 queries and 16 keys: unit (r, c) has one score, and every sixteenth
//! element of row r of the sums. It trades speed for running everywhere; it refuses heads so wide that three tiles
//! exceed the device's shared memory.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::SEPARATE;
use super::device::{HIDDEN, Tiled, Tokens, dims};
use super::ranges::{FULL, MASKED, SKIP};

/// Queries and keys in a tile.
pub(super) const EDGE: usize = 16;

fn grid<R: CubeRuntime>(x: &CubeTensor<R>) -> CubeCount {
    let [b, heads, t, _] = dims(x);
    CubeCount::Static(t.div_ceil(EDGE) as u32, heads as u32, b as u32)
}

fn units() -> CubeDim {
    CubeDim::new_2d(EDGE as u32, EDGE as u32)
}

fn scale_of(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

/// Writes `o` and `lse` of queries, keys and values; see [`super::device::forward`].
pub(super) fn forward<R: CubeRuntime>(
    [q, k, v]: [&CubeTensor<R>; 3],
    index: &Tiled<R>,
    o: &CubeTensor<R>,
    lse: &CubeTensor<R>,
) {
    let width = dims(q)[3];
    // SAFETY: reads and writes of rows past the end are guarded in the kernel, and tile codes exist for each tile.
    unsafe {
        forward_kernel::launch_unchecked::<R>(
            &q.client,
            grid(q),
            units(),
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
            q.dtype.into(),
        );
    }
}

/// Writes the joined gradient; see [`super::device::backward`].
pub(super) fn backward<R: CubeRuntime>(
    [q, k, v]: [&CubeTensor<R>; 3],
    grad: &CubeTensor<R>,
    [lse, along]: [&CubeTensor<R>; 2],
    index: &Tiled<R>,
    joined: &CubeTensor<R>,
) {
    let width = dims(q)[3];
    // SAFETY: as in `forward`; each cube writes its own rows and heads of the joined gradient.
    unsafe {
        query_gradient::launch_unchecked::<R>(
            &q.client,
            grid(q),
            units(),
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
            q.dtype.into(),
        );
        key_gradient::launch_unchecked::<R>(
            &q.client,
            grid(k),
            units(),
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
            scale_of(width),
            width,
            q.dtype.into(),
        );
    }
}

/// Rows of a head from `first` on as f32; those past the end are 0.
#[cube]
fn load<F: Float>(
    from: &Tensor<F>,
    to: &mut SharedMemory<f32>,
    batch: usize,
    head: usize,
    first: usize,
    #[comptime] width: usize,
) {
    let base = batch * from.stride(0) + head * from.stride(1);
    let end = from.shape(2);
    let mut i = UNIT_POS as usize;
    while i < 16 * width {
        let row = first + i / width;
        let mut value = f32::new(0.0);
        if row < end {
            value = f32::cast_from(from[base + row * from.stride(2) + i % width]);
        }
        to[i] = value;
        i += 256;
    }
}

#[cube]
fn dot(
    a: &SharedMemory<f32>,
    a_row: usize,
    b: &SharedMemory<f32>,
    b_row: usize,
    #[comptime] width: usize,
) -> f32 {
    let mut sum = f32::new(0.0);
    for i in 0..width {
        sum += a[a_row * width + i] * b[b_row * width + i];
    }
    sum
}

/// Adds `Σ_n weights[n · stride + start] rows[n]` to this unit's elements of the sums.
#[cube]
fn gather(
    sums: &mut Array<f32>,
    weights: &SharedMemory<f32>,
    start: usize,
    stride: usize,
    rows: &SharedMemory<f32>,
    #[comptime] width: usize,
) {
    for n in 0..16usize {
        let weight = weights[start + n * stride];
        #[unroll]
        for i in 0..width.div_ceil(16) {
            let column = UNIT_POS_X as usize + i * 16;
            if column < width {
                sums[i] += weight * rows[n * width + column];
            }
        }
    }
}

#[cube]
fn zero(sums: &mut Array<f32>, #[comptime] count: usize) {
    #[unroll]
    for i in 0..count {
        sums[i] = f32::new(0.0);
    }
}

/// Whether query `i` sees key `j`; false past either end.
#[cube]
fn sees(queries: &Tokens, keys: &Tokens, code: i32, row: usize, i: usize, j: usize) -> bool {
    let mut seen = code == FULL;
    if code == MASKED && i < queries.documents.shape(1) && j < keys.documents.shape(1) {
        let mine = queries.documents[row * queries.documents.stride(0) + i * queries.documents.stride(1)];
        let other = keys.documents[row * keys.documents.stride(0) + j * keys.documents.stride(1)];
        let from = queries.positions[row * queries.positions.stride(0) + i * queries.positions.stride(1)];
        let to = keys.positions[row * keys.positions.stride(0) + j * keys.positions.stride(1)];
        seen = mine == other && other != SEPARATE && from >= to;
    }
    seen
}

/// Writes this unit's elements of a row.
#[cube]
fn store<F: Float>(
    to: &mut Tensor<F>,
    base: usize,
    sums: &Array<f32>,
    factor: f32,
    #[comptime] width: usize,
) {
    #[unroll]
    for i in 0..width.div_ceil(16) {
        let column = UNIT_POS_X as usize + i * 16;
        if column < width {
            to[base + column] = F::cast_from(sums[i] * factor);
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward_kernel<F: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    queries: &Tokens,
    keys: &Tokens,
    codes: &Tensor<i32>,
    rows: &Tensor<i32>,
    o: &mut Tensor<F>,
    lse: &mut Tensor<f32>,
    scale: f32,
    #[comptime] width: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (tile, head, batch) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let (r, c) = (UNIT_POS_Y as usize, UNIT_POS_X as usize);
    let group = head / (q.shape(1) / k.shape(1));
    let query = tile * 16 + r;
    let place = batch * codes.shape(1) + tile;
    let hidden = f32::new(HIDDEN);
    let mut near = SharedMemory::<f32>::new(16 * width);
    let mut far = SharedMemory::<f32>::new(16 * width);
    let mut scores = SharedMemory::<f32>::new(256usize);
    let mut sums = Array::<f32>::new(width.div_ceil(16));
    zero(&mut sums, width.div_ceil(16));
    let mut peak = hidden;
    let mut total = f32::new(0.0);
    load(q, &mut near, batch, head, tile * 16, width);
    for other in rows[place * 2] as usize..rows[place * 2 + 1] as usize {
        let code = codes[place * codes.shape(2) + other];
        if code != SKIP {
            load(k, &mut far, batch, group, other * 16, width);
            sync_cube();
            let seen = sees(queries, keys, code, batch, query, other * 16 + c);
            let mut score = hidden;
            if seen {
                score = dot(&near, r, &far, c, width) * scale;
            }
            scores[r * 16 + c] = score;
            sync_cube();
            load(v, &mut far, batch, group, other * 16, width);
            let mut top = peak;
            for n in 0..16usize {
                top = max(top, scores[r * 16 + n]);
            }
            sync_cube();
            // Asked of the pair and not of its score, so that a score that is no number is not taken for a hidden one.
            let mut weight = f32::new(0.0);
            if seen {
                weight = (score - top).exp();
            }
            scores[r * 16 + c] = weight;
            sync_cube();
            let shrink = (peak - top).exp();
            total *= shrink;
            #[unroll]
            for i in 0..width.div_ceil(16) {
                sums[i] *= shrink;
            }
            for n in 0..16usize {
                total += scores[r * 16 + n];
            }
            gather(&mut sums, &scores, r * 16, 1, &far, width);
            peak = top;
            sync_cube();
        }
    }
    if query < q.shape(2) {
        let mut factor = f32::new(0.0);
        let mut sum = hidden;
        if total > 0.0 {
            factor = 1.0 / total;
            sum = peak + total.ln();
        }
        let base = batch * o.stride(0) + head * o.stride(1) + query * o.stride(2);
        store(o, base, &sums, factor, width);
        if c == 0 {
            lse[(batch * q.shape(1) + head) * q.shape(2) + query] = sum;
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn query_gradient<F: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    grad: &Tensor<F>,
    queries: &Tokens,
    keys: &Tokens,
    codes: &Tensor<i32>,
    rows: &Tensor<i32>,
    lse: &Tensor<f32>,
    along: &Tensor<f32>,
    joined: &mut Tensor<F>,
    scale: f32,
    #[comptime] width: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (tile, head, batch) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let (r, c) = (UNIT_POS_Y as usize, UNIT_POS_X as usize);
    let group = head / (q.shape(1) / k.shape(1));
    let query = tile * 16 + r;
    let place = batch * codes.shape(1) + tile;
    let statistic = (batch * q.shape(1) + head) * q.shape(2) + min(query, q.shape(2) - 1);
    let (norm, mean) = (lse[statistic], along[statistic]);
    let mut near = SharedMemory::<f32>::new(16 * width);
    let mut upstream = SharedMemory::<f32>::new(16 * width);
    let mut far = SharedMemory::<f32>::new(16 * width);
    let mut slopes = SharedMemory::<f32>::new(256usize);
    let mut sums = Array::<f32>::new(width.div_ceil(16));
    zero(&mut sums, width.div_ceil(16));
    load(q, &mut near, batch, head, tile * 16, width);
    load(grad, &mut upstream, batch, head, tile * 16, width);
    for other in rows[place * 2] as usize..rows[place * 2 + 1] as usize {
        let code = codes[place * codes.shape(2) + other];
        if code != SKIP {
            load(v, &mut far, batch, group, other * 16, width);
            sync_cube();
            let slope = dot(&upstream, r, &far, c, width) - mean;
            sync_cube();
            load(k, &mut far, batch, group, other * 16, width);
            sync_cube();
            let mut weight = f32::new(0.0);
            if sees(queries, keys, code, batch, query, other * 16 + c) {
                weight = (dot(&near, r, &far, c, width) * scale - norm).exp();
            }
            slopes[r * 16 + c] = weight * slope;
            sync_cube();
            gather(&mut sums, &slopes, r * 16, 1, &far, width);
            sync_cube();
        }
    }
    if query < q.shape(2) {
        let base = batch * joined.stride(0) + query * joined.stride(1) + head * joined.stride(2);
        store(joined, base, &sums, scale, width);
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn key_gradient<F: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    grad: &Tensor<F>,
    queries: &Tokens,
    keys: &Tokens,
    codes: &Tensor<i32>,
    columns: &Tensor<i32>,
    lse: &Tensor<f32>,
    along: &Tensor<f32>,
    joined: &mut Tensor<F>,
    scale: f32,
    #[comptime] width: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (tile, group, batch) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let (r, c) = (UNIT_POS_Y as usize, UNIT_POS_X as usize);
    let members = q.shape(1) / k.shape(1);
    let key = tile * 16 + r;
    let t = q.shape(2);
    let place = (batch * codes.shape(2) + tile) * 2;
    let mut near = SharedMemory::<f32>::new(16 * width);
    let mut values = SharedMemory::<f32>::new(16 * width);
    let mut far = SharedMemory::<f32>::new(16 * width);
    let mut weights = SharedMemory::<f32>::new(256usize);
    let mut slopes = SharedMemory::<f32>::new(256usize);
    let mut key_sums = Array::<f32>::new(width.div_ceil(16));
    let mut value_sums = Array::<f32>::new(width.div_ceil(16));
    zero(&mut key_sums, width.div_ceil(16));
    zero(&mut value_sums, width.div_ceil(16));
    load(k, &mut near, batch, group, tile * 16, width);
    load(v, &mut values, batch, group, tile * 16, width);
    for member in 0..members {
        let head = group * members + member;
        for other in columns[place] as usize..columns[place + 1] as usize {
            let code = codes[(batch * codes.shape(1) + other) * codes.shape(2) + tile];
            if code != SKIP {
                let query = other * 16 + c;
                let statistic = (batch * q.shape(1) + head) * t + min(query, t - 1);
                load(q, &mut far, batch, head, other * 16, width);
                sync_cube();
                let mut weight = f32::new(0.0);
                if sees(queries, keys, code, batch, query, key) {
                    weight = (dot(&near, r, &far, c, width) * scale - lse[statistic]).exp();
                }
                weights[r * 16 + c] = weight;
                sync_cube();
                load(grad, &mut far, batch, head, other * 16, width);
                sync_cube();
                gather(&mut value_sums, &weights, r * 16, 1, &far, width);
                slopes[r * 16 + c] = weight * (dot(&values, r, &far, c, width) - along[statistic]);
                sync_cube();
                load(q, &mut far, batch, head, other * 16, width);
                sync_cube();
                gather(&mut key_sums, &slopes, r * 16, 1, &far, width);
                sync_cube();
            }
        }
    }
    if key < k.shape(2) {
        let row = batch * joined.stride(0) + key * joined.stride(1);
        let first = q.shape(1) + group;
        store(joined, row + first * joined.stride(2), &key_sums, scale, width);
        store(joined, row + (first + k.shape(1)) * joined.stride(2), &value_sums, 1.0, width);
    }
}
