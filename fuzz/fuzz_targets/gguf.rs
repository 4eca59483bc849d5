#![no_main]
buzzer_fuzz::target!("gguf");
