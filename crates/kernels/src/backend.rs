//! The extension trait: every operation of this crate as a method of the backend.
//!
//! A default body is the reference. The CPU backend replaces only what is memory traffic rather than arithmetic
//! (unpacking four-bit codes); backends with kernels of their own replace more.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_flex::Flex;

use crate::nf4::Nf4Tensor;
use crate::{
    AdamW, AdamWState, AttentionIndex, CrossEntropyGradient, LoraTerm, RotaryAngles, adamw, attention,
    cross_entropy, nf4, qlora_linear, rms_norm, rotary, swiglu,
};

/// Burn's `Backend` and the operations of QLoRA training.
///
/// Methods named `*_backward` are the vector-Jacobian products of the method they are named after. They are what
/// `Autodiff` calls, and are not differentiable themselves.
pub trait KernelBackend: Backend {
    /// Dense weight `[out, in]` of a packed one; see [`nf4`].
    fn nf4_dequantize(weight: &Nf4Tensor<Self>, dtype: DType) -> Tensor<Self, 2> {
        nf4::reference(weight, dtype)
    }

    /// `y = x Wᵀ + s · drop(x) Aᵀ Bᵀ`; see [`qlora_linear`]. `x` `[n, in]`, the result `[n, out]`.
    fn qlora_linear(
        x: Tensor<Self, 2>,
        weight: &Nf4Tensor<Self>,
        lora: Option<LoraTerm<Self>>,
    ) -> Tensor<Self, 2> {
        qlora_linear::forward(x, weight, lora)
    }

    /// Gradients of [`Self::qlora_linear`] for `x` and, where there is a LoRA term, for its factors.
    fn qlora_linear_backward(
        x: Tensor<Self, 2>,
        weight: &Nf4Tensor<Self>,
        lora: Option<LoraTerm<Self>>,
        grad: Tensor<Self, 2>,
    ) -> qlora_linear::Gradients<Self> {
        qlora_linear::backward(x, weight, lora, grad)
    }

    /// Root-mean-square normalisation of rows `[n, d]`; see [`rms_norm`].
    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        rms_norm::reference(x, weight, epsilon)
    }

    /// Gradients of [`Self::rms_norm`] for `x` and, if `with_weight`, for the weight.
    fn rms_norm_backward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        grad: Tensor<Self, 2>,
        with_weight: bool,
    ) -> (Tensor<Self, 2>, Option<Tensor<Self, 1>>) {
        rms_norm::backward(x, weight, epsilon, grad, with_weight)
    }

    /// Rotary position embedding of `[b, h, t, k]`; see [`rotary`]. Its gradient is the rotation back.
    fn rotary(x: Tensor<Self, 4>, angles: &RotaryAngles<Self>) -> Tensor<Self, 4> {
        rotary::reference(x, angles)
    }

    /// Causal attention inside documents; see [`attention`]. Queries `[b, h, t, k]`, keys and values
    /// `[b, g, s, k]` with g dividing h.
    fn attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        index: &AttentionIndex<Self>,
    ) -> Tensor<Self, 4> {
        attention::reference(q, k, v, index)
    }

    /// Gradients of [`Self::attention`] for queries, keys and values.
    fn attention_backward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        index: &AttentionIndex<Self>,
        grad: Tensor<Self, 4>,
    ) -> [Tensor<Self, 4>; 3] {
        attention::backward(q, k, v, index, grad)
    }

    /// `silu(gate) · up`, element by element on `[n, f]`; see [`swiglu`].
    fn swiglu(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        swiglu::reference(gate, up)
    }

    /// Gradients of [`Self::swiglu`] for gate and up.
    fn swiglu_backward(
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
        grad: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        swiglu::backward(gate, up, grad)
    }

    /// Cross-entropy of every row `[n]` against its target; see [`cross_entropy`].
    fn cross_entropy(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
    ) -> Tensor<Self, 1> {
        cross_entropy::losses(hidden, head, targets)
    }

    /// Sum of the losses and its gradients in one pass over the vocabulary.
    fn cross_entropy_with_gradient(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
        with_head: bool,
    ) -> CrossEntropyGradient<Self> {
        cross_entropy::with_gradient(hidden, head, targets, with_head)
    }

    /// One AdamW step of one parameter; see [`adamw`].
    fn adamw_step<const D: usize>(
        parameter: Tensor<Self, D>,
        gradient: Tensor<Self, D>,
        state: AdamWState<Self, D>,
        settings: &AdamW,
    ) -> (Tensor<Self, D>, AdamWState<Self, D>) {
        adamw::reference(parameter, gradient, state, settings)
    }
}

impl KernelBackend for Flex {
    /// On the host the codes are unpacked by a table, without index tensors.
    fn nf4_dequantize(weight: &Nf4Tensor<Self>, dtype: DType) -> Tensor<Self, 2> {
        let dims = weight.dims();
        let mut values = vec![0.0_f32; dims[0] * dims[1]];
        nf4::unpack_on_host(weight, &mut values);
        let device = weight.device();
        Tensor::<Self, 2>::from_data(TensorData::new(values, dims), &device).cast(dtype)
    }
}
