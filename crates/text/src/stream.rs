//! Decoding, one token at a time.
//!
//! A byte-fallback token may be a third of a character, so bytes wait until their character is complete: never more
//! than three, whatever the length of the text. [`Tokenizer::decode`] runs through here too, so a stream's parts add
//! up to the whole by construction. It agrees with Hugging Face's decoder except where a run of byte tokens is no
//! valid UTF-8: there the valid characters stay and only each stray byte becomes U+FFFD, while Hugging Face replaces
//! the whole run, which could not be streamed.

use crate::words::SPACE_MARK;
use crate::{TextError, Tokenizer};

/// What one id decodes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Plain text, spaces already in place of `▁`.
    Text(Box<str>),
    /// One byte of a character.
    Byte(u8),
    /// A special token, or an id that the vocabulary leaves out: no text.
    Silent,
}

impl Piece {
    /// A vocabulary entry as the decoder steps of a Llama tokenizer see it.
    pub(crate) fn new(token: &str, special: bool, marks_spaces: bool) -> Self {
        if special {
            return Self::Silent;
        }
        if let Some(byte) = fallback_byte(token) {
            return Self::Byte(byte);
        }
        let text = if marks_spaces { token.replace(SPACE_MARK, " ") } else { token.to_owned() };
        Self::Text(text.into())
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// Turns ids into text as they come, never half a character at a time.
///
/// The first space of the text is dropped, as the tokenizer added it. Cost per token is constant.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// The bytes of an unfinished character.
    bytes: Vec<u8>,
    /// Whether any text came out yet, counting a dropped space.
    started: bool,
}

impl StreamDecoder {
    /// A decoder at the beginning of a text.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self { tokenizer: tokenizer.clone(), bytes: Vec::with_capacity(4), started: false }
    }

    /// Takes one id; returns the text that it completes, if it completes any.
    ///
    /// Special tokens and ids outside the vocabulary have no text.
    ///
    /// # Errors
    /// None today; a tokenizer of another kind may need it.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TextError> {
        let mut out = String::new();
        self.write(id, &mut out);
        Ok((!out.is_empty()).then_some(out))
    }

    /// Ends the text: an unfinished character comes out as one U+FFFD for each of its bytes.
    ///
    /// # Errors
    /// None today; a tokenizer of another kind may need it.
    pub fn finish(&mut self) -> Result<String, TextError> {
        let mut out = String::new();
        self.write_end(&mut out);
        self.started = false;
        Ok(out)
    }

    /// [`Self::push`] into a text at hand.
    pub(crate) fn write(&mut self, id: u32, out: &mut String) {
        let tokenizer = self.tokenizer.clone();
        match tokenizer.piece(id) {
            Piece::Silent => {}
            Piece::Byte(byte) => {
                self.bytes.push(*byte);
                self.write_whole_characters(out);
            }
            Piece::Text(text) => {
                self.write_end(out);
                self.write_text(text, out);
            }
        }
    }

    pub(crate) fn write_end(&mut self, out: &mut String) {
        for _ in 0..std::mem::take(&mut self.bytes).len() {
            self.write_text("\u{FFFD}", out);
        }
    }

    fn write_text(&mut self, text: &str, out: &mut String) {
        if text.is_empty() {
            return;
        }
        let strip = !std::mem::replace(&mut self.started, true) && self.tokenizer.strips_first_space();
        out.push_str(if strip { text.strip_prefix(' ').unwrap_or(text) } else { text });
    }

    fn write_whole_characters(&mut self, out: &mut String) {
        while !self.bytes.is_empty() {
            let bytes = std::mem::take(&mut self.bytes);
            let error = match std::str::from_utf8(&bytes) {
                Ok(text) => return self.write_text(text, out),
                Err(error) => error,
            };
            let (valid, rest) = bytes.split_at(error.valid_up_to());
            self.write_text(&String::from_utf8_lossy(valid), out);
            let stray = error.error_len().unwrap_or(0);
            for _ in 0..stray {
                self.write_text("\u{FFFD}", out);
            }
            self.bytes.extend_from_slice(&rest[stray..]);
            if stray == 0 {
                return;
            }
        }
    }
}
