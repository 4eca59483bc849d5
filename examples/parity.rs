//! Checks this build against a golden directory: a run of transformers, PEFT and bitsandbytes.
//! The body is `buzzer_examples::programs::parity`.

use std::process::ExitCode;

fn main() -> ExitCode {
    buzzer_examples::programs::parity::main()
}
