//! A clue file on its way to packed rows, with an account of every row.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use buzzer::data::{
    CleanReport, Cleaned, Clue, Date, DropReason, Format, LossOn, PackOptions, PackReport, Packed, PackedRow,
    ReadOptions, Split, clean, pack, read_clues, split,
};
use buzzer::text::{Fields, Renderer, Template, show_masked};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::{Failure, fields, local_file};

pub use buzzer::data::Packing;

/// The clue file that ships with the project, and the first date of its held-out wordings.
const SAMPLE: &str = "datasets/sample/clues.csv";
const SAMPLE_EVAL_FROM: &str = "2006-01-01";
/// A writer of clues learns one of so many from its category alone, so that it can do without an answer.
const WITHOUT_ANSWER: u32 = 4;
/// Share of the clues that is held out unless something else is asked for.
const USUAL_SHARE: f64 = 0.05;

/// Which clues to use.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataArgs {
    /// Clue file: CSV, TSV, JSON, JSON lines or Parquet; or hub:org/name/file or hub:org/name/file@revision for one in a data
    /// set on the Hugging Face hub
    #[arg(long, value_name = "FILE", default_value = SAMPLE)]
    #[serde(rename = "file")]
    pub data: PathBuf,
    /// Format, if the file's extension does not tell: csv, tsv, json, json-lines, parquet
    #[arg(long)]
    pub format: Option<Format>,
    /// Name of the question column, if it is not found by itself
    #[arg(long, value_name = "NAME")]
    pub question_column: Option<String>,
    /// Name of the answer column
    #[arg(long, value_name = "NAME")]
    pub answer_column: Option<String>,
    /// Name of the category column
    #[arg(long, value_name = "NAME")]
    pub category_column: Option<String>,
    /// Name of the air-date column
    #[arg(long, value_name = "NAME")]
    pub air_date_column: Option<String>,
    /// Read only the first rows
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Hold out clues aired on this date or later (YYYY-MM-DD), instead of a share chosen by hash
    #[arg(long, value_name = "DATE", conflicts_with = "eval_fraction")]
    pub eval_from: Option<Date>,
    /// How to choose the clues to hold out [default: hash; the sample is split by date]
    #[arg(long, value_enum, conflicts_with = "eval_from")]
    pub split: Option<SplitArg>,
    /// Share of the clues to hold out [default: 0.05]
    #[arg(long, value_name = "SHARE")]
    pub eval_fraction: Option<f64>,
    /// Another seed holds out other clues
    #[arg(long, value_name = "N", default_value_t = Self::default().split_seed)]
    pub split_seed: u64,
    /// Judge at most so many of the clues held out
    #[arg(long, value_name = "N", default_value_t = Self::default().eval_limit)]
    pub eval_limit: usize,
}

/// A rule of [`Split`] that needs no date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SplitArg {
    /// By a hash of the question
    Hash,
    /// The clues aired last
    AirDate,
}

/// What became of the file's rows.
#[derive(Clone, Debug, Serialize)]
pub struct CorpusReport {
    /// The file.
    pub file: PathBuf,
    /// Data rows read.
    pub rows_read: usize,
    /// Clues that are trained on or held out.
    pub rows_kept: usize,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<DropReason, usize>,
    /// Clues trained on.
    pub train: usize,
    /// Clues held out.
    pub held_out: usize,
    /// The first air date among those held out, if they were chosen by date.
    pub held_out_from: Option<Date>,
}

/// The same rows with loss on every token and on answers alone.
#[derive(Debug)]
pub struct HeldOut {
    /// Which of the two is trained.
    pub loss_on: LossOn,
    /// Every token.
    pub all: Vec<PackedRow>,
    /// Answers.
    pub answers: Vec<PackedRow>,
}

/// Packed rows, held-out clues, and the account.
#[derive(Debug)]
pub struct Corpus {
    /// Rows to train on.
    pub train: Packed,
    /// Rows of held-out clues, for their loss.
    pub held_out: HeldOut,
    /// Held-out clues to answer.
    pub eval_clues: Vec<Clue>,
    /// The account.
    pub report: CorpusReport,
    /// One document as the model sees it, loss-bearing part marked.
    sample: String,
}

impl Default for DataArgs {
    fn default() -> Self {
        Self {
            data: SAMPLE.into(),
            format: None,
            question_column: None,
            answer_column: None,
            category_column: None,
            air_date_column: None,
            limit: None,
            eval_from: None,
            split: None,
            eval_fraction: None,
            split_seed: 0,
            eval_limit: 300,
        }
    }
}

impl DataArgs {
    /// Puts a path in the place of a name on the hub, after fetching the file if it is not here.
    ///
    /// # Errors
    /// If it is neither here nor to be had.
    pub fn fetch(&mut self) -> Result<(), Failure> {
        self.data = local_file(&self.data)?;
        Ok(())
    }

    /// # Errors
    /// If the share to hold out is out of range.
    pub fn check(&self) -> Result<(), Failure> {
        Ok(self.split().check()?)
    }

    /// Writes down how clues are held out where that was left to this program, so that it can be repeated.
    pub(crate) fn settle_split(&mut self) {
        match self.split() {
            Split::AirDate { from } => self.eval_from = Some(from),
            Split::Latest { fraction } | Split::Hash { fraction, .. } => self.eval_fraction = Some(fraction),
            Split::None => {}
        }
    }

    fn read_options(&self) -> ReadOptions {
        ReadOptions {
            format: self.format,
            question: self.question_column.clone(),
            answer: self.answer_column.clone(),
            category: self.category_column.clone(),
            air_date: self.air_date_column.clone(),
            limit: self.limit,
        }
    }

    fn split(&self) -> Split {
        let fraction = self.eval_fraction.unwrap_or(USUAL_SHARE);
        let sample_date = || {
            let is_sample =
                self.data == Path::new(SAMPLE) && self.eval_fraction.is_none() && self.split.is_none();
            is_sample.then(|| SAMPLE_EVAL_FROM.parse().ok()).flatten()
        };
        match (self.eval_from.or_else(sample_date), self.split) {
            (Some(from), _) => Split::AirDate { from },
            (None, Some(SplitArg::AirDate)) => Split::Latest { fraction },
            (None, _) => Split::Hash { fraction, seed: self.split_seed },
        }
    }

    /// Reads, cleans and splits: clues to train on, clues held out, and the account so far.
    ///
    /// # Errors
    /// If the file is missing or damaged, lacks a column, or cannot be split as asked.
    pub fn clues(&self) -> Result<(Vec<Clue>, Vec<Clue>, CorpusReport), Failure> {
        let Cleaned { clues, report } = clean(read_clues(&self.data, &self.read_options())?);
        let how = self.split();
        let (train, eval) = split(clues, &how)?;
        let by_date = !matches!(how, Split::Hash { .. } | Split::None);
        let first_date = eval.iter().filter_map(|clue| clue.air_date).min();
        let report = self.account(report, train.len(), eval.len(), first_date.filter(|_| by_date));
        Ok((train, eval, report))
    }

    /// Reads and cleans; every clue counts as held out.
    ///
    /// # Errors
    /// If the file is missing or damaged, or lacks a column.
    pub fn all_clues(&self) -> Result<(Vec<Clue>, CorpusReport), Failure> {
        let Cleaned { clues, report } = clean(read_clues(&self.data, &self.read_options())?);
        let report = self.account(report, 0, clues.len(), None);
        Ok((clues, report))
    }

    /// All clues of another file, with the same names of columns.
    ///
    /// # Errors
    /// As [`DataArgs::all_clues`].
    pub fn clues_of(&self, file: &Path) -> Result<Vec<Clue>, Failure> {
        let options = ReadOptions { format: None, limit: None, ..self.read_options() };
        Ok(clean(read_clues(file, &options)?).clues)
    }

    fn account(
        &self,
        report: CleanReport,
        train: usize,
        held_out: usize,
        held_out_from: Option<Date>,
    ) -> CorpusReport {
        CorpusReport {
            file: self.data.clone(),
            rows_read: report.rows_read,
            rows_kept: report.rows_kept,
            dropped: report.dropped,
            train,
            held_out,
            held_out_from,
        }
    }
}

/// Reads, cleans, splits, tokenizes and packs.
///
/// # Errors
/// As [`DataArgs::clues`], and if a clue cannot be tokenized.
pub fn build(args: &DataArgs, renderer: &Renderer, options: PackOptions) -> Result<Corpus, Failure> {
    let (train, mut eval, mut report) = args.clues()?;
    let learnt: Vec<Fields<'_>> = train.iter().map(|clue| learnt_fields(clue, renderer.template())).collect();
    let examples = renderer.examples(&learnt)?;
    let sample =
        examples.first().map(|example| show_masked(renderer.tokenizer(), example)).unwrap_or_default();
    let packed = pack(&examples, &options);
    let eval_examples = renderer.examples(&eval.iter().map(fields).collect::<Vec<_>>())?;
    let [all, answers] = [LossOn::All, LossOn::Answers]
        .map(|loss_on| pack(&eval_examples, &PackOptions { loss_on, ..options }));
    let too_long = packed.report.too_long + all.report.too_long;
    let held_out = HeldOut { loss_on: options.loss_on, all: all.rows, answers: answers.rows };
    if too_long > 0 {
        report.dropped.insert(DropReason::TooLong, too_long);
        report.rows_kept -= too_long;
    }
    eval.truncate(args.eval_limit);
    Ok(Corpus { train: packed, held_out, eval_clues: eval, report, sample })
}

/// What is learnt of a clue.
fn learnt_fields(clue: &Clue, template: Template) -> Fields<'_> {
    let fields = fields(clue);
    let is_withheld = template.writes_clues() && clue.row.is_multiple_of(WITHOUT_ANSWER);
    Fields { answer: if is_withheld { "" } else { fields.answer }, ..fields }
}

impl Corpus {
    /// The lines before every run: what was dropped, how rows came out, and one document with its loss mask.
    #[must_use]
    pub fn describe(&self, options: PackOptions) -> String {
        let CorpusReport { file, rows_read, rows_kept, dropped, train, held_out, held_out_from } =
            &self.report;
        let PackReport { rows, documents, tokens, loss_tokens, efficiency, longest, mean_len, .. } =
            self.train.report;
        let mut out = format!("data      {}: {rows_read} rows read, {rows_kept} kept", file.display());
        for (reason, count) in dropped {
            let _ = write!(out, ", {count} dropped ({reason})");
        }
        let since = held_out_from.map(|date| format!(", aired on {date} or later")).unwrap_or_default();
        let _ = writeln!(out, "; {train} train, {held_out} held out{since}");
        let _ = writeln!(
            out,
            "packing   {}: {documents} documents in {rows} rows of {} ({:.1} % full), {tokens} tokens, {loss_tokens} of \
             them targets; a document has {mean_len:.1} tokens, at most {longest}",
            options.packing,
            options.row_len,
            100.0 * efficiency,
        );
        let _ = write!(out, "sample    {}", self.sample.replace('\n', "\\n"));
        out
    }
}
