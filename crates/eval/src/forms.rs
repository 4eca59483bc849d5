//! The show's forms: answers phrased as questions, and keys that hold several answers.
//!
//! Reading a key trades strictness for coverage: a name that holds the word "or" accepts its halves too, since nothing
//! in the text tells it from a choice; a name in double quotes is left whole. It refuses to guess what a remark in
//! parentheses means: unless marked as another answer, it may be said or left out, but is no answer alone.

/// Most optional parts of which every combination is accepted; with more, all or none.
const MAX_COMBINED: usize = 4;

/// Takes the answer out of its phrasing: first line only, without "What is", "Who are", "Where's" and the like in
/// front, and without the question mark behind.
///
/// An answer that is nothing but the phrase is returned as it is, less the white space around it.
#[must_use]
pub fn strip_show_form(answer: &str) -> &str {
    let line = first_line(answer);
    let body = after_interrogative(line).unwrap_or(line);
    let body = body.trim_end_matches(|c: char| c == '?' || c.is_whitespace());
    if body.is_empty() { line } else { body }
}

/// Whether an answer is phrased as the show asks for it: as a question about something ("What is gold?").
#[must_use]
pub fn in_show_form(answer: &str) -> bool {
    let body = after_interrogative(first_line(answer));
    body.is_some_and(|body| body.chars().any(char::is_alphanumeric))
}

/// The first line that holds anything, without white space around it.
pub(crate) fn first_line(answer: &str) -> &str {
    answer.trim().lines().next().unwrap_or_default().trim_end()
}

/// What follows "what is " and its kin; `None` where the line does not open so.
fn after_interrogative(line: &str) -> Option<&str> {
    let word_end = line.find(|c: char| !c.is_alphabetic())?;
    let (word, rest) = line.split_at(word_end);
    let word = word.to_lowercase();
    if matches!(word.as_str(), "whats" | "whos" | "wheres") {
        return rest.strip_prefix(' ').map(str::trim_start);
    }
    if !matches!(word.as_str(), "what" | "who" | "where" | "when" | "which") {
        return None;
    }
    let verb = rest.trim_start();
    let verb_end = verb.find(char::is_whitespace)?;
    let (verb, rest) = verb.split_at(verb_end);
    let verb = verb.to_lowercase().replace('’', "'");
    let known = ["is", "are", "was", "were", "'s", "'re", "am"];
    known.contains(&verb.as_str()).then(|| rest.trim_start())
}

/// What a parenthesis in a key says.
enum Remark<'a> {
    /// "(1 of)": each member of the list that follows is an answer.
    OneOf,
    /// "(2 of)" and more: several are asked for, so no member alone is an answer.
    SeveralOf,
    /// "(or y)", "(y accepted)", "(accept y)": another answer.
    Other(&'a str),
    /// Anything else: may be said or left out.
    Optional,
}

fn remark(inside: &str) -> Remark<'_> {
    let inside = inside.trim().trim_end_matches(['.', '!']);
    let lower = inside.to_ascii_lowercase();
    let words: Vec<&str> = lower.split_whitespace().collect();
    match words.as_slice() {
        ["1" | "one" | "either", "of", ..] => return Remark::OneOf,
        [count, "of", ..] if is_count(count) => return Remark::SeveralOf,
        _ => {}
    }
    let leads = ["or ", "accept ", "also accept ", "we also accept ", "we accept "];
    if let Some(lead) = leads.into_iter().find(|lead| lower.starts_with(lead)) {
        return Remark::Other(inside[lead.len()..].trim());
    }
    let ends = ["also accepted", "is accepted", "accepted", "also acceptable", "is acceptable", "acceptable"];
    for end in ends {
        if let Some(stem) = lower.strip_suffix(end).filter(|stem| stem.ends_with(' ')) {
            return Remark::Other(inside[..stem.len()].trim());
        }
    }
    Remark::Optional
}

fn is_count(word: &str) -> bool {
    let spelled = ["two", "three", "four", "five", "six"];
    spelled.contains(&word) || (!word.is_empty() && word.bytes().all(|b| b.is_ascii_digit()))
}

/// A key taken apart at its parentheses.
#[derive(Default)]
struct Key<'a> {
    /// Plain text, and optional text marked `true`.
    parts: Vec<(&'a str, bool)>,
    others: Vec<&'a str>,
    one_of: bool,
    several_of: bool,
}

impl<'a> Key<'a> {
    /// An unclosed parenthesis and all after it is plain text.
    fn parse(gold: &'a str) -> Self {
        let mut key = Self::default();
        let mut rest = gold;
        while let Some((open, close)) = parentheses(rest) {
            key.parts.push((&rest[..open], false));
            let inside = &rest[open + 1..close];
            match remark(inside) {
                Remark::OneOf => key.one_of = true,
                Remark::SeveralOf => key.several_of = true,
                Remark::Other(other) => key.others.push(other),
                Remark::Optional => key.parts.push((inside, true)),
            }
            rest = &rest[close + 1..];
        }
        key.parts.push((rest, false));
        key
    }

    /// The text with each choice of its optional parts, the fullest first.
    fn readings(&self) -> Vec<String> {
        let optional = self.parts.iter().filter(|(_, optional)| *optional).count();
        let all = if optional > MAX_COMBINED { 1 } else { (1_usize << optional) - 1 };
        let mut readings = Vec::new();
        for left_out in 0..=all {
            let mut text = String::new();
            let mut bit = 0;
            for &(part, is_optional) in &self.parts {
                let keep = !is_optional || if all == 1 { left_out == 0 } else { left_out >> bit & 1 == 0 };
                bit += usize::from(is_optional);
                text.push_str(if keep { part } else { "" });
            }
            readings.push(text);
        }
        readings
    }
}

/// The byte offsets of the first "(" and of its ")".
fn parentheses(text: &str) -> Option<(usize, usize)> {
    let open = text.find('(')?;
    let mut depth = 0_usize;
    for (i, c) in text[open..].char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((open, open + i));
        }
    }
    None
}

/// The answers that a key accepts; the full text is always the first.
///
/// - `(Thomas) Jefferson`: with and without what stands in parentheses;
/// - `x or y`, `x (or y)`, `x (or y or z)`, `x/y`: each;
/// - `x (y accepted)`, `x (accept y)`: each;
/// - `(1 of) x, y & z`: each member, and the whole list;
/// - `(2 of) x, y & z`: the whole list only.
///
/// A slash next to a digit or between pieces of one or two letters ("24/7", "AC/DC") belongs to the name. An empty key
/// accepts the empty text only.
#[must_use]
pub fn alternatives(gold: &str) -> Vec<String> {
    let gold = gold.trim();
    let key = Key::parse(gold);
    let mut out = vec![gold.to_owned()];
    for reading in key.readings() {
        push(&mut out, &reading);
        if key.several_of {
            continue;
        }
        let pieces = if key.one_of { split_list(&reading) } else { split_choice(&reading) };
        pieces.iter().for_each(|piece| push(&mut out, piece));
    }
    for other in key.others {
        push(&mut out, other);
        split_choice(other).iter().for_each(|piece| push(&mut out, piece));
    }
    out
}

/// Adds an answer with its white space folded, unless it is empty or there already.
fn push(out: &mut Vec<String>, answer: &str) {
    let folded = answer.split_whitespace().collect::<Vec<_>>().join(" ");
    let folded = folded.trim_matches([',', ';', ' ']);
    if folded.chars().any(char::is_alphanumeric) && !out.iter().any(|have| have == folded) {
        out.push(folded.to_owned());
    }
}

/// The sides of "or", "and/or" and of a slash; empty where there is no choice.
fn split_choice(text: &str) -> Vec<&str> {
    let by_word = split_outside_quotes(text, &[" and/or ", " &/or ", " or "]);
    let pieces: Vec<&str> = by_word.into_iter().flat_map(split_slash).collect();
    if pieces.len() > 1 { pieces } else { Vec::new() }
}

/// The members of a list: what commas, semicolons, "&" and slashes part; then, since a member may hold these words
/// itself, also what "and" and "or" part.
fn split_list(text: &str) -> Vec<&str> {
    let marks = [", & ", ", and ", ", or ", " and/or ", " &/or ", " & ", ", ", "; ", " and ", " or "];
    let (without_words, all) = (&marks[..marks.len() - 2], &marks[..]);
    let split = |marks| split_outside_quotes(text, marks).into_iter().flat_map(split_slash);
    split(without_words).chain(split(all)).collect()
}

/// Splits at every mark that stands outside double quotes; of two marks at one place the earlier named wins.
fn split_outside_quotes<'a>(text: &'a str, marks: &[&str]) -> Vec<&'a str> {
    let (mut pieces, mut start, mut at, mut quoted) = (Vec::new(), 0, 0, false);
    while let Some(c) = text[at..].chars().next() {
        quoted ^= c == '"';
        let mark = marks.iter().find(|mark| !quoted && text[at..].starts_with(**mark));
        if let Some(mark) = mark {
            pieces.push(&text[start..at]);
            at += mark.len();
            start = at;
        } else {
            at += c.len_utf8();
        }
    }
    pieces.push(&text[start..]);
    pieces
}

/// The sides of the slashes, if every side is a word of its own.
fn split_slash(text: &str) -> Vec<&str> {
    let pieces: Vec<&str> = text.split('/').map(str::trim).collect();
    let is_word = |piece: &&str| {
        let by_digit =
            piece.starts_with(|c: char| c.is_ascii_digit()) || piece.ends_with(|c: char| c.is_ascii_digit());
        piece.chars().filter(|c| c.is_alphabetic()).count() > 2 && !by_digit && !piece.contains('"')
    };
    if pieces.iter().all(is_word) { pieces } else { vec![text] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrasing_as_a_question_is_taken_off() {
        let cases = [
            ("What is gold?", "gold"),
            ("who are The Beatles?", "The Beatles"),
            ("Who was  Marie Curie ?", "Marie Curie"),
            ("What were the Dark Ages??", "the Dark Ages"),
            ("Where is Peru", "Peru"),
            ("What's a kayak?", "a kayak"),
            ("Who’s Plato?", "Plato"),
            ("whats tin", "tin"),
            ("WHAT IS TIN?", "TIN"),
            ("gold", "gold"),
            ("Ouagadougou?", "Ouagadougou"),
            ("What is gold?\n### Question: and more", "gold"),
            ("\n  tin \nzinc", "tin"),
            ("Whatever is", "Whatever is"),
            ("Whose Line", "Whose Line"),
            ("Who Framed Roger Rabbit", "Who Framed Roger Rabbit"),
            ("What is", "What is"),
            ("What is ?", "What is ?"),
            ("?", "?"),
            ("", ""),
            ("What is Who's Who?", "Who's Who"),
            ("İs", "İs"),
        ];
        for (raw, want) in cases {
            assert_eq!(strip_show_form(raw), want, "{raw:?}");
        }
    }

    #[test]
    fn the_shows_form_is_told_from_others() {
        for answer in
            ["What is gold?", "who are The Beatles", "What's tin?", "Where is Peru?\nmore", "whats tin"]
        {
            assert!(in_show_form(answer), "{answer:?}");
        }
        for answer in
            ["gold", "gold?", "What is ?", "Whose Line", "Who Framed Roger Rabbit", "", "tin\nWhat is tin?"]
        {
            assert!(!in_show_form(answer), "{answer:?}");
        }
    }

    #[track_caller]
    fn accepts(gold: &str, want: &[&str]) {
        let have = alternatives(gold);
        assert_eq!(have[0], gold.trim());
        for answer in want {
            assert!(have.iter().any(|h| h == answer), "{gold:?} should accept {answer:?}, has {have:?}");
        }
    }

    #[track_caller]
    fn is_exactly(gold: &str, want: &[&str]) {
        assert_eq!(alternatives(gold), want, "{gold:?}");
    }

    #[test]
    fn optional_parts_may_be_said_or_left_out() {
        is_exactly("(Thomas) Jefferson", &["(Thomas) Jefferson", "Thomas Jefferson", "Jefferson"]);
        accepts("the bicep(s)", &["the biceps", "the bicep"]);
        accepts("(Ada) (King) Lovelace", &["Ada King Lovelace", "Ada Lovelace", "King Lovelace", "Lovelace"]);
        accepts("(a) (b) (c) (d) (e) f", &["a b c d e f", "f"]);
        assert_eq!(alternatives("(a) (b) (c) (d) (e) f").len(), 3);
        accepts("Burma (now Myanmar)", &["Burma", "Burma now Myanmar"]);
    }

    #[test]
    fn other_answers_are_found() {
        is_exactly("the sofa (or couch)", &["the sofa (or couch)", "the sofa", "couch"]);
        accepts("jar (or pot or urn)", &["jar", "pot", "urn", "pot or urn"]);
        accepts("tin (zinc accepted)", &["tin", "zinc"]);
        accepts("tin (zinc also accepted)", &["tin", "zinc"]);
        accepts("tin (Accept zinc.)", &["tin", "zinc"]);
        accepts("tin (also accept zinc or lead)", &["tin", "zinc", "lead"]);
        accepts("tin or zinc", &["tin", "zinc", "tin or zinc"]);
        accepts("cellar/basement", &["cellar", "basement"]);
        accepts("Laurel and/or Hardy", &["Laurel", "Hardy"]);
        accepts("Laurel &/or Hardy", &["Laurel", "Hardy"]);
    }

    #[test]
    fn lists_of_which_some_are_asked() {
        accepts("(1 of) Romulus & Remus", &["Romulus", "Remus", "Romulus & Remus"]);
        accepts("(one of) red, white, & blue", &["red", "white", "blue"]);
        accepts("(1 of 2) Peru or Chile", &["Peru", "Chile"]);
        accepts("(either of) Cain/Abel", &["Cain", "Abel"]);
        accepts("(1 of) Cats & War and Peace", &["Cats", "War and Peace"]);
        is_exactly("(2 of) red, white & blue", &["(2 of) red, white & blue", "red, white & blue"]);
    }

    #[test]
    fn names_are_not_cut_inside_words_quotes_or_numbers() {
        is_exactly("Orlando", &["Orlando"]);
        is_exactly("the Oregon Trail", &["the Oregon Trail"]);
        is_exactly("AC/DC", &["AC/DC"]);
        is_exactly("24/7", &["24/7"]);
        is_exactly("Romulus & Remus", &["Romulus & Remus"]);
        is_exactly("\"Trick or Treat\"", &["\"Trick or Treat\""]);
        accepts("Trick or Treat", &["Trick or Treat"]);
        is_exactly("one (of a kind", &["one (of a kind"]);
        is_exactly("", &[""]);
        is_exactly("()", &["()"]);
        accepts("a ((b) c) d", &["a (b) c d", "a d"]);
        accepts("café (or crème)", &["café", "crème"]);
    }
}
