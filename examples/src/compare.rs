//! What a model says to clues, kept and held against what another model says.
//!
//! Logits of every position of every document (prompt and expected answer), and greedy answers to the prompts. One model at a
//! time is in memory: the first one's logits wait in a temporary file that has no name and goes with the process. What it
//! trades: four bytes of disk per position and token of the vocabulary.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use buzzer::burn::tensor::{Int, Tensor, TensorData};
use buzzer::data::Clue;
use buzzer::kernels::KernelBackend;
use buzzer::model::{BlockContext, Llama};
use buzzer::text::Renderer;
use serde::Serialize;

use crate::{AnswerArgs, Answered, Failure, answer_clues, fields, judge_answers};

/// Clues to put to models.
#[derive(Debug)]
pub struct Probe<'a> {
    renderer: &'a Renderer,
    clues: &'a [Clue],
    documents: Vec<Vec<u32>>,
    answer: AnswerArgs,
}

/// What one model said.
#[derive(Debug)]
pub struct Record {
    name: String,
    logits: File,
    answered: Vec<Answered>,
}

/// How far a model is from the one that was recorded.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What was recorded.
    pub reference: String,
    /// Texts compared.
    pub documents: usize,
    /// Places in them at which logits were compared.
    pub positions: usize,
    /// Over every logit of every place.
    pub logit_difference: Spread,
    /// From the recorded distribution of the next token to this one's, in nats, over the places.
    pub kl_divergence: Spread,
    /// Share of the places whose likeliest token is another.
    pub likeliest_token_changed: f64,
    /// Greedy answers.
    pub answers: Answers,
}

/// The largest of some errors and their mean.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Spread {
    /// The largest; infinite if one was no number.
    pub largest: f64,
    /// The mean.
    pub mean: f64,
}

/// Greedy answers of two models.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Answers {
    /// Clues answered.
    pub n: usize,
    /// Answers that differ in any letter.
    pub changed: usize,
    /// The same as a share.
    pub share_changed: f64,
    /// Exact match of the recorded model.
    pub exact_match_reference: f64,
    /// Exact match of this one.
    pub exact_match: f64,
}

/// Sums over places.
#[derive(Default)]
struct Sums {
    positions: usize,
    logits: usize,
    difference: Spread,
    divergence: Spread,
    changed: usize,
}

impl<'a> Probe<'a> {
    /// Documents of the clues that fit a model's context, and prompts of all of them.
    ///
    /// # Errors
    /// If a clue cannot be tokenized.
    pub fn new(
        renderer: &'a Renderer,
        clues: &'a [Clue],
        answer: AnswerArgs,
        context: usize,
    ) -> Result<Self, Failure> {
        let examples = renderer.examples(&clues.iter().map(fields).collect::<Vec<_>>())?;
        let documents = examples.into_iter().map(|example| example.ids).filter(|ids| ids.len() <= context);
        Ok(Self { renderer, clues, documents: documents.collect(), answer })
    }

    /// Asks a model and keeps what it says.
    ///
    /// # Errors
    /// If the model gives NaN, or the temporary file cannot be written.
    pub fn record<B: KernelBackend>(&self, name: &str, model: &Llama<B>) -> Result<Record, Failure> {
        let fault = |error: std::io::Error| {
            Failure::input(format!("a temporary file for logits: {error}; make room, or lower --eval-limit"))
        };
        let mut file = BufWriter::new(tempfile::tempfile().map_err(fault)?);
        for ids in &self.documents {
            for logit in logits(model, ids) {
                file.write_all(&logit.to_le_bytes()).map_err(fault)?;
            }
        }
        let logits = file.into_inner().map_err(|error| fault(error.into_error()))?;
        let answered = answer_clues(model, self.renderer, self.clues, &self.answer, |_| {})?;
        Ok(Record { name: name.to_owned(), logits, answered })
    }

    /// Asks a model the same and holds it against each record.
    ///
    /// # Errors
    /// If the model gives NaN while answering, or a record cannot be read again.
    pub fn compare<B: KernelBackend>(
        &self,
        model: &Llama<B>,
        records: &mut [Record],
    ) -> Result<Vec<Comparison>, Failure> {
        let width = model.config().vocab_size;
        let mut files = Vec::new();
        for record in &mut *records {
            record.logits.seek(SeekFrom::Start(0))?;
            files.push((BufReader::new(&record.logits), Sums::default()));
        }
        let (mut bytes, mut expected) = (Vec::new(), Vec::new());
        for ids in &self.documents {
            let found = logits(model, ids);
            bytes.resize(4 * found.len(), 0);
            for (file, sums) in &mut files {
                file.read_exact(&mut bytes)?;
                expected.clear();
                expected.extend(bytes.as_chunks().0.iter().map(|&logit| f32::from_le_bytes(logit)));
                expected.chunks(width).zip(found.chunks(width)).for_each(|(a, b)| sums.add(a, b));
            }
        }
        let answered = answer_clues(model, self.renderer, self.clues, &self.answer, |_| {})?;
        let sums: Vec<Sums> = files.into_iter().map(|(_, sums)| sums).collect();
        let comparison =
            |(record, sums): (&Record, Sums)| sums.finish(self.documents.len(), record, &answered);
        Ok(records.iter().zip(sums).map(comparison).collect())
    }
}

/// Logits `[t, v]` of one text.
fn logits<B: KernelBackend>(model: &Llama<B>, ids: &[u32]) -> Vec<f32> {
    let device = model.device();
    let row =
        |values: Vec<i32>| Tensor::<B, 2, Int>::from_data(TensorData::new(values, [1, ids.len()]), &device);
    let positions = (0..ids.len() as i32).collect();
    let context = BlockContext::rows(model.config(), row(vec![0; ids.len()]), row(positions));
    let ids = row(ids.iter().map(|&id| id as i32).collect());
    model.logits(model.hidden(ids, &context, None)).into_data().iter::<f32>().collect()
}

impl Sums {
    /// Takes in one place: the recorded logits and the others.
    fn add(&mut self, reference: &[f32], found: &[f32]) {
        for (a, b) in reference.iter().zip(found) {
            self.difference.add(f64::from((a - b).abs()));
        }
        self.logits += reference.len();
        self.divergence.add(divergence(reference, found));
        self.changed += usize::from(likeliest(reference) != likeliest(found));
        self.positions += 1;
    }

    fn finish(self, documents: usize, record: &Record, answered: &[Answered]) -> Comparison {
        let differs = |(a, b): &(&Answered, &Answered)| a.answer != b.answer;
        let changed = record.answered.iter().zip(answered).filter(differs).count();
        let n = answered.len();
        Comparison {
            reference: record.name.clone(),
            documents,
            positions: self.positions,
            logit_difference: self.difference.over(self.logits),
            kl_divergence: self.divergence.over(self.positions),
            likeliest_token_changed: share(self.changed, self.positions),
            answers: Answers {
                n,
                changed,
                share_changed: share(changed, n),
                exact_match_reference: judge_answers(&record.answered).exact_match,
                exact_match: judge_answers(answered).exact_match,
            },
        }
    }
}

impl Spread {
    /// Sums in `mean` until [`Self::over`].
    fn add(&mut self, error: f64) {
        let error = if error.is_nan() { f64::INFINITY } else { error };
        self.largest = self.largest.max(error);
        self.mean += error;
    }

    fn over(self, count: usize) -> Self {
        Self { mean: if count == 0 { 0.0 } else { self.mean / count as f64 }, ..self }
    }
}

fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// `Σ p ln(p / q)` of the two softmax distributions; rounding may leave it a little below zero, which is cut off.
fn divergence(reference: &[f32], found: &[f32]) -> f64 {
    let [p, q] = [reference, found].map(log_softmax);
    let sum: f64 = p.zip(q).map(|(p, q)| p.exp() * (p - q)).sum();
    if sum < 0.0 { 0.0 } else { sum }
}

fn log_softmax(logits: &[f32]) -> impl Iterator<Item = f64> {
    let most = logits.iter().fold(f64::NEG_INFINITY, |most, &logit| most.max(f64::from(logit)));
    let total = logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum::<f64>().ln();
    logits.iter().map(move |&logit| f64::from(logit) - most - total)
}

fn likeliest(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, place| if logits[place] > logits[best] { place } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_distributions() {
        let logits = |p: [f64; 3]| p.map(|p| p.ln() as f32 + 7.0);
        let (p, q) = ([0.5_f64, 0.25, 0.25], [0.25_f64, 0.25, 0.5]);
        let expected: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((divergence(&logits(p), &logits(q)) - expected).abs() < 1e-6);
        assert_eq!(divergence(&logits(p), &logits(p)), 0.0);
        assert!(divergence(&[0.0, f32::NAN], &[0.0, 1.0]).is_nan());
    }

    #[test]
    fn what_is_no_number_counts_as_infinite() {
        let mut sums = Sums::default();
        sums.add(&[1.0, 2.0], &[1.5, 2.0]);
        assert_eq!((sums.difference.largest, sums.difference.over(sums.logits).mean), (0.5, 0.25));
        sums.add(&[1.0, 2.0], &[f32::NAN, 0.0]);
        assert_eq!(sums.difference.largest, f64::INFINITY);
        assert_eq!((sums.positions, sums.changed), (2, 1));
    }
}
