//! Telling one set of packed rows from another.
//!
//! Rows come from a clue file, its cleaning and split, a tokenizer, a template, packing and a seed. A hash of what comes out
//! covers all of these, and does not change where a file is only moved or stored in another format.

use crate::PackedRow;

/// The BLAKE3 hash of rows in their order, in hexadecimal digits.
#[must_use]
pub fn hash_rows(rows: &[PackedRow]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::new();
    for row in rows {
        bytes.clear();
        bytes.extend((row.ids.len() as u64).to_le_bytes());
        bytes.extend(row.ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(row.positions.iter().flat_map(|position| position.to_le_bytes()));
        bytes.extend(row.documents.iter().flat_map(|document| document.to_le_bytes()));
        bytes.extend(row.labels.iter().flat_map(|label| label.to_le_bytes()));
        hasher.update(&bytes);
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ids: &[u32]) -> PackedRow {
        PackedRow {
            ids: ids.to_vec(),
            positions: vec![0; ids.len()],
            documents: vec![0; ids.len()],
            labels: vec![-100; ids.len()],
        }
    }

    #[test]
    fn every_change_of_a_row_changes_the_hash() {
        let rows = [row(&[1, 2]), row(&[3])];
        let hash = hash_rows(&rows);
        assert_eq!(hash, hash_rows(&rows.clone()));
        let changes: [fn(&mut PackedRow); 4] = [
            |row| row.ids[0] = 9,
            |row| row.positions[0] = 1,
            |row| row.documents[0] = 1,
            |row| row.labels[0] = 1,
        ];
        for change in changes {
            let mut changed = rows.clone();
            change(&mut changed[1]);
            assert_ne!(hash, hash_rows(&changed));
        }
        assert_ne!(hash, hash_rows(&[row(&[3]), row(&[1, 2])]));
        assert_ne!(hash, hash_rows(&[row(&[1]), row(&[2, 3])]));
        assert_ne!(hash, hash_rows(&rows[..1]));
    }
}
