#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(tokenizer) = buzzer_text::Tokenizer::from_sentencepiece(bytes) {
        let ids = tokenizer.encode("### Question: 1984 é 中\n").expect("what is accepted can be used");
        tokenizer.decode(&ids).expect("what is accepted can be used");
    }
});
