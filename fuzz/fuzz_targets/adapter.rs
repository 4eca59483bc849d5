#![no_main]
buzzer_fuzz::target!("adapter");
