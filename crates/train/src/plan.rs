//! What a run will hold in memory, from the same numbers as the run.
//!
//! Counted are the tensors of the reference operations; an allocator's rounding, the program itself and the corpus on
//! the host are not.

use buzzer_kernels::cross_entropy::CHUNK_VALUES;
use buzzer_model::{LlamaConfig, LoraSettings, Target};
use serde::Serialize;

/// The sizes of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// b: rows on the device at a time.
    pub batch_rows: usize,
    /// t: tokens of a row.
    pub row_len: usize,
}

/// Bytes by part. Logits and a block's activations are not alive together; both are counted, which errs upwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The frozen model.
    pub weights: usize,
    /// LoRA factors, their gradients and both moments, f32.
    pub adapters: usize,
    /// One tensor `[b, t, d]` a block.
    pub block_inputs: usize,
    /// Activations of the block that is run again, and their gradients.
    pub block_peak: usize,
    /// The largest weight, dense.
    pub dense_weight: usize,
    /// A chunk of logits, its exponentials and its gradient, f32.
    pub logits_chunk: usize,
}

impl MemoryPlan {
    /// The plan of a run; `weights` in bytes, activations of `element` bytes.
    #[must_use]
    pub fn new(
        config: &LlamaConfig,
        lora: &LoraSettings,
        shape: Shape,
        weights: usize,
        element: usize,
    ) -> Self {
        let tokens = shape.batch_rows * shape.row_len;
        let largest = Target::ALL.map(|target| config.linear_shape(target).iter().product::<usize>());
        Self {
            weights,
            adapters: 16 * lora_parameters(config, lora),
            block_inputs: config.num_hidden_layers * tokens * config.hidden_size * element,
            block_peak: block_peak(config, shape, element),
            dense_weight: largest.into_iter().max().unwrap_or(0) * element,
            logits_chunk: 3 * 4 * (tokens * config.vocab_size).min(CHUNK_VALUES),
        }
    }

    /// All parts.
    #[must_use]
    pub fn total(&self) -> usize {
        self.weights
            + self.adapters
            + self.block_inputs
            + self.block_peak
            + self.dense_weight
            + self.logits_chunk
    }
}

fn lora_parameters(config: &LlamaConfig, lora: &LoraSettings) -> usize {
    let widths = |&target: &Target| config.linear_shape(target).iter().sum::<usize>();
    config.num_hidden_layers * lora.rank * lora.targets.iter().map(widths).sum::<usize>()
}

/// Kept: input, two norms, q, k, v and their rotations, attention's output twice, the residual between, gate, up and
/// their product. In flight at attention: three score matrices in f32. Gradients of the widest tensors come on top.
fn block_peak(config: &LlamaConfig, shape: Shape, element: usize) -> usize {
    let tokens = shape.batch_rows * shape.row_len;
    let (d, f) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let kept = tokens * (6 * d + 3 * queries + 3 * keys + 3 * f) * element;
    let scores = 3 * shape.batch_rows * config.num_attention_heads * shape.row_len * shape.row_len * 4;
    let flowing = tokens * (2 * f + d) * element;
    kept + scores.max(flowing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notebooks_adapter_has_160_million_weights() {
        let config = LlamaConfig::llama2_7b();
        let lora = LoraSettings { rank: 64, alpha: 16.0, rslora: false, targets: Target::ALL.to_vec() };
        assert_eq!(lora_parameters(&config, &lora), 159_907_840);
        let shape = Shape { batch_rows: 4, row_len: 1024 };
        let plan = MemoryPlan::new(&config, &lora, shape, 3_600_000_000, 2);
        assert_eq!(plan.block_inputs, 32 * 4 * 1024 * 4096 * 2);
        assert!(plan.total() > plan.weights + plan.adapters);
    }
}
