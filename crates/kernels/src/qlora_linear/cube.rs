//! The operation on a device: the packed weights of all layers are unpacked side by side and multiplied at once.
//!
//! Unpacking moves half a byte and writes one element for each weight, little beside the product of thousands of rows.
//! What it trades: one buffer for the dense weights, taken from the allocator for each product and given back after it.

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;

use super::{FrozenWeight, Gradients, Input, LinearPart, LoraTerm, Projection, Upstream};
use crate::device::{Cube, Matrix, convert_into, primitive, scratch, tensor, uninitialized};
use crate::product::{self, Plus, Product, ProductRuntime};
use crate::{Dropout, nf4};

/// Where each layer's results and its u begin.
struct Layout<'a, R: ProductRuntime> {
    parts: Vec<Place<'a, R>>,
    out: usize,
    rank: usize,
    inner: usize,
}

struct Place<'a, R: ProductRuntime> {
    part: &'a LinearPart<Cube<R>>,
    /// First column of y, and their number.
    out: [usize; 2],
    /// First column of u, and their number.
    rank: [usize; 2],
}

impl<'a, R: ProductRuntime> Layout<'a, R> {
    fn new(parts: &'a [LinearPart<Cube<R>>]) -> Self {
        let mut layout = Self { parts: Vec::with_capacity(parts.len()), out: 0, rank: 0, inner: 0 };
        for part in parts {
            let [out, inner] = part.weight.dims();
            let rank = part.lora.as_ref().map_or(0, |lora| lora.a.dims()[0]);
            layout.parts.push(Place { part, out: [layout.out, out], rank: [layout.rank, rank] });
            layout.out += out;
            layout.rank += rank;
            layout.inner = inner;
        }
        layout
    }

    fn corrected(&self) -> impl Iterator<Item = (&Place<'a, R>, &'a LoraTerm<Cube<R>>)> {
        self.parts.iter().filter_map(|place| Some((place, place.part.lora.as_ref()?)))
    }

    /// The dense weights with the columns of y that they give: neighbours at once if they are packed, and if their
    /// columns are alike in being started or not, which is passed on.
    fn weights(&self, like: &CubeTensor<R>, started: &[bool]) -> Vec<(Matrix<R>, [usize; 2], bool)> {
        let dtype = like.dtype;
        let packed = |place: &Place<'a, R>| matches!(place.part.weight, FrozenWeight::Nf4(_));
        let alike = started.windows(2).all(|pair| pair[0] == pair[1]);
        if !alike || !self.parts.iter().all(packed) {
            let dense = |(place, &started): (&Place<'a, R>, &bool)| {
                (Matrix::new(primitive(place.part.weight.dense(dtype))), place.out, started)
            };
            return self.parts.iter().zip(started).map(dense).collect();
        }
        let joined = Matrix::new(scratch(like, [self.out, self.inner], dtype));
        for place in &self.parts {
            if let FrozenWeight::Nf4(weight) = &place.part.weight {
                nf4::cube::dequantize_into(weight, &joined.rows(place.out[0], place.out[1]));
            }
        }
        vec![(joined, [0, self.out], started[0])]
    }

    /// A of all layers, one below the other `[Σ r, in]`.
    fn factors_a(&self, like: &CubeTensor<R>) -> Matrix<R> {
        let all = Matrix::new(uninitialized(like, [self.rank, self.inner], like.dtype));
        for (place, lora) in self.corrected() {
            convert_into(primitive(lora.a.clone()), &all.rows(place.rank[0], place.rank[1]));
        }
        all
    }
}

fn factor_b<R: ProductRuntime>(lora: &LoraTerm<Cube<R>>, dtype: DType) -> Matrix<R> {
    Matrix::new(primitive(lora.b.clone().cast(dtype)))
}

/// The corrections are written first, onto the residual if there is one, and the large product is added to them: its
/// sums then end in one pass over the result instead of three.
pub(crate) fn forward<R: ProductRuntime>(
    input: Input<Cube<R>>,
    parts: &[LinearPart<Cube<R>>],
) -> Projection<Cube<R>> {
    let layout = Layout::new(parts);
    let x = Matrix::new(primitive(input.x));
    let dtype = x.dtype();
    let y = Matrix::new(uninitialized(&x.tensor, [x.dims[0], layout.out], dtype));
    let residual = input.residual.map(|residual| Matrix::new(primitive(residual)));
    let mut started = vec![false; layout.parts.len()];
    let plus = |[start, count]: [usize; 2], started: bool| match &residual {
        _ if started => Plus::Itself,
        Some(residual) => Plus::Other(residual.columns(start, count)),
        None => Plus::Nothing,
    };
    let u = (layout.rank > 0).then(|| {
        let dropped = Matrix::new(primitive(input.dropped));
        Matrix::new(product::new(&dropped, &layout.factors_a(&x.tensor).t(), 1.0, dtype))
    });
    for (place, started) in layout.parts.iter().zip(&mut started) {
        let (Some(lora), Some(u)) = (&place.part.lora, &u) else { continue };
        product::run(Product {
            a: u.columns(place.rank[0], place.rank[1]),
            b: factor_b(lora, dtype).t(),
            c: y.columns(place.out[0], place.out[1]),
            alpha: lora.scale as f32,
            plus: plus(place.out, false),
        });
        *started = true;
    }
    for (weight, columns, started) in layout.weights(&x.tensor, &started) {
        let c = y.columns(columns[0], columns[1]);
        let plus = plus(columns, started);
        product::run(Product { a: x.clone(), b: weight.t(), c, alpha: 1.0, plus });
    }
    Projection { y: tensor(y.tensor), u: u.map(|u| tensor(u.tensor)) }
}

pub(crate) fn backward<R: ProductRuntime>(
    dropped: Tensor<Cube<R>, 2>,
    parts: &[LinearPart<Cube<R>>],
    dropout: Option<Dropout>,
    upstream: Upstream<Cube<R>>,
) -> Gradients<Cube<R>> {
    let layout = Layout::new(parts);
    let grad = Matrix::new(primitive(upstream.grad));
    let dtype = grad.dtype();
    if layout.rank == 0 {
        let dx = upstream.with_x.then(|| tensor(base_gradient(&layout, &grad, None).tensor));
        return Gradients { x: dx, factors: Vec::new() };
    }
    let input = Matrix::new(primitive(dropped));
    let a = layout.factors_a(&grad.tensor);
    let u = upstream.u.map_or_else(|| product::new(&input, &a.t(), 1.0, dtype), primitive);
    let u = Matrix::new(u);
    let h = Matrix::new(uninitialized(&grad.tensor, [grad.dims[0], layout.rank], dtype));
    let mut db = Vec::with_capacity(parts.len());
    for (place, lora) in layout.corrected() {
        let scale = lora.scale as f32;
        let g = grad.columns(place.out[0], place.out[1]);
        let [start, count] = place.rank;
        let c = h.columns(start, count);
        let b = factor_b(lora, dtype);
        product::run(Product { a: g.clone(), b, c, alpha: scale, plus: Plus::Nothing });
        db.push(tensor::<R, 2>(product::new(&g.t(), &u.columns(start, count), scale, DType::F32)));
    }
    let da = tensor::<R, 2>(product::new(&h.t(), &input, 1.0, DType::F32));
    drop(input);
    let rows = |place: &Place<'_, R>| da.clone().narrow(0, place.rank[0], place.rank[1]);
    let factors = layout.corrected().zip(db).map(|((place, _), db)| [rows(place), db]).collect();
    let dx = upstream.with_x.then(|| {
        let through = Matrix::new(product::new(&h, &a, 1.0, dtype));
        let through = match dropout {
            Some(dropout) => Matrix::new(crate::dropout::kernel::apply(through.tensor, dropout)),
            None => through,
        };
        tensor(base_gradient(&layout, &grad, Some(through)).tensor)
    });
    Gradients { x: dx, factors }
}

/// `g W`, added to what came through the corrections where that lies, if anything did.
fn base_gradient<R: ProductRuntime>(
    layout: &Layout<'_, R>,
    grad: &Matrix<R>,
    through: Option<Matrix<R>>,
) -> Matrix<R> {
    let started = through.is_some();
    let empty = || uninitialized(&grad.tensor, [grad.dims[0], layout.inner], grad.dtype());
    let dx = through.unwrap_or_else(|| Matrix::new(empty()));
    let all = vec![false; layout.parts.len()];
    for (number, (b, [start, count], _)) in layout.weights(&grad.tensor, &all).into_iter().enumerate() {
        let plus = if started || number > 0 { Plus::Itself } else { Plus::Nothing };
        product::run(Product { a: grad.columns(start, count), b, c: dx.clone(), alpha: 1.0, plus });
    }
    dx
}
