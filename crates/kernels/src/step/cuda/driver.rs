//! The driver's part: a stream of our own behind CubeCL's work, and kernels compiled for the card.

use std::ffi::CString;

use cudarc::driver::{CudaContext, DriverError, result as driver, sys};

use super::layout::{THREADS, table_row};
use crate::compiler::{self, CompilerError};
use crate::side_stream::{SideStream, driver_version, version_name};
use crate::step::StepError;

const SOURCE: &str = include_str!("../kernels.cu");
/// The first driver interface with launches that have attributes.
const LAUNCH_ATTRIBUTES: i32 = 11_080;

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
}

/// A stream of its own on a device that CubeCL uses too.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) stream: SideStream,
    pub(super) limits: Limits,
}

/// Kernels for up to 8, 16 or 32 rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels {
    pub(super) product: sys::CUfunction,
    pub(super) attend: sys::CUfunction,
    pub(super) embed: sys::CUfunction,
    pub(super) normalise: sys::CUfunction,
    pub(super) choose: sys::CUfunction,
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
        })
    }
}

impl Driver {
    pub(super) fn open(index: usize) -> Result<Self, StepError> {
        let context = CudaContext::new(index)?;
        let version = driver_version().map_err(StepError::Refused)?;
        if version < LAUNCH_ATTRIBUTES {
            return Err(StepError::Unsupported(format!(
                "the driver speaks CUDA {}, and 11.8 is needed",
                version_name(version)
            )));
        }
        let limits = Limits::of(&context)?;
        Ok(Self { stream: SideStream::open(context, version)?, limits })
    }

    /// Compiles the kernels for 8 `tiles` rows and heads of a width. They live as long as the process.
    pub(super) fn compile(&self, tiles: usize, bf16: bool, width: usize) -> Result<Kernels, StepError> {
        let defines = vec![
            format!("-DTILES={tiles}"),
            format!("-DTABLE_ROW={}", table_row(&self.limits)),
            format!("-DBF16={}", u8::from(bf16)),
        ];
        let module = compiler::load(SOURCE, self.limits.compute_capability, defines)?;
        let function = |name: &str| {
            let name = CString::new(name).map_err(|error| StepError::Refused(error.to_string()))?;
            // SAFETY: the module was just loaded and stays.
            Ok::<_, StepError>(unsafe { driver::module::get_function(module, name) }?)
        };
        let product = function("step_product")?;
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function was just found.
        unsafe {
            driver::function::set_function_attribute(product, most, self.limits.shared_of_block as i32)
        }?;
        Ok(Kernels {
            product,
            attend: function(&format!("step_attend_{width}"))?,
            embed: function("step_embed")?,
            normalise: function("step_normalise")?,
            choose: function("step_choose")?,
        })
    }

    /// Blocks of the product that a multiprocessor runs at a time with so much shared memory.
    pub(super) fn resident(&self, kernels: &Kernels, shared: usize) -> Result<usize, StepError> {
        // SAFETY: the function lives as long as the process.
        let blocks = unsafe {
            driver::occupancy::max_active_block_per_multiprocessor(kernels.product, THREADS as i32, shared)
        }?;
        Ok(usize::try_from(blocks).unwrap_or(0))
    }
}
