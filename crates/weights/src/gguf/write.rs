//! A merge as one GGUF file that llama.cpp loads.
//!
//! Norms stay f32, and rows that are no whole blocks stay f16. In a Q4_0 file the embedding and the head are Q8_0: they are a
//! small part of a large model, and what is lost there is lost for every token. What it trades: this choice makes small models
//! larger than 4 bits a weight.

use std::fs;
use std::io::Write;
use std::path::Path;

use buzzer_model::LlamaConfig;
use serde_json::Value;

use super::vocabulary::Vocabulary;
use super::{ALIGNMENT, BlockType, MAGIC, VERSION, kind, reordered_heads, to_gguf_rows};
use crate::WeightsError;
use crate::merge::Merge;
use crate::parts::Part;
use crate::write::{unwritable, write_atomic};

/// Numbers that are converted before they are written; a multiple of every block.
const CHUNK: usize = 1 << 16;

/// What goes into a GGUF file beside the tensors.
#[derive(Clone, Copy, Debug)]
pub struct GgufFormat<'a> {
    /// The type of the linears: F16, Q8_0 or Q4_0.
    pub block_type: BlockType,
    /// The model's `tokenizer.json`.
    pub tokenizer: &'a Path,
    /// The model's name, for people.
    pub name: &'a str,
}

/// A tensor and where it will lie.
struct Entry {
    part: Part,
    block_type: BlockType,
    shape: Vec<usize>,
    offset: u64,
    bytes: u64,
}

/// Writes a merge as a GGUF file; `done` hears of every tensor.
///
/// # Errors
/// If the base is damaged, the tokenizer is none that GGUF's `llama` tokenizer can be, a number does not fit its type,
/// or the file cannot be written.
pub fn write_gguf(
    path: &Path,
    merge: &Merge<'_>,
    format: GgufFormat<'_>,
    mut done: impl FnMut(),
) -> Result<(), WeightsError> {
    let vocabulary = Vocabulary::read(format.tokenizer, merge.config().vocab_size)?;
    let mut pairs = Pairs::default();
    pairs.model(merge.config(), format);
    pairs.vocabulary(&vocabulary, chat_template(format.tokenizer).as_deref());
    let entries = plan(merge.config(), format.block_type);
    let header = header(&pairs, &entries);
    write_atomic(path, |file| {
        let fault = |source: std::io::Error| WeightsError::write(path, source);
        file.write_all(&header).map_err(fault)?;
        let mut writer = TensorWriter { path, file, scratch: vec![0; CHUNK], bytes: Vec::new() };
        let (mut values, mut reordered) = (Vec::new(), Vec::new());
        for entry in &entries {
            merge.read(entry.part, &mut values)?;
            let columns = entry.shape.last().copied().unwrap_or(1);
            match reordered_heads(entry.part, merge.config()) {
                Some(heads) => {
                    to_gguf_rows(&values, heads, columns, &mut reordered);
                    writer.tensor(entry, &reordered)?;
                }
                None => writer.tensor(entry, &values)?,
            }
            done();
        }
        Ok(())
    })
}

/// Types and places of all tensors.
fn plan(config: &LlamaConfig, asked: BlockType) -> Vec<Entry> {
    let mut offset = 0;
    let entry = |part: Part| {
        let shape = part.shape(config);
        let (elements, columns) = (shape.iter().product(), shape.last().copied().unwrap_or(1));
        let wanted = match (part, asked) {
            (Part::Norm | Part::AttentionNorm(_) | Part::MlpNorm(_), _) => BlockType::F32,
            (Part::Embedding | Part::Head, BlockType::Q4_0) => BlockType::Q8_0,
            (_, asked) => asked,
        };
        // A float's block is one number, so this holds whatever the width is.
        let whole = wanted.bytes(elements, columns).map(|bytes| (wanted, bytes));
        let (block_type, bytes) = whole.unwrap_or((BlockType::F16, 2 * elements));
        let entry = Entry { part, block_type, shape, offset, bytes: bytes as u64 };
        offset += entry.bytes.next_multiple_of(ALIGNMENT);
        entry
    };
    Part::all(config).into_iter().map(entry).collect()
}

/// Everything in front of the data, up to its alignment.
fn header(pairs: &Pairs, entries: &[Entry]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    out.extend(pairs.count.to_le_bytes());
    out.extend(&pairs.bytes);
    for entry in entries {
        push_string(&mut out, &entry.part.gguf_name());
        out.extend((entry.shape.len() as u32).to_le_bytes());
        entry.shape.iter().rev().for_each(|&dim| out.extend((dim as u64).to_le_bytes()));
        out.extend(entry.block_type.number().to_le_bytes());
        out.extend(entry.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn chat_template(tokenizer: &Path) -> Option<String> {
    let bytes = fs::read(tokenizer.with_file_name("tokenizer_config.json")).ok()?;
    let config: Value = serde_json::from_slice(&bytes).ok()?;
    config["chat_template"].as_str().map(str::to_owned)
}

/// Key-value pairs as they will stand in the file.
#[derive(Default)]
struct Pairs {
    count: u64,
    bytes: Vec<u8>,
}

impl Pairs {
    fn begin(&mut self, key: &str, kind: u32) {
        self.count += 1;
        push_string(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn number(&mut self, key: &str, value: usize) {
        self.begin(key, kind::U32);
        self.bytes.extend((value as u32).to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f64) {
        self.begin(key, kind::F32);
        self.bytes.extend((value as f32).to_le_bytes());
    }

    fn flag(&mut self, key: &str, value: bool) {
        self.begin(key, kind::BOOL);
        self.bytes.push(u8::from(value));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.begin(key, kind::STRING);
        push_string(&mut self.bytes, value);
    }

    fn array<T>(&mut self, key: &str, kind: u32, values: &[T], mut push: impl FnMut(&mut Vec<u8>, &T)) {
        self.begin(key, kind::ARRAY);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| push(&mut self.bytes, value));
    }

    fn model(&mut self, config: &LlamaConfig, format: GgufFormat<'_>) {
        let file_type = match format.block_type {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::Q4_0 => 2,
            BlockType::Q8_0 => 7,
        };
        self.text("general.architecture", "llama");
        self.text("general.type", "model");
        self.text("general.name", format.name);
        self.number("general.file_type", file_type);
        self.number("general.quantization_version", 2);
        self.number("llama.vocab_size", config.vocab_size);
        self.number("llama.context_length", config.max_position_embeddings);
        self.number("llama.embedding_length", config.hidden_size);
        self.number("llama.block_count", config.num_hidden_layers);
        self.number("llama.feed_forward_length", config.intermediate_size);
        self.number("llama.attention.head_count", config.num_attention_heads);
        self.number("llama.attention.head_count_kv", config.num_key_value_heads);
        self.number("llama.attention.key_length", config.head_dim);
        self.number("llama.attention.value_length", config.head_dim);
        self.number("llama.rope.dimension_count", config.head_dim);
        self.float("llama.rope.freq_base", config.rope_theta);
        self.float("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps);
    }

    fn vocabulary(&mut self, vocabulary: &Vocabulary, chat_template: Option<&str>) {
        self.text("tokenizer.ggml.model", "llama");
        self.array("tokenizer.ggml.tokens", kind::STRING, &vocabulary.tokens, |out, token| {
            push_string(out, token);
        });
        self.array("tokenizer.ggml.scores", kind::F32, &vocabulary.scores, |out, score| {
            out.extend(score.to_le_bytes());
        });
        self.array("tokenizer.ggml.token_type", kind::I32, &vocabulary.types, |out, &kind| {
            out.extend((kind as i32).to_le_bytes());
        });
        self.number("tokenizer.ggml.bos_token_id", vocabulary.bos as usize);
        self.number("tokenizer.ggml.eos_token_id", vocabulary.eos as usize);
        if let Some(unknown) = vocabulary.unknown {
            self.number("tokenizer.ggml.unknown_token_id", unknown as usize);
        }
        self.flag("tokenizer.ggml.add_bos_token", vocabulary.adds_bos);
        self.flag("tokenizer.ggml.add_eos_token", false);
        self.flag("tokenizer.ggml.add_space_prefix", vocabulary.space_prefix);
        if let Some(template) = chat_template {
            self.text("tokenizer.chat_template", template);
        }
    }
}

struct TensorWriter<'a> {
    path: &'a Path,
    file: &'a mut dyn Write,
    scratch: Vec<u16>,
    bytes: Vec<u8>,
}

impl TensorWriter<'_> {
    fn tensor(&mut self, entry: &Entry, values: &[f32]) -> Result<(), WeightsError> {
        let fault = |source: std::io::Error| WeightsError::write(self.path, source);
        for (chunk, part) in values.chunks(CHUNK).enumerate() {
            if let Some(inside) = entry.block_type.encode(part, &mut self.scratch, &mut self.bytes) {
                let (index, value) = (chunk * CHUNK + inside, part[inside]);
                let kind = entry.block_type;
                let message = format!(
                    "element {index} is {value}, which {kind:?} does not hold: choose another --format"
                );
                return Err(unwritable(self.path, &entry.part.gguf_name(), message));
            }
            self.file.write_all(&self.bytes).map_err(fault)?;
        }
        let padding = entry.bytes.next_multiple_of(ALIGNMENT) - entry.bytes;
        self.file.write_all(&[0; ALIGNMENT as usize][..padding as usize]).map_err(fault)
    }
}
