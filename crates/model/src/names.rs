//! The seven linears of a block, and the one table of Hugging Face names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ModelError;

/// A linear layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Target {
    /// Queries.
    #[serde(rename = "q_proj")]
    Q,
    /// Keys.
    #[serde(rename = "k_proj")]
    K,
    /// Values.
    #[serde(rename = "v_proj")]
    V,
    /// Output of attention.
    #[serde(rename = "o_proj")]
    O,
    /// Gate of the MLP.
    #[serde(rename = "gate_proj")]
    Gate,
    /// Up projection of the MLP.
    #[serde(rename = "up_proj")]
    Up,
    /// Down projection of the MLP.
    #[serde(rename = "down_proj")]
    Down,
}

impl Target {
    /// All seven, in the order in which a block uses them.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// `q_proj` and so on.
    #[must_use]
    pub fn hf_name(self) -> &'static str {
        self.hf_path().rsplit('.').next().unwrap_or_default()
    }

    /// `self_attn.q_proj` and so on: the path inside a block.
    #[must_use]
    pub fn hf_path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Reads `all`, `qv` or a comma-separated list of names.
    ///
    /// # Errors
    /// If a name is none of the seven.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, ModelError> {
        match text.trim() {
            "all" => Ok(Self::ALL.to_vec()),
            "qv" => Ok(vec![Self::Q, Self::V]),
            list => {
                let mut targets = list.split(',').map(str::parse).collect::<Result<Vec<Self>, _>>()?;
                targets.sort_unstable();
                targets.dedup();
                Ok(targets)
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.hf_name())
    }
}

impl FromStr for Target {
    type Err = ModelError;

    /// Reads `q_proj`, `self_attn.q_proj` or anything that ends in `.self_attn.q_proj`.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let name = name.trim();
        let named = |target: &Self| {
            let before = name.strip_suffix(target.hf_path());
            name == target.hf_name()
                || before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        Self::ALL.into_iter().find(named).ok_or_else(|| ModelError::UnknownTarget(name.to_owned()))
    }
}

/// `model.layers.N.` and the rest: the name of a block's tensor in a checkpoint.
#[must_use]
pub fn block_tensor(layer: usize, rest: &str) -> String {
    format!("model.layers.{layer}.{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(Target::parse_list("all").unwrap(), Target::ALL);
        assert_eq!(Target::parse_list("v_proj, q_proj,q_proj").unwrap(), [Target::Q, Target::V]);
        assert_eq!(Target::parse_list("qv").unwrap(), [Target::Q, Target::V]);
        assert_eq!(Target::parse_list("mlp.up_proj").unwrap(), [Target::Up]);
        let error = Target::parse_list("q_proj,lm_head").unwrap_err().to_string();
        assert!(error.contains("`lm_head`") && error.contains("down_proj"), "{error}");
    }
}
