//! Every row is kept or counted under one reason, and a split loses none.

use buzzer_data::{Clue, Date, DropReason, Split, clean, split};

use crate::support::{between, cleaned, csv, delimited, read, seeded};

#[test]
fn the_counts_add_up_by_reason() {
    let report = cleaned("a.csv", csv()).report;
    assert_eq!((report.rows_read, report.rows_kept, report.rows_undated), (12, 9, 2));
    let dropped: Vec<_> = report.dropped.iter().map(|(&reason, &count)| (reason, count)).collect();
    assert_eq!(
        dropped,
        [(DropReason::MediaOnly, 1), (DropReason::EmptyAnswer, 1), (DropReason::Duplicate, 1)]
    );
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["dropped"]["media_only"], 1);
}

#[test]
fn each_reason_and_what_comes_near_it() {
    let rows = [
        ["Which isle?", "Brill"],
        ["", "no clue"],
        ["<br>", "no clue either"],
        ["  \\N ", "a database's nothing"],
        ["Which bird?", "null"],
        ["Which fish?", "<i></i>"],
        ["Which isle?", "Brill"],
        ["Which  isle? ", "<b>Brill</b>"],
        ["Which isle?", "brill"],
        ["<a href=\"x.jpg\">Seen here</a>", "a fish"],
        ["(video clue)", "a whale"],
        ["null", "the value of nothing"],
        ["Is it Null Island?", "Null Island"],
    ];
    let done = cleaned("a.csv", delimited(["question", "answer"], &rows, ",", "\n"));
    assert_eq!(done.clues.iter().map(|clue| clue.row).collect::<Vec<_>>(), [1, 9, 13]);
    let count = |reason| done.report.dropped.get(&reason).copied().unwrap_or(0);
    assert_eq!(count(DropReason::EmptyQuestion), 4);
    assert_eq!(count(DropReason::EmptyAnswer), 2);
    assert_eq!(count(DropReason::Duplicate), 2);
    assert_eq!(count(DropReason::MediaOnly), 2);
    assert_eq!(count(DropReason::TooLong), 0);
}

#[test]
fn a_dump_that_quotes_every_question_is_unquoted() {
    let line = |i: usize| format!("\"'Which isle has number {i}?'\",Isle {i}\n");
    let quoted = "question,answer\n".to_owned() + &(0..20).map(line).collect::<String>();
    assert_eq!(cleaned("a.csv", &quoted).clues[3].question, "Which isle has number 3?");
    let one = "question,answer\n\"'Tis the isle'\",Brill\nWhich bird?,the brillet\n";
    assert_eq!(cleaned("a.csv", one).clues[0].question, "'Tis the isle'");
}

#[test]
fn random_files_add_up() {
    let mut generator = seeded(1);
    for _ in 0..60 {
        let cells =
            ["", "a", "b", "null", "<a href=x>[audio clue]</a>", "<i></i>", "Which isle?", "(seen here)"];
        let rows: Vec<[&str; 2]> = (0..between(&mut generator, 1, 200))
            .map(|_| [(); 2].map(|()| cells[between(&mut generator, 0, cells.len() - 1)]))
            .collect();
        let done = clean(read("a.csv", delimited(["question", "answer"], &rows, ",", "\n")).unwrap());
        let dropped: usize = done.report.dropped.values().sum();
        assert_eq!(done.report.rows_read, rows.len());
        assert_eq!(done.report.rows_read, done.report.rows_kept + dropped);
        assert_eq!(done.clues.len(), done.report.rows_kept);
        assert!(done.clues.is_sorted_by_key(|clue| clue.row));
        assert!(done.clues.iter().all(|clue| !clue.question.is_empty() && !clue.answer.is_empty()));
    }
}

#[test]
fn both_sides_of_a_split_hold_every_clue_once_and_no_question_twice() {
    let line = |i: usize| format!("2{:03}-01-01,Which isle has number {}?,Isle {i}\n", i % 1000, i / 2);
    let file = "air date,question,answer\n".to_owned() + &(0..4000).map(line).collect::<String>();
    let clues = cleaned("a.csv", file).clues;
    assert_eq!(clues.len(), 4000);
    let from = Date::new(2900, 1, 1).unwrap();
    let latest = Split::Latest { fraction: 0.1 };
    for how in [Split::None, Split::Hash { fraction: 0.1, seed: 5 }, Split::AirDate { from }, latest] {
        let (train, eval) = split(clues.clone(), &how).unwrap();
        let mut rows: Vec<u32> = train.iter().chain(&eval).map(|clue| clue.row).collect();
        rows.sort_unstable();
        assert_eq!(rows, (1..=4000).collect::<Vec<_>>(), "{how:?}");
        match how {
            Split::None => assert!(eval.is_empty()),
            Split::Hash { .. } => {
                assert!((300..500).contains(&eval.len()), "{}", eval.len());
                let asked = |clue: &Clue| train.iter().any(|other| other.question == clue.question);
                assert!(!eval.iter().any(asked), "a question stands on both sides");
            }
            Split::Latest { .. } => {
                assert!((400..500).contains(&eval.len()), "{}", eval.len());
                let first = eval.iter().map(|clue| clue.air_date).min();
                assert!(train.iter().all(|clue| Some(clue.air_date) < first), "a day stands on both sides");
            }
            Split::AirDate { .. } => assert!(eval.iter().all(|clue| clue.air_date >= Some(from))),
        }
    }
}
