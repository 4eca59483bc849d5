//! Merged settings into typed ones, with mistakes reported at the place that made them.
//!
//! serde's derived code asks for names and types; this answers from a tree of [`Node`]s. TOML's own deserializer would serve
//! for one file, but not for settings that come from a preset, a file and flags at once, each of which an error has to name.
//! What it refuses: names that no setting has, with the nearest that one has; wrong types and choices.

use std::collections::btree_map;

use serde::de::value::{SeqDeserializer, StrDeserializer};
use serde::de::{
    self, DeserializeSeed, Deserializer, Expected, IntoDeserializer, MapAccess, Unexpected, Visitor,
};

use super::keys::suggestion;
use super::layers::{Node, Place, Value};

/// A mistake in the settings.
#[derive(Debug)]
pub(crate) struct Mistake {
    /// Place and dotted key, once known.
    at: Option<(Place, String)>,
    what: String,
}

impl Mistake {
    fn new(what: String) -> Self {
        Self { at: None, what }
    }

    /// Names the place, unless one further inside has been named.
    fn or_at(self, node: &Node, key: &str) -> Self {
        let at = self.at.or_else(|| Some((node.place.clone(), key.to_owned())));
        Self { at, ..self }
    }
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.at {
            Some((place, key)) if key.is_empty() => write!(f, "{place}: {}", self.what),
            Some((place, key)) => write!(f, "{place}: {key}: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl std::error::Error for Mistake {}

impl de::Error for Mistake {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Self::new(message.to_string())
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(format!("found {found}; choose {expected}"))
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_variant(found: &str, choices: &'static [&'static str]) -> Self {
        Self::new(format!("found `{found}`; choose one of: {}", choices.join(", ")))
    }

    fn missing_field(name: &'static str) -> Self {
        Self::new(format!("`{name}` is missing; add it, or name a preset to start from"))
    }
}

/// A setting that is read, and its dotted key.
pub(crate) struct Reader<'a> {
    node: &'a Node,
    key: String,
}

impl<'a> Reader<'a> {
    /// The setting or section of a key; of an empty one, all settings.
    pub(crate) fn new(node: &'a Node, key: &str) -> Self {
        Self { node, key: key.to_owned() }
    }

    fn inner(&self, name: &str, node: &'a Node) -> Self {
        let key = if self.key.is_empty() { name.to_owned() } else { format!("{}.{name}", self.key) };
        Self { node, key }
    }

    fn wrong_type(&self, expected: &dyn Expected) -> Mistake {
        let found = match &self.node.value {
            Value::Section(_) => Unexpected::Map,
            Value::List(_) => Unexpected::Seq,
            Value::Text(text) | Value::Word(text) => Unexpected::Str(text),
            Value::Integer(number) => Unexpected::Signed(*number),
            Value::Number(number) => Unexpected::Float(*number),
            Value::Truth(truth) => Unexpected::Bool(*truth),
        };
        de::Error::invalid_type(found, expected)
    }

    fn read<'de, V: Visitor<'de>>(&self, visitor: V) -> Result<V::Value, Mistake> {
        match &self.node.value {
            Value::Section(section) => {
                visitor.visit_map(Entries { section: self, names: section.iter(), value: None })
            }
            Value::List(list) => {
                let elements = list.iter().map(|node| Self { node, key: self.key.clone() });
                visitor.visit_seq(SeqDeserializer::new(elements))
            }
            Value::Text(text) | Value::Word(text) => visitor.visit_str(text),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Number(number) => visitor.visit_f64(*number),
            Value::Truth(truth) => visitor.visit_bool(*truth),
        }
    }

    /// A word of the command line as a number or a truth value.
    fn word<T: std::str::FromStr>(&self) -> Option<T> {
        match &self.node.value {
            Value::Word(word) => word.parse().ok(),
            _ => None,
        }
    }

    /// Refuses a name that the section does not have.
    fn check_names(&self, names: &'static [&'static str]) -> Result<(), Mistake> {
        let Value::Section(section) = &self.node.value else { return Ok(()) };
        let Some((name, node)) = section.iter().find(|(name, _)| !names.contains(&name.as_str())) else {
            return Ok(());
        };
        let place = if self.key.is_empty() { "at the top".into() } else { format!("in [{}]", self.key) };
        let advice = suggestion(&self.key, name, names);
        Err(Mistake::new(format!("there is no setting `{name}` {place}; {advice}")).or_at(node, ""))
    }
}

impl<'de> IntoDeserializer<'de, Mistake> for Reader<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// The settings of a section, one after the other.
struct Entries<'r, 'a> {
    section: &'r Reader<'a>,
    names: btree_map::Iter<'a, String, Node>,
    value: Option<Reader<'a>>,
}

impl<'de> MapAccess<'de> for Entries<'_, '_> {
    type Error = Mistake;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Mistake> {
        let Some((name, node)) = self.names.next() else { return Ok(None) };
        self.value = Some(self.section.inner(name, node));
        let name: StrDeserializer<'_, Mistake> = name.as_str().into_deserializer();
        seed.deserialize(name).map(Some)
    }

    /// Types that parse a text of their own know no place, so it is named here.
    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Mistake> {
        let value =
            self.value.take().ok_or_else(|| Mistake::new("a value was asked for before its name".into()))?;
        let (node, key) = (value.node, value.key.clone());
        seed.deserialize(value).map_err(|mistake| mistake.or_at(node, &key))
    }
}

/// Methods that parse a word as what is asked for, and take anything else as it is.
macro_rules! from_word {
    ($($method:ident $visit:ident $type:ty,)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
            let read = match self.word::<$type>() {
                Some(value) => visitor.$visit(value),
                None => self.read(visitor),
            };
            read.map_err(|mistake| mistake.or_at(self.node, &self.key))
        })*
    };
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Mistake;

    from_word! {
        deserialize_bool visit_bool bool,
        deserialize_i64 visit_i64 i64,
        deserialize_u32 visit_u64 u64,
        deserialize_u64 visit_u64 u64,
        deserialize_f64 visit_f64 f64,
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        self.read(visitor).map_err(|mistake| mistake.or_at(self.node, &self.key))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mistake> {
        visitor.visit_some(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mistake> {
        self.check_names(names)?;
        self.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _choices: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mistake> {
        let read = match self.node.text() {
            Some(text) => {
                let text: StrDeserializer<'_, Mistake> = text.into_deserializer();
                visitor.visit_enum(text)
            }
            None => Err(self.wrong_type(&"a name in quotes")),
        };
        read.map_err(|mistake| mistake.or_at(self.node, &self.key))
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u16 u128 f32 char str string bytes byte_buf unit unit_struct newtype_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}
