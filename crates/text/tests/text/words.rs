//! Word by word is the same as in one piece, whatever the text.

use buzzer_text::Tokenizer;

use crate::support::{all, llama, nasty_texts, oracle, shared};

fn agrees(name: &str, tokenizer: &Tokenizer, texts: &[String]) {
    let oracle = oracle(tokenizer);
    for text in texts {
        let expected = oracle.encode(text.as_str(), false).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), expected.get_ids(), "{name}: {text:?}");
    }
}

#[test]
fn nasty_texts_get_the_ids_of_the_plain_library() {
    let texts = nasty_texts(3000, 1);
    for (name, tokenizer) in all() {
        agrees(name, &tokenizer, &texts);
    }
}

#[test]
fn a_second_pass_answers_from_the_table_and_agrees() {
    let texts = nasty_texts(300, 2);
    for (name, tokenizer) in all() {
        let first: Vec<_> = texts.iter().map(|text| tokenizer.encode(text).unwrap()).collect();
        let second: Vec<_> = texts.iter().map(|text| tokenizer.encode(text).unwrap()).collect();
        assert_eq!(first, second, "{name}");
    }
}

#[test]
fn literal_special_tokens_are_text() {
    for (name, tokenizer) in all() {
        for text in ["<s>", "a <s> b", "</s>", "x</s><s>y", "<unk>"] {
            let ids = tokenizer.encode(text).unwrap();
            assert!(!ids.contains(&tokenizer.bos_id()), "{name}: {text}: {ids:?}");
            assert!(!ids.contains(&tokenizer.eos_id()), "{name}: {text}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{name}");
        }
    }
}

#[test]
fn real_clues_get_the_ids_of_the_plain_library() {
    let (Some(tokenizer), Some(path)) = (llama(), shared("data/jeopardy_20k.csv")) else { return };
    let file = std::fs::read_to_string(path).unwrap();
    let lines: Vec<String> = file.lines().step_by(7).map(str::to_owned).collect();
    agrees("llama", &tokenizer, &lines);
}
