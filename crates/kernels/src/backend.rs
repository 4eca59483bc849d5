//! The extension trait: every operation of this crate as a method of the backend.
//!
//! A default body is the reference. The CPU backend replaces only what is memory traffic rather than arithmetic
//! (unpacking four-bit codes, keys and values in pages); backends with kernels of their own replace more.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_flex::Flex;
use rayon::prelude::*;

use crate::nf4::{DoubleScales, Nf4Tensor};
use crate::{
    AdamW, AdamWState, AdamWState8, Allocated, Attended, AttentionIndex, AttentionRanges, Card, ChosenToken,
    CrossEntropyGradient, Dropout, FrozenWeight, Heads, InputGradient, LinearPart, PagedIndex, Pages,
    Projection, RotaryAngles, RowGroup, SpaciousRows, Spent, StepError, StepProgram, StepRunner, TokenChoice,
    adamw, attention, choice, cross_entropy, grouped_linear, nf4, paged_attention, qlora_linear, rms_norm,
    rotary, swiglu, upload,
};

/// A tensor's elements in f32 on the host, row by row.
#[must_use]
pub fn host_floats<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    let data = tensor.into_data();
    data.to_vec().unwrap_or_else(|_| data.iter().collect())
}

/// Burn's `Backend` and the operations of QLoRA training.
///
/// Methods named `*_backward` are the vector-Jacobian products of the method they are named after. They are what
/// `Autodiff` calls, and are not differentiable themselves.
pub trait KernelBackend: Backend {
    /// Whether [`Self::nf4_quantize`] runs on the device, so that a weight should go there as it is stored.
    const PACKS_ON_DEVICE: bool = false;

    /// The card behind a device; `None` for the processor.
    fn card(device: &Self::Device) -> Option<Card> {
        let _ = device;
        None
    }

    /// What the device's allocator holds; `None` where the process's memory is used.
    fn allocated(device: &Self::Device) -> Option<Allocated> {
        let _ = device;
        None
    }

    /// Runs a job of many operations. Where a thread of its own submits them to the device, the job runs there: an operation then costs
    /// no message to that thread, and asking for an address, as products in a library do, no wait for it.
    fn on_device_thread<T: Send>(device: &Self::Device, job: impl FnOnce() -> T + Send) -> T {
        let _ = device;
        job()
    }

    /// Floats `[1, n]` of a dtype on the device. `fill` is given memory for their bytes, which hold anything, and writes all of them,
    /// little-endian; it may be called again if the device refuses the first way. The device may still be copying when this returns,
    /// so that the next ones can be written meanwhile.
    fn upload(
        device: &Self::Device,
        dtype: DType,
        count: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Tensor<Self, 2> {
        upload::plain(device, dtype, count, fill)
    }

    /// Dense weight `[out, in]` of a packed one; see [`nf4`].
    fn nf4_dequantize(weight: &Nf4Tensor<Self>, dtype: DType) -> Tensor<Self, 2> {
        nf4::reference(weight, dtype)
    }

    /// A dense weight `[out, in]` packed, by the rule of [`nf4::quantize`]; the default goes through the host.
    fn nf4_quantize(dense: Tensor<Self, 2>, double: bool) -> Nf4Tensor<Self> {
        let (dims, device) = (dense.dims(), dense.device());
        Nf4Tensor::quantize(&host_floats(dense), dims, double, &device)
    }

    /// Scales `[m]` in 8 bits, by the rule of [`nf4::double_quantize`]; the default goes through the host.
    fn nf4_quantize_scales(absmax: Tensor<Self, 1>) -> DoubleScales<Self> {
        let device = absmax.device();
        DoubleScales::of_host(&nf4::double_quantize(&host_floats(absmax)), &device)
    }

    /// `drop(x)` of rows `[n, d]`; see [`Dropout`].
    fn dropout(x: Tensor<Self, 2>, dropout: Dropout) -> Tensor<Self, 2> {
        dropout.apply(x)
    }

    /// `base + drop(x)` of rows `[n, d]`; `base + x` without dropout.
    fn add_dropped(base: Tensor<Self, 2>, x: Tensor<Self, 2>, dropout: Option<Dropout>) -> Tensor<Self, 2> {
        base + qlora_linear::dropped(x, dropout)
    }

    /// `y = x Wᵀ + s · drop(x) Aᵀ Bᵀ` of all layers that share x `[n, in]`, to `[n, Σ out]`; see [`qlora_linear`]. The
    /// differentiable form.
    fn qlora_linear(
        x: Tensor<Self, 2>,
        parts: &[LinearPart<Self>],
        dropout: Option<Dropout>,
    ) -> Tensor<Self, 2> {
        let dropped = qlora_linear::dropped(x.clone(), dropout);
        Self::qlora_project(qlora_linear::Input { x: x.into(), dropped, residual: None }, parts).y
    }

    /// The same for a caller that has drop(x), wants u for the backward pass, or adds the result to something.
    fn qlora_project(input: qlora_linear::Input<Self>, parts: &[LinearPart<Self>]) -> Projection<Self> {
        qlora_linear::reference(input, parts)
    }

    /// Gradients of [`Self::qlora_linear`] for x and for the factors, given drop(x) and perhaps memory for the latter.
    fn qlora_linear_backward(
        dropped: Tensor<Self, 2>,
        parts: &[LinearPart<Self>],
        dropout: Option<Dropout>,
        upstream: qlora_linear::Upstream<Self>,
        spent: &mut Spent<Self>,
    ) -> qlora_linear::Gradients<Self> {
        let _ = spent;
        qlora_linear::backward(dropped, parts, dropout, upstream)
    }

    /// Root-mean-square normalisation of rows `[n, d]`; see [`rms_norm`].
    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        rms_norm::reference(x, weight, epsilon)
    }

    /// [`Self::rms_norm`] for layers that ask for so many spare columns, and what dropout leaves of it.
    fn rms_norm_dropout(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        dropout: Option<Dropout>,
        spare: usize,
    ) -> (SpaciousRows<Self>, Tensor<Self, 2>) {
        let _ = spare;
        let y = Self::rms_norm(x, weight, epsilon);
        (y.clone().into(), qlora_linear::dropped(y, dropout))
    }

    /// Gradient of [`Self::rms_norm`] for `x`, plus the one that flows past the norm.
    fn rms_norm_backward_residual(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        grad: InputGradient<Self>,
        residual: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        residual + rms_norm::backward(x, weight, epsilon, grad.sum(), false).0
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

    /// Rotary position embedding of the first `heads` heads of every row `[n, width]`; see [`rotary`].
    fn rotary(rows: Tensor<Self, 2>, angles: &RotaryAngles<Self>, heads: usize) -> Tensor<Self, 2> {
        rotary::reference(rows, angles, heads)
    }

    /// Gradient of [`Self::rotary`]: the rotation back.
    fn rotary_backward(grad: Tensor<Self, 2>, angles: &RotaryAngles<Self>, heads: usize) -> Tensor<Self, 2> {
        rotary::reference(grad, &angles.reversed(), heads)
    }

    /// What attention's kernels derive from an index, for [`AttentionIndex::prepared`]; `None` where that is nothing.
    fn attention_ranges(index: &AttentionIndex<Self>) -> Option<AttentionRanges<Self>> {
        let _ = index;
        None
    }

    /// Causal attention inside documents; see [`attention`]. Queries `[b, h, t, k]`, keys and values
    /// `[b, g, s, k]` with g dividing h.
    fn attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        index: &AttentionIndex<Self>,
    ) -> Attended<Self> {
        Attended { o: attention::reference(q, k, v, index), log_sum: None }
    }

    /// Gradient of [`Self::attention`] for queries, keys and values of the same tokens, joined
    /// `[b, t, h + 2 g, k]`. `attended` is what the forward pass gave.
    fn attention_backward(
        qkv: [Tensor<Self, 4>; 3],
        attended: Attended<Self>,
        index: &AttentionIndex<Self>,
        grad: Tensor<Self, 4>,
    ) -> Tensor<Self, 4> {
        let _ = attended;
        attention::backward(qkv, index, grad)
    }

    /// [`Self::attention`] of joined rows `[b t, (h + 2 g) k]`, to rows `[b t, h k]`; the differentiable form.
    fn attention_of_rows(
        rows: Tensor<Self, 2>,
        heads: Heads,
        index: &AttentionIndex<Self>,
    ) -> Tensor<Self, 2> {
        attention::of_rows(rows, heads, index).0
    }

    /// [`Self::qlora_linear`] without dropout of rows that belong to several adapters, added to `residual` `[n, Σ out]` if there is
    /// one; see [`grouped_linear`].
    fn grouped_linear(
        x: Tensor<Self, 2>,
        weights: &[FrozenWeight<Self>],
        groups: &[RowGroup<Self>],
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        grouped_linear::reference(x, weights, groups, residual)
    }

    /// Turns joined rows `[n, (h + 2 g) k]` by their positions and puts keys and values into their pages; gives the queries
    /// `[n, h k]`. See [`paged_attention`].
    fn paged_store(
        rows: Tensor<Self, 2>,
        angles: &RotaryAngles<Self>,
        heads: Heads,
        pages: &mut Pages<Self>,
        index: &PagedIndex<Self>,
    ) -> Tensor<Self, 2> {
        paged_attention::store(rows, angles, heads, pages, index)
    }

    /// Attention of queries `[n, h k]` over the pages of their sequences, to `[n, h k]`; see [`paged_attention`].
    fn paged_attention(
        q: Tensor<Self, 2>,
        heads: Heads,
        pages: &Pages<Self>,
        index: &PagedIndex<Self>,
    ) -> Tensor<Self, 2> {
        paged_attention::reference(q, heads, pages, index)
    }

    /// The next token of each row of logits `[n, v]`, a choice each; see [`choice`]. `None` where a logit is no number.
    fn choose_tokens(logits: Tensor<Self, 2>, choices: &[TokenChoice]) -> Vec<Option<ChosenToken>> {
        let [_, vocabulary] = logits.dims();
        let logits = host_floats(logits);
        // By all cores: a choice walks over the whole vocabulary several times.
        let rows = logits.par_chunks(vocabulary).zip(choices);
        rows.map(|(logits, how)| choice::choose(logits, how)).collect()
    }

    /// A pass of one token a sequence, ready to run as a whole on these pages; see [`step`](crate::step).
    ///
    /// # Errors
    /// If this backend has no kernels for such a pass, or not for these shapes and dtypes; or if the device refuses.
    fn step_runner(
        program: &StepProgram<Self>,
        pages: &[Pages<Self>],
    ) -> Result<Box<dyn StepRunner<Self>>, StepError> {
        let _ = (program, pages);
        Err(StepError::Unsupported("this device runs operations one by one".into()))
    }

    /// Bytes of the device that [`Self::step_runner`] takes besides what the program names; 0 where there is no runner.
    fn step_bytes(program: &StepProgram<Self>) -> usize {
        let _ = program;
        0
    }

    /// `silu(gate) · up` of joined rows `[n, 2 f]`, to `[n, f]`; see [`swiglu`].
    fn swiglu(gate_up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        swiglu::reference(gate_up)
    }

    /// [`Self::swiglu`] for layers that ask for so many spare columns, and what dropout leaves of it.
    fn swiglu_dropout(
        gate_up: Tensor<Self, 2>,
        dropout: Option<Dropout>,
        spare: usize,
    ) -> (SpaciousRows<Self>, Tensor<Self, 2>) {
        let _ = spare;
        let y = Self::swiglu(gate_up);
        (y.clone().into(), qlora_linear::dropped(y, dropout))
    }

    /// What dropout leaves of [`Self::swiglu`], for who does not need the rest.
    fn swiglu_dropped(gate_up: Tensor<Self, 2>, dropout: Option<Dropout>) -> Tensor<Self, 2> {
        qlora_linear::dropped(Self::swiglu(gate_up), dropout)
    }

    /// Gradient of [`Self::swiglu`] `[n, 2 f]`.
    fn swiglu_backward(gate_up: Tensor<Self, 2>, grad: InputGradient<Self>) -> Tensor<Self, 2> {
        swiglu::backward(gate_up, grad.sum())
    }

    /// Cross-entropy of every row `[n]` against its target; see [`cross_entropy`].
    fn cross_entropy(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
    ) -> Tensor<Self, 1> {
        cross_entropy::losses(hidden, head, targets)
    }

    /// Sum of the losses, and the gradients of `scale` times it, in one pass over the vocabulary.
    fn cross_entropy_with_gradient(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
        scale: f64,
        with_head: bool,
    ) -> CrossEntropyGradient<Self> {
        cross_entropy::with_gradient(hidden, head, targets, scale, with_head)
    }

    /// The sum `[1]` of the squares of all elements of f32 tensors; `None` if there is no tensor.
    fn sum_of_squares(tensors: Vec<Tensor<Self, 2>>) -> Option<Tensor<Self, 1>> {
        tensors.into_iter().map(|tensor| tensor.square().sum()).reduce(|sum, next| sum + next)
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

    /// One AdamW step of one parameter whose moments are kept in 8 bits; see [`adamw::AdamWState8`].
    fn adamw_step8<const D: usize>(
        parameter: Tensor<Self, D>,
        gradient: Tensor<Self, D>,
        state: AdamWState8<Self>,
        settings: &AdamW,
    ) -> (Tensor<Self, D>, AdamWState8<Self>) {
        adamw::reference8(parameter, gradient, state, settings)
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

    /// On the host, keys and values are read and written where they lie.
    fn paged_store(
        rows: Tensor<Self, 2>,
        angles: &RotaryAngles<Self>,
        heads: Heads,
        pages: &mut Pages<Self>,
        index: &PagedIndex<Self>,
    ) -> Tensor<Self, 2> {
        paged_attention::store_on_host(rows, angles, heads, pages, index)
            .unwrap_or_else(|rows| paged_attention::store(rows, angles, heads, pages, index))
    }

    fn paged_attention(
        q: Tensor<Self, 2>,
        heads: Heads,
        pages: &Pages<Self>,
        index: &PagedIndex<Self>,
    ) -> Tensor<Self, 2> {
        paged_attention::attend_on_host(&q, heads, pages, index)
            .unwrap_or_else(|| paged_attention::reference(q, heads, pages, index))
    }
}
