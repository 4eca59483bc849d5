//! Trains the tiny base model that ships with the project, from nothing, on plain statements of the sample's facts.
//! The body is `buzzer_examples::programs::make_base`.

use std::process::ExitCode;

fn main() -> ExitCode {
    buzzer_examples::programs::make_base::main()
}
