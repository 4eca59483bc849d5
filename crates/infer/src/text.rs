//! Text as it comes, up to a stop string.
//!
//! What may be the beginning of a stop string is held back until it is known. A stop string is text, so it is found
//! however its characters are cut into tokens, and never inside the bytes of another character.

use buzzer_text::{StreamDecoder, TextError, Tokenizer};

/// The text of one answer.
#[derive(Clone, Debug)]
pub(crate) struct AnswerText {
    decoder: StreamDecoder,
    stops: Vec<String>,
    /// Text that is not given out yet.
    held: String,
}

/// What a token brings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Text to give out.
    pub(crate) text: String,
    /// The stop string that is complete now; the text ends before it.
    pub(crate) stop: Option<usize>,
}

impl AnswerText {
    pub(crate) fn new(tokenizer: &Tokenizer, stops: &[String]) -> Self {
        Self { decoder: StreamDecoder::new(tokenizer), stops: stops.to_vec(), held: String::new() }
    }

    /// Takes the next token.
    pub(crate) fn push(&mut self, token: u32) -> Result<Piece, TextError> {
        match self.decoder.push(token)? {
            Some(text) => Ok(self.take(&text)),
            None => Ok(Piece::default()),
        }
    }

    /// Ends the text: what was held back comes out.
    pub(crate) fn finish(&mut self) -> Result<Piece, TextError> {
        let rest = self.decoder.finish()?;
        let mut piece = self.take(&rest);
        if piece.stop.is_none() {
            piece.text.push_str(&std::mem::take(&mut self.held));
        }
        Ok(piece)
    }

    fn take(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        if let Some((at, stop)) = self.first_stop() {
            self.held.truncate(at);
            return Piece { text: std::mem::take(&mut self.held), stop: Some(stop) };
        }
        let certain = self.held.len() - self.unsure();
        Piece { text: self.held.drain(..certain).collect(), stop: None }
    }

    /// Where the stop string begins that is complete first, and its number.
    fn first_stop(&self) -> Option<(usize, usize)> {
        let found = |(number, stop): (usize, &String)| {
            let at = self.held.find(stop.as_str())?;
            Some((at + stop.len(), number, at))
        };
        let first = self.stops.iter().enumerate().filter_map(found).min();
        first.map(|(_, number, at)| (at, number))
    }

    /// Bytes at the end that a stop string may begin with.
    fn unsure(&self) -> usize {
        let begun = |stop: &String| {
            let lengths = stop.char_indices().map(|(length, _)| length).skip(1);
            lengths.filter(|&length| self.held.ends_with(&stop[..length])).max().unwrap_or(0)
        };
        self.stops.iter().map(begun).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as tokens of the tokenizer of single bytes.
    fn tokens(bytes: &[u8]) -> Vec<u32> {
        bytes.iter().map(|&byte| 3 + u32::from(byte)).collect()
    }

    /// The pieces given out for each byte, and at the end; and the stop string.
    fn run(bytes: &[u8], stops: &[&str]) -> (Vec<String>, Option<usize>) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut text = AnswerText::new(&Tokenizer::byte_level_test(), &stops);
        let mut pieces = Vec::new();
        for token in tokens(bytes) {
            let piece = text.push(token).unwrap();
            pieces.push(piece.text);
            if piece.stop.is_some() {
                return (pieces, piece.stop);
            }
        }
        let piece = text.finish().unwrap();
        pieces.push(piece.text);
        (pieces, piece.stop)
    }

    #[test]
    fn a_stop_string_is_found_across_tokens_and_what_stands_before_it_stays() {
        let (pieces, stop) = run(b"abcENDx", &["END"]);
        assert_eq!((pieces.concat().as_str(), stop), ("abc", Some(0)));
        // Nothing of it was ever given out.
        assert_eq!(pieces, ["a", "b", "c", "", "", ""]);
    }

    #[test]
    fn what_looks_like_a_stop_string_comes_out_late_but_whole() {
        let (pieces, stop) = run(b"EENENEx", &["END"]);
        assert_eq!((pieces.concat().as_str(), stop), ("EENENEx", None));
        assert_eq!(pieces[1], "E");
        let (pieces, stop) = run(b"EN", &["END"]);
        assert_eq!((pieces.concat().as_str(), stop), ("EN", None));
    }

    #[test]
    fn a_stop_string_of_several_bytes_is_found_when_its_character_is_whole() {
        // Three bytes a character, a token a byte.
        let (pieces, stop) = run("ab日本".as_bytes(), &["日"]);
        assert_eq!((pieces.concat().as_str(), stop, pieces.len()), ("ab", Some(0), 5));
    }

    #[test]
    fn the_bytes_inside_a_character_are_no_stop_string() {
        // C3 A9 is é; A9 alone is no text, and C2 A9 is another character with the same second byte.
        let (pieces, stop) = run("é!".as_bytes(), &["\u{a9}"]);
        assert_eq!((pieces.concat().as_str(), stop), ("é!", None));
        // A stray byte becomes U+FFFD, which is text and can be stopped at, at the end too.
        assert_eq!(run(b"a\xA9b", &["\u{FFFD}"]), (vec!["a".into(), String::new()], Some(0)));
        assert_eq!(run(b"a\xE6\x97", &["\u{FFFD}"]).1, Some(0));
    }

    #[test]
    fn the_stop_string_that_is_complete_first_counts() {
        assert_eq!(
            run(b"xabcd", &["abcd", "bc"]),
            (vec!["x".into(), "".into(), "".into(), "a".into()], Some(1))
        );
        assert_eq!(run(b"abc", &["bc", "abc"]).1, Some(0));
    }
}
