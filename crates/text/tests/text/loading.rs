//! What a tokenizer's files may hold that must not be inherited, and files that are no tokenizer.

use std::fs;
use std::path::Path;

use buzzer_text::{Fields, Renderer, Template, TextError, Tokenizer, TokenizerNote};
use serde_json::{Value, json};

use crate::support::trained;

/// The trained tokenizer's file after an edit.
pub(crate) fn edited(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    trained().save(&path).unwrap();
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    serde_json::to_vec(&json).unwrap()
}

fn error_of(bytes: &[u8]) -> TextError {
    Tokenizer::from_bytes(bytes).unwrap_err()
}

#[test]
fn truncation_and_padding_are_noted_and_dropped() {
    let bytes = edited(|json| {
        json["truncation"] =
            json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    });
    let tokenizer = Tokenizer::from_bytes(&bytes).unwrap();
    let notes = tokenizer.notes();
    assert!(notes.contains(&TokenizerNote::TruncationIgnored { max_length: 4 }), "{notes:?}");
    assert!(notes.contains(&TokenizerNote::PaddingIgnored), "{notes:?}");
    let text = "The lighthouse keeper counted forty ships before breakfast";
    assert_eq!(tokenizer.encode(text).unwrap(), trained().encode(text).unwrap());
    let printed: Vec<String> = notes.iter().map(ToString::to_string).collect();
    assert!(printed.iter().any(|note| note.contains("4 tokens")), "{printed:?}");
}

#[test]
fn doubled_begin_and_end_are_noted_and_stand_once() {
    let bytes = edited(|json| {
        json["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}});
    });
    let tokenizer = Tokenizer::from_bytes(&bytes).unwrap();
    assert!(tokenizer.notes().contains(&TokenizerNote::AddsBos));
    assert!(tokenizer.notes().contains(&TokenizerNote::AddsEos));
    let renderer = Renderer::new(tokenizer, Template::Question);
    let fields = Fields { category: "", question: "q", answer: "a" };
    let ids = renderer.example(&fields).unwrap().ids;
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1, "{ids:?}");
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 1, "{ids:?}");
}

#[test]
fn an_end_token_that_a_text_can_spell_is_refused_inside_a_document() {
    // The end token is an ordinary added word in this file, so a literal `</s>` becomes id 2.
    let bytes = edited(|json| json["added_tokens"][2]["special"] = false.into());
    let tokenizer = Tokenizer::from_bytes(&bytes).unwrap();
    let renderer = Renderer::new(tokenizer, Template::Question);
    for (question, answer) in [("a</s>b", "c"), ("a", "b</s>")] {
        let fields = Fields { category: "", question, answer };
        let error = renderer.example(&fields).unwrap_err();
        assert!(matches!(error, TextError::SpecialInside { id: 2, .. }), "{error}");
    }
    assert!(renderer.prompt("", "a</s>b").is_err());
    assert!(renderer.prompt("", "a b").is_ok());
}

#[test]
fn padding_with_the_end_token_is_noted() {
    let folder = tempfile::tempdir().unwrap();
    trained().save(&folder.path().join("tokenizer.json")).unwrap();
    assert_eq!(Tokenizer::from_file(folder.path()).unwrap().pad_id(), None);
    let config = folder.path().join("tokenizer_config.json");
    fs::write(&config, r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "</s>"}"#)
        .unwrap();
    let tokenizer = Tokenizer::from_file(folder.path()).unwrap();
    assert_eq!(tokenizer.pad_id(), Some(tokenizer.eos_id()));
    assert!(tokenizer.notes().contains(&TokenizerNote::PadIsEos));
    fs::write(&config, r#"{"pad_token": "<unk>"}"#).unwrap();
    let tokenizer = Tokenizer::from_file(folder.path()).unwrap();
    assert_eq!(tokenizer.pad_id(), Some(0));
    assert!(!tokenizer.notes().contains(&TokenizerNote::PadIsEos));
}

#[test]
fn a_vocabulary_larger_than_the_models_is_refused_with_both_sizes() {
    let tokenizer = Tokenizer::byte_level_test();
    assert_eq!(tokenizer.vocab_size(), 259);
    assert!(tokenizer.check_vocab(259).is_ok());
    assert!(tokenizer.check_vocab(512).is_ok());
    let error = tokenizer.check_vocab(258).unwrap_err();
    assert!(matches!(error, TextError::VocabTooLarge { max_id: 258, tokenizer: 259, model: 258 }), "{error}");
    let message = error.to_string();
    assert!(message.contains("259 rows") && message.contains("vocabulary has 258"), "{message}");
}

#[test]
fn what_is_no_tokenizer_is_an_error_with_its_place() {
    let whole = edited(|_| {});
    let cut = error_of(&whole[..whole.len() / 2]);
    assert!(matches!(&cut, TextError::Parse { .. }) && cut.to_string().contains("line"), "{cut}");
    assert!(matches!(error_of(b""), TextError::Parse { .. }));
    let missing = Tokenizer::from_file(Path::new("/nowhere/tokenizer.json")).unwrap_err();
    assert!(missing.to_string().contains("/nowhere/tokenizer.json"), "{missing}");
    assert!(missing.to_string().contains("--tokenizer"), "{missing}");
    let byte_level = error_of(&edited(|json| {
        json["decoder"] =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    }));
    assert!(
        matches!(&byte_level, TextError::UnsupportedDecoder { step, .. } if step == "ByteLevel"),
        "{byte_level}"
    );
}

#[test]
fn a_missing_end_token_is_named_and_a_neighbour_can_name_another() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    let bytes = edited(|json| {
        for key in ["added_tokens", "model"] {
            let text = json[key].to_string().replace("\"</s>\"", "\"<end>\"");
            json[key] = serde_json::from_str(&text).unwrap();
        }
    });
    fs::write(&file, bytes).unwrap();
    let error = Tokenizer::from_file(&file).unwrap_err();
    assert!(matches!(&error, TextError::MissingToken { token, .. } if token == "</s>"), "{error}");
    assert!(error.to_string().contains("end-of-sequence"), "{error}");
    fs::write(folder.path().join("special_tokens_map.json"), r#"{"eos_token": "<end>"}"#).unwrap();
    assert_eq!(Tokenizer::from_file(&file).unwrap().eos_id(), 2);
}

#[test]
fn a_broken_neighbour_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    trained().save(&folder.path().join("tokenizer.json")).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), "{\"bos_token\": ").unwrap();
    let error = Tokenizer::from_file(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json"), "{error}");
}
