//! Damage is an error with its place, and never a shorter corpus.

use std::fs;
use std::path::Path;

use buzzer_data::{DataError, ReadOptions, read_clues};
use polars::prelude::{Column, DataFrame, ParquetWriter};

use crate::support::{COLUMNS, Folder, ROWS, cleaned, csv, delimited, read, refused};

#[test]
fn a_missing_file_is_named_with_the_flag() {
    let error = read_clues(Path::new("/nowhere/clues.csv"), &ReadOptions::default()).unwrap_err();
    assert!(matches!(error, DataError::Io { .. }));
    let message = error.to_string();
    assert!(message.contains("/nowhere/clues.csv") && message.contains("--data"), "{message}");
}

#[test]
fn nothing_at_all() {
    for name in ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"] {
        for bytes in ["", "\n", " \r\n\t", "\u{feff}", "\u{feff}\r\n"] {
            let error = refused(name, bytes, &["no data rows", "the file is empty"]);
            assert!(matches!(error, DataError::Empty { .. }));
        }
    }
}

#[test]
fn a_header_only() {
    for (name, bytes) in [
        ("a.csv", "Question,Answer"),
        ("a.csv", "\u{feff}Question,Answer\r\n\r\n"),
        ("a.csv", "\"Question\",\"Answer\"\n"),
        ("a.tsv", "Question\tAnswer\n"),
        ("a.json", "[]"),
    ] {
        assert!(matches!(refused(name, bytes, &["no data rows"]), DataError::Empty { .. }), "{bytes}");
    }
    let folder = Folder::new();
    let path = folder.path("a.parquet");
    let none: [&str; 0] = [];
    let columns = vec![Column::new("Question".into(), none), Column::new("Answer".into(), none)];
    ParquetWriter::new(fs::File::create(&path).unwrap())
        .finish(&mut DataFrame::new(0, columns).unwrap())
        .unwrap();
    assert!(matches!(read_clues(&path, &ReadOptions::default()), Err(DataError::Empty { .. })));
}

#[test]
fn a_broken_quote() {
    let unclosed = "Question,Answer\na,b\n\"c,d\ne,f\n";
    let error = refused("a.csv", unclosed, &["row 2, line 3", "never closed"]);
    assert!(matches!(error, DataError::BrokenQuote { row: 2, line: 3, .. }), "{error}");
    refused("a.tsv", unclosed.replace(',', "\t"), &["row 2, line 3", "never closed"]);
    refused(
        "a.csv",
        "Question,Answer\n\"a\n1\",b\n\"c\" d,e\n",
        &["row 2, line 4", "text follows the closing quote"],
    );
    refused("a.csv", "Question,Answer\na,b\nc,5\" of snow\n", &["row 2, line 3", "lone quote"]);
    refused("a.csv", "Question,\"Answer\na,b\n", &["row 0, line 1", "never closed"]);
}

#[test]
fn a_row_of_another_width() {
    let error = refused(
        "a.csv",
        "Category,Question,Answer\na,b,c\n\"d\n1\",e,f\ng,h\ni,j,k\n",
        &["row 3, line 5", "2 fields where the header has 3"],
    );
    assert!(
        matches!(error, DataError::Ragged { row: 3, line: 5, found: 2, expected: 3, hint: "", .. }),
        "{error:?}"
    );
    refused("a.csv", "Question,Answer\na,b\nc,d,e\n", &["row 2, line 3", "3 fields where the header has 2"]);
    refused("a.tsv", "Question\tAnswer\na\tb\nc\n", &["row 2, line 3", "1 fields", "cut short"]);
    refused("a.csv", "Question;Answer\na;b\nc;d\n", &["no question column", "`Question;Answer`"]);
}

#[test]
fn bytes_that_are_no_utf8() {
    let latin = b"Question,Answer\na,b\ncaf\xe9,d\n";
    let error = refused("a.csv", latin, &["line 3", "byte 23", "UTF-8"]);
    assert!(matches!(error, DataError::NotUtf8 { line: 3, byte: 23, .. }), "{error:?}");
    let mut packed = vec![0x1f, 0x8b, 8, 0];
    packed.extend([0xff; 40]);
    refused("a.csv", &packed, &["line 1", "UTF-8"]);
    refused("a.jsonl", b"{\"question\": \"\xff\"}", &["line 1", "UTF-8"]);
    let utf16: Vec<u8> = "Question,Answer\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(read("a.csv", [&[0xff, 0xfe][..], &utf16].concat()).is_err());
}

#[test]
fn a_csv_cut_anywhere_is_an_error_or_whole_rows() {
    let whole = csv();
    let rows = cleaned("a.csv", &whole).clues;
    let folder = Folder::new();
    let mut readable = 0;
    // A cut between the halves of a doubled quote leaves a quote that closes, which no reader can tell from an end.
    let bytes = whole.as_bytes();
    for cut in (0..whole.len()).filter(|&cut| cut == 0 || bytes[cut - 1..=cut] != *b"\"\"") {
        let path = folder.write("a.csv", &bytes[..cut]);
        let Ok(raw) = read_clues(&path, &ReadOptions::default()) else { continue };
        readable += 1;
        let clues = buzzer_data::clean(raw).clues;
        assert_eq!(clues, rows[..clues.len()], "cut at byte {cut}");
    }
    // At each of the 12 rows: with and without its line feed, except the uncut file itself; and just before its last
    // cell, where it is a row with an empty answer, dropped and counted as such.
    assert_eq!(readable, 3 * ROWS.len() - 1);
}

#[test]
fn a_cut_csv_says_that_it_may_be_cut() {
    let whole = csv();
    let half = &whole[..whole.rfind("Final Jeopardy!").unwrap()];
    refused("a.csv", half, &["row 9", "never closed"]);
    let between = half.trim_end_matches('"');
    refused("a.csv", between, &["row 9", "cut short"]);
}

#[test]
fn json_cut_anywhere_is_an_error_or_whole_rows() {
    let object = |row: &[&str; 7]| serde_json::json!({"question": row[5], "answer": row[6]}).to_string();
    let objects = ROWS.map(|row| object(&row));
    let array = format!("[{}]", objects.join(",\n"));
    let lines = objects.join("\n");
    let folder = Folder::new();
    for cut in (1..array.len()).filter(|&cut| array.is_char_boundary(cut)) {
        let path = folder.write("a.json", &array[..cut]);
        let error = read_clues(&path, &ReadOptions::default()).unwrap_err();
        assert!(matches!(error, DataError::Json { .. }), "cut at byte {cut}: {error}");
    }
    for cut in (1..lines.len()).filter(|&cut| lines.is_char_boundary(cut)) {
        let path = folder.write("a.jsonl", &lines[..cut]);
        let before = &lines[..cut];
        match read_clues(&path, &ReadOptions::default()) {
            Ok(raw) => {
                assert!(before.trim_end().ends_with('}') && raw.len() == before.trim_end().lines().count())
            }
            Err(DataError::Json { row, line, .. }) => {
                assert_eq!((row, line), (before.lines().count(), before.lines().count()))
            }
            Err(other) => panic!("cut at byte {cut}: {other}"),
        }
    }
}

#[test]
fn json_of_another_shape_says_where() {
    refused("a.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n\n[1]\n", &["row 2, line 3, column"]);
    refused("a.jsonl", "{\"question\": \"a\", \"answer\": \"b\"} x\n", &["row 1, line 1, column"]);
    refused("a.json", "[{\"question\": \"a\", \"answer\": \"b\"},\n 7]", &["row 2, line 2, column"]);
    refused("a.json", "[{\"question\": \"a\", \"answer\": \"b\"}] x", &["row 1, line 1, column"]);
    refused("a.json", "\"text\"", &["line 1, column", "an array of objects"]);
}

#[test]
fn a_parquet_file_cut_anywhere_is_an_error() {
    let folder = Folder::new();
    let path = folder.path("a.parquet");
    let column = |place: usize| Column::new(COLUMNS[place].into(), ROWS.map(|row| row[place]));
    let mut frame = DataFrame::new(ROWS.len(), vec![column(5), column(6)]).unwrap();
    ParquetWriter::new(fs::File::create(&path).unwrap()).finish(&mut frame).unwrap();
    let whole = fs::read(&path).unwrap();
    for cut in (4..whole.len()).step_by(29) {
        let error = refused("cut.parquet", &whole[..cut], &["cannot be read as parquet"]);
        assert!(matches!(error, DataError::Reader { .. }), "cut at byte {cut}: {error}");
    }
    refused("a.parquet", csv(), &["cannot be read as parquet"]);
}

#[test]
fn a_csv_named_otherwise_is_an_error() {
    assert!(read("a.json", csv()).is_err());
    assert!(read("a.jsonl", csv()).is_err());
    refused("a.tsv", delimited(COLUMNS, &ROWS, ",", "\n"), &["no question column", "\"Question\""]);
}
