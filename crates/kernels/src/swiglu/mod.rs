//! The gate of Llama's MLP.
//!
//! ```text
//! y = silu(a) · c      silu(a) = a σ(a)          (a, c) [n, 2 f]   y [n, f]
//! ```
//!
//! with the gate a in the first f columns and c in the others, as the joined product of both leaves them.
//! Shazeer, "GLU Variants Improve Transformer", <https://arxiv.org/abs/2002.05202>. With upstream gradient g:
//! `dc = g silu(a)` and `da = g c σ(a) (1 + a (1 - σ(a)))`. Bytes moved: a and c read, y written.

#[cfg(feature = "cubecl")]
pub mod kernel;

use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::backend::Backend;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use crate::KernelBackend;
use crate::autodiff::{inner, tracked};

/// The composition of plain operations.
#[must_use]
pub fn reference<B: Backend>(gate_up: Tensor<B, 2>) -> Tensor<B, 2> {
    let [gate, up] = halves(gate_up);
    silu(gate) * up
}

fn halves<B: Backend>(gate_up: Tensor<B, 2>) -> [Tensor<B, 2>; 2] {
    let f = gate_up.dims()[1] / 2;
    [gate_up.clone().narrow(1, 0, f), gate_up.narrow(1, f, f)]
}

/// The gradient `[n, 2 f]`, from plain operations.
#[must_use]
pub fn backward<B: Backend>(gate_up: Tensor<B, 2>, grad: Tensor<B, 2>) -> Tensor<B, 2> {
    let [gate, up] = halves(gate_up);
    let sigma = sigmoid(gate.clone());
    let activated = gate.clone() * sigma.clone();
    let slope = sigma.clone() + activated.clone() * sigma.neg().add_scalar(1.0);
    Tensor::cat(vec![grad.clone() * up * slope, grad * activated], 1)
}

#[derive(Debug)]
struct Step;

impl<B: KernelBackend> Backward<B, 1> for Step {
    type State = Tensor<B, 2>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        if let [Some(parent)] = ops.parents {
            let dx = B::swiglu_backward(ops.state, inner(grad).into());
            grads.register::<B>(parent.id, dx.into_primitive().tensor());
        }
    }
}

pub(crate) fn tracked_forward<B: KernelBackend, C: CheckpointStrategy>(
    gate_up: Tensor<Autodiff<B, C>, 2>,
) -> Tensor<Autodiff<B, C>, 2> {
    let node = gate_up.clone().into_primitive().tensor().node;
    let gate_up = gate_up.inner();
    let y = B::swiglu(gate_up.clone()).into_primitive().tensor();
    tracked(match Step.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(gate_up, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Ad, close, noisy};

    #[test]
    fn gradients_equal_those_of_the_composition() {
        let gate_up = noisy::<Ad, 2>([5, 18], 1).mul_scalar(4).require_grad();
        let g = noisy::<Ad, 2>([5, 9], 3);
        let ours = (tracked_forward(gate_up.clone()) * g.clone()).sum().backward();
        let plain = (reference(gate_up.clone()) * g).sum().backward();
        close(gate_up.grad(&ours).unwrap(), gate_up.grad(&plain).unwrap(), 1e-5);
    }
}
