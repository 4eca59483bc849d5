//! GGUF files as they are written, as llama.cpp describes them, and as an attacker would make them.

use std::fs;
use std::ops::Range;
use std::path::Path;

use buzzer_model::LlamaConfig;
use buzzer_weights::{
    BlockType, FloatType, Gguf, GgufFormat, Merge, Metadata, Quantization, WeightsError, write_gguf,
};
use serde_json::Value;

use crate::load::{load, small, written};
use crate::merge::tokenizer;
use crate::support::expect;

fn open(bytes: &[u8]) -> Result<Gguf, WeightsError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    fs::write(&path, bytes).unwrap();
    Gguf::open(&path, "--model")
}

fn written_gguf(block_type: BlockType) -> Vec<u8> {
    let base = written(&small(&LlamaConfig::new(1024, 32, 48, 1, 4, 2, 8)), FloatType::F32);
    let merge = Merge::open(base.path(), None, Quantization::None).unwrap();
    let (path, tokenizer) = (base.path().join("x.gguf"), tokenizer());
    let format = GgufFormat { block_type, tokenizer: &tokenizer, name: "a name" };
    write_gguf(&path, &merge, format, || {}).unwrap();
    fs::read(path).unwrap()
}

/// The type of a list's elements, their number, and the bytes from the first on: lists are written here and read by llama.cpp.
fn list<'a>(bytes: &'a [u8], key: &str) -> (u32, usize, &'a [u8]) {
    let place = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
    let (head, elements) = bytes[place + key.len()..].split_at(16);
    let number = |range: Range<usize>| u32::from_le_bytes(head[range].try_into().unwrap());
    assert_eq!(number(0..4), 9, "`{key}` is no list");
    (number(4..8), number(8..12) as usize, elements)
}

fn texts(bytes: &[u8], key: &str) -> Vec<String> {
    let (kind, length, mut rest) = list(bytes, key);
    assert_eq!(kind, 8, "`{key}` is no list of texts");
    let text = |_| {
        let (size, behind) = rest.split_first_chunk().unwrap();
        let (text, behind) = behind.split_at(u64::from_le_bytes(*size) as usize);
        rest = behind;
        String::from_utf8(text.to_vec()).unwrap()
    };
    (0..length).map(text).collect()
}

fn numbers(bytes: &[u8], key: &str) -> Vec<f32> {
    let (kind, length, elements) = list(bytes, key);
    assert_eq!(kind, 6, "`{key}` is no list of f32");
    elements.as_chunks().0[..length].iter().map(|&number| f32::from_le_bytes(number)).collect()
}

#[test]
fn a_written_file_says_what_llama_cpp_asks() {
    let bytes = written_gguf(BlockType::Q4_0);
    let file = open(&bytes).unwrap();
    let text = |text: &str| Some(Metadata::Text(text.into()));
    let number = |number: i128| Some(Metadata::Integer(number));
    let get = |key: &str| file.get(key).cloned();
    assert_eq!(get("general.architecture"), text("llama"));
    assert_eq!(get("general.name"), text("a name"));
    assert_eq!(get("general.file_type"), number(2));
    assert_eq!(get("llama.attention.head_count_kv"), number(2));
    assert_eq!(get("llama.rope.dimension_count"), number(8));
    assert_eq!(get("tokenizer.ggml.model"), text("llama"));
    assert_eq!(
        (get("tokenizer.ggml.bos_token_id"), get("tokenizer.ggml.eos_token_id")),
        (number(1), number(2))
    );
    assert_eq!(get("tokenizer.ggml.add_space_prefix"), Some(Metadata::Bool(true)));

    let tokens = texts(&bytes, "tokenizer.ggml.tokens");
    let scores = numbers(&bytes, "tokenizer.ggml.scores");
    let tokenizer: Value = serde_json::from_slice(&fs::read(tokenizer()).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    assert_eq!((tokens.len(), scores.len()), (1024, 1024));
    assert!(vocab.iter().all(|(token, id)| tokens[id.as_u64().unwrap() as usize] == *token));
    // Merges come in the order of their scores.
    let merges = tokenizer["model"]["merges"].as_array().unwrap();
    let joint = |merge: &Value| format!("{}{}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
    let score = |merge: &Value| scores[vocab[&joint(merge)].as_u64().unwrap() as usize];
    assert!(merges.windows(2).all(|pair| score(&pair[0]) > score(&pair[1])));
    assert_eq!(get("tokenizer.ggml.tokens"), Some(Metadata::List { length: 1024 }));

    assert_eq!(file.names().len(), 12);
    let kinds = ["token_embd", "output", "output_norm", "blk.0.attn_q", "blk.0.ffn_down"]
        .map(|name| file.tensor(&format!("{name}.weight")).unwrap());
    let expected: [(BlockType, &[usize]); 5] = [
        (BlockType::Q8_0, &[1024, 32]),
        (BlockType::Q8_0, &[1024, 32]),
        (BlockType::F32, &[32]),
        (BlockType::Q4_0, &[32, 32]),
        // 48 numbers a row are no whole blocks.
        (BlockType::F16, &[32, 48]),
    ];
    assert_eq!(kinds, expected);
}

/// Written by llama.cpp's own package, see `forms/gguf/generate.py`.
#[test]
fn a_file_of_llama_cpps_own_writer_is_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/weights/forms/gguf/model.gguf");
    let file = Gguf::open(&path, "--model").unwrap();
    let config = LlamaConfig::new(12, 32, 64, 1, 4, 2, 8).with_max_position_embeddings(128);
    assert_eq!(file.config().unwrap(), config.with_rms_norm_eps(1e-5));
    assert_eq!(file.get("tokenizer.ggml.tokens"), Some(&Metadata::List { length: 12 }));
    let (mut values, mut kinds) = (Vec::new(), Vec::new());
    for name in file.names() {
        let (kind, shape) = file.tensor(name).unwrap();
        file.read_f32_into(name, shape, &mut values).unwrap();
        // Half a step of the scale, which is 1 / 127; of 1 / 8, and a whole step where +1 is out of reach.
        let bound = match kind {
            BlockType::F32 | BlockType::F16 => 0.0,
            BlockType::Q8_0 => 0.5 / 127.0 + 1e-3,
            BlockType::Q4_0 => 0.125,
        };
        let expected = |place: usize| ((place * 7 % 17) as f32 - 8.0) / 8.0;
        for (place, value) in values.iter().enumerate() {
            assert!((value - expected(place)).abs() <= bound, "{name}: {value} at {place}");
        }
        kinds.push(kind);
    }
    let all = [BlockType::F32, BlockType::F16, BlockType::Q8_0, BlockType::Q4_0];
    assert!(all.iter().all(|kind| kinds.contains(kind)));
    assert!(load(&path, Quantization::Nf4Double).is_ok());
}

#[test]
fn every_cut_is_refused_and_no_changed_byte_panics() {
    let whole = written_gguf(BlockType::Q8_0);
    let data = whole.len() - 80_000;
    for end in (0..data.min(2_000)).chain((data..whole.len()).step_by(997)) {
        assert!(open(&whole[..end]).is_err(), "cut at {end}");
    }
    let mut values = Vec::new();
    for place in 0..1_200 {
        for byte in [0, 1, 0x7F, 0xFF] {
            let mut bytes = whole.clone();
            bytes[place] = byte;
            let Ok(file) = open(&bytes) else { continue };
            let names: Vec<String> = file.names().map(str::to_owned).collect();
            for name in names {
                let shape = file.tensor(&name).unwrap().1.to_vec();
                // The temporary file is gone from its folder but still open, so this reads what is there.
                let _ = file.read_f32_into(&name, &shape, &mut values);
            }
        }
    }
}

/// A header made by hand.
struct Raw(Vec<u8>);

impl Raw {
    fn new(tensors: u64, pairs: u64) -> Self {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(pairs.to_le_bytes());
        Self(bytes)
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(self, text: &str) -> Self {
        let mut this = self.u64(text.len() as u64);
        this.0.extend(text.as_bytes());
        this
    }

    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let this = self.text(name).u32(dims.len() as u32);
        dims.iter().fold(this, |this, &dim| this.u64(dim)).u32(kind).u64(offset)
    }

    fn data(mut self, bytes: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32) + bytes, 0);
        self.0
    }
}

#[test]
fn hostile_headers_are_refused() {
    let huge = u64::MAX;
    let cases: [(Vec<u8>, &str); 20] = [
        (b"GGUX".to_vec(), "does not begin with GGUF"),
        (b"GG".to_vec(), "does not begin with GGUF"),
        (Raw(b"GGUF".to_vec()).u32(1).0, "version is 0x1"),
        (Raw(b"GGUF".to_vec()).u32(0x0300_0000).0, "little-endian"),
        (Raw::new(huge, 0).0, "more than any model"),
        (Raw::new(0, huge).0, "more than any model"),
        (Raw::new(0, 1).0, "asks for 8 more"),
        (Raw::new(0, 1).u64(huge).0, "asks for 18446744073709551615 more"),
        (Raw::new(0, 1).u64(1 << 40).0, "asks for 1099511627776 more"),
        (Raw::new(0, 1).text("a").u32(13).0, "unknown type 13"),
        (Raw::new(0, 1).text("a").u32(9).u32(9).u64(1).0, "elements of the type 9"),
        (Raw::new(0, 1).text("a").u32(9).u32(8).u64(huge).0, "asks for 8 more"),
        (Raw::new(0, 1).text("a").u32(9).u32(10).u64(huge).0, "asks for 18446744073709551615 more"),
        (Raw::new(0, 2).text("a").u32(4).u32(1).text("a").u32(4).u32(1).0, "`a` stands in it twice"),
        (Raw::new(1, 0).text("t").u32(9).0, "9 dimensions"),
        (Raw::new(1, 0).tensor("t", &[1 << 40, 1 << 40], 0, 0).0, "none that F32 can have"),
        (Raw::new(1, 0).tensor("t", &[33], 8, 0).0, "none that Q8_0 can have"),
        (Raw::new(1, 0).tensor("t", &[32], 14, 0).0, "ggml's type 14"),
        (Raw::new(1, 0).tensor("t", &[32], 0, 0).data(127), "past the end"),
        (Raw::new(1, 0).tensor("t", &[8], 0, huge - 31).data(32), "past the end"),
    ];
    for (bytes, piece) in cases {
        expect(open(&bytes), &["x.gguf", "--model", piece]);
    }
    let two = |name: &str, offset: u64| {
        Raw::new(2, 0).tensor("a", &[16], 0, 0).tensor(name, &[8], 0, offset).data(128)
    };
    assert!(open(&two("b", 64)).is_ok());
    expect(open(&two("a", 64)), &["`a`", "twice"]);
    expect(open(&two("b", 32)), &["`b`", "lie on another"]);
    expect(open(&two("b", 65)), &["`b`", "not aligned"]);
    let aligned = Raw::new(0, 1).text("general.alignment").u32(4).u32(12).0;
    expect(open(&aligned), &["alignment"]);
    let sizes = [("head_count", 4), ("key_length", 1 << 19)];
    let wide = Raw::new(0, 4).text("general.architecture").u32(8).text("llama");
    let wide = wide.text("llama.embedding_length").u32(4).u32(32);
    let wide = sizes
        .iter()
        .fold(wide, |raw, (key, size)| raw.text(&format!("llama.attention.{key}")).u32(4).u32(*size));
    expect(open(&wide.0).unwrap().config(), &["x.gguf", "4 heads", "too wide"]);
    expect(Gguf::open(Path::new("/dev/null"), "--model"), &["no regular file"]);
}

#[test]
fn other_models_are_refused_by_what_they_are() {
    let whole = written_gguf(BlockType::F16);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let refused = |from: &[u8], to: &[u8], piece: &str| {
        assert_eq!(from.len(), to.len());
        let place = whole.windows(from.len()).position(|window| window == from).unwrap();
        let mut bytes = whole.clone();
        bytes[place..][..to.len()].copy_from_slice(to);
        fs::write(&path, bytes).unwrap();
        expect(load(&path, Quantization::None), &["x.gguf", piece]);
    };
    refused(b"\x05\0\0\0\0\0\0\0llama\x0c", b"\x05\0\0\0\0\0\0\0qwen2\x0c", "qwen2");
    refused(b"llama.block_count", b"llama.block_cnunt", "llama.block_count");
    refused(b"rope.dimension_count\x04\0\0\0\x08", b"rope.dimension_count\x04\0\0\0\x04", "heads are 8 wide");
    refused(b"head_count_kv\x04\0\0\0\x02", b"head_count_kv\x04\0\0\0\x03", "4 heads over 3");
    refused(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", "blk.0.attn_q.weight");
    refused(b"feed_forward_length\x04\0\0\0\x30", b"feed_forward_length\x04\0\0\0\x20", "[48, 32]");
    let last = whole.len() - 2;
    let mut bytes = whole.clone();
    bytes[last..].copy_from_slice(&[0xFF, 0x7F]);
    fs::write(&path, bytes).unwrap();
    expect(load(&path, Quantization::None), &["x.gguf", "output.weight", "NaN"]);
}
