//! Element types of GGUF: plain floats, and blocks of 32 numbers that share a scale.
//!
//! ```text
//! Q8_0   d = max|x| / 127           q = round(x / d), halves away from zero        2 + 32 bytes: d as f16, q as i8
//! Q4_0   d = x of largest |x| / -8  q = trunc(x / d + 8.5), at most 15             2 + 16 bytes: d as f16, then q[i] in
//!                                                                                  the low half of byte i, q[i + 16] above
//! ```
//!
//! Bit for bit what llama.cpp's reference quantizers and its `gguf` package give: the quotient is a product with the f32
//! reciprocal, rounded by itself, and the scale is rounded to f16 only after. It refuses rows that are no whole blocks.

use half::f16;

use crate::FloatType;

/// Numbers in a block.
const BLOCK: usize = 32;

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// 32 bits, exact.
    F32,
    /// 16 bits.
    F16,
    /// 4 bits and a scale for 32 numbers.
    Q4_0,
    /// 8 bits and a scale for 32 numbers.
    Q8_0,
}

impl BlockType {
    pub(super) const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Q4_0, Self::Q8_0];

    /// ggml's number for it.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
        }
    }

    /// Numbers in a block, and its bytes.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 => (1, 2),
            Self::Q4_0 => (BLOCK, 18),
            Self::Q8_0 => (BLOCK, 34),
        }
    }

    /// Bytes of `elements` numbers in rows of `columns`; nothing if a row is no whole blocks or no file holds them.
    pub(super) fn bytes(self, elements: usize, columns: usize) -> Option<usize> {
        let (numbers, bytes) = self.block();
        columns.is_multiple_of(numbers).then_some(())?;
        (elements / numbers).checked_mul(bytes)
    }

    /// Stores numbers, a whole number of blocks; the place of the first that is not finite or whose block's scale
    /// f16 does not hold.
    pub(super) fn encode(self, values: &[f32], scratch: &mut [u16], bytes: &mut Vec<u8>) -> Option<usize> {
        match self {
            Self::F32 => FloatType::F32.encode(values, scratch, bytes),
            Self::F16 => FloatType::F16.encode(values, scratch, bytes),
            Self::Q8_0 => encode_blocks::<34>(values, bytes, encode_q8),
            Self::Q4_0 => encode_blocks::<18>(values, bytes, encode_q4),
        }
    }

    /// Restores numbers from as many whole blocks; the place of the first that is not finite.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) -> Option<usize> {
        match self {
            Self::F32 => {
                let values = bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value));
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value);
            }
            Self::F16 => {
                let values = bytes.as_chunks().0.iter().map(|&value| f16::from_le_bytes(value).to_f32());
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value);
            }
            Self::Q8_0 => decode_blocks::<34>(bytes, out, |scale, codes, out| {
                out.iter_mut().zip(codes).for_each(|(out, &code)| *out = scale * f32::from(code as i8));
            }),
            Self::Q4_0 => decode_blocks::<18>(bytes, out, |scale, codes, out| {
                let (low, high) = out.split_at_mut(BLOCK / 2);
                for ((low, high), code) in low.iter_mut().zip(high).zip(codes) {
                    *low = scale * (f32::from(code & 15) - 8.0);
                    *high = scale * (f32::from(code >> 4) - 8.0);
                }
            }),
        }
        if out.iter().fold(true, |finite, value| finite & value.is_finite()) {
            return None;
        }
        out.iter().position(|value| !value.is_finite())
    }
}

/// Encodes block by block with a function that fills a block's codes and gives its scale.
fn encode_blocks<const BYTES: usize>(
    values: &[f32],
    bytes: &mut Vec<u8>,
    encode: fn(&[f32; BLOCK], &mut [u8]) -> f32,
) -> Option<usize> {
    bytes.resize(values.len() / BLOCK * BYTES, 0);
    let blocks = values.as_chunks::<BLOCK>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0);
    for (place, (block, bytes)) in blocks.enumerate() {
        let scale = f16::from_f32(encode(block, &mut bytes[2..]));
        bytes[..2].copy_from_slice(&scale.to_le_bytes());
        let finite = block.iter().fold(true, |finite, value| finite & value.is_finite());
        if !(finite && scale.is_finite()) {
            let inside = block.iter().position(|value| !value.is_finite());
            return Some(place * BLOCK + inside.unwrap_or_else(|| largest(block)));
        }
    }
    None
}

fn encode_q8(block: &[f32; BLOCK], codes: &mut [u8]) -> f32 {
    let scale = block[largest(block)].abs() / 127.0;
    let inverse = reciprocal(scale);
    let rounded = block.iter().map(|value| (value * inverse).round() as i8 as u8);
    codes.iter_mut().zip(rounded).for_each(|(code, rounded)| *code = rounded);
    scale
}

fn encode_q4(block: &[f32; BLOCK], codes: &mut [u8]) -> f32 {
    let scale = block[largest(block)] / -8.0;
    let inverse = reciprocal(scale);
    let code = |value: f32| ((value * inverse + 8.5) as u8).min(15);
    let (low, high) = block.split_at(BLOCK / 2);
    for ((byte, &low), &high) in codes.iter_mut().zip(low).zip(high) {
        *byte = code(low) | code(high) << 4;
    }
    scale
}

/// The place of the number of largest magnitude, the first of equals.
fn largest(block: &[f32; BLOCK]) -> usize {
    let larger =
        |best: usize, place: usize| if block[place].abs() > block[best].abs() { place } else { best };
    (0..BLOCK).fold(0, larger)
}

fn reciprocal(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn decode_blocks<const BYTES: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn(f32, &[u8], &mut [f32])) {
    let blocks = bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0);
    for (bytes, out) in blocks {
        decode(f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(), &bytes[2..], out);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn encode(kind: BlockType, values: &[f32]) -> Result<Vec<u8>, usize> {
        let (mut scratch, mut bytes) = (vec![0; values.len()], Vec::new());
        kind.encode(values, &mut scratch, &mut bytes).map_or(Ok(bytes), Err)
    }

    #[test]
    fn blocks_come_back_within_half_a_step() {
        let values: Vec<f32> = (0..96).map(|place| (place as f32 * 0.7).sin() * 1.5).collect();
        for (kind, bound) in
            [(BlockType::F32, 0.0), (BlockType::F16, 1e-3), (BlockType::Q8_0, 0.007), (BlockType::Q4_0, 0.2)]
        {
            let bytes = encode(kind, &values).unwrap();
            assert_eq!(Some(bytes.len()), kind.bytes(96, 32));
            let mut back = vec![0.0; 96];
            assert_eq!(kind.decode(&bytes, &mut back), None);
            let error = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error <= bound, "{kind:?}: {error}");
        }
    }

    #[test]
    fn a_block_of_zeros_stays_one() {
        for kind in BlockType::ALL {
            let mut back = [1.0; 32];
            assert_eq!(kind.decode(&encode(kind, &[0.0; 32]).unwrap(), &mut back), None);
            assert_eq!(back, [0.0; 32]);
        }
    }

    #[test]
    fn numbers_that_cannot_be_stored_are_found() {
        for (value, unstorable) in [(f32::NAN, 4), (f32::INFINITY, 4), (9e6, 3), (1e5, 1)] {
            let mut values = [0.5; 64];
            values[40] = value;
            let refused = BlockType::ALL.iter().filter(|&&kind| encode(kind, &values) == Err(40)).count();
            assert_eq!(refused, unstorable, "{value}");
        }
    }

    #[test]
    fn blocks_are_those_of_the_gguf_package() {
        let golden: Value = serde_json::from_str(include_str!("golden/blocks.json")).unwrap();
        let bits = |list: &Value| -> Vec<u32> {
            list.as_array().unwrap().iter().map(|bits| bits.as_u64().unwrap() as u32).collect()
        };
        let values: Vec<f32> = bits(&golden["values"]).into_iter().map(f32::from_bits).collect();
        for (kind, name) in [(BlockType::Q8_0, "Q8_0"), (BlockType::Q4_0, "Q4_0")] {
            let bytes = encode(kind, &values).unwrap();
            let found: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found, golden[name]["blocks"].as_str().unwrap(), "{name}");
            let mut back = vec![0.0; values.len()];
            assert_eq!(kind.decode(&bytes, &mut back), None);
            let restored: Vec<u32> = back.iter().map(|value| value.to_bits()).collect();
            assert_eq!(restored, bits(&golden[name]["restored"]), "{name}");
        }
    }

    #[test]
    fn infinite_scales_are_found() {
        let mut bytes = encode(BlockType::Q8_0, &[1.0; 64]).unwrap();
        bytes[34..36].copy_from_slice(&[0x00, 0x7C]);
        assert_eq!(BlockType::Q8_0.decode(&bytes, &mut [0.0; 64]), Some(32));
    }
}
