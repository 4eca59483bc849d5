//! Loss and gradient on a device, a chunk of rows at a time.

use burn::tensor::{DType, Int, Tensor};

use super::{CHUNK_ROWS, CrossEntropyGradient, kernel};
use crate::device::{Cube, Matrix, int_primitive, primitive, tensor, uninitialized};
use crate::product::{self, Product, ProductRuntime};

pub(crate) fn losses<R: ProductRuntime>(
    hidden: Tensor<Cube<R>, 2>,
    head: Tensor<Cube<R>, 2>,
    targets: Tensor<Cube<R>, 1, Int>,
) -> Tensor<Cube<R>, 1> {
    let [n, _] = hidden.dims();
    let head = Matrix::new(primitive(head.cast(hidden.dtype())));
    let rows = Matrix::new(primitive(hidden));
    let part = |start: usize| {
        let count = CHUNK_ROWS.min(n - start);
        let logits = product::new(&rows.rows(start, count), &head.t(), 1.0, DType::F32);
        tensor(kernel::losses(logits, int_primitive(targets.clone().narrow(0, start, count))))
    };
    Tensor::cat((0..n).step_by(CHUNK_ROWS).map(part).collect(), 0)
}

pub(crate) fn with_gradient<R: ProductRuntime>(
    hidden: Tensor<Cube<R>, 2>,
    head: Tensor<Cube<R>, 2>,
    targets: Tensor<Cube<R>, 1, Int>,
    scale: f64,
    with_head: bool,
) -> CrossEntropyGradient<Cube<R>> {
    let [n, d] = hidden.dims();
    let (device, dtype) = (hidden.device(), hidden.dtype());
    let mut loss_sum = Tensor::<Cube<R>, 1>::zeros([1], (&device, DType::F32));
    let mut d_head = with_head.then(|| Tensor::zeros(head.dims(), (&device, DType::F32)));
    let head = Matrix::new(primitive(head.cast(dtype)));
    let rows = Matrix::new(primitive(hidden));
    let gradient = Matrix::new(uninitialized(&rows.tensor, [n, d], dtype));
    for start in (0..n).step_by(CHUNK_ROWS) {
        let count = CHUNK_ROWS.min(n - start);
        let logits = product::new(&rows.rows(start, count), &head.t(), 1.0, DType::F32);
        let targets = int_primitive(targets.clone().narrow(0, start, count));
        let (losses, d_logits) = kernel::rows(logits, targets, scale as f32, dtype);
        loss_sum = loss_sum + tensor::<R, 1>(losses).sum();
        let d_logits = Matrix::new(d_logits);
        d_head = d_head.map(|sum| {
            let part = product::new(&d_logits.t(), &rows.rows(start, count), 1.0, DType::F32);
            sum + tensor(part)
        });
        let c = gradient.rows(start, count);
        product::run(Product { a: d_logits, b: head.clone(), c, alpha: 1.0, plus: None });
    }
    CrossEntropyGradient { loss_sum, hidden: tensor(gradient.tensor), head: d_head }
}
