//! Loss and gradient on a device, a chunk of rows at a time.

use burn::tensor::{DType, Int, Tensor};

use super::{Chunk, CrossEntropyGradient, chunks};
use crate::device::{Cube, Matrix, primitive, tensor, uninitialized};
use crate::product::{self, Product, ProductRuntime};

pub(crate) fn with_gradient<R: ProductRuntime>(
    hidden: Tensor<Cube<R>, 2>,
    head: Tensor<Cube<R>, 2>,
    targets: Tensor<Cube<R>, 1, Int>,
) -> CrossEntropyGradient<Cube<R>> {
    let [n, d] = hidden.dims();
    let [v, _] = head.dims();
    let dtype = hidden.dtype();
    let rows = Matrix::new(primitive(hidden.clone()));
    let head = Matrix::new(primitive(head.cast(dtype)));
    let gradient = Matrix::new(uninitialized(&rows.tensor, [n, d], dtype));
    let mut loss_sum = Tensor::<Cube<R>, 1>::zeros([1], (&hidden.device(), DType::F32));
    for range in chunks(n, v) {
        let (start, count) = (range.start, range.len());
        let logits = product::new(&rows.rows(start, count), &head.t(), 1.0, DType::F32);
        let chunk = Chunk::from_logits(tensor(logits), targets.clone().narrow(0, start, count));
        loss_sum = loss_sum + chunk.losses().sum();
        let a = Matrix::new(primitive(chunk.d_logits().cast(dtype)));
        let c = gradient.rows(start, count);
        product::run(Product { a, b: head.clone(), c, alpha: 1.0, beta: 0.0 });
    }
    CrossEntropyGradient { loss_sum, hidden: tensor(gradient.tensor), head: None }
}
