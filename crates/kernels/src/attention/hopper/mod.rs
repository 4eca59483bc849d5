//! Attention on Hopper's own tensor core instructions, for f16 and bf16 with heads of 128.
//!
//! These multiply tiles where they lie in shared memory, for four warps at a time and while the warps do something else, and tiles
//! come there by the copy engine. A block stays on its multiprocessor and takes one item after the other, two tiles of a
//! head, until there is none: one warp of it starts copies, also those of the next item, and two groups of four warps
//! multiply, each with 64 rows of its own. The kernels are CUDA C++ and not CubeCL, which has none of these instructions; see
//! `docs/decisions/0016-attention-for-hopper.md`.
//!
//! Equations, masks and what is kept are those of [`super::device`]. What it trades: a second set of kernels, and memory for lse and D of all
//! queries in the backward pass. What it refuses: other cards, widths and dtypes, and drivers before CUDA 12.5, on which the host would
//! have to wait around each call; the kernels of `flash` serve there.

mod arguments;
mod kernels;

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cudarc::driver::DriverError;

use self::kernels::Kernels;
use super::device::{Tiled, dims};
use crate::compiler::CompilerError;
use crate::device::on_device_thread;

type Memory = CubeTensor<CudaRuntime>;

/// `WIDTH`: elements of a head.
const WIDTH: usize = 128;
/// `TILE`: rows of a tile that has a code.
const TILE: usize = super::flash::EDGE;

/// Why kernels cannot be had or launched.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// There are none for the device, dtype or driver, or a tensor has no address.
    #[error("{0}")]
    Unsuited(String),
    /// The driver refuses.
    #[error("the CUDA driver says: {0}")]
    Driver(#[from] DriverError),
    /// The compiler refuses, or the driver what it made.
    #[error(transparent)]
    Compiler(#[from] CompilerError),
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self::Unsuited(reason)
    }
}

/// The kernels of a device for a dtype, or why there are none.
type Loaded = HashMap<(usize, DType), Result<Kernels, String>>;

/// Runs `job` with the kernels for a device and a dtype, which are compiled first if need be. One at a time, as the kernels of a device
/// share a stream and a counter.
fn with<T: Send>(
    device: &CudaDevice,
    dtype: DType,
    job: impl FnOnce(&Kernels) -> Result<T, Refusal> + Send,
) -> Result<T, Refusal> {
    static LOADED: OnceLock<Mutex<Loaded>> = OnceLock::new();
    on_device_thread::<CudaRuntime, _>(device, || {
        let lock = LOADED.get_or_init(Mutex::default).lock();
        let mut loaded = lock.map_err(|_| "a launch failed before".to_owned())?;
        let load = || Kernels::load(device, dtype).map_err(|refusal| refusal.to_string());
        match loaded.entry((device.index, dtype)).or_insert_with(load) {
            Ok(kernels) => job(kernels),
            Err(reason) => Err(reason.clone().into()),
        }
    })
}

/// Why these kernels do not serve a device for a dtype, if they do not.
#[must_use]
pub fn obstacle(device: &CudaDevice, dtype: DType) -> Option<String> {
    if !matches!(dtype, DType::F16 | DType::BF16) {
        return Some(format!("{dtype:?} is neither f16 nor bf16"));
    }
    with(device, dtype, |_| Ok(())).err().map(|refusal| refusal.to_string())
}

/// Writes `o` and `lse`, if it can; see [`super::device::forward`]. Tensors are such that [`super::flash`] can take them.
pub(crate) fn forward([q, k, v]: [&Memory; 3], index: &Tiled<CudaRuntime>, o: &Memory, lse: &Memory) -> bool {
    dims(q)[3] == WIDTH
        && with(&q.device, q.dtype, |kernels| kernels.forward([q, k, v], index, o, lse)).is_ok()
}

/// Writes the joined gradient, if it can; see [`super::device::backward`].
pub(crate) fn backward(
    [q, k, v]: [&Memory; 3],
    [o, grad]: [&Memory; 2],
    lse: &Memory,
    index: &Tiled<CudaRuntime>,
    joined: &Memory,
) -> bool {
    let run = |kernels: &Kernels| kernels.backward([q, k, v], [o, grad], lse, index, joined);
    dims(q)[3] == WIDTH && with(&q.device, q.dtype, run).is_ok()
}
