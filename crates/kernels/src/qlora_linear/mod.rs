//! A linear layer whose weight is frozen and whose correction is of low rank.
//!
//! ```text
//! y = x Wᵀ + s · drop(x) Aᵀ Bᵀ        x [n, in]   W [out, in]   A [r, in]   B [out, r]
//! ```
//!
//! Hu et al., "LoRA", <https://arxiv.org/abs/2106.09685>; Dettmers et al., "QLoRA", <https://arxiv.org/abs/2305.14314>.
//! With upstream gradient g `[n, out]` and u = drop(x) Aᵀ `[n, r]`:
//!
//! ```text
//! dB = s · gᵀ u      h = s · g B      dA = hᵀ drop(x)      dx = g W + drop'(h A)
//! ```
//!
//! The backward pass keeps x and the packed weight, unpacks W again, draws the mask again, and never forms dW. The
//! factors stay in f32 whatever the dtype of x; they are converted where they are used, and their gradients back.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients as Register;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use crate::autodiff::{inner, tracked};
use crate::{Dropout, KernelBackend, Nf4Tensor};

/// The low-rank correction of one linear layer.
#[derive(Clone, Debug)]
pub struct LoraTerm<B: Backend> {
    /// `A [r, in]`, f32.
    pub a: Tensor<B, 2>,
    /// `B [out, r]`, f32.
    pub b: Tensor<B, 2>,
    /// s, usually alpha / r.
    pub scale: f64,
    /// Dropout of x on the way into A; none when answering.
    pub dropout: Option<Dropout>,
}

/// Gradients of the layer.
#[derive(Debug)]
pub struct Gradients<B: Backend> {
    /// For x `[n, in]`.
    pub x: Tensor<B, 2>,
    /// For A and B, in f32.
    pub factors: Option<(Tensor<B, 2>, Tensor<B, 2>)>,
}

impl<B: Backend> LoraTerm<B> {
    /// `s · drop(x) Aᵀ Bᵀ` in the dtype of x, as plain operations.
    #[must_use]
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let dtype = x.dtype();
        let u = self.dropped(x).matmul(self.a.clone().cast(dtype).transpose());
        u.matmul(self.b.clone().cast(dtype).transpose()).mul_scalar(self.scale)
    }

    fn dropped(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        self.dropout.map_or(x.clone(), |dropout| dropout.apply(x))
    }
}

pub(crate) fn forward<B: KernelBackend>(
    x: Tensor<B, 2>,
    weight: &Nf4Tensor<B>,
    lora: Option<LoraTerm<B>>,
) -> Tensor<B, 2> {
    let dense = B::nf4_dequantize(weight, x.dtype());
    let y = x.clone().matmul(dense.transpose());
    match lora {
        Some(lora) => y + lora.forward(x),
        None => y,
    }
}

pub(crate) fn backward<B: KernelBackend>(
    x: Tensor<B, 2>,
    weight: &Nf4Tensor<B>,
    lora: Option<LoraTerm<B>>,
    grad: Tensor<B, 2>,
) -> Gradients<B> {
    let dtype = x.dtype();
    let dx = grad.clone().matmul(B::nf4_dequantize(weight, dtype));
    let Some(lora) = lora else {
        return Gradients { x: dx, factors: None };
    };
    let (a, b) = (lora.a.clone().cast(dtype), lora.b.clone().cast(dtype));
    let dropped = lora.dropped(x);
    let u = dropped.clone().matmul(a.clone().transpose());
    let grad = grad.mul_scalar(lora.scale);
    let db = grad.clone().transpose().matmul(u).cast(DType::F32);
    let h = grad.matmul(b);
    let da = h.clone().transpose().matmul(dropped).cast(DType::F32);
    Gradients { x: dx + lora.dropped(h.matmul(a)), factors: Some((da, db)) }
}

/// What the backward pass keeps.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    x: Tensor<B, 2>,
    weight: Nf4Tensor<B>,
    lora: Option<LoraTerm<B>>,
}

/// Parents: x, and A and B where there is a LoRA term.
#[derive(Debug)]
struct Step<const WITH_LORA: bool>;

impl<B: KernelBackend> Backward<B, 1> for Step<false> {
    type State = State<B>;

    fn backward(self, ops: Ops<State<B>, 1>, grads: &mut Register, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let State { x, weight, .. } = ops.state;
        if let [Some(parent)] = ops.parents {
            let gradients = B::qlora_linear_backward(x, &weight, None, inner(grad));
            grads.register::<B>(parent.id, gradients.x.into_primitive().tensor());
        }
    }
}

impl<B: KernelBackend> Backward<B, 3> for Step<true> {
    type State = State<B>;

    fn backward(self, ops: Ops<State<B>, 3>, grads: &mut Register, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let State { x, weight, lora } = ops.state;
        let gradients = B::qlora_linear_backward(x, &weight, lora, inner(grad));
        let (da, db) = gradients.factors.unzip();
        let all = [Some(gradients.x), da, db];
        for (parent, gradient) in ops.parents.into_iter().zip(all) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient.into_primitive().tensor());
            }
        }
    }
}

pub(crate) fn tracked_forward<B: KernelBackend, C: CheckpointStrategy>(
    x: Tensor<Autodiff<B, C>, 2>,
    weight: &Nf4Tensor<B>,
    lora: Option<LoraTerm<Autodiff<B, C>>>,
) -> Tensor<Autodiff<B, C>, 2> {
    let x_node = x.clone().into_primitive().tensor().node;
    let plain_lora = lora.as_ref().map(|lora| LoraTerm {
        a: lora.a.clone().inner(),
        b: lora.b.clone().inner(),
        scale: lora.scale,
        dropout: lora.dropout,
    });
    let x = x.inner();
    let y = B::qlora_linear(x.clone(), weight, plain_lora.clone()).into_primitive().tensor();
    let state = || State { x, weight: weight.clone(), lora: plain_lora };
    let Some(lora) = lora else {
        return tracked(match Step::<false>.prepare::<C>([x_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(state(), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        });
    };
    let [a, b] = [lora.a, lora.b].map(|factor| factor.into_primitive().tensor().node);
    tracked(match Step::<true>.prepare::<C>([x_node, a, b]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state(), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    })
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{Ad, close, noise, noisy};

    fn check(dims: [usize; 3], rank: usize, dropout: Option<Dropout>) {
        let [n, inner, out] = dims;
        let device = Default::default();
        let packed = Nf4Tensor::<Flex>::quantize(&noise(out * inner, 1), [out, inner], true, &device);
        let dense = Tensor::<Ad, 2>::from_inner(Flex::nf4_dequantize(&packed, DType::F32));
        let x = noisy::<Ad, 2>([n, inner], 2).require_grad();
        let (a, b) = (noisy::<Ad, 2>([rank, inner], 3).require_grad(), noisy([out, rank], 4).require_grad());
        let g = noisy::<Ad, 2>([n, out], 5);
        let term = LoraTerm { a: a.clone(), b: b.clone(), scale: 0.7, dropout };
        let ours = tracked_forward(x.clone(), &packed, Some(term.clone()));
        let plain = x.clone().matmul(dense.transpose()) + term.forward(x.clone());
        close(ours.clone(), plain.clone(), 1e-5);
        let (ours, plain) = ((ours * g.clone()).sum().backward(), (plain * g).sum().backward());
        for leaf in [&x, &a, &b] {
            close(leaf.grad(&ours).unwrap(), leaf.grad(&plain).unwrap(), 1e-4);
        }
    }

    #[test]
    fn gradients_equal_those_of_the_composition() {
        check([5, 64, 32], 4, None);
        check([3, 33, 7], 2, None);
        check([16, 96, 48], 8, Some(Dropout { probability: 0.3, key: 9 }));
    }

    #[test]
    fn without_factors_only_the_input_has_a_gradient() {
        let packed = Nf4Tensor::<Flex>::quantize(&noise(24 * 40, 1), [24, 40], false, &Default::default());
        let x = noisy::<Ad, 2>([6, 40], 2).require_grad();
        let grads = tracked_forward(x.clone(), &packed, None).sum().backward();
        let ones = Tensor::<Flex, 2>::ones([6, 24], &Default::default());
        close(x.grad(&grads).unwrap(), ones.matmul(Flex::nf4_dequantize(&packed, DType::F32)), 1e-5);
    }
}
