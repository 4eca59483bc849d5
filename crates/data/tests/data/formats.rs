//! One set of invented clues, written in every format, is read as the same clues.

use std::fs::File;

use buzzer_data::{Clue, DataError, Format, ReadOptions, clean, read_clues};
use polars::prelude::{Column, DataFrame, DataType, IntoColumn, ParquetWriter};
use serde_json::{Map, Value, json};

use crate::support::{COLUMNS, Folder, ROWS, cleaned, csv, delimited, read, read_with};

fn expected() -> Vec<Clue> {
    cleaned("clues.csv", csv()).clues
}

/// The clues as JSON objects, empty cells as nulls.
fn objects() -> Vec<Value> {
    let object = |row: &[&str; 7]| {
        let cell = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
        let cells = COLUMNS.iter().zip(row).map(|(name, text)| ((*name).to_owned(), cell(text)));
        Value::Object(cells.collect::<Map<_, _>>())
    };
    ROWS.iter().map(object).collect()
}

fn frame() -> DataFrame {
    let column = |(place, name): (usize, &&str)| {
        let cells = ROWS.map(|row| Some(row[place]).filter(|text| !text.is_empty()));
        Column::new((*name).into(), cells)
    };
    DataFrame::new(ROWS.len(), COLUMNS.iter().enumerate().map(column).collect()).unwrap()
}

fn write_parquet(folder: &Folder, name: &str, frame: &mut DataFrame) -> std::path::PathBuf {
    let path = folder.path(name);
    ParquetWriter::new(File::create(&path).unwrap()).finish(frame).unwrap();
    path
}

#[test]
fn the_csv_holds_what_was_invented() {
    let clues = expected();
    let find = |row: u32| clues.iter().find(|clue| clue.row == row).unwrap();
    assert_eq!(clues.iter().map(|clue| clue.row).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(find(1).category, "INVENTED ISLES");
    assert_eq!(find(1).air_date.unwrap().to_string(), "2001-02-03");
    assert_eq!(find(2).answer, "Corva, or Korva");
    assert_eq!(find(2).value.as_deref(), Some("$1,200"));
    assert_eq!(find(3).question, "He said \"no\" to the \"yes\" men");
    assert_eq!(find(4).answer, "007");
    assert_eq!((find(5).answer.as_str(), find(5).value.as_deref()), ("None", Some("None")));
    assert_eq!(find(5).air_date.unwrap().to_string(), "2002-04-05");
    assert_eq!((find(6).answer.as_str(), find(6).value.as_deref()), ("L'\u{c9}t\u{e9}", Some("$400")));
    assert_eq!(find(7).question, "This bird of Brill");
    assert_eq!(
        (find(8).question.as_str(), find(8).answer.as_str()),
        ("Salt & sand are its only goods", "Brill & Sons")
    );
    assert_eq!((find(8).air_date, find(8).value.clone()), (None, None));
    assert_eq!(
        (find(9).question.as_str(), find(9).answer.as_str()),
        ("Words with 'stray' backslashes", "the \"isle\"")
    );
    assert_eq!(find(9).category, "");
}

#[test]
fn tsv_json_and_json_lines_give_the_same_clues() {
    let lines: String = objects().iter().map(|object| format!("{object}\n")).collect();
    let pretty = serde_json::to_string_pretty(&objects()).unwrap();
    assert_eq!(cleaned("a.tsv", delimited(COLUMNS, &ROWS, "\t", "\r\n")).clues, expected());
    assert_eq!(cleaned("a.tab", delimited(COLUMNS, &ROWS, "\t", "\n")).clues, expected());
    assert_eq!(cleaned("a.json", Value::Array(objects()).to_string()).clues, expected());
    assert_eq!(cleaned("a.json", pretty).clues, expected());
    assert_eq!(cleaned("a.jsonl", &lines).clues, expected());
    assert_eq!(cleaned("a.ndjson", lines.replace('\n', "\r\n\r\n")).clues, expected());
}

#[test]
fn a_json_file_of_one_object_a_line_is_read_as_lines() {
    let lines: String = objects().iter().map(|object| format!("{object}\n")).collect();
    assert_eq!(cleaned("a.json", format!("\u{feff}{lines}")).clues, expected());
}

#[test]
fn a_tsv_without_quoting_keeps_its_quotes() {
    let line = |row: &[&str; 7]| row.join("\t") + "\n";
    let plain: String = std::iter::once(&COLUMNS).chain(&ROWS).map(line).collect();
    assert_eq!(cleaned("a.tsv", plain).clues, expected());
    let odd = "question\tanswer\n5\" of snow fell\tthe \"isle\" of Ambra\n\"It\" rose 6\"\tthe sea\n";
    let clues = cleaned("a.tsv", odd).clues;
    assert_eq!(
        (clues[0].question.as_str(), clues[0].answer.as_str()),
        ("5\" of snow fell", "the \"isle\" of Ambra")
    );
    assert_eq!(clues[1].question, "\"It\" rose 6\"");
}

#[test]
fn parquet_gives_the_same_clues() {
    let folder = Folder::new();
    let path = write_parquet(&folder, "a.parquet", &mut frame());
    assert_eq!(clean(read_clues(&path, &ReadOptions::default()).unwrap()).clues, expected());
}

#[test]
fn parquet_columns_may_be_numbers_and_dates() {
    let folder = Folder::new();
    let days = Column::new("Air Date".into(), [Some(11_000_i32), None]).cast(&DataType::Date).unwrap();
    let columns = vec![
        Column::new("Question".into(), ["How many isles?", "How many birds?"]),
        Column::new("Answer".into(), [7_i64, 40]),
        days.into_column(),
    ];
    let path = write_parquet(&folder, "a.pq", &mut DataFrame::new(2, columns).unwrap());
    let clues = clean(read_clues(&path, &ReadOptions::default()).unwrap()).clues;
    assert_eq!((clues[0].answer.as_str(), clues[1].answer.as_str()), ("7", "40"));
    assert_eq!(clues[0].air_date.unwrap().to_string(), "2000-02-13");
    assert_eq!(clues[1].air_date, None);
}

#[test]
fn json_numbers_are_read_as_text_and_missing_keys_as_nothing() {
    let rows = json!([
        {"clue": "How many isles?", "response": 7},
        {"clue": "Which isle?", "response": "Brill", "value": 200, "category": "ISLES"},
        {"response": "nothing asked"},
    ]);
    let cleaned = cleaned("a.json", rows.to_string());
    let [one, two] = cleaned.clues.as_slice() else { panic!("{:?}", cleaned.clues) };
    assert_eq!((one.answer.as_str(), one.value.as_deref()), ("7", None));
    assert_eq!((two.answer.as_str(), two.value.as_deref()), ("Brill", Some("200")));
    assert_eq!(cleaned.report.rows_read, 3);
}

#[test]
fn fields_may_span_lines_and_line_ends_do_not_matter() {
    let text = "Question,Answer\n\"Two\nlines, and\r\na third\",\"one\nanswer\"\nplain,text\n";
    let clues = cleaned("a.csv", text).clues;
    assert_eq!(
        (clues[0].question.as_str(), clues[0].answer.as_str()),
        ("Two lines, and a third", "one answer")
    );
    assert_eq!((clues[1].row, clues[1].answer.as_str()), (2, "text"));
    for line_end in ["\n", "\r\n"] {
        let whole = delimited(COLUMNS, &ROWS, ",", line_end);
        assert_eq!(cleaned("a.csv", &whole).clues, expected());
        assert_eq!(cleaned("a.csv", whole.trim_end()).clues, expected());
        assert_eq!(cleaned("a.csv", whole.clone() + line_end + line_end).clues, expected());
        let blank_before_each_show =
            whole.replace(&format!("{line_end}\"2\""), &format!("{line_end}{line_end}\"2\""));
        assert_ne!(blank_before_each_show, whole);
        assert_eq!(cleaned("a.csv", blank_before_each_show).clues, expected());
    }
}

#[test]
fn the_flag_overrides_the_extension() {
    let options = ReadOptions { format: Some(Format::Csv), ..ReadOptions::default() };
    assert_eq!(clean(read_with("clues.txt", csv(), &options).unwrap()).clues, expected());
    let error = read("clues.txt", csv()).unwrap_err();
    assert!(
        matches!(error, DataError::UnknownFormat { .. }) && error.to_string().contains("--format"),
        "{error}"
    );
}

#[test]
fn a_limit_takes_the_first_rows_of_any_format() {
    let options = ReadOptions { limit: Some(4), ..ReadOptions::default() };
    let folder = Folder::new();
    let files = [
        folder.write("a.csv", csv()),
        folder.write("a.tsv", delimited(COLUMNS, &ROWS, "\t", "\n")),
        folder.write("a.json", Value::Array(objects()).to_string()),
        write_parquet(&folder, "a.parquet", &mut frame()),
    ];
    for path in files {
        let raw = read_clues(&path, &options).unwrap();
        assert_eq!((raw.len(), raw.path()), (4, path.as_path()));
        let cleaned = clean(raw);
        assert_eq!((cleaned.report.rows_read, cleaned.clues), (4, expected()[..4].to_vec()));
    }
}
