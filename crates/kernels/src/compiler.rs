//! CUDA C++ of ours to functions of a device, through NVRTC; and whether that works on this machine at all.
//!
//! NVRTC writes PTX of its own version, which a driver of an earlier CUDA does not read. Every kernel here, CubeCL's too, goes that
//! way, so a program asks once, before it has loaded anything.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, DriverError, result as driver, sys};
use cudarc::nvrtc::sys as nvrtc;
use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};

use crate::side_stream::{driver_version, version_name};

/// The smallest program.
const PROBE: &str = "extern \"C\" __global__ void probe() {}";

/// Why there are no functions.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompilerError {
    /// No library.
    #[error(
        "libnvrtc is not on the library path; install the CUDA toolkit, or put the folder of its libraries on LD_LIBRARY_PATH"
    )]
    Missing,
    /// It refuses the source.
    #[error("NVRTC does not compile the kernels: {0}")]
    Source(String),
    /// The driver is older than the compiler.
    #[error(
        "the kernels that NVRTC {compiler} compiles are too new for this driver (CUDA {driver}); install a newer driver, or put a \
         folder with libnvrtc.so of CUDA {driver} first on LD_LIBRARY_PATH"
    )]
    TooNew {
        /// Version of the compiler.
        compiler: String,
        /// Version of the driver's interface.
        driver: String,
    },
    /// The driver refuses what was compiled.
    #[error("the driver does not load the kernels: {0}")]
    Driver(#[from] DriverError),
}

/// A source that is compiled and loaded into a context.
#[derive(Debug)]
pub(crate) struct Module(sys::CUmodule);

// SAFETY: the driver's handle may be used from any thread that has bound the context.
unsafe impl Send for Module {}

impl Module {
    /// Compiles a source for an architecture ("90", or "90a" with what later ones lack) and loads it into the context that is bound
    /// to this thread.
    ///
    /// # Errors
    /// If compiler or driver refuse it.
    pub(crate) fn load(
        source: &str,
        architecture: &str,
        defines: &[(&str, usize)],
    ) -> Result<Self, CompilerError> {
        let image = compile(source, architecture, defines)?;
        // SAFETY: the image is what the compiler made, and ends with a zero.
        let module = unsafe { driver::module::load_data(image.as_ptr().cast::<c_void>()) };
        module.map(Self).map_err(refusal)
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

/// PTX, with a zero at its end.
fn compile(source: &str, architecture: &str, defines: &[(&str, usize)]) -> Result<CString, CompilerError> {
    // SAFETY: only asks whether the library can be opened.
    if !unsafe { nvrtc::is_culib_present() } {
        return Err(CompilerError::Missing);
    }
    let mut options: Vec<String> = defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
    options.push(format!("--gpu-architecture=compute_{architecture}"));
    let options = CompileOptions { options, ..CompileOptions::default() };
    let compiled = compile_ptx_with_opts(source, options).map_err(|error| match error {
        CompileError::CompileError { log, .. } => CompilerError::Source(log.to_string_lossy().into_owned()),
        error => CompilerError::Source(error.to_string()),
    })?;
    CString::new(compiled.to_src()).map_err(|error| CompilerError::Source(error.to_string()))
}

/// Why kernels that are compiled here do not run on devices of a compute capability, if they do not. Tried once a process.
pub(crate) fn obstacle(context: &Arc<CudaContext>, compute_capability: usize) -> Option<String> {
    static FOUND: Mutex<BTreeMap<usize, Option<String>>> = Mutex::new(BTreeMap::new());
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let try_it = || check(context, compute_capability).err().map(|error| error.to_string());
    found.entry(compute_capability).or_insert_with(try_it).clone()
}

fn check(context: &Arc<CudaContext>, compute_capability: usize) -> Result<(), CompilerError> {
    context.bind_to_thread()?;
    Module::load(PROBE, &compute_capability.to_string(), &[]).map(drop)
}

fn refusal(error: DriverError) -> CompilerError {
    match (error.0, driver_version()) {
        (sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, Ok(version)) => {
            CompilerError::TooNew { compiler: compiler_version(), driver: version_name(version) }
        }
        _ => error.into(),
    }
}

fn compiler_version() -> String {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is open, and writes two integers to places that are alive.
    match unsafe { nvrtc::nvrtcVersion(&raw mut major, &raw mut minor) }.result() {
        Ok(()) => format!("{major}.{minor}"),
        Err(_) => "of this machine".to_owned(),
    }
}
