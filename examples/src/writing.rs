//! Clues that a model wrote: their style beside the show's own, and all of them in `written.jsonl`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use buzzer::eval::{ClueStyle, KnownClues, Measured, WrittenClue};
use serde::Serialize;

use crate::output::{create, write_json_lines};
use crate::{Answered, Failure};

/// The file's name in a run's folder.
const FILE: &str = "written.jsonl";

/// The style of written clues and of those that the clue file has for the same categories and answers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Writing {
    /// The model's.
    pub written: ClueStyle,
    /// The file's.
    pub real: ClueStyle,
}

/// A line of the file.
#[derive(Serialize)]
struct Line<'a> {
    /// Data row of the clue file, from 1.
    row: u32,
    category: &'a str,
    answer: &'a str,
    /// The file's clue.
    real: &'a str,
    /// The model's.
    written: &'a str,
    /// Whether that stands among the clues of training; none where they are not known.
    copied: Option<bool>,
}

impl Writing {
    /// Of clues that were written for those of a file; `known` are the clues of training.
    #[must_use]
    pub fn of(answered: &[Answered], known: Option<&KnownClues>) -> Self {
        let (mut written, mut real) = (Vec::new(), Vec::new());
        for Answered { clue, answer: text, .. } in answered {
            written.push(WrittenClue { text, answer: &clue.answer });
            real.push(WrittenClue { text: &clue.question, answer: &clue.answer });
        }
        let [written, real] = [written, real].map(|clues| ClueStyle::of(&clues, known));
        Self { written, real }
    }

    /// The lines for people; no line end after the last.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { written, real } = self;
        let clues = format!("{} clues", written.n);
        let mut out = format!("style     {clues:24}  {:20}  the show's", "written");
        let words = |measured: Measured| {
            let Measured { value, interval } = measured;
            format!("{value:.1} [{:.1}, {:.1}]", interval.low, interval.high)
        };
        let percent = |measured: Measured| {
            let Measured { value, interval } = measured;
            format!("{:.1} % [{:.1}, {:.1}]", 100.0 * value, 100.0 * interval.low, 100.0 * interval.high)
        };
        let mut row = |name: &str, [written, real]: [String; 2]| {
            let _ = write!(out, "\n          {name:24}  {written:20}  {real}");
        };
        row("words, mean", [written, real].map(|style| words(style.words)));
        row("words, median", [written, real].map(|style| style.median_words.to_string()));
        row("\"this\" or \"these\"", [written, real].map(|style| percent(style.this)));
        row("pointing in any way", [written, real].map(|style| percent(style.pointing)));
        row("put as a question", [written, real].map(|style| percent(style.questions)));
        row("giving its answer away", [written, real].map(|style| percent(style.leaking)));
        if let (Some(written), Some(real)) = (written.copied, real.copied) {
            row("copied from training", [written, real].map(percent));
        }
        row("distinct", [written, real].map(|style| format!("{:.1} %", 100.0 * style.distinct)));
        out
    }
}

/// Writes all clues into a folder.
///
/// # Errors
/// If the file cannot be written.
pub fn write_written<'a>(
    dir: &Path,
    answered: &'a [Answered],
    known: Option<&KnownClues>,
) -> Result<PathBuf, Failure> {
    create(dir)?;
    let path = dir.join(FILE);
    let line = |answered: &'a Answered| {
        let Answered { clue, answer: written, .. } = answered;
        Line {
            row: clue.row,
            category: &clue.category,
            answer: &clue.answer,
            real: &clue.question,
            written,
            copied: known.map(|known| known.contains(written)),
        }
    };
    write_json_lines(&path, answered.iter().map(line))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use buzzer::data::Clue;
    use buzzer::text::Template;

    use super::*;

    fn answered(question: &str, answer: &str, written: &str) -> Answered {
        let clue = Clue {
            row: 7,
            category: "INNS".into(),
            question: question.into(),
            answer: answer.into(),
            air_date: None,
            round: None,
            value: None,
        };
        Answered { clue, template: Template::Clue, answer: written.into(), log_prob: None }
    }

    #[test]
    fn written_clues_stand_beside_the_files() {
        let clues = [
            answered("This island has an inn", "Borrow", "It has one inn"),
            answered("He keeps the inn", "Ann Other", "What is an inn?"),
        ];
        let known: KnownClues = ["It has one inn"].into_iter().collect();
        let writing = Writing::of(&clues, Some(&known));
        let [written, real] = [writing.written, writing.real];
        assert_eq!([written.this.value, real.this.value], [0.0, 0.5]);
        assert_eq!([written.questions.value, real.questions.value], [0.5, 0.0]);
        assert_eq!([written.copied, real.copied].map(|copied| copied.unwrap().value), [0.5, 0.0]);
        let described = writing.describe();
        assert!(described.contains("copied from training") && !described.ends_with('\n'), "{described}");
        assert!(!Writing::of(&clues, None).describe().contains("copied"));
        assert_eq!(clues[0].given_and_expected(), ["Borrow", "This island has an inn"]);
    }

    #[test]
    fn a_line_holds_both_clues() {
        let dir = tempfile::tempdir().unwrap();
        let path = write_written(dir.path(), &[answered("This inn", "Borrow", "An inn")], None).unwrap();
        let line: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let expected = serde_json::json!({
            "row": 7, "category": "INNS", "answer": "Borrow", "real": "This inn", "written": "An inn", "copied": null
        });
        assert_eq!(line, expected);
    }
}
