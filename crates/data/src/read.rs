//! Clue files into columns of text, through polars.
//!
//! Every column is read as text: an answer of `007` is no number and a value of `None` is no null. The structure is
//! checked first (see the module `scan`), so a damaged file is an error with its place and never a shorter corpus.
//! Columns are found by name, spelt however they are.

use std::fs;
use std::io::Cursor as Bytes;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polars::prelude::{
    Column, CsvParseOptions, CsvReadOptions, DataFrame, DataType, Field, JsonFormat, JsonReader,
    ParquetReader, PolarsResult, Schema, SerReader, StringChunked,
};

use crate::scan::{self, Delimited, Outline};
use crate::{DataError, Date, Format, ReadOptions};

/// The columns of a clue file as they stand in it.
#[derive(Clone, Debug)]
pub struct RawClues {
    path: PathBuf,
    rows: usize,
    pub(crate) question: StringChunked,
    pub(crate) answer: StringChunked,
    pub(crate) category: Option<StringChunked>,
    pub(crate) air_date: Option<StringChunked>,
    pub(crate) round: Option<StringChunked>,
    pub(crate) value: Option<StringChunked>,
}

impl RawClues {
    /// Data rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there are none; reading refuses that.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Reads a clue file.
///
/// # Errors
/// If the file cannot be read, is damaged (unclosed quote, row of another width, cut short, not UTF-8), has no rows,
/// or lacks a question or answer column.
pub fn read_clues(path: &Path, options: &ReadOptions) -> Result<RawClues, DataError> {
    let bytes = fs::read(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(DataError::Empty { path: path.to_owned(), what: "the file is empty" });
    }
    let file = Source::open(path, bytes, options)?;
    if file.outline.rows == 0 {
        return Err(DataError::Empty { path: path.to_owned(), what: "there is a header only" });
    }
    let roles = Roles::find(path, &file.outline.columns, options)?;
    let frame = file.load(&roles.picked())?;
    let rows = options.limit.map_or(file.outline.rows, |limit| limit.min(file.outline.rows));
    let text = |place: usize| {
        let column = &frame.columns()[place].head(Some(rows));
        as_text(column).map_err(|error| file.failed(&error))
    };
    let maybe = |place: Option<usize>| place.map(text).transpose();
    let places = roles.places();
    Ok(RawClues {
        path: path.to_owned(),
        rows,
        question: text(places.question)?,
        answer: text(places.answer)?,
        category: maybe(places.category)?,
        air_date: maybe(places.air_date)?,
        round: maybe(places.round)?,
        value: maybe(places.value)?,
    })
}

/// A file whose structure has been checked.
struct Source<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    format: Format,
    quote: Option<u8>,
    outline: Outline,
}

impl<'a> Source<'a> {
    fn open(path: &'a Path, bytes: &'a [u8], options: &ReadOptions) -> Result<Self, DataError> {
        let format = options
            .format
            .or_else(|| Format::of_path(path))
            .ok_or_else(|| DataError::UnknownFormat { path: path.to_owned() })?;
        let begins_with_object = bytes.trim_ascii_start().first() == Some(&b'{');
        let format = if format == Format::Json && begins_with_object { Format::JsonLines } else { format };
        if format != Format::Parquet {
            scan::check_utf8(path, bytes)?;
        }
        let mut source = Self { path, bytes, format, quote: Some(b'"'), outline: Outline::default() };
        source.outline = match format {
            Format::Csv => source.delimited().outline()?,
            Format::Tsv => source.tab_separated()?,
            Format::Json => scan::json_array(path, bytes)?,
            Format::JsonLines => scan::json_lines(path, bytes)?,
            Format::Parquet => source.parquet_outline()?,
        };
        Ok(source)
    }

    fn delimited(&self) -> Delimited<'a> {
        let separator = if self.format == Format::Tsv { b'\t' } else { b',' };
        Delimited { path: self.path, bytes: self.bytes, separator, quote: self.quote }
    }

    /// Tab-separated files exist with and without quoting. One that is no sound quoted file, though not for want of a
    /// last quote, may be a sound plain one.
    fn tab_separated(&mut self) -> Result<Outline, DataError> {
        let quoted = self.delimited().outline();
        match &quoted {
            Err(DataError::BrokenQuote { what, .. }) if !what.contains("never closed") => {}
            _ => return quoted,
        }
        self.quote = None;
        self.delimited().outline().or(quoted)
    }

    fn parquet_outline(&self) -> Result<Outline, DataError> {
        let mut reader = ParquetReader::new(Bytes::new(self.bytes));
        let schema = reader.schema().map_err(|error| self.failed(&error))?;
        let rows = reader.num_rows().map_err(|error| self.failed(&error))?;
        let columns = schema.iter_names().map(ToString::to_string).collect();
        Ok(Outline { columns, rows, blanks: Vec::new() })
    }

    /// The columns at `picked`, in that order.
    fn load(&self, picked: &[usize]) -> Result<DataFrame, DataError> {
        let frame = match self.format {
            Format::Csv | Format::Tsv => self.load_delimited(picked),
            Format::Json => self.load_json(picked, JsonFormat::Json),
            Format::JsonLines => self.load_json(picked, JsonFormat::JsonLines),
            Format::Parquet => {
                ParquetReader::new(Bytes::new(self.bytes)).with_projection(Some(picked.to_vec())).finish()
            }
        };
        let frame = frame.map_err(|error| self.failed(&error))?;
        if frame.height() != self.outline.rows || frame.width() != picked.len() {
            let message = format!(
                "{} rows of {} columns were read where the file has {} of {}",
                frame.height(),
                frame.width(),
                self.outline.rows,
                picked.len()
            );
            return Err(DataError::Reader { path: self.path.to_owned(), format: self.format, message });
        }
        Ok(frame)
    }

    fn load_delimited(&self, picked: &[usize]) -> PolarsResult<DataFrame> {
        let file = self.delimited();
        let bytes = file.without(&self.outline.blanks);
        let parsing = CsvParseOptions::default().with_separator(file.separator).with_quote_char(self.quote);
        CsvReadOptions::default()
            .with_infer_schema_length(Some(0))
            .with_projection(Some(Arc::new(picked.to_vec())))
            .with_parse_options(parsing)
            .into_reader_with_file_handle(Bytes::new(&bytes[..]))
            .finish()
    }

    fn load_json(&self, picked: &[usize], format: JsonFormat) -> PolarsResult<DataFrame> {
        let field =
            |&place: &usize| Field::new(self.outline.columns[place].as_str().into(), DataType::String);
        let schema = Schema::from_iter(picked.iter().map(field));
        JsonReader::new(Bytes::new(self.bytes))
            .with_json_format(format)
            .with_schema(Arc::new(schema))
            .finish()
    }

    fn failed(&self, error: &polars::error::PolarsError) -> DataError {
        DataError::Reader { path: self.path.to_owned(), format: self.format, message: error.to_string() }
    }
}

fn as_text(column: &Column) -> PolarsResult<StringChunked> {
    let series = column.as_materialized_series();
    if *series.dtype() == DataType::Date {
        let days = series.to_physical_repr().cast(&DataType::Int64)?;
        let dates = days.i64()?.iter().map(|day| day.and_then(Date::from_epoch_days));
        return Ok(dates.map(|date| date.map(|date| date.to_string())).collect());
    }
    Ok(series.cast(&DataType::String)?.str()?.rechunk().into_owned())
}

/// Which column holds what, by its place among the file's columns.
#[derive(Clone, Copy, Debug)]
struct Roles {
    question: usize,
    answer: usize,
    category: Option<usize>,
    air_date: Option<usize>,
    round: Option<usize>,
    value: Option<usize>,
}

/// The spellings of a column, best first, without spaces, case and signs.
struct Spelling {
    role: &'static str,
    flag: &'static str,
    known: &'static [&'static str],
}

const QUESTION: Spelling =
    Spelling { role: "question", flag: "--question-column", known: &["question", "clue"] };
const ANSWER: Spelling =
    Spelling { role: "answer", flag: "--answer-column", known: &["answer", "response", "correctresponse"] };
const CATEGORY: Spelling = Spelling { role: "category", flag: "--category-column", known: &["category"] };
const AIR_DATE: Spelling =
    Spelling { role: "air date", flag: "--air-date-column", known: &["airdate", "date"] };

impl Roles {
    fn find(path: &Path, columns: &[String], options: &ReadOptions) -> Result<Self, DataError> {
        let columns = Columns { path, names: columns };
        Ok(Self {
            question: columns.need(&QUESTION, options.question.as_deref())?,
            answer: columns.need(&ANSWER, options.answer.as_deref())?,
            category: columns.find(&CATEGORY, options.category.as_deref())?,
            air_date: columns.find(&AIR_DATE, options.air_date.as_deref())?,
            round: columns.known(&["round"]),
            value: columns.known(&["value", "cluevalue"]),
        })
    }

    /// The places in use, ascending, each once: what readers take as a projection.
    fn picked(&self) -> Vec<usize> {
        let maybe = [self.category, self.air_date, self.round, self.value];
        let mut places = vec![self.question, self.answer];
        places.extend(maybe.iter().flatten());
        places.sort_unstable();
        places.dedup();
        places
    }

    /// The same roles by place among [`Self::picked`].
    fn places(&self) -> Self {
        let picked = self.picked();
        let place = |column: usize| picked.partition_point(|&other| other < column);
        Self {
            question: place(self.question),
            answer: place(self.answer),
            category: self.category.map(place),
            air_date: self.air_date.map(place),
            round: self.round.map(place),
            value: self.value.map(place),
        }
    }
}

struct Columns<'a> {
    path: &'a Path,
    names: &'a [String],
}

impl Columns<'_> {
    fn need(&self, spelling: &Spelling, asked: Option<&str>) -> Result<usize, DataError> {
        self.find(spelling, asked)?.ok_or_else(|| self.missing(spelling, None))
    }

    fn find(&self, spelling: &Spelling, asked: Option<&str>) -> Result<Option<usize>, DataError> {
        let Some(asked) = asked else {
            return Ok(self.known(spelling.known));
        };
        let exactly = self.names.iter().position(|name| name.trim() == asked.trim());
        let place = exactly.or_else(|| self.known(&[plain(asked).as_str()]));
        place.map(Some).ok_or_else(|| self.missing(spelling, Some(asked)))
    }

    fn known(&self, spellings: &[&str]) -> Option<usize> {
        let place = |spelling: &&str| self.names.iter().position(|name| plain(name) == **spelling);
        spellings.iter().find_map(place)
    }

    fn missing(&self, spelling: &Spelling, asked: Option<&str>) -> DataError {
        DataError::MissingColumn {
            path: self.path.to_owned(),
            role: spelling.role,
            flag: spelling.flag,
            asked: asked.map(str::to_owned),
            found: self.names.iter().map(|name| format!("`{}`", name.trim())).collect(),
        }
    }
}

fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}
