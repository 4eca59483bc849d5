//! Settings in layers: a preset, a recipe file over it, flags over both; each setting knows where it was made.
//!
//! A layer is a tree of named settings. What it trades: values are kept untyped until all layers are merged, so that a mistake is
//! reported with the place that made it. What it refuses: TOML that does not parse, with file and line.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::Failure;

/// Where a setting was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file, named as the user would, and the line, from 1.
    Line(Arc<str>, usize),
    /// A flag, dashes included.
    Flag(Arc<str>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(file, line) => write!(f, "{file} line {line}"),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// A setting or a section of them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

/// What a setting is set to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Section(Section),
    List(Vec<Node>),
    Text(String),
    Integer(i64),
    Number(f64),
    Truth(bool),
    /// From the command line: a text or a number, as whoever reads it wants.
    Word(String),
}

/// Settings by name.
pub(crate) type Section = BTreeMap<String, Node>;

impl Node {
    /// An empty layer; its place is that of settings which are missing.
    pub(crate) fn empty(place: Place) -> Self {
        Self { place, value: Value::Section(Section::new()) }
    }

    /// A layer from TOML; `source` is what errors call it.
    pub(crate) fn parse(text: &str, source: &str) -> Result<Self, Failure> {
        let source: Arc<str> = source.into();
        let lines = Lines { text, source: &source };
        let table = DeTable::parse(text).map_err(|error| {
            let place = lines.place(error.span().map_or(0, |span| span.start));
            Failure::input(format!("{place}: {}; see examples/recipes for whole recipes", error.message()))
        })?;
        lines.section(table.get_ref(), Place::Line(Arc::clone(&source), 1))
    }

    /// A layer from a recipe file.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::input(format!("--recipe {}: {error}", path.display())))?;
        Self::parse(&text, &path.display().to_string())
    }

    /// This layer with another one over it, whose settings hold where both have one.
    pub(crate) fn overridden_by(self, over: Self) -> Self {
        match (self.value, over.value) {
            (Value::Section(mut under), Value::Section(over_section)) => {
                for (name, node) in over_section {
                    let merged = match under.remove(&name) {
                        Some(below) => below.overridden_by(node),
                        None => node,
                    };
                    under.insert(name, merged);
                }
                Self { place: over.place, value: Value::Section(under) }
            }
            (_, value) => Self { place: over.place, value },
        }
    }

    /// The setting of a dotted key.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        key.split('.').try_fold(self, |node, name| match &node.value {
            Value::Section(section) => section.get(name),
            _ => None,
        })
    }

    /// Makes a setting under a dotted key, and the sections that lead there.
    pub(crate) fn set(&mut self, key: &str, setting: Self) {
        let mut node = self;
        for name in key.split('.') {
            let place = setting.place.clone();
            if !matches!(node.value, Value::Section(_)) {
                node.value = Value::Section(Section::new());
            }
            let Value::Section(section) = &mut node.value else { return };
            node = section.entry(name.to_owned()).or_insert_with(|| Self::empty(place));
        }
        *node = setting;
    }

    /// Takes the setting of a dotted key out.
    pub(crate) fn remove(&mut self, key: &str) {
        let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
        let Value::Section(section) = &mut self.value else { return };
        match rest {
            None => drop(section.remove(first)),
            Some(rest) => {
                if let Some(node) = section.get_mut(first) {
                    node.remove(rest);
                }
            }
        }
    }

    /// The text of a setting that is one.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) | Value::Word(text) => Some(text),
            _ => None,
        }
    }
}

/// A file that is turned into a layer.
struct Lines<'a> {
    text: &'a str,
    source: &'a Arc<str>,
}

impl Lines<'_> {
    fn place(&self, offset: usize) -> Place {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        Place::Line(Arc::clone(self.source), line)
    }

    fn section(&self, table: &DeTable<'_>, place: Place) -> Result<Node, Failure> {
        let mut section = Section::new();
        for (name, value) in table {
            let node = self.node(value, self.place(name.span().start))?;
            section.insert(name.get_ref().to_string(), node);
        }
        Ok(Node { place, value: Value::Section(section) })
    }

    fn node(&self, spanned: &Spanned<DeValue<'_>>, place: Place) -> Result<Node, Failure> {
        let too_large = |number: &str| Failure::input(format!("{place}: the number {number} is too large"));
        let value = match spanned.get_ref() {
            DeValue::Table(table) => return self.section(table, place),
            DeValue::Array(array) => Value::List(
                array
                    .iter()
                    .map(|element| self.node(element, self.place(element.span().start)))
                    .collect::<Result<_, _>>()?,
            ),
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Datetime(time) => Value::Text(time.to_string()),
            DeValue::Boolean(truth) => Value::Truth(*truth),
            DeValue::Integer(number) => {
                let parsed = i64::from_str_radix(number.as_str(), number.radix());
                Value::Integer(parsed.map_err(|_| too_large(number.as_str()))?)
            }
            DeValue::Float(number) => {
                let parsed = number.as_str().parse();
                Value::Number(parsed.map_err(|_| too_large(number.as_str()))?)
            }
        };
        Ok(Node { place, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_over_holds_and_knows_its_place() {
        let under = Node::parse("[train]\nseed = 1\nepochs = 2.5\n", "under").unwrap();
        let over =
            Node::parse("\n\n[train]\nseed = 7\n[lora]\ntargets = [\n  \"q_proj\",\n]\n", "over").unwrap();
        let merged = under.overridden_by(over);
        let seed = merged.get("train.seed").unwrap();
        assert_eq!((seed.place.to_string(), &seed.value), ("over line 4".into(), &Value::Integer(7)));
        assert_eq!(merged.get("train.epochs").unwrap().place.to_string(), "under line 3");
        let Value::List(targets) = &merged.get("lora.targets").unwrap().value else { panic!() };
        assert_eq!((targets[0].place.to_string(), targets[0].text()), ("over line 7".into(), Some("q_proj")));
        assert!(merged.get("train.seed.more").is_none() && merged.get("none").is_none());
    }

    #[test]
    fn settings_are_made_and_taken_out_by_dotted_keys() {
        let flag = Place::Flag("--seed".into());
        let mut layer = Node::empty(flag.clone());
        layer.set("train.optimizer.eight_bit", Node { place: flag, value: Value::Word("true".into()) });
        assert_eq!(layer.get("train.optimizer.eight_bit").unwrap().text(), Some("true"));
        layer.remove("train.optimizer.eight_bit");
        layer.remove("no.such.key");
        assert!(layer.get("train.optimizer.eight_bit").is_none());
    }

    #[test]
    fn broken_toml_is_refused_with_its_line() {
        for (text, words) in [
            ("[lora]\nrank = \n", "a.toml line 2"),
            ("[lora]\nrank = 1\nrank = 2\n", "a.toml line 3"),
            ("seed = 99999999999999999999\n", "a.toml line 1: the number 99999999999999999999"),
        ] {
            let message = format!("{:?}", Node::parse(text, "a.toml").unwrap_err());
            assert!(message.contains(words), "{message}");
        }
    }
}
