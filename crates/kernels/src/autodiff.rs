//! The trait for `Autodiff<B>`: forward on the inner backend, and one backward step an operation.

use burn::module::AutodiffModule;
use burn::tensor::backend::BackendTypes;
use burn::tensor::{DType, Tensor, TensorPrimitive};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;

use crate::{
    AttentionIndex, AttentionRanges, Dropout, Heads, KernelBackend, LinearPart, Nf4Tensor, RotaryAngles,
    attention, qlora_linear, rms_norm, rotary, swiglu,
};

type Float<B> = <B as BackendTypes>::FloatTensorPrimitive;

/// A tensor of the inner backend from its primitive.
pub(crate) fn inner<B: KernelBackend, const D: usize>(primitive: Float<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// A tensor of the differentiable backend from its primitive.
pub(crate) fn tracked<B: KernelBackend, C: CheckpointStrategy, const D: usize>(
    primitive: Float<Autodiff<B, C>>,
) -> Tensor<Autodiff<B, C>, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

impl<B: KernelBackend, C: CheckpointStrategy> KernelBackend for Autodiff<B, C> {
    fn nf4_dequantize(weight: &Nf4Tensor<Self>, dtype: DType) -> Tensor<Self, 2> {
        Tensor::from_inner(B::nf4_dequantize(&weight.valid(), dtype))
    }

    fn qlora_linear(
        x: Tensor<Self, 2>,
        parts: &[LinearPart<Self>],
        dropout: Option<Dropout>,
    ) -> Tensor<Self, 2> {
        qlora_linear::tracked_forward(x, parts, dropout)
    }

    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        rms_norm::tracked_forward(x, weight, epsilon)
    }

    fn rotary(rows: Tensor<Self, 2>, angles: &RotaryAngles<Self>, heads: usize) -> Tensor<Self, 2> {
        rotary::tracked_forward(rows, angles, heads)
    }

    fn attention_ranges(index: &AttentionIndex<Self>) -> Option<AttentionRanges<Self>> {
        B::attention_ranges(&index.map(Tensor::inner)).map(|ranges| ranges.map(Tensor::from_inner))
    }

    fn attention_of_rows(
        rows: Tensor<Self, 2>,
        heads: Heads,
        index: &AttentionIndex<Self>,
    ) -> Tensor<Self, 2> {
        attention::tracked_forward(rows, heads, index)
    }

    fn swiglu(gate_up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        swiglu::tracked_forward(gate_up)
    }
}
