//! `tokenizer.model` files: a small one that sentencepiece made (`sentencepiece/generate.py`), the real one, bad ones.

use std::fs;
use std::path::Path;

use buzzer_text::{TextError, Tokenizer};
use serde_json::{Value, json};

use crate::golden::prompts;
use crate::support::{llama, nasty_texts, shared};

const SMALL: &[u8] = include_bytes!("sentencepiece/tokenizer.model");

/// The model part of what a tokenizer saves.
fn saved(tokenizer: &Tokenizer) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_small_model_gives_the_ids_of_sentencepiece() {
    let tokenizer = Tokenizer::from_sentencepiece(SMALL).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_id()), (420, 1, 2));
    let rows = include_str!("sentencepiece/ids.jsonl");
    assert_eq!(rows.lines().count(), 33);
    for line in rows.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let text = row["text"].as_str().unwrap();
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(json!(ids), row["ids"], "{text:?}");
    }
}

#[test]
fn the_real_model_is_the_real_tokenizer_json() {
    let (Some(path), Some(json)) = (shared("tokenizer/llama2/tokenizer.model"), llama()) else { return };
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    let (ours, theirs) = (saved(&tokenizer), saved(&json));
    assert_eq!(ours["model"]["vocab"], theirs["model"]["vocab"]);
    assert_eq!(ours["model"]["merges"].as_array().unwrap().len(), 61_249);
    assert!(ours["model"]["merges"] == theirs["model"]["merges"]);
    for key in ["unk_token", "byte_fallback", "fuse_unk"] {
        assert_eq!(ours["model"][key], theirs["model"][key], "{key}");
    }
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (json.bos_id(), json.eos_id()));
    for text in nasty_texts(300, 5) {
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(ids, json.encode(&text).unwrap(), "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), json.decode(&ids).unwrap(), "{text:?}");
    }
    for prompt in prompts().unwrap() {
        let mut ids = vec![tokenizer.bos_id()];
        ids.extend(tokenizer.encode(&prompt.text).unwrap());
        assert_eq!(ids, prompt.ids, "{}", prompt.text);
    }
}

#[test]
fn a_folder_gives_its_json_first_and_added_tokens_beside_its_model() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    let error = Tokenizer::from_file(folder.path()).unwrap_err();
    assert!(
        matches!(error, TextError::NoTokenizer { .. }) && error.to_string().contains("--tokenizer"),
        "{error}"
    );
    write("tokenizer.model", SMALL);
    assert_eq!(Tokenizer::from_file(folder.path()).unwrap().vocab_size(), 420);
    write("added_tokens.json", br#"{"<pad>": 420, "</s>": 2}"#);
    write("special_tokens_map.json", br#"{"pad_token": "<pad>"}"#);
    let tokenizer = Tokenizer::from_file(folder.path()).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.pad_id()), (421, Some(420)));
    for (added, piece) in [
        (r#"{"<pad>": 421}"#, "`<pad>` at 421, where the next free number is 420"),
        (r#"{"</s>": 7}"#, "`</s>` at 7"),
        (r#"{"<pad>": 420, "<mask>": 420}"#, "`<mask>` and `<pad>` are both 420"),
        (r#"{"<pad>": -1}"#, "added_tokens.json"),
    ] {
        write("added_tokens.json", added.as_bytes());
        let error = Tokenizer::from_file(folder.path()).unwrap_err().to_string();
        assert!(error.contains(piece), "{error}");
    }
    write("tokenizer.json", b"{}");
    assert!(matches!(Tokenizer::from_file(folder.path()), Err(TextError::Parse { .. })));
}

fn refuse(bytes: &[u8], piece: &str) {
    let error = Tokenizer::from_sentencepiece(bytes).unwrap_err().to_string();
    assert!(error.contains(piece) && error.contains("tokenizer.model"), "`{piece}` is not in: {error}");
}

/// A field of bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
}

#[test]
fn models_of_other_kinds_are_refused() {
    refuse(include_bytes!("sentencepiece/unigram.model"), "`unigram`, not byte pairs");
    refuse(include_bytes!("sentencepiece/user-defined.model"), "`[INST]`, is defined by a user");
    refuse(b"", "does not say how it was trained");
    refuse(b"\x0b", "no protobuf");
    refuse(&[0xFF; 20], "no protobuf");
    refuse(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "cut short");
    // What stands later in a message wins, as everywhere in protobuf.
    let with = |change: Vec<u8>| [SMALL, &change].concat();
    refuse(&with(field(2, b"\x18\x04")), "`char`, not byte pairs");
    refuse(&with(field(2, b"\x18\x02")), "does not fall back to bytes");
    refuse(&with(field(3, b"")), "removes spaces");
    refuse(&with(field(3, b"\x18\x00\x20\x00")), "no space in front");
    refuse(&with(field(3, b"\x20\x00\x28\x00")), "does not write spaces");
    refuse(&with(field(3, b"\x12\x01x\x20\x00")), "table of characters");
    refuse(&with(field(1, &field(1, b"a"))), "are both `a`");
    refuse(&with(field(1, b"")), "piece 420 is no text");
    refuse(&with(field(1, &field(1, b"\xff"))), "piece 420 is no text");
    let nan = [field(1, "\u{1}x".as_bytes()), b"\x15\x00\x00\xc0\x7f".to_vec()].concat();
    refuse(&with(field(1, &nan)), "has no score");
    refuse(&[field(1, &field(1, b"a")), SMALL.to_vec()].concat(), "piece 0 is not `<unk>`");
}

#[test]
fn no_cut_and_no_changed_byte_panics() {
    for end in (0..SMALL.len()).step_by(7) {
        assert!(Tokenizer::from_sentencepiece(&SMALL[..end]).is_err(), "cut at {end}");
    }
    for place in (0..SMALL.len()).step_by(3) {
        for byte in [0, 1, 0x0A, 0x7F, 0x80, 0xFF] {
            let mut bytes = SMALL.to_vec();
            bytes[place] = byte;
            if let Ok(tokenizer) = Tokenizer::from_sentencepiece(&bytes) {
                tokenizer.encode("the lighthouse").unwrap();
            }
        }
    }
    assert!(Tokenizer::from_file(Path::new("/nowhere/tokenizer.model")).is_err());
}
