//! Llama 2's own tokenizer file, `tokenizer.model`: sentencepiece's byte pairs in a protobuf message.
//!
//! The merges are not in the file. They follow from the pieces: whatever two pieces give a third may merge, the best
//! scored result first, which is the order in which sentencepiece itself merges. Reading the message takes the wire
//! format's four forms and a dozen field numbers, so no protobuf library is needed. What it trades: one kind of
//! tokenizer, the one that all models of this family have. What it refuses: word models (unigram), normalizers with a
//! table of characters, pieces defined by a user, and files without pieces for single bytes.

use std::collections::{BTreeMap, HashMap};

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use crate::TextError;
use crate::load::llama_style;

/// Sentencepiece's own limit is 16 characters by default; splitting a piece everywhere costs its length squared.
const MAX_PIECE_BYTES: usize = 128;
/// What `ModelProto` holds, by field number.
const PIECE: u64 = 1;
const TRAINER: u64 = 2;
const NORMALIZER: u64 = 3;
/// Sentencepiece's number for byte pairs.
const BYTE_PAIRS: u64 = 2;

/// What a piece is for, by sentencepiece's number.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    Unused,
    Byte,
}

struct Piece<'a> {
    text: &'a str,
    score: f32,
    kind: Kind,
}

/// A field of a message, in one of the wire format's forms.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
    Fixed64,
}

/// A tokenizer from a `tokenizer.model`, with tokens that another file adds behind its last id.
pub(crate) fn tokenizer(
    bytes: &[u8],
    added: &BTreeMap<u64, String>,
    origin: &str,
) -> Result<HfTokenizer, TextError> {
    let fault = |message: String| TextError::Model { origin: origin.to_owned(), message };
    let pieces = pieces(bytes).map_err(fault)?;
    let mut inner = build(&pieces).map_err(fault)?;
    for (&id, token) in added {
        let next = inner.get_vocab_size(true) as u64;
        match inner.token_to_id(token) {
            Some(known) if u64::from(known) == id => continue,
            None if id == next => {}
            _ => {
                return Err(fault(format!(
                    "added_tokens.json puts `{token}` at {id}, where the next free number is {next}"
                )));
            }
        }
        inner.add_special_tokens(&[AddedToken::from(token.as_str(), true).normalized(false)]);
    }
    Ok(inner)
}

fn build(pieces: &[Piece<'_>]) -> Result<HfTokenizer, String> {
    let control = pieces.iter().filter(|piece| piece.kind == Kind::Control);
    let special: Vec<AddedToken> = control.map(|piece| AddedToken::from(piece.text, true)).collect();
    let vocab: Vocab = pieces.iter().map(|piece| piece.text.to_owned()).zip(0..).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges(pieces))
        .unk_token("<unk>".into())
        .fuse_unk(true)
        .byte_fallback(true)
        .build();
    let mut inner = model.and_then(llama_style).map_err(|error| error.to_string())?;
    inner.add_special_tokens(&special);
    Ok(inner)
}

/// Every pair that gives a piece: the best result first, equal ones by number, and of one result the pair whose parts
/// have the smallest numbers first.
fn merges(pieces: &[Piece<'_>]) -> Vec<(String, String)> {
    let normal = || pieces.iter().enumerate().filter(|(_, piece)| piece.kind == Kind::Normal);
    let ids: HashMap<&str, usize> = normal().map(|(id, piece)| (piece.text, id)).collect();
    let mut results: Vec<(usize, &Piece<'_>)> = normal().collect();
    results.sort_by(|(_, one), (_, other)| other.score.total_cmp(&one.score));
    let mut merges = Vec::new();
    for (_, piece) in results {
        let cuts = piece.text.char_indices().skip(1).map(|(at, _)| piece.text.split_at(at));
        let mut pairs: Vec<_> = cuts
            .filter_map(|(left, right)| Some(((ids.get(left)?, ids.get(right)?), (left, right))))
            .collect();
        pairs.sort_unstable();
        merges.extend(pairs.into_iter().map(|(_, (left, right))| (left.to_owned(), right.to_owned())));
    }
    merges
}

/// The pieces of a model whose settings are Llama's.
fn pieces(bytes: &[u8]) -> Result<Vec<Piece<'_>>, String> {
    let (mut pieces, mut trainer, mut normalizer) = (Vec::new(), None, None);
    for field in fields(bytes) {
        match field? {
            (PIECE, Wire::Bytes(piece)) => pieces.push(Piece::read(piece, pieces.len())?),
            (TRAINER, Wire::Bytes(message)) => trainer = Some(message),
            (NORMALIZER, Wire::Bytes(message)) => normalizer = Some(message),
            _ => {}
        }
    }
    check_trainer(trainer.ok_or("it does not say how it was trained")?)?;
    check_normalizer(normalizer.ok_or("it does not say how it normalizes")?)?;
    let usual = [("<unk>", Kind::Unknown), ("<s>", Kind::Control), ("</s>", Kind::Control)];
    for (id, (text, kind)) in usual.into_iter().enumerate() {
        if !pieces.get(id).is_some_and(|piece| piece.text == text && piece.kind == kind) {
            return Err(format!("piece {id} is not `{text}`, as in every Llama's"));
        }
    }
    let mut seen = HashMap::new();
    for (id, piece) in pieces.iter().enumerate() {
        if let Some(first) = seen.insert(piece.text, id) {
            return Err(format!("pieces {first} and {id} are both `{}`", piece.text));
        }
    }
    if let Some(byte) = (0..=255_u8).find(|byte| !seen.contains_key(format!("<0x{byte:02X}>").as_str())) {
        return Err(format!("it has no piece for the byte 0x{byte:02X}"));
    }
    Ok(pieces)
}

fn check_trainer(message: &[u8]) -> Result<(), String> {
    let (mut kind, mut bytes) = (1, 0);
    for field in fields(message) {
        match field? {
            (3, Wire::Number(value)) => kind = value,
            (35, Wire::Number(value)) => bytes = value,
            _ => {}
        }
    }
    if kind != BYTE_PAIRS {
        let kind =
            ["unknown", "unigram", "byte pairs", "word", "char"].get(kind as usize).unwrap_or(&"unknown");
        return Err(format!("its model is `{kind}`, not byte pairs"));
    }
    if bytes == 0 { Err("it does not fall back to bytes".into()) } else { Ok(()) }
}

fn check_normalizer(message: &[u8]) -> Result<(), String> {
    let (mut prefix, mut squeeze, mut escape) = (1, 1, 1);
    for field in fields(message) {
        match field? {
            (2, Wire::Bytes(table)) if !table.is_empty() => {
                return Err("its normalizer has a table of characters".into());
            }
            (3, Wire::Number(value)) => prefix = value,
            (4, Wire::Number(value)) => squeeze = value,
            (5, Wire::Number(value)) => escape = value,
            _ => {}
        }
    }
    match (prefix, squeeze, escape) {
        (1, 0, 1) => Ok(()),
        (0, ..) => Err("it puts no space in front of a text".into()),
        (_, 1, _) => Err("it removes spaces".into()),
        _ => Err("it does not write spaces as `▁`".into()),
    }
}

impl<'a> Piece<'a> {
    fn read(message: &'a [u8], id: usize) -> Result<Self, String> {
        let (mut text, mut score, mut kind) = (None, 0.0, 1);
        for field in fields(message) {
            match field? {
                (1, Wire::Bytes(bytes)) => text = str::from_utf8(bytes).ok(),
                (2, Wire::Fixed32(bytes)) => score = f32::from_le_bytes(bytes),
                (3, Wire::Number(value)) => kind = value,
                _ => {}
            }
        }
        let text = text.filter(|text| !text.is_empty() && text.len() <= MAX_PIECE_BYTES);
        let text = text.ok_or_else(|| format!("piece {id} is no text of 1 to {MAX_PIECE_BYTES} bytes"))?;
        if score.is_nan() {
            return Err(format!("piece {id}, `{text}`, has no score"));
        }
        let kind = match kind {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => {
                return Err(format!(
                    "piece {id}, `{text}`, is defined by a user, which sentencepiece and this crate cut texts at \
                    differently: use its tokenizer.json"
                ));
            }
        };
        Ok(Self { text, score, kind })
    }
}

/// The fields of a message in their order.
fn fields(message: &[u8]) -> impl Iterator<Item = Result<(u64, Wire<'_>), String>> {
    let mut rest = message;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let field = field(&mut rest);
        if field.is_none() {
            rest = &[];
        }
        Some(field.ok_or_else(|| "it is cut short, or no protobuf message".to_owned()))
    })
}

fn field<'a>(rest: &mut &'a [u8]) -> Option<(u64, Wire<'a>)> {
    let tag = number(rest)?;
    let wire = match tag & 7 {
        0 => Wire::Number(number(rest)?),
        1 => {
            rest.split_off(..8)?;
            Wire::Fixed64
        }
        2 => {
            let length = usize::try_from(number(rest)?).ok()?;
            Wire::Bytes(rest.split_off(..length)?)
        }
        5 => Wire::Fixed32(*rest.split_off(..4)?.first_chunk()?),
        _ => return None,
    };
    Some((tag >> 3, wire))
}

/// A number of seven bits a byte, the lowest first; at most ten bytes.
fn number(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..70).step_by(7) {
        let byte = *rest.split_off_first()?;
        value |= u64::from(byte & 0x7F).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
