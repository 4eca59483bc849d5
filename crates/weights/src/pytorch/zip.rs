//! The table of contents of a zip archive, for members that are stored as they are.
//!
//! It trades the checksums, which would mean reading gigabytes twice. It refuses compression, encryption, archives in
//! several files, members that share bytes or lie outside the archive, and two of one name.

use std::collections::BTreeMap;
use std::ops::Range;

/// Signature and length of the record at the archive's end, less its comment.
const END: (&[u8], usize) = (b"PK\x05\x06", 22);
/// Of the record that points to the following one.
const LOCATOR: (&[u8], usize) = (b"PK\x06\x07", 20);
/// Of the end of an archive whose numbers need 64 bits.
const END_64: (&[u8], usize) = (b"PK\x06\x06", 56);
/// Of a member's entry in the table.
const ENTRY: (&[u8], usize) = (b"PK\x01\x02", 46);
/// Of the header in front of a member.
const LOCAL: (&[u8], usize) = (b"PK\x03\x04", 30);
/// The extra field that holds numbers of 64 bits.
const WIDE: u16 = 1;
/// The longest comment.
const MAX_COMMENT: usize = 0xFFFF;
/// What a number of 32 bits says if the extra field holds it.
const IN_EXTRA: u64 = 0xFFFF_FFFF;

/// Every member's bytes by name.
pub(super) fn members(bytes: &[u8]) -> Result<BTreeMap<&str, Range<usize>>, String> {
    let end = end_of(bytes)?;
    let mut table = bytes.get(end.table..end.start).ok_or("its table of contents lies outside of it")?;
    let mut members = BTreeMap::new();
    let mut spans = Vec::new();
    for _ in 0..end.entries {
        let (entry, rest) = Entry::read(table)?;
        table = rest;
        let span = entry.span(bytes, end.table)?;
        spans.push((span.header, span.data.end, entry.name));
        if members.insert(entry.name, span.data).is_some() {
            return Err(format!("`{}` stands in it twice", entry.name));
        }
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[0].1 > pair[1].0 {
            return Err(format!("`{}` and `{}` share bytes", pair[0].2, pair[1].2));
        }
    }
    Ok(members)
}

struct End {
    entries: u64,
    /// Where the table begins.
    table: usize,
    /// Where the end's own records begin.
    start: usize,
}

/// Reads the record at the end, and the one of 64 bits if there is one.
fn end_of(bytes: &[u8]) -> Result<End, String> {
    let (signature, length) = END;
    let earliest = bytes.len().saturating_sub(length + MAX_COMMENT);
    let last = bytes.len().checked_sub(length).ok_or("it is cut short")?;
    let start = (earliest..=last).rev().find(|&at| {
        bytes[at..].starts_with(signature)
            && u16_at(bytes, at + 20).map(usize::from) == Some(bytes.len() - at - length)
    });
    let start = start.ok_or("it is cut short: a zip archive's table of contents is missing at its end")?;
    let locator = start.checked_sub(LOCATOR.1).filter(|&at| bytes[at..].starts_with(LOCATOR.0));
    let numbers = match locator {
        Some(at) => wide_end(bytes, at),
        None => (|| {
            let entries = u16_at(bytes, start + 10)?;
            Some((entries.into(), u32_at(bytes, start + 16)?.into(), start))
        })(),
    };
    let (entries, table, start): (u64, u64, usize) = numbers.ok_or("the end of its table is damaged")?;
    let table = usize::try_from(table).map_err(|_| "its table of contents lies outside of it")?;
    Ok(End { entries, table, start })
}

fn wide_end(bytes: &[u8], locator: usize) -> Option<(u64, u64, usize)> {
    let start = usize::try_from(u64_at(bytes, locator + 8)?).ok()?;
    let record = bytes.get(start..start.checked_add(END_64.1)?)?;
    (start < locator && record.starts_with(END_64.0)).then_some((
        u64_at(record, 32)?,
        u64_at(record, 48)?,
        start,
    ))
}

struct Entry<'a> {
    name: &'a str,
    size: u64,
    /// Where the member's own header begins.
    header: u64,
}

struct Span {
    header: usize,
    data: Range<usize>,
}

impl<'a> Entry<'a> {
    /// The first entry of a table, and the rest of the table.
    fn read(table: &'a [u8]) -> Result<(Self, &'a [u8]), String> {
        let cut = || "its table of contents is cut short".to_owned();
        let (signature, length) = ENTRY;
        let fixed = table.get(..length).filter(|fixed| fixed.starts_with(signature)).ok_or_else(cut)?;
        let short = |at| u16_at(fixed, at).unwrap_or_default();
        let long = |at| u64::from(u32_at(fixed, at).unwrap_or_default());
        let (name, extra, comment) = (short(28), short(30), short(32));
        let rest = &table[length..];
        let (name, rest) = rest.split_at_checked(name.into()).ok_or_else(cut)?;
        let (extra, rest) = rest.split_at_checked(extra.into()).ok_or_else(cut)?;
        let rest = rest.get(usize::from(comment)..).ok_or_else(cut)?;
        let name = str::from_utf8(name).map_err(|_| "a name in it is no UTF-8")?;
        let mut numbers = [long(24), long(20), long(42)];
        widen(&mut numbers, extra).ok_or_else(|| format!("the entry of `{name}` is damaged"))?;
        let [size, packed, header] = numbers;
        if short(8) & 1 != 0 {
            return Err(format!("`{name}` is encrypted"));
        }
        if short(10) != 0 || packed != size {
            return Err(format!("`{name}` is compressed, which PyTorch never does"));
        }
        Ok((Self { name, size, header }, rest))
    }

    /// The member's place, which must lie before the table.
    fn span(&self, bytes: &[u8], table: usize) -> Result<Span, String> {
        let place = || {
            let header = usize::try_from(self.header).ok()?;
            let fixed = bytes.get(header..header.checked_add(LOCAL.1)?)?;
            let (name, extra) = (usize::from(u16_at(fixed, 26)?), usize::from(u16_at(fixed, 28)?));
            let start = header + LOCAL.1 + name + extra;
            let end = start.checked_add(usize::try_from(self.size).ok()?)?;
            let same = bytes.get(header + LOCAL.1..)?.get(..name)? == self.name.as_bytes();
            (fixed.starts_with(LOCAL.0) && same && end <= table).then_some(Span { header, data: start..end })
        };
        place().ok_or_else(|| format!("`{}` does not lie where the table says, or is cut short", self.name))
    }
}

/// Takes numbers that did not fit from the extra field, in their order.
fn widen(numbers: &mut [u64; 3], mut extra: &[u8]) -> Option<()> {
    if numbers.iter().all(|&number| number != IN_EXTRA) {
        return Some(());
    }
    loop {
        let (kind, length) = (u16_at(extra, 0)?, usize::from(u16_at(extra, 2)?));
        let mut field = extra.get(4..4 + length)?;
        if kind == WIDE {
            for number in numbers.iter_mut().filter(|number| **number == IN_EXTRA) {
                *number = u64_at(field, 0)?;
                field = &field[8..];
            }
            return Some(());
        }
        extra = &extra[4 + length..];
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|&value| u16::from_le_bytes(value))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|&value| u32::from_le_bytes(value))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|&value| u64::from_le_bytes(value))
}
