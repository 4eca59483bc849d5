//! One renderer for training and for answering.
//!
//! A prompt is BOS and the template's text; an example is the prompt, the wanted text (the answer, or the clue where clues are
//! written) and EOS, tokenized as one piece. The prompt's ids are therefore the beginning of the example's ids, and the loss mask is the rest. Where the tokenizer
//! allows it (see the module `words`) the two halves are tokenized separately with an identical result; elsewhere the
//! whole and the prompt are both tokenized and compared. It refuses a tokenizer whose pieces span the border, and a
//! document with a begin or end token inside.

use rayon::prelude::*;

use crate::words::{WordTable, Words};
use crate::{Template, TextError, Tokenizer};

/// Examples that one thread renders before it takes the next piece of work.
const CHUNK: usize = 2048;

/// The parts of a clue that a template may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields<'a> {
    /// The clue's category; only some templates use it.
    pub category: &'a str,
    /// The clue.
    pub question: &'a str,
    /// The expected answer; empty to have a clue written without one.
    pub answer: &'a str,
}

/// One document: BOS, the rendered text, EOS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids `[t]`.
    pub ids: Vec<u32>,
    /// `[t]`: true exactly on the tokens of what is wanted and on EOS.
    pub loss_mask: Vec<bool>,
}

/// Makes prompts and examples with one tokenizer and one template.
#[derive(Clone, Debug)]
pub struct Renderer {
    tokenizer: Tokenizer,
    template: Template,
}

/// Buffers that one thread uses again and again.
#[derive(Default)]
struct Scratch {
    text: String,
    ids: Vec<u32>,
}

impl Renderer {
    /// A renderer.
    #[must_use]
    pub fn new(tokenizer: Tokenizer, template: Template) -> Self {
        Self { tokenizer, template }
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The template.
    #[must_use]
    pub fn template(&self) -> Template {
        self.template
    }

    /// BOS and the ids of the prompt, up to where the answer begins; `given` as for [`Template::prompt`].
    ///
    /// # Errors
    /// If the tokenizer fails, or adds a begin or end token of its own.
    pub fn prompt(&self, category: &str, given: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = vec![self.tokenizer.bos_id()];
        ids.extend(self.tokenizer.encode(&self.template.prompt(category, given))?);
        self.check_inside(&ids[1..])?;
        Ok(ids)
    }

    /// One clue as a document with its loss mask.
    ///
    /// # Errors
    /// If the tokenizer fails, adds a begin or end token of its own, or has a piece across the answer's beginning.
    pub fn example(&self, fields: &Fields<'_>) -> Result<Example, TextError> {
        let mut scratch = Scratch::default();
        match self.tokenizer.words() {
            Some(words) => words.with_table(|table| self.by_words(words, table, fields, &mut scratch)),
            None => self.in_one_piece(fields),
        }
    }

    /// Many clues, on all cores, in order.
    ///
    /// # Errors
    /// As [`Self::example`], with the first failing clue's place.
    pub fn examples(&self, fields: &[Fields<'_>]) -> Result<Vec<Example>, TextError> {
        let chunks: Vec<Vec<Example>> = fields
            .par_chunks(CHUNK)
            .enumerate()
            .map(|(chunk, fields)| self.chunk(chunk * CHUNK, fields))
            .collect::<Result<_, _>>()?;
        let mut all = Vec::with_capacity(fields.len());
        chunks.into_iter().for_each(|chunk| all.extend(chunk));
        Ok(all)
    }

    fn chunk(&self, first: usize, fields: &[Fields<'_>]) -> Result<Vec<Example>, TextError> {
        let at = |index: usize| move |source| TextError::Example { index, source: Box::new(source) };
        let Some(words) = self.tokenizer.words() else {
            let each = |(i, fields)| self.in_one_piece(fields).map_err(at(first + i));
            return fields.iter().enumerate().map(each).collect();
        };
        let mut scratch = Scratch::default();
        words.with_table(|table| {
            let each = |(i, fields)| self.by_words(words, table, fields, &mut scratch).map_err(at(first + i));
            fields.iter().enumerate().map(each).collect()
        })
    }

    /// The prompt never ends in a space and the answer begins with one, so a word ends between them.
    fn by_words(
        &self,
        words: &Words,
        table: &mut WordTable,
        fields: &Fields<'_>,
        scratch: &mut Scratch,
    ) -> Result<Example, TextError> {
        let inner = self.tokenizer.inner();
        let Scratch { text, ids } = scratch;
        ids.clear();
        let [given, wanted] = self.template.given_and_wanted(fields);
        self.template.write_prompt(fields.category, given, text);
        words.encode(inner, table, text, ids)?;
        let prompt = ids.len();
        text.clear();
        text.push(' ');
        text.push_str(wanted);
        words.encode_rest(inner, table, text, ids)?;
        self.finish(ids, prompt)
    }

    fn in_one_piece(&self, fields: &Fields<'_>) -> Result<Example, TextError> {
        let [given, wanted] = self.template.given_and_wanted(fields);
        let mut text = self.template.prompt(fields.category, given);
        let prompt = self.tokenizer.encode_in_one_piece(&text)?;
        text.push_str(&self.template.completion(wanted));
        let whole = self.tokenizer.encode_in_one_piece(&text)?;
        if !whole.starts_with(&prompt) {
            return Err(TextError::PromptNotPrefix { prompt: prompt.len(), whole: whole.len() });
        }
        self.finish(&whole, prompt.len())
    }

    fn finish(&self, inside: &[u32], prompt: usize) -> Result<Example, TextError> {
        self.check_inside(inside)?;
        let mut ids = Vec::with_capacity(inside.len() + 2);
        ids.push(self.tokenizer.bos_id());
        ids.extend_from_slice(inside);
        ids.push(self.tokenizer.eos_id());
        let mut loss_mask = vec![true; ids.len()];
        loss_mask[..=prompt].fill(false);
        Ok(Example { ids, loss_mask })
    }

    fn check_inside(&self, inside: &[u32]) -> Result<(), TextError> {
        let (bos, eos) = (self.tokenizer.bos_id(), self.tokenizer.eos_id());
        match inside.iter().position(|&id| id == bos || id == eos) {
            Some(place) => Err(TextError::SpecialInside { id: inside[place], place: place + 1 }),
            None => Ok(()),
        }
    }
}

/// A document as text, the part that bears loss between `⟦` and `⟧`, begin and end tokens spelled out.
#[must_use]
pub fn show_masked(tokenizer: &Tokenizer, example: &Example) -> String {
    let mut out = String::new();
    let mut decoder = crate::StreamDecoder::new(tokenizer);
    let mut bears_loss = false;
    for (&id, &mask) in example.ids.iter().zip(&example.loss_mask) {
        if mask != bears_loss {
            decoder.write_end(&mut out);
            out.push(if mask { '⟦' } else { '⟧' });
            bears_loss = mask;
        }
        if id == tokenizer.bos_id() || id == tokenizer.eos_id() {
            decoder.write_end(&mut out);
            out.push_str(&tokenizer.token(id).unwrap_or_default());
        } else {
            decoder.write(id, &mut out);
        }
    }
    decoder.write_end(&mut out);
    if bears_loss {
        out.push('⟧');
    }
    out
}
