//! Pages in 8 bits on a device: quantized as they are stored, restored as they are read.
//!
//! Storing, a cube has one head of one row and a unit four of its numbers, which are one word. Attending for single rows, cubes
//! share out keys as they do for floats; a unit restores the words of its key in registers, multiplies in f32, and applies the
//! scale once. Sequences of more rows are restored into copies of their pages. Bytes moved: those of the codes and scales. What it
//! refuses: heads of more than 1,024 numbers, which are stored by plain operations.

use burn::tensor::{DType, Int, Tensor as DenseTensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::cube::{KEYS, NOTHING, Singles, is_endless, key_head, none_if, weigh, write_sums};
use super::int8::{Int8Rows, MOST, PER_WORD, head_words};
use super::{Int8Pages, PagedIndex};
use crate::device::{
    CUBES, Cube, cubes, int_primitive, primitive, side_by_side, tensor, uninitialized, vector_width,
};
use crate::product::ProductRuntime;
use crate::reduce::{has_planes, over_cube};
use crate::rows::{dims, row_stride};
use crate::{Heads, RotaryAngles};

/// Units of a cube that stores a head, at most and at least.
const UNITS: [usize; 2] = [256, 32];
/// Widest head that is stored by one cube.
pub(super) const WIDEST: usize = UNITS[0] * PER_WORD;
/// Units of a cube that restores.
const RESTORING: usize = 256;

/// The words of codes and the scales of all places.
fn parts<R: ProductRuntime>(rows: &Int8Rows<Cube<R>>) -> (CubeTensor<R>, CubeTensor<R>) {
    (int_primitive(rows.codes.clone()), primitive(rows.scales.clone()))
}

/// See [`store`](super::store). Codes and scales are written where they lie.
pub(super) fn store<R: ProductRuntime>(
    rows: DenseTensor<Cube<R>, 2>,
    angles: &RotaryAngles<Cube<R>>,
    heads: Heads,
    pages: &Int8Pages<Cube<R>>,
    index: &PagedIndex<Cube<R>>,
) -> DenseTensor<Cube<R>, 2> {
    let rows = side_by_side(primitive(rows));
    let [n, _] = dims(&rows);
    let half = heads.width / 2;
    let flat = |angles: &DenseTensor<Cube<R>, 3>| primitive(angles.clone().reshape([n, half]));
    let (cos, sin) = (flat(&angles.cos), flat(&angles.sin));
    let ((key_codes, key_scales), (value_codes, value_scales)) = (parts(&pages.keys), parts(&pages.values));
    let q = uninitialized(&rows, [n, heads.queries * heads.width], rows.dtype);
    let units = head_words(heads.width).next_power_of_two().max(UNITS[1]);
    let cubes = CubeCount::Static(
        (heads.queries + 2 * heads.keys) as u32,
        n.min(CUBES) as u32,
        n.div_ceil(CUBES) as u32,
    );
    let strides = [&rows, &cos, &sin].map(|x| row_stride(x, 1));
    // SAFETY: cubes past the last row take the last one; units past a head's end neither read nor write. The index's places
    // lie in the pages, and no two rows but those of the scratch page have the same.
    unsafe {
        store_int8_kernel::launch_unchecked::<R>(
            &q.client,
            cubes,
            CubeDim::new_1d(units as u32),
            rows.clone().into_tensor_arg(),
            cos.into_tensor_arg(),
            sin.into_tensor_arg(),
            int_primitive(index.tables().numbers.clone()).into_tensor_arg(),
            q.clone().into_tensor_arg(),
            key_codes.into_tensor_arg(),
            key_scales.into_tensor_arg(),
            value_codes.into_tensor_arg(),
            value_scales.into_tensor_arg(),
            n,
            strides[0],
            strides[1],
            strides[2],
            heads.queries,
            heads.keys,
            heads.width,
            units,
            has_planes(&rows),
            q.dtype.into(),
        );
    }
    tensor(q)
}

/// One head of one row. A unit has one word.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn store_int8_kernel<F: Float>(
    rows: &Tensor<F>,
    cos: &Tensor<f32>,
    sin: &Tensor<f32>,
    places: &Tensor<i32>,
    q: &mut Tensor<F>,
    key_codes: &mut Tensor<i32>,
    key_scales: &mut Tensor<f32>,
    value_codes: &mut Tensor<i32>,
    value_scales: &mut Tensor<f32>,
    n: usize,
    stride: usize,
    cos_stride: usize,
    sin_stride: usize,
    #[comptime] queries: usize,
    #[comptime] groups: usize,
    #[comptime] width: usize,
    #[comptime] units: usize,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
) {
    let word = UNIT_POS as usize;
    let head = CUBE_POS_X as usize;
    // Not left out past the last row: all units of a cube have to come to its sums.
    let row = min((CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize, n - 1);
    let from = row * stride + head * width;
    let is_value = head >= comptime!(queries + groups);
    let half = comptime!(width / 2);
    let mut numbers = Array::<f32>::new(PER_WORD);
    let mut endless = false;
    #[unroll]
    for j in 0..PER_WORD {
        let d = word * PER_WORD + j;
        let mut x = f32::new(0.0);
        if d < width {
            x = f32::cast_from(rows[from + d]);
            if is_value {
                endless = endless || is_endless(x);
            } else {
                let (i, second) = (d % half, d >= half);
                let other = f32::cast_from(rows[from + (d + half) % width]);
                x = x * cos[row * cos_stride + i] + select(second, other, -other) * sin[row * sin_stride + i];
                if head >= queries {
                    // The values of the same head follow those of all keys.
                    let value = f32::cast_from(rows[from + comptime!(groups * width) + d]);
                    endless = endless || is_endless(x) || is_endless(value);
                }
            }
        }
        numbers[j] = x;
    }
    let mut largest = f32::new(0.0);
    #[unroll]
    for j in 0..PER_WORD {
        // What is stored of a value that is not finite, or of a key whose scale says that it is none.
        let kept = select(head >= queries && is_endless(numbers[j]), f32::new(0.0), numbers[j]);
        numbers[j] = kept;
        largest = max(largest, kept.abs());
    }
    let largest = over_cube(largest, units, planes, true);
    let broken = over_cube(select(endless, f32::new(1.0), f32::new(0.0)), units, planes, true) > 0.0;
    let quotient = largest / f32::new(MOST);
    let scale = select(quotient < f32::new(f32::MIN_POSITIVE), f32::new(0.0), quotient);
    let packed = pack(&numbers, scale);
    let words = comptime!(width.div_ceil(PER_WORD));
    let place = places[row] as usize * groups;
    if head < queries {
        #[unroll]
        for j in 0..PER_WORD {
            let d = word * PER_WORD + j;
            if d < width {
                q[(row * queries + head) * width + d] = F::cast_from(numbers[j]);
            }
        }
    } else if is_value {
        let to = place + head - comptime!(queries + groups);
        if word < words {
            value_codes[to * words + word] = packed;
        }
        if word == 0 {
            value_scales[to] = scale;
        }
    } else {
        let to = place + head - queries;
        if word < words {
            key_codes[to * words + word] = packed;
        }
        if word == 0 {
            key_scales[to] = none_if(broken, scale);
        }
    }
}

/// The codes of four numbers in one word.
#[cube]
fn pack(numbers: &Array<f32>, scale: f32) -> i32 {
    let divisor = select(scale > 0.0, scale, f32::new(1.0));
    let mut word = 0u32;
    #[unroll]
    for j in 0..PER_WORD {
        let code = i32::cast_from((numbers[j] / divisor).round());
        word |= (u32::cast_from(code) & 255u32) << comptime!(8 * j as u32);
    }
    i32::cast_from(word)
}

/// The words of codes such that a byte is its code plus 128.
#[cube]
fn shifted(word: i32) -> u32 {
    u32::cast_from(word) ^ 0x8080_8080u32
}

/// One of the four codes of a word from [`shifted`].
#[cube]
fn code(word: u32, #[comptime] byte: usize) -> f32 {
    f32::cast_from((word >> comptime!(8 * byte as u32)) & 255u32) - 128.0
}

/// Keys and values of the places of some pages `[1, g, p page_tokens, k]`, restored.
pub(super) fn gather<R: ProductRuntime>(
    pages: &Int8Pages<Cube<R>>,
    some: &DenseTensor<Cube<R>, 1, Int>,
    heads: Heads,
    page_tokens: usize,
    dtype: DType,
) -> [DenseTensor<Cube<R>, 4>; 2] {
    let [p] = some.dims();
    let places = p * page_tokens;
    let words = head_words(heads.width);
    let count = places * heads.keys * words;
    [&pages.keys, &pages.values].map(|rows| {
        let (codes, scales) = parts(rows);
        let out = uninitialized(&codes, [places, heads.keys * heads.width], dtype);
        // SAFETY: units past the last word do nothing; the others read places of the pages, which are there, and write the
        // numbers of their word.
        unsafe {
            restore_int8_kernel::launch_unchecked::<R>(
                &out.client,
                cubes(count.div_ceil(RESTORING)),
                CubeDim::new_1d(RESTORING as u32),
                codes.into_tensor_arg(),
                scales.into_tensor_arg(),
                int_primitive(some.clone()).into_tensor_arg(),
                out.clone().into_tensor_arg(),
                count,
                page_tokens,
                words,
                heads.keys,
                heads.width,
                out.dtype.into(),
            );
        }
        let out: DenseTensor<Cube<R>, 2> = tensor(out);
        out.reshape([1, places, heads.keys, heads.width]).swap_dims(1, 2)
    })
}

/// A unit has a word of the result.
#[cube(launch_unchecked)]
fn restore_int8_kernel<F: Float>(
    codes: &Tensor<i32>,
    scales: &Tensor<f32>,
    pages: &Tensor<i32>,
    out: &mut Tensor<F>,
    count: usize,
    page_tokens: usize,
    #[comptime] words: usize,
    #[comptime] groups: usize,
    #[comptime] width: usize,
    #[define(F)] _dtype: StorageType,
) {
    let at = CUBE_POS as usize * RESTORING + UNIT_POS as usize;
    if at < count {
        let (head, own) = (at / words, at % words);
        let from = key_head(pages, 0usize.runtime(), page_tokens, head / groups, head % groups, groups);
        let (word, scale) = (shifted(codes[from * words + own]), scales[from]);
        #[unroll]
        for j in 0..PER_WORD {
            let d = own * PER_WORD + j;
            if d < width {
                out[head * width + d] = F::cast_from(code(word, j) * scale);
            }
        }
    }
}

/// Attention of single rows: the sums of each row, head and split, or the result where there is one split.
pub(super) fn split<R: ProductRuntime>(
    singles: &Singles<R>,
    pages: &Int8Pages<Cube<R>>,
    index: &PagedIndex<Cube<R>>,
) {
    let Singles { q, heads, splits, sums, o } = singles;
    let ([m, _], tables) = (dims(q), index.tables());
    let ((key_codes, key_scales), (value_codes, value_scales)) = (parts(&pages.keys), parts(&pages.values));
    let words = head_words(heads.width);
    let width = vector_width(words, &[&key_codes, &value_codes]);
    let (cubes, units) = singles.launch();
    // SAFETY: a cube reads places below its sequence's length, which its pages hold; it writes the sums or the
    // result of its own row, head and split.
    unsafe {
        split_int8_kernel::launch_unchecked::<R>(
            &q.client,
            cubes,
            units,
            width,
            q.clone().into_tensor_arg(),
            key_codes.into_tensor_arg(),
            key_scales.into_tensor_arg(),
            value_codes.into_tensor_arg(),
            value_scales.into_tensor_arg(),
            int_primitive(tables.numbers.clone()).into_tensor_arg(),
            sums.clone().into_tensor_arg(),
            o.clone().into_tensor_arg(),
            index.rows(),
            m,
            tables.pages,
            index.page_tokens(),
            singles.scale(),
            heads.width,
            words / width,
            heads.queries,
            heads.queries / heads.keys,
            *splits > 1,
            has_planes(q),
            q.dtype.into(),
        );
    }
}

/// One row, one head, 128 keys. `numbers` are those of [`Tables`](super::Tables); `vectors` of words are a head of `width` numbers.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn split_int8_kernel<F: Float, N: Size>(
    q: &Tensor<F>,
    key_codes: &Tensor<Vector<i32, N>>,
    key_scales: &Tensor<f32>,
    value_codes: &Tensor<Vector<i32, N>>,
    value_scales: &Tensor<f32>,
    numbers: &Tensor<i32>,
    sums: &mut Tensor<f32>,
    o: &mut Tensor<F>,
    n: usize,
    m: usize,
    pages: usize,
    page_tokens: usize,
    scale: f32,
    #[comptime] width: usize,
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
    // Numbers of a head, those behind its end included.
    let padded = comptime!(vectors * per_vector * PER_WORD);
    let length = numbers[n + row] as usize;
    let mut query = SharedMemory::<f32>::new(padded);
    let mut places = SharedMemory::<u32>::new(KEYS);
    let mut weights = SharedMemory::<f32>::new(KEYS);
    let mut d = unit;
    while d < padded {
        let mut own = f32::new(0.0);
        if d < width {
            own = f32::cast_from(q[(row * heads + head) * width + d]) * scale;
        }
        query[d] = own;
        d += KEYS;
    }
    let at = part * KEYS + unit;
    let mut place = 0usize;
    if at < length {
        let table = n + m + row * pages;
        place = key_head(numbers, table, page_tokens, at, head / shared, comptime!(heads / shared));
    }
    places[unit] = place as u32;
    sync_cube();
    let mut score = f32::new(NOTHING);
    if at < length {
        score = product::<N>(key_codes, &query, place * vectors, vectors) * key_scales[place];
    }
    let largest = over_cube(score, KEYS, planes, true);
    let total = weigh(&mut weights, score, largest, at < length, planes);
    // So many rows of values at a time, a vector of words for each unit.
    let lines = comptime!(KEYS / vectors);
    let (line, vector) = (unit / vectors, unit % vectors);
    let mut count = 0usize;
    if part * KEYS < length && line < lines {
        count = min(length - part * KEYS, KEYS);
    }
    let mut sum = Array::<f32>::new(comptime!(per_vector * PER_WORD));
    #[unroll]
    for i in 0..comptime!(per_vector * PER_WORD) {
        sum[i] = f32::new(0.0);
    }
    let mut key = line;
    while key < count {
        let place = places[key] as usize;
        add_value::<N>(&mut sum, value_codes[place * vectors + vector], weights[key] * value_scales[place]);
        key += lines;
    }
    let mut parts = SharedMemory::<f32>::new(comptime!(lines * padded));
    if line < lines {
        #[unroll]
        for i in 0..comptime!(per_vector * PER_WORD) {
            parts[line * padded + vector * comptime!(per_vector * PER_WORD) + i] = sum[i];
        }
    }
    sync_cube();
    write_sums::<F>(sums, o, &parts, largest, total, lines, padded, width, split);
}

/// The product of a query in shared memory and the codes from a vector of words on.
#[cube]
fn product<N: Size>(
    codes: &Tensor<Vector<i32, N>>,
    query: &SharedMemory<f32>,
    first: usize,
    #[comptime] vectors: usize,
) -> f32 {
    let per_vector = N::value().comptime();
    let mut sum = f32::new(0.0);
    for i in 0..vectors {
        let words = codes[first + i];
        #[unroll]
        for j in 0..per_vector {
            let word = shifted(words[j]);
            #[unroll]
            for byte in 0..PER_WORD {
                sum += code(word, byte) * query[(i * per_vector + j) * PER_WORD + byte];
            }
        }
    }
    sum
}

/// Adds the codes of a vector of words, times a weight.
#[cube]
fn add_value<N: Size>(sum: &mut Array<f32>, words: Vector<i32, N>, weight: f32) {
    let per_vector = N::value().comptime();
    #[unroll]
    for j in 0..per_vector {
        let word = shifted(words[j]);
        #[unroll]
        for byte in 0..PER_WORD {
            sum[comptime!(j * PER_WORD + byte)] += code(word, byte) * weight;
        }
    }
}
