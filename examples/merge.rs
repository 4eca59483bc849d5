//! Merges an adapter into its base and writes a model for other programs, with a report of how faithful it is.
//! The body is `buzzer_examples::programs::merge`.

use std::process::ExitCode;

fn main() -> ExitCode {
    buzzer_examples::programs::merge::main()
}
