//! Tokenizing word by word, exactly, with every word met before answered from a table.
//!
//! Byte-pair merges of two stretches of text are independent if no piece of the vocabulary spans their border. In
//! Llama 2's vocabulary no piece has a `▁` after another character, so a text falls apart before every run of spaces
//! and the result is identical to tokenizing it in one piece. This is checked against the vocabulary when the file is
//! loaded; a tokenizer that fails the check goes the slow way, in one piece. It trades a few megabytes of table for
//! most of the time (a clue file repeats its words), and refuses to guess: dropout, unknown tokens, merge-skipping and
//! added words all send the tokenizer the slow way.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use serde_json::json;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::{Model, Tokenizer as HfTokenizer};

use crate::TextError;

/// What stands for a space in Llama's pieces.
pub(crate) const SPACE_MARK: char = '▁';

const SPACE_MARK_BYTES: [u8; 3] = [0xE2, 0x96, 0x81];
/// Longer words are tokenized each time: they are rare, and a table must not keep whole texts.
const LONGEST_KEPT_WORD: usize = 48;
/// A table that reaches this many words starts again, which bounds it to some 40 MB.
const MOST_KEPT_WORDS: usize = 1 << 19;

/// The exact word-by-word tokenizer, when the vocabulary allows one.
#[derive(Debug)]
pub(crate) struct Words {
    /// Whether the file's normalizer writes spaces as `▁` and puts one in front.
    marks_spaces: bool,
    /// Tables at rest; each running thread takes one.
    tables: Mutex<Vec<WordTable>>,
}

/// Word to ids, all ids in one vector.
#[derive(Debug, Default)]
pub(crate) struct WordTable {
    places: HashMap<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
    first: String,
}

impl Words {
    /// Decides from the tokenizer's parts whether words may be tokenized alone.
    pub(crate) fn new(inner: &HfTokenizer) -> Option<Self> {
        let ModelWrapper::BPE(bpe) = inner.get_model() else {
            return None;
        };
        let marks_spaces = space_rule(inner)?;
        let separator = if marks_spaces { SPACE_MARK } else { ' ' };
        let only_special_words = inner.get_added_tokens_decoder().values().all(|token| token.special);
        let allowed = inner.get_pre_tokenizer().is_none()
            && only_special_words
            && merges_plainly(bpe)
            && bpe.get_vocab().keys().all(|piece| !spans_words(piece, separator));
        allowed.then(|| Self { marks_spaces, tables: Mutex::default() })
    }

    /// Runs `work` with a table that no other thread uses.
    pub(crate) fn with_table<T>(&self, work: impl FnOnce(&mut WordTable) -> T) -> T {
        let taken = self.tables.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut table = taken.unwrap_or_default();
        let result = work(&mut table);
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).push(table);
        result
    }

    /// Appends the ids of a whole text.
    pub(crate) fn encode(
        &self,
        inner: &HfTokenizer,
        table: &mut WordTable,
        text: &str,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        if text.is_empty() || !self.marks_spaces {
            return self.encode_rest(inner, table, text, ids);
        }
        let mut ends = Ends::new(text);
        let end = ends.next().unwrap_or(text.len());
        let mut first = std::mem::take(&mut table.first);
        first.clear();
        first.push(' ');
        first.push_str(&text[..end]);
        let result = self.word(inner, table, &first, ids);
        table.first = first;
        result?;
        self.encode_rest(inner, table, &text[end..], ids)
    }

    /// Appends the ids of a text that continues another one at a word's beginning.
    pub(crate) fn encode_rest(
        &self,
        inner: &HfTokenizer,
        table: &mut WordTable,
        text: &str,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let mut start = 0;
        for end in Ends::new(text) {
            self.word(inner, table, &text[start..end], ids)?;
            start = end;
        }
        Ok(())
    }

    fn word(
        &self,
        inner: &HfTokenizer,
        table: &mut WordTable,
        word: &str,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        if let Some(&(start, end)) = table.places.get(word) {
            ids.extend_from_slice(&table.ids[start as usize..end as usize]);
            return Ok(());
        }
        let marked;
        let normal = if self.marks_spaces && word.contains(' ') {
            marked = word.replace(' ', "▁");
            &marked
        } else {
            word
        };
        let tokens =
            inner.get_model().tokenize(normal).map_err(|error| TextError::Encode(error.to_string()))?;
        let from = ids.len();
        ids.extend(tokens.iter().map(|token| token.id));
        if word.len() <= LONGEST_KEPT_WORD {
            table.keep(word, &ids[from..]);
        }
        Ok(())
    }
}

impl WordTable {
    fn keep(&mut self, word: &str, ids: &[u32]) {
        if self.places.len() >= MOST_KEPT_WORDS {
            self.places.clear();
            self.ids.clear();
        }
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.places.insert(word.into(), (start, self.ids.len() as u32));
    }
}

/// `Some(true)` for Llama's normalizer, `Some(false)` for none, `None` for any other.
fn space_rule(inner: &HfTokenizer) -> Option<bool> {
    let Some(normalizer) = inner.get_normalizer() else {
        return Some(false);
    };
    let llama = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    (serde_json::to_value(normalizer).ok()? == llama).then_some(true)
}

/// Whether merging depends on nothing but the characters: no dropout, no affixes, no unknown token to fuse.
fn merges_plainly(bpe: &BPE) -> bool {
    let vocab = bpe.get_vocab();
    let all_bytes = (0..=255_u8).all(|byte| vocab.contains_key(&format!("<0x{byte:02X}>")));
    bpe.dropout.is_none_or(|rate| rate == 0.0)
        && bpe.continuing_subword_prefix.is_none()
        && bpe.end_of_word_suffix.is_none()
        && bpe.byte_fallback
        && all_bytes
        && !bpe.ignore_merges
}

/// Whether a piece has a separator after another character.
fn spans_words(piece: &str, separator: char) -> bool {
    piece.trim_start_matches(separator).contains(separator)
}

/// The ends of a text's words. A word is a run of spaces (or `▁`) and the characters up to the next run.
struct Ends<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Ends<'a> {
    fn new(text: &'a str) -> Self {
        Self { bytes: text.as_bytes(), at: 0 }
    }

    /// Length of the separator at `at`, or 0.
    fn separator(&self, at: usize) -> usize {
        match self.bytes[at] {
            b' ' => 1,
            0xE2 if self.bytes[at..].starts_with(&SPACE_MARK_BYTES) => 3,
            _ => 0,
        }
    }
}

impl Iterator for Ends<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let len = self.bytes.len();
        if self.at >= len {
            return None;
        }
        while self.at < len {
            match self.separator(self.at) {
                0 => break,
                width => self.at += width,
            }
        }
        while self.at < len && self.separator(self.at) == 0 {
            self.at += 1;
        }
        Some(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_end_where_the_next_run_of_spaces_begins() {
        let ends = |text| Ends::new(text).collect::<Vec<_>>();
        assert!(ends("").is_empty());
        assert_eq!(ends("ab"), [2]);
        assert_eq!(ends("ab  cd "), [2, 6, 7]);
        assert_eq!(ends("  ab"), [4]);
        assert_eq!(ends("é▁é"), [2, 7]);
    }

    #[test]
    fn a_piece_spans_words_if_a_space_follows_something() {
        assert!(!spans_words("▁the", '▁'));
        assert!(!spans_words("▁▁▁▁", '▁'));
        assert!(spans_words("of▁the", '▁'));
        assert!(spans_words("▁of▁", '▁'));
    }
}
