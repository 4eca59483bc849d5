//! Documents into rows of a fixed length.
//!
//! A clue has some 38 tokens and a row a thousand, so padding each clue to a row would waste 96 % of the work.
//! Isolated packing puts whole documents side by side, best fit in order of falling length, and numbers them so that
//! attention stays inside each. Wrapped packing repeats what TRL 0.4.7 did: one long text, cut every `row_len` tokens,
//! documents and all, for those who want its numbers. No document is cut short to make it fit: one that is longer than
//! a row is left out and counted. Only the wrapped form cuts documents, at the end of each row, as its original does.

use std::fmt;
use std::str::FromStr;

use burn_dataset::Dataset;
use buzzer_text::Example;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::order::{generator, shuffle};

/// The label of a token that is no target.
pub(crate) const IGNORED: i32 = -100;

/// How documents share rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Packing {
    /// Whole documents side by side, each alone in attention and in position.
    #[default]
    Isolated,
    /// One text cut every `row_len` tokens, as TRL 0.4.7's `ConstantLengthDataset`; documents see each other.
    Wrapped,
    /// One document a row.
    None,
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Isolated => "isolated",
            Self::Wrapped => "wrapped",
            Self::None => "none",
        })
    }
}

impl FromStr for Packing {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Self::Isolated, Self::Wrapped, Self::None]
            .into_iter()
            .find(|packing| packing.to_string() == name)
            .ok_or_else(|| DataError::UnknownChoice {
                what: "packing",
                name: name.to_owned(),
                flag: "--packing",
                choices: "isolated, wrapped or none",
            })
    }
}

/// Which tokens are targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// Every token that has another before it.
    #[default]
    All,
    /// The answer's tokens and the end token.
    Answers,
}

impl fmt::Display for LossOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Answers => "answers",
        })
    }
}

impl FromStr for LossOn {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Self::All, Self::Answers].into_iter().find(|loss| loss.to_string() == name).ok_or_else(|| {
            DataError::UnknownChoice {
                what: "loss",
                name: name.to_owned(),
                flag: "--loss-on",
                choices: "all or answers",
            }
        })
    }
}

/// How to pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PackOptions {
    /// How documents share rows.
    #[serde(rename = "form")]
    pub packing: Packing,
    /// Tokens a row holds at most.
    pub row_len: usize,
    /// Which tokens are targets.
    pub loss_on: LossOn,
    /// Decides which of equally long documents go together, and their order inside a row.
    pub seed: u64,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self { packing: Packing::Isolated, row_len: 1024, loss_on: LossOn::All, seed: 0 }
    }
}

impl PackOptions {
    /// # Errors
    /// If no row could hold a token and its successor.
    pub fn check(&self) -> Result<(), DataError> {
        if self.row_len < 2 {
            let found = self.row_len.to_string();
            return Err(DataError::Setting { flag: "--row-len", found, choose: "two tokens or more" });
        }
        Ok(())
    }
}

/// One row, without padding. All four have the same length, at most `row_len`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedRow {
    /// Token ids `[t]`.
    pub ids: Vec<u32>,
    /// Position within the document `[t]`, from 0.
    pub positions: Vec<u32>,
    /// Document within the row `[t]`, from 0.
    pub documents: Vec<i32>,
    /// `[t]`: the token itself where it is a target, else -100. Not shifted: the logits before it predict it.
    pub labels: Vec<i32>,
}

/// What packing did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PackReport {
    /// Rows made.
    pub rows: usize,
    /// Documents in them.
    pub documents: usize,
    /// Tokens in them.
    pub tokens: usize,
    /// Targets in them.
    pub loss_tokens: usize,
    /// Documents left out because they are longer than a row.
    pub too_long: usize,
    /// Tokens left out: those of documents that are too long, or the wrapped form's last part of a row.
    pub tokens_dropped: usize,
    /// Tokens per place, from 0 to 1: `tokens / (rows * row_len)`.
    pub efficiency: f64,
    /// Tokens of the longest document given, packed or not.
    pub longest: usize,
    /// Mean tokens of the documents given.
    pub mean_len: f64,
}

/// Rows ready for batches, and the account of how they came about.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Packed {
    /// The rows.
    pub rows: Vec<PackedRow>,
    /// The account.
    pub report: PackReport,
}

impl Dataset<PackedRow> for Packed {
    fn get(&self, index: usize) -> Option<PackedRow> {
        self.rows.get(index).cloned()
    }

    fn len(&self) -> usize {
        self.rows.len()
    }
}

/// Packs documents. The same documents, options and seed give the same rows.
#[must_use]
pub fn pack(examples: &[Example], options: &PackOptions) -> Packed {
    let mut report = PackReport {
        longest: examples.iter().map(|example| example.ids.len()).max().unwrap_or(0),
        ..PackReport::default()
    };
    let given: usize = examples.iter().map(|example| example.ids.len()).sum();
    let rows = match options.packing {
        Packing::Wrapped => {
            report.documents = examples.len();
            wrap(examples, options)
        }
        Packing::Isolated | Packing::None => {
            let (fitting, long): (Vec<u32>, Vec<u32>) = (0..examples.len() as u32)
                .partition(|&place| examples[place as usize].ids.len() <= options.row_len);
            report.too_long = long.len();
            report.documents = fitting.len();
            let groups = match options.packing {
                Packing::Isolated => best_fit(examples, fitting, options),
                _ => fitting.into_iter().map(|place| vec![place]).collect(),
            };
            groups.par_iter().map(|group| isolated_row(examples, group, options.loss_on)).collect()
        }
    };
    report.rows = rows.len();
    report.tokens = rows.iter().map(|row| row.ids.len()).sum();
    report.loss_tokens = rows.par_iter().map(targets).sum();
    report.tokens_dropped = given - report.tokens;
    report.efficiency = ratio(report.tokens, report.rows * options.row_len);
    report.mean_len = ratio(given, examples.len());
    Packed { rows, report }
}

fn targets(row: &PackedRow) -> usize {
    row.labels.iter().filter(|&&label| label != IGNORED).count()
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Best fit in order of falling length: each document goes into the fullest row that still has room.
///
/// Rows wait in one stack per length of free room, and a bit set tells which stacks are not empty, so a document
/// costs a look at `row_len / 64` words at most.
fn best_fit(examples: &[Example], mut documents: Vec<u32>, options: &PackOptions) -> Vec<Vec<u32>> {
    let length = |place: u32| examples[place as usize].ids.len();
    let mut generator = generator(options.seed, 0);
    shuffle(&mut documents, &mut generator);
    documents.sort_by_key(|&place| std::cmp::Reverse(length(place)));
    let mut groups: Vec<Vec<u32>> = Vec::new();
    let mut room = Room::new(options.row_len);
    for place in documents {
        let needed = length(place);
        let (group, free) = room.take(needed).unwrap_or_else(|| {
            groups.push(Vec::new());
            (groups.len() - 1, options.row_len)
        });
        groups[group].push(place);
        room.put(group, free - needed);
    }
    groups.iter_mut().for_each(|group| shuffle(group, &mut generator));
    groups
}

/// Rows by the number of tokens they still take.
struct Room {
    stacks: Vec<Vec<usize>>,
    occupied: Vec<u64>,
}

impl Room {
    fn new(row_len: usize) -> Self {
        Self { stacks: vec![Vec::new(); row_len + 1], occupied: vec![0; row_len / 64 + 1] }
    }

    fn put(&mut self, group: usize, free: usize) {
        self.stacks[free].push(group);
        self.occupied[free / 64] |= 1 << (free % 64);
    }

    /// The row with the least room that is enough, and its room.
    fn take(&mut self, needed: usize) -> Option<(usize, usize)> {
        let first = needed / 64;
        let masked = self.occupied.get(first)? & (u64::MAX << (needed % 64));
        let free = if masked != 0 {
            first * 64 + masked.trailing_zeros() as usize
        } else {
            let later = self.occupied[first + 1..].iter().position(|&word| word != 0)?;
            let word = first + 1 + later;
            word * 64 + self.occupied[word].trailing_zeros() as usize
        };
        let group = self.stacks[free].pop()?;
        if self.stacks[free].is_empty() {
            self.occupied[free / 64] &= !(1 << (free % 64));
        }
        Some((group, free))
    }
}

fn isolated_row(examples: &[Example], group: &[u32], loss_on: LossOn) -> PackedRow {
    let documents = || group.iter().map(|&place| &examples[place as usize]);
    let mut row = PackedRow::with_capacity(documents().map(|example| example.ids.len()).sum());
    for (number, example) in documents().enumerate() {
        row.ids.extend_from_slice(&example.ids);
        row.positions.extend(0..example.ids.len() as u32);
        row.documents.resize(row.ids.len(), number as i32);
        let from = row.labels.len();
        row.labels.extend(labels(example, loss_on));
        if let Some(first) = row.labels.get_mut(from) {
            *first = IGNORED;
        }
    }
    row
}

fn labels(example: &Example, loss_on: LossOn) -> impl Iterator<Item = i32> {
    example.ids.iter().zip(&example.loss_mask).map(move |(&id, &answer)| {
        let target = answer || loss_on == LossOn::All;
        if target { id as i32 } else { IGNORED }
    })
}

/// All documents as one text in the order given, cut every `row_len` tokens; the rest of a row at the end is dropped.
///
/// TRL 0.4.7 does this to one buffer of texts at a time (`row_len * 3.6 * 1024` characters) and so drops a rest for each
/// buffer, up to one row in a thousand. Here the whole corpus is one buffer; a corpus that fits TRL's gets TRL's rows.
fn wrap(examples: &[Example], options: &PackOptions) -> Vec<PackedRow> {
    if options.row_len == 0 {
        return Vec::new();
    }
    let mut rows = Vec::new();
    let mut row = PackedRow::with_capacity(options.row_len);
    let tokens = examples.iter().flat_map(|example| example.ids.iter().zip(labels(example, options.loss_on)));
    for (&id, label) in tokens {
        row.labels.push(if row.ids.is_empty() { IGNORED } else { label });
        row.positions.push(row.ids.len() as u32);
        row.ids.push(id);
        if row.ids.len() == options.row_len {
            row.documents = vec![0; options.row_len];
            rows.push(std::mem::replace(&mut row, PackedRow::with_capacity(options.row_len)));
        }
    }
    rows
}

impl PackedRow {
    fn with_capacity(tokens: usize) -> Self {
        Self {
            ids: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            documents: Vec::with_capacity(tokens),
            labels: Vec::with_capacity(tokens),
        }
    }
}
