//! Columns are found however they are spelt, by flag if need be, and a missing one is an error that helps.

use buzzer_data::{Clue, ReadOptions, clean};

use crate::support::{cleaned, delimited, read_with, refused};

const ROW: [[&str; 4]; 1] = [["ISLES", "2001-02-03", "Which isle?", "Brill"]];

fn one(bytes: &str) -> Clue {
    cleaned("a.csv", bytes).clues.remove(0)
}

#[test]
fn spellings() {
    let expected = one(&delimited(["category", "air date", "question", "answer"], &ROW, ",", "\n"));
    assert_eq!((expected.question.as_str(), expected.answer.as_str()), ("Which isle?", "Brill"));
    assert_eq!(expected.air_date.unwrap().to_string(), "2001-02-03");
    for columns in [
        ["Category", "Air Date", "Question", "Answer"],
        [" Category", " Air Date", " Question", " Answer"],
        ["\tCATEGORY ", "AIR_DATE", "QUESTION", "ANSWER  "],
        ["category", "air_date", "clue", "response"],
        ["category", "airDate", "Clue", "Correct Response"],
        ["category", "date", "clue", "correct_response"],
        ["category", "air-date", "question", "Answer:"],
    ] {
        for line_end in ["\n", "\r\n"] {
            for before in ["", "\u{feff}"] {
                let bytes = before.to_owned() + &delimited(columns, &ROW, ",", line_end);
                assert_eq!(one(&bytes), expected, "{columns:?}");
                assert_eq!(one(&bytes.replace('"', "")), expected, "{columns:?} unquoted");
            }
        }
    }
}

#[test]
fn column_order_and_extra_columns_do_not_matter() {
    let clue = one("Answer,notes,CATEGORY,more,Question\nBrill,x,ISLES,y,Which isle?\n");
    assert_eq!(
        (clue.question.as_str(), clue.answer.as_str(), clue.category.as_str()),
        ("Which isle?", "Brill", "ISLES")
    );
    assert_eq!((clue.air_date, clue.round, clue.value), (None, None, None));
}

#[test]
fn a_question_column_goes_before_a_clue_column() {
    let clue = one("clue,question,response,answer\na,b,c,d\n");
    assert_eq!((clue.question.as_str(), clue.answer.as_str()), ("b", "d"));
}

#[test]
fn flags_name_columns() {
    let bytes = "Prompt,Reply,Topic,Aired,question,answer\nWhich isle?,Brill,ISLES,2001-02-03,no,no\n";
    let options = ReadOptions {
        question: Some("Prompt".into()),
        answer: Some(" reply ".into()),
        category: Some("TOPIC".into()),
        air_date: Some("aired".into()),
        ..ReadOptions::default()
    };
    let clue = clean(read_with("a.csv", bytes, &options).unwrap()).clues.remove(0);
    assert_eq!(
        (clue.question.as_str(), clue.answer.as_str(), clue.category.as_str()),
        ("Which isle?", "Brill", "ISLES")
    );
    assert_eq!(clue.air_date.unwrap().to_string(), "2001-02-03");
}

#[test]
fn one_column_may_serve_twice() {
    let options = ReadOptions { category: Some("answer".into()), ..ReadOptions::default() };
    let raw = read_with("a.csv", "x,question,answer\n1,Which isle?,Brill\n", &options).unwrap();
    let clue = clean(raw).clues.remove(0);
    assert_eq!((clue.category.as_str(), clue.answer.as_str()), ("Brill", "Brill"));
}

#[test]
fn a_missing_column_lists_the_columns_and_the_flag() {
    let (question, answer) = (("question", "--question-column"), ("answer", "--answer-column"));
    let cases = [
        (
            "a.csv",
            " Category,Prompt, Answer\nISLES,Which isle?,Brill\n",
            question,
            "`Category`, `Prompt`, `Answer`",
        ),
        (
            "a.csv",
            "Category,Question,Reply\nISLES,Which isle?,Brill\n",
            answer,
            "`Category`, `Question`, `Reply`",
        ),
        ("a.tsv", "Prompt\tAnswer\nWhich isle?\tBrill\n", question, "`Prompt`, `Answer`"),
        ("a.jsonl", "{\"Answer\": \"Brill\"}\n{\"Prompt\": \"x\"}\n", question, "`Answer`, `Prompt`"),
        ("a.json", "[{\"Question\": \"Which isle?\"}]", answer, "`Question`"),
    ];
    for (name, bytes, (role, flag), columns) in cases {
        let message = refused(name, bytes, &[role, flag, columns]).to_string();
        assert!(message.contains(&format!("no {role} column; the columns are {columns}; ")), "{message}");
    }
}

#[test]
fn a_flag_that_names_no_column_is_an_error_for_every_role() {
    let bytes = "question,answer\nWhich isle?,Brill\n";
    let name = || Some("Nowhere".to_owned());
    for options in [
        ReadOptions { question: name(), ..ReadOptions::default() },
        ReadOptions { answer: name(), ..ReadOptions::default() },
        ReadOptions { category: name(), ..ReadOptions::default() },
        ReadOptions { air_date: name(), ..ReadOptions::default() },
    ] {
        let message = read_with("a.csv", bytes, &options).unwrap_err().to_string();
        assert!(
            message.contains("called `Nowhere`") && message.contains("`question`, `answer`"),
            "{message}"
        );
    }
}
