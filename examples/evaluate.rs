//! Answers held-out clues with a model, with or without an adapter, and judges the answers.
//! The body is `buzzer_examples::programs::evaluate`.

use std::process::ExitCode;

fn main() -> ExitCode {
    buzzer_examples::programs::evaluate::main()
}
