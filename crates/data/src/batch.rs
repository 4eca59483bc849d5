//! Packed rows into rectangles.
//!
//! Padding is marked by place (document -1, label -100), never by a token id, because a tokenizer's padding token may
//! be its end token.

use crate::PackedRow;
use crate::pack::IGNORED;

/// A rectangle `[rows, len]`, row-major, on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Rows b.
    pub rows: usize,
    /// Tokens in a row t, padding included.
    pub len: usize,
    /// Token ids `[b, t]`; padding 0.
    pub ids: Vec<i32>,
    /// Positions within the document `[b, t]`; padding 0.
    pub positions: Vec<i32>,
    /// Document within the row `[b, t]`; padding -1.
    pub documents: Vec<i32>,
    /// Targets in place, not shifted `[b, t]`; padding and non-targets -100.
    pub labels: Vec<i32>,
    /// Tokens without padding.
    pub tokens: usize,
    /// Targets.
    pub loss_tokens: usize,
}

impl Batch {
    /// Pads rows to the longest of them, or to `pad_to` if that is longer. Nothing is cut.
    #[must_use]
    pub fn collate(rows: &[&PackedRow], pad_to: Option<usize>) -> Self {
        let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let len = longest.max(pad_to.unwrap_or(0));
        let size = rows.len() * len;
        let mut batch = Self { rows: rows.len(), len, ..Self::default() };
        for column in [&mut batch.ids, &mut batch.positions, &mut batch.documents, &mut batch.labels] {
            column.reserve_exact(size);
        }
        for (done, row) in rows.iter().enumerate() {
            let end = (done + 1) * len;
            batch.ids.extend(row.ids.iter().map(|&id| id as i32));
            batch.ids.resize(end, 0);
            batch.positions.extend(row.positions.iter().map(|&position| position as i32));
            batch.positions.resize(end, 0);
            batch.documents.extend_from_slice(&row.documents);
            batch.documents.resize(end, -1);
            batch.labels.extend_from_slice(&row.labels);
            batch.labels.resize(end, IGNORED);
            batch.tokens += row.ids.len();
        }
        batch.loss_tokens = batch.labels.iter().filter(|&&label| label != IGNORED).count();
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ids: &[u32]) -> PackedRow {
        let labels = ids.iter().enumerate().map(|(i, &id)| if i == 0 { IGNORED } else { id as i32 });
        PackedRow {
            ids: ids.to_vec(),
            positions: (0..ids.len() as u32).collect(),
            documents: vec![0; ids.len()],
            labels: labels.collect(),
        }
    }

    #[test]
    fn padding_is_marked_by_place() {
        let batch = Batch::collate(&[&row(&[5, 6, 7]), &row(&[8])], None);
        assert_eq!((batch.rows, batch.len, batch.tokens, batch.loss_tokens), (2, 3, 4, 2));
        assert_eq!(batch.ids, [5, 6, 7, 8, 0, 0]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 0, 0]);
        assert_eq!(batch.documents, [0, 0, 0, 0, -1, -1]);
        assert_eq!(batch.labels, [-100, 6, 7, -100, -100, -100]);
    }

    #[test]
    fn a_width_widens_and_never_cuts() {
        assert_eq!(Batch::collate(&[&row(&[1, 2])], Some(4)).ids, [1, 2, 0, 0]);
        assert_eq!(Batch::collate(&[&row(&[1, 2])], Some(1)).ids, [1, 2]);
        assert_eq!(Batch::collate(&[], Some(4)).ids, [0; 0]);
    }
}
