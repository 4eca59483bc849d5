//! Softmax cross-entropy over the vocabulary, straight from the hidden states.
//!
//! ```text
//! z = x Hᵀ      loss[i] = log Σⱼ exp z[i, j] - z[i, target[i]]          x [n, d]   H [v, d]   target [n]
//! ```
//!
//! and, for the sum of the losses, `dz = softmax(z) - onehot(target)`, `dx = dz H`, `dH = dzᵀ x`. Rows are taken a chunk at
//! a time, so the logits `[n, v]` are never held whole, and loss and gradient come from one pass. Target [`IGNORED`]
//! gives loss and gradient 0. Logits are reduced in f32.

#[cfg(feature = "cubecl")]
pub(crate) mod cube;
#[cfg(feature = "cubecl")]
pub mod kernel;

use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};

/// The target of a row that bears no loss.
pub const IGNORED: i32 = -100;

/// Logits held at a time: 32 MiB in f32.
pub const CHUNK_VALUES: usize = 1 << 23;

/// Rows whose logits a device holds at a time: 128 MiB for 32,000 words, and enough rows for a fast product.
pub const CHUNK_ROWS: usize = 1024;

/// Sum of losses, and gradients of its multiple.
#[derive(Debug)]
pub struct CrossEntropyGradient<B: Backend> {
    /// `[1]`, f32.
    pub loss_sum: Tensor<B, 1>,
    /// For the hidden states `[n, d]`, in their dtype.
    pub hidden: Tensor<B, 2>,
    /// For the head `[v, d]` in f32, if it was asked for.
    pub head: Option<Tensor<B, 2>>,
}

/// The losses `[n]` from plain operations.
#[must_use]
pub fn losses<B: Backend>(
    hidden: Tensor<B, 2>,
    head: Tensor<B, 2>,
    targets: Tensor<B, 1, Int>,
) -> Tensor<B, 1> {
    let parts = chunks(hidden.dims()[0], head.dims()[0]).map(|rows| {
        let chunk = Chunk::new(&hidden, &head, &targets, rows);
        chunk.losses()
    });
    Tensor::cat(parts.collect(), 0)
}

/// Sum of the losses, and gradients of `scale` times it, from plain operations.
#[must_use]
pub fn with_gradient<B: Backend>(
    hidden: Tensor<B, 2>,
    head: Tensor<B, 2>,
    targets: Tensor<B, 1, Int>,
    scale: f64,
    with_head: bool,
) -> CrossEntropyGradient<B> {
    let device = hidden.device();
    let mut loss_sum = Tensor::zeros([1], (&device, DType::F32));
    let mut d_hidden = Vec::new();
    let mut d_head = with_head.then(|| Tensor::zeros(head.dims(), (&device, DType::F32)));
    for rows in chunks(hidden.dims()[0], head.dims()[0]) {
        let chunk = Chunk::new(&hidden, &head, &targets, rows.clone());
        loss_sum = loss_sum + chunk.losses().sum();
        let d_logits = chunk.d_logits().mul_scalar(scale).cast(hidden.dtype());
        d_hidden.push(d_logits.clone().matmul(head.clone().cast(hidden.dtype())));
        d_head = d_head.map(|sum| {
            let part = d_logits.transpose().matmul(hidden.clone().narrow(0, rows.start, rows.len()));
            sum + part.cast(DType::F32)
        });
    }
    let hidden = if d_hidden.is_empty() { hidden.zeros_like() } else { Tensor::cat(d_hidden, 0) };
    CrossEntropyGradient { loss_sum, hidden, head: d_head }
}

fn chunks(rows: usize, vocabulary: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (CHUNK_VALUES / vocabulary.max(1)).max(1);
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}

/// Logits of some rows, shifted so that the largest of each row is 0.
struct Chunk<B: Backend> {
    logits: Tensor<B, 2>,
    log_sum: Tensor<B, 2>,
    targets: Tensor<B, 2, Int>,
    bears_loss: Tensor<B, 2>,
}

impl<B: Backend> Chunk<B> {
    fn new(
        hidden: &Tensor<B, 2>,
        head: &Tensor<B, 2>,
        targets: &Tensor<B, 1, Int>,
        rows: Range<usize>,
    ) -> Self {
        let hidden = hidden.clone().narrow(0, rows.start, rows.len());
        let targets = targets.clone().narrow(0, rows.start, rows.len());
        let logits = hidden.clone().matmul(head.clone().cast(hidden.dtype()).transpose()).cast(DType::F32);
        Self::from_logits(logits, targets)
    }

    fn from_logits(logits: Tensor<B, 2>, targets: Tensor<B, 1, Int>) -> Self {
        let targets = targets.reshape([logits.dims()[0], 1]);
        let logits = logits.clone() - logits.max_dim(1);
        let ignored = targets.clone().lower_elem(0);
        Self {
            log_sum: logits.clone().exp().sum_dim(1).log(),
            bears_loss: ignored.clone().bool_not().float().cast(DType::F32),
            targets: targets.mask_fill(ignored, 0),
            logits,
        }
    }

    fn losses(&self) -> Tensor<B, 1> {
        let rows = self.logits.dims()[0];
        let chosen = self.logits.clone().gather(1, self.targets.clone());
        ((self.log_sum.clone() - chosen) * self.bears_loss.clone()).reshape([rows])
    }

    fn d_logits(self) -> Tensor<B, 2> {
        let probabilities = (self.logits - self.log_sum).exp() * self.bears_loss.clone();
        probabilities.scatter(1, self.targets, self.bears_loss.neg(), IndexingUpdateOp::Add)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::log_softmax;

    use super::*;
    use crate::KernelBackend;
    use crate::testing::{Ad, close, noisy};

    #[test]
    fn losses_and_gradients_equal_those_of_log_softmax() {
        let hidden = noisy::<Ad, 2>([7, 5], 1).require_grad();
        let head = noisy::<Ad, 2>([11, 5], 2).mul_scalar(3.0).require_grad();
        let targets =
            Tensor::<Ad, 1, Int>::from_data([3, IGNORED, 0, 10, 4, IGNORED, 4], &Default::default());
        let log_p = log_softmax(hidden.clone().matmul(head.clone().transpose()), 1);
        let bearing = Tensor::<Ad, 1, Int>::from_data([0, 2, 3, 4, 6], &Default::default());
        let chosen = Tensor::<Ad, 2, Int>::from_data([[3], [0], [10], [4], [4]], &Default::default());
        let plain = log_p.select(0, bearing).gather(1, chosen).neg().sum();
        let ours = losses(hidden.clone(), head.clone(), targets.clone());
        close(ours.sum(), plain.clone(), 1e-5);
        let grads = plain.clone().backward();
        let fused = burn_flex::Flex::cross_entropy_with_gradient(
            hidden.clone().inner(),
            head.clone().inner(),
            targets.inner(),
            0.5,
            true,
        );
        close(fused.loss_sum, plain, 1e-5);
        close(fused.hidden.mul_scalar(2), hidden.grad(&grads).unwrap(), 1e-5);
        close(fused.head.unwrap().mul_scalar(2), head.grad(&grads).unwrap(), 1e-5);
    }

    #[test]
    fn chunks_cover_every_row_once() {
        assert_eq!(chunks(5, CHUNK_VALUES / 2).collect::<Vec<_>>(), [0..2, 2..4, 4..5]);
        assert_eq!(chunks(3, CHUNK_VALUES * 2).count(), 3);
        assert_eq!(chunks(0, 8).count(), 0);
    }
}
