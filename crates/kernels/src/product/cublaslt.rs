//! Products in cuBLASLt, on Burn's buffers, and from driver 12.5 on without waiting for the device.
//!
//! They go to a [`SideStream`], which keeps them in order with what CubeCL submits. What it trades: a product is
//! submitted by CubeCL's device thread, which knows the addresses, and on older drivers the host waits before and after each product. What it
//! refuses: cards whose library cannot be opened; Burn multiplies there.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, OnceLock};

use burn::tensor::DType;
use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as DescAttribute, cublasLtMatmulPreferenceAttributes_t as Preference,
    cublasLtMatrixLayout_t, cudaDataType, is_culib_present,
};
use cudarc::driver::CudaContext;

use super::Product;
use crate::card::WORKSPACE_BYTES;
use crate::device::{Matrix, on_device_thread};
use crate::side_stream::{SideStream, driver_version, version_name};

/// cuBLAS's numbers for a matrix as it is and for its transpose.
const OPERATIONS: [i32; 2] = [0, 1];

/// Everything that decides which algorithm is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    dims: [usize; 3],
    transposed: [bool; 2],
    /// Of a, b, c and c₀.
    strides: [usize; 4],
    dtypes: [DType; 2],
    accumulates: bool,
    aligned: bool,
}

/// Descriptors and the algorithm of one kind of product; they live as long as the process.
#[derive(Clone, Copy)]
struct Planned {
    operation: cublasLtMatmulDesc_t,
    a: cublasLtMatrixLayout_t,
    b: cublasLtMatrixLayout_t,
    c: cublasLtMatrixLayout_t,
    source: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
}

/// The library on one device.
struct Library {
    stream: SideStream,
    handle: cublasLtHandle_t,
    workspace: u64,
    planned: HashMap<Key, Option<Planned>>,
}

// SAFETY: the raw handles belong to the driver and may be used from any thread, one at a time; a mutex guards them.
unsafe impl Send for Library {}

type Libraries = Mutex<HashMap<usize, Result<Library, String>>>;

fn libraries() -> &'static Libraries {
    static LIBRARIES: OnceLock<Libraries> = OnceLock::new();
    LIBRARIES.get_or_init(Libraries::default)
}

/// Runs `job` with the device's library, which is opened first if need be.
fn with<T: Send>(device: &CudaDevice, job: impl FnOnce(&mut Library) -> T + Send) -> Result<T, String> {
    on_device_thread::<CudaRuntime, _>(device, || {
        let mut all = libraries().lock().map_err(|_| "a product failed before".to_string())?;
        let library = all.entry(device.index).or_insert_with(|| Library::open(device));
        library.as_mut().map(job).map_err(|reason| reason.clone())
    })
}

/// Why the host waits before and after every product on a device, if it does.
///
/// # Errors
/// If the device has no library.
pub(super) fn waits(device: &CudaDevice) -> Result<Option<String>, String> {
    let waits = with(device, |library| library.stream.waits())?;
    let reason = |version| {
        format!(
            "the driver speaks CUDA {}, and 12.5 is needed to order it on the device",
            version_name(version)
        )
    };
    Ok(if waits { Some(driver_version().map(reason)?) } else { None })
}

/// Runs a product; false if this device has no library or the library no algorithm for it.
pub(super) fn run(product: &Product<CudaRuntime>) -> bool {
    with(&product.c.tensor.device, |library| library.run(product)).unwrap_or(false)
}

impl Library {
    fn open(device: &CudaDevice) -> Result<Self, String> {
        // SAFETY: only asks whether the library can be opened.
        if !unsafe { is_culib_present() } {
            return Err("libcublasLt is not on the library path".into());
        }
        let context = CudaContext::new(device.index).map_err(|error| format!("no CUDA context: {error}"))?;
        let version = driver_version()?;
        let stream =
            SideStream::open(context, version).map_err(|error| format!("no CUDA stream: {error}"))?;
        Self::with_stream(stream, device).map_err(|error| format!("cuBLASLt: {error}"))
    }

    fn with_stream(stream: SideStream, device: &CudaDevice) -> Result<Self, Box<dyn std::error::Error>> {
        let client = CudaRuntime::client(device);
        let workspace = client.get_resource(client.empty(WORKSPACE_BYTES))?;
        let pointer = workspace.resource().ptr;
        // The workspace stays allocated for the life of the process.
        std::mem::forget(workspace);
        Ok(Self { stream, handle: lt::create_handle()?, workspace: pointer, planned: HashMap::new() })
    }

    fn run(&mut self, product: &Product<CudaRuntime>) -> bool {
        let resource = |x: &Matrix<CudaRuntime>| x.tensor.client.get_resource(x.tensor.handle.clone());
        let operands = [&product.a, &product.b, &product.c];
        let [Ok(a), Ok(b), Ok(c)] = operands.map(resource) else { return false };
        // Held until the product is submitted, as the other operands are. Each costs a round trip, so c is asked for once.
        let (source, other) = match &product.plus {
            Some(source) => match resource(source) {
                Ok(other) => (source, Some(other)),
                Err(_) => return false,
            },
            None => (&product.c, None),
        };
        let place = |x: &Matrix<CudaRuntime>, start: u64| start + (x.offset * x.dtype().size()) as u64;
        let pointers = [
            place(&product.a, a.resource().ptr),
            place(&product.b, b.resource().ptr),
            place(&product.c, c.resource().ptr),
            place(source, other.as_ref().unwrap_or(&c).resource().ptr),
        ];
        let operands = [&product.a, &product.b, &product.c, source];
        if !pointers.iter().all(|pointer| pointer.is_multiple_of(16)) {
            return false;
        }
        let key = Key {
            dims: product.dims(),
            transposed: [product.a.transposed, product.b.transposed],
            strides: operands.map(Matrix::row_stride),
            dtypes: [product.a.dtype(), product.c.dtype()],
            accumulates: product.plus.is_some(),
            aligned: pointers.iter().all(|pointer| pointer.is_multiple_of(256)),
        };
        let handle = self.handle;
        let planned = self.planned.entry(key).or_insert_with(|| plan(handle, &key).ok());
        match *planned {
            Some(planned) => self.submit(&planned, pointers, product).is_ok(),
            None => false,
        }
    }

    /// Puts the product between what was submitted before and what will be.
    fn submit(
        &self,
        planned: &Planned,
        [a, b, c, source]: [u64; 4],
        product: &Product<CudaRuntime>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        self.stream.bind()?;
        self.stream.follow()?;
        let beta: f32 = if product.plus.is_some() { 1.0 } else { 0.0 };
        let alpha = product.alpha;
        // SAFETY: the stream is this library's own and alive. The pointers come from CubeCL's allocator for tensors that the
        // caller holds until this returns, and whose memory is given to others only behind what `lead` submits. Layouts
        // were made from the tensors' shapes and strides, so the library stays inside them. It reads row-major matrices as
        // their transposes, hence b before a.
        unsafe {
            lt::matmul(
                self.handle,
                planned.operation,
                (&raw const alpha).cast::<c_void>(),
                (&raw const beta).cast::<c_void>(),
                b as *const c_void,
                planned.b,
                a as *const c_void,
                planned.a,
                source as *const c_void,
                planned.source,
                c as *mut c_void,
                planned.c,
                &raw const planned.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.raw().cast(),
            )?;
        }
        Ok(self.stream.lead()?)
    }
}

fn data_type(dtype: DType) -> Option<cudaDataType> {
    match dtype {
        DType::F32 => Some(cudaDataType::CUDA_R_32F),
        DType::F16 => Some(cudaDataType::CUDA_R_16F),
        DType::BF16 => Some(cudaDataType::CUDA_R_16BF),
        _ => None,
    }
}

/// Asks the library for its best algorithm. Sums are taken in f32.
fn plan(handle: cublasLtHandle_t, key: &Key) -> Result<Planned, lt::CublasError> {
    use cudarc::cublaslt::sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED;
    let unsupported = lt::CublasError(CUBLAS_STATUS_NOT_SUPPORTED);
    let [factor, result] = key.dtypes.map(data_type);
    let (factor, result) = (factor.ok_or(unsupported)?, result.ok_or(unsupported)?);
    let [m, n, k] = key.dims.map(|dim| dim as u64);
    let [a_transposed, b_transposed] = key.transposed;
    let [a_stride, b_stride, c_stride, source_stride] = key.strides.map(|stride| stride as i64);
    let operation =
        lt::create_matmul_desc(cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F)?;
    let turned = |transposed| OPERATIONS[usize::from(transposed)];
    let layout = |dtype, transposed, rows, columns, stride| {
        // Row-major [rows, columns] is column-major [columns, rows].
        let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
        lt::create_matrix_layout(dtype, columns, rows, stride)
    };
    let a = layout(factor, a_transposed, m, k, a_stride)?;
    let b = layout(factor, b_transposed, k, n, b_stride)?;
    let c = layout(result, false, m, n, c_stride)?;
    let source = layout(result, false, m, n, source_stride)?;
    let attributes = [
        (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, turned(b_transposed)),
        (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, turned(a_transposed)),
    ];
    let workspace = WORKSPACE_BYTES;
    let alignment: u32 = if key.aligned { 256 } else { 16 };
    let preference = lt::create_matmul_pref()?;
    // SAFETY: descriptor and preference were just made; each attribute is read from a live variable of its size.
    let found = unsafe {
        for (attribute, value) in attributes {
            let size = size_of::<i32>();
            lt::set_matmul_desc_attribute(operation, attribute, (&raw const value).cast(), size)?;
        }
        let bytes = (&raw const workspace).cast();
        lt::set_matmul_pref_attribute(
            preference,
            Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            bytes,
            size_of::<usize>(),
        )?;
        for attribute in [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            let bytes = (&raw const alignment).cast();
            lt::set_matmul_pref_attribute(preference, attribute, bytes, size_of::<u32>())?;
        }
        let found = lt::get_matmul_algo_heuristic(handle, operation, b, a, source, c, preference);
        lt::destroy_matmul_pref(preference)?;
        found?
    };
    Ok(Planned { operation, a, b, c, source, algorithm: found.algo })
}
