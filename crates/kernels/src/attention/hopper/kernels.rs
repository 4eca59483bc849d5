//! The kernels on a device, and their launches in order with what CubeCL submits.

use std::ffi::c_void;

use burn::tensor::DType;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cudarc::driver::{CudaContext, DriverError, result as driver, sys};

use super::arguments::{Rows, Statistics, Task, TensorMap};
use super::{Memory, Refusal, TILE};
use crate::attention::device::{Tiled, dims};
use crate::device::uninitialized;
use crate::limits::Limits;
use crate::module::Module;
use crate::side_stream::{SideStream, address_of, driver_version};

const SOURCE: &str = concat!(
    include_str!("instructions.cu"),
    include_str!("common.cu"),
    include_str!("forward.cu"),
    include_str!("gradients.cu")
);

/// Hopper, with what no other card has.
const COMPUTE_CAPABILITY: usize = 90;
const ARCHITECTURE: &str = "90a";
/// `THREADS`.
const THREADS: u32 = 384;
/// `ROOM_BYTES`: shared memory of a block, of which the kernels' rooms take most.
const ROOM_BYTES: usize = 200 << 10;
/// Threads and rows of a block of `hopper_statistics`.
const STATISTICS_THREADS: u32 = 256;
const STATISTICS_ROWS: usize = 16;

/// The kernels of one dtype.
#[derive(Debug)]
pub(super) struct Kernels {
    stream: SideStream,
    /// Blocks that run at a time.
    processors: u32,
    forward: sys::CUfunction,
    statistics: sys::CUfunction,
    query_gradient: sys::CUfunction,
    key_gradient: sys::CUfunction,
    /// What the functions are parts of. It lives as long as the process.
    _module: Module,
}

// SAFETY: the driver's handles may be used from any thread that has bound the context, one at a time; a mutex guards them.
unsafe impl Send for Kernels {}

/// The pointer to an argument that a launch takes; it is copied before the launch returns.
fn argument<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

impl Kernels {
    /// Compiles and loads them.
    pub(super) fn load(device: &CudaDevice, dtype: DType) -> Result<Self, Refusal> {
        let context = CudaContext::new(device.index)?;
        let limits = Limits::of(&context)?;
        if limits.compute_capability != COMPUTE_CAPABILITY {
            return Err(Refusal::Unsuited(format!(
                "compute capability {} is not Hopper's",
                limits.compute_capability
            )));
        }
        let stream = SideStream::open(context, driver_version().map_err(Refusal::Unsuited)?)?;
        if stream.waits() {
            return Err(Refusal::Unsuited("the driver is older than CUDA 12.5".into()));
        }
        let defines = [("BF16", usize::from(dtype == DType::BF16)), ("ROOM_BYTES", ROOM_BYTES)];
        let module = Module::load(SOURCE, ARCHITECTURE, &defines)?;
        Ok(Self {
            stream,
            processors: limits.processors as u32,
            forward: module.kernel(c"hopper_forward", ROOM_BYTES)?,
            statistics: module.kernel(c"hopper_statistics", 0)?,
            query_gradient: module.kernel(c"hopper_query_gradient", ROOM_BYTES)?,
            key_gradient: module.kernel(c"hopper_key_gradient", ROOM_BYTES)?,
            _module: module,
        })
    }

    /// See [`super::forward`].
    pub(super) fn forward(
        &self,
        [q, k, v]: [&Memory; 3],
        index: &Tiled<CudaRuntime>,
        o: &Memory,
        lse: &Memory,
    ) -> Result<(), Refusal> {
        self.stream.bind()?;
        let maps = [TensorMap::new(q)?, TensorMap::new(k)?, TensorMap::new(v)?];
        let tokens = index.tokens();
        let task = Task::of_queries(q, k, &tokens, &index.ranges)?;
        let (o, log_sums) = (Rows::new(o)?, address_of(lse)?);
        let [q, k, v] = maps.each_ref().map(argument);
        let mut arguments = [q, k, v, argument(&task), argument(&o), argument(&log_sums)];
        self.in_order(|| self.share_out(self.forward, &task, &mut arguments))
    }

    /// See [`super::backward`].
    pub(super) fn backward(
        &self,
        [q, k, v]: [&Memory; 3],
        [o, grad]: [&Memory; 2],
        lse: &Memory,
        index: &Tiled<CudaRuntime>,
        joined: &Memory,
    ) -> Result<(), Refusal> {
        self.stream.bind()?;
        let ([b, h, t, _], g) = (dims(q), dims(k)[1]);
        let padded = t.next_multiple_of(2 * TILE);
        // Given to others only behind what is submitted here.
        let memory = uninitialized(q, [2, b, h, padded], DType::F32);
        let statistics = Statistics::new(address_of(&memory)?, b * h, padded);
        let [q_map, k_map, v_map] = [TensorMap::new(q)?, TensorMap::new(k)?, TensorMap::new(v)?];
        let grad_map = TensorMap::new(grad)?;
        let tokens = index.tokens();
        let queries = Task::of_queries(q, k, &tokens, &index.ranges)?;
        let keys = queries.of_keys(&index.ranges)?;
        let joined = Rows::joined(joined)?;
        let (to_keys, to_values) = (joined.starting_at(h), joined.starting_at(h + g));
        let (query_maps, key_maps) = ([q_map, grad_map, k_map, v_map], [k_map, v_map, q_map, grad_map]);
        let (o, grad, lse) = (Rows::new(o)?, Rows::new(grad)?, address_of(lse)?);
        let mut of_statistics =
            [argument(&o), argument(&grad), argument(&lse), argument(&statistics), argument(&queries)];
        let mut of_queries =
            [argument(&query_maps), argument(&queries), argument(&statistics), argument(&joined)];
        let mut of_keys = [
            argument(&key_maps),
            argument(&keys),
            argument(&statistics),
            argument(&to_keys),
            argument(&to_values),
        ];
        self.in_order(|| {
            let blocks = ((padded / STATISTICS_ROWS) as u32, (b * h) as u32, 1);
            self.launch(self.statistics, blocks, STATISTICS_THREADS, 0, &mut of_statistics)?;
            self.share_out(self.query_gradient, &queries, &mut of_queries)?;
            self.share_out(self.key_gradient, &keys, &mut of_keys)
        })
    }

    /// Submits launches between what was submitted before and what will be.
    fn in_order(&self, launches: impl FnOnce() -> Result<(), DriverError>) -> Result<(), Refusal> {
        self.stream.follow()?;
        launches()?;
        Ok(self.stream.lead()?)
    }

    /// Launches a kernel whose blocks share out a task.
    fn share_out(
        &self,
        kernel: sys::CUfunction,
        task: &Task,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DriverError> {
        self.launch(kernel, (self.processors.min(task.items()), 1, 1), THREADS, ROOM_BYTES, arguments)
    }

    fn launch(
        &self,
        kernel: sys::CUfunction,
        blocks: (u32, u32, u32),
        threads: u32,
        shared: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DriverError> {
        // SAFETY: the arguments are what the kernel declares, and live until the call returns. Addresses in them are those of tensors
        // that the caller holds, of the shapes that they were made from; their memory is given to others only behind what
        // `lead` submits.
        unsafe {
            driver::launch_kernel(
                kernel,
                blocks,
                (threads, 1, 1),
                shared as u32,
                self.stream.raw(),
                arguments,
            )
        }
    }
}
