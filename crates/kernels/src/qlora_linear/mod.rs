//! Linear layers whose weights are frozen and whose corrections are of low rank.
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
//! Layers that read the same x are one operation: their results stand side by side in one tensor `[n, Σ out]`, which
//! is what a device multiplies fastest, and they share one mask, since the mask belongs to x. The backward pass keeps
//! drop(x), u and the packed weights, unpacks the weights again, draws the mask again for dx, and never forms dW. The
//! factors stay in f32 whatever the dtype of x; they are converted where they are used, and their gradients back.
//!
//! With the factors beside the weights, each pass is one large product, and y and g are passed over once:
//!
//! ```text
//! y = [x, u] · [W, s B]ᵀ        [g W, h] = g · [W, s B]
//! ```
//!
//! For that x needs spare columns behind its rows ([`SpaciousRows`]), or is copied to where there are some.

#[cfg(feature = "cubecl")]
pub(crate) mod cube;

use burn::module::AutodiffModule;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients as Register;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use crate::autodiff::{inner, tracked};
use crate::{Dropout, KernelBackend, Nf4Tensor};

/// A weight `[out, in]` that gets no gradient.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "short-lived, and the larger one is the usual one")]
pub enum FrozenWeight<B: Backend> {
    /// As it is.
    Dense(Tensor<B, 2>),
    /// In four bits.
    Nf4(Nf4Tensor<B>),
}

/// The low-rank correction of one linear layer.
#[derive(Clone, Debug)]
pub struct LoraTerm<B: Backend> {
    /// `A [r, in]`, f32.
    pub a: Tensor<B, 2>,
    /// `B [out, r]`, f32.
    pub b: Tensor<B, 2>,
    /// s, usually alpha / r.
    pub scale: f64,
}

/// One of the layers that share an input.
#[derive(Clone, Debug)]
pub struct LinearPart<B: Backend> {
    /// W.
    pub weight: FrozenWeight<B>,
    /// The correction, if there is one.
    pub lora: Option<LoraTerm<B>>,
}

/// Rows `[n, d]`, behind each of which there may be columns that belong to nobody, for a layer to put there what it
/// multiplies beside them.
#[derive(Clone, Debug)]
pub struct SpaciousRows<B: Backend> {
    rows: Tensor<B, 2>,
    spare: usize,
}

impl<B: Backend> SpaciousRows<B> {
    /// Rows with so many spare columns behind them, which lie in the same memory and are read by nobody else.
    #[cfg(feature = "cubecl")]
    pub(crate) fn new(rows: Tensor<B, 2>, spare: usize) -> Self {
        Self { rows, spare }
    }

    /// The rows without what is behind them.
    #[must_use]
    pub fn rows(&self) -> Tensor<B, 2> {
        self.rows.clone()
    }

    /// Columns behind each row.
    #[must_use]
    pub fn spare(&self) -> usize {
        self.spare
    }
}

/// Rows without spare columns.
impl<B: Backend> From<Tensor<B, 2>> for SpaciousRows<B> {
    fn from(rows: Tensor<B, 2>) -> Self {
        Self { rows, spare: 0 }
    }
}

/// Memory of a tensor that nobody needs any more, in which a device places gradients of factors.
///
/// The gradients of a whole model are alive at once, and as the backward pass makes them it gives up the inputs of the
/// blocks that it is done with. Where an allocator reuses memory by exact size, neither would find its way to the other.
#[derive(Debug)]
pub struct Spent<B: Backend> {
    tensor: Option<Tensor<B, 2>>,
    /// Bytes of it that are taken.
    used: usize,
    /// Bytes that were asked for since the last offer.
    asked: usize,
    /// Whether tensors are refused of which much would stay idle.
    frugal: bool,
}

impl<B: Backend> Default for Spent<B> {
    /// No memory: gradients get their own.
    fn default() -> Self {
        Self { tensor: None, used: 0, asked: 0, frugal: false }
    }
}

impl<B: Backend> Spent<B> {
    /// No memory yet, and none to come of which more than a quarter would stay idle: for passes in which others have a use
    /// for it.
    #[must_use]
    pub fn frugal() -> Self {
        Self { frugal: true, ..Self::default() }
    }

    /// Takes a tensor in place of the one at hand, if what is left of that is less than was asked for since the last
    /// offer.
    pub fn offer(&mut self, tensor: Tensor<B, 2>) {
        let bytes = |tensor: &Tensor<B, 2>| tensor.dims().iter().product::<usize>() * tensor.dtype().size();
        let left = self.tensor.as_ref().map_or(0, |tensor| bytes(tensor).saturating_sub(self.used));
        let refused = self.frugal && !uses_most(bytes(&tensor), self.asked);
        if left < self.asked && !refused {
            self.tensor = Some(tensor);
            self.used = 0;
        }
        self.asked = 0;
    }
}

/// Whether gradients that take so many bytes at a time fill three quarters of a piece of memory or more.
#[must_use]
pub fn uses_most(bytes: usize, at_a_time: usize) -> bool {
    bytes / at_a_time.max(1) * at_a_time >= bytes / 4 * 3
}

/// What the layers read.
#[derive(Clone, Debug)]
pub struct Input<B: Backend> {
    /// x `[n, in]`; with `Σ r` spare columns it need not be copied.
    pub x: SpaciousRows<B>,
    /// drop(x) `[n, in]`; x itself without dropout.
    pub dropped: Tensor<B, 2>,
    /// What the result is added to `[n, Σ out]`, if anything.
    pub residual: Option<Tensor<B, 2>>,
}

/// What the layers give.
#[derive(Clone, Debug)]
pub struct Projection<B: Backend> {
    /// The results side by side `[n, Σ out]`, in the dtype of x.
    pub y: Tensor<B, 2>,
    /// `drop(x) Aᵀ` of the layers with a correction side by side `[n, Σ r]`, for the backward pass.
    pub u: Option<Tensor<B, 2>>,
}

/// The gradient for the layers' input in two parts, so that what reads it adds them where it has them at hand.
#[derive(Clone, Debug)]
pub struct InputGradient<B: Backend> {
    /// What came through the weights, `g W`.
    pub base: Tensor<B, 2>,
    /// What came through the factors, `h A`, and the mask that it has yet to pass; in the shape and dtype of the base.
    pub low_rank: Option<(Tensor<B, 2>, Option<Dropout>)>,
}

impl<B: KernelBackend> InputGradient<B> {
    /// Both parts as one tensor.
    #[must_use]
    pub fn sum(self) -> Tensor<B, 2> {
        match self.low_rank {
            Some((low_rank, dropout)) => B::add_dropped(self.base, low_rank, dropout),
            None => self.base,
        }
    }
}

/// A gradient in one part.
impl<B: Backend> From<Tensor<B, 2>> for InputGradient<B> {
    fn from(base: Tensor<B, 2>) -> Self {
        Self { base, low_rank: None }
    }
}

/// Gradients of the layers.
#[derive(Debug)]
pub struct Gradients<B: Backend> {
    /// For x `[n, in]`, if it was asked for.
    pub x: Option<InputGradient<B>>,
    /// For A and B of each layer with a correction, in order and in f32.
    pub factors: Vec<[Tensor<B, 2>; 2]>,
}

/// What the backward pass asks for.
#[derive(Clone, Debug)]
pub struct Upstream<B: Backend> {
    /// g `[n, Σ out]`.
    pub grad: Tensor<B, 2>,
    /// u, if the forward pass kept it; computed again otherwise.
    pub u: Option<Tensor<B, 2>>,
    /// Whether the gradient for x is wanted.
    pub with_x: bool,
}

impl<B: Backend> FrozenWeight<B> {
    /// `[out, in]`.
    #[must_use]
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Nf4(weight) => weight.dims(),
        }
    }
}

impl<B: KernelBackend> FrozenWeight<B> {
    fn dense(&self, dtype: DType) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => weight.clone().cast(dtype),
            Self::Nf4(weight) => B::nf4_dequantize(weight, dtype),
        }
    }
}

impl<B: Backend> LoraTerm<B> {
    /// `s · x Aᵀ Bᵀ` in the dtype of x, as plain operations; x is what dropout left of the input.
    #[must_use]
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let dtype = x.dtype();
        let u = x.matmul(self.a.clone().cast(dtype).transpose());
        u.matmul(self.b.clone().cast(dtype).transpose()).mul_scalar(self.scale)
    }

    /// Gradients for A and B, and for the input, given `drop(x)` and this layer's g.
    fn backward(&self, dropped: Tensor<B, 2>, grad: Tensor<B, 2>) -> ([Tensor<B, 2>; 2], Tensor<B, 2>) {
        let dtype = dropped.dtype();
        let (a, b) = (self.a.clone().cast(dtype), self.b.clone().cast(dtype));
        let u = dropped.clone().matmul(a.clone().transpose());
        let grad = grad.mul_scalar(self.scale);
        let db = grad.clone().transpose().matmul(u).cast(DType::F32);
        let h = grad.matmul(b);
        let da = h.clone().transpose().matmul(dropped).cast(DType::F32);
        ([da, db], h.matmul(a))
    }
}

/// `drop(x)`, or x.
pub(crate) fn dropped<B: KernelBackend>(x: Tensor<B, 2>, dropout: Option<Dropout>) -> Tensor<B, 2> {
    match dropout {
        Some(dropout) => B::dropout(x, dropout),
        None => x,
    }
}

/// The composition of plain operations.
#[must_use]
pub fn reference<B: KernelBackend>(input: Input<B>, parts: &[LinearPart<B>]) -> Projection<B> {
    let Input { x, dropped, residual } = input;
    let x = x.rows();
    let dtype = x.dtype();
    let result = |part: &LinearPart<B>| {
        let y = x.clone().matmul(part.weight.dense(dtype).transpose());
        match &part.lora {
            Some(lora) => y + lora.forward(dropped.clone()),
            None => y,
        }
    };
    let y = beside(parts.iter().map(result).collect());
    let y = match residual {
        Some(residual) => residual + y,
        None => y,
    };
    Projection { y, u: None }
}

/// The gradients from plain operations; `input` is what dropout left of x.
#[must_use]
pub fn backward<B: KernelBackend>(
    input: Tensor<B, 2>,
    parts: &[LinearPart<B>],
    dropout: Option<Dropout>,
    upstream: Upstream<B>,
) -> Gradients<B> {
    let dtype = input.dtype();
    let mut start = 0;
    let (mut dx, mut low_rank) = (None, None);
    let mut factors = Vec::new();
    for part in parts {
        let [out, _] = part.weight.dims();
        let grad = upstream.grad.clone().narrow(1, start, out);
        start += out;
        if let Some(lora) = &part.lora {
            let (pair, part_dx) = lora.backward(input.clone(), grad.clone());
            factors.push(pair);
            add_to(&mut low_rank, part_dx);
        }
        if upstream.with_x {
            add_to(&mut dx, grad.matmul(part.weight.dense(dtype)));
        }
    }
    let low_rank = low_rank.map(|low_rank| (low_rank, dropout));
    Gradients { x: dx.map(|base| InputGradient { base, low_rank }), factors }
}

fn add_to<B: Backend>(sum: &mut Option<Tensor<B, 2>>, term: Tensor<B, 2>) {
    *sum = Some(match sum.take() {
        Some(sum) => sum + term,
        None => term,
    });
}

fn beside<B: Backend>(mut columns: Vec<Tensor<B, 2>>) -> Tensor<B, 2> {
    if columns.len() == 1 { columns.remove(0) } else { Tensor::cat(columns, 1) }
}

/// What the backward pass keeps.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    dropped: Tensor<B, 2>,
    u: Option<Tensor<B, 2>>,
    parts: Vec<LinearPart<B>>,
    dropout: Option<Dropout>,
}

/// Parents: x, then A and B of each layer with a correction.
#[derive(Debug)]
struct Step<const PARENTS: usize>;

impl<B: KernelBackend, const PARENTS: usize> Backward<B, PARENTS> for Step<PARENTS> {
    type State = State<B>;

    fn backward(self, ops: Ops<State<B>, PARENTS>, grads: &mut Register, _: &mut Checkpointer) {
        let grad = inner(grads.consume::<B>(&ops.node));
        let State { dropped, u, parts, dropout } = ops.state;
        let with_x = ops.parents.first().is_some_and(Option::is_some);
        let upstream = Upstream { grad, u, with_x };
        let gradients = B::qlora_linear_backward(dropped, &parts, dropout, upstream, &mut Spent::default());
        let factors = gradients.factors.into_iter().flatten().map(Some);
        let x = gradients.x.map(InputGradient::sum);
        for (parent, gradient) in ops.parents.into_iter().zip([x].into_iter().chain(factors)) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient.into_primitive().tensor());
            }
        }
    }
}

fn plain<B: KernelBackend, C: CheckpointStrategy>(part: &LinearPart<Autodiff<B, C>>) -> LinearPart<B> {
    LinearPart {
        weight: match &part.weight {
            FrozenWeight::Dense(weight) => FrozenWeight::Dense(weight.clone().inner()),
            FrozenWeight::Nf4(weight) => FrozenWeight::Nf4(weight.valid()),
        },
        lora: part.lora.as_ref().map(|lora| LoraTerm {
            a: lora.a.clone().inner(),
            b: lora.b.clone().inner(),
            scale: lora.scale,
        }),
    }
}

/// The operation under autodiff. The weights get no gradient, dense ones neither.
///
/// # Panics
/// With more than three layers that have a correction.
pub(crate) fn tracked_forward<B: KernelBackend, C: CheckpointStrategy>(
    x: Tensor<Autodiff<B, C>, 2>,
    parts: &[LinearPart<Autodiff<B, C>>],
    dropout: Option<Dropout>,
) -> Tensor<Autodiff<B, C>, 2> {
    match parts.iter().filter(|part| part.lora.is_some()).count() {
        0 => tracked_with::<B, C, 1>(x, parts, dropout),
        1 => tracked_with::<B, C, 3>(x, parts, dropout),
        2 => tracked_with::<B, C, 5>(x, parts, dropout),
        3 => tracked_with::<B, C, 7>(x, parts, dropout),
        more => panic!("{more} corrected layers share an input; at most three do in Llama"),
    }
}

fn tracked_with<B: KernelBackend, C: CheckpointStrategy, const PARENTS: usize>(
    x: Tensor<Autodiff<B, C>, 2>,
    parts: &[LinearPart<Autodiff<B, C>>],
    dropout: Option<Dropout>,
) -> Tensor<Autodiff<B, C>, 2> {
    let node = |tensor: &Tensor<Autodiff<B, C>, 2>| tensor.clone().into_primitive().tensor().node;
    let factors = parts.iter().filter_map(|part| part.lora.as_ref()).flat_map(|lora| [&lora.a, &lora.b]);
    let nodes = {
        let mut leaves = [&x].into_iter().chain(factors);
        std::array::from_fn::<_, PARENTS, _>(|_| node(leaves.next().unwrap_or(&x)))
    };
    let parts = parts.iter().map(plain).collect::<Vec<_>>();
    let x = x.inner();
    let dropped = dropped(x.clone(), dropout);
    let input = Input { x: x.into(), dropped: dropped.clone(), residual: None };
    let Projection { y, u } = B::qlora_project(input, &parts);
    let y = y.into_primitive().tensor();
    tracked(match Step::<PARENTS>.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(State { dropped, u, parts, dropout }, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    })
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{Ad, close, noise, noisy};

    /// Layers with and without correction, packed and dense, on one input.
    fn check(dims: [usize; 2], outs: &[usize], rank: usize, dropout: Option<Dropout>) {
        let [n, inner] = dims;
        let device = Default::default();
        let mut leaves = vec![noisy::<Ad, 2>([n, inner], 2).require_grad()];
        let x = leaves[0].clone();
        let (mut parts, mut columns) = (Vec::new(), Vec::new());
        let input = dropout.map_or(x.clone(), |dropout| dropout.apply(x.clone()));
        for (place, &out) in outs.iter().enumerate() {
            let seed = 10 * place as u64;
            let packed =
                Nf4Tensor::<Flex>::quantize(&noise(out * inner, seed + 1), [out, inner], true, &device);
            let dense = Tensor::<Ad, 2>::from_inner(Flex::nf4_dequantize(&packed, DType::F32));
            let weight = if place == 1 {
                FrozenWeight::Dense(dense.clone())
            } else {
                FrozenWeight::Nf4(Nf4Tensor::<Ad>::from_inner(packed))
            };
            let y = x.clone().matmul(dense.transpose());
            let lora = (place != 2).then(|| LoraTerm {
                a: noisy::<Ad, 2>([rank, inner], seed + 3).require_grad(),
                b: noisy([out, rank], seed + 4).require_grad(),
                scale: 0.7,
            });
            if let Some(lora) = &lora {
                leaves.extend([lora.a.clone(), lora.b.clone()]);
            }
            columns.push(lora.as_ref().map_or(y.clone(), |lora| y + lora.forward(input.clone())));
            parts.push(LinearPart { weight, lora });
        }
        let ours = Ad::qlora_linear(x, &parts, dropout);
        let plain = beside(columns);
        close(ours.clone(), plain.clone(), 1e-5);
        let g = noisy::<Ad, 2>(plain.dims(), 5);
        let (ours, plain) = ((ours * g.clone()).sum().backward(), (plain * g).sum().backward());
        for leaf in &leaves {
            close(leaf.grad(&ours).unwrap(), leaf.grad(&plain).unwrap(), 1e-4);
        }
    }

    #[test]
    fn gradients_equal_those_of_the_composition() {
        check([5, 64], &[32], 4, None);
        check([3, 33], &[7, 9], 2, None);
        check([16, 96], &[48, 16, 8, 24], 8, Some(Dropout { probability: 0.3, key: 9 }));
    }

    #[test]
    fn without_factors_only_the_input_has_a_gradient() {
        let packed = Nf4Tensor::<Flex>::quantize(&noise(24 * 40, 1), [24, 40], false, &Default::default());
        let x = noisy::<Ad, 2>([6, 40], 2).require_grad();
        let weight = FrozenWeight::Nf4(Nf4Tensor::<Ad>::from_inner(packed.clone()));
        let grads = Ad::qlora_linear(x.clone(), &[LinearPart { weight, lora: None }], None).sum().backward();
        let ones = Tensor::<Flex, 2>::ones([6, 24], &Default::default());
        close(x.grad(&grads).unwrap(), ones.matmul(Flex::nf4_dequantize(&packed, DType::F32)), 1e-5);
    }
}
