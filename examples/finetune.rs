//! Fine-tunes a model on clues and shows what it learnt: answers before and after, an adapter, a report.
//! The body is `buzzer_examples::programs::finetune`.

use std::process::ExitCode;

fn main() -> ExitCode {
    buzzer_examples::programs::finetune::main()
}
