//! The operation on a device: the packed weights of all layers are unpacked side by side and multiplied at once, and the
//! corrections are added where the result lies.
//!
//! Unpacking moves half a byte and writes one element for each weight, little beside the product of thousands of rows.
//! What it trades: one buffer for the dense weights, taken from the allocator for each product and given back after it.

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;

use super::{FrozenWeight, Gradients, LinearPart, LoraTerm, Projection, Upstream, dropped};
use crate::device::{Cube, Matrix, convert_into, primitive, scratch, tensor, uninitialized};
use crate::product::{self, Product, ProductRuntime};
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

    /// The dense weights with the columns of y that they give: all at once if they are packed, else one by one.
    fn weights(&self, like: &CubeTensor<R>) -> Vec<(Matrix<R>, [usize; 2])> {
        let dtype = like.dtype;
        let packed = |place: &Place<'a, R>| matches!(place.part.weight, FrozenWeight::Nf4(_));
        if !self.parts.iter().all(packed) {
            let dense =
                |place: &Place<'a, R>| (Matrix::new(primitive(place.part.weight.dense(dtype))), place.out);
            return self.parts.iter().map(dense).collect();
        }
        let joined = Matrix::new(scratch(like, [self.out, self.inner], dtype));
        for place in &self.parts {
            if let FrozenWeight::Nf4(weight) = &place.part.weight {
                nf4::cube::dequantize_into(weight, &joined.rows(place.out[0], place.out[1]));
            }
        }
        vec![(joined, [0, self.out])]
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

pub(crate) fn forward<R: ProductRuntime>(
    x: Tensor<Cube<R>, 2>,
    parts: &[LinearPart<Cube<R>>],
    dropout: Option<Dropout>,
) -> Projection<Cube<R>> {
    let layout = Layout::new(parts);
    let dtype = x.dtype();
    let rows = Matrix::new(primitive(x.clone()));
    let y = Matrix::new(uninitialized(&rows.tensor, [rows.dims[0], layout.out], dtype));
    for (weight, [start, count]) in layout.weights(&rows.tensor) {
        let c = y.columns(start, count);
        product::run(Product { a: rows.clone(), b: weight.t(), c, alpha: 1.0, beta: 0.0 });
    }
    if layout.rank == 0 {
        return Projection { y: tensor(y.tensor), u: None };
    }
    let input = Matrix::new(primitive(dropped(x, dropout)));
    let u = Matrix::new(product::new(&input, &layout.factors_a(&rows.tensor).t(), 1.0, dtype));
    for (place, lora) in layout.corrected() {
        product::run(Product {
            a: u.columns(place.rank[0], place.rank[1]),
            b: factor_b(lora, dtype).t(),
            c: y.columns(place.out[0], place.out[1]),
            alpha: lora.scale as f32,
            beta: 1.0,
        });
    }
    Projection { y: tensor(y.tensor), u: Some(tensor(u.tensor)) }
}

pub(crate) fn backward<R: ProductRuntime>(
    x: Tensor<Cube<R>, 2>,
    parts: &[LinearPart<Cube<R>>],
    dropout: Option<Dropout>,
    upstream: Upstream<Cube<R>>,
) -> Gradients<Cube<R>> {
    let layout = Layout::new(parts);
    let grad = Matrix::new(primitive(upstream.grad));
    let dx = upstream.with_x.then(|| base_gradient(&layout, &grad));
    if layout.rank == 0 {
        return Gradients { x: dx.map(|dx| tensor(dx.tensor)), factors: Vec::new() };
    }
    let dtype = x.dtype();
    let input = Matrix::new(primitive(dropped(x, dropout)));
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
        product::run(Product { a: g.clone(), b: factor_b(lora, dtype), c, alpha: scale, beta: 0.0 });
        db.push(tensor::<R, 2>(product::new(&g.t(), &u.columns(start, count), scale, DType::F32)));
    }
    let da = tensor::<R, 2>(product::new(&h.t(), &input, 1.0, DType::F32));
    let pair =
        |((place, _), db): ((&Place<'_, R>, _), _)| [da.clone().narrow(0, place.rank[0], place.rank[1]), db];
    let factors = layout.corrected().zip(db).map(pair).collect();
    Gradients { x: dx.map(|dx| input_gradient(dx, h, a, dropout)), factors }
}

/// `g W`.
fn base_gradient<R: ProductRuntime>(layout: &Layout<'_, R>, grad: &Matrix<R>) -> Matrix<R> {
    let dims = [grad.dims[0], layout.inner];
    let dx = Matrix::new(uninitialized(&grad.tensor, dims, grad.dtype()));
    for (number, (b, [start, count])) in layout.weights(&grad.tensor).into_iter().enumerate() {
        let beta = if number == 0 { 0.0 } else { 1.0 };
        product::run(Product { a: grad.columns(start, count), b, c: dx.clone(), alpha: 1.0, beta });
    }
    dx
}

/// `g W + drop'(h A)`, given the first.
fn input_gradient<R: ProductRuntime>(
    dx: Matrix<R>,
    h: Matrix<R>,
    a: Matrix<R>,
    dropout: Option<Dropout>,
) -> Tensor<Cube<R>, 2> {
    let Some(dropout) = dropout else {
        product::run(Product { a: h, b: a, c: dx.clone(), alpha: 1.0, beta: 1.0 });
        return tensor(dx.tensor);
    };
    let through = product::new(&h, &a, 1.0, dx.dtype());
    tensor(crate::dropout::kernel::add(dx.tensor, through, Some(dropout)))
}
