//! A `tokenizer.json` as llama.cpp's `llama` tokenizer: a token, a score and a type for every row of the embedding.
//!
//! llama.cpp joins the two neighbours whose joint token has the highest score; Hugging Face joins the pair that stands first
//! among the merges. A token's score is therefore minus the place of the first merge that makes it. What it trades: a token
//! that two pairs can make has one score for both, so a tokenizer whose merges name only one of them may cut a rare word
//! differently there. What it refuses: tokenizers that are not byte-pair merges with bytes for the unknown and `▁` for
//! spaces.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::WeightsError;

/// llama.cpp's types of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// Everything that a GGUF file says of a tokenizer.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pub(super) tokens: Vec<String>,
    pub(super) scores: Vec<f32>,
    pub(super) types: Vec<TokenType>,
    pub(super) bos: u32,
    pub(super) eos: u32,
    pub(super) unknown: Option<u32>,
    /// Whether a space is put in front of every text.
    pub(super) space_prefix: bool,
    /// Whether the file's post-processor puts the begin token in front.
    pub(super) adds_bos: bool,
}

/// Names of the begin and end token in the neighbours of a `tokenizer.json`, each with its usual name.
const ROLES: [(&str, &str); 2] = [("bos_token", "<s>"), ("eos_token", "</s>")];

impl Vocabulary {
    /// Reads a `tokenizer.json` for a model with `rows` rows in its embedding.
    pub(super) fn read(path: &Path, rows: usize) -> Result<Self, WeightsError> {
        let refuse = |message: String| WeightsError::Vocabulary { path: path.to_owned(), message };
        let bytes = fs::read(path).map_err(|source| WeightsError::Read {
            path: path.to_owned(),
            flag: "--tokenizer",
            source,
        })?;
        let file: Value = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
        let model = &file["model"];
        if model["type"] != "BPE" || model["byte_fallback"] != true {
            return refuse_kind(path, "it is not made of byte-pair merges with bytes for the unknown");
        }
        let Some(space_prefix) = space_prefix(&file) else {
            return refuse_kind(path, "it does not write spaces as `▁`");
        };
        let mut vocabulary = Self::empty(rows, space_prefix);
        vocabulary.fill(model).map_err(refuse)?;
        vocabulary.add_tokens(&file["added_tokens"]).map_err(refuse)?;
        vocabulary.score(&model["merges"]).map_err(refuse)?;
        let names = special_names(path);
        let find = |role: usize| {
            let name = &names[role];
            let place = vocabulary.tokens.iter().position(|token| token == name);
            place.map(|place| place as u32).ok_or_else(|| refuse(format!("it has no token `{name}`")))
        };
        (vocabulary.bos, vocabulary.eos) = (find(0)?, find(1)?);
        vocabulary.unknown =
            vocabulary.types.iter().position(|&kind| kind == TokenType::Unknown).map(|place| place as u32);
        let first = &file["post_processor"]["single"][0]["SpecialToken"]["id"];
        vocabulary.adds_bos = first.as_str() == Some(&names[0]);
        Ok(vocabulary)
    }

    /// Rows that no token has are called so that they cannot be met in a text.
    fn empty(rows: usize, space_prefix: bool) -> Self {
        Self {
            tokens: (0..rows).map(|row| format!("[PAD{row}]")).collect(),
            scores: vec![0.0; rows],
            types: vec![TokenType::Unused; rows],
            bos: 0,
            eos: 0,
            unknown: None,
            space_prefix,
            adds_bos: false,
        }
    }

    fn fill(&mut self, model: &Value) -> Result<(), String> {
        let vocab = model["vocab"].as_object().ok_or("it has no `vocab`")?;
        for (token, id) in vocab {
            let kind = match token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
                Some(digits) if digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok() => {
                    TokenType::Byte
                }
                _ if model["unk_token"] == token.as_str() => TokenType::Unknown,
                _ => TokenType::Normal,
            };
            self.set(token, id, kind)?;
        }
        Ok(())
    }

    fn add_tokens(&mut self, added: &Value) -> Result<(), String> {
        for token in added.as_array().into_iter().flatten() {
            let content = token["content"].as_str().ok_or("an added token has no `content`")?;
            let unknown =
                token["id"].as_u64().and_then(|id| self.types.get(id as usize)) == Some(&TokenType::Unknown);
            let kind = match (unknown, token["special"] == true) {
                (true, _) => TokenType::Unknown,
                (_, true) => TokenType::Control,
                _ => TokenType::UserDefined,
            };
            self.set(content, &token["id"], kind)?;
        }
        Ok(())
    }

    fn set(&mut self, token: &str, id: &Value, kind: TokenType) -> Result<(), String> {
        let rows = self.tokens.len();
        let place = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|&id| id < rows);
        let place =
            place.ok_or_else(|| format!("token `{token}` has the id {id}, and the model has {rows} rows"))?;
        token.clone_into(&mut self.tokens[place]);
        self.types[place] = kind;
        Ok(())
    }

    fn score(&mut self, merges: &Value) -> Result<(), String> {
        let merges = merges.as_array().ok_or("it has no `merges`")?;
        let mut first: HashMap<String, usize> = HashMap::new();
        for (place, merge) in merges.iter().enumerate() {
            let joint = match merge {
                Value::String(pair) => pair.replacen(' ', "", 1),
                pair => [&pair[0], &pair[1]].iter().filter_map(|side| side.as_str()).collect(),
            };
            first.entry(joint).or_insert(place);
        }
        // What no merge makes comes after everything that one does.
        let last = merges.len();
        for ((token, kind), score) in self.tokens.iter().zip(&self.types).zip(&mut self.scores) {
            if *kind == TokenType::Normal {
                *score = -(first.get(token).copied().unwrap_or(last) as f32);
            }
        }
        Ok(())
    }
}

fn refuse_kind<T>(path: &Path, reason: &str) -> Result<T, WeightsError> {
    let message = format!("{reason}, and GGUF's `llama` tokenizer holds no other");
    Err(WeightsError::Vocabulary { path: path.to_owned(), message })
}

/// Whether a space is put in front of a text; nothing if spaces do not become `▁`.
fn space_prefix(file: &Value) -> Option<bool> {
    let pre_tokenizer = &file["pre_tokenizer"];
    if pre_tokenizer["type"] == "Metaspace" {
        return Some(pre_tokenizer["prepend_scheme"] != "never");
    }
    let normalizer = &file["normalizer"];
    let single = std::slice::from_ref(normalizer);
    let steps = normalizer["normalizers"].as_array().map_or(single, Vec::as_slice);
    let replaces = |step: &Value| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == "▁"
    };
    let prepends = |step: &Value| step["type"] == "Prepend" && step["prepend"] == "▁";
    steps.iter().any(replaces).then(|| steps.iter().any(prepends))
}

/// The names of the begin and end token: what the neighbouring files say, or the usual ones.
fn special_names(path: &Path) -> [String; 2] {
    let neighbours = ["tokenizer_config.json", "special_tokens_map.json"].map(|name| {
        let bytes = fs::read(path.with_file_name(name)).unwrap_or_default();
        serde_json::from_slice::<Value>(&bytes).unwrap_or_default()
    });
    ROLES.map(|(role, usual)| {
        let name = |file: &Value| {
            let value = &file[role];
            value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
        };
        neighbours.iter().find_map(name).unwrap_or_else(|| usual.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(changes: Value) -> Value {
        let mut file = json!({
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true},
                {"id": 1, "content": "<s>", "special": true},
                {"id": 8, "content": "[INST]", "special": false},
            ],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "pre_tokenizer": null,
            "post_processor": {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]},
            "model": {
                "type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
                "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "a": 4, "b": 5, "▁ab": 6, "ab": 7},
                "merges": [["a", "b"], "▁ ab", ["▁a", "b"]],
            },
        });
        file.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        file
    }

    fn read(file: &Value, rows: usize) -> Result<Vocabulary, WeightsError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        fs::write(&path, file.to_string()).unwrap();
        Vocabulary::read(&path, rows)
    }

    #[test]
    fn tokens_have_scores_and_types() {
        use TokenType::{Byte, Control, Normal, Unknown, Unused, UserDefined};
        let found = read(&file(json!({})), 10).unwrap();
        let types = [Unknown, Control, Normal, Byte, Normal, Normal, Normal, Normal, UserDefined, Unused];
        assert_eq!(found.types, types);
        assert_eq!(found.scores, [0.0, 0.0, -3.0, 0.0, -3.0, -3.0, -1.0, 0.0, 0.0, 0.0]);
        assert_eq!((found.tokens[7].as_str(), found.tokens[9].as_str()), ("ab", "[PAD9]"));
        assert_eq!((found.bos, found.eos, found.unknown), (1, 2, Some(0)));
        assert!(found.space_prefix && found.adds_bos);
    }

    #[test]
    fn other_tokenizers_are_refused() {
        let refused = |changes: Value, word: &str| {
            let error = read(&file(changes), 10).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("tokenizer.json"), "{error}");
        };
        refused(json!({"model": {"type": "Unigram"}}), "byte-pair");
        refused(json!({"normalizer": {"type": "NFC"}}), "▁");
        refused(json!({"added_tokens": [{"id": 10, "content": "x"}]}), "10 rows");
        assert!(read(&file(json!({})), 7).is_err());
        let metaspace =
            json!({"normalizer": null, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}});
        assert!(!read(&file(metaspace), 10).unwrap().space_prefix);
    }
}
