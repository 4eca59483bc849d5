//! Double quantization on a device: scales to 8-bit codes, with the bits of [`double_quantize`](super::double_quantize).
//!
//! Three launches. Cubes sum strides of the scales, one cube adds their sums up to the mean, in torch's order both times (an f32 sum
//! depends on its order, and the codes on the sum); then a cube a block of 256 finds its largest magnitude and searches the code of
//! each scale. Bytes moved for m scales: 8 m read, m written.

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Int, Tensor as DenseTensor};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::codebook::dynamic_code;
use super::host::ReduceShape;
use super::kernel::{flush, load_table};
use super::{DoubleScales, NESTED_BLOCK, double_quantize, frozen};
use crate::device::{Cube, cubes, primitive, tensor, uninitialized};
use crate::product::ProductRuntime;

/// Units of a cube that sums, at most: what every device has.
const UNITS: usize = 256;
/// Codes in a word.
const PER_WORD: usize = 4;

/// Quantizes scales `[m]`.
pub(crate) fn quantize<R: ProductRuntime>(absmax: DenseTensor<Cube<R>, 1>) -> DoubleScales<Cube<R>> {
    let [count] = absmax.dims();
    if count == 0 {
        return DoubleScales::of_host(&double_quantize(&[]), &absmax.device());
    }
    let absmax = primitive(absmax);
    let offset = mean(&absmax);
    let codes = uninitialized(&absmax, [count.div_ceil(PER_WORD)], DType::I32);
    let nested = uninitialized(&absmax, [count.div_ceil(NESTED_BLOCK)], DType::F32);
    let client = absmax.client.clone();
    // SAFETY: units read no scale past the last, and write no word past the last; a cube writes one second-level scale.
    unsafe {
        codes_kernel::launch_unchecked::<R>(
            &client,
            cubes(count.div_ceil(NESTED_BLOCK)),
            CubeDim::new_1d(NESTED_BLOCK as u32),
            absmax.into_tensor_arg(),
            offset.clone().into_tensor_arg(),
            codes.clone().into_tensor_arg(),
            nested.clone().into_tensor_arg(),
            count,
        );
    }
    DoubleScales {
        codes: Param::initialized(ParamId::new(), DenseTensor::<_, 1, Int>::from_primitive(codes)),
        nested: frozen(tensor(nested)),
        offset: frozen(tensor(offset)),
    }
}

/// The mean `[1]`, summed as torch sums it on a card.
fn mean<R: CubeRuntime>(values: &CubeTensor<R>) -> CubeTensor<R> {
    let count = values.meta.num_elements();
    let ReduceShape { width, ctas, vectorized } = ReduceShape::of(count);
    let partial = uninitialized(values, [ctas], DType::F32);
    let out = uninitialized(values, [1], DType::F32);
    let (client, units) = (&values.client, width.min(UNITS));
    // SAFETY: lanes read no value past the last; each cube writes one sum, and there are as many as cubes.
    unsafe {
        sums_kernel::launch_unchecked::<R>(
            client,
            cubes(ctas),
            CubeDim::new_1d(units as u32),
            values.clone().into_tensor_arg(),
            partial.clone().into_tensor_arg(),
            count,
            ctas,
            width,
            units,
            vectorized,
        );
        mean_kernel::launch_unchecked::<R>(
            client,
            cubes(1),
            CubeDim::new_1d(units as u32),
            partial.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            ctas,
            1.0 / count as f32,
            width,
            units,
        );
    }
    out
}

/// What a lane of `width` sums of the values that fall to this cube: four at a time, each with a sum of its own.
#[cube]
fn sum_of_fours(
    values: &Tensor<f32>,
    count: usize,
    lane: usize,
    ctas: usize,
    #[comptime] width: usize,
) -> f32 {
    let whole = count - count % 4;
    let mut first = f32::new(0.0);
    let mut second = f32::new(0.0);
    let mut third = f32::new(0.0);
    let mut fourth = f32::new(0.0);
    let cube = CUBE_POS as usize;
    let mut place = 4 * (cube * width + lane);
    while place < whole {
        first += values[place];
        second += values[place + 1];
        third += values[place + 2];
        fourth += values[place + 3];
        place += 4 * width * ctas;
    }
    // The last one to three values.
    if cube == 0 && whole + lane < count {
        first += values[whole + lane];
    }
    ((first + second) + third) + fourth
}

/// What a lane of `width` sums of values one at a time.
#[cube]
fn sum_of_ones(values: &Tensor<f32>, count: usize, lane: usize, #[comptime] width: usize) -> f32 {
    let mut sum = f32::new(0.0);
    let mut place = lane;
    while place < count {
        sum += values[place];
        place += width;
    }
    sum
}

/// Adds the upper half of the lanes to the lower until one is left.
#[cube]
fn halve(lanes: &mut SharedMemory<f32>, #[comptime] width: usize, #[comptime] units: usize) {
    #[unroll]
    for step in 0..comptime!(width.ilog2()) {
        sync_cube();
        let half = comptime!(width >> (step + 1));
        #[unroll]
        for k in 0..comptime!(half.div_ceil(units)) {
            let lane = k * units + UNIT_POS as usize;
            if lane < half {
                lanes[lane] += lanes[lane + half];
            }
        }
    }
}

/// The sum of a cube's share of the values.
#[cube(launch_unchecked)]
fn sums_kernel(
    values: &Tensor<f32>,
    out: &mut Tensor<f32>,
    count: usize,
    ctas: usize,
    #[comptime] width: usize,
    #[comptime] units: usize,
    #[comptime] vectorized: bool,
) {
    let mut lanes = SharedMemory::<f32>::new(width);
    #[unroll]
    for k in 0..comptime!(width / units) {
        let lane = k * units + UNIT_POS as usize;
        if comptime!(vectorized) {
            lanes[lane] = sum_of_fours(values, count, lane, ctas, width);
        } else {
            lanes[lane] = sum_of_ones(values, count, lane, width);
        }
    }
    halve(&mut lanes, width, units);
    if UNIT_POS == 0 {
        out[CUBE_POS as usize] = lanes[0];
    }
}

/// The mean from the sums of all cubes.
#[cube(launch_unchecked)]
fn mean_kernel(
    sums: &Tensor<f32>,
    out: &mut Tensor<f32>,
    ctas: usize,
    inverse: f32,
    #[comptime] width: usize,
    #[comptime] units: usize,
) {
    let mut lanes = SharedMemory::<f32>::new(width);
    #[unroll]
    for k in 0..comptime!(width / units) {
        let lane = k * units + UNIT_POS as usize;
        lanes[lane] = sum_of_ones(sums, ctas, lane, width);
    }
    halve(&mut lanes, width, units);
    if UNIT_POS == 0 {
        out[0] = lanes[0] * inverse;
    }
}

/// The code whose level is nearest, as the host's search finds it.
#[cube]
fn nearest(map: &SharedMemory<f32>, x: f32) -> u32 {
    let mut lower = 0u32;
    let mut pivot = 127u32;
    let mut upper = 255u32;
    #[unroll]
    for k in 0..7u32 {
        let step = comptime!(64u32 >> k);
        let above = x > map[pivot as usize];
        lower = select(above, pivot, lower);
        upper = select(above, upper, pivot);
        pivot = select(above, pivot + step, pivot - step);
    }
    let level = map[pivot as usize];
    let higher = select(x > (map[upper as usize] + level) * 0.5, upper, pivot);
    let deeper = select(x < (map[lower as usize] + level) * 0.5, lower, pivot);
    select(x > level, higher, deeper)
}

/// Codes and second-level scale of a block of 256, a unit each.
#[cube(launch_unchecked)]
fn codes_kernel(
    absmax: &Tensor<f32>,
    offset: &Tensor<f32>,
    codes: &mut Tensor<i32>,
    nested: &mut Tensor<f32>,
    count: usize,
) {
    let mut map = SharedMemory::<f32>::new(NESTED_BLOCK);
    let mut magnitudes = SharedMemory::<f32>::new(NESTED_BLOCK);
    let mut found = SharedMemory::<u32>::new(NESTED_BLOCK);
    load_table(&mut map, comptime!(dynamic_code().to_vec()));
    let unit = UNIT_POS as usize;
    let place = CUBE_POS as usize * NESTED_BLOCK + unit;
    let mut centred = f32::new(0.0);
    // Like the host, NaN is passed over, and a block of nothing but NaN keeps the least number.
    let mut largest = f32::new(f32::MIN);
    if place < count {
        centred = absmax[place] - offset[0];
        largest = select(centred.abs() > largest, centred.abs(), largest);
    }
    magnitudes[unit] = largest;
    #[unroll]
    for step in 0..comptime!(NESTED_BLOCK.ilog2()) {
        sync_cube();
        let half = comptime!(NESTED_BLOCK >> (step + 1));
        if unit < half {
            let (own, other) = (magnitudes[unit], magnitudes[unit + half]);
            magnitudes[unit] = select(other > own, other, own);
        }
    }
    sync_cube();
    let largest = flush(magnitudes[0]);
    let inverse = flush(1.0 / largest);
    // Bytes after the last code are 0.
    found[unit] = select(place < count, nearest(&map, flush(centred) * inverse), 0u32);
    sync_cube();
    if unit % PER_WORD == 0 && place < count {
        let mut word = 0u32;
        #[unroll]
        for i in 0..PER_WORD {
            word |= found[unit + i] << comptime!((8 * i) as u32);
        }
        codes[place / PER_WORD] = i32::cast_from(word);
    }
    if unit == 0 {
        nested[CUBE_POS as usize] = largest;
    }
}
