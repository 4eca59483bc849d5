//! The tensors of a Llama checkpoint, in the order in which they are written, with their names and shapes.
//!
//! Names follow Hugging Face's table in `buzzer_model`; GGUF's stand beside them. It refuses nothing: what is not in this
//! list (rotary tables that old checkpoints carry) is not written.

use buzzer_model::{LlamaConfig, Target, block_tensor};

/// One tensor of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Embedding,
    AttentionNorm(usize),
    MlpNorm(usize),
    Linear(usize, Target),
    Norm,
    Head,
}

impl Part {
    /// Every tensor of a model; a tied head is none.
    pub(crate) fn all(config: &LlamaConfig) -> Vec<Self> {
        let mut parts = vec![Self::Embedding];
        for layer in 0..config.num_hidden_layers {
            parts.push(Self::AttentionNorm(layer));
            parts.extend(Target::ALL[..4].iter().map(|&target| Self::Linear(layer, target)));
            parts.push(Self::MlpNorm(layer));
            parts.extend(Target::ALL[4..].iter().map(|&target| Self::Linear(layer, target)));
        }
        parts.push(Self::Norm);
        if !config.tie_word_embeddings {
            parts.push(Self::Head);
        }
        parts
    }

    /// Slowest dimension first.
    pub(crate) fn shape(self, config: &LlamaConfig) -> Vec<usize> {
        match self {
            Self::Embedding | Self::Head => vec![config.vocab_size, config.hidden_size],
            Self::AttentionNorm(_) | Self::MlpNorm(_) | Self::Norm => vec![config.hidden_size],
            Self::Linear(_, target) => config.linear_shape(target).to_vec(),
        }
    }

    pub(crate) fn hf_name(self) -> String {
        match self {
            Self::Embedding => "model.embed_tokens.weight".into(),
            Self::AttentionNorm(layer) => block_tensor(layer, "input_layernorm.weight"),
            Self::MlpNorm(layer) => block_tensor(layer, "post_attention_layernorm.weight"),
            Self::Linear(layer, target) => block_tensor(layer, &format!("{}.weight", target.hf_path())),
            Self::Norm => "model.norm.weight".into(),
            Self::Head => "lm_head.weight".into(),
        }
    }

    pub(crate) fn gguf_name(self) -> String {
        let in_block = |layer: usize, name: &str| format!("blk.{layer}.{name}.weight");
        match self {
            Self::Embedding => "token_embd.weight".into(),
            Self::AttentionNorm(layer) => in_block(layer, "attn_norm"),
            Self::MlpNorm(layer) => in_block(layer, "ffn_norm"),
            Self::Linear(layer, target) => in_block(
                layer,
                match target {
                    Target::Q => "attn_q",
                    Target::K => "attn_k",
                    Target::V => "attn_v",
                    Target::O => "attn_output",
                    Target::Gate => "ffn_gate",
                    Target::Up => "ffn_up",
                    Target::Down => "ffn_down",
                },
            ),
            Self::Norm => "output_norm.weight".into(),
            Self::Head => "output.weight".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_weight_is_a_part_and_has_a_name_of_its_own() {
        for tied in [false, true] {
            let config = LlamaConfig::tiny_test(50).with_tie_word_embeddings(tied);
            let parts = Part::all(&config);
            let elements = parts.iter().map(|part| part.shape(&config).iter().product::<usize>());
            assert_eq!(elements.sum::<usize>(), config.parameters());
            for name in [Part::hf_name, Part::gguf_name] {
                assert_eq!(parts.iter().map(|&part| name(part)).collect::<BTreeSet<_>>().len(), parts.len());
            }
        }
    }
}
