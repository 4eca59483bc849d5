//! A tokenizer file's parts, read once and reduced to what this crate uses.
//!
//! Everything that a run could inherit unseen (truncation, padding, added tokens at the edges) is found here and
//! noted. It refuses decoders of other families instead of decoding them nearly right.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use crate::stream::Piece;
use crate::words::Words;
use crate::{TextError, TokenizerNote, sentencepiece};

/// Names of the special tokens, as the neighbouring files give them.
#[derive(Debug, Default)]
pub(crate) struct SpecialNames {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
}

/// A tokenizer ready for use.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) inner: HfTokenizer,
    pub(crate) words: Option<Words>,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) strips_first_space: bool,
    pub(crate) bos: u32,
    pub(crate) eos: u32,
    pub(crate) pad: Option<u32>,
    pub(crate) notes: Vec<TokenizerNote>,
}

/// Hugging Face's file before sentencepiece's, because it may hold tokens that were added later.
const FILES: [&str; 2] = ["tokenizer.json", "tokenizer.model"];

pub(crate) fn from_path(path: &Path) -> Result<Loaded, TextError> {
    if !path.is_dir() {
        return from_file(path);
    }
    match FILES.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
        Some(file) => from_file(&file),
        None => Err(TextError::NoTokenizer { path: path.to_owned() }),
    }
}

fn from_file(path: &Path) -> Result<Loaded, TextError> {
    let bytes = fs::read(path).map_err(|source| TextError::Io { path: path.to_owned(), source })?;
    let mut names = SpecialNames::default();
    for neighbour in ["tokenizer_config.json", "special_tokens_map.json"] {
        names.take_from(&path.with_file_name(neighbour))?;
    }
    let origin = path.display().to_string();
    if path.extension().is_none_or(|extension| extension != "model") {
        return from_bytes(&bytes, &origin, &names);
    }
    let added = added_tokens(&path.with_file_name("added_tokens.json"))?;
    Loaded::new(sentencepiece::tokenizer(&bytes, &added, &origin)?, &origin, &names)
}

/// Tokens by id, from the file in which Hugging Face keeps those that a `tokenizer.model` lacks, if there is one.
fn added_tokens(path: &Path) -> Result<BTreeMap<u64, String>, TextError> {
    let Ok(bytes) = fs::read(path) else {
        return Ok(BTreeMap::new());
    };
    let unusable = |message: String| TextError::Parse { origin: path.display().to_string(), message };
    let ids: BTreeMap<String, u64> =
        serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
    let mut tokens = BTreeMap::new();
    for (token, id) in ids {
        if let Some(other) = tokens.insert(id, token) {
            return Err(unusable(format!("`{other}` and `{}` are both {id}", tokens[&id])));
        }
    }
    Ok(tokens)
}

pub(crate) fn from_sentencepiece(bytes: &[u8], origin: &str) -> Result<Loaded, TextError> {
    let inner = sentencepiece::tokenizer(bytes, &BTreeMap::new(), origin)?;
    Loaded::new(inner, origin, &SpecialNames::default())
}

pub(crate) fn from_bytes(bytes: &[u8], origin: &str, names: &SpecialNames) -> Result<Loaded, TextError> {
    let inner = HfTokenizer::from_bytes(bytes)
        .map_err(|error| TextError::Parse { origin: origin.to_owned(), message: error.to_string() })?;
    Loaded::new(inner, origin, names)
}

impl SpecialNames {
    /// Fills what is still unknown from a file, if there is one.
    fn take_from(&mut self, path: &Path) -> Result<(), TextError> {
        let Ok(bytes) = fs::read(path) else {
            return Ok(());
        };
        let config: Value = serde_json::from_slice(&bytes).map_err(|error| TextError::Parse {
            origin: path.display().to_string(),
            message: error.to_string(),
        })?;
        let name = |key: &str| {
            let value = &config[key];
            value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
        };
        self.bos = self.bos.take().or_else(|| name("bos_token"));
        self.eos = self.eos.take().or_else(|| name("eos_token"));
        self.pad = self.pad.take().or_else(|| name("pad_token"));
        Ok(())
    }
}

impl Loaded {
    pub(crate) fn new(mut inner: HfTokenizer, origin: &str, names: &SpecialNames) -> Result<Self, TextError> {
        let find = |role, name: &Option<String>, usual: &str| {
            let token = name.clone().unwrap_or_else(|| usual.to_owned());
            inner.token_to_id(&token).ok_or(TextError::MissingToken {
                origin: origin.to_owned(),
                role,
                token,
            })
        };
        let bos = find("begin-of-sequence", &names.bos, "<s>")?;
        let eos = find("end-of-sequence", &names.eos, "</s>")?;
        let pad = names.pad.as_ref().and_then(|name| inner.token_to_id(name));
        let decoding = Decoding::new(&inner, origin)?;
        let pieces = decoding.pieces(&inner);
        let notes = correct(&mut inner, bos, eos, pad)?;
        Ok(Self {
            words: Words::new(&inner),
            pieces,
            strips_first_space: decoding.strips_first_space,
            bos,
            eos,
            pad,
            notes,
            inner,
        })
    }
}

/// Drops what must not be inherited, and says what it was.
fn correct(
    inner: &mut HfTokenizer,
    bos: u32,
    eos: u32,
    pad: Option<u32>,
) -> Result<Vec<TokenizerNote>, TextError> {
    let fault = |error: tokenizers::Error| TextError::Encode(error.to_string());
    let mut notes = Vec::new();
    if let Some(truncation) = inner.get_truncation() {
        notes.push(TokenizerNote::TruncationIgnored { max_length: truncation.max_length });
    }
    if inner.get_padding().is_some() {
        notes.push(TokenizerNote::PaddingIgnored);
    }
    inner.with_truncation(None).map_err(fault)?;
    inner.with_padding(None);
    inner.set_encode_special_tokens(true);
    if pad == Some(eos) {
        notes.push(TokenizerNote::PadIsEos);
    }
    let sample = inner.encode_fast("a", true).map_err(fault)?;
    if sample.get_ids().first() == Some(&bos) {
        notes.push(TokenizerNote::AddsBos);
    }
    if sample.get_ids().last() == Some(&eos) {
        notes.push(TokenizerNote::AddsEos);
    }
    Ok(notes)
}

/// The decoder of the file, reduced to the two things in which Llama tokenizers differ.
struct Decoding {
    marks_spaces: bool,
    strips_first_space: bool,
}

impl Decoding {
    fn new(inner: &HfTokenizer, origin: &str) -> Result<Self, TextError> {
        let value = inner.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok());
        let steps = match &value {
            Some(value) if value["type"] == "Sequence" => {
                value["decoders"].as_array().cloned().unwrap_or_default()
            }
            Some(value) => vec![value.clone()],
            None => vec![Value::Null],
        };
        let mut decoding = Self { marks_spaces: false, strips_first_space: false };
        for step in steps {
            match step["type"].as_str().unwrap_or("none") {
                "Replace" if step["pattern"]["String"] == "▁" && step["content"] == " " => {
                    decoding.marks_spaces = true;
                }
                "ByteFallback" | "Fuse" => {}
                "Strip" if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => {
                    decoding.strips_first_space = true;
                }
                other => {
                    let step = other.to_owned();
                    return Err(TextError::UnsupportedDecoder { origin: origin.to_owned(), step });
                }
            }
        }
        Ok(decoding)
    }

    /// One piece per id from 0 to the largest.
    fn pieces(&self, inner: &HfTokenizer) -> Vec<Piece> {
        let added = inner.get_added_tokens_decoder();
        let vocab = inner.get_vocab(true);
        let rows = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let mut pieces = vec![Piece::Silent; rows];
        for (token, id) in vocab {
            let special = added.get(&id).is_some_and(|token| token.special);
            pieces[id as usize] = Piece::new(&token, special, self.marks_spaces);
        }
        pieces
    }
}

/// The first 259 ids of every Llama vocabulary.
pub(crate) fn reserved_tokens() -> impl Iterator<Item = String> {
    let bytes = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>"));
    ["<unk>", "<s>", "</s>"].into_iter().map(str::to_owned).chain(bytes)
}

/// Single bytes, spaces as they are.
pub(crate) fn byte_level() -> HfTokenizer {
    let vocab: Vocab = reserved_tokens().zip(0..).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, Vec::new())
        .unk_token("<unk>".into())
        .byte_fallback(true)
        .build()
        .expect("the vocabulary holds its unknown token");
    let mut inner = HfTokenizer::new(model);
    inner.with_decoder(Some(Decoders::new(vec![ByteFallback::new().into(), Fuse::new().into()])));
    add_specials(&mut inner);
    inner
}

/// Llama's normalizer, decoder and post-processor around a model.
pub(crate) fn llama_style(model: BPE) -> tokenizers::Result<HfTokenizer> {
    let mut inner = HfTokenizer::new(model);
    inner.with_normalizer(Some(Normalizers::new(vec![
        Prepend::new("▁".into()).into(),
        Replace::new(" ", "▁")?.into(),
    ])));
    inner.with_decoder(Some(Decoders::new(vec![
        Replace::new("▁", " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
        Strip::new(' ', 1, 0).into(),
    ])));
    add_specials(&mut inner);
    let post_processor = TemplateProcessing::builder()
        .try_single("<s> $A")?
        .try_pair("<s> $A <s> $B")?
        .special_tokens(vec![("<s>", 1)])
        .build()?;
    inner.with_post_processor(Some(post_processor));
    Ok(inner)
}

fn add_specials(inner: &mut HfTokenizer) {
    let tokens = ["<unk>", "<s>", "</s>"].map(|token| AddedToken::from(token, true));
    inner.add_special_tokens(&tokens);
}
