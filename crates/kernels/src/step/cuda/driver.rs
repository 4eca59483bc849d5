//! The driver's part: a stream of our own behind CubeCL's work, and kernels compiled for the card.

use std::ffi::CString;

use cudarc::driver::{CudaContext, DriverError, result as driver, sys};

use super::layout::{THREADS, Variant};
use crate::compiler::{self, CompilerError};
use crate::side_stream::{SideStream, driver_version};
use crate::step::StepError;

const SOURCE: &str = include_str!("../kernels.cu");
/// The kernel, and where it finds what the step is.
const KERNEL: &str = "run_step";
const STEP: &str = "step";

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

/// What a card has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// 10 major + minor.
    pub(super) compute_capability: usize,
    /// Multiprocessors.
    pub(super) processors: usize,
    /// Bytes of shared memory that one block may have.
    pub(super) shared_of_block: usize,
    /// Bytes of shared memory before those that a block may have.
    pub(super) reserved_shared: usize,
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
    module: sys::CUmodule,
    pub(super) function: sys::CUfunction,
    /// Where it finds what the step is.
    pub(super) step: sys::CUdeviceptr,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: the runner waits for every step, so nothing uses the module.
        unsafe { driver::module::unload(self.module) }.ok();
    }
}

impl Limits {
    /// Those of a device.
    pub(super) fn of(context: &CudaContext) -> Result<Self, DriverError> {
        use sys::CUdevice_attribute as Attribute;
        let attribute = |attribute| {
            let value = context.attribute(attribute)?;
            Ok::<_, DriverError>(usize::try_from(value).unwrap_or(0))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(Self {
            compute_capability: 10 * major + minor,
            processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_of_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            reserved_shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK)?,
        })
    }
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
        let defines = defines.into_iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        let module = compiler::load(SOURCE, self.limits.compute_capability, defines)?;
        let name = |name: &str| CString::new(name).map_err(|error| StepError::Refused(error.to_string()));
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the module was just loaded, and the function found.
        unsafe {
            let function = driver::module::get_function(module, name(KERNEL)?)?;
            driver::function::set_function_attribute(function, most, self.limits.shared_of_block as i32)?;
            let mut step = 0;
            sys::cuModuleGetGlobal_v2(&raw mut step, std::ptr::null_mut(), module, name(STEP)?.as_ptr())
                .result()?;
            Ok(Kernel { module, function, step })
        }
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
