//! What a CUDA device has, as kernels that are written for it must know it.

use cudarc::driver::{CudaContext, DriverError, sys};

/// What a card has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// 10 major + minor.
    pub(crate) compute_capability: usize,
    /// Multiprocessors.
    pub(crate) processors: usize,
    /// Bytes of shared memory that one block may have.
    pub(crate) shared_of_block: usize,
    /// Bytes of shared memory before those that a block may have.
    pub(crate) reserved_shared: usize,
}

impl Limits {
    /// Those of a device.
    pub(crate) fn of(context: &CudaContext) -> Result<Self, DriverError> {
        use sys::CUdevice_attribute as Attribute;
        let attribute = |attribute| {
            let value = context.attribute(attribute)?;
            Ok::<_, DriverError>(usize::try_from(value).unwrap_or(0))
        };
        Ok(Self {
            compute_capability: compute_capability(context)?,
            processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_of_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            reserved_shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK)?,
        })
    }
}

/// Ten times the major number and the minor one.
pub(crate) fn compute_capability(context: &CudaContext) -> Result<usize, DriverError> {
    let (major, minor) = context.compute_capability()?;
    Ok(usize::try_from(10 * major + minor).unwrap_or(0))
}
