//! Tells memory, steps and time of a run before it starts. The body is `buzzer_examples::programs::plan`.

use std::process::ExitCode;

fn main() -> ExitCode {
    buzzer_examples::programs::plan::main()
}
