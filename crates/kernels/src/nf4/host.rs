//! NF4 quantization on the host, bit for bit what bitsandbytes 0.50.2 computes on CUDA.
//!
//! It quantizes checkpoints, restores saved ones, and is the oracle for the device kernels. It follows the compiled
//! kernels (`kQuantizeBlockwiseSmall`, `kQuantizeBlockwise`, `kDequantizeBlockwise`), which are built with fast math:
//! f32 subnormals count as zero, and a division is a product with the card's approximate reciprocal.
//!
//! What it trades: plain slices, so that a tensor is in memory as f32 while it is quantized. And that approximate reciprocal
//! is replaced by the rounded one, which differs by one unit in the last place for 13 % of all scales. No NF4 code of
//! bf16 or f16 weights can differ for it (every pair of value and scale was tried with an H100's reciprocals); of the
//! 8-bit codes of double quantization two in ten million do, each for a scale midway between two levels.
//!
//! What it refuses: nothing. NaN and infinity get the codes that bitsandbytes gives them.

use rayon::prelude::*;

use super::codebook::{NF4_CODE, NF4_THRESHOLDS, dynamic_code};
use super::{BLOCK, NESTED_BLOCK};

/// Values that one core takes at a time; whole blocks.
const PART: usize = 1 << 16;

/// A tensor of n values in NF4, flattened row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Host {
    /// Two codes a byte, `ceil(n / 2)` bytes, the earlier value in the high nibble.
    pub codes: Vec<u8>,
    /// The absolute maximum of each block of 64 values, `ceil(n / 64)` of them, in the unit of the values.
    pub absmax: Vec<f32>,
}

/// The m scales of an NF4 tensor, quantized to 8 bits (QLoRA's double quantization).
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleQuant {
    /// One code of [`dynamic_code`] per scale, m bytes.
    pub codes: Vec<u8>,
    /// The absolute maximum of each block of 256 scales less `offset`, `ceil(m / 256)` of them.
    pub nested_absmax: Vec<f32>,
    /// The mean of the scales, subtracted before quantization.
    pub offset: f32,
}

/// Quantizes n values to NF4: `code = nearest(x / max|x|)` in blocks of 64, the last of which may be shorter.
///
/// A block of zeros gets the code 0 throughout (bitsandbytes divides zero by zero), which restores as -0. For odd n
/// the low nibble of the last byte is the code of a zero in that block. Equal to `quantize_4bit(A, 64, "nf4")` for
/// A in f32; f16 and bf16 tensors give the same codes, since the kernel widens them to f32 first.
///
/// Blocks do not depend on each other, so all cores share them.
pub fn quantize(values: &[f32]) -> Nf4Host {
    let mut codes = vec![0; values.len().div_ceil(2)];
    let mut absmax = vec![0.0; values.len().div_ceil(BLOCK)];
    let out = codes.par_chunks_mut(PART / 2).zip(absmax.par_chunks_mut(PART / BLOCK));
    values.par_chunks(PART).zip(out).for_each(|(values, (codes, absmax))| {
        let blocks = values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2));
        for ((block, bytes), max) in blocks.zip(absmax) {
            *max = block_max(block);
            quantize_block(block, reciprocal(*max), bytes);
        }
    });
    Nf4Host { codes, absmax }
}

fn quantize_block(block: &[f32], inverse: f32, bytes: &mut [u8]) {
    // A short block is padded with zeros, as in the kernel; full blocks have a fixed length, which lets the
    // compiler vectorise over values.
    let mut padded = [0.0; BLOCK];
    padded[..block.len()].copy_from_slice(block);
    let mut codes = [0u8; BLOCK];
    for (code, value) in codes.iter_mut().zip(padded) {
        let scaled = flush(value) * inverse;
        // Counting thresholds gives the leaf of bitsandbytes' decision tree, NaN included (no threshold is below).
        let mut count = 0u32;
        for threshold in NF4_THRESHOLDS {
            count += u32::from(scaled > threshold);
        }
        *code = count as u8;
    }
    for (byte, pair) in bytes.iter_mut().zip(codes.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
}

/// Quantizes m scales to 8 bits: `code = nearest((scale - mean) / max|scale - mean|)` in blocks of 256.
///
/// Equal to the `compress_statistics` branch of `quantize_4bit`. No scales give no codes and a NaN offset.
pub fn double_quantize(absmax: &[f32]) -> DoubleQuant {
    let offset = mean_like_torch(absmax);
    let map = dynamic_code();
    let mut codes = vec![0; absmax.len()];
    let mut nested_absmax = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK)];
    let out = codes.par_chunks_mut(NESTED_BLOCK).zip(&mut nested_absmax);
    let blocks = absmax.par_chunks(NESTED_BLOCK).with_min_len(PART / NESTED_BLOCK);
    blocks.zip(out).for_each(|(block, (codes, max))| {
        let mut centred = [0.0; NESTED_BLOCK];
        let centred = &mut centred[..block.len()];
        centred.iter_mut().zip(block).for_each(|(centred, scale)| *centred = scale - offset);
        *max = block_max(centred);
        let inverse = reciprocal(*max);
        for (code, &scale) in codes.iter_mut().zip(&*centred) {
            *code = nearest_dynamic(map, flush(scale) * inverse);
        }
    });
    DoubleQuant { codes, nested_absmax, offset }
}

/// The code whose level is nearest to `x`; a tie goes to the level that the search met last.
///
/// It repeats `dQuantize<0>`, whose search ends beside the nearest level and then compares one midpoint, so that
/// ties and NaN (code 0) fall as they do there.
fn nearest_dynamic(map: &[f32; 256], x: f32) -> u8 {
    let (mut lower, mut pivot, mut upper) = (0usize, 127usize, 255usize);
    for shift in (0..7).rev() {
        if x > map[pivot] {
            lower = pivot;
            pivot += 1 << shift;
        } else {
            upper = pivot;
            pivot -= 1 << shift;
        }
    }
    let level = map[pivot];
    let code = if x > level {
        if x > (map[upper] + level) * 0.5 { upper } else { pivot }
    } else if x < (map[lower] + level) * 0.5 {
        lower
    } else {
        pivot
    };
    code as u8
}

/// The m scales that bitsandbytes computes with after double quantization: `map[code] * nested_absmax + offset`.
///
/// Product and sum are rounded one after the other (two kernels there). A block without its nested scale, which no
/// well-formed input has, ends the result early.
pub fn restore_absmax(dq: &DoubleQuant) -> Vec<f32> {
    let map = dynamic_code();
    dq.codes
        .chunks(NESTED_BLOCK)
        .zip(&dq.nested_absmax)
        .flat_map(|(codes, &max)| {
            codes.iter().map(move |&code| flush(map[usize::from(code)] * max) + dq.offset)
        })
        .collect()
}

/// Writes the n = `out.len()` values of an NF4 tensor: `NF4_CODE[code] * absmax[i / 64]`, in f32.
///
/// `codes` holds `ceil(n / 2)` bytes, `absmax` `ceil(n / 64)` scales ([`Nf4Host`]). For a bf16 or f16 result round
/// the f32 values to nearest even, as bitsandbytes does.
///
/// # Panics
///
/// If a slice is shorter than that.
pub fn dequantize(codes: &[u8], absmax: &[f32], out: &mut [f32]) {
    let n = out.len();
    let (codes, absmax) = (&codes[..n.div_ceil(2)], &absmax[..n.div_ceil(BLOCK)]);
    for ((out, bytes), &scale) in out.chunks_mut(BLOCK).zip(codes.chunks(BLOCK / 2)).zip(absmax) {
        let mut pairs = out.chunks_exact_mut(2);
        for (pair, &byte) in (&mut pairs).zip(bytes) {
            let [high, low] = PAIRS[usize::from(byte)];
            pair[0] = high * scale;
            pair[1] = low * scale;
        }
        if let ([last], Some(&byte)) = (pairs.into_remainder(), bytes.last()) {
            *last = PAIRS[usize::from(byte)][0] * scale;
        }
        // Only such a scale can give subnormals; testing it once spares the hot loop.
        if scale.abs() < TINY {
            out.iter_mut().for_each(|value| *value = flush(*value));
        }
    }
}

/// Above the least normal number over the least level but zero (0.0796).
const TINY: f32 = 32.0 * f32::MIN_POSITIVE;

/// Both levels of every byte, so that the hot loop does one 8-byte load instead of two shifts and two look-ups.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [NF4_CODE[byte >> 4], NF4_CODE[byte & 15]];
        byte += 1;
    }
    pairs
};

/// The largest magnitude; NaN is passed over, and a block of nothing but NaN gives the kernel's start value.
fn block_max(block: &[f32]) -> f32 {
    flush(block.iter().fold(f32::MIN, |max, value| if value.abs() > max { value.abs() } else { max }))
}

/// 1 / x as the kernels compute it.
fn reciprocal(x: f32) -> f32 {
    flush(1.0 / flush(x))
}

/// Subnormals count as zero, with their sign.
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}

/// `torch.mean` of a contiguous f32 vector on a CUDA card of 132 multiprocessors (H100, H200), bit for bit.
///
/// An f32 sum depends on its order, and the 8-bit codes on the sum. The order is that of `reduce_kernel` in
/// `ATen/native/cuda/Reduce.cuh` of torch 2.11 for one output: lanes of four accumulators walk the input in
/// strides, the accumulators are folded left to right, and a halving tree joins the lanes (older torch joined
/// neighbours first). The sum is then multiplied by `1 / n`. NaN for an empty slice.
///
/// Checked against an H100 for every n to 1,400 and 700 larger ones to 12 million.
pub(crate) fn mean_like_torch(values: &[f32]) -> f32 {
    let shape = ReduceShape::of(values.len());
    let mut partial: Vec<f32> = (0..shape.ctas).map(|cta| cta_sum(values, shape, cta)).collect();
    if shape.ctas > 1 {
        // The last block to finish adds the others' sums in a stride of its width, then by the same tree.
        let mut lanes = vec![0.0; shape.width];
        for sums in partial.chunks(shape.width) {
            for (lane, sum) in lanes.iter_mut().zip(sums) {
                *lane += sum;
            }
        }
        partial = vec![halving_sum(&mut lanes)];
    }
    partial.first().map_or(f32::NAN, |sum| sum * (1.0 / values.len() as f32))
}

/// How torch spreads the sum of n values over threads.
#[derive(Clone, Copy)]
pub(super) struct ReduceShape {
    /// Threads per block, a power of two up to 512.
    pub(super) width: usize,
    /// Blocks that share the input.
    pub(super) ctas: usize,
    /// Whether a thread loads four neighbours at a time.
    pub(super) vectorized: bool,
}

impl ReduceShape {
    /// `setReduceConfig` for one output, four values in flight per thread.
    pub(super) fn of(n: usize) -> Self {
        // 132 multiprocessors times four resident blocks of 512 threads. It matters from 8,192 values for each of
        // these blocks, 4.3 million; a T4 has 80 and sums in another order above 655,360.
        const RESIDENT_CTAS: usize = 132 * 4;
        let vectorized = n >= 128;
        let lanes = if vectorized { n / 4 } else { n }.max(1);
        let width = (1 << lanes.ilog2()).min(512);
        let per_thread = n.div_ceil(width);
        let ctas = if per_thread < 256 {
            1
        } else {
            RESIDENT_CTAS.min(per_thread.div_ceil(16)).max(per_thread.div_ceil(256))
        };
        Self { width, ctas, vectorized }
    }
}

/// What block `cta` of the launch contributes.
fn cta_sum(values: &[f32], shape: ReduceShape, cta: usize) -> f32 {
    let ReduceShape { width, ctas, vectorized } = shape;
    let mut lanes = vec![0.0; width];
    if !vectorized {
        for lap in values.chunks(width) {
            for (lane, value) in lanes.iter_mut().zip(lap) {
                *lane += value;
            }
        }
        return halving_sum(&mut lanes);
    }
    let tile = 4 * width;
    let (whole, tail) = values.split_at(values.len() - values.len() % 4);
    let mut sums = vec![0.0f32; tile];
    for lap in whole.chunks(tile).skip(cta).step_by(ctas) {
        for (sum, value) in sums.iter_mut().zip(lap) {
            *sum += value;
        }
    }
    if cta == 0 {
        for (sums, value) in sums.chunks_exact_mut(4).zip(tail) {
            sums[0] += value;
        }
    }
    for (lane, sums) in lanes.iter_mut().zip(sums.chunks_exact(4)) {
        *lane = ((sums[0] + sums[1]) + sums[2]) + sums[3];
    }
    halving_sum(&mut lanes)
}

/// Adds the upper half of the lanes to the lower until one is left; their number is a power of two.
fn halving_sum(lanes: &mut [f32]) -> f32 {
    let mut half = lanes.len() / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        for (lane, other) in low.iter_mut().zip(high.iter()) {
            *lane += other;
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An exact, reproducible sequence in [0, 1).
    fn noise(n: usize) -> Vec<f32> {
        (0..n as u64)
            .map(|i| (((i * 2_654_435_761 + 40_503) & 0xffff_ffff) >> 8) as f32 / 16_777_216.0)
            .collect()
    }

    /// Bits that torch 2.11 gave on an H100 for the squares of `noise(n)`, on both sides of each change of launch shape.
    #[test]
    fn means_are_those_of_a_card() {
        let seen = [
            (1, 0x2ec3_0800),
            (3, 0x3e15_67b2),
            (127, 0x3ea8_b5fc),
            (128, 0x3ea8_5ac1),
            (129, 0x3ea7_1896),
            (1000, 0x3eaa_ab0b),
            (2049, 0x3eaa_95d4),
            (8197, 0x3eaa_b058),
            (130_561, 0x3eaa_a9e1),
            (131_073, 0x3eaa_aa06),
            (704_512, 0x3eaa_aaa1),
        ];
        for (n, bits) in seen {
            let squares: Vec<f32> = noise(n).iter().map(|u| u * u).collect();
            assert_eq!(mean_like_torch(&squares).to_bits(), bits, "n = {n}");
        }
        assert!(mean_like_torch(&[]).is_nan());
    }

    #[test]
    fn subnormals_count_as_zero() {
        let packed = quantize(&[1e-40, -1e-39, 2e-39]);
        assert_eq!((packed.absmax[0].to_bits(), packed.codes), (0, vec![0, 0]));
        let mut out = [1.0; 2];
        dequantize(&[0x86], &[6.2e-38], &mut out);
        assert_eq!(out, [0.0, 0.0]);
    }

    fn weights(n: usize) -> Vec<f32> {
        noise(n).iter().map(|u| (u - 0.5) * 0.25).collect()
    }

    #[test]
    fn the_earlier_value_is_the_high_nibble() {
        let mut block = vec![0.0; 64];
        block[0] = 2.0;
        block[1] = -2.0;
        let packed = quantize(&block);
        assert_eq!(packed.absmax, [2.0]);
        assert_eq!(packed.codes[0], 0xf0);
        assert!(packed.codes[1..].iter().all(|&byte| byte == 0x77));
    }

    #[test]
    fn levels_survive_a_round_trip() {
        let block: Vec<f32> = NF4_CODE.iter().cycle().take(64).map(|level| level * 0.5).collect();
        let packed = quantize(&block);
        let mut out = vec![0.0; 64];
        dequantize(&packed.codes, &packed.absmax, &mut out);
        assert_eq!(out, block);
    }

    #[test]
    fn a_value_on_a_threshold_takes_the_lower_code() {
        for (k, &threshold) in NF4_THRESHOLDS.iter().enumerate() {
            let up = threshold.next_up();
            let packed = quantize(&[1.0, 1.0, threshold, up]);
            assert_eq!(usize::from(packed.codes[1]), k << 4 | (k + 1));
        }
    }

    #[test]
    fn short_blocks_and_odd_lengths() {
        for n in [0, 1, 2, 63, 64, 65, 127, 129, 191] {
            let values = weights(n);
            let packed = quantize(&values);
            assert_eq!((packed.codes.len(), packed.absmax.len()), (n.div_ceil(2), n.div_ceil(64)));
            let mut out = vec![f32::NAN; n];
            dequantize(&packed.codes, &packed.absmax, &mut out);
            for (i, (value, restored)) in values.iter().zip(&out).enumerate() {
                assert!((value - restored).abs() <= 0.16 * packed.absmax[i / 64], "{n} {i}");
            }
            if n % 2 == 1 {
                assert_eq!(packed.codes[n / 2] & 15, 7, "padding is a zero");
            }
        }
    }

    #[test]
    fn zeros_of_either_sign_restore_as_minus_zero() {
        for zero in [0.0, -0.0f32] {
            let packed = quantize(&[zero; 64]);
            assert_eq!(packed.absmax[0].to_bits(), 0);
            assert!(packed.codes.iter().all(|&byte| byte == 0));
            let mut out = [1.0; 64];
            dequantize(&packed.codes, &packed.absmax, &mut out);
            assert!(out.iter().all(|value| value.to_bits() == (-0.0f32).to_bits()));
        }
    }

    #[test]
    fn a_negative_zero_among_values_is_level_seven() {
        assert_eq!(quantize(&[1.0, -0.0]).codes, [0xf7]);
    }

    #[test]
    fn nan_and_infinity_do_not_spread_to_other_blocks() {
        let mut values = weights(128);
        values[0] = f32::NAN;
        values[1] = f32::INFINITY;
        let packed = quantize(&values);
        assert_eq!((packed.codes[0], packed.codes[1]), (0x00, 0x77));
        assert_eq!(packed.codes[32..], quantize(&weights(128)).codes[32..]);
    }

    #[test]
    fn double_quantization_counts_and_restores() {
        let absmax: Vec<f32> = noise(600).iter().map(|u| 0.05 + 0.1 * u).collect();
        let dq = double_quantize(&absmax);
        assert_eq!((dq.codes.len(), dq.nested_absmax.len()), (600, 3));
        for (scale, restored) in absmax.iter().zip(restore_absmax(&dq)) {
            assert!((scale - restored).abs() < 0.001);
        }
    }

    #[test]
    fn equal_scales_restore_exactly() {
        // Less their mean they are zero: zero over zero gives code 0, and -0.99 x 0 + mean is the mean.
        let dq = double_quantize(&[0.125; 300]);
        assert_eq!((dq.offset, dq.codes.clone()), (0.125, vec![0; 300]));
        assert_eq!(restore_absmax(&dq), vec![0.125; 300]);
    }

    #[test]
    fn dynamic_codes_are_nearest_and_ties_keep_the_last_level() {
        let map = dynamic_code();
        for (code, &level) in map.iter().enumerate() {
            assert_eq!(usize::from(nearest_dynamic(map, level)), code);
        }
        for code in 0..255usize {
            let tie = (map[code] + map[code + 1]) * 0.5;
            let got = usize::from(nearest_dynamic(map, tie));
            assert!(got == code || got == code + 1);
            assert_eq!(usize::from(nearest_dynamic(map, tie.next_up().next_up())), code + 1);
            assert_eq!(usize::from(nearest_dynamic(map, tie.next_down().next_down())), code);
        }
        assert_eq!(nearest_dynamic(map, f32::NAN), 0);
        assert_eq!((nearest_dynamic(map, -1.0), nearest_dynamic(map, 2.0)), (0, 255));
    }
}
