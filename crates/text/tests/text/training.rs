//! A tokenizer trained on a small text: round trip, saving, and its limits.

use buzzer_text::{TextError, Tokenizer};

use crate::support::{CORPUS, nasty_texts, trained};

#[test]
fn texts_come_back_whole_even_with_characters_never_seen() {
    let tokenizer = trained();
    let nasty = nasty_texts(500, 10);
    for text in CORPUS.lines().chain(nasty.iter().map(String::as_str)) {
        let ids = tokenizer.encode(text).unwrap();
        assert!(!ids.contains(&0), "an unknown token in {text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace('▁', " "));
    }
}

#[test]
fn merges_shorten_the_text_and_no_piece_crosses_words() {
    let tokenizer = trained();
    assert_eq!(tokenizer.vocab_size(), 400);
    let bytes: usize = CORPUS.lines().map(str::len).sum();
    let tokens: usize = CORPUS.lines().map(|line| tokenizer.encode(line).unwrap().len()).sum();
    assert!(tokens * 2 < bytes, "{tokens} tokens for {bytes} bytes");
    for id in 259..400 {
        let piece = tokenizer.token(id).unwrap();
        assert!(piece.chars().count() <= 12, "{piece}");
        assert!(!piece.trim_start_matches('▁').contains('▁'), "{piece}");
    }
}

#[test]
fn training_is_deterministic_and_survives_saving() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one.json"), folder.path().join("two.json"));
    trained().save(&one).unwrap();
    trained().save(&two).unwrap();
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());
    let (before, after) = (trained(), Tokenizer::from_file(&one).unwrap());
    assert_eq!(before.vocab_size(), after.vocab_size());
    assert_eq!((after.bos_id(), after.eos_id()), (1, 2));
    assert_eq!(before.notes(), after.notes());
    for text in nasty_texts(500, 11) {
        assert_eq!(before.encode(&text).unwrap(), after.encode(&text).unwrap(), "{text:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file stays");
}

#[test]
fn the_byte_tokenizer_survives_saving_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let before = Tokenizer::byte_level_test();
    before.save(&path).unwrap();
    let after = Tokenizer::from_file(&path).unwrap();
    assert_eq!(after.vocab_size(), 259);
    for text in nasty_texts(200, 12) {
        let bytes: Vec<u32> = text.bytes().map(|byte| u32::from(byte) + 3).collect();
        assert_eq!(before.encode(&text).unwrap(), bytes, "{text:?}");
        assert_eq!(after.encode(&text).unwrap(), bytes, "{text:?}");
        assert_eq!(after.decode(&bytes).unwrap(), text);
    }
}

#[test]
fn too_small_a_vocabulary_is_refused_with_the_size_it_needs() {
    let error = Tokenizer::train_llama_style(CORPUS.lines(), 260).unwrap_err();
    assert!(matches!(error, TextError::Train { vocab_size: 260, .. }), "{error}");
    assert!(error.to_string().contains("at least"), "{error}");
}

#[test]
fn a_file_that_cannot_be_written_is_an_error_with_its_path() {
    let error = trained().save(std::path::Path::new("/nowhere/tokenizer.json")).unwrap_err();
    assert!(error.to_string().contains("/nowhere/tokenizer.json"), "{error}");
}
