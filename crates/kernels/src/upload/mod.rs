//! Values of the host onto a device.
//!
//! What [`KernelBackend::upload`](crate::KernelBackend::upload) does where nothing better is known: fresh memory, which the backend copies
//! as it does. On CUDA `cuda.rs` goes another way.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

/// Floats `[1, n]` on a device, whose bytes `fill` writes.
pub(crate) fn plain<B: Backend>(
    device: &B::Device,
    dtype: DType,
    count: usize,
    fill: &mut dyn FnMut(&mut [u8]),
) -> Tensor<B, 2> {
    let mut bytes = vec![0; count * dtype.size()];
    fill(&mut bytes);
    Tensor::from_data(TensorData::from_bytes_vec(bytes, [1, count], dtype), (device, dtype))
}
