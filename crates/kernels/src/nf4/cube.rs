//! Unpacking on a device.

use crate::Nf4Tensor;
use crate::device::{Cube, Matrix, primitive};
use crate::product::{self, ProductRuntime};

/// The dense weight, into a part that has its shape.
pub(crate) fn dequantize_into<R: ProductRuntime>(weight: &Nf4Tensor<Cube<R>>, out: &Matrix<R>) {
    product::place(primitive(super::reference(weight, out.dtype())), out, 1.0, 0.0);
}
