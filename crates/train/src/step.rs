//! Forward without autodiff, backward block by block.
//!
//! ```text
//! forward   x₀ = embed(ids)    xᵢ₊₁ = blockᵢ(xᵢ)     keep every xᵢ, nothing else
//! head      loss and dL/dx of the last one
//! backward  for i from the last to 0: blockᵢ(xᵢ) under autodiff up to its last product, whose gradients need no
//!           second run; they seed the rest, and g ← dL/dxᵢ
//! ```
//!
//! Memory at the peak is one tensor `[b t, d]` a block, one block's activations, and one chunk of logits. A block's
//! dropout masks come from a key, so the second run draws the same ones.

use burn::backend::Autodiff;
use burn::module::AutodiffModule;
use burn::tensor::{DType, IndexingUpdateOp, Tensor};
use buzzer_kernels::{Dropout, KernelBackend, seeded};
use buzzer_model::{Block, BlockContext, Llama, Target, Trunk};

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

/// Gradients of `scale` times the sum of a batch's losses, for every LoRA factor.
///
/// With `scale = 1 / targets of the whole step` the gradients of several batches add up to those of one large batch.
#[must_use]
pub fn backward_by_blocks<B: KernelBackend>(
    model: &Llama<B>,
    batch: &DeviceBatch<B>,
    scale: f64,
    dropout: Option<Dropout>,
) -> BlockPass<B> {
    let context = context(model, batch);
    let of_block = |layer: usize| dropout.map(|dropout| dropout.derive(layer as u64));
    let mut inputs = Vec::with_capacity(model.blocks.len());
    let mut x = model.embed(batch.ids.clone());
    for (layer, block) in model.blocks.iter().enumerate() {
        inputs.push(x.clone());
        x = block.forward(x, &context, of_block(layer), None);
    }
    let (loss, upstream) = backward_of_head(model, batch, x, scale);
    let mut upstream = Some(upstream);
    let context = context.map(Tensor::from_inner, Tensor::from_inner);
    let mut gradients = LoraGradients::default();
    while let (Some(input), Some(grad)) = (inputs.pop(), upstream.take()) {
        let layer = inputs.len();
        let pass =
            Recomputation { layer, block: &model.blocks[layer], context: &context, dropout: of_block(layer) };
        upstream = pass.backward(input, grad, &mut gradients);
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
    let finite = |x: &Tensor<B, 2>| scalar(x.clone().cast(DType::F32).abs().max()).is_finite();
    let mut x = model.embed(batch.ids.clone());
    if !finite(&x) {
        return "the embedding".into();
    }
    for (layer, block) in model.blocks.iter().enumerate() {
        let dropout = dropout.map(|dropout| dropout.derive(layer as u64));
        let Trunk { residual, activated } = block.trunk(x.clone(), &context, dropout, None);
        x = block.forward(x, &context, dropout, None);
        for (part, value) in [("attention", residual), ("the MLP's gate", activated), ("the MLP", x.clone())] {
            if !finite(&value) {
                return format!("{part} of block {layer}");
            }
        }
    }
    "the head".into()
}

/// One block, run again.
struct Recomputation<'a, B: KernelBackend> {
    layer: usize,
    block: &'a Block<B>,
    context: &'a BlockContext<Autodiff<B>>,
    dropout: Option<Dropout>,
}

impl<B: KernelBackend> Recomputation<'_, B> {
    /// Adds the block's gradients; returns the one at its input. The first block's input asks for none, and gets none.
    fn backward(
        &self,
        input: Tensor<B, 2>,
        upstream: Tensor<B, 2>,
        gradients: &mut LoraGradients<B>,
    ) -> Option<Tensor<B, 2>> {
        let block = self.tracked_block();
        let input = Tensor::<Autodiff<B>, 2>::from_inner(input).set_require_grad(self.layer > 0);
        let Trunk { residual, activated } = block.trunk(input.clone(), self.context, self.dropout, None);
        let down = self.block.down_backward(activated.clone().inner(), self.dropout, upstream.clone());
        let d_activated = down.x.unwrap_or_else(|| activated.clone().inner().zeros_like());
        let mut grads = seeded([residual, activated], [upstream, d_activated]).backward();
        for pair in down.factors {
            gradients.factors.insert((self.layer, Target::Down), pair);
        }
        for target in Target::ALL {
            let Some(lora) = &block.linear(target).lora else { continue };
            let [a, b] = [&lora.a, &lora.b].map(|factor| factor.val().grad_remove(&mut grads));
            if let (Some(a), Some(b)) = (a, b) {
                gradients.factors.insert((self.layer, target), [a.cast(DType::F32), b.cast(DType::F32)]);
            }
        }
        input.grad_remove(&mut grads)
    }

    /// Without autodiff a parameter does not remember that it wants a gradient; only those of the factors do here.
    fn tracked_block(&self) -> Block<Autodiff<B>> {
        let mut block = Block::<Autodiff<B>>::from_inner(self.block.clone());
        for target in Target::ALL {
            if let Some(lora) = &mut block.linear_mut(target).lora {
                lora.a = lora.a.clone().set_require_grad(true);
                lora.b = lora.b.clone().set_require_grad(true);
            }
        }
        block
    }
}
