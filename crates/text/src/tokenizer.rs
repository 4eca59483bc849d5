//! The tokenizer: a Hugging Face `tokenizer.json` or a `tokenizer.model`, stripped of what a trainer must not inherit.
//!
//! Files in circulation carry a truncation (at 512 tokens in one popular copy), a padding rule, or a post-processor
//! that adds BOS a second time. All are dropped here and named in [`Tokenizer::notes`]. Begin and end tokens are added
//! by [`crate::Renderer`] alone, and literal special tokens inside a text are plain text. A clone is cheap: all clones
//! share one vocabulary and one word table.

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer as HfTokenizer};

use crate::TextError;
use crate::load::{self, Loaded};
use crate::stream::{Piece, StreamDecoder};
use crate::words::Words;

/// Something found in a tokenizer's files and put right, for the user to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenizerNote {
    /// The file would cut every text at this many tokens; it does not here.
    TruncationIgnored {
        /// The file's limit in tokens.
        max_length: usize,
    },
    /// The file would pad texts; it does not here.
    PaddingIgnored,
    /// The padding token is the end token: padding must be masked by place, never by id.
    PadIsEos,
    /// The file adds the begin token itself; here only the renderer does.
    AddsBos,
    /// The file adds the end token itself; here only the renderer does.
    AddsEos,
}

impl fmt::Display for TokenizerNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TruncationIgnored { max_length } => {
                write!(f, "the file's truncation at {max_length} tokens is ignored")
            }
            Self::PaddingIgnored => f.write_str("the file's padding is ignored"),
            Self::PadIsEos => f.write_str("the padding token is the end token; padding is masked by place"),
            Self::AddsBos => f.write_str("the file adds the begin token; only the renderer adds it here"),
            Self::AddsEos => f.write_str("the file adds the end token; only the renderer adds it here"),
        }
    }
}

/// Text to ids and back, without special tokens.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Loaded>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("notes", &self.notes())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Opens a `tokenizer.json`, a `tokenizer.model` (sentencepiece's, told by its ending), or whichever of the two is in
    /// a folder, the first one first, with the special tokens that its neighbours `tokenizer_config.json` and
    /// `special_tokens_map.json` name, and for a `tokenizer.model` those of `added_tokens.json`.
    ///
    /// # Errors
    /// If a file cannot be read or is no tokenizer, if it is not of Llama 2's kind, or if there is no begin or end token.
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        load::from_path(path).map(Self::from)
    }

    /// A `tokenizer.model` in memory.
    ///
    /// # Errors
    /// As [`Self::from_file`], less the reading.
    pub fn from_sentencepiece(bytes: &[u8]) -> Result<Self, TextError> {
        load::from_sentencepiece(bytes, "bytes").map(Self::from)
    }

    /// A `tokenizer.json` in memory; begin and end are `<s>` and `</s>`.
    ///
    /// # Errors
    /// As [`Self::from_file`], less the reading.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TextError> {
        load::from_bytes(bytes, "bytes", &load::SpecialNames::default()).map(Self::from)
    }

    /// A tokenizer of single bytes for tests: `<unk>`, `<s>`, `</s>`, then byte `b` as id `3 + b`; 259 ids.
    ///
    /// # Panics
    /// Never: its parts are fixed.
    #[must_use]
    pub fn byte_level_test() -> Self {
        let inner = load::byte_level();
        Self::from(
            Loaded::new(inner, "bytes", &load::SpecialNames::default())
                .expect("the byte tokenizer has begin, end and a known decoder"),
        )
    }

    /// Trains byte-pair merges on texts in the shape of Llama 2's tokenizer: spaces as `▁`, unknown characters as
    /// bytes, no piece across two words or across letters and signs, at most 12 characters a piece.
    ///
    /// # Errors
    /// If `vocab_size` does not hold the 3 special tokens, the 256 bytes and every character of the texts.
    pub fn train_llama_style<'a>(
        texts: impl Iterator<Item = &'a str>,
        vocab_size: usize,
    ) -> Result<Self, TextError> {
        let inner = train(texts.collect(), vocab_size)
            .map_err(|error| TextError::Train { vocab_size, message: error.to_string() })?;
        let tokenizer = Self::from(Loaded::new(inner, "trained", &load::SpecialNames::default())?);
        if tokenizer.vocab_size() > vocab_size {
            let message = format!(
                "the texts' characters alone need {}; ask for at least that many",
                tokenizer.vocab_size()
            );
            return Err(TextError::Train { vocab_size, message });
        }
        Ok(tokenizer)
    }

    /// Writes a `tokenizer.json`. It appears whole or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TextError> {
        let text = self.shared.inner.to_string(true).map_err(|error| TextError::Parse {
            origin: path.display().to_string(),
            message: error.to_string(),
        })?;
        write_whole(path, text.as_bytes()).map_err(|source| TextError::Io { path: path.to_owned(), source })
    }

    /// The largest id plus one: rows that a model's embedding needs.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.shared.pieces.len()
    }

    /// Begin of sequence.
    #[must_use]
    pub fn bos_id(&self) -> u32 {
        self.shared.bos
    }

    /// End of sequence.
    #[must_use]
    pub fn eos_id(&self) -> u32 {
        self.shared.eos
    }

    /// The padding token, if the files name one. Batches here are padded by place and do not need it.
    #[must_use]
    pub fn pad_id(&self) -> Option<u32> {
        self.shared.pad
    }

    /// What the files held that was put right.
    #[must_use]
    pub fn notes(&self) -> &[TokenizerNote] {
        &self.shared.notes
    }

    /// The token of an id as the vocabulary spells it.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.shared.inner.id_to_token(id)
    }

    /// Checks that every id this tokenizer can produce has a row in the model.
    ///
    /// # Errors
    /// If `model_vocab` is smaller than [`Self::vocab_size`].
    pub fn check_vocab(&self, model_vocab: usize) -> Result<(), TextError> {
        let tokenizer = self.vocab_size();
        if tokenizer > model_vocab {
            return Err(TextError::VocabTooLarge { max_id: tokenizer - 1, tokenizer, model: model_vocab });
        }
        Ok(())
    }

    /// The ids of a text, with no special token added and none recognised inside.
    ///
    /// # Errors
    /// If the tokenizer file is inconsistent.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let Some(words) = self.words() else {
            return self.encode_in_one_piece(text);
        };
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        words.with_table(|table| words.encode(self.inner(), table, text, &mut ids))?;
        Ok(ids)
    }

    /// The text of ids, special tokens and unknown ids left out. See [`StreamDecoder`] for invalid bytes.
    ///
    /// # Errors
    /// None today; a tokenizer of another kind may need it.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        let mut decoder = StreamDecoder::new(self);
        let mut out = String::new();
        ids.iter().for_each(|&id| decoder.write(id, &mut out));
        decoder.write_end(&mut out);
        Ok(out)
    }

    pub(crate) fn encode_in_one_piece(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.inner()
            .encode_fast(text, false)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TextError::Encode(error.to_string()))
    }

    pub(crate) fn inner(&self) -> &HfTokenizer {
        &self.shared.inner
    }

    pub(crate) fn words(&self) -> Option<&Words> {
        self.shared.words.as_ref()
    }

    pub(crate) fn piece(&self, id: u32) -> &Piece {
        self.shared.pieces.get(id as usize).unwrap_or(&Piece::Silent)
    }

    pub(crate) fn strips_first_space(&self) -> bool {
        self.shared.strips_first_space
    }
}

impl From<Loaded> for Tokenizer {
    fn from(loaded: Loaded) -> Self {
        Self { shared: Arc::new(loaded) }
    }
}

/// The recipe of Hugging Face's Llama conversion. Words are split for training only.
fn train(texts: Vec<&str>, vocab_size: usize) -> tokenizers::Result<HfTokenizer> {
    let model = BPE::builder().unk_token("<unk>".into()).byte_fallback(true).fuse_unk(true).build()?;
    let mut inner = HfTokenizer::new(model);
    inner.with_normalizer(Some(Normalizers::new(vec![
        Prepend::new("▁".into()).into(),
        Replace::new(" ", "▁")?.into(),
    ])));
    // Letters and signs never merge, so a word has the same tokens before a full stop as before nothing.
    let words = SplitPattern::Regex(r"▁?[\p{L}\p{N}]+|▁?[^\p{L}\p{N}▁]+|▁".into());
    inner.with_pre_tokenizer(Some(Split::new(words, SplitDelimiterBehavior::Isolated, false)?));
    let reserved = load::reserved_tokens().map(|token| AddedToken::from(token, true)).collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .special_tokens(reserved)
        .max_token_length(Some(12))
        .build();
    inner.train(&mut TrainerWrapper::from(trainer), texts.into_iter())?;
    // The trainer registers the bytes as special tokens, which decoding would leave out; so only its model is kept.
    let ModelWrapper::BPE(model) = inner.get_model().clone() else {
        return Err("the trainer returned another kind of model".into());
    };
    load::llama_style(model)
}

fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary: PathBuf = path.with_file_name(name);
    let mut file = fs::File::create(&temporary)?;
    let written =
        file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        fs::remove_file(&temporary).ok();
    }
    written
}
