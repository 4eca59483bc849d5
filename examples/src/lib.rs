//! What the programs share: arguments, the corpus, answering, reports and exit status.
//!
//! Programs print and touch the file system; the library crates do not. An error ends a program with the status of
//! the contract: 1 a check failed, 2 bad arguments or input, 3 the plan does not fit.

mod answer;
mod corpus;
mod failure;
mod model;
mod output;
mod recipe;

pub use answer::{AnswerArgs, Answered, answer_clues, judge_answers};
pub use corpus::{Corpus, CorpusReport, DataArgs, PackArgs, Packing, build as build_corpus};
pub use failure::{Failure, finish};
pub use model::{AnswererArgs, Base, ModelArgs, load_base};
pub use output::{bytes, next_run_dir, peak_memory_bytes, read_json, write_report};
pub use recipe::{Preset, Recipe, RecipeArgs};
