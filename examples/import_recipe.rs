//! Makes a recipe of somebody else's training script.
//! The body is `buzzer_examples::programs::import_recipe`.

use std::process::ExitCode;

fn main() -> ExitCode {
    buzzer_examples::programs::import_recipe::main()
}
