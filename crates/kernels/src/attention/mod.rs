//! Causal attention that stays inside documents.
//!
//! ```text
//! o = softmax(q kᵀ / √k + m) v     m[i, j] = 0 if document[i] = document[j] and position[i] ≥ position[j], else -∞
//! ```
//!
//! Queries `[b, h, t, k]`; keys and values `[b, g, s, k]`, where g divides h and each key head serves h / g query heads
//! (Ainslie et al., "GQA", <https://arxiv.org/abs/2305.13245>). The one rule covers packed rows, plain causal rows (one
//! document), padded rows (padding is a document of its own) and a key cache (a slot that holds nothing yet is in
//! document [`SEPARATE`], which no query is in). Softmax is taken in f32.
//!
//! With P the softmax, g the upstream gradient: `dv = Pᵀ g`, `dS = P ∘ (g vᵀ - rowsum(P ∘ g vᵀ))`, `dq = dS k / √k`,
//! `dk = dSᵀ q / √k`. The reference holds `[t, s]` scores; nothing of that size is kept for the backward pass.

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, DType, Int, Tensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use crate::KernelBackend;
use crate::autodiff::{inner, tracked};

#[cfg(feature = "cubecl")]
pub mod device;
#[cfg(feature = "cubecl")]
mod flash;
#[cfg(feature = "cubecl")]
mod gradients;
#[cfg(feature = "cuda")]
pub mod hopper;
#[cfg(feature = "cubecl")]
mod plain;
#[cfg(feature = "cubecl")]
pub(crate) mod ranges;
#[cfg(feature = "cubecl")]
mod tiles;

/// The document of a key that no query may see.
pub const SEPARATE: i32 = -2;

/// Which document and position each query and key has; what may look at what follows from it.
#[derive(Clone, Debug)]
pub struct AttentionIndex<B: Backend> {
    /// `[b, t]`.
    pub query_documents: Tensor<B, 2, Int>,
    /// `[b, t]`.
    pub query_positions: Tensor<B, 2, Int>,
    /// `[b, s]`.
    pub key_documents: Tensor<B, 2, Int>,
    /// `[b, s]`.
    pub key_positions: Tensor<B, 2, Int>,
    /// What [`Self::prepared`] adds.
    pub ranges: Option<AttentionRanges<B>>,
}

/// Which tiles of queries can see which tiles of keys: what a device's kernels derive from an index.
#[derive(Clone, Debug)]
pub struct AttentionRanges<B: Backend> {
    /// Queries, and keys, of a tile.
    pub edge: usize,
    /// A code for each pair of tiles `[b, query tiles · key tiles]`.
    pub codes: Tensor<B, 2, Int>,
    /// The half-open range of key tiles that each query tile meets `[b, query tiles · 2]`.
    pub rows: Tensor<B, 2, Int>,
    /// The half-open range of query tiles that each key tile meets `[b, key tiles · 2]`.
    pub columns: Tensor<B, 2, Int>,
}

impl<B: Backend> AttentionRanges<B> {
    /// The same numbers under another backend decorator.
    #[must_use]
    pub fn map<C: Backend>(
        &self,
        mut each: impl FnMut(Tensor<B, 2, Int>) -> Tensor<C, 2, Int>,
    ) -> AttentionRanges<C> {
        AttentionRanges {
            edge: self.edge,
            codes: each(self.codes.clone()),
            rows: each(self.rows.clone()),
            columns: each(self.columns.clone()),
        }
    }
}

impl<B: KernelBackend> AttentionIndex<B> {
    /// With what the device's kernels derive from it, so that they derive it once and not in every call. Whoever
    /// changes documents or positions has to prepare anew.
    #[must_use]
    pub fn prepared(self) -> Self {
        Self { ranges: B::attention_ranges(&self), ..self }
    }
}

impl<B: Backend> AttentionIndex<B> {
    /// Rows whose queries and keys are the same tokens: documents and positions `[b, t]`.
    #[must_use]
    pub fn rows(documents: Tensor<B, 2, Int>, positions: Tensor<B, 2, Int>) -> Self {
        Self {
            query_documents: documents.clone(),
            query_positions: positions.clone(),
            key_documents: documents,
            key_positions: positions,
            ranges: None,
        }
    }

    /// True where a query must not see a key `[b, 1, t, s]`.
    #[must_use]
    pub fn forbidden(&self) -> Tensor<B, 4, Bool> {
        let [b, t] = self.query_documents.dims();
        let [_, s] = self.key_documents.dims();
        let row = |x: &Tensor<B, 2, Int>| x.clone().reshape([b, 1, t, 1]).expand([b, 1, t, s]);
        let column = |x: &Tensor<B, 2, Int>| x.clone().reshape([b, 1, 1, s]).expand([b, 1, t, s]);
        let elsewhere = row(&self.query_documents).not_equal(column(&self.key_documents));
        let later = row(&self.query_positions).lower(column(&self.key_positions));
        elsewhere.bool_or(later)
    }

    /// The same numbers under another backend decorator.
    #[must_use]
    pub fn map<C: Backend>(
        &self,
        mut each: impl FnMut(Tensor<B, 2, Int>) -> Tensor<C, 2, Int>,
    ) -> AttentionIndex<C> {
        AttentionIndex {
            query_documents: each(self.query_documents.clone()),
            query_positions: each(self.query_positions.clone()),
            key_documents: each(self.key_documents.clone()),
            key_positions: each(self.key_positions.clone()),
            ranges: self.ranges.as_ref().map(|ranges| ranges.map(&mut each)),
        }
    }
}

/// What attention gives.
#[derive(Clone, Debug)]
pub struct Attended<B: Backend> {
    /// o `[b, h, t, k]`, in the dtype of the queries.
    pub o: Tensor<B, 4>,
    /// Logarithm of the sum of each query's exponentials `[b, h, t]`, f32, for the backward pass; where it is not kept,
    /// the backward pass computes the softmax anew.
    pub log_sum: Option<Tensor<B, 3>>,
}

/// How many heads of which width stand side by side in joined rows `[n, (h + 2 g) k]`: queries, keys, values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// h.
    pub queries: usize,
    /// g, which divides h.
    pub keys: usize,
    /// k.
    pub width: usize,
}

impl Heads {
    /// Queries `[b, h, t, k]`, keys and values `[b, g, t, k]` of joined rows `[b t, (h + 2 g) k]`.
    #[must_use]
    pub fn split<B: Backend>(self, rows: Tensor<B, 2>, [b, t]: [usize; 2]) -> [Tensor<B, 4>; 3] {
        let heads = rows.reshape([b, t, self.queries + 2 * self.keys, self.width]).swap_dims(1, 2);
        let part = |start, count| heads.clone().narrow(1, start, count);
        [part(0, self.queries), part(self.queries, self.keys), part(self.queries + self.keys, self.keys)]
    }
}

/// The softmax `[b, h, t, s]` in f32.
fn weights<B: Backend>(q: Tensor<B, 4>, k: Tensor<B, 4>, index: &AttentionIndex<B>) -> Tensor<B, 4> {
    let [b, h, t, width] = q.dims();
    let [_, groups, s, _] = k.dims();
    let q = q.reshape([b, groups, h / groups * t, width]);
    let scores = q.matmul(k.swap_dims(2, 3)).cast(DType::F32).reshape([b, h, t, s]);
    let scores = scores.mul_scalar(1.0 / (width as f64).sqrt());
    let forbidden = index.forbidden().expand([b, h, t, s]);
    softmax(scores.mask_fill(forbidden, f32::NEG_INFINITY), 3)
}

/// The composition of plain operations.
#[must_use]
pub fn reference<B: Backend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    index: &AttentionIndex<B>,
) -> Tensor<B, 4> {
    let [b, h, t, width] = q.dims();
    let [_, groups, s, _] = k.dims();
    let weights = weights(q, k, index).cast(v.dtype()).reshape([b, groups, h / groups * t, s]);
    weights.matmul(v).reshape([b, h, t, width])
}

/// The gradient for joined queries, keys and values `[b, t, h + 2 g, k]`, where queries and keys are the same tokens.
#[must_use]
pub fn backward<B: Backend>(
    [q, k, v]: [Tensor<B, 4>; 3],
    index: &AttentionIndex<B>,
    grad: Tensor<B, 4>,
) -> Tensor<B, 4> {
    let dtype = q.dtype();
    let [b, h, t, width] = q.dims();
    let [_, groups, s, _] = k.dims();
    let rows = h / groups * t;
    let p = weights(q.clone(), k.clone(), index).reshape([b, groups, rows, s]);
    let grad = grad.reshape([b, groups, rows, width]);
    let dv = p.clone().cast(dtype).swap_dims(2, 3).matmul(grad.clone());
    let dp = grad.matmul(v.swap_dims(2, 3)).cast(DType::F32);
    let along = (p.clone() * dp.clone()).sum_dim(3);
    let ds = (p * (dp - along)).mul_scalar(1.0 / (width as f64).sqrt()).cast(dtype);
    let dq = ds.clone().matmul(k).reshape([b, h, t, width]);
    let dk = ds.swap_dims(2, 3).matmul(q.reshape([b, groups, rows, width]));
    Tensor::cat(vec![dq, dk, dv], 1).swap_dims(1, 2)
}

/// What the backward pass keeps.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    rows: Tensor<B, 2>,
    heads: Heads,
    attended: Attended<B>,
    index: AttentionIndex<B>,
}

#[derive(Debug)]
struct Step;

impl<B: KernelBackend> Backward<B, 1> for Step {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let State { rows, heads, attended, index } = ops.state;
        if let [Some(parent)] = ops.parents {
            let [n, width] = rows.dims();
            let [b, h, t, k] = attended.o.dims();
            let grad = inner::<B, 2>(grad).reshape([b, t, h, k]).swap_dims(1, 2);
            let qkv = heads.split(rows, [b, t]);
            let dx = B::attention_backward(qkv, attended, &index, grad).reshape([n, width]);
            grads.register::<B>(parent.id, dx.into_primitive().tensor());
        }
    }
}

/// Attention of joined rows `[b t, (h + 2 g) k]` to rows `[b t, h k]`, and what the backward pass needs.
pub(crate) fn of_rows<B: KernelBackend>(
    rows: Tensor<B, 2>,
    heads: Heads,
    index: &AttentionIndex<B>,
) -> (Tensor<B, 2>, Attended<B>) {
    let [b, t] = index.query_documents.dims();
    let [q, k, v] = heads.split(rows, [b, t]);
    let attended = <B as KernelBackend>::attention(q, k, v, index);
    let o = attended.o.clone().swap_dims(1, 2).reshape([b * t, heads.queries * heads.width]);
    (o, attended)
}

pub(crate) fn tracked_forward<B: KernelBackend, C: CheckpointStrategy>(
    rows: Tensor<Autodiff<B, C>, 2>,
    heads: Heads,
    index: &AttentionIndex<Autodiff<B, C>>,
) -> Tensor<Autodiff<B, C>, 2> {
    let node = rows.clone().into_primitive().tensor().node;
    let (rows, index) = (rows.inner(), index.map(Tensor::inner));
    let (o, attended) = of_rows(rows.clone(), heads, &index);
    let o = o.into_primitive().tensor();
    tracked(match Step.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(State { rows, heads, attended, index }, o),
        OpsKind::UnTracked(prep) => prep.finish(o),
    })
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{Ad, close, noisy};

    fn index<B: Backend>() -> AttentionIndex<B> {
        let device = Default::default();
        let documents = Tensor::from_data([[0, 0, 0, 1, 1, -1], [0, 0, 1, 1, 1, 1]], &device);
        let positions = Tensor::from_data([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]], &device);
        AttentionIndex::rows(documents, positions)
    }

    fn check(queries: usize, keys: usize) {
        let heads = Heads { queries, keys, width: 4 };
        let rows = noisy::<Ad, 2>([12, (queries + 2 * keys) * 4], 1).require_grad();
        let g = noisy::<Ad, 2>([12, queries * 4], 4);
        let ours = tracked_forward(rows.clone(), heads, &index());
        let [q, k, v] = heads.split(rows.clone(), [2, 6]);
        let plain = reference(q, k, v, &index()).swap_dims(1, 2).reshape([12, queries * 4]);
        close(ours.clone(), plain.clone(), 1e-6);
        let (ours, plain) = ((ours * g.clone()).sum().backward(), (plain * g).sum().backward());
        close(rows.grad(&ours).unwrap(), rows.grad(&plain).unwrap(), 1e-5);
    }

    #[test]
    fn gradients_equal_those_of_the_composition() {
        check(4, 4);
        check(4, 2);
        check(3, 1);
    }

    #[test]
    fn grouped_heads_equal_repeated_ones() {
        let q = noisy::<Flex, 4>([2, 4, 6, 4], 1);
        let (k, v) = (noisy::<Flex, 4>([2, 2, 6, 4], 2), noisy::<Flex, 4>([2, 2, 6, 4], 3));
        let repeat = |x: &Tensor<Flex, 4>| {
            x.clone().reshape([2, 2, 1, 24]).expand([2, 2, 2, 24]).reshape([2, 4, 6, 4])
        };
        let repeated = reference(q.clone(), repeat(&k), repeat(&v), &index());
        close(reference(q, k, v, &index()), repeated, 1e-6);
    }

    #[test]
    fn what_stands_in_another_document_or_later_changes_nothing() {
        let q = noisy::<Flex, 4>([2, 2, 6, 4], 1);
        let k = noisy::<Flex, 4>([2, 2, 6, 4], 2);
        let v = noisy::<Flex, 4>([2, 2, 6, 4], 3);
        let before = reference(q.clone(), k.clone(), v.clone(), &index());
        // Place 3 begins row 0's second document: places 0 to 2 must not see it.
        let other = noisy::<Flex, 4>([2, 2, 3, 4], 9).mul_scalar(50);
        let changed = |x: Tensor<Flex, 4>| x.slice_assign([0..2, 0..2, 3..6, 0..4], other.clone());
        let after = reference(q, changed(k), changed(v), &index());
        let part = |x: Tensor<Flex, 4>| x.slice([0..1, 0..2, 0..3, 0..4]);
        close(part(after), part(before), 0.0);
    }
}
