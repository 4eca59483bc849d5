//! What the programs share: arguments, the corpus, answering, reports and exit status.
//!
//! The programs' bodies are in [`programs`] and not in `examples/NAME.rs`, so that what is generic over the backend is compiled
//! once for each device and not once more for each program.
//!
//! Programs print and touch the file system; the library crates do not. An error ends a program with the status of
//! the contract: 1 a check failed, 2 bad arguments or input, 3 the plan does not fit.

mod answer;
mod compare;
mod corpus;
mod dashboard;
mod failure;
mod hub;
mod import;
mod model;
mod output;
mod planning;
mod plots;
mod predictions;
mod recipe;
mod records;
mod signals;
mod verdict;
mod watch;
mod writing;

pub mod programs;

pub use answer::{
    AnswerArgs, Answered, CacheDtypeArg, answer_clues, answer_text, fields, judge_answers, tell_step_refusal,
};
pub use compare::{Answers, Comparison, Probe, Record, Spread};
pub use corpus::{Corpus, CorpusReport, DataArgs, HeldOut, Packing, SplitArg, build as build_corpus};
pub use dashboard::Dashboard;
pub use failure::{Failure, finish};
pub use hub::{Hub, HubError, HubSettings, Patience, RepoName, Wanted, local, local_file};
pub use model::{AnswererArgs, Base, ModelArgs, QuantizationArg, load_base};
pub use output::{
    available_memory_bytes, bytes, create, device_bytes, duration, last_run_dir, next_run_dir,
    peak_device_bytes, peak_memory_bytes, print_error_line, print_line, read_json, write_bytes,
    write_json_lines, write_report,
};
pub use planning::{
    Budget, CorpusSize, DtypeArg, LimitArgs, Proposal, RunPlan, compute_dtype, device_dtype, peak_flops,
    run_on,
};
pub use plots::{plot_confidence, plot_training};
pub use predictions::{
    Compared, EarlierRun, FoundLeak, Prediction, as_judged, read_predictions, write_predictions,
};
pub use recipe::{EvalSettings, OptimizerArg, Preset, Recipe, RecipeArgs};
pub use records::{
    AccuracyRecord, HeldOutRecord, Recorder, RunRecord, StepRecord, When, Yardstick, read_records,
    records_path,
};
pub use signals::StopSignal;
pub use verdict::{describe_assessment, describe_comparison};
pub use watch::{HeldOutLosses, Watch};
pub use writing::{Writing, write_written};
