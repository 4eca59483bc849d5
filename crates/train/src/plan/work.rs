//! How much there is to compute and to move in a step, for an estimate of its time on a card that is not here.

use buzzer_model::{LlamaConfig, LoraSettings, Target};

use super::PlanSettings;

/// Tokens of a query tile and of a key tile: attention does not compute less than a tile.
const TILE: f64 = 64.0;
/// Products of attention run at so much lower a rate than large ones.
const ATTENTION_COST: f64 = 3.0;

/// Operations and traffic of one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepWork {
    /// Operations of products.
    pub flop: f64,
    /// Bytes read and written outside large products.
    pub bytes: f64,
    /// Tokens, padding included.
    pub tokens: f64,
}

impl StepWork {
    /// The work of a step on rows whose documents have a mean length of `document_len`.
    #[must_use]
    pub fn new(settings: &PlanSettings, document_len: f64) -> Self {
        let batches = settings.accumulation as f64;
        let tokens = settings.shape.tokens() as f64;
        let optimizer = settings.lora_parameters() as f64 * if settings.eight_bit { 14.0 } else { 28.0 };
        Self {
            flop: batches * (linear_flop(settings, tokens) + attention_flop(settings, tokens, document_len)),
            bytes: batches * (weight_bytes(settings) + activation_bytes(settings, tokens)) + optimizer,
            tokens: batches * tokens,
        }
    }
}

/// Operations that training needs for a token, as MFU counts them (Chowdhery et al., "PaLM", appendix B,
/// <https://arxiv.org/abs/2204.02311>): nothing that is computed again, and no attention. 4 for each frozen weight that is
/// multiplied, head included, whose own gradient is never formed; 6 for each number of a factor. 27.4e9 for Llama-2-7B with rank
/// 64 on all linears.
#[must_use]
pub fn token_flop(config: &LlamaConfig, lora: &LoraSettings) -> f64 {
    4.0 * multiplied(config) + 6.0 * lora.parameters(config) as f64
}

/// The same where every weight is trained: 6 for each that is multiplied.
#[must_use]
pub fn dense_token_flop(config: &LlamaConfig) -> f64 {
    6.0 * multiplied(config)
}

/// Weights that a token is multiplied with: the linears and the head.
fn multiplied(config: &LlamaConfig) -> f64 {
    (config.linear_parameters() + config.vocab_size * config.hidden_size) as f64
}

fn layers(settings: &PlanSettings) -> f64 {
    settings.config.num_hidden_layers as f64
}

/// Two operations a weight: forward, again for the backward pass (all but the last product of a block), and for the
/// input's gradient; and once more for blocks whose input is not kept. Eight for a factor: two forward, two again, and its and its input's gradient. Four for the head.
fn linear_flop(settings: &PlanSettings, tokens: f64) -> f64 {
    let frozen = settings.config.linear_parameters() as f64;
    let down = layers(settings) * settings.config.linear_shape(Target::Down).iter().product::<usize>() as f64;
    let head = (settings.config.vocab_size * settings.config.hidden_size) as f64;
    let trained = settings.lora_parameters() as f64;
    let again = 2.0 * frozen * (1.0 - 1.0 / settings.checkpoint_every as f64);
    tokens * (6.0 * frozen - 2.0 * down + again + 8.0 * trained) + 4.0 * settings.head_rows() as f64 * head
}

/// A query meets half its document. Two products forward, the same again, and seven in the two backward kernels.
fn attention_flop(settings: &PlanSettings, tokens: f64, document_len: f64) -> f64 {
    let queries = (settings.config.num_attention_heads * settings.config.head_dim) as f64;
    let met = document_len / 2.0 + TILE;
    ATTENTION_COST * layers(settings) * tokens * met * 2.0 * 11.0 * queries
}

/// Every frozen weight is unpacked for each of its three products, written dense and read by the product.
fn weight_bytes(settings: &PlanSettings) -> f64 {
    3.0 * settings.config.linear_parameters() as f64 * (0.53 + 2.0 * settings.element as f64)
}

/// What norms, rotation, gates, masks and the products with factors, which are too narrow to hide it, read and write.
fn activation_bytes(settings: &PlanSettings, tokens: f64) -> f64 {
    let config = &settings.config;
    let [d, f] = [config.hidden_size, config.intermediate_size].map(|width| width as f64);
    let qkv = settings.qkv_width() as f64;
    let elementwise = 4.0 * (12.0 * d + 4.0 * qkv + 6.0 * f);
    let widths = |&target: &Target| {
        let [out, inner] = config.linear_shape(target).map(|width| width as f64);
        // Twice forward: x is read, y read and written. Backward: drop(x), g and the input's gradient.
        2.0 * (inner + 2.0 * out) + 4.0 * inner + 2.0 * out
    };
    let factors = settings.lora.targets.iter().map(widths).sum::<f64>();
    let logits =
        settings.head_rows() as f64 * config.vocab_size as f64 * (8.0 + 2.0 * settings.element as f64);
    tokens * layers(settings) * (elementwise + factors) * settings.element as f64 + logits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_of_the_7b_takes_27_gigaflop() {
        let lora = LoraSettings { rank: 64, alpha: 16.0, rslora: false, targets: Target::ALL.to_vec() };
        let flop = token_flop(&LlamaConfig::llama2_7b(), &lora);
        assert!((flop - 27.4e9).abs() < 0.05e9, "{flop}");
    }
}
