//! Which of a repository's files are needed.
//!
//! One form of the weights is taken, in the order in which `buzzer::weights` looks for them in a folder: repositories
//! often hold the same weights twice, and a 7B model has 13 GB.

use std::collections::BTreeSet;

use buzzer::weights::WEIGHT_FILES;

use crate::model::{GENERATION_CONFIG, TOKENIZER_FORMS, TOKENIZER_NEIGHBOURS};

/// Names of a repository's files.
pub(super) type Files = BTreeSet<String>;

const CONFIG: &str = "config.json";
const META_CONFIG: &str = "params.json";
const META_FIRST: &str = "consolidated.00.pth";
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// An adapter's factors, in the order in which they are looked for.
const ADAPTER_FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
/// Endings of what may be weights, to say what a repository holds instead.
const WEIGHT_ENDINGS: [&str; 5] = [".safetensors", ".bin", ".pth", ".gguf", ".pt"];
/// Names that an error lists at most.
const LISTED: usize = 5;

/// The weights of a model.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Weights {
    /// These files.
    Files(Vec<String>),
    /// Those that this file names.
    Index(String),
}

/// Configuration and tokenizer.
pub(super) fn description(files: &Files) -> Vec<String> {
    let names = [CONFIG, META_CONFIG, GENERATION_CONFIG].into_iter().chain(TOKENIZER_FORMS);
    present(files, names.chain(TOKENIZER_NEIGHBOURS))
}

/// Whether a configuration can be read without the weights: in the forms but Hugging Face's own it cannot.
pub(super) fn has_config(files: &Files) -> bool {
    files.contains(CONFIG)
}

/// Whether there is a tokenizer.
pub(super) fn has_tokenizer(files: &Files) -> bool {
    TOKENIZER_FORMS.iter().any(|&name| files.contains(name))
}

/// The weights to take, if there are any that can be read with the configuration that there is.
pub(super) fn weights(files: &Files) -> Option<Weights> {
    let hugging_face = WEIGHT_FILES.iter().find(|&&name| files.contains(name) && files.contains(CONFIG));
    if let Some(&name) = hugging_face {
        let name = name.to_owned();
        return Some(if name.ends_with(".json") { Weights::Index(name) } else { Weights::Files(vec![name]) });
    }
    if files.contains(META_CONFIG) && files.contains(META_FIRST) {
        let is_shard = |name: &&String| name.starts_with("consolidated.") && name.ends_with(".pth");
        return Some(Weights::Files(files.iter().filter(is_shard).cloned().collect()));
    }
    let mut gguf = files.iter().filter(|name| name.ends_with(".gguf"));
    let only = gguf.next().filter(|_| gguf.next().is_none())?;
    Some(Weights::Files(vec![only.clone()]))
}

/// An adapter's configuration and factors.
pub(super) fn adapter(files: &Files) -> Option<Vec<String>> {
    let factors = ADAPTER_FILES.iter().find(|&&name| files.contains(name))?;
    files.contains(ADAPTER_CONFIG).then(|| vec![ADAPTER_CONFIG.to_owned(), (*factors).to_owned()])
}

/// Whether a repository is one of an adapter.
pub(super) fn is_adapter(files: &Files) -> bool {
    files.contains(ADAPTER_CONFIG)
}

/// What may be meant instead, for an error.
pub(super) fn there(files: &Files, is_near: impl Fn(&str) -> bool) -> String {
    let near: Vec<&str> =
        files.iter().map(String::as_str).filter(|name| is_near(name)).take(LISTED).collect();
    if near.is_empty() { String::new() } else { format!(" (there is {})", near.join(", ")) }
}

pub(super) fn may_be_weights(name: &str) -> bool {
    WEIGHT_ENDINGS.iter().any(|end| name.ends_with(end))
}

fn present<'a>(files: &Files, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    names.filter(|&name| files.contains(name)).map(str::to_owned).collect()
}
