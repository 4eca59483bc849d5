//! Unpacking on a device.

use burn::tensor::{DType, Tensor};

use crate::Nf4Tensor;
use crate::device::{Cube, Matrix, primitive};
use crate::product::{self, ProductRuntime};

/// The dense weight, into a part that has its shape.
pub(crate) fn dequantize_into<R: ProductRuntime>(weight: &Nf4Tensor<Cube<R>>, out: &Matrix<R>) {
    product::place(primitive(super::reference(weight, out.dtype())), out, 1.0, 0.0);
}

/// The dense weight as a new tensor.
pub(crate) fn dequantize<R: ProductRuntime>(weight: &Nf4Tensor<Cube<R>>, dtype: DType) -> Tensor<Cube<R>, 2> {
    super::reference(weight, dtype)
}
