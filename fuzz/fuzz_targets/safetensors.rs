#![no_main]
use libfuzzer_sys::fuzz_target;
fuzz_target!(|data: &[u8]| {
    let _ = buzzer_text::Tokenizer::from_bytes(data);
});
