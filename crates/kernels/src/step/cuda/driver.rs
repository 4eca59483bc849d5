//! The driver's part: a stream of our own behind CubeCL's work, and kernels compiled for the card.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result as driver, sys};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

use super::layout::{THREADS, table_row};
use crate::product::check_context_events;
use crate::step::StepError;

const SOURCE: &str = include_str!("../kernels.cu");

impl From<DriverError> for StepError {
    fn from(error: DriverError) -> Self {
        Self(format!("the CUDA driver says: {error}"))
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
    context: Arc<CudaContext>,
    pub(super) stream: sys::CUstream,
    before: sys::CUevent,
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

impl Driver {
    pub(super) fn open(index: usize) -> Result<Self, StepError> {
        use sys::CUdevice_attribute as Attribute;
        let context = CudaContext::new(index)?;
        check_context_events().map_err(StepError)?;
        context.bind_to_thread()?;
        let attribute = |attribute| {
            let value = context.attribute(attribute)?;
            Ok::<_, DriverError>(usize::try_from(value).unwrap_or(0))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let limits = Limits {
            compute_capability: 10 * major + minor,
            processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_of_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        };
        Ok(Self {
            stream: driver::stream::create(driver::stream::StreamKind::NonBlocking)?,
            before: driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?,
            limits,
            context,
        })
    }

    /// Makes this thread one of the context's.
    pub(super) fn bind(&self) -> Result<(), StepError> {
        Ok(self.context.bind_to_thread()?)
    }

    /// Lets the stream wait for everything that was submitted to the context before.
    pub(super) fn follow(&self) -> Result<(), StepError> {
        let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: context, event and stream are alive and this driver's own.
        unsafe {
            sys::cuCtxRecordEvent(self.context.cu_ctx(), self.before).result()?;
            driver::stream::wait_event(self.stream, self.before, wait)?;
        }
        Ok(())
    }

    /// Waits for the stream.
    pub(super) fn finish(&self) -> Result<(), StepError> {
        // SAFETY: the stream is alive.
        Ok(unsafe { driver::stream::synchronize(self.stream) }?)
    }

    /// Compiles the kernels for 8 `tiles` rows and heads of a width. They live as long as the process.
    pub(super) fn compile(&self, tiles: usize, bf16: bool, width: usize) -> Result<Kernels, StepError> {
        let options = CompileOptions {
            options: vec![
                format!("--gpu-architecture=compute_{}", self.limits.compute_capability),
                format!("-DTILES={tiles}"),
                format!("-DTABLE_ROW={}", table_row(&self.limits)),
                format!("-DBF16={}", u8::from(bf16)),
            ],
            ..CompileOptions::default()
        };
        let compiled = compile_ptx_with_opts(SOURCE, options)
            .map_err(|error| StepError(format!("NVRTC does not compile the kernels: {error:?}")))?;
        let image = CString::new(compiled.to_src()).map_err(|error| StepError(error.to_string()))?;
        // SAFETY: the image is what the compiler made, and ends with a zero; the names are those of its kernels.
        let function = unsafe {
            let module = driver::module::load_data(image.as_ptr().cast::<c_void>())?;
            move |name: &str| {
                let name = CString::new(name).map_err(|error| StepError(error.to_string()))?;
                Ok::<_, StepError>(driver::module::get_function(module, name)?)
            }
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

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: nothing else has the stream and the event; an error leaves them to the context's end.
        unsafe {
            driver::stream::destroy(self.stream).ok();
            driver::event::destroy(self.before).ok();
        }
    }
}
