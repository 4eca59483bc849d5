//! The operation on a device: the packed weights of all layers are unpacked one below the other, with the factors B
//! beside them, and multiplied at once.
//!
//! Unpacking moves half a byte and writes one element for each weight, little beside the product of thousands of rows.
//! Where layers share an input, each B has zeros where the others' u stand. What it trades: one buffer for the dense
//! weights, taken from the allocator for each product and given back after it, and as many columns of it as the ranks add
//! up to.

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;

use super::{
    FrozenWeight, Gradients, Input, InputGradient, LinearPart, LoraTerm, Projection, SpaciousRows, Spent,
    Upstream,
};
use crate::device::{Cube, Matrix, primitive, scratch, spacious, tensor, uninitialized, with_columns};
use crate::product::{self, Product, ProductRuntime};
use crate::rows::write_columns;
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

    /// `[W, s B]` of all layers, one below the other `[Σ out, in + Σ r]`.
    fn joined(&self, like: &CubeTensor<R>) -> Matrix<R> {
        if let [Place { part: LinearPart { weight: FrozenWeight::Dense(weight), lora: None }, .. }] =
            self.parts.as_slice()
        {
            return Matrix::new(primitive(weight.clone().cast(like.dtype)));
        }
        let width = self.inner + self.rank;
        let all = scratch(like, [self.out, width.next_multiple_of(8)], like.dtype);
        let all = Matrix::new(all).columns(0, width);
        for place in &self.parts {
            let rows = all.rows(place.out[0], place.out[1]);
            let weight = rows.columns(0, self.inner);
            match &place.part.weight {
                FrozenWeight::Nf4(packed) => nf4::cube::dequantize_into(packed, &weight),
                FrozenWeight::Dense(dense) => write_columns(primitive(dense.clone()), &weight, 0, 1.0),
            }
            if self.rank > 0 {
                self.write_b(place, &rows.columns(self.inner, self.rank), like);
            }
        }
        all
    }

    /// A layer's `s B` among the zeros of others, or nothing but zeros.
    fn write_b(&self, place: &Place<'a, R>, target: &Matrix<R>, like: &CubeTensor<R>) {
        match &place.part.lora {
            Some(lora) => {
                write_columns(primitive(lora.b.clone()), target, place.rank[0], lora.scale as f32);
            }
            None => {
                let zeros = Tensor::<Cube<R>, 2>::zeros(target.dims, (&like.device, like.dtype));
                write_columns(primitive(zeros), target, 0, 1.0);
            }
        }
    }

    /// A of all layers, one below the other `[Σ r, in]`.
    fn factors_a(&self, like: &CubeTensor<R>) -> Matrix<R> {
        let all = Matrix::new(uninitialized(like, [self.rank, self.inner], like.dtype));
        for (place, lora) in self.corrected() {
            write_columns(primitive(lora.a.clone()), &all.rows(place.rank[0], place.rank[1]), 0, 1.0);
        }
        all
    }
}

impl<R: ProductRuntime> Spent<Cube<R>> {
    /// A new tensor in f32: in the memory at hand, if what is left of it suffices and nobody holds the tensor that had it,
    /// or in its own.
    fn place(&mut self, like: &CubeTensor<R>, dims: [usize; 2]) -> CubeTensor<R> {
        let bytes = dims[0] * dims[1] * size_of::<f32>();
        self.asked += bytes;
        let start = self.used.next_multiple_of(like.client.properties().memory.alignment as usize);
        let own = || uninitialized(like, dims, DType::F32);
        let Some(spent) = self.tensor.take().map(primitive) else { return own() };
        let whole = spent.handle.size_in_used() as usize;
        let free = self.used > 0 || (spent.can_mut() && spent.is_contiguous());
        let placed = (free && start + bytes <= whole).then(|| {
            self.used = start + bytes;
            let handle = spent.handle.clone().offset_start(start as u64);
            let handle = handle.offset_end((whole - self.used) as u64);
            let (client, device) = (spent.client.clone(), spent.device.clone());
            CubeTensor::new_contiguous(client, device, dims.into(), handle, DType::F32)
        });
        self.tensor = Some(tensor(spent));
        placed.unwrap_or_else(own)
    }
}

/// `[x, u]`: u goes behind x where there is room for it.
fn beside<R: ProductRuntime>(x: &SpaciousRows<Cube<R>>, u: &CubeTensor<R>) -> Matrix<R> {
    let ([n, inner], [_, rank]) = (x.rows().dims(), [0, 1].map(|i| u.meta.shape()[i]));
    let rows = primitive(x.rows());
    let wide = if x.spare() >= rank {
        with_columns(&rows, inner + rank)
    } else {
        let copy = spacious(&rows, [n, inner], rank, rows.dtype);
        write_columns(rows, &Matrix::new(copy.clone()), 0, 1.0);
        with_columns(&copy, inner + rank)
    };
    let wide = Matrix::new(wide);
    write_columns(u.clone(), &wide.columns(inner, rank), 0, 1.0);
    wide
}

/// u, then `[x, u] · [W, s B]ᵀ`.
pub(crate) fn forward<R: ProductRuntime>(
    input: Input<Cube<R>>,
    parts: &[LinearPart<Cube<R>>],
) -> Projection<Cube<R>> {
    let layout = Layout::new(parts);
    let rows = primitive(input.x.rows());
    let u = (layout.rank > 0).then(|| {
        let dropped = Matrix::new(primitive(input.dropped));
        product::new(&dropped, &layout.factors_a(&rows).t(), 1.0, rows.dtype)
    });
    let x = u.as_ref().map_or_else(|| Matrix::new(rows.clone()), |u| beside(&input.x, u));
    let y = Matrix::new(uninitialized(&rows, [x.dims[0], layout.out], rows.dtype));
    let plus = input.residual.map(|residual| Matrix::new(primitive(residual)));
    product::run(Product { a: x, b: layout.joined(&rows).t(), c: y.clone(), alpha: 1.0, plus });
    Projection { y: tensor(y.tensor), u: u.map(tensor) }
}

/// `[g W, h] = g · [W, s B]`, then the gradients of the factors and what comes through them.
pub(crate) fn backward<R: ProductRuntime>(
    dropped: Tensor<Cube<R>, 2>,
    parts: &[LinearPart<Cube<R>>],
    dropout: Option<Dropout>,
    upstream: Upstream<Cube<R>>,
    spent: &mut Spent<Cube<R>>,
) -> Gradients<Cube<R>> {
    let layout = Layout::new(parts);
    let grad = Matrix::new(primitive(upstream.grad));
    let (inner, rank, dtype) = (layout.inner, layout.rank, grad.dtype());
    let base = spacious(&grad.tensor, [grad.dims[0], inner], rank, dtype);
    let both = Matrix::new(with_columns(&base, inner + rank));
    let first = if upstream.with_x { 0 } else { inner };
    if first < inner + rank {
        let columns = |matrix: Matrix<R>| matrix.columns(first, inner + rank - first);
        let (b, c) = (columns(layout.joined(&grad.tensor)), columns(both.clone()));
        product::run(Product { a: grad.clone(), b, c, alpha: 1.0, plus: None });
    }
    let mut gradients = Gradients {
        x: upstream.with_x.then(|| InputGradient::from(tensor::<R, 2>(base))),
        factors: Vec::new(),
    };
    if rank == 0 {
        return gradients;
    }
    let input = Matrix::new(primitive(dropped));
    let a = layout.factors_a(&grad.tensor);
    let u = upstream.u.map_or_else(|| product::new(&input, &a.t(), 1.0, dtype), primitive);
    let (u, h) = (Matrix::new(u), both.columns(inner, rank));
    let mut gradient = |a: &Matrix<R>, b: &Matrix<R>, alpha| {
        let c = Matrix::new(spent.place(&grad.tensor, [a.shape()[0], b.shape()[1]]));
        product::run(Product { a: a.clone(), b: b.clone(), c: c.clone(), alpha, plus: None });
        tensor::<R, 2>(c.tensor)
    };
    let mut db = Vec::with_capacity(parts.len());
    for (place, lora) in layout.corrected() {
        let (g, u) = (grad.columns(place.out[0], place.out[1]), u.columns(place.rank[0], place.rank[1]));
        db.push(gradient(&g.t(), &u, lora.scale as f32));
    }
    let da = gradient(&h.t(), &input, 1.0);
    drop(input);
    let rows = |place: &Place<'_, R>| da.clone().narrow(0, place.rank[0], place.rank[1]);
    gradients.factors = layout.corrected().zip(db).map(|((place, _), db)| [rows(place), db]).collect();
    if let Some(x) = &mut gradients.x {
        x.low_rank = Some((tensor(product::new(&h, &a, 1.0, dtype)), dropout));
    }
    gradients
}
