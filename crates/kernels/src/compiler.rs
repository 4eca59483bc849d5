//! CUDA C++ of ours to functions of a device, through NVRTC; and whether that works on this machine at all.
//!
//! NVRTC writes PTX of its own version, which a driver of an earlier CUDA does not read. Every kernel here, CubeCL's too, goes that
//! way, so a program asks once, before it has loaded anything.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{fs, process};

use cudarc::driver::{CudaContext, DriverError, result as driver, sys};
use cudarc::nvrtc::sys as nvrtc;
use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};

use crate::side_stream::{driver_version, version_name};

/// The smallest program.
const PROBE: &str = "extern \"C\" __global__ void probe() {}";

/// Where what was compiled stays for the next start.
static KEPT: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Keeps compiled sources in a folder that belongs to one [`cuda_target`](crate::cuda_target) from now on. Does nothing if it was called
/// before.
pub(crate) fn keep_in(folder: Option<PathBuf>) {
    KEPT.get_or_init(|| folder);
}

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

/// Compiles a source for an architecture ("90", or "90a" with what later cards lack) and loads it into the context that is bound to this
/// thread.
///
/// # Errors
/// If compiler or driver refuse it.
pub(crate) fn load(
    source: &str,
    architecture: &str,
    defines: Vec<String>,
) -> Result<sys::CUmodule, CompilerError> {
    // SAFETY: only asks whether the library can be opened.
    if !unsafe { nvrtc::is_culib_present() } {
        return Err(CompilerError::Missing);
    }
    let mut options = defines;
    options.push(format!("--gpu-architecture=compute_{architecture}"));
    let kept = KEPT.get().and_then(Option::as_ref).map(|folder| folder.join(file_name(source, &options)));
    // A file that is cut, or was compiled for something else, is no worse than none.
    if let Some(functions) = kept.as_ref().and_then(|file| load_image(&fs::read_to_string(file).ok()?).ok()) {
        return Ok(functions);
    }
    let image = compile(source, options)?;
    let functions = load_image(&image)?;
    if let Some(file) = kept {
        // Compiled again at the next start if the disk is full or read-only.
        let _ = keep(&file, &image);
    }
    Ok(functions)
}

/// PTX of a source.
fn compile(source: &str, options: Vec<String>) -> Result<String, CompilerError> {
    let options = CompileOptions { options, ..CompileOptions::default() };
    let compiled = compile_ptx_with_opts(source, options).map_err(|error| match error {
        CompileError::CompileError { log, .. } => CompilerError::Source(log.to_string_lossy().into_owned()),
        error => CompilerError::Source(error.to_string()),
    })?;
    Ok(compiled.to_src())
}

/// PTX as functions of the context that is bound to this thread.
fn load_image(image: &str) -> Result<sys::CUmodule, CompilerError> {
    let image = CString::new(image).map_err(|error| CompilerError::Source(error.to_string()))?;
    // SAFETY: the image ends with a zero, and the driver refuses what is no PTX.
    unsafe { driver::module::load_data(image.as_ptr().cast::<c_void>()) }.map_err(refusal)
}

/// Where a source is kept; the folder belongs to one compiler. Another version of the hasher finds nothing, and compiles again.
fn file_name(source: &str, options: &[String]) -> String {
    let mut hasher = DefaultHasher::new();
    (source, options).hash(&mut hasher);
    format!("{:016x}.ptx", hasher.finish())
}

/// Writes a file whole or not at all.
fn keep(file: &Path, image: &str) -> std::io::Result<()> {
    let temporary = file.with_extension(format!("{}.tmp", process::id()));
    fs::create_dir_all(file.parent().unwrap_or(file))?;
    fs::write(&temporary, image)?;
    fs::rename(temporary, file)
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
    let module = load(PROBE, &compute_capability.to_string(), Vec::new())?;
    // SAFETY: nothing uses the module.
    Ok(unsafe { driver::module::unload(module) }?)
}

fn refusal(error: DriverError) -> CompilerError {
    match (error.0, driver_version()) {
        (sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, Ok(version)) => {
            let compiler = compiler_version().unwrap_or_else(|| "of this machine".to_owned());
            CompilerError::TooNew { compiler, driver: version_name(version) }
        }
        _ => error.into(),
    }
}

/// Version of NVRTC, if there is one.
pub(crate) fn compiler_version() -> Option<String> {
    // SAFETY: only asks whether the library can be opened.
    if !unsafe { nvrtc::is_culib_present() } {
        return None;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is open, and writes two integers to places that are alive.
    let status = unsafe { nvrtc::nvrtcVersion(&raw mut major, &raw mut minor) };
    status.result().ok().map(|()| format!("{major}.{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_source_is_found_by_source_and_options() {
        let options = |value: &str| vec![value.to_owned()];
        let name = file_name(PROBE, &options("-DN=1"));
        assert_eq!(name, file_name(PROBE, &options("-DN=1")));
        assert_ne!(name, file_name(PROBE, &options("-DN=2")));
        assert_ne!(name, file_name("", &options("-DN=1")));
    }
}
