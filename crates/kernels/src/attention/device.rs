//! Attention on devices: forward and backward passes that hold no `[t, s]` matrix.
//!
//! ```text
//! lse[i] = log Σ_j exp(s[i, j])      s = q kᵀ / √k over what the query sees
//! o[i]   = Σ_j exp(s[i, j] - lse[i]) v[j]
//! ```
//!
//! Tiles of keys pass by a tile of queries while the softmax is rescaled as its maximum grows (Milakov & Gimelshein,
//! <https://arxiv.org/abs/1805.02867>; Dao, "FlashAttention-2", <https://arxiv.org/abs/2307.08691>). The backward pass
//! takes P again from `lse`, with `D[i] = Σ o[i] g[i]` in place of the row sum of P ∘ dP. It recomputes scores twice,
//! once for queries and once for keys, so that nothing is added atomically and a run repeats bit by bit.
//!
//! A query that sees nothing gets 0 and `lse` -1e30.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
#[cfg(feature = "cuda")]
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::ranges::Ranges;
use super::{flash, gradients, plain};
use crate::device::{side_by_side, uninitialized, vector_width};
use crate::product::ProductRuntime;

/// The `lse` of a query that sees nothing, and the score of a hidden pair: finite, and below every score.
pub(super) const HIDDEN: f32 = -1e30;

/// Documents and positions `[b, t]` of one side.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Tokens {
    pub(super) documents: Tensor<i32>,
    pub(super) positions: Tensor<i32>,
}

/// Documents and positions of queries `[b, t]`, then of keys `[b, s]`, i32; ranges of tiles, if they are known.
#[derive(Clone, Debug)]
pub struct Index<R: CubeRuntime> {
    tensors: [CubeTensor<R>; 4],
    ranges: Option<Ranges<R>>,
}

impl<R: CubeRuntime> Index<R> {
    /// Of `[query documents, query positions, key documents, key positions]`.
    #[must_use]
    pub fn new(tensors: [CubeTensor<R>; 4]) -> Self {
        Self { tensors, ranges: None }
    }

    /// With ranges of tiles for the fastest kernels of the device, so that they are computed once.
    #[must_use]
    pub fn prepared(self) -> Self {
        let tensor_cores = flash::on_device(&self.tensors[0].client);
        let ranges = Ranges::new(&self.tensors, if tensor_cores { flash::EDGE } else { plain::EDGE });
        self.with_ranges(Some(ranges))
    }

    pub(crate) fn with_ranges(self, ranges: Option<Ranges<R>>) -> Self {
        Self { ranges, ..self }
    }

    pub(crate) fn into_ranges(self) -> Option<Ranges<R>> {
        self.ranges
    }

    /// Ranges for tiles of `edge` queries and `edge` keys.
    fn tiled(self, edge: usize) -> Tiled<R> {
        let known = self.ranges.filter(|ranges| ranges.edge == edge);
        let ranges = known.unwrap_or_else(|| Ranges::new(&self.tensors, edge));
        Tiled { tensors: self.tensors, ranges }
    }
}

/// What every kernel of one call shares: what may see what, and how it is tiled.
#[derive(Debug)]
pub(crate) struct Tiled<R: CubeRuntime> {
    tensors: [CubeTensor<R>; 4],
    pub(super) ranges: Ranges<R>,
}

impl<R: CubeRuntime> Tiled<R> {
    /// `[query documents, query positions, key documents, key positions]`, whose elements lie side by side.
    #[cfg(feature = "cuda")]
    pub(super) fn tokens(&self) -> [CubeTensor<R>; 4] {
        self.tensors.clone().map(into_contiguous)
    }

    pub(super) fn queries(&self) -> TokensLaunch<R> {
        tokens(&self.tensors[0], &self.tensors[1])
    }

    pub(super) fn keys(&self) -> TokensLaunch<R> {
        tokens(&self.tensors[2], &self.tensors[3])
    }
}

pub(super) fn tokens<R: CubeRuntime>(
    documents: &CubeTensor<R>,
    positions: &CubeTensor<R>,
) -> TokensLaunch<R> {
    TokensLaunch::new(documents.clone().into_tensor_arg(), positions.clone().into_tensor_arg())
}

/// `b, h, t, w` of a tensor.
pub(super) fn dims<R: CubeRuntime>(x: &CubeTensor<R>) -> [usize; 4] {
    [0, 1, 2, 3].map(|i| x.meta.shape()[i])
}

/// Attention of queries `[b, h, t, w]` to keys and values `[b, g, s, w]`, g dividing h.
///
/// Returns `o`, allocated as `[b, t, h, w]` and seen as `[b, h, t, w]`, and `lse` `[b, h, t]` in f32.
#[must_use]
pub fn forward<R: ProductRuntime>(
    q: CubeTensor<R>,
    k: CubeTensor<R>,
    v: CubeTensor<R>,
    index: Index<R>,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [q, k, v] = [q, k, v].map(side_by_side);
    let [b, h, t, w] = dims(&q);
    let mut o = uninitialized(&q, [b, t, h, w], q.dtype);
    o.meta.swap(1, 2);
    let lse = uninitialized(&q, [b, h, t], DType::F32);
    if let Some(build) = flash::build(&[&q, &k, &v]) {
        let index = index.tiled(flash::EDGE);
        if !R::own_attention([&q, &k, &v], &index, &o, &lse) {
            flash::forward([&q, &k, &v], &index, &o, &lse, build);
        }
    } else {
        let index = index.tiled(plain::EDGE);
        plain::forward([&q, &k, &v], &index, &o, &lse);
    }
    (o, lse)
}

/// The gradient of [`forward`] for a row of the joined buffer: `[b, t, h + 2 g, w]`, the heads of q, then those of k
/// and of v, where keys are the queries' tokens (s = t). `o` and `lse` are what `forward` returned, `grad`
/// `[b, h, t, w]` is the gradient of `o`.
#[must_use]
pub fn backward<R: ProductRuntime>(
    q: CubeTensor<R>,
    k: CubeTensor<R>,
    v: CubeTensor<R>,
    o: CubeTensor<R>,
    lse: CubeTensor<R>,
    grad: CubeTensor<R>,
    index: Index<R>,
) -> CubeTensor<R> {
    let [q, k, v, o, grad] = [q, k, v, o, grad].map(side_by_side);
    let [b, h, t, w] = dims(&q);
    let g = dims(&k)[1];
    let joined = uninitialized(&q, [b, t, h + 2 * g, w], q.dtype);
    if let Some(build) = flash::build(&[&q, &k, &v, &o, &grad]) {
        let index = index.tiled(flash::EDGE);
        if !R::own_attention_gradient([&q, &k, &v], [&o, &grad], &lse, &index, &joined) {
            gradients::backward([&q, &k, &v], [&o, &grad], &lse, &index, &joined, build);
        }
    } else {
        let index = index.tiled(plain::EDGE);
        let along = row_products(&o, &grad);
        plain::backward([&q, &k, &v], &grad, [&lse, &along], &index, &joined);
    }
    joined
}

const LANES: u32 = 16;
const ROWS: u32 = 16;

/// `D = rowsum(a ∘ b)`, `[b, h, t]` in f32.
fn row_products<R: CubeRuntime>(a: &CubeTensor<R>, b: &CubeTensor<R>) -> CubeTensor<R> {
    let [batch, h, t, w] = dims(a);
    let out = uninitialized(a, [batch, h, t], DType::F32);
    // SAFETY: rows past the last are not read or written.
    unsafe {
        row_products_kernel::launch_unchecked::<R>(
            &a.client,
            CubeCount::Static((t as u32).div_ceil(ROWS), h as u32, batch as u32),
            CubeDim::new_2d(LANES, ROWS),
            vector_width(w, &[a, b]),
            a.clone().into_tensor_arg(),
            b.clone().into_tensor_arg(),
            out.clone().into_tensor_arg(),
            a.dtype.into(),
        );
    }
    out
}

#[cube(launch_unchecked)]
fn row_products_kernel<F: Float, N: Size>(
    a: &Tensor<Vector<F, N>>,
    b: &Tensor<Vector<F, N>>,
    out: &mut Tensor<f32>,
    #[define(F)] _dtype: StorageType,
) {
    let (head, batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let row = (CUBE_POS_X * CUBE_DIM_Y + UNIT_POS_Y) as usize;
    let t = a.shape(2);
    let mut sums = SharedMemory::<f32>::new(256usize);
    let mut sum = f32::new(0.0);
    if row < t {
        let from_a = (batch * a.stride(0) + head * a.stride(1) + row * a.stride(2)) / N::value();
        let from_b = (batch * b.stride(0) + head * b.stride(1) + row * b.stride(2)) / N::value();
        let mut i = UNIT_POS_X as usize;
        while i < a.shape(3) / N::value() {
            let product =
                Vector::<f32, N>::cast_from(a[from_a + i]) * Vector::<f32, N>::cast_from(b[from_b + i]);
            #[unroll]
            for j in 0..N::value() {
                sum += product[j];
            }
            i += 16;
        }
    }
    sums[UNIT_POS as usize] = sum;
    sync_cube();
    if UNIT_POS_X == 0 && row < t {
        for i in 1..16usize {
            sum += sums[UNIT_POS as usize + i];
        }
        out[(batch * a.shape(1) + head) * t + row] = sum;
    }
}
