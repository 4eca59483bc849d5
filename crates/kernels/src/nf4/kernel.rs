//! NF4 on a device: dense weights from packed ones, and packed ones from dense.
//!
//! A unit of [`dequantize`] expands words of eight codes, so that a plane reads its words side by side and writes 16 bytes
//! a unit side by side. It reads all its words before it waits for one. Levels come from 16 words of shared memory, one
//! bank each, which all units read without conflict; scales are restored once, by one unit each, and shared too.
//! Bytes moved: half a byte of codes and a 64th of a scale read, one value written. What it trades: rows whose width or
//! place is no multiple of a vector are written in narrower vectors. What it refuses: weights of 2³² values or more.

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Int, Tensor as DenseTensor, TensorPrimitive};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime};
use cubecl::prelude::*;

use crate::device::{Cube, cubes, primitive, side_by_side, uninitialized, vector_width};
use crate::product::ProductRuntime;

use super::codebook::{NF4_THRESHOLDS, dynamic_code};
use super::{BLOCK, NESTED_BLOCK, NF4_CODE, Nf4Tensor, Scales, frozen};

/// Units of a cube.
const UNITS: usize = 256;
/// Words of eight codes that a unit expands, so that a cube has as many blocks as units, and each unit one scale.
const WORDS: usize = BLOCK / PER_WORD;
/// Values in a word.
const PER_WORD: usize = 8;

/// The scales of a packed weight as the kernel reads them.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "short-lived")]
pub enum DeviceScales<R: CubeRuntime> {
    /// One f32 for 64 values.
    Plain(CubeTensor<R>),
    /// Doubly quantized.
    Double {
        /// Four codes of the dynamic map a 32-bit word, lowest byte first; one code for 64 values.
        codes: CubeTensor<R>,
        /// One f32 for 256 codes.
        nested: CubeTensor<R>,
        /// `[1]`, f32, added to every scale.
        offset: CubeTensor<R>,
    },
}

impl<R: CubeRuntime> Nf4Tensor<CubeBackend<R, f32, i32, u8>> {
    /// Codes, eight a word, and scales as [`dequantize`] takes them. No copies.
    #[must_use]
    pub fn device_parts(&self) -> (CubeTensor<R>, DeviceScales<R>) {
        let scales = match &self.scales {
            Scales::Plain(absmax) => DeviceScales::Plain(primitive(absmax.val())),
            Scales::Double(double) => DeviceScales::Double {
                codes: double.codes.val().into_primitive(),
                nested: primitive(double.nested.val()),
                offset: primitive(double.offset.val()),
            },
        };
        (self.codes.val().into_primitive(), scales)
    }
}

/// A subnormal number becomes zero, with its sign: bitsandbytes' kernels are built with fast math.
#[cube]
pub(super) fn flush(x: f32) -> f32 {
    let zero = f32::reinterpret(u32::reinterpret(x) & 0x8000_0000u32);
    select(x.abs() < f32::new(f32::MIN_POSITIVE), zero, x)
}

/// Fills shared memory with constants, one for each of 256 units; the caller synchronises.
///
/// A constant array would be copied to every unit's own memory, which for 256 entries costs more than the rest of a
/// kernel. So a unit selects its entry, among those of 32 neighbours only.
#[cube]
pub(crate) fn load_table(table: &mut SharedMemory<f32>, #[comptime] values: Vec<f32>) {
    let (group, lane) = (UNIT_POS / 32, UNIT_POS % 32);
    let length = comptime!(values.len());
    #[unroll]
    for k in 0..length.div_ceil(32) {
        if group == k as u32 {
            let mut value = f32::new(0.0);
            let first = comptime!(k * 32);
            #[unroll]
            for i in 0..comptime!(32.min(length - first)) {
                value = select(lane == i as u32, f32::new(comptime!(values[first + i])), value);
            }
            if UNIT_POS < length as u32 {
                table[UNIT_POS as usize] = value;
            }
        }
    }
}

/// Writes the eight values of a word into the dense weight, whose rows have `apart` columns if they lie apart, a constant
/// since each vector is divided by it.
#[cube]
fn write_word<F: Float, N: Size>(
    out: &mut Tensor<Vector<F, N>>,
    levels: &SharedMemory<f32>,
    word: u32,
    scale: f32,
    index: usize,
    #[comptime] apart: usize,
) {
    // Below 32 times the least normal number, a product with the least level can be subnormal.
    let tiny = scale.abs() < f32::new(32.0 * f32::MIN_POSITIVE);
    let count = out.shape(0) * out.shape(1);
    let width = N::value().comptime();
    #[unroll]
    for part in 0..PER_WORD / width {
        let mut value = Vector::<f32, N>::empty();
        #[unroll]
        for i in 0..width {
            // Bytes of a word go up, within a byte the high half comes first.
            let shift = comptime!((4 * ((part * width + i) ^ 1)) as u32);
            value[i] = levels[((word >> shift) & 15) as usize] * scale;
        }
        if tiny {
            #[unroll]
            for i in 0..width {
                value[i] = flush(value[i]);
            }
        }
        let first = index * PER_WORD + part * width;
        if first < count {
            let place = if comptime!(apart == 0) {
                first / width
            } else {
                (first / apart) * (out.stride(0) / width) + (first % apart) / width
            };
            out[place] = Vector::cast_from(value);
        }
    }
}

/// The words of this unit. They are read before the cube waits for its scales.
#[cube]
fn load_words(codes: &Tensor<i32>, words: usize) -> Array<u32> {
    let mut packed = Array::<u32>::new(WORDS);
    #[unroll]
    for i in 0..WORDS {
        let index = CUBE_POS as usize * (UNITS * WORDS) + i * UNITS + UNIT_POS as usize;
        packed[i] = 0u32;
        if index < words {
            packed[i] = u32::cast_from(codes[index]);
        }
    }
    packed
}

/// Expands the words of this unit with the 256 scales of its cube.
#[cube]
fn write_words<F: Float, N: Size>(
    out: &mut Tensor<Vector<F, N>>,
    levels: &SharedMemory<f32>,
    scales: &SharedMemory<f32>,
    packed: &Array<u32>,
    words: usize,
    #[comptime] apart: usize,
) {
    #[unroll]
    for i in 0..WORDS {
        let unit = UNIT_POS as usize;
        let index = CUBE_POS as usize * (UNITS * WORDS) + i * UNITS + unit;
        if index < words {
            let scale = scales[i * (UNITS / PER_WORD) + unit / PER_WORD];
            write_word::<F, N>(out, levels, packed[i], scale, index, apart);
        }
    }
}

#[cube(launch_unchecked)]
fn plain_kernel<F: Float, N: Size>(
    codes: &Tensor<i32>,
    absmax: &Tensor<f32>,
    out: &mut Tensor<Vector<F, N>>,
    words: usize,
    #[comptime] apart: usize,
    #[define(F)] _dtype: StorageType,
) {
    let packed = load_words(codes, words);
    let mut levels = SharedMemory::<f32>::new(16usize);
    let mut scales = SharedMemory::<f32>::new(UNITS);
    let block = CUBE_POS as usize * UNITS + UNIT_POS as usize;
    if block * PER_WORD < words {
        scales[UNIT_POS as usize] = absmax[block];
    }
    load_table(&mut levels, comptime!(NF4_CODE.to_vec()));
    sync_cube();
    write_words::<F, N>(out, &levels, &scales, &packed, words, apart);
}

#[cube(launch_unchecked)]
fn double_kernel<F: Float, N: Size>(
    codes: &Tensor<i32>,
    scale_codes: &Tensor<i32>,
    nested: &Tensor<f32>,
    offset: &Tensor<f32>,
    out: &mut Tensor<Vector<F, N>>,
    words: usize,
    #[comptime] apart: usize,
    #[define(F)] _dtype: StorageType,
) {
    let packed = load_words(codes, words);
    let mut levels = SharedMemory::<f32>::new(16usize);
    let mut dynamic = SharedMemory::<f32>::new(UNITS);
    let mut scales = SharedMemory::<f32>::new(UNITS);
    let unit = UNIT_POS as usize;
    let block = CUBE_POS as usize * UNITS + unit;
    let here = block * PER_WORD < words;
    let mut code = 0u32;
    if here {
        code = (u32::cast_from(scale_codes[block / 4]) >> (8 * (block % 4) as u32)) & 255;
    }
    load_table(&mut levels, comptime!(NF4_CODE.to_vec()));
    load_table(&mut dynamic, comptime!(dynamic_code().to_vec()));
    sync_cube();
    if here {
        scales[unit] = flush(dynamic[code as usize] * nested[block / NESTED_BLOCK]);
    }
    // Product and sum are two roundings: no compiler contracts what a barrier stands between. The flush alone was not enough for bf16 on
    // an H200.
    sync_cube();
    if here {
        scales[unit] = scales[unit] + offset[0];
    }
    sync_cube();
    write_words::<F, N>(out, &levels, &scales, &packed, words, apart);
}

/// Writes the dense weight into `out` `[rows, cols]`, a view whose rows can lie apart; f32, f16 or bf16.
///
/// In f32 the bits are those of [`dequantize`](super::dequantize) on the host; other dtypes round them.
///
/// # Panics
/// If codes or scales are fewer than the shape asks for, or the elements of a row of `out` do not lie side by side.
pub fn dequantize<R: CubeRuntime>(codes: CubeTensor<R>, scales: DeviceScales<R>, out: CubeTensor<R>) {
    let [rows, cols] = [out.meta.shape()[0], out.meta.shape()[1]];
    let [stride, one] = [out.meta.strides()[0], out.meta.strides()[1]];
    assert!(one == 1 || cols == 1, "the elements of a row of a dense weight lie side by side");
    let count = rows * cols;
    if count == 0 {
        return;
    }
    let (words, blocks) = (count.div_ceil(PER_WORD), count.div_ceil(BLOCK));
    assert!(codes.meta.num_elements() >= words, "codes of a weight [{rows}, {cols}]");
    let width = vector_width(cols, &[&out]);
    let apart = if stride == cols || rows == 1 { 0 } else { cols };
    let (client, dtype) = (out.client.clone(), out.dtype);
    let (count, dim) = (cubes(words.div_ceil(UNITS * WORDS)), CubeDim::new_1d(UNITS as u32));
    let (codes, out) = (codes.into_tensor_arg(), out.into_tensor_arg());
    // SAFETY: units neither read words past the last nor write past the last value; the lengths of codes and scales
    // are checked against the shape.
    unsafe {
        match scales {
            DeviceScales::Plain(absmax) => {
                assert!(absmax.meta.num_elements() >= blocks, "scales of a weight [{rows}, {cols}]");
                let absmax = absmax.into_tensor_arg();
                let dtype = dtype.into();
                plain_kernel::launch_unchecked::<R>(
                    &client, count, dim, width, codes, absmax, out, words, apart, dtype,
                );
            }
            DeviceScales::Double { codes: scale_codes, nested, offset } => {
                assert!(
                    4 * scale_codes.meta.num_elements() >= blocks
                        && NESTED_BLOCK * nested.meta.num_elements() >= blocks,
                    "scales of a weight [{rows}, {cols}]"
                );
                double_kernel::launch_unchecked::<R>(
                    &client,
                    count,
                    dim,
                    width,
                    codes,
                    scale_codes.into_tensor_arg(),
                    nested.into_tensor_arg(),
                    offset.into_tensor_arg(),
                    out,
                    words,
                    apart,
                    dtype.into(),
                );
            }
        }
    }
}

/// Codes and scales of a dense weight; a unit has the eight values of a word, eight units share a scale.
#[cube(launch_unchecked)]
fn quantize_kernel<F: Float, N: Size>(
    dense: &Tensor<Vector<F, N>>,
    codes: &mut Tensor<i32>,
    absmax: &mut Tensor<f32>,
    words: usize,
    #[define(F)] _dtype: StorageType,
) {
    let unit = UNIT_POS as usize;
    let index = CUBE_POS as usize * UNITS + unit;
    let cols = dense.shape(1);
    let count = dense.shape(0) * cols;
    let width = N::value().comptime();
    let mut values = Array::<f32>::new(PER_WORD);
    // Like the host, NaN is passed over, and a block of nothing but NaN keeps the least number.
    let mut largest = f32::new(f32::MIN);
    #[unroll]
    for part in 0..PER_WORD / width {
        let first = index * PER_WORD + part * width;
        let mut vector = Vector::<f32, N>::new(0.0);
        if first < count {
            let place = (first / cols) * (dense.stride(0) / width) + (first % cols) / width;
            vector = Vector::cast_from(dense[place]);
            #[unroll]
            for i in 0..width {
                let magnitude = vector[i].abs();
                largest = select(magnitude > largest, magnitude, largest);
            }
        }
        #[unroll]
        for i in 0..width {
            values[part * width + i] = vector[i];
        }
    }
    let mut shared = SharedMemory::<f32>::new(UNITS);
    shared[unit] = largest;
    sync_cube();
    let start = unit / 8 * 8;
    #[unroll]
    for i in 0..8usize {
        let other = shared[start + i];
        largest = select(other > largest, other, largest);
    }
    largest = flush(largest);
    let inverse = flush(1.0 / largest);
    if index < words {
        let mut word = 0u32;
        #[unroll]
        for i in 0..PER_WORD {
            let scaled = flush(values[i]) * inverse;
            let mut code = 0u32;
            #[unroll]
            for k in 0..15usize {
                code += u32::cast_from(scaled > f32::new(comptime!(NF4_THRESHOLDS[k])));
            }
            // A byte that holds no value is 0; a half of a byte that holds one is the code of a zero.
            let first = index * PER_WORD + (i / 2) * 2;
            code = select(first < count, code, 0u32);
            word |= code << comptime!((4 * (i ^ 1)) as u32);
        }
        codes[index] = i32::cast_from(word);
        if unit % 8 == 0 {
            absmax[index / 8] = largest;
        }
    }
}

/// Packs a dense weight `[out, in]` on its device; codes and scales are those of [`quantize`](super::quantize) on the host.
#[must_use]
pub fn quantize<R: ProductRuntime>(dense: CubeTensor<R>, double: bool) -> Nf4Tensor<Cube<R>> {
    let dense = side_by_side(dense);
    let [rows, cols] = [dense.meta.shape()[0], dense.meta.shape()[1]];
    let count = rows * cols;
    let words = count.div_ceil(PER_WORD);
    let codes = uninitialized(&dense, [words], DType::I32);
    let absmax = uninitialized(&dense, [count.div_ceil(BLOCK)], DType::F32);
    let width = vector_width(cols, &[&dense]);
    let (client, dtype) = (dense.client.clone(), dense.dtype);
    if count > 0 {
        // SAFETY: units read no value past the last, and write no word or scale past the last.
        unsafe {
            quantize_kernel::launch_unchecked::<R>(
                &client,
                cubes(words.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                width,
                dense.into_tensor_arg(),
                codes.clone().into_tensor_arg(),
                absmax.clone().into_tensor_arg(),
                words,
                dtype.into(),
            );
        }
    }
    let codes = DenseTensor::<_, 1, Int>::from_primitive(codes);
    let codes = Param::initialized(ParamId::new(), codes);
    let scales = Scales::Plain(frozen(DenseTensor::from_primitive(TensorPrimitive::Float(absmax))));
    let packed = Nf4Tensor { codes, scales, out_features: rows, in_features: cols };
    if double { packed.with_quantized_scales() } else { packed }
}
