//! The code books of bitsandbytes: the 16 levels of NF4, the signed dynamic 8-bit map that double quantization uses for
//! the block scales, and the unsigned one that 8-bit optimizers use beside it.
//!
//! The values are copied from (NF4) or computed as in (dynamic map) `bitsandbytes/functional.py` 0.50.2, down to
//! the last bit. What it trades: the dynamic map is computed once per process instead of standing here as 256
//! literals. What it refuses: other code books (FP4, shorter dynamic maps).

use std::sync::OnceLock;

/// The 16 levels of NF4 (QLoRA, <https://arxiv.org/abs/2305.14314>, appendix E), in code order.
///
/// Ascending, from -1 to 1; level 7 is exactly zero. Unit: the absolute maximum of the block.
pub const NF4_CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Where NF4 codes change: a scaled value gets the code `k` that counts the thresholds below it.
///
/// bitsandbytes writes them as literals in its kernel's decision tree (`dQuantizeNF4`). They are close to the
/// midpoints of [`NF4_CODE`] but not equal to them, so they are copied, not computed.
pub(crate) const NF4_THRESHOLDS: [f32; 15] = [
    -0.848_096_43,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_42,
    -0.234_607_4,
    -0.137_911_74,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_254,
    0.203_521_25,
    0.292_013_76,
    0.389_312_54,
    0.501_663_4,
    0.642_786_9,
    0.861_478_4,
];

/// bitsandbytes' signed dynamic 8-bit map (<https://arxiv.org/abs/1511.04561>), in code order.
///
/// 256 ascending values from -0.992968738 to 1; entry 127 is zero. Unit: the absolute maximum of the nested block.
/// Equal to `create_dynamic_map()` and to the `nested_quant_map` of saved checkpoints.
pub fn dynamic_code() -> &'static [f32; 256] {
    static CODE: OnceLock<[f32; 256]> = OnceLock::new();
    CODE.get_or_init(build_dynamic_code)
}

/// Decade e of seven (10^-6 to 1) holds 2^e magnitudes: the midpoints of an even division of [0.1, 1].
///
/// Ascending magnitudes are codes 128 to 254, their negatives codes 126 down to 0; zero and 1 complete the map.
fn build_dynamic_code() -> [f32; 256] {
    let mut code = [0.0; 256];
    code[255] = 1.0;
    let mut rank = 0;
    for decade in 0..7 {
        let parts = 1usize << decade;
        let scale = 10f64.powi(decade - 6) as f32;
        for i in 0..parts {
            let mean = (grid_point(i, parts) + grid_point(i + 1, parts)) / 2.0;
            let magnitude = scale * mean;
            code[128 + rank] = magnitude;
            code[126 - rank] = -magnitude;
            rank += 1;
        }
    }
    code
}

/// bitsandbytes' unsigned dynamic 8-bit map, in code order: 256 ascending values from 0 to 1.
///
/// Equal in its rule to `create_dynamic_map(signed=False)`: the sign's bit doubles the magnitudes of every decade.
pub fn unsigned_dynamic_code() -> &'static [f32; 256] {
    static CODE: OnceLock<[f32; 256]> = OnceLock::new();
    CODE.get_or_init(|| {
        let mut code = [0.0; 256];
        code[255] = 1.0;
        let magnitudes = (0..7).flat_map(|decade| {
            let parts = 2usize << decade;
            let scale = 10f64.powi(decade - 6) as f32;
            (0..parts).map(move |i| scale * ((grid_point(i, parts) + grid_point(i + 1, parts)) / 2.0))
        });
        code[1..255].iter_mut().zip(magnitudes).for_each(|(level, magnitude)| *level = magnitude);
        code
    })
}

/// `torch.linspace(0.1, 1, parts + 1)[i]` in f32.
///
/// torch walks from both ends to the middle and rounds once per value (a fused multiply-add); plain arithmetic
/// differs from it in 42 of the 256 map values.
fn grid_point(i: usize, parts: usize) -> f32 {
    let (start, end) = (0.1f32, 1.0f32);
    let step = (end - start) / parts as f32;
    if i < parts.div_ceil(2) {
        step.mul_add(i as f32, start)
    } else {
        (-step).mul_add((parts - i) as f32, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nf4_levels_ascend_around_zero() {
        assert!(NF4_CODE.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((NF4_CODE[0], NF4_CODE[7], NF4_CODE[15]), (-1.0, 0.0, 1.0));
        assert_eq!(NF4_CODE[6].to_bits(), (-0.09105003625154495f64 as f32).to_bits());
        assert_eq!(NF4_CODE[12].to_bits(), (0.44070982933044434f64 as f32).to_bits());
    }

    #[test]
    fn every_level_lies_between_its_thresholds() {
        for k in 0..15 {
            assert!(NF4_CODE[k] < NF4_THRESHOLDS[k] && NF4_THRESHOLDS[k] < NF4_CODE[k + 1]);
        }
    }

    #[test]
    fn dynamic_map_is_bitsandbytes() {
        let code = dynamic_code();
        assert!(code.windows(2).all(|w| w[0] < w[1]));
        assert!((1..128).all(|i| code[127 - i] == -code[127 + i]));
        assert_eq!((code[127], code[255]), (0.0, 1.0));
        // FNV-1a over the little-endian bits of the `nested_quant_map` in a checkpoint saved by 0.50.2.
        let hash = code
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(hash, HASH_OF_SAVED_MAP);
    }

    const HASH_OF_SAVED_MAP: u64 = 0xd677_f22a_9666_5bc4;
}
