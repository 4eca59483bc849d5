//! Prompt templates, byte for byte.
//!
//! A template is an enum and not a format string: a user cannot write one that puts the answer first or loses it. The
//! answer always begins with a space, which is where a Llama tokenizer starts a new piece.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::TextError;

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
}

impl Template {
    /// Every template, for help texts and tests.
    pub const ALL: [Self; 3] = [Self::Question, Self::Category, Self::Chat];

    /// The text up to the place where the answer begins. It never ends in a space.
    #[must_use]
    pub fn prompt(&self, category: &str, question: &str) -> String {
        let mut out = String::new();
        self.write_prompt(category, question, &mut out);
        out
    }

    /// The answer as it follows the prompt: a space and the text.
    #[must_use]
    pub fn completion(&self, answer: &str) -> String {
        format!(" {answer}")
    }

    /// [`Self::prompt`] into a buffer that is used again.
    pub(crate) fn write_prompt(self, category: &str, question: &str, out: &mut String) {
        let parts: [&str; 5] = match self {
            Self::Question => ["### Question: ", question, "\n ### Answer:", "", ""],
            Self::Category => ["### Category: ", category, "\n ### Question: ", question, "\n ### Answer:"],
            Self::Chat => ["[INST] ", question, " [/INST]", "", ""],
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
    fn names_go_both_ways() {
        for t in Template::ALL {
            assert_eq!(t.to_string().parse::<Template>().unwrap(), t);
            assert_eq!(serde_json::to_string(&t).unwrap(), format!("\"{t}\""));
        }
        assert!("Question".parse::<Template>().unwrap_err().to_string().contains("--template"));
    }
}
