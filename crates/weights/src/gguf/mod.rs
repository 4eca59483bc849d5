//! GGUF, the file of llama.cpp: metadata, tokenizer and tensors in one, written for a merge and read back.
//!
//! Layout (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): magic, version, counts; key-value pairs; one entry
//! per tensor with its dimensions fastest first; the data, each tensor at a multiple of the alignment. What it trades: four
//! element types (F32, F16, Q8_0, Q4_0) instead of llama.cpp's thirty. What it refuses: other types, other architectures
//! than `llama`, and anything in a file that does not lie inside it.
//!
//! llama.cpp rotates neighbouring pairs `(2i, 2i + 1)` of a head where Hugging Face rotates `(i, i + k/2)`, so the rows of
//! the query and key weights stand in another order there; [`to_gguf_rows`] and [`from_gguf_rows`] go between the two.

mod blocks;
mod load;
mod read;
mod vocabulary;
mod write;

use buzzer_model::{LlamaConfig, Target};

pub use blocks::BlockType;
pub(crate) use load::{gguf_file, load_gguf, read_gguf_config};
pub use read::{Gguf, Metadata};
pub use write::{GgufFormat, write_gguf};

use crate::parts::Part;

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;
/// What data begins at a multiple of, unless a file says otherwise.
const ALIGNMENT: u64 = 32;

/// The numbers of GGUF's metadata types.
mod kind {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const STRING: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}

/// Heads whose rows stand in another order in a GGUF file, if a part has any.
fn reordered_heads(part: Part, config: &LlamaConfig) -> Option<usize> {
    match part {
        Part::Linear(_, Target::Q) => Some(config.num_attention_heads),
        Part::Linear(_, Target::K) => Some(config.num_key_value_heads),
        _ => None,
    }
}

/// Row `(half, i)` of every head becomes row `(i, half)`.
fn to_gguf_rows(values: &[f32], heads: usize, columns: usize, out: &mut Vec<f32>) {
    reorder(values, heads, columns, out, |row, half| 2 * (row % half) + row / half);
}

/// The reverse of [`to_gguf_rows`].
fn from_gguf_rows(values: &[f32], heads: usize, columns: usize, out: &mut Vec<f32>) {
    reorder(values, heads, columns, out, |row, half| (row % 2) * half + row / 2);
}

/// Moves rows inside each head: `to` gives the new place of a row in a head of twice `half` rows.
fn reorder(
    values: &[f32],
    heads: usize,
    columns: usize,
    out: &mut Vec<f32>,
    to: impl Fn(usize, usize) -> usize,
) {
    out.resize(values.len(), 0.0);
    let width = values.len() / columns / heads;
    let heads = values.chunks_exact(width * columns).zip(out.chunks_exact_mut(width * columns));
    for (head, out) in heads {
        for (row, values) in head.chunks_exact(columns).enumerate() {
            out[to(row, width / 2) * columns..][..columns].copy_from_slice(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_between_the_two_rotary_layouts_and_back() {
        // Two heads of six rows with two columns.
        let values: Vec<f32> = (0..24).map(|value| value as f32).collect();
        let (mut there, mut back) = (Vec::new(), Vec::new());
        to_gguf_rows(&values, 2, 2, &mut there);
        let rows: Vec<f32> = there.iter().step_by(2).map(|value| value / 2.0).collect();
        assert_eq!(rows, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 6.0, 9.0, 7.0, 10.0, 8.0, 11.0]);
        from_gguf_rows(&there, 2, 2, &mut back);
        assert_eq!(back, values);
    }
}
