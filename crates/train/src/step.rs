//! Forward without autodiff, backward block by block.
//!
//! ```text
//! forward   x₀ = embed(ids)    xᵢ₊₁ = blockᵢ(xᵢ)     keep every xᵢ, nothing else
//! head      loss and dL/dx of the last one
//! backward  for i from the last to 0: y = blockᵢ(xᵢ) under autodiff, then (y · g).sum().backward(), g ← dL/dxᵢ
//! ```
//!
//! Memory at the peak is one tensor `[b, t, d]` a block, one block's activations, and one chunk of logits. A block's
//! dropout masks come from a key, so the second run draws the same ones.

use burn::backend::Autodiff;
use burn::module::AutodiffModule;
use burn::tensor::{DType, Tensor};
use buzzer_kernels::{Dropout, KernelBackend};
use buzzer_model::{Block, BlockContext, Llama, Target};

use crate::gradients::scalar;
use crate::{DeviceBatch, LoraGradients};

/// Loss and gradients of one batch.
#[derive(Debug)]
pub struct BlockPass<B: KernelBackend> {
    /// Sum of the losses over the batch's targets, not scaled.
    pub loss_sum: f64,
    /// Gradients of `loss_sum * scale`.
    pub gradients: LoraGradients<B>,
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
    let (loss_sum, mut upstream) = backward_of_head(model, batch, x, scale);
    let context = context.map(Tensor::from_inner, Tensor::from_inner);
    let mut gradients = LoraGradients { factors: Default::default() };
    for (layer, input) in inputs.into_iter().enumerate().rev() {
        let pass =
            Recomputation { layer, block: &model.blocks[layer], context: &context, dropout: of_block(layer) };
        upstream = pass.backward(input, upstream, &mut gradients);
    }
    BlockPass { loss_sum, gradients }
}

/// The mean loss of a batch's targets and their number, without gradients.
#[must_use]
pub fn mean_loss<B: KernelBackend>(model: &Llama<B>, batch: &DeviceBatch<B>) -> (f64, usize) {
    let hidden = model.hidden(batch.ids.clone(), &context(model, batch), None);
    let rows = hidden.select(0, batch.loss_rows.clone());
    let losses = B::cross_entropy(rows, model.head_weight(), batch.targets.clone());
    (f64::from(scalar(losses.sum())) / batch.loss_tokens.max(1) as f64, batch.loss_tokens)
}

fn context<B: KernelBackend>(model: &Llama<B>, batch: &DeviceBatch<B>) -> BlockContext<B> {
    BlockContext::rows(model.config(), batch.documents.clone(), batch.positions.clone())
}

/// Loss, and the gradient at the last block's output.
fn backward_of_head<B: KernelBackend>(
    model: &Llama<B>,
    batch: &DeviceBatch<B>,
    x: Tensor<B, 3>,
    scale: f64,
) -> (f64, Tensor<B, 3>) {
    let [b, t, d] = x.dims();
    let epsilon = model.config().rms_norm_eps;
    let x = x.reshape([b * t, d]).select(0, batch.loss_rows.clone());
    let normed = B::rms_norm(x.clone(), model.norm.val(), epsilon);
    let loss = B::cross_entropy_with_gradient(normed, model.head_weight(), batch.targets.clone(), false);
    let upstream = loss.hidden.mul_scalar(scale);
    let (dx, _) = B::rms_norm_backward(x, model.norm.val(), epsilon, upstream, false);
    let everywhere = Tensor::zeros([b * t, d], (&dx.device(), dx.dtype()));
    let dx = everywhere.select_assign(0, batch.loss_rows.clone(), dx, burn::tensor::IndexingUpdateOp::Add);
    (f64::from(scalar(loss.loss_sum)), dx.reshape([b, t, d]))
}

/// One block, run again.
struct Recomputation<'a, B: KernelBackend> {
    layer: usize,
    block: &'a Block<B>,
    context: &'a BlockContext<Autodiff<B>>,
    dropout: Option<Dropout>,
}

impl<B: KernelBackend> Recomputation<'_, B> {
    /// Adds the block's gradients; returns the one at its input. The first block's input asks for none, and gets zeros.
    fn backward(
        &self,
        input: Tensor<B, 3>,
        upstream: Tensor<B, 3>,
        gradients: &mut LoraGradients<B>,
    ) -> Tensor<B, 3> {
        let mut block = Block::<Autodiff<B>>::from_inner(self.block.clone());
        for target in Target::ALL {
            // Without autodiff a parameter does not remember that it wants a gradient.
            if let Some(lora) = &mut block.linear_mut(target).lora {
                lora.a = lora.a.clone().set_require_grad(true);
                lora.b = lora.b.clone().set_require_grad(true);
            }
        }
        let input = Tensor::<Autodiff<B>, 3>::from_inner(input).set_require_grad(self.layer > 0);
        let y = block.forward(input.clone(), self.context, self.dropout, None);
        let mut grads = (y * Tensor::from_inner(upstream)).sum().backward();
        for target in Target::ALL {
            let Some(lora) = &block.linear(target).lora else { continue };
            let [a, b] = [&lora.a, &lora.b].map(|factor| factor.val().grad_remove(&mut grads));
            if let (Some(a), Some(b)) = (a, b) {
                gradients.factors.insert((self.layer, target), [a.cast(DType::F32), b.cast(DType::F32)]);
            }
        }
        let gradient = if self.layer > 0 { input.grad_remove(&mut grads) } else { None };
        gradient.unwrap_or_else(|| input.inner().zeros_like())
    }
}
