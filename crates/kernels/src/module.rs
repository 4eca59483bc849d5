//! CUDA C++ of ours on a device.

use std::ffi::CStr;

use cudarc::driver::{DriverError, result as driver, sys};

use crate::compiler::{self, CompilerError};

/// A source that is compiled and loaded into a context.
#[derive(Debug)]
pub(crate) struct Module(sys::CUmodule);

// SAFETY: the driver's handle may be used from any thread that has bound the context.
unsafe impl Send for Module {}

impl Module {
    /// Compiles a source for an architecture and loads it into the context that is bound to this thread.
    ///
    /// # Errors
    /// If compiler or driver refuse it.
    pub(crate) fn load(
        source: &str,
        architecture: &str,
        defines: &[(&str, usize)],
    ) -> Result<Self, CompilerError> {
        let defines = defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        compiler::load(source, architecture, defines).map(Self)
    }

    /// A kernel, which may ask for so many bytes of dynamic shared memory. It lives as long as the module.
    ///
    /// # Errors
    /// If there is none, or the device has less.
    pub(crate) fn kernel(&self, name: &CStr, shared_bytes: usize) -> Result<sys::CUfunction, DriverError> {
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the module is loaded, and the function found before it is set.
        unsafe {
            let function = driver::module::get_function(self.0, name.to_owned())?;
            driver::function::set_function_attribute(function, most, shared_bytes as i32)?;
            Ok(function)
        }
    }

    /// The address of a global variable.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn global(&self, name: &CStr) -> Result<sys::CUdeviceptr, DriverError> {
        let mut address = 0;
        // SAFETY: the module is loaded; the driver writes one address to a place that is alive.
        unsafe { sys::cuModuleGetGlobal_v2(&raw mut address, std::ptr::null_mut(), self.0, name.as_ptr()) }
            .result()?;
        Ok(address)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: whoever launches its kernels waits for them before; an error leaves it to the context's end.
        unsafe { driver::module::unload(self.0) }.ok();
    }
}
