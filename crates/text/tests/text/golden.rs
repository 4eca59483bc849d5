//! The ids that sentencepiece gives for 499 real prompts.

use std::fs;

use buzzer_text::{Fields, Renderer, Template, TokenizerNote};
use serde_json::Value;

use crate::support::{llama, shared};

pub(crate) struct Prompt {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
}

pub(crate) fn prompts() -> Option<Vec<Prompt>> {
    let path = shared("tokenizer/golden_prompts_499.jsonl")?;
    let prompt = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap();
        let ids = value["ids"].as_array().unwrap();
        Prompt {
            text: value["text"].as_str().unwrap().to_owned(),
            ids: ids.iter().map(|id| id.as_u64().unwrap() as u32).collect(),
        }
    };
    Some(fs::read_to_string(path).unwrap().lines().map(prompt).collect())
}

#[test]
fn all_499_prompts_get_the_ids_of_sentencepiece() {
    let (Some(tokenizer), Some(prompts)) = (llama(), prompts()) else { return };
    assert_eq!(prompts.len(), 499);
    for Prompt { text, ids } in &prompts {
        let mut ours = vec![tokenizer.bos_id()];
        ours.extend(tokenizer.encode(text).unwrap());
        assert_eq!(&ours, ids, "{text}");
        assert_eq!(&tokenizer.decode(ids).unwrap(), text);
    }
}

#[test]
fn the_renderer_gives_the_same_ids_and_ends_them() {
    let (Some(tokenizer), Some(prompts)) = (llama(), prompts()) else { return };
    let renderer = Renderer::new(tokenizer.clone(), Template::Question);
    let part = |text: &str| {
        let (question, answer) = text.strip_prefix("### Question: ")?.split_once("\n ### Answer: ")?;
        Some((question.to_owned(), answer.to_owned()))
    };
    let parts: Vec<_> = prompts.iter().map(|prompt| part(&prompt.text).unwrap()).collect();
    let fields: Vec<_> =
        parts.iter().map(|(question, answer)| Fields { category: "", question, answer }).collect();
    let examples = renderer.examples(&fields).unwrap();
    for (example, prompt) in examples.iter().zip(&prompts) {
        let (last, ids) = example.ids.split_last().unwrap();
        assert_eq!(ids, prompt.ids, "{}", prompt.text);
        assert_eq!(*last, tokenizer.eos_id());
    }
}

#[test]
fn the_copys_truncation_is_noted_and_not_inherited() {
    let Some(tokenizer) = llama() else { return };
    let notes = tokenizer.notes();
    assert!(notes.contains(&TokenizerNote::TruncationIgnored { max_length: 512 }), "{notes:?}");
    assert!(notes.contains(&TokenizerNote::AddsBos), "{notes:?}");
    assert!(notes.contains(&TokenizerNote::PadIsEos), "{notes:?}");
    assert_eq!(tokenizer.vocab_size(), 32_000);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()), (1, 2, Some(2)));
    let long = "word ".repeat(2000);
    assert!(tokenizer.encode(&long).unwrap().len() >= 2000);
    let renderer = Renderer::new(tokenizer, Template::Question);
    let fields = Fields { category: "", question: &long, answer: "x" };
    assert!(renderer.example(&fields).unwrap().ids.len() >= 2000);
}
