//! The trait for CubeCL's runtimes: each operation is its kernels, on CUDA and on Vulkan.

use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::tensor::CubeTensor;

use crate::attention::device::Index;
use crate::attention::ranges::Ranges;
use crate::device::{self, Cube, int_primitive, primitive, tensor};
use crate::nf4::DoubleScales;
use crate::product::ProductRuntime;
use crate::{
    AdamW, AdamWState, AdamWState8, Allocated, Attended, AttentionIndex, AttentionRanges, Card, ChosenToken,
    CrossEntropyGradient, Dropout, Heads, InputGradient, KernelBackend, LinearPart, Nf4Tensor, PagedIndex,
    Pages, Projection, RotaryAngles, SpaciousRows, Spent, StepError, StepProgram, StepRunner, TokenChoice,
    adamw, attention, choice, cross_entropy, dropout, nf4, paged_attention, qlora_linear, rms_norm, rotary,
    swiglu, upload,
};

impl<R: ProductRuntime> KernelBackend for Cube<R> {
    const PACKS_ON_DEVICE: bool = true;

    fn card(device: &Self::Device) -> Option<Card> {
        Some(R::card(device))
    }

    fn on_device_thread<T: Send>(device: &Self::Device, job: impl FnOnce() -> T + Send) -> T {
        device::on_device_thread::<R, _>(device, job)
    }

    fn upload(
        device: &Self::Device,
        dtype: DType,
        count: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Tensor<Self, 2> {
        R::own_upload(device, dtype, count, fill)
            .map_or_else(|| upload::plain(device, dtype, count, fill), tensor)
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

    fn nf4_quantize_scales(absmax: Tensor<Self, 1>) -> DoubleScales<Self> {
        nf4::scales::quantize(absmax)
    }

    fn dropout(x: Tensor<Self, 2>, dropout: Dropout) -> Tensor<Self, 2> {
        tensor(dropout::kernel::apply(primitive(x), dropout))
    }

    fn add_dropped(base: Tensor<Self, 2>, x: Tensor<Self, 2>, dropout: Option<Dropout>) -> Tensor<Self, 2> {
        tensor(dropout::kernel::add(primitive(base), primitive(x), dropout))
    }

    fn qlora_project(input: qlora_linear::Input<Self>, parts: &[LinearPart<Self>]) -> Projection<Self> {
        qlora_linear::cube::forward(input, parts)
    }

    fn qlora_linear_backward(
        dropped: Tensor<Self, 2>,
        parts: &[LinearPart<Self>],
        dropout: Option<Dropout>,
        upstream: qlora_linear::Upstream<Self>,
        spent: &mut Spent<Self>,
    ) -> qlora_linear::Gradients<Self> {
        qlora_linear::cube::backward(dropped, parts, dropout, upstream, spent)
    }

    fn rms_norm_dropout(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        dropout: Option<Dropout>,
        spare: usize,
    ) -> (SpaciousRows<Self>, Tensor<Self, 2>) {
        let (x, weight) = (primitive(x), primitive(weight));
        let (y, dropped) = rms_norm::kernel::forward_dropout(x, weight, epsilon, dropout, spare);
        (SpaciousRows::new(tensor(y), spare), tensor(dropped))
    }

    fn rms_norm_backward_residual(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        grad: InputGradient<Self>,
        residual: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        let (x, weight, residual) = (primitive(x), primitive(weight), Some(primitive(residual)));
        tensor(rms_norm::kernel::backward(x, weight, epsilon, grad.into(), residual))
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
        let (x, weight, grad) = (primitive(x), primitive(weight), InputGradient::from(grad));
        (tensor(rms_norm::kernel::backward(x, weight, epsilon, grad.into(), None)), None)
    }

    fn rotary(rows: Tensor<Self, 2>, angles: &RotaryAngles<Self>, heads: usize) -> Tensor<Self, 2> {
        turn(rows, angles, heads, false)
    }

    fn rotary_backward(grad: Tensor<Self, 2>, angles: &RotaryAngles<Self>, heads: usize) -> Tensor<Self, 2> {
        turn(grad, angles, heads, true)
    }

    fn attention_ranges(index: &AttentionIndex<Self>) -> Option<AttentionRanges<Self>> {
        let ranges = attention_index(index).prepared().into_ranges()?;
        let flat = |x: CubeTensor<R>| {
            let [b, tiles, parts] = [0, 1, 2].map(|i| x.meta.shape()[i]);
            Tensor::<Self, 3, Int>::from_primitive(x).reshape([b, tiles * parts])
        };
        let Ranges { edge, codes, rows, columns } = ranges;
        Some(AttentionRanges { edge, codes: flat(codes), rows: flat(rows), columns: flat(columns) })
    }

    fn attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        index: &AttentionIndex<Self>,
    ) -> Attended<Self> {
        let [q, k, v] = [q, k, v].map(primitive);
        let (o, log_sum) = attention::device::forward(q, k, v, attention_index(index));
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
        let (log_sum, grad) = (primitive(log_sum), primitive(grad));
        tensor(attention::device::backward(q, k, v, o, log_sum, grad, attention_index(index)))
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

    fn choose_tokens(logits: Tensor<Self, 2>, choices: &[TokenChoice]) -> Vec<Option<ChosenToken>> {
        choice::kernel::choose(logits, choices)
    }

    fn step_runner(
        program: &StepProgram<Self>,
        pages: &[Pages<Self>],
    ) -> Result<Box<dyn StepRunner<Self>>, StepError> {
        R::step_runner(program, pages)
    }

    fn step_bytes(program: &StepProgram<Self>) -> usize {
        R::step_bytes(program)
    }

    fn swiglu(gate_up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        tensor(swiglu::kernel::forward(primitive(gate_up)))
    }

    fn swiglu_dropout(
        gate_up: Tensor<Self, 2>,
        dropout: Option<Dropout>,
        spare: usize,
    ) -> (SpaciousRows<Self>, Tensor<Self, 2>) {
        let (y, dropped) = swiglu::kernel::forward_dropout(primitive(gate_up), dropout, spare);
        (SpaciousRows::new(tensor(y), spare), tensor(dropped))
    }

    fn swiglu_dropped(gate_up: Tensor<Self, 2>, dropout: Option<Dropout>) -> Tensor<Self, 2> {
        tensor(swiglu::kernel::forward_dropped(primitive(gate_up), dropout))
    }

    fn swiglu_backward(gate_up: Tensor<Self, 2>, grad: InputGradient<Self>) -> Tensor<Self, 2> {
        tensor(swiglu::kernel::backward(primitive(gate_up), grad.into()))
    }

    fn cross_entropy_with_gradient(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
        scale: f64,
        with_head: bool,
    ) -> CrossEntropyGradient<Self> {
        cross_entropy::cube::with_gradient(hidden, head, targets, scale, with_head)
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

fn attention_index<R: ProductRuntime>(index: &AttentionIndex<Cube<R>>) -> Index<R> {
    let AttentionIndex { query_documents, query_positions, key_documents, key_positions, ranges } =
        index.clone();
    let tokens = [query_documents, query_positions, key_documents, key_positions].map(int_primitive);
    let ranges = ranges.map(|AttentionRanges { edge, codes, rows, columns }| {
        let [b, pairs] = codes.dims();
        let [query_tiles, key_tiles] = [&rows, &columns].map(|x| x.dims()[1] / 2);
        debug_assert_eq!(pairs, query_tiles * key_tiles);
        Ranges {
            edge,
            codes: int_primitive(codes.reshape([b, query_tiles, key_tiles])),
            rows: int_primitive(rows.reshape([b, query_tiles, 2])),
            columns: int_primitive(columns.reshape([b, key_tiles, 2])),
        }
    });
    Index::new(tokens).with_ranges(ranges)
}
