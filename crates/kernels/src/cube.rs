//! The trait for CubeCL's runtimes: each operation is its kernels, on CUDA and on Vulkan.

use burn::tensor::Tensor;

use crate::device::Cube;
use crate::product::ProductRuntime;
use crate::{Allocated, Card, Dropout, KernelBackend, LinearPart, Projection, qlora_linear};

impl<R: ProductRuntime> KernelBackend for Cube<R> {
    fn card(device: &Self::Device) -> Option<Card> {
        Some(R::card(device))
    }

    fn allocated(device: &Self::Device) -> Option<Allocated> {
        let usage = R::client(device).memory_usage().ok()?;
        Some(Allocated { reserved: usage.bytes_reserved, in_use: usage.bytes_in_use })
    }

    fn qlora_linear(
        x: Tensor<Self, 2>,
        parts: &[LinearPart<Self>],
        dropout: Option<Dropout>,
    ) -> Projection<Self> {
        qlora_linear::cube::forward(x, parts, dropout)
    }

    fn qlora_linear_backward(
        x: Tensor<Self, 2>,
        parts: &[LinearPart<Self>],
        dropout: Option<Dropout>,
        upstream: qlora_linear::Upstream<Self>,
    ) -> qlora_linear::Gradients<Self> {
        qlora_linear::cube::backward(x, parts, dropout, upstream)
    }
}
