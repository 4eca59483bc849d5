//! Answers clues: one from the command line, a file of them, or as they are typed.
//! The body is `buzzer_examples::programs::generate`.

use std::process::ExitCode;

fn main() -> ExitCode {
    buzzer_examples::programs::generate::main()
}
