//! Prompt templates, byte for byte.
//!
//! A template is an enum and not a format string: a user cannot write one that puts the answer first or loses it. What is
//! wanted always begins with a space, which is where a Llama tokenizer starts a new piece.
//!
//! Most templates show a clue and want its answer. One is for writing: it shows a category, and an answer if there is one, and wants
//! the clue.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Fields, TextError};

/// How a clue becomes a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Template {
    /// The notebooks' form: `### Question: {question}\n ### Answer:` and then ` {answer}`.
    #[default]
    Question,
    /// The same after a first line `### Category: {category}\n `.
    Category,
    /// Llama 2's chat form: `[INST] {question} [/INST]` and then ` {answer}`.
    Chat,
    /// For writing clues: `### Category: {category}\n ### Answer: {answer}\n ### Clue:` and then ` {question}`; without the line of the
    /// answer where that is empty.
    Clue,
}

impl Template {
    /// Every template, for help texts and tests.
    pub const ALL: [Self; 4] = [Self::Question, Self::Category, Self::Chat, Self::Clue];

    /// Whether the clue is wanted, and not its answer.
    #[must_use]
    pub fn writes_clues(self) -> bool {
        self == Self::Clue
    }

    /// What the prompt shows beside the category, and what is wanted: clue and answer, or, where clues are written, answer and clue.
    #[must_use]
    pub fn given_and_wanted<'a>(self, fields: &Fields<'a>) -> [&'a str; 2] {
        if self.writes_clues() { [fields.answer, fields.question] } else { [fields.question, fields.answer] }
    }

    /// The text up to the place where the wanted text begins. It never ends in a space. `given` is the first of
    /// [`Self::given_and_wanted`].
    #[must_use]
    pub fn prompt(&self, category: &str, given: &str) -> String {
        let mut out = String::new();
        self.write_prompt(category, given, &mut out);
        out
    }

    /// The wanted text as it follows the prompt: a space and the text.
    #[must_use]
    pub fn completion(&self, wanted: &str) -> String {
        format!(" {wanted}")
    }

    /// [`Self::prompt`] into a buffer that is used again.
    pub(crate) fn write_prompt(self, category: &str, given: &str, out: &mut String) {
        let parts: [&str; 5] = match self {
            Self::Question => ["### Question: ", given, "\n ### Answer:", "", ""],
            Self::Category => ["### Category: ", category, "\n ### Question: ", given, "\n ### Answer:"],
            Self::Chat => ["[INST] ", given, " [/INST]", "", ""],
            Self::Clue if given.is_empty() => ["### Category: ", category, "\n ### Clue:", "", ""],
            Self::Clue => ["### Category: ", category, "\n ### Answer: ", given, "\n ### Clue:"],
        };
        out.clear();
        parts.iter().for_each(|part| out.push_str(part));
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Question => "question",
            Self::Category => "category",
            Self::Chat => "chat",
            Self::Clue => "clue",
        })
    }
}

impl FromStr for Template {
    type Err = TextError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|template| template.to_string() == name)
            .ok_or_else(|| TextError::UnknownTemplate(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notebook_form_is_byte_for_byte() {
        let t = Template::Question;
        let whole = t.prompt("RIVERS", "It flows through Paris") + &t.completion("the Seine");
        assert_eq!(whole, "### Question: It flows through Paris\n ### Answer: the Seine");
    }

    #[test]
    fn the_other_forms() {
        assert_eq!(
            Template::Category.prompt("RIVERS", "It flows"),
            "### Category: RIVERS\n ### Question: It flows\n ### Answer:"
        );
        assert_eq!(Template::Chat.prompt("RIVERS", "It flows"), "[INST] It flows [/INST]");
    }

    #[test]
    fn the_form_for_writing_shows_the_answer_if_there_is_one() {
        let fields = Fields { category: "RIVERS", question: "It flows", answer: "the Seine" };
        let [given, wanted] = Template::Clue.given_and_wanted(&fields);
        let whole = Template::Clue.prompt(fields.category, given) + &Template::Clue.completion(wanted);
        assert_eq!(whole, "### Category: RIVERS\n ### Answer: the Seine\n ### Clue: It flows");
        assert_eq!(Template::Clue.prompt("RIVERS", ""), "### Category: RIVERS\n ### Clue:");
        assert_eq!(Template::Question.given_and_wanted(&fields), ["It flows", "the Seine"]);
    }

    #[test]
    fn names_go_both_ways() {
        for t in Template::ALL {
            assert_eq!(t.to_string().parse::<Template>().unwrap(), t);
            assert_eq!(serde_json::to_string(&t).unwrap(), format!("\"{t}\""));
        }
        assert!("Question".parse::<Template>().unwrap_err().to_string().contains("--template"));
    }
}
