//! The operation on a device: rows turned and stored by one kernel, and single rows attended for by cubes that
//! share out their keys.
//!
//! A cube has one row, one head and 128 keys. Each unit takes the product with one key; then the units of the cube
//! weigh the values together, a vector each, and write sums that a second kernel joins, unless there were no more
//! keys than one cube has. So a single long sequence keeps many cubes busy. Bytes moved: keys and values once for
//! each of the heads that share them, of which all but the first find them in the device's cache; k + 2 numbers for
//! 128 keys. Sequences of more rows, and heads wider than 256, are gathered and go through
//! [`attention`](crate::attention). Pages in 8 bits have kernels of their own for what touches places.

use burn::tensor::{DType, Tensor as DenseTensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{FloatPages, PagedIndex, Pages, after, cube_int8};
use crate::device::{Cube, int_primitive, primitive, side_by_side, tensor, uninitialized, vector_width};
use crate::product::ProductRuntime;
use crate::reduce::{has_planes, over_cube};
use crate::rows::{column, dims, launch_shape, row, row_stride};
use crate::{Heads, RotaryAngles};

/// Keys of a cube, and its units.
pub(super) const KEYS: usize = 128;
/// Widest head.
const WIDEST: usize = 256;
/// Below every score.
pub(super) const NOTHING: f32 = -1e30;

/// Counts are vectors: `half` of half a head, `queries` and `keys` of the first halves of all heads, `values` of
/// all values.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn store_kernel<F: Float, N: Size>(
    rows: &Tensor<Vector<F, N>>,
    cos: &Tensor<Vector<f32, N>>,
    sin: &Tensor<Vector<f32, N>>,
    places: &Tensor<i32>,
    q: &mut Tensor<Vector<F, N>>,
    all_keys: &mut Tensor<Vector<F, N>>,
    all_values: &mut Tensor<Vector<F, N>>,
    n: usize,
    stride: usize,
    cos_stride: usize,
    sin_stride: usize,
    #[comptime] half: usize,
    #[comptime] queries: usize,
    #[comptime] keys: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (row, unit) = (row(), column());
    let pairs = comptime!(queries + keys);
    let width = comptime!(2 * keys);
    if row < n {
        let from = row * stride;
        let place = places[row] as usize * width;
        if unit < pairs {
            let i = unit % half;
            let first = unit + unit - i;
            let (a, b) = (rows[from + first], rows[from + first + half]);
            let (cos, sin) = (cos[row * cos_stride + i], sin[row * sin_stride + i]);
            let (a, b) = (Vector::<f32, N>::cast_from(a), Vector::<f32, N>::cast_from(b));
            let mut turned_a = a * cos - b * sin;
            let turned_b = Vector::<F, N>::cast_from(b * cos + a * sin);
            if unit < queries {
                let to = row * comptime!(2 * queries) + first;
                q[to] = Vector::<F, N>::cast_from(turned_a);
                q[to + half] = turned_b;
            } else {
                let to = place + first - comptime!(2 * queries);
                if i == 0 {
                    let values = from + comptime!(2 * pairs) + to - place;
                    turned_a[0] = none_if(has_endless::<F, N>(rows, values, 2 * half), turned_a[0]);
                }
                all_keys[to] = Vector::<F, N>::cast_from(turned_a);
                all_keys[to + half] = turned_b;
            }
        } else if unit < pairs + width {
            let value = unit - pairs;
            let own = Vector::<f32, N>::cast_from(rows[from + comptime!(2 * pairs) + value]);
            let mut kept = Vector::<f32, N>::empty();
            #[unroll]
            for j in 0..N::value() {
                kept[j] = select(is_endless(own[j]), f32::new(0.0), own[j]);
            }
            all_values[place + value] = Vector::<F, N>::cast_from(kept);
        }
    }
}

/// Whether a number is infinite or none. By its bits, since a compiler may take for granted that there are no such numbers.
#[cube]
pub(super) fn is_endless(x: f32) -> bool {
    u32::reinterpret(x) & 0x7f80_0000u32 == 0x7f80_0000u32
}

/// Whether one of so many vectors has a number that is infinite or none.
#[cube]
fn has_endless<F: Float, N: Size>(
    rows: &Tensor<Vector<F, N>>,
    first: usize,
    #[comptime] vectors: usize,
) -> bool {
    let mut found = false;
    for at in 0..vectors {
        let x = Vector::<f32, N>::cast_from(rows[first + at]);
        #[unroll]
        for j in 0..N::value() {
            found = found || is_endless(x[j]);
        }
    }
    found
}

/// NaN, or the number.
#[cube]
pub(super) fn none_if(none: bool, x: f32) -> f32 {
    f32::reinterpret(select(none, 0x7fc0_0000u32.runtime(), u32::reinterpret(x)))
}

/// See [`store`](super::store). Keys and values are written where they lie.
pub(crate) fn store<R: ProductRuntime>(
    rows: DenseTensor<Cube<R>, 2>,
    angles: &RotaryAngles<Cube<R>>,
    heads: Heads,
    pages: &mut Pages<Cube<R>>,
    index: &PagedIndex<Cube<R>>,
) -> DenseTensor<Cube<R>, 2> {
    match pages {
        Pages::Float(pages) => store_floats(rows, angles, heads, pages, index),
        Pages::Int8(own) if heads.width <= cube_int8::WIDEST => {
            cube_int8::store(rows, angles, heads, own, index)
        }
        Pages::Int8(_) => super::store(rows, angles, heads, pages, index),
    }
}

fn store_floats<R: ProductRuntime>(
    rows: DenseTensor<Cube<R>, 2>,
    angles: &RotaryAngles<Cube<R>>,
    heads: Heads,
    pages: &FloatPages<Cube<R>>,
    index: &PagedIndex<Cube<R>>,
) -> DenseTensor<Cube<R>, 2> {
    let rows = side_by_side(primitive(rows));
    let [n, _] = dims(&rows);
    let half = heads.width / 2;
    let flat = |angles: &DenseTensor<Cube<R>, 3>| primitive(angles.clone().reshape([n, half]));
    let (cos, sin) = (flat(&angles.cos), flat(&angles.sin));
    let [keys, values] = [&pages.keys, &pages.values].map(|all| primitive(all.clone()));
    let q = uninitialized(&rows, [n, heads.queries * heads.width], rows.dtype);
    let width = vector_width(half, &[&rows, &cos, &sin, &keys, &values]);
    let half = half / width;
    let (cubes, units) = launch_shape(n, (heads.queries + 3 * heads.keys) * half);
    let strides = [&rows, &cos, &sin].map(|x| row_stride(x, width));
    // SAFETY: units past the last row or past its last column do nothing; the index's places lie in the pages, and
    // no two rows but those of the scratch page have the same.
    unsafe {
        store_kernel::launch_unchecked::<R>(
            &q.client,
            cubes,
            units,
            width,
            rows.into_tensor_arg(),
            cos.into_tensor_arg(),
            sin.into_tensor_arg(),
            int_primitive(index.tables().numbers.clone()).into_tensor_arg(),
            q.clone().into_tensor_arg(),
            keys.into_tensor_arg(),
            values.into_tensor_arg(),
            n,
            strides[0],
            strides[1],
            strides[2],
            half,
            heads.queries * half,
            heads.keys * half,
            q.dtype.into(),
        );
    }
    tensor(q)
}

/// See [`reference()`](super::reference).
pub(crate) fn attend<R: ProductRuntime>(
    q: DenseTensor<Cube<R>, 2>,
    heads: Heads,
    pages: &Pages<Cube<R>>,
    index: &PagedIndex<Cube<R>>,
) -> DenseTensor<Cube<R>, 2> {
    let [n, width] = q.dims();
    let singles = index.tables().singles;
    if singles == 0 || heads.width > WIDEST {
        return gathered(0, q, heads, pages, index);
    }
    if singles == n {
        return attend_singles(q, heads, pages, index);
    }
    let o = attend_singles(q.clone().slice([0..singles, 0..width]), heads, pages, index);
    let rest = gathered(singles, q.slice([singles..n, 0..width]), heads, pages, index);
    DenseTensor::cat(vec![o, rest], 0)
}

/// Attention of the rows of all sequences but the first so many, whose pages are copied.
fn gathered<R: ProductRuntime>(
    sequences: usize,
    q: DenseTensor<Cube<R>, 2>,
    heads: Heads,
    pages: &Pages<Cube<R>>,
    index: &PagedIndex<Cube<R>>,
) -> DenseTensor<Cube<R>, 2> {
    let (page_tokens, dtype) = (index.page_tokens(), q.dtype());
    after(sequences, q, heads, index, |some| match pages {
        Pages::Float(_) => pages.gather(some, heads, page_tokens, dtype),
        Pages::Int8(own) => cube_int8::gather(own, some, heads, page_tokens, dtype),
    })
}

/// Attention of rows that are a sequence's only ones.
fn attend_singles<R: ProductRuntime>(
    q: DenseTensor<Cube<R>, 2>,
    heads: Heads,
    pages: &Pages<Cube<R>>,
    index: &PagedIndex<Cube<R>>,
) -> DenseTensor<Cube<R>, 2> {
    let q = into_contiguous(primitive(q));
    let [m, _] = dims(&q);
    let tables = index.tables();
    let splits = tables.longest.div_ceil(KEYS).next_power_of_two();
    let o = uninitialized(&q, [m, heads.queries * heads.width], q.dtype);
    // The sums of several cubes, which otherwise nobody writes.
    let joined = if splits > 1 { m * heads.queries * splits * (heads.width + 2) } else { 1 };
    let sums = uninitialized(&q, [joined], DType::F32);
    let singles = Singles { q, heads, splits, sums, o };
    match pages {
        Pages::Float(pages) => split_floats(&singles, pages, index),
        Pages::Int8(pages) => cube_int8::split(&singles, pages, index),
    }
    let Singles { sums, o, .. } = singles;
    if splits > 1 {
        // SAFETY: a cube reads the sums of its row and head, and writes its result.
        unsafe {
            join_kernel::launch_unchecked::<R>(
                &o.client.clone(),
                CubeCount::Static(heads.queries as u32, m as u32, 1),
                CubeDim::new_1d(heads.width.next_multiple_of(32) as u32),
                sums.into_tensor_arg(),
                o.clone().into_tensor_arg(),
                splits,
                heads.width,
                o.dtype.into(),
            );
        }
    }
    tensor(o)
}

/// Rows to attend for, each of a sequence of its own.
pub(super) struct Singles<R: ProductRuntime> {
    /// `[m, h k]`.
    pub(super) q: CubeTensor<R>,
    pub(super) heads: Heads,
    /// Cubes that share out the keys of a row.
    pub(super) splits: usize,
    /// Where they write if there are several: `[m, h, splits, k + 2]`.
    pub(super) sums: CubeTensor<R>,
    /// Where one alone writes: `[m, h k]`.
    pub(super) o: CubeTensor<R>,
}

impl<R: ProductRuntime> Singles<R> {
    /// A cube for each split, head and row.
    pub(super) fn launch(&self) -> (CubeCount, CubeDim) {
        let [m, _] = dims(&self.q);
        let count = CubeCount::Static(self.splits as u32, self.heads.queries as u32, m as u32);
        (count, CubeDim::new_1d(KEYS as u32))
    }

    /// What a product of query and key is multiplied by.
    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.heads.width as f32).sqrt()
    }
}

fn split_floats<R: ProductRuntime>(
    singles: &Singles<R>,
    pages: &FloatPages<Cube<R>>,
    index: &PagedIndex<Cube<R>>,
) {
    let Singles { q, heads, splits, sums, o } = singles;
    let ([m, _], tables) = (dims(q), index.tables());
    let [keys, values] = [&pages.keys, &pages.values].map(|all| primitive(all.clone()));
    let width = vector_width(heads.width, &[q, &keys, &values]);
    let (cubes, units) = singles.launch();
    // SAFETY: a cube reads places below its sequence's length, which its pages hold; it writes the sums or the
    // result of its own row, head and split.
    unsafe {
        split_kernel::launch_unchecked::<R>(
            &q.client,
            cubes,
            units,
            width,
            q.clone().into_tensor_arg(),
            keys.into_tensor_arg(),
            values.into_tensor_arg(),
            int_primitive(tables.numbers.clone()).into_tensor_arg(),
            sums.clone().into_tensor_arg(),
            o.clone().into_tensor_arg(),
            index.rows(),
            m,
            tables.pages,
            index.page_tokens(),
            singles.scale(),
            heads.width / width,
            heads.queries,
            heads.queries / heads.keys,
            *splits > 1,
            has_planes(q),
            q.dtype.into(),
        );
    }
}

/// One row, one head, 128 keys. `numbers` are those of [`Tables`](super::Tables).
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn split_kernel<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    keys: &Tensor<Vector<F, N>>,
    values: &Tensor<Vector<F, N>>,
    numbers: &Tensor<i32>,
    sums: &mut Tensor<f32>,
    o: &mut Tensor<F>,
    n: usize,
    m: usize,
    pages: usize,
    page_tokens: usize,
    scale: f32,
    #[comptime] vectors: usize,
    #[comptime] heads: usize,
    #[comptime] shared: usize,
    #[comptime] split: bool,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
) {
    let unit = UNIT_POS as usize;
    let (part, head, row) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let per_vector = N::value().comptime();
    let width = comptime!(vectors * per_vector);
    let length = numbers[n + row] as usize;
    let mut query = SharedMemory::<f32>::new(width);
    let mut places = SharedMemory::<u32>::new(KEYS);
    let mut weights = SharedMemory::<f32>::new(KEYS);
    if unit < vectors {
        let vector = Vector::<f32, N>::cast_from(q[(row * heads + head) * vectors + unit]);
        #[unroll]
        for i in 0..N::value() {
            query[unit * N::value() + i] = vector[i] * scale;
        }
    }
    let at = part * KEYS + unit;
    let mut place = 0usize;
    if at < length {
        let table = n + m + row * pages;
        place = vectors * key_head(numbers, table, page_tokens, at, head / shared, comptime!(heads / shared));
    }
    places[unit] = place as u32;
    sync_cube();
    let mut score = f32::new(NOTHING);
    if at < length {
        score = product::<F, N>(keys, &query, place, vectors);
    }
    let largest = over_cube(score, KEYS, planes, true);
    let total = weigh(&mut weights, score, largest, at < length, planes);
    // So many rows of values at a time, a vector for each unit.
    let lines = comptime!(KEYS / vectors);
    let (line, vector) = (unit / vectors, unit % vectors);
    let mut count = 0usize;
    if part * KEYS < length && line < lines {
        count = min(length - part * KEYS, KEYS);
    }
    let sum = weighed::<F, N>(values, &places, &weights, line, vector, count, lines);
    let mut parts = SharedMemory::<f32>::new(comptime!(lines * width));
    if line < lines {
        #[unroll]
        for j in 0..N::value() {
            parts[line * width + vector * N::value() + j] = sum[j];
        }
    }
    sync_cube();
    write_sums::<F>(sums, o, &parts, largest, total, lines, width, width, split);
}

/// The number of a key's head among those of all places. `table` is where the row's pages begin.
#[cube]
pub(super) fn key_head(
    numbers: &Tensor<i32>,
    table: usize,
    page_tokens: usize,
    at: usize,
    group: usize,
    #[comptime] groups: usize,
) -> usize {
    let page = numbers[table + at / page_tokens] as usize;
    (page * page_tokens + at % page_tokens) * groups + group
}

/// Puts the weight of each unit's key, if it has one, into shared memory; gives the sum of all.
#[cube]
pub(super) fn weigh(
    weights: &mut SharedMemory<f32>,
    score: f32,
    largest: f32,
    has_key: bool,
    #[comptime] planes: bool,
) -> f32 {
    let mut weight = f32::new(0.0);
    if has_key {
        weight = (score - largest).exp();
    }
    weights[UNIT_POS as usize] = weight;
    let total = over_cube(weight, KEYS, planes, false);
    sync_cube();
    total
}

/// Adds the lines of weighted values, `apart` numbers each, and writes the cube's sums, or the result if it has all keys.
#[allow(clippy::collapsible_if, reason = "one branch is taken when the kernel is built")]
#[cube]
#[allow(clippy::too_many_arguments, reason = "the end of two kernels")]
pub(super) fn write_sums<F: Float>(
    sums: &mut Tensor<f32>,
    o: &mut Tensor<F>,
    parts: &SharedMemory<f32>,
    largest: f32,
    total: f32,
    #[comptime] lines: usize,
    #[comptime] apart: usize,
    #[comptime] width: usize,
    #[comptime] split: bool,
) {
    let place = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize;
    let start = (place * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * comptime!(width + 2);
    let mut d = UNIT_POS as usize;
    while d < width {
        let mut value = f32::new(0.0);
        for line in 0..lines {
            value += parts[line * apart + d];
        }
        if comptime!(split) {
            sums[start + d] = value;
        } else {
            o[place * width + d] = F::cast_from(value / total);
        }
        d += KEYS;
    }
    if comptime!(split) {
        if UNIT_POS == 0 {
            sums[start + width] = largest;
            sums[start + comptime!(width + 1)] = total;
        }
    }
}

/// The product of a query in shared memory and the key at a place.
#[cube]
fn product<F: Float, N: Size>(
    keys: &Tensor<Vector<F, N>>,
    query: &SharedMemory<f32>,
    place: usize,
    #[comptime] vectors: usize,
) -> f32 {
    let mut sum = Vector::<f32, N>::new(0.0);
    for i in 0..vectors {
        let key = Vector::<f32, N>::cast_from(keys[place + i]);
        let mut own = Vector::<f32, N>::empty();
        #[unroll]
        for j in 0..N::value() {
            own[j] = query[i * N::value() + j];
        }
        sum += key * own;
    }
    let mut score = f32::new(0.0);
    #[unroll]
    for j in 0..N::value() {
        score += sum[j];
    }
    score
}

/// One vector of the weighted sum of every `lines`-th value, from `line` on.
#[cube]
fn weighed<F: Float, N: Size>(
    values: &Tensor<Vector<F, N>>,
    places: &SharedMemory<u32>,
    weights: &SharedMemory<f32>,
    line: usize,
    vector: usize,
    count: usize,
    #[comptime] lines: usize,
) -> Vector<f32, N> {
    let mut sum = Vector::<f32, N>::new(0.0);
    let mut key = line;
    while key < count {
        let value = Vector::<f32, N>::cast_from(values[places[key] as usize + vector]);
        sum += value * Vector::new(weights[key]);
        key += lines;
    }
    sum
}

/// One row and head; a unit has a column.
#[cube(launch_unchecked)]
fn join_kernel<F: Float>(
    sums: &Tensor<f32>,
    o: &mut Tensor<F>,
    splits: usize,
    #[comptime] width: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (head, row, d) = (CUBE_POS_X as usize, CUBE_POS_Y as usize, UNIT_POS as usize);
    let place = row * CUBE_COUNT_X as usize + head;
    if d < width {
        let mut largest = f32::new(NOTHING);
        for part in 0..splits {
            largest = max(largest, sums[(place * splits + part) * comptime!(width + 2) + width]);
        }
        let (mut value, mut total) = (f32::new(0.0), f32::new(0.0));
        for part in 0..splits {
            let start = (place * splits + part) * comptime!(width + 2);
            let weight = (sums[start + width] - largest).exp();
            value += weight * sums[start + d];
            total += weight * sums[start + comptime!(width + 1)];
        }
        o[place * width + d] = F::cast_from(value / total);
    }
}
