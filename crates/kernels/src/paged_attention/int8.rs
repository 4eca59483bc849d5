//! Rows of heads in 8 bits: keys and values of a place in half of the 16 bits' room.
//!
//! Each head of a row has a scale of its own, s = max |x| / 127 in f32, and a signed byte for each of its k numbers:
//!
//! ```text
//! c[i] = round(x[i] / s)      x̂[i] = s · c[i]      |x[i] - x̂[i]| ≤ s / 2 = max |x| / 254, but for f32's rounding
//! ```
//!
//! with ties to even. Bytes lie four in a 32-bit word, lowest byte first, since Vulkan need not have smaller numbers; the bytes
//! behind the k-th are zero. What it trades: 4 bytes for k numbers, and one large number makes all others of its head coarse. What
//! it refuses to do: to make a number of what is none. A head with a number that is not finite has the scale NaN, so that
//! all of it is restored as NaN. A scale below the least normal f32 would be 0 on some devices and not on others, so it is 0
//! on all: numbers up to 127 · 2⁻¹²⁶ become 0 where a head has no larger one. The largest f32 itself is restored as infinity, by
//! rounding.
//!
//! Why so, and what the error means for an attention, is in `docs/decisions/0017-keys-and-values-in-8-bits.md`.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, ElementConversion, Int, Tensor};

use super::zeros;
use crate::Heads;
use crate::nf4::{pack_bytes, unpack};

/// The largest code.
pub(super) const MOST: f32 = 127.0;

/// Numbers in a word.
pub(super) const PER_WORD: usize = 4;

/// Rows of g heads of k numbers in 8 bits.
#[derive(Clone, Debug)]
pub struct Int8Rows<B: Backend> {
    /// Words of codes `[n, g w]`, w = k / 4, rounded up.
    pub codes: Tensor<B, 2, Int>,
    /// `[n, g]`, f32.
    pub scales: Tensor<B, 2>,
}

/// Words of the codes of a head of so many numbers.
pub(super) fn head_words(width: usize) -> usize {
    width.div_ceil(PER_WORD)
}

/// Bytes of a head of so many numbers, its scale included.
pub(super) fn head_bytes(width: usize) -> usize {
    size_of::<i32>() * head_words(width) + size_of::<f32>()
}

impl<B: Backend> Int8Rows<B> {
    /// So many rows of zeros.
    #[must_use]
    pub fn zeros(rows: usize, heads: Heads, device: &B::Device) -> Self {
        Self {
            codes: zeros([rows, heads.keys * head_words(heads.width)], DType::I32, device),
            scales: zeros([rows, heads.keys], DType::F32, device),
        }
    }

    /// Rows `[n, g k]` of any float dtype, quantized by plain operations.
    #[must_use]
    pub fn of(rows: Tensor<B, 2>, heads: Heads) -> Self {
        let [n, _] = rows.dims();
        let (g, k, words) = (heads.keys, heads.width, head_words(heads.width));
        let x = rows.cast(DType::F32).reshape([n, g, k]);
        let broken = x.clone().is_finite().bool_not().any_dim(2);
        let x = x.mask_fill(broken.clone().expand([n, g, k]), 0.0);
        let scales = x.clone().abs().max_dim(2).div_scalar(MOST);
        let least = scales.clone().lower_elem(f32::MIN_POSITIVE);
        let codes = (x / scales.clone().mask_fill(least.clone(), 1.0)).round();
        let codes = match words * PER_WORD - k {
            0 => codes,
            spare => {
                let zeros = Tensor::zeros([n, g, spare], (&codes.device(), DType::F32));
                Tensor::cat(vec![codes, zeros], 2)
            }
        };
        let bytes = codes.int().bitwise_and_scalar(0xFF.elem()).reshape([n * g * words, PER_WORD]);
        Self {
            codes: pack_bytes(bytes).reshape([n, g * words]),
            scales: scales.mask_fill(least, 0.0).mask_fill(broken, f32::NAN).reshape([n, g]),
        }
    }

    /// The rows `[n, g k]` in f32.
    #[must_use]
    pub fn restored(&self, heads: Heads) -> Tensor<B, 2> {
        let ([n, _], g, words) = (self.codes.dims(), heads.keys, head_words(heads.width));
        let bytes = unpack::<B>(self.codes.clone().reshape([n * g * words]), &[0, 8, 16, 24], 0xFF);
        // From a byte's bits to the number with this sign.
        let codes = bytes.bitwise_xor_scalar(0x80.elem()).sub_scalar(0x80).float().cast(DType::F32);
        let codes = codes.reshape([n, g, words * PER_WORD]).narrow(2, 0, heads.width);
        (codes * self.scales.clone().reshape([n, g, 1])).reshape([n, g * heads.width])
    }
}

/// The words and the scale of one head, on the host.
pub(super) fn quantize_head(x: &[f32], words: &mut [i32]) -> f32 {
    words.fill(0);
    if !x.iter().all(|x| x.is_finite()) {
        return f32::NAN;
    }
    let scale = x.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / MOST;
    if scale < f32::MIN_POSITIVE {
        return 0.0;
    }
    for (word, numbers) in words.iter_mut().zip(x.chunks(PER_WORD)) {
        let mut bytes = [0; PER_WORD];
        for (byte, number) in bytes.iter_mut().zip(numbers) {
            *byte = ((number / scale).round_ties_even() as i8).cast_unsigned();
        }
        *word = i32::from_le_bytes(bytes);
    }
    scale
}

/// The numbers of one head, on the host. Whole words are taken apart by themselves, so that they are vector instructions.
pub(super) fn restore_head(words: &[i32], scale: f32, x: &mut [f32]) {
    let restored = |word: i32| word.to_le_bytes().map(|byte| scale * f32::from(byte.cast_signed()));
    let (whole, rest) = x.as_chunks_mut::<PER_WORD>();
    for (numbers, &word) in whole.iter_mut().zip(words) {
        *numbers = restored(word);
    }
    if let Some(&word) = words.get(whole.len()) {
        rest.copy_from_slice(&restored(word)[..rest.len()]);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;
    use burn_flex::Flex;

    use super::*;
    use crate::testing::noise;

    /// Words, scales, and what they are restored as, by plain operations and by the host's way.
    fn both_ways(rows: &[f32], heads: Heads) -> [(Vec<i32>, Vec<f32>, Vec<f32>); 2] {
        let (g, k, words) = (heads.keys, heads.width, head_words(heads.width));
        let n = rows.len() / (g * k);
        let tensor =
            Tensor::<Flex, 2>::from_data(TensorData::new(rows.to_vec(), [n, g * k]), &Default::default());
        let plain = Int8Rows::of(tensor, heads);
        let restored = plain.restored(heads).into_data().to_vec().unwrap();
        let plain =
            (plain.codes.into_data().to_vec().unwrap(), plain.scales.into_data().to_vec().unwrap(), restored);
        let mut host = (vec![1; n * g * words], vec![0.0; n * g], vec![1.0; rows.len()]);
        for (head, x) in rows.chunks_exact(k).enumerate() {
            let own = &mut host.0[head * words..][..words];
            host.1[head] = quantize_head(x, own);
            restore_head(own, host.1[head], &mut host.2[head * k..][..k]);
        }
        [plain, host]
    }

    #[test]
    fn every_number_is_restored_to_half_a_step() {
        for (seed, (g, k)) in [(3, 6), (1, 1), (2, 32), (5, 7), (1, 130)].into_iter().enumerate() {
            let heads = Heads { queries: g, keys: g, width: k };
            // Rows of very different sizes.
            let size = |place: usize| 10_f32.powi((place / (g * k)) as i32 * 8 - 32);
            let rows: Vec<f32> =
                noise(9 * g * k, seed as u64 + 1).iter().enumerate().map(|(at, x)| x * size(at)).collect();
            let [plain, host] = both_ways(&rows, heads);
            assert_eq!(plain, host);
            let (_, scales, restored) = plain;
            for (head, (x, restored)) in rows.chunks_exact(k).zip(restored.chunks_exact(k)).enumerate() {
                let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                assert_eq!(scales[head], most / 127.0);
                for (x, restored) in x.iter().zip(restored) {
                    // Half a step, and three roundings of numbers of at most `most`.
                    let bound = most / 254.0 + 3.0 * f32::EPSILON * most;
                    assert!((x - restored).abs() <= bound, "{x} as {restored} of at most {most}");
                }
            }
        }
    }

    #[test]
    fn ties_go_to_the_even_code_and_bytes_lie_lowest_first() {
        let heads = Heads { queries: 1, keys: 1, width: 6 };
        let [plain, host] = both_ways(&[127.0, -127.0, 2.5, -3.5, 0.4, -1.5], heads);
        assert_eq!(plain, host);
        let bytes = |word: [i8; 4]| i32::from_le_bytes(word.map(i8::cast_unsigned));
        assert_eq!(plain.0, [bytes([127, -127, 2, -4]), bytes([0, -2, 0, 0])]);
        assert_eq!(plain.2, [127.0, -127.0, 2.0, -4.0, 0.0, -2.0]);
    }

    #[test]
    fn zeros_large_numbers_and_what_is_no_number() {
        let heads = Heads { queries: 1, keys: 1, width: 5 };
        let tiny = f32::MIN_POSITIVE;
        let row = |first: f32| [first, 1.0, -1.0, 0.0, 0.5];
        let rows = [
            [0.0, -0.0, 0.0, 0.0, 0.0],
            [tiny; 5],
            row(3e38),
            row(f32::NAN),
            row(f32::NEG_INFINITY),
            row(1e3),
        ];
        let [plain, host] = both_ways(rows.as_flattened(), heads);
        assert_eq!(plain.0, host.0);
        for (_, scales, restored) in [plain, host] {
            assert_eq!(scales[..2], [0.0; 2]);
            assert_eq!(restored[..10], [0.0; 10]);
            // Beside so large a number the others are lost, and it comes back itself.
            assert!((restored[10] / 3e38 - 1.0).abs() < 1e-6);
            assert_eq!(restored[11..15], [0.0; 4]);
            assert!(scales[3].is_nan() && scales[4].is_nan());
            assert!(restored[15..25].iter().all(|x| x.is_nan()));
            assert_eq!(restored[26..], [0.0; 4]);
        }
    }
}
