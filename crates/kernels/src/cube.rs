//! The trait for CubeCL's runtimes: each operation is its kernels, on CUDA and on Vulkan.

use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::tensor::CubeTensor;

use crate::device::{Cube, int_primitive, primitive, tensor};
use crate::product::ProductRuntime;
use crate::{
    AdamW, AdamWState, AdamWState8, Allocated, Attended, AttentionIndex, Card, CrossEntropyGradient, Dropout,
    Heads, KernelBackend, LinearPart, Nf4Tensor, PagedIndex, Pages, Projection, RotaryAngles, adamw,
    attention, cross_entropy, dropout, nf4, paged_attention, qlora_linear, rms_norm, rotary, swiglu,
};

impl<R: ProductRuntime> KernelBackend for Cube<R> {
    fn card(device: &Self::Device) -> Option<Card> {
        Some(R::card(device))
    }

    fn allocated(device: &Self::Device) -> Option<Allocated> {
        let usage = R::client(device).memory_usage().ok()?;
        Some(Allocated { reserved: usage.bytes_reserved, in_use: usage.bytes_in_use })
    }

    fn nf4_dequantize(weight: &Nf4Tensor<Self>, dtype: DType) -> Tensor<Self, 2> {
        nf4::cube::dequantize(weight, dtype)
    }

    fn nf4_quantize(dense: Tensor<Self, 2>, double: bool) -> Nf4Tensor<Self> {
        nf4::kernel::quantize(primitive(dense), double)
    }

    fn dropout(x: Tensor<Self, 2>, dropout: Dropout) -> Tensor<Self, 2> {
        tensor(dropout::kernel::apply(primitive(x), dropout))
    }

    fn qlora_project(input: qlora_linear::Input<Self>, parts: &[LinearPart<Self>]) -> Projection<Self> {
        qlora_linear::cube::forward(input, parts)
    }

    fn qlora_linear_backward(
        dropped: Tensor<Self, 2>,
        parts: &[LinearPart<Self>],
        dropout: Option<Dropout>,
        upstream: qlora_linear::Upstream<Self>,
    ) -> qlora_linear::Gradients<Self> {
        qlora_linear::cube::backward(dropped, parts, dropout, upstream)
    }

    fn rms_norm_dropout(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        dropout: Option<Dropout>,
    ) -> [Tensor<Self, 2>; 2] {
        let Some(dropout) = dropout else {
            let y = Self::rms_norm(x, weight, epsilon);
            return [y.clone(), y];
        };
        let (y, dropped) =
            rms_norm::kernel::forward_dropout(primitive(x), primitive(weight), epsilon, dropout);
        [tensor(y), tensor(dropped)]
    }

    fn rms_norm_backward_residual(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        grad: Tensor<Self, 2>,
        residual: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        let residual = Some(primitive(residual));
        tensor(rms_norm::kernel::backward(
            primitive(x),
            primitive(weight),
            epsilon,
            primitive(grad),
            residual,
        ))
    }

    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        tensor(rms_norm::kernel::forward(primitive(x), primitive(weight), epsilon))
    }

    fn rms_norm_backward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        grad: Tensor<Self, 2>,
        with_weight: bool,
    ) -> (Tensor<Self, 2>, Option<Tensor<Self, 1>>) {
        if with_weight {
            return rms_norm::backward(x, weight, epsilon, grad, true);
        }
        let dx = rms_norm::kernel::backward(primitive(x), primitive(weight), epsilon, primitive(grad), None);
        (tensor(dx), None)
    }

    fn rotary(rows: Tensor<Self, 2>, angles: &RotaryAngles<Self>, heads: usize) -> Tensor<Self, 2> {
        turn(rows, angles, heads, false)
    }

    fn rotary_backward(grad: Tensor<Self, 2>, angles: &RotaryAngles<Self>, heads: usize) -> Tensor<Self, 2> {
        turn(grad, angles, heads, true)
    }

    fn attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        index: &AttentionIndex<Self>,
    ) -> Attended<Self> {
        let [q, k, v] = [q, k, v].map(primitive);
        let (o, log_sum) = attention::device::forward(q, k, v, tokens(index));
        Attended { o: tensor(o), log_sum: Some(tensor(log_sum)) }
    }

    fn attention_backward(
        qkv: [Tensor<Self, 4>; 3],
        attended: Attended<Self>,
        index: &AttentionIndex<Self>,
        grad: Tensor<Self, 4>,
    ) -> Tensor<Self, 4> {
        let Some(log_sum) = attended.log_sum else { return attention::backward(qkv, index, grad) };
        let ([q, k, v], o) = (qkv.map(primitive), primitive(attended.o));
        tensor(attention::device::backward(q, k, v, o, primitive(log_sum), primitive(grad), tokens(index)))
    }

    fn paged_store(
        rows: Tensor<Self, 2>,
        angles: &RotaryAngles<Self>,
        heads: Heads,
        pages: &mut Pages<Self>,
        index: &PagedIndex<Self>,
    ) -> Tensor<Self, 2> {
        paged_attention::cube::store(rows, angles, heads, pages, index)
    }

    fn paged_attention(
        q: Tensor<Self, 2>,
        heads: Heads,
        pages: &Pages<Self>,
        index: &PagedIndex<Self>,
    ) -> Tensor<Self, 2> {
        paged_attention::cube::attend(q, heads, pages, index)
    }

    fn swiglu(gate_up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        tensor(swiglu::kernel::forward(primitive(gate_up)))
    }

    fn swiglu_dropout(gate_up: Tensor<Self, 2>, dropout: Option<Dropout>) -> [Tensor<Self, 2>; 2] {
        let Some(dropout) = dropout else {
            let y = Self::swiglu(gate_up);
            return [y.clone(), y];
        };
        let (y, dropped) = swiglu::kernel::forward_dropout(primitive(gate_up), dropout);
        [tensor(y), tensor(dropped)]
    }

    fn swiglu_backward(gate_up: Tensor<Self, 2>, grad: Tensor<Self, 2>) -> Tensor<Self, 2> {
        tensor(swiglu::kernel::backward(primitive(gate_up), primitive(grad)))
    }

    fn cross_entropy_with_gradient(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
        scale: f64,
        with_head: bool,
    ) -> CrossEntropyGradient<Self> {
        if with_head {
            return cross_entropy::with_gradient(hidden, head, targets, scale, true);
        }
        cross_entropy::cube::with_gradient(hidden, head, targets, scale)
    }

    fn cross_entropy(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
    ) -> Tensor<Self, 1> {
        cross_entropy::cube::losses(hidden, head, targets)
    }

    fn sum_of_squares(tensors: Vec<Tensor<Self, 2>>) -> Option<Tensor<Self, 1>> {
        adamw::kernel::sum_of_squares(tensors.into_iter().map(primitive).collect()).map(tensor)
    }

    fn adamw_step<const D: usize>(
        parameter: Tensor<Self, D>,
        gradient: Tensor<Self, D>,
        state: AdamWState<Self, D>,
        settings: &AdamW,
    ) -> (Tensor<Self, D>, AdamWState<Self, D>) {
        let parameter = owned(parameter);
        let [first, second] = [state.first, state.second].map(owned);
        let [p, m, v] = [&parameter, &first, &second].map(CubeTensor::clone);
        adamw::kernel::step(p, primitive(gradient), m, v, settings, settings.gradient_scale as f32);
        (tensor(parameter), AdamWState { first: tensor(first), second: tensor(second) })
    }

    fn adamw_step8<const D: usize>(
        parameter: Tensor<Self, D>,
        gradient: Tensor<Self, D>,
        state: AdamWState8<Self>,
        settings: &AdamW,
    ) -> (Tensor<Self, D>, AdamWState8<Self>) {
        let parameter = owned(parameter);
        let scale = settings.gradient_scale as f32;
        adamw::kernel::step8(parameter.clone(), primitive(gradient), &state, settings, scale);
        (tensor(parameter), state)
    }
}

/// A tensor that may be written in place: itself, or a copy if others hold it too.
fn owned<R: ProductRuntime, const D: usize>(x: Tensor<Cube<R>, D>) -> CubeTensor<R> {
    let x = primitive(x);
    if x.can_mut() && x.is_contiguous() { x } else { burn_cubecl::kernel::into_contiguous(x.copy()) }
}

fn turn<R: ProductRuntime>(
    rows: Tensor<Cube<R>, 2>,
    angles: &RotaryAngles<Cube<R>>,
    heads: usize,
    inverse: bool,
) -> Tensor<Cube<R>, 2> {
    let [b, t, half] = angles.cos.dims();
    let flat = |angles: &Tensor<Cube<R>, 3>| primitive(angles.clone().reshape([b * t, half]));
    let (cos, sin) = (flat(&angles.cos), flat(&angles.sin));
    tensor(rotary::kernel::apply(primitive(rows), cos, sin, heads, 2 * half, inverse))
}

fn tokens<R: ProductRuntime>(index: &AttentionIndex<Cube<R>>) -> [CubeTensor<R>; 4] {
    let AttentionIndex { query_documents, query_positions, key_documents, key_positions } = index.clone();
    [query_documents, query_positions, key_documents, key_positions].map(int_primitive)
}
