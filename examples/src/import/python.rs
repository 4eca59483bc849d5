//! The literals of a Python source: variables and keyword arguments of some calls.
//!
//! This is no parser of Python. It cuts the text into tokens, which is enough to find `name = literal` at the beginning of a
//! statement and `Call(name=literal, ...)` anywhere. The parsers on crates.io bring a compiler's front end along, which would take longer
//! to build than the rest of the programs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A value that needs no computation.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Literal {
    None,
    Truth(bool),
    Integer(i64),
    Number(f64),
    Text(String),
    List(Vec<Literal>),
    /// A name that no variable of the source has, such as `torch.float16`.
    Name(String),
    /// Anything else.
    Computed,
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Truth(true) => f.write_str("True"),
            Self::Truth(false) => f.write_str("False"),
            Self::Integer(number) => number.fmt(f),
            Self::Number(number) => write!(f, "{number:?}"),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::List(list) => {
                let items: Vec<String> = list.iter().map(Self::to_string).collect();
                write!(f, "[{}]", items.join(", "))
            }
            Self::Name(name) => f.write_str(name),
            Self::Computed => f.write_str("(computed)"),
        }
    }
}

/// Where something stands in a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// The cell of a notebook, from 1.
    pub(super) cell: Option<usize>,
    /// The line, from 1; of the cell, if there is one.
    pub(super) line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cell {
            Some(cell) => write!(f, "cell {cell}, line {}", self.line),
            None => write!(f, "line {}", self.line),
        }
    }
}

/// A keyword argument, or a variable that no call was given.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Argument {
    pub(super) place: Place,
    pub(super) name: String,
    pub(super) value: Literal,
}

/// What one or more pieces of source have said so far.
#[derive(Debug, Default)]
pub(super) struct Script {
    /// Arguments of the calls asked for.
    pub(super) arguments: Vec<Argument>,
    /// Which of the calls there were.
    pub(super) calls: BTreeSet<&'static str>,
    variables: BTreeMap<String, (Place, Literal)>,
    used: BTreeSet<String>,
}

impl Script {
    /// Reads a piece of source, with the variables of those before it.
    ///
    /// # Errors
    /// With the place of a text that is never closed.
    pub(super) fn read(
        &mut self,
        source: &str,
        cell: Option<usize>,
        calls: &[&'static str],
    ) -> Result<(), Place> {
        let tokens = tokens(source).map_err(|line| Place { cell, line })?;
        let reader = Reader { tokens: &tokens, cell };
        for place in 0..tokens.len() {
            reader.assignment(place, self);
            reader.call(place, calls, self);
        }
        Ok(())
    }

    /// Variables that no call was given, as if they were arguments.
    pub(super) fn loose_variables(&self) -> impl Iterator<Item = Argument> {
        let loose = self.variables.iter().filter(|(name, _)| !self.used.contains(*name));
        loose.map(|(name, (place, value))| Argument {
            place: *place,
            name: name.clone(),
            value: value.clone(),
        })
    }

    /// What a value is once its names are looked up.
    fn resolve(&mut self, value: Literal) -> Literal {
        match value {
            Literal::Name(name) => match self.variables.get(&name) {
                Some((_, known)) => {
                    let known = known.clone();
                    self.used.insert(name);
                    known
                }
                None => Literal::Name(name),
            },
            Literal::List(list) => Literal::List(list.into_iter().map(|item| self.resolve(item)).collect()),
            value => value,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// A name, with its dots.
    Name(String),
    Number(String),
    Text(String),
    /// A text with values in it.
    Formatted,
    Mark(String),
    /// The end of a statement.
    End,
}

#[derive(Clone, Debug)]
struct Token {
    kind: Kind,
    line: usize,
}

/// Marks of two characters; none of them is an assignment.
const PAIRS: [&str; 11] = ["==", "!=", "<=", ">=", "+=", "-=", "*=", "/=", "->", ":=", "**"];

/// The tokens of a source, or the line of a text that is never closed.
fn tokens(source: &str) -> Result<Vec<Token>, usize> {
    let mut scanner = Scanner { rest: source, line: 1, depth: 0, tokens: Vec::new() };
    while !scanner.rest.is_empty() {
        scanner.scan()?;
    }
    Ok(scanner.tokens)
}

struct Scanner<'a> {
    rest: &'a str,
    line: usize,
    /// Brackets that are open.
    depth: usize,
    tokens: Vec<Token>,
}

impl<'a> Scanner<'a> {
    fn scan(&mut self) -> Result<(), usize> {
        let Some(first) = self.rest.chars().next() else { return Ok(()) };
        let starts_line = self.tokens.last().is_none_or(|token| token.kind == Kind::End);
        match first {
            '#' => self.skip_line(),
            // Commands of a notebook.
            '%' | '!' if self.depth == 0 && starts_line => self.skip_line(),
            '\\' if self.rest[1..].starts_with('\n') => {
                self.take(2);
            }
            '\n' | ';' => {
                self.take(1);
                if self.depth == 0 {
                    self.push(Kind::End, self.line);
                }
            }
            '"' | '\'' => self.text("")?,
            _ if first.is_whitespace() => {
                self.take(first.len_utf8());
            }
            _ if first.is_alphabetic() || first == '_' => self.name()?,
            _ if self.rest.trim_start_matches('.').starts_with(|c: char| c.is_ascii_digit()) => self.number(),
            _ => self.mark(first),
        }
        Ok(())
    }

    fn push(&mut self, kind: Kind, line: usize) {
        self.tokens.push(Token { kind, line });
    }

    /// Takes so many bytes and counts their lines.
    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.line += taken.matches('\n').count();
        self.rest = rest;
        taken
    }

    fn take_while(&mut self, keep: impl Fn(char) -> bool) -> &'a str {
        self.take(self.rest.find(|c| !keep(c)).unwrap_or(self.rest.len()))
    }

    fn skip_line(&mut self) {
        self.take_while(|c| c != '\n');
    }

    fn name(&mut self) -> Result<(), usize> {
        let line = self.line;
        let name = self.take_while(|c| c.is_alphanumeric() || c == '_' || c == '.');
        let is_prefix = ["r", "b", "u", "f", "br", "rb", "fr", "rf"].contains(&name.to_lowercase().as_str());
        if is_prefix && self.rest.starts_with(['"', '\'']) {
            return self.text(&name.to_lowercase());
        }
        self.push(Kind::Name(name.to_owned()), line);
        Ok(())
    }

    fn number(&mut self) {
        let line = self.line;
        let mut length = 0;
        let bytes = self.rest.as_bytes();
        while let Some(&byte) = bytes.get(length) {
            let is_sign = matches!(byte, b'+' | b'-') && matches!(bytes[length - 1], b'e' | b'E');
            if !(byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_') || is_sign) {
                break;
            }
            length += 1;
        }
        let number = self.take(length).replace('_', "");
        self.push(Kind::Number(number), line);
    }

    fn text(&mut self, prefix: &str) -> Result<(), usize> {
        let line = self.line;
        let quote = &self.rest[..1];
        let triple = quote.repeat(3);
        let close = if self.rest.starts_with(&triple) { triple } else { quote.to_owned() };
        self.take(close.len());
        let mut text = String::new();
        loop {
            let Some(next) = self.rest.chars().next() else { return Err(line) };
            if self.rest.starts_with(&close) {
                self.take(close.len());
                break;
            }
            match next {
                '\n' if close.len() == 1 => return Err(line),
                '\\' => {
                    let escape = self.rest[1..].chars().next().ok_or(line)?;
                    let taken = self.take(1 + escape.len_utf8());
                    text.push_str(&if prefix.contains('r') { taken.to_owned() } else { unescaped(escape) });
                }
                _ => text.push_str(self.take(next.len_utf8())),
            }
        }
        let kind = if prefix.contains('f') { Kind::Formatted } else { Kind::Text(text) };
        self.push(kind, line);
        Ok(())
    }

    fn mark(&mut self, first: char) {
        let line = self.line;
        let pair = PAIRS.into_iter().find(|pair| self.rest.starts_with(pair));
        let mark = self.take(pair.map_or(first.len_utf8(), str::len));
        match first {
            '(' | '[' | '{' => self.depth += 1,
            ')' | ']' | '}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.push(Kind::Mark(mark.to_owned()), line);
    }
}

/// What a backslash and a character stand for; rare ones stay as they are.
fn unescaped(escape: char) -> String {
    match escape {
        'n' => "\n".into(),
        't' => "\t".into(),
        '\n' => String::new(),
        '\\' | '"' | '\'' => escape.into(),
        other => format!("\\{other}"),
    }
}

struct Reader<'a> {
    tokens: &'a [Token],
    cell: Option<usize>,
}

impl Reader<'_> {
    fn kind(&self, place: usize) -> &Kind {
        self.tokens.get(place).map_or(&Kind::End, |token| &token.kind)
    }

    fn is(&self, place: usize, mark: &str) -> bool {
        matches!(self.kind(place), Kind::Mark(found) if found == mark)
    }

    fn place(&self, token: usize) -> Place {
        Place { cell: self.cell, line: self.tokens.get(token).map_or(1, |token| token.line) }
    }

    /// `name = literal` or `name: type = literal` at the beginning of a statement.
    fn assignment(&self, start: usize, script: &mut Script) {
        let begins = start == 0 || *self.kind(start - 1) == Kind::End;
        let Kind::Name(name) = self.kind(start) else { return };
        if !begins {
            return;
        }
        let mut equals = start + 1;
        if self.is(equals, ":") {
            while !self.is(equals, "=") && *self.kind(equals) != Kind::End {
                equals += 1;
            }
        }
        if self.is(equals, "=") {
            let (value, _) = self.value(equals + 1);
            let value = script.resolve(value);
            script.variables.insert(name.clone(), (self.place(start), value));
        }
    }

    /// The keyword arguments of one of the calls.
    fn call(&self, start: usize, calls: &[&'static str], script: &mut Script) {
        let Kind::Name(name) = self.kind(start) else { return };
        let called = name.rsplit('.').next().unwrap_or(name);
        let Some(call) = calls.iter().find(|call| **call == called).filter(|_| self.is(start + 1, "("))
        else {
            return;
        };
        script.calls.insert(call);
        let mut next = Some(start + 2);
        while let Some(place) = next {
            if let Kind::Name(name) = self.kind(place)
                && self.is(place + 1, "=")
            {
                let (value, _) = self.value(place + 2);
                let value = script.resolve(value);
                script.arguments.push(Argument { place: self.place(place), name: name.clone(), value });
            }
            next = self.after_comma(place);
        }
    }

    /// The place behind the next comma on this level, unless the level ends before.
    fn after_comma(&self, start: usize) -> Option<usize> {
        let mut depth = 0_usize;
        for (place, token) in self.tokens.iter().enumerate().skip(start) {
            let Kind::Mark(mark) = &token.kind else { continue };
            match mark.as_str() {
                "," if depth == 0 => return Some(place + 1),
                ")" | "]" | "}" => depth = depth.checked_sub(1)?,
                "(" | "[" | "{" => depth += 1,
                _ => {}
            }
        }
        None
    }

    /// A literal and the place behind it; computed if an expression goes on there.
    fn value(&self, start: usize) -> (Literal, usize) {
        let (literal, end) = self.atom(start);
        let ends = match self.kind(end) {
            Kind::End => true,
            Kind::Mark(mark) => [",", ")", "]"].contains(&mark.as_str()),
            _ => false,
        };
        (if ends { literal } else { Literal::Computed }, end)
    }

    fn atom(&self, start: usize) -> (Literal, usize) {
        let next = start + 1;
        match self.kind(start) {
            Kind::Number(number) => (parse_number(number, 1), next),
            Kind::Text(text) => {
                let mut whole = text.clone();
                let mut end = next;
                while let Kind::Text(more) = self.kind(end) {
                    whole += more;
                    end += 1;
                }
                (Literal::Text(whole), end)
            }
            Kind::Name(name) => match name.as_str() {
                "True" => (Literal::Truth(true), next),
                "False" => (Literal::Truth(false), next),
                "None" => (Literal::None, next),
                name => (Literal::Name(name.to_owned()), next),
            },
            Kind::Mark(mark) if mark == "-" => match self.kind(next) {
                Kind::Number(number) => (parse_number(number, -1), next + 1),
                _ => (Literal::Computed, next),
            },
            Kind::Mark(mark) if mark == "[" || mark == "(" => self.list(start),
            Kind::Mark(_) | Kind::Formatted | Kind::End => (Literal::Computed, next),
        }
    }

    fn list(&self, start: usize) -> (Literal, usize) {
        let is_tuple = self.is(start, "(");
        let close = if is_tuple { ")" } else { "]" };
        let (mut items, mut place, mut commas) = (Vec::new(), start + 1, 0);
        while !self.is(place, close) {
            let (item, end) = self.value(place);
            if item == Literal::Computed {
                return (Literal::Computed, end);
            }
            items.push(item);
            place = end;
            if self.is(place, ",") {
                place += 1;
                commas += 1;
            } else if !self.is(place, close) {
                return (Literal::Computed, place);
            }
        }
        match items.pop() {
            Some(only) if is_tuple && commas == 0 => (only, place + 1),
            last => (Literal::List(items.into_iter().chain(last).collect()), place + 1),
        }
    }
}

fn parse_number(number: &str, sign: i8) -> Literal {
    match number.parse::<i64>() {
        Ok(whole) => Literal::Integer(whole * i64::from(sign)),
        Err(_) => {
            number.parse().map_or(Literal::Computed, |number: f64| Literal::Number(number * f64::from(sign)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(source: &str) -> Vec<(usize, String, String)> {
        let mut script = Script::default();
        script.read(source, None, &["Config", "Trainer"]).unwrap();
        let arguments = script.arguments.iter();
        arguments
            .map(|argument| (argument.place.line, argument.name.clone(), argument.value.to_string()))
            .collect()
    }

    fn values(source: &str) -> Vec<String> {
        arguments(source).into_iter().map(|(_, _, value)| value).collect()
    }

    #[test]
    fn arguments_are_found_with_their_lines() {
        let source =
            "a = 1 # b = 2\nconfig = lib.Config(\n  rate=2e-4,\n  rank = a,  # note\n  name='x' \"y\",\n)\n";
        let expected = [(3, "rate", "0.0002"), (4, "rank", "1"), (5, "name", "\"xy\"")];
        let found = arguments(source);
        let found: Vec<(usize, &str, &str)> =
            found.iter().map(|(line, name, value)| (*line, name.as_str(), value.as_str())).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn literals_of_every_kind_are_read() {
        let source = "Config(a=-1, b=1_000, c=.5e1 if x else 2, d=[\"q\", 'v',], e=(3), f=(3,), g=None, h=True, \
                      i=torch.float16, j=r\"\\n\", k='''two\nlines''', l=[], m=-2.5E-1)";
        let expected = [
            "-1",
            "1000",
            "(computed)",
            "[\"q\", \"v\"]",
            "3",
            "[3]",
            "None",
            "True",
            "torch.float16",
            "\"\\\\n\"",
            "\"two\\nlines\"",
            "[]",
            "-0.25",
        ];
        assert_eq!(values(source), expected);
    }

    #[test]
    fn what_is_computed_is_not_guessed() {
        let source = "n = 4\nConfig(a=2 * n, b=f\"{n}\", c=open(\"x\"), d=n + 1, e={\"x\": 1}, f=[n, n], g=n.bit_length())";
        let computed = "(computed)";
        assert_eq!(values(source), [computed, computed, computed, computed, computed, "[4, 4]", computed]);
    }

    #[test]
    fn variables_hold_what_they_held_at_the_call() {
        let source = "n: int = 1\nif n == 2: m = 3\nConfig(a=n)\nn = 5\nTrainer(args=Config(a=n), b=n)";
        assert_eq!(values(source), ["1", "(computed)", "5", "5"]);
    }

    #[test]
    fn commands_of_notebooks_are_passed_over() {
        assert_eq!(values("!pip install 'x\n%time Config(a=1)\nConfig(a=7 % 4, b=2)"), ["(computed)", "2"]);
    }

    #[test]
    fn an_open_text_is_told_by_its_line() {
        let open = |source: &str| Script::default().read(source, Some(2), &[]).unwrap_err().to_string();
        assert_eq!(open("a = 1\nb = 'never\n"), "cell 2, line 2");
        assert_eq!(open("'''\n\n"), "cell 2, line 1");
    }

    #[test]
    fn damaged_sources_end() {
        let source = "Config(a=[1, (2, 'x', Config(b=-, c=[)], d=) ,,";
        for end in 0..source.len() {
            let mut script = Script::default();
            // Whatever comes out, it comes out.
            let _ = script.read(&source[..end], None, &["Config"]);
        }
    }
}
