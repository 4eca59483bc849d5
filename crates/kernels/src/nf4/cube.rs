//! Unpacking on a device, into a place that exists already where the device can bind memory that begins there.

use burn::tensor::{DType, Tensor};

use super::kernel;
use crate::Nf4Tensor;
use crate::device::{Cube, Matrix, tensor, uninitialized};
use crate::product::{self, ProductRuntime};

/// The dense weight, into a part that has its shape.
pub(crate) fn dequantize_into<R: ProductRuntime>(weight: &Nf4Tensor<Cube<R>>, out: &Matrix<R>) {
    let (codes, scales) = weight.device_parts();
    if let Some(view) = out.view() {
        kernel::dequantize(codes, scales, view);
        return;
    }
    let dense = uninitialized(&out.tensor, out.dims, out.dtype());
    kernel::dequantize(codes, scales, dense.clone());
    product::place(dense, out, 1.0, 0.0);
}

/// The dense weight as a new tensor.
pub(crate) fn dequantize<R: ProductRuntime>(weight: &Nf4Tensor<Cube<R>>, dtype: DType) -> Tensor<Cube<R>, 2> {
    let (codes, scales) = weight.device_parts();
    let dense = uninitialized(&codes, weight.dims(), dtype);
    kernel::dequantize(codes, scales, dense.clone());
    tensor(dense)
}
