//! The driver's part: a stream of our own behind CubeCL's work, and kernels compiled for the card.

use std::ffi::CStr;

use cudarc::driver::{CudaContext, DriverError, result as driver, sys};

use super::layout::{THREADS, Variant};
use crate::compiler::CompilerError;
use crate::limits::Limits;
use crate::module::Module;
use crate::side_stream::{SideStream, driver_version};
use crate::step::StepError;

const SOURCE: &str = include_str!("../kernels.cu");
/// The kernel, and where it finds what the step is.
const KERNEL: &CStr = c"run_step";
const STEP: &CStr = c"step";

impl From<DriverError> for StepError {
    fn from(error: DriverError) -> Self {
        Self::Refused(format!("the CUDA driver says: {error}"))
    }
}

impl From<CompilerError> for StepError {
    fn from(error: CompilerError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// A stream of its own on a device that CubeCL uses too.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) stream: SideStream,
    pub(super) limits: Limits,
}

/// A kernel of a variant.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) function: sys::CUfunction,
    /// Where it finds what the step is.
    pub(super) step: sys::CUdeviceptr,
    /// Rows of the step that it finds there.
    pub(super) told: Option<usize>,
    /// What both are parts of. The runner waits for every step.
    _module: Module,
}

impl Driver {
    pub(super) fn open(index: usize) -> Result<Self, StepError> {
        let context = CudaContext::new(index)?;
        let version = driver_version().map_err(StepError::Refused)?;
        let limits = Limits::of(&context)?;
        Ok(Self { stream: SideStream::open(context, version)?, limits })
    }

    /// Compiles the kernel of a variant and loads it.
    pub(super) fn compile(
        &self,
        variant: Variant,
        bf16: bool,
        plain: bool,
        width: usize,
    ) -> Result<Kernel, StepError> {
        let Variant { tiles, one, table_row, slice, depth, chunk } = variant;
        let defines = [
            ("TILES", tiles),
            ("ONE", usize::from(one)),
            ("TABLE_ROW", table_row),
            ("SLICE", slice),
            ("DEPTH", depth),
            ("CHUNK", chunk),
            ("WIDTH", width),
            ("PLAIN", plain.into()),
            ("BF16", bf16.into()),
        ];
        let module = Module::load(SOURCE, &self.limits.compute_capability.to_string(), &defines)?;
        let function = module.kernel(KERNEL, self.limits.shared_of_block)?;
        Ok(Kernel { function, step: module.global(STEP)?, told: None, _module: module })
    }

    /// Blocks of a kernel that a multiprocessor runs at a time with so much shared memory.
    pub(super) fn resident(&self, kernel: &Kernel, shared: usize) -> Result<usize, StepError> {
        // SAFETY: the function lives as long as the kernel.
        let blocks = unsafe {
            driver::occupancy::max_active_block_per_multiprocessor(kernel.function, THREADS as i32, shared)
        }?;
        Ok(usize::try_from(blocks).unwrap_or(0))
    }
}
