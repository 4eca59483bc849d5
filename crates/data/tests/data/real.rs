//! The real files beside the repository: read, cleaned, split, tokenized and packed, with every row accounted for.

use std::path::PathBuf;

use buzzer_data::{
    Clue, DropReason, PackOptions, Packed, ReadOptions, Split, clean, pack, read_clues, split,
};
use buzzer_text::{Fields, Renderer, Template, Tokenizer};

fn shared(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn packed(renderer: &Renderer, clues: &[Clue], row_len: usize) -> Packed {
    let fields = |clue| {
        let Clue { category, question, answer, .. }: &Clue = clue;
        Fields { category, question, answer }
    };
    let fields: Vec<_> = clues.iter().map(fields).collect();
    pack(&renderer.examples(&fields).unwrap(), &PackOptions { row_len, ..PackOptions::default() })
}

/// Runs the whole way and returns the training side.
fn run(name: &str, rows: usize, row_len: usize) -> Option<Packed> {
    let data = shared(&format!("data/{name}"))?;
    let tokenizer = shared("tokenizer/llama2/tokenizer.json")?;
    let renderer = Renderer::new(Tokenizer::from_file(&tokenizer).unwrap(), Template::Question);
    let cleaned = clean(read_clues(&data, &ReadOptions::default()).unwrap());
    let report = &cleaned.report;
    assert_eq!(report.rows_read, rows);
    assert_eq!(report.rows_read, report.rows_kept + report.dropped.values().sum::<usize>());
    assert!(!report.dropped.contains_key(&DropReason::TooLong));
    assert_eq!(report.rows_undated, 0, "every date of {name} is readable");
    for clue in &cleaned.clues {
        assert!(!clue.question.contains("<a ") && !clue.question.contains("\\\""), "row {}", clue.row);
    }
    let (train, eval) = split(cleaned.clues, &Split::Hash { fraction: 0.05, seed: 0 }).unwrap();
    assert_eq!(train.len() + eval.len(), cleaned.report.rows_kept);
    let (trained, held_out) = (packed(&renderer, &train, row_len), packed(&renderer, &eval, row_len));
    for (packed, clues) in [(&trained, &train), (&held_out, &eval)] {
        assert_eq!(packed.report.documents + packed.report.too_long, clues.len());
        assert_eq!(packed.rows.iter().map(|row| row.ids.len()).sum::<usize>(), packed.report.tokens);
        let documents =
            |row: &buzzer_data::PackedRow| row.documents.last().map_or(0, |&last| last as usize + 1);
        assert_eq!(packed.rows.iter().map(documents).sum::<usize>(), packed.report.documents);
    }
    Some(trained)
}

#[test]
fn the_small_file() {
    let Some(packed) = run("jeopardy_499.csv", 499, 1024) else { return };
    assert_eq!(packed.report.too_long, 0);
}

#[test]
fn the_file_of_20_000() {
    let Some(packed) = run("jeopardy_20k.csv", 19_999, 1024) else { return };
    assert!(packed.report.efficiency >= 0.99, "{:?}", packed.report);
}

#[test]
fn short_rows_leave_long_clues_out_and_count_them() {
    let Some(packed) = run("jeopardy_20k.csv", 19_999, 48) else { return };
    assert!(packed.report.too_long > 0, "{:?}", packed.report);
}

#[test]
fn the_full_size() {
    let Some(packed) = run("jeopardy_216930.csv", 216_930, 1024) else { return };
    assert!(packed.report.efficiency >= 0.995, "{:?}", packed.report);
    assert_eq!(packed.report.too_long, 0, "{:?}", packed.report);
}
