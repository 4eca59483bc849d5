//! PEFT's `adapter_config.json`, read from any version and written for all since 0.13.
//!
//! One table lists the keys that change what an adapter computes, with the values that leave it LoRA. What it
//! trades: a key that a later PEFT invents is passed over until it stands in the table. What it refuses: every other
//! value of a listed key, and every method but LoRA, by its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::modules::{Module, Spec, answering};
use super::{Adapter, AdapterConfig, FLAG, Factors, MAX_LAYERS, Numbers, missing, unannounced};
use crate::WeightsError;
use crate::error::Place;
use crate::header::Pairs;
use buzzer_model::Target;

/// Keys that must be absent, null, false or empty, and why.
const MUST_BE_OFF: [(&str, &str); 12] = [
    ("use_dora", "DoRA rescales the whole weight; only plain LoRA is supported"),
    ("use_qalora", "QALoRA pools the inputs; only plain LoRA is supported"),
    ("use_bdlora", "block-diagonal factors are not supported"),
    ("modules_to_save", "whole trained modules beside the factors are not supported"),
    ("lora_bias", "biases beside the factors are not supported"),
    ("layer_replication", "repeated layers are not supported"),
    ("target_parameters", "factors on bare parameters are not supported"),
    ("trainable_token_indices", "trained embeddings are not supported"),
    ("alora_invocation_tokens", "adapters that switch on inside a text are not supported"),
    ("arrow_config", "routing between adapters is not supported"),
    ("kasa_config", "KaSA changes the base model's weights"),
    ("monteclora_config", "sampled factors are not supported"),
];
/// More names or patterns than a model has modules; each is compiled or compared with every module.
const MAX_PATTERNS: usize = 4096;
/// Values of `init_lora_weights` under which the base model's weights stay as they were.
const PLAIN_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// A configuration, and what it says about modules that are not known before the factors are.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) config: AdapterConfig,
    path: PathBuf,
    targets: Spec,
    excluded: Option<Spec>,
    layers: Option<BTreeSet<u64>>,
    /// In the order of the file, because the first that matches counts.
    rank_pattern: Vec<(String, Value)>,
    alpha_pattern: Vec<(String, Value)>,
}

/// The keys whose order counts.
#[derive(serde::Deserialize)]
struct Patterns {
    rank_pattern: Option<Pairs<Value>>,
    alpha_pattern: Option<Pairs<Value>>,
}

impl Read {
    /// Reads an `adapter_config.json`.
    pub(super) fn from_file(path: &Path) -> Result<Self, WeightsError> {
        let bytes = fs::read(path).map_err(|source| Place { path, flag: FLAG }.read(source))?;
        let unusable = |message: String| WeightsError::AdapterConfig { path: path.to_owned(), message };
        let fields: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
        refuse_all_but_plain_lora(path, &fields)?;
        let patterns = serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
        Self::new(path, &fields, patterns).map_err(unusable)
    }

    fn new(path: &Path, fields: &Map<String, Value>, patterns: Patterns) -> Result<Self, String> {
        let base_model = match fields.get("base_model_name_or_path") {
            None | Some(Value::Null) => None,
            Some(_) => field(fields, "base_model_name_or_path", None, |value| value.as_str().map(Some))?,
        };
        let config = AdapterConfig {
            base_model: base_model.map(str::to_owned),
            rank: rank_of("r", field(fields, "r", None, Some)?)?,
            alpha: field(fields, "lora_alpha", Some(8.0), Value::as_f64)?,
            dropout: field(fields, "lora_dropout", Some(0.0), Value::as_f64)?,
            targets: BTreeSet::new(),
            every_layer: true,
            use_rslora: field(fields, "use_rslora", Some(false), Value::as_bool)?,
        };
        let targets = match fields.get("target_modules") {
            Some(Value::String(all)) if all == "all-linear" => Spec::AllLinear,
            value => spec("target_modules", value)?
                .ok_or("`target_modules` is neither a list of names, nor a pattern, nor \"all-linear\"")?,
        };
        let layers = layers(fields)?;
        if layers.is_some() && matches!(targets, Spec::Pattern(_)) {
            return Err("`layers_to_transform` stands beside a pattern, which PEFT does not allow".into());
        }
        if let Spec::Names(names) = &targets
            && let Some(name) = names.iter().find(|name| name.parse::<Target>().is_err())
        {
            return Err(format!(
                "`target_modules` holds \"{name}\", which is not one of Llama's seven linears (q_proj ... down_proj)"
            ));
        }
        Ok(Self {
            config,
            path: path.to_owned(),
            targets,
            excluded: spec("exclude_modules", fields.get("exclude_modules"))?,
            layers,
            rank_pattern: patterns.rank_pattern.map_or_else(Vec::new, |pairs| pairs.0),
            alpha_pattern: patterns.alpha_pattern.map_or_else(Vec::new, |pairs| pairs.0),
        })
    }

    /// Rank and alpha of modules, in their order.
    pub(super) fn numbers(&self, modules: &[Module]) -> Result<Vec<Numbers>, WeightsError> {
        let unusable = |message: String| WeightsError::AdapterConfig { path: self.path.clone(), message };
        let ranks =
            by_pattern("rank_pattern", &self.rank_pattern, modules, |value| rank_of("rank_pattern", value));
        let alpha = |value: &Value| {
            value.as_f64().ok_or_else(|| format!("`alpha_pattern` holds {value}, which is no number"))
        };
        let alphas = by_pattern("alpha_pattern", &self.alpha_pattern, modules, alpha).map_err(unusable)?;
        let ranks = ranks.map_err(unusable)?.into_iter().map(|rank| match rank {
            Some(rank) => (rank, "rank_pattern"),
            None => (self.config.rank, "r"),
        });
        let numbers = ranks.zip(alphas).map(|((rank, rank_from), alpha)| Numbers {
            rank,
            rank_from,
            alpha: alpha.unwrap_or(self.config.alpha),
        });
        Ok(numbers.collect())
    }

    /// Checks that the factors are those of the modules that are asked for, as far as the last layer that has any, and
    /// finds out whether layers count.
    pub(super) fn check_announced(
        &mut self,
        path: &Path,
        tensors: &BTreeMap<(usize, Target), Factors>,
    ) -> Result<(), WeightsError> {
        let layers = tensors.last_key_value().map_or(0, |(&(layer, _), _)| layer + 1);
        for place in (0..layers).flat_map(|layer| Target::ALL.map(|target| (layer, target))) {
            match (self.selects(place), tensors.contains_key(&place)) {
                (true, false) => return Err(missing(path, place)),
                (false, true) => return Err(unannounced(path, place)),
                _ => {}
            }
        }
        // What is asked for in every layer there is, and would be in further ones, is asked for in every layer.
        let every = |target| [0, layers, MAX_LAYERS].iter().all(|&layer| self.selects((layer, target)));
        let whole =
            |&(_, target): &(usize, Target)| (0..layers).all(|layer| tensors.contains_key(&(layer, target)));
        self.config.every_layer = tensors.keys().all(|place| every(place.1) && whole(place));
        Ok(())
    }

    fn selects(&self, (layer, target): (usize, Target)) -> bool {
        let module = Module { layer, target };
        self.targets.selects(module)
            && !self.excluded.as_ref().is_some_and(|excluded| excluded.selects(module))
            && self.layers.as_ref().is_none_or(|layers| layers.contains(&(layer as u64)))
    }
}

/// What the first matching key of a pattern says about each module.
fn by_pattern<T: Copy>(
    field: &str,
    pattern: &[(String, Value)],
    modules: &[Module],
    read: impl Fn(&Value) -> Result<T, String>,
) -> Result<Vec<Option<T>>, String> {
    if pattern.len() > MAX_PATTERNS {
        return Err(too_many(field, pattern.len()));
    }
    let mut found = vec![None; modules.len()];
    for (key, value) in pattern {
        let value = read(value)?;
        let answers = answering(key, modules).map_err(|error| format!("`{field}`: {error}"))?;
        for (slot, answers) in found.iter_mut().zip(answers) {
            if answers && slot.is_none() {
                *slot = Some(value);
            }
        }
    }
    Ok(found)
}

fn too_many(field: &str, count: usize) -> String {
    format!("`{field}` has {count} entries, more than any model has modules")
}

fn rank_of(field: &str, value: &Value) -> Result<usize, String> {
    let rank = value.as_u64().ok_or_else(|| format!("`{field}` is {value}, of the wrong type"))?;
    usize::try_from(rank).ok().filter(|&rank| rank > 0).ok_or_else(|| format!("`{field}` is {rank}, no rank"))
}

/// A list of names or a pattern; nothing if there is none.
fn spec(field: &str, value: Option<&Value>) -> Result<Option<Spec>, String> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(pattern)) if pattern.is_empty() => Ok(None),
        Some(Value::String(pattern)) => {
            Spec::pattern(pattern).map(Some).map_err(|error| format!("`{field}`: {error}"))
        }
        Some(Value::Array(names)) if names.len() > MAX_PATTERNS => Err(too_many(field, names.len())),
        Some(Value::Array(names)) => {
            let names = names.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
            names
                .map(|names| Some(Spec::Names(names)))
                .ok_or_else(|| format!("`{field}` holds what is no name"))
        }
        Some(other) => Err(format!("`{field}` is {other}, neither a list of names nor a pattern")),
    }
}

/// The layers that have factors, if not all do.
fn layers(fields: &Map<String, Value>) -> Result<Option<BTreeSet<u64>>, String> {
    match fields.get("layers_pattern") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if name.is_empty() || name == "layers" => {}
        Some(Value::Array(names)) if names.iter().all(|name| name == "layers") => {}
        Some(other) => {
            return Err(format!("`layers_pattern` is {other}, and Llama's layers are in \"layers\""));
        }
    }
    let wrong = |value: &Value| format!("`layers_to_transform` is {value}, no layer or list of layers");
    match fields.get("layers_to_transform") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(layers)) if layers.is_empty() => Ok(None),
        Some(value @ Value::Array(layers)) => {
            let layers = layers.iter().map(Value::as_u64).collect::<Option<_>>();
            layers.map(Some).ok_or_else(|| wrong(value))
        }
        Some(value) => value.as_u64().map(|layer| Some(BTreeSet::from([layer]))).ok_or_else(|| wrong(value)),
    }
}

/// The keys of PEFT 0.13, no more: that version fails on a key that it does not know.
pub(super) fn to_json(adapter: &Adapter) -> Value {
    let config = &adapter.config;
    let targets: Vec<String> = if config.every_layer {
        config.targets.iter().map(|target| target.hf_name().to_owned()).collect()
    } else {
        adapter.tensors.keys().map(|&place| short_path(place)).collect()
    };
    let others = |number: &dyn Fn(&Factors) -> Option<Value>| -> Map<String, Value> {
        let other =
            |(&place, factors): (&_, &_)| Some((short_path(place).replace('.', r"\."), number(factors)?));
        adapter.tensors.iter().filter_map(other).collect()
    };
    json!({
        "alpha_pattern": others(&|factors| (factors.alpha != config.alpha).then(|| alpha_json(factors.alpha))),
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": alpha_json(config.alpha),
        "lora_dropout": config.dropout,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": others(&|factors| (factors.rank != config.rank).then(|| factors.rank.into())),
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": config.use_rslora,
    })
}

/// A module's path without `model.` in front, as every version of PEFT finds it by.
fn short_path((layer, target): (usize, Target)) -> String {
    format!("layers.{layer}.{}", target.hf_path())
}

/// PEFT declares a whole number; a fraction is kept, and PEFT computes with it all the same.
fn alpha_json(alpha: f64) -> Value {
    let whole = alpha.fract() == 0.0 && alpha.abs() < 1e9;
    if whole { json!(alpha as i64) } else { json!(alpha) }
}

fn refuse_all_but_plain_lora(path: &Path, fields: &Map<String, Value>) -> Result<(), WeightsError> {
    let refuse = |field: &'static str, value: &Value, reason: &'static str| {
        let mut value = value.to_string();
        if let Some((end, _)) = value.char_indices().nth(80) {
            value.replace_range(end.., "...");
        }
        Err(WeightsError::AdapterUnsupported { path: path.to_owned(), field, value, reason })
    };
    match &fields.get("peft_type").unwrap_or(&Value::Null) {
        Value::String(kind) if kind == "LORA" => {}
        value => return refuse("peft_type", value, "only LORA is supported"),
    }
    match fields.get("bias") {
        None | Some(Value::Null) => {}
        Some(Value::String(bias)) if bias == "none" => {}
        Some(value) => return refuse("bias", value, "trained biases are not supported"),
    }
    match fields.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(start)) if PLAIN_STARTS.contains(&start.as_str()) => {}
        Some(value) => {
            let reason =
                "this start changes the base model's weights, so the factors do not fit the plain ones";
            return refuse("init_lora_weights", value, reason);
        }
    }
    for (field, reason) in MUST_BE_OFF {
        if let Some(value) = fields.get(field).filter(|value| !is_off(value)) {
            return refuse(field, value, reason);
        }
    }
    Ok(())
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// A field as `read` gives it, or its default if it is absent.
fn field<'a, T>(
    fields: &'a Map<String, Value>,
    name: &str,
    default: Option<T>,
    read: impl Fn(&'a Value) -> Option<T>,
) -> Result<T, String> {
    match (fields.get(name), default) {
        (None, Some(default)) => Ok(default),
        (None, None) => Err(format!("`{name}` is missing")),
        (Some(value), _) => read(value).ok_or_else(|| format!("`{name}` is {value}, of the wrong type")),
    }
}
