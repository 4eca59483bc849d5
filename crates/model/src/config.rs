//! The sizes of a Llama 2 model, as numbers and from Hugging Face's `config.json`.
//!
//! It refuses what it would compute wrongly: another architecture, scaled rotary positions, biases, another activation.

use burn::config::Config;
use buzzer_kernels::Heads;
use serde_json::{Map, Value, json};

use crate::{ModelError, Target};

/// Far above any width, vocabulary or depth, and small enough for the number of all weights to fit 64 bits.
const MAX_SIZE: u64 = 1 << 20;

/// Sizes of a Llama 2 model.
#[derive(Config, Debug, PartialEq)]
pub struct LlamaConfig {
    /// v: rows of the embedding and of the head.
    pub vocab_size: usize,
    /// d: width of the residual stream.
    pub hidden_size: usize,
    /// f: width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// h: query heads.
    pub num_attention_heads: usize,
    /// g: key and value heads; divides h.
    pub num_key_value_heads: usize,
    /// k: width of a head.
    pub head_dim: usize,
    /// Positions the model was trained for.
    #[config(default = 4096)]
    pub max_position_embeddings: usize,
    /// ε of the norms.
    #[config(default = 1e-5)]
    pub rms_norm_eps: f64,
    /// θ of the rotary embedding.
    #[config(default = 10000.0)]
    pub rope_theta: f64,
    /// Whether the head is the embedding.
    #[config(default = false)]
    pub tie_word_embeddings: bool,
}

impl LlamaConfig {
    /// Llama-2-7B.
    #[must_use]
    pub fn llama2_7b() -> Self {
        Self::new(32_000, 4096, 11_008, 32, 32, 32, 128)
    }

    /// Llama-2-13B.
    #[must_use]
    pub fn llama2_13b() -> Self {
        Self::new(32_000, 5120, 13_824, 40, 40, 40, 128)
    }

    /// Llama-2-70B, with 8 key and value heads.
    #[must_use]
    pub fn llama2_70b() -> Self {
        Self::new(32_000, 8192, 28_672, 80, 64, 8, 128)
    }

    /// Two small blocks with grouped heads, for tests.
    #[must_use]
    pub fn tiny_test(vocab_size: usize) -> Self {
        Self::new(vocab_size, 32, 48, 2, 4, 2, 8).with_max_position_embeddings(256)
    }

    /// Heads of every attention.
    #[must_use]
    pub fn heads(&self) -> Heads {
        Heads { queries: self.num_attention_heads, keys: self.num_key_value_heads, width: self.head_dim }
    }

    /// Reads the text of a `config.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// If it is no JSON object, belongs to another architecture, or lacks a size.
    pub fn from_hugging_face(text: &str, origin: &str) -> Result<Self, ModelError> {
        let keys: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| ModelError::Parse { origin: origin.into(), message: error.to_string() })?;
        let reader = Reader { keys: &keys, origin };
        reader.refuse_other_models()?;
        let heads = reader.size("num_attention_heads")?;
        let hidden = reader.size("hidden_size")?;
        let groups = reader.maybe_size("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = reader.maybe_size("head_dim")?.unwrap_or(hidden / heads);
        if !heads.is_multiple_of(groups) {
            return Err(
                reader.wrong("num_key_value_heads", format!("is {groups}, which does not divide {heads}"))
            );
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(reader.wrong("head_dim", format!("is {head_dim}, but must be even")));
        }
        if heads * head_dim > MAX_SIZE as usize {
            return Err(reader.wrong("head_dim", format!("is {head_dim}, too wide for {heads} heads")));
        }
        let config = Self::new(
            reader.size("vocab_size")?,
            hidden,
            reader.size("intermediate_size")?,
            reader.size("num_hidden_layers")?,
            heads,
            groups,
            head_dim,
        );
        Ok(config
            .with_max_position_embeddings(reader.maybe_size("max_position_embeddings")?.unwrap_or(4096))
            .with_rms_norm_eps(reader.number("rms_norm_eps")?.unwrap_or(1e-6))
            .with_rope_theta(reader.rope_theta()?)
            .with_tie_word_embeddings(keys.get("tie_word_embeddings").and_then(Value::as_bool) == Some(true)))
    }

    /// The `config.json` that Hugging Face's transformers load.
    #[must_use]
    pub fn to_hugging_face(&self, bos_id: u32, eos_id: u32, dtype: &str) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "vocab_size": self.vocab_size,
        })
    }

    /// `[out, in]` of a linear.
    #[must_use]
    pub fn linear_shape(&self, target: Target) -> [usize; 2] {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        match target {
            Target::Q => [queries, d],
            Target::K | Target::V => [keys, d],
            Target::O => [d, queries],
            Target::Gate | Target::Up => [f, d],
            Target::Down => [d, f],
        }
    }

    /// Weights in the linears of all blocks.
    #[must_use]
    pub fn linear_parameters(&self) -> usize {
        let block: usize =
            Target::ALL.iter().map(|&target| self.linear_shape(target).iter().product::<usize>()).sum();
        self.num_hidden_layers * block
    }

    /// All weights; a tied head counts once.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let norms = (2 * self.num_hidden_layers + 1) * self.hidden_size;
        self.linear_parameters() + tables * self.vocab_size * self.hidden_size + norms
    }
}

struct Reader<'a> {
    keys: &'a Map<String, Value>,
    origin: &'a str,
}

impl Reader<'_> {
    fn refuse_other_models(&self) -> Result<(), ModelError> {
        let refuse = |key, supported| {
            let found = self.keys.get(key).unwrap_or(&Value::Null).to_string();
            Err(ModelError::Unsupported { origin: self.origin.into(), key, found, supported })
        };
        let text = |key| self.keys.get(key).and_then(Value::as_str);
        let on = |key: &str| self.keys.get(key).and_then(Value::as_bool) == Some(true);
        if text("model_type") != Some("llama") {
            return refuse("model_type", "\"llama\" (Llama 2 and models of its architecture)");
        }
        let other = |name: &Value| name != "LlamaForCausalLM";
        if self
            .keys
            .get("architectures")
            .and_then(Value::as_array)
            .is_some_and(|names| names.iter().any(other))
        {
            return refuse("architectures", "[\"LlamaForCausalLM\"]");
        }
        if text("hidden_act").is_some_and(|act| act != "silu") {
            return refuse("hidden_act", "\"silu\"");
        }
        if on("attention_bias") {
            return refuse("attention_bias", "false");
        }
        if on("mlp_bias") {
            return refuse("mlp_bias", "false");
        }
        if self.keys.get("rope_scaling").is_some_and(|scaling| !is_default_rope(scaling)) {
            return refuse("rope_scaling", "null (Llama 2's plain rotary positions)");
        }
        if self.keys.get("rope_parameters").is_some_and(|rope| !is_default_rope(rope)) {
            return refuse("rope_parameters", "rope_type \"default\"");
        }
        Ok(())
    }

    /// Newer files keep it among the rope parameters.
    fn rope_theta(&self) -> Result<f64, ModelError> {
        let nested =
            self.keys.get("rope_parameters").and_then(|rope| rope.get("rope_theta")).and_then(Value::as_f64);
        Ok(nested.or(self.number("rope_theta")?).unwrap_or(10_000.0))
    }

    fn size(&self, key: &'static str) -> Result<usize, ModelError> {
        self.maybe_size(key)?.ok_or_else(|| self.wrong(key, "is missing".into()))
    }

    fn maybe_size(&self, key: &'static str) -> Result<Option<usize>, ModelError> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                match value.as_u64() {
                    Some(size @ 1..=MAX_SIZE) => Ok(Some(size as usize)),
                    _ => Err(self
                        .wrong(key, format!("is {value}, but must be a whole number from 1 to {MAX_SIZE}"))),
                }
            }
        }
    }

    fn number(&self, key: &'static str) -> Result<Option<f64>, ModelError> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 => Ok(Some(number)),
                _ => Err(self.wrong(key, format!("is {value}, but must be a positive number"))),
            },
        }
    }

    fn wrong(&self, key: &'static str, problem: String) -> ModelError {
        ModelError::Number { origin: self.origin.into(), key, problem }
    }
}

fn is_default_rope(rope: &Value) -> bool {
    let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str);
    rope.is_null() || kind == Some("default")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_sizes_have_the_published_parameters() {
        assert_eq!(LlamaConfig::llama2_7b().parameters(), 6_738_415_616);
        assert_eq!(LlamaConfig::llama2_13b().parameters(), 13_015_864_320);
        assert_eq!(LlamaConfig::llama2_70b().parameters(), 68_976_648_192);
    }

    #[test]
    fn a_config_survives_the_way_to_hugging_face_and_back() {
        let config = LlamaConfig::tiny_test(300).with_rms_norm_eps(1e-6).with_tie_word_embeddings(true);
        let text = config.to_hugging_face(1, 2, "bfloat16").to_string();
        assert_eq!(LlamaConfig::from_hugging_face(&text, "x").unwrap(), config);
    }

    #[test]
    fn other_models_are_refused_by_name() {
        let mut json = LlamaConfig::tiny_test(300).to_hugging_face(1, 2, "float32");
        let mut refused = |key: &str, value: Value, hint: &str| {
            let before = json[key].clone();
            json[key] = value;
            let error =
                LlamaConfig::from_hugging_face(&json.to_string(), "config.json").unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(key) && error.contains(hint), "{error}");
            json[key] = before;
        };
        refused("model_type", json!("mistral"), "llama");
        refused("architectures", json!(["LlamaForSequenceClassification"]), "LlamaForCausalLM");
        refused("attention_bias", json!(true), "false");
        refused("rope_scaling", json!({"rope_type": "llama3", "factor": 8}), "null");
        refused("hidden_size", json!(-3), "whole number");
        refused("vocab_size", Value::Null, "missing");
        refused("num_key_value_heads", json!(3), "divide");
        refused("hidden_size", json!((1 << 20) + 1), "1048576");
        refused("head_dim", json!(1 << 19), "too wide for 4 heads");
        assert!(LlamaConfig::from_hugging_face("[1]", "x").is_err());
    }
}
