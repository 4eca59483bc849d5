//! Which flag sets which setting of a recipe, and what a misspelt setting may have meant.

use buzzer::model::Target;
use clap::parser::ValueSource;
use clap::{ArgMatches, ValueEnum};

use super::OptimizerArg;
use super::layers::{Node, Place, Value};
use crate::Failure;

/// A flag, as clap calls it, and the setting that it makes.
const FLAGS: [(&str, &str); 51] = [
    ("device", "device"),
    ("template", "template"),
    ("steps", "steps"),
    ("model", "model.path"),
    ("tokenizer", "model.tokenizer"),
    ("quantization", "model.quantization"),
    ("dtype", "model.dtype"),
    ("data", "data.file"),
    ("format", "data.format"),
    ("question_column", "data.question_column"),
    ("answer_column", "data.answer_column"),
    ("category_column", "data.category_column"),
    ("air_date_column", "data.air_date_column"),
    ("limit", "data.limit"),
    ("split", "data.split"),
    ("eval_from", "data.eval_from"),
    ("eval_fraction", "data.eval_fraction"),
    ("split_seed", "data.split_seed"),
    ("eval_limit", "data.eval_limit"),
    ("packing", "packing.form"),
    ("row_len", "packing.row_len"),
    ("loss_on", "packing.loss_on"),
    ("rank", "lora.rank"),
    ("alpha", "lora.alpha"),
    ("targets", "lora.targets"),
    ("batch", "train.batch_rows"),
    ("accumulate", "train.accumulation"),
    ("epochs", "train.epochs"),
    ("lr", "train.learning_rate"),
    ("schedule", "train.schedule"),
    ("warmup", "train.warmup_ratio"),
    ("dropout", "train.dropout"),
    ("seed", "train.seed"),
    ("seed", "packing.seed"),
    ("checkpoint_every", "train.checkpoint_every"),
    ("weight_decay", "train.optimizer.weight_decay"),
    ("max_grad_norm", "train.optimizer.max_grad_norm"),
    ("optimizer", "train.optimizer.eight_bit"),
    ("evaluations", "eval.evaluations"),
    ("max_new_tokens", "answer.max_new_tokens"),
    ("temperature", "answer.temperature"),
    ("top_k", "answer.top_k"),
    ("top_p", "answer.top_p"),
    ("min_p", "answer.min_p"),
    ("repetition_penalty", "answer.repetition_penalty"),
    ("sample_seed", "answer.sample_seed"),
    ("cache_limit", "answer.cache_limit"),
    ("cache_dtype", "answer.cache_dtype"),
    ("answer_batch", "answer.answer_batch"),
    ("memory_limit", "limits.memory_limit"),
    ("preset", "preset"),
];

/// Settings that only a file makes.
const FILE_ONLY: [&str; 4] =
    ["lora.rslora", "train.optimizer.beta_1", "train.optimizer.beta_2", "train.optimizer.epsilon"];

/// The section that stands in another.
const INNER_SECTION: &str = "train.optimizer";

/// Settings of which one rules out the others, so that a layer which makes one unmakes those below it.
pub(crate) const HELD_OUT: [&str; 3] = ["data.eval_from", "data.split", "data.eval_fraction"];

/// The settings that were made on the command line.
pub(crate) fn flags(matches: &ArgMatches) -> Result<Node, Failure> {
    let mut layer = Node::empty(Place::Flag("the command line".into()));
    for (id, key) in FLAGS {
        let given =
            matches.try_contains_id(id).is_ok() && matches.value_source(id) == Some(ValueSource::CommandLine);
        let Some(word) = matches.get_raw(id).filter(|_| given).and_then(|mut words| words.next()) else {
            continue;
        };
        let flag = flag_of(id);
        let Some(word) = word.to_str() else {
            return Err(Failure::input(format!("{flag}: a recipe cannot hold a name that is no UTF-8")));
        };
        layer.set(key, setting(id, Place::Flag(flag.into()), word)?);
    }
    Ok(layer)
}

fn flag_of(id: &str) -> String {
    format!("--{}", id.replace('_', "-"))
}

fn setting(id: &str, place: Place, word: &str) -> Result<Node, Failure> {
    let node = |word: &str| Node { place: place.clone(), value: Value::Word(word.to_owned()) };
    Ok(match id {
        "targets" => {
            let targets = Target::parse_list(word)?;
            let list = targets.into_iter().map(|target| node(target.hf_name())).collect();
            Node { place: place.clone(), value: Value::List(list) }
        }
        "optimizer" => {
            let eight_bit = OptimizerArg::from_str(word, false).is_ok_and(|arg| arg == OptimizerArg::Adamw8);
            Node { place, value: Value::Truth(eight_bit) }
        }
        _ => node(word),
    })
}

/// The setting that a flag makes, by the flag's name in clap.
pub(crate) fn key_of_flag(id: &str) -> Option<&'static str> {
    FLAGS.into_iter().find(|(flag, _)| *flag == id).map(|(_, key)| key)
}

/// The setting that an error of a library calls by its flag, or by its last name if it has none.
pub(crate) fn key_of(name: &str) -> Option<&'static str> {
    let by_flag = FLAGS.into_iter().find(|(id, _)| flag_of(id) == name).map(|(_, key)| key);
    by_flag.or_else(|| FILE_ONLY.into_iter().find(|key| last_name(key) == name))
}

fn last_name(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// What somebody may have meant who wrote `name` in a section that has `names`.
pub(crate) fn suggestion(section: &str, name: &str, names: &[&str]) -> String {
    let all = || FLAGS.into_iter().map(|(_, key)| key).chain(FILE_ONLY).chain([INNER_SECTION]);
    let near = |candidate: &str| {
        let distance = strsim::damerau_levenshtein(name, candidate);
        (2 * distance <= name.chars().count()).then_some(distance)
    };
    let nearest_here =
        names.iter().filter_map(|here| Some((near(here)?, *here))).min().map(|(_, here)| here.to_owned());
    let by_flag = || key_of_flag(&name.replace('-', "_"));
    let elsewhere = || {
        let nearest = all().filter_map(|key| Some((near(last_name(key))?, key))).min();
        nearest.map(|(_, key)| key)
    };
    let meant = nearest_here.or_else(|| by_flag().or_else(elsewhere).map(in_its_section));
    match meant {
        Some(meant) => format!("did you mean `{meant}`?"),
        None if section.is_empty() => format!("the sections and settings there are: {}", names.join(", ")),
        None => format!("it takes: {}", names.join(", ")),
    }
}

/// A dotted key as it stands in a file.
fn in_its_section(key: &str) -> String {
    match key.rsplit_once('.') {
        Some((section, name)) => format!("{name}` in `[{section}]"),
        None => key.to_owned(),
    }
}

#[cfg(test)]
pub(super) fn all_keys() -> std::collections::BTreeSet<&'static str> {
    FLAGS.into_iter().map(|(_, key)| key).chain(FILE_ONLY).collect()
}
