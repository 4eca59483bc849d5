//! Forward and backward block by block, without autodiff.
//!
//! ```text
//! forward   x₀ = embed(ids)    xᵢ₊₁ = blockᵢ(xᵢ)     keep every xᵢ, nothing else
//! head      loss and dL/dx of the last one
//! backward  for i from the last to 0: blockᵢ runs again from xᵢ and walks back, g ← dL/dxᵢ
//! ```
//!
//! Memory at the peak is one tensor `[b t, d]` a block, one block's activations, and one chunk of logits; gradients of
//! factors lie where the inputs of finished blocks lay. A block's
//! dropout masks come from a key, so the second run draws the same ones.

use std::collections::BTreeMap;

use burn::tensor::{DType, IndexingUpdateOp, Tensor, TensorData};
use buzzer_data::Batch;
use buzzer_kernels::{Dropout, IGNORED, KernelBackend, Spent};
use buzzer_model::{BlockContext, Llama};

use crate::batch::{rows_at_head, shifted};
use crate::gradients::scalar;
use crate::{DeviceBatch, LoraGradients};

/// Loss and gradients of one batch.
#[derive(Debug)]
pub struct BlockPass<B: KernelBackend> {
    pub(crate) loss: Tensor<B, 1>,
    /// Gradients of the scaled sum of the losses.
    pub gradients: LoraGradients<B>,
}

impl<B: KernelBackend> BlockPass<B> {
    /// Sum of the losses over the batch's targets, not scaled. Waits for the device, so ask late.
    #[must_use]
    pub fn loss_sum(&self) -> f64 {
        f64::from(scalar(self.loss.clone()))
    }
}

/// How a batch is passed through the model and back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PassSettings {
    /// What the sum of the losses is multiplied by before the backward pass.
    pub scale: f64,
    /// Dropout of the batch, if any.
    pub dropout: Option<Dropout>,
    /// Keep the input of every so many blocks only, and compute those between again: less memory, more work.
    pub checkpoint_every: usize,
    /// Place gradients where inputs of finished blocks lay. Those that are to be added up are better off in memory of
    /// their own, in which the sum takes the place of one of them.
    pub spend_inputs: bool,
}

impl PassSettings {
    /// No dropout, and every block's input kept.
    #[must_use]
    pub fn new(scale: f64) -> Self {
        Self { scale, dropout: None, checkpoint_every: 1, spend_inputs: true }
    }

    fn of_block(&self, layer: usize) -> Option<Dropout> {
        self.dropout.map(|dropout| dropout.derive(layer as u64))
    }
}

/// Gradients of `scale` times the sum of a batch's losses, for every LoRA factor.
///
/// With `scale = 1 / targets of the whole step` the gradients of several batches add up to those of one large batch.
#[must_use]
pub fn backward_by_blocks<B: KernelBackend>(
    model: &Llama<B>,
    batch: &DeviceBatch<B>,
    settings: &PassSettings,
) -> BlockPass<B> {
    B::on_device_thread(&model.device(), || pass_by_blocks(model, batch, settings))
}

fn pass_by_blocks<B: KernelBackend>(
    model: &Llama<B>,
    batch: &DeviceBatch<B>,
    settings: &PassSettings,
) -> BlockPass<B> {
    let context = context(model, batch);
    let every = settings.checkpoint_every.max(1);
    let mut checkpoints = Vec::with_capacity(model.blocks.len().div_ceil(every));
    let mut x = model.embed(batch.ids.clone());
    for (layer, block) in model.blocks.iter().enumerate() {
        if layer.is_multiple_of(every) {
            checkpoints.push(x.clone());
        }
        x = block.run(x, &context, settings.of_block(layer));
    }
    let (loss, upstream) = backward_of_head(model, batch, x, settings.scale);
    let mut upstream = Some(upstream);
    let mut gradients = LoraGradients::default();
    // Where few inputs are kept, their memory serves those that are computed again.
    let mut spent = if every > 1 { Spent::frugal() } else { Spent::default() };
    while let Some(checkpoint) = checkpoints.pop() {
        let first = checkpoints.len() * every;
        let last = model.blocks.len().min(first + every) - 1;
        let mut inputs = vec![checkpoint];
        for layer in first..last {
            let input = inputs[layer - first].clone();
            inputs.push(model.blocks[layer].run(input, &context, settings.of_block(layer)));
        }
        while let Some(input) = inputs.pop() {
            let Some(grad) = upstream.take() else { break };
            let layer = first + inputs.len();
            let dropout = settings.of_block(layer);
            let found = model.blocks[layer].backward(input, &context, dropout, grad, layer > 0, &mut spent);
            gradients.factors.extend(found.factors.into_iter().map(|(target, pair)| ((layer, target), pair)));
            upstream = found.x;
            if !settings.spend_inputs {
                spent = Spent::default();
            }
        }
    }
    BlockPass { loss, gradients }
}

/// The mean loss of a batch's targets and their number, without gradients.
#[must_use]
pub fn mean_loss<B: KernelBackend>(model: &Llama<B>, batch: &DeviceBatch<B>) -> (f64, usize) {
    let hidden = model.hidden(batch.ids.clone(), &context(model, batch), None);
    let rows = batch.at_head(hidden, |rows| rows);
    let losses = B::cross_entropy(rows, model.head_weight(), batch.targets.clone());
    (f64::from(scalar(losses.sum())) / batch.loss_tokens.max(1) as f64, batch.loss_tokens)
}

/// The losses of the targets of each of several labellings of one batch's rows, in order of place; one pass through the blocks.
///
/// The head takes as many places at a time as the first labelling passes to it in a step.
#[must_use]
pub(crate) fn target_losses<B: KernelBackend>(model: &Llama<B>, batches: &[Batch]) -> Vec<Vec<f64>> {
    let targets: Vec<BTreeMap<i32, i32>> = batches.iter().map(|batch| shifted(batch).collect()).collect();
    let union: BTreeMap<i32, i32> =
        targets.iter().flatten().map(|(&place, &target)| (place, target)).collect();
    let Some(first) = batches.first().filter(|_| !union.is_empty()) else {
        return vec![Vec::new(); batches.len()];
    };
    let all = first.ids.len();
    let at_a_time = rows_at_head(targets[0].len().max(1), all).unwrap_or(all);
    let batch = DeviceBatch::<B>::new(first, &model.device());
    let hidden = model.hidden(batch.ids.clone(), &context(model, &batch), None);
    let union: Vec<(i32, i32)> = union.into_iter().collect();
    let losses: BTreeMap<i32, f64> =
        union.chunks(at_a_time).flat_map(|places| head_losses(model, &hidden, places, at_a_time)).collect();
    targets.iter().map(|targets| targets.keys().map(|place| losses[place]).collect()).collect()
}

/// Each place of `hidden [b t, d]` with its loss; they are filled up to `length` of them.
fn head_losses<B: KernelBackend>(
    model: &Llama<B>,
    hidden: &Tensor<B, 2>,
    places: &[(i32, i32)],
    length: usize,
) -> Vec<(i32, f64)> {
    let device = hidden.device();
    let (mut rows, mut targets): (Vec<i32>, Vec<i32>) = places.iter().copied().unzip();
    rows.resize(length, 0);
    targets.resize(length, IGNORED);
    let line = |values: Vec<i32>| Tensor::from_data(TensorData::new(values, [length]), &device);
    let losses = B::cross_entropy(hidden.clone().select(0, line(rows)), model.head_weight(), line(targets));
    let losses = losses.cast(DType::F32).into_data();
    places.iter().map(|&(place, _)| place).zip(losses.iter::<f32>().map(f64::from)).collect()
}

fn context<B: KernelBackend>(model: &Llama<B>, batch: &DeviceBatch<B>) -> BlockContext<B> {
    BlockContext::rows(model.config(), batch.documents.clone(), batch.positions.clone())
}

/// Loss, and the gradient of its multiple at the last block's output.
fn backward_of_head<B: KernelBackend>(
    model: &Llama<B>,
    batch: &DeviceBatch<B>,
    x: Tensor<B, 2>,
    scale: f64,
) -> (Tensor<B, 1>, Tensor<B, 2>) {
    let everywhere = batch.loss_rows.is_some().then(|| x.zeros_like());
    let epsilon = model.config().rms_norm_eps;
    let x = batch.at_head(x, |rows| rows);
    let normed = B::rms_norm(x.clone(), model.norm.val(), epsilon);
    let targets = batch.targets.clone();
    let loss = B::cross_entropy_with_gradient(normed, model.head_weight(), targets, scale, false);
    let (dx, _) = B::rms_norm_backward(x, model.norm.val(), epsilon, loss.hidden, false);
    let dx = match (everywhere, &batch.loss_rows) {
        (Some(zeros), Some(rows)) => zeros.select_assign(0, rows.clone(), dx, IndexingUpdateOp::Add),
        _ => dx,
    };
    (loss.loss_sum, dx)
}

/// Where a pass first gives something that is no finite number: a block and its part, or the head.
#[must_use]
pub(crate) fn locate_non_finite<B: KernelBackend>(
    model: &Llama<B>,
    batch: &DeviceBatch<B>,
    dropout: Option<Dropout>,
) -> String {
    let context = context(model, batch);
    let finite = |x: &Tensor<B, 2>| scalar(x.clone().cast(DType::F32).abs().sum()).is_finite();
    let mut x = model.embed(batch.ids.clone());
    if !finite(&x) {
        return "the embedding".into();
    }
    for (layer, block) in model.blocks.iter().enumerate() {
        let dropout = dropout.map(|dropout| dropout.derive(layer as u64));
        let between = block.run_attention(x.clone(), &context, dropout);
        x = block.run(x, &context, dropout);
        for (part, value) in [("attention", &between), ("the MLP", &x)] {
            if !finite(value) {
                return format!("{part} of block {layer}");
            }
        }
    }
    "the head".into()
}
