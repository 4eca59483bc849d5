//! TriviaQA's published normalisation of an answer.
//!
//! It trades meaning for agreement with published numbers: "A" and "The" become nothing, "U.S." becomes "u s". It
//! refuses to be clever: no accents folded, no numbers spelled out, because the published script does neither.

/// The characters that become spaces: ASCII punctuation (the backtick among it) and three typographic marks.
fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation() || matches!(c, '‘' | '’' | '´')
}

/// A word character of Python's `\w`, which bounds the articles.
///
/// Rust counts a few combining vowel signs as alphabetic that Python does not; next to a lone Latin article the two
/// would differ, which no answer does.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// White space as Python's `str.split` sees it: Unicode's, and the four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Normalises an answer as TriviaQA's evaluation does (Joshi et al., 2017, <https://arxiv.org/abs/1705.03551>).
///
/// In this order: underscores become spaces; lower case; punctuation becomes spaces; the whole words a, an and the
/// become spaces; runs of white space become one space, none at the ends.
#[must_use]
pub fn normalize(answer: &str) -> String {
    fold_space(&without_articles(&plain(answer)))
}

/// The first three steps: no underscores, lower case, no punctuation. Articles and white space stay.
pub(crate) fn plain(answer: &str) -> String {
    let lower = answer.replace('_', " ").to_lowercase();
    lower.replace(is_punctuation, " ")
}

/// One space between words, none at the ends.
pub(crate) fn fold_space(text: &str) -> String {
    let words: Vec<&str> = text.split(is_space).filter(|w| !w.is_empty()).collect();
    words.join(" ")
}

/// Replaces each maximal run of word characters that is an article by a space.
fn without_articles(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let in_word = is_word(first);
        let end = rest.find(|c| is_word(c) != in_word).unwrap_or(rest.len());
        let (run, tail) = rest.split_at(end);
        out.push_str(if matches!(run, "a" | "an" | "the") { " " } else { run });
        rest = tail;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_come_in_the_published_order() {
        let cases = [
            ("The Blue Lagoon", "blue lagoon"),
            ("snow_white", "snow white"),
            ("an_apple", "apple"),
            ("U.S.A.", "u s"),
            ("Rock-a-bye", "rock bye"),
            ("Theatre", "theatre"),
            ("l’avare", "l avare"),
            ("“The” end", "“ ” end"),
            ("  two\t\u{a0}words\u{1f}x ", "two words x"),
            ("A", ""),
            ("", ""),
            ("?!", ""),
            ("ÉCLAIR", "éclair"),
            ("the—end", "—end"),
        ];
        for (raw, want) in cases {
            assert_eq!(normalize(raw), want, "{raw:?}");
        }
    }

    #[test]
    fn normalising_twice_changes_nothing() {
        for raw in ["The_A the-an B", "‘tis", "x  y", "Ünder_the Sea"] {
            let once = normalize(raw);
            assert_eq!(normalize(&once), once, "{raw:?}");
        }
    }
}
