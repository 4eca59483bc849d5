//! PEFT's `adapter_config.json`, read from any version and written for all since 0.13.
//!
//! One table lists the keys that change what an adapter computes, with the values that leave it plain LoRA. What it
//! trades: a key that a later PEFT invents is passed over until it stands in the table. What it refuses: every other
//! value of a listed key.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{AdapterConfig, FLAG};
use crate::WeightsError;
use crate::error::Place;
use buzzer_model::Target;

/// Keys that must be absent, null, false or empty, and why.
const MUST_BE_OFF: [(&str, &str); 18] = [
    ("use_dora", "DoRA rescales the whole weight; only plain LoRA is supported"),
    ("use_qalora", "QALoRA pools the inputs; only plain LoRA is supported"),
    ("use_bdlora", "block-diagonal factors are not supported"),
    ("modules_to_save", "whole trained modules beside the factors are not supported"),
    ("alpha_pattern", "a scaling per module is not supported yet"),
    ("rank_pattern", "a rank per module is not supported yet"),
    ("fan_in_fan_out", "Llama's weights are stored as [out, in]"),
    ("lora_bias", "biases beside the factors are not supported"),
    ("layers_to_transform", "factors in only some layers are not supported yet"),
    ("layers_pattern", "factors in only some layers are not supported yet"),
    ("layer_replication", "repeated layers are not supported"),
    ("exclude_modules", "factors in only some modules are not supported yet"),
    ("target_parameters", "factors on bare parameters are not supported"),
    ("trainable_token_indices", "trained embeddings are not supported"),
    ("alora_invocation_tokens", "adapters that switch on inside a text are not supported"),
    ("arrow_config", "routing between adapters is not supported"),
    ("kasa_config", "KaSA changes the base model's weights"),
    ("monteclora_config", "sampled factors are not supported"),
];
/// Values of `init_lora_weights` under which the base model's weights stay as they were.
const PLAIN_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl AdapterConfig {
    /// Reads an `adapter_config.json`.
    pub(super) fn read(path: &Path) -> Result<Self, WeightsError> {
        let bytes = fs::read(path).map_err(|source| Place { path, flag: FLAG }.read(source))?;
        let unusable = |message: String| WeightsError::AdapterConfig { path: path.to_owned(), message };
        let fields: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
        refuse_all_but_plain_lora(path, &fields)?;
        let rank = field(&fields, "r", None, Value::as_u64).and_then(|rank| match usize::try_from(rank) {
            Ok(rank) if rank > 0 => Ok(rank),
            _ => Err(format!("`r` is {rank}, no rank")),
        });
        let base_model = match fields.get("base_model_name_or_path") {
            None | Some(Value::Null) => Ok(None),
            Some(_) => field(&fields, "base_model_name_or_path", None, |value| value.as_str().map(Some)),
        };
        let alpha = field(&fields, "lora_alpha", Some(8.0), Value::as_f64);
        let dropout = field(&fields, "lora_dropout", Some(0.0), Value::as_f64);
        Ok(Self {
            base_model: base_model.map_err(unusable)?.map(str::to_owned),
            rank: rank.map_err(unusable)?,
            alpha: alpha.map_err(unusable)?,
            dropout: dropout.map_err(unusable)?,
            targets: targets(fields.get("target_modules")).map_err(unusable)?,
            use_rslora: field(&fields, "use_rslora", Some(false), Value::as_bool).map_err(unusable)?,
        })
    }

    /// The keys of PEFT 0.13, no more: that version fails on a key that it does not know.
    pub(super) fn to_json(&self) -> Value {
        let targets: Vec<&str> = self.targets.iter().map(|target| target.hf_name()).collect();
        // PEFT declares a whole number; a fraction is kept, and PEFT computes with it all the same.
        let whole = self.alpha.fract() == 0.0 && self.alpha.abs() < 1e9;
        let alpha = if whole { json!(self.alpha as i64) } else { json!(self.alpha) };
        json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": {},
            "revision": null,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        })
    }
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

/// A list of names, plain or with the path in front, or `all-linear`.
fn targets(value: Option<&Value>) -> Result<BTreeSet<Target>, String> {
    let unknown = |name: &Value| {
        format!(
            "`target_modules` holds {name}, which is not one of Llama's seven linears (q_proj ... down_proj)"
        )
    };
    match value {
        Some(Value::String(all)) if all == "all-linear" => Ok(Target::ALL.into()),
        Some(Value::Array(names)) => names
            .iter()
            .map(|name| name.as_str().and_then(|name| name.parse().ok()).ok_or_else(|| unknown(name)))
            .collect(),
        Some(Value::String(pattern)) => Err(format!(
            "`target_modules` is the pattern `{pattern}`; only a list of names or \"all-linear\" is read"
        )),
        _ => Err("`target_modules` is neither a list of names nor \"all-linear\"".into()),
    }
}
