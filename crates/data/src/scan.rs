//! The structure of a text file, checked before any column is read.
//!
//! Column readers are made to be lenient: they fill short rows with nulls and let an unclosed quote swallow the rest.
//! For a training corpus that is silent damage, so one pass over the bytes finds the header, counts the rows, and
//! names row and line of the first fault. It costs some 40 ms at 32 MB.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::DataError;

/// What a sound file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outline {
    /// Columns in the order in which they first appear.
    pub(crate) columns: Vec<String>,
    /// Data rows.
    pub(crate) rows: usize,
    /// Offsets of blank lines between the rows of a delimited file.
    pub(crate) blanks: Vec<Range<usize>>,
}

/// Checks that the bytes are text.
pub(crate) fn check_utf8(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let Err(error) = std::str::from_utf8(bytes) else {
        return Ok(());
    };
    let byte = error.valid_up_to();
    Err(DataError::NotUtf8 { path: path.to_owned(), line: line_at(bytes, byte), byte })
}

fn line_at(bytes: &[u8], offset: usize) -> usize {
    1 + bytes[..offset].iter().filter(|&&byte| byte == b'\n').count()
}

/// A walk over a delimited file, record by record.
pub(crate) struct Delimited<'a> {
    pub(crate) path: &'a Path,
    pub(crate) bytes: &'a [u8],
    pub(crate) separator: u8,
    /// `None` where quotes are ordinary characters.
    pub(crate) quote: Option<u8>,
}

/// Where the walk stands.
#[derive(Clone, Copy)]
struct At {
    offset: usize,
    line: usize,
    row: usize,
}

impl Delimited<'_> {
    /// Header and number of rows, if every row has as many fields as the header and every quote is closed.
    pub(crate) fn outline(&self) -> Result<Outline, DataError> {
        let mut at = At { offset: 0, line: 1, row: 0 };
        let (mut columns, mut blanks) = (Vec::new(), Vec::new());
        self.record(&mut at, |field| columns.push(self.unquoted(field)))?;
        while at.offset < self.bytes.len() {
            if let Some(width) = self.blank_line(at.offset) {
                blanks.push(at.offset..at.offset + width);
                at.offset += width;
                at.line += 1;
                continue;
            }
            let line = at.line;
            at.row += 1;
            let mut found = 0;
            self.record(&mut at, |_| found += 1)?;
            if found != columns.len() {
                return Err(self.ragged(at, line, found, columns.len()));
            }
        }
        Ok(Outline { columns, rows: at.row, blanks })
    }

    /// The bytes without the given blank lines, which a column reader would take for rows. Most files have none.
    pub(crate) fn without(&self, blanks: &[Range<usize>]) -> Cow<'_, [u8]> {
        if blanks.is_empty() {
            return Cow::Borrowed(self.bytes);
        }
        let mut kept = Vec::with_capacity(self.bytes.len());
        let mut from = 0;
        for blank in blanks {
            kept.extend_from_slice(&self.bytes[from..blank.start]);
            from = blank.end;
        }
        kept.extend_from_slice(&self.bytes[from..]);
        Cow::Owned(kept)
    }

    fn ragged(&self, at: At, line: usize, found: usize, expected: usize) -> DataError {
        let at_end = at.offset >= self.bytes.len();
        let hint =
            if at_end && found < expected { " and the file ends there, perhaps cut short" } else { "" };
        DataError::Ragged { path: self.path.to_owned(), row: at.row, line, found, expected, hint }
    }

    fn blank_line(&self, offset: usize) -> Option<usize> {
        let rest = &self.bytes[offset..];
        match rest {
            [b'\n', ..] => Some(1),
            [b'\r', b'\n', ..] => Some(2),
            [b'\r'] => Some(1),
            _ => None,
        }
    }

    /// Walks over one record and its line end, and hands each field to `each`.
    fn record(&self, at: &mut At, mut each: impl FnMut(&[u8])) -> Result<(), DataError> {
        loop {
            let start = at.offset;
            let end = self.field(at)?;
            match self.bytes.get(end) {
                Some(&byte) if byte == self.separator => {
                    each(&self.bytes[start..end]);
                    at.offset = end + 1;
                }
                ending => {
                    let field = &self.bytes[start..end];
                    each(field.strip_suffix(b"\r").unwrap_or(field));
                    at.offset = end + usize::from(ending.is_some());
                    at.line += usize::from(ending.is_some());
                    return Ok(());
                }
            }
        }
    }

    /// The end of the field at `at`: the place of its separator, of its line feed, or of the end of the file.
    fn field(&self, at: &mut At) -> Result<usize, DataError> {
        if self.quote.is_some() && self.bytes.get(at.offset) == self.quote.as_ref() {
            return self.quoted_field(at);
        }
        let rest = &self.bytes[at.offset..];
        let ends = |&byte: &u8| byte == self.separator || byte == b'\n';
        let length = rest.iter().position(ends).unwrap_or(rest.len());
        if let Some(quote) = self.quote {
            let quotes = rest[..length].iter().filter(|&&byte| byte == quote).count();
            if quotes % 2 == 1 {
                return Err(self.broken(*at, "a lone quote inside a field that does not begin with one"));
            }
        }
        Ok(at.offset + length)
    }

    fn quoted_field(&self, at: &mut At) -> Result<usize, DataError> {
        let begin = *at;
        let mut place = at.offset + 1;
        loop {
            match self.bytes.get(place) {
                None => return Err(self.broken(begin, "a quote is opened here and never closed")),
                Some(b'\n') => at.line += 1,
                Some(byte) if Some(*byte) == self.quote => {
                    if self.bytes.get(place + 1).copied() != self.quote {
                        break;
                    }
                    place += 1;
                }
                Some(_) => {}
            }
            place += 1;
        }
        let end = place + 1;
        match self.bytes.get(end..) {
            None | Some([] | [b'\n', ..]) => Ok(end),
            Some([b'\r']) | Some([b'\r', b'\n', ..]) => Ok(end + 1),
            Some([byte, ..]) if *byte == self.separator => Ok(end),
            Some(_) => Err(self.broken(begin, "text follows the closing quote of a field")),
        }
    }

    fn broken(&self, at: At, what: &'static str) -> DataError {
        DataError::BrokenQuote { path: self.path.to_owned(), row: at.row, line: at.line, what }
    }

    fn unquoted(&self, field: &[u8]) -> String {
        let text = String::from_utf8_lossy(field);
        let Some(quote) = self.quote.map(char::from) else {
            return text.into_owned();
        };
        match text.strip_prefix(quote).and_then(|text| text.strip_suffix(quote)) {
            Some(inner) => inner.replace(&format!("{quote}{quote}"), &quote.to_string()),
            None => text.into_owned(),
        }
    }
}

/// Keys and number of the objects in one JSON array.
pub(crate) fn json_array(path: &Path, bytes: &[u8]) -> Result<Outline, DataError> {
    let mut outline = Outline::default();
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    let result = Objects(&mut outline).deserialize(&mut parser).and_then(|()| parser.end());
    match result {
        Ok(()) => Ok(outline),
        Err(error) => Err(json_error(path, outline.rows.max(1), 0, &error)),
    }
}

/// Keys and number of the objects in a file of one object a line.
pub(crate) fn json_lines(path: &Path, bytes: &[u8]) -> Result<Outline, DataError> {
    let mut outline = Outline::default();
    for (before, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        outline.rows += 1;
        let mut parser = serde_json::Deserializer::from_slice(line);
        let result = Object(&mut outline.columns).deserialize(&mut parser).and_then(|()| parser.end());
        result.map_err(|error| json_error(path, outline.rows, before, &error))?;
    }
    Ok(outline)
}

fn json_error(path: &Path, row: usize, lines_before: usize, error: &serde_json::Error) -> DataError {
    let message = error.to_string();
    let place = message.rfind(" at line ").unwrap_or(message.len());
    DataError::Json {
        path: path.to_owned(),
        row,
        line: lines_before + error.line(),
        column: error.column(),
        message: message[..place].to_owned(),
    }
}

struct Objects<'a>(&'a mut Outline);

impl<'de> DeserializeSeed<'de> for Objects<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Objects<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of objects, one for each clue")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        self.0.rows = 1;
        while sequence.next_element_seed(Object(&mut self.0.columns))?.is_some() {
            self.0.rows += 1;
        }
        self.0.rows -= 1;
        Ok(())
    }
}

struct Object<'a>(&'a mut Vec<String>);

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with the clue's fields")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if !self.0.iter().any(|known| *known == key) {
                self.0.push(key.into_owned());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}
