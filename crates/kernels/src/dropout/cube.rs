//! Dropout on a device.

use burn_cubecl::tensor::CubeTensor;

use super::Dropout;
use crate::device::{primitive, tensor};
use crate::product::ProductRuntime;

/// `base + drop(x)`.
pub(crate) fn add<R: ProductRuntime>(
    base: CubeTensor<R>,
    x: CubeTensor<R>,
    dropout: Dropout,
) -> CubeTensor<R> {
    primitive(tensor::<R, 2>(base) + dropout.apply(tensor::<R, 2>(x)))
}
