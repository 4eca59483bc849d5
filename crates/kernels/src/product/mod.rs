//! Matrix products of device tensors, into a place that exists already.
//!
//! ```text
//! c ← α · a b + c₀             a [m, k]   b [k, n]   c [m, n], each a part of a row-major tensor or its transpose
//! ```
//!
//! A runtime with a vendor library runs it there; others multiply with Burn and write the result into its place with one
//! kernel. What it refuses: to allocate the result, so that neighbouring results share a buffer.

#[cfg(feature = "cuda")]
mod cublaslt;

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::attention::device::Tiled;
#[cfg(feature = "cuda")]
use crate::attention::hopper;
use crate::device::{Cube, Matrix, uninitialized};
use crate::{Card, Pages, StepError, StepProgram, StepRunner};

/// One product.
pub(crate) struct Product<R: CubeRuntime> {
    /// a.
    pub(crate) a: Matrix<R>,
    /// b, in the dtype of a.
    pub(crate) b: Matrix<R>,
    /// c, not transposed, in the dtype of a or in f32.
    pub(crate) c: Matrix<R>,
    /// α.
    pub(crate) alpha: f32,
    /// c₀, in shape and dtype of c, if the product is added to anything; it is not c itself.
    pub(crate) plus: Option<Matrix<R>>,
}

impl<R: CubeRuntime> Product<R> {
    /// `[m, n, k]`.
    fn dims(&self) -> [usize; 3] {
        let ([m, k], [b_k, n]) = (self.a.shape(), self.b.shape());
        assert_eq!(k, b_k, "both factors have the same inner dimension");
        assert_eq!([m, n], self.c.shape(), "the result has the product's shape");
        [m, n, k]
    }
}

/// A runtime and the library that multiplies for it.
#[allow(private_interfaces, reason = "implemented in this crate only")]
pub trait ProductRuntime: CubeRuntime {
    /// The card behind a device.
    fn card(device: &Self::Device) -> Card;

    /// Runs the product in the vendor's library if there is one; says whether it did.
    #[doc(hidden)]
    fn vendor_product(product: &Product<Self>) -> bool;

    /// Writes `o` and `lse` of queries, keys and values with kernels that are for this runtime alone, if it has some that can; says whether
    /// it did. See [`attention::device::forward`](crate::attention::device::forward).
    #[doc(hidden)]
    fn own_attention(
        qkv: [&CubeTensor<Self>; 3],
        index: &Tiled<Self>,
        o: &CubeTensor<Self>,
        lse: &CubeTensor<Self>,
    ) -> bool;

    /// The same of the joined gradient, from o and its gradient; see [`attention::device::backward`](crate::attention::device::backward).
    #[doc(hidden)]
    fn own_attention_gradient(
        qkv: [&CubeTensor<Self>; 3],
        o_and_gradient: [&CubeTensor<Self>; 2],
        lse: &CubeTensor<Self>,
        index: &Tiled<Self>,
        joined: &CubeTensor<Self>,
    ) -> bool;

    /// Floats `[1, n]` on the device by a way that is for this runtime alone, if it has one that works; see
    /// [`KernelBackend::upload`](crate::KernelBackend::upload).
    #[doc(hidden)]
    fn own_upload(
        device: &Self::Device,
        dtype: DType,
        count: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Option<CubeTensor<Self>>;

    /// See [`KernelBackend::step_runner`](crate::KernelBackend::step_runner).
    #[doc(hidden)]
    fn step_runner(
        program: &StepProgram<Cube<Self>>,
        pages: &[Pages<Cube<Self>>],
    ) -> Result<Box<dyn StepRunner<Cube<Self>>>, StepError>;

    /// See [`KernelBackend::step_bytes`](crate::KernelBackend::step_bytes).
    #[doc(hidden)]
    fn step_bytes(program: &StepProgram<Cube<Self>>) -> usize;
}

#[cfg(feature = "wgpu")]
#[allow(private_interfaces, reason = "implemented in this crate only")]
impl ProductRuntime for cubecl::wgpu::WgpuRuntime {
    fn card(device: &Self::Device) -> Card {
        Card {
            name: format!("{device:?}"),
            compute_capability: None,
            memory_bytes: None,
            free_bytes: None,
            driver: None,
            without_library: None,
            library_waits: None,
            without_compiler: None,
        }
    }

    fn own_upload(
        _: &Self::Device,
        _: DType,
        _: usize,
        _: &mut dyn FnMut(&mut [u8]),
    ) -> Option<CubeTensor<Self>> {
        None
    }

    fn vendor_product(_: &Product<Self>) -> bool {
        false
    }

    fn own_attention(
        _: [&CubeTensor<Self>; 3],
        _: &Tiled<Self>,
        _: &CubeTensor<Self>,
        _: &CubeTensor<Self>,
    ) -> bool {
        false
    }

    fn own_attention_gradient(
        _: [&CubeTensor<Self>; 3],
        _: [&CubeTensor<Self>; 2],
        _: &CubeTensor<Self>,
        _: &Tiled<Self>,
        _: &CubeTensor<Self>,
    ) -> bool {
        false
    }

    fn step_runner(
        _: &StepProgram<Cube<Self>>,
        _: &[Pages<Cube<Self>>],
    ) -> Result<Box<dyn StepRunner<Cube<Self>>>, StepError> {
        Err(StepError::Unsupported("there are kernels for CUDA only".into()))
    }

    fn step_bytes(_: &StepProgram<Cube<Self>>) -> usize {
        0
    }
}

#[cfg(feature = "cuda")]
#[allow(private_interfaces, reason = "implemented in this crate only")]
impl ProductRuntime for cubecl::cuda::CudaRuntime {
    fn card(device: &Self::Device) -> Card {
        let (library_waits, without_library) = match cublaslt::waits(device) {
            Ok(waits) => (waits, None),
            Err(reason) => (None, Some(reason)),
        };
        let driver = crate::side_stream::driver_version();
        Card {
            driver: driver.ok().and_then(|version| u32::try_from(version).ok()),
            without_library,
            library_waits,
            ..crate::card::cuda(device.index)
        }
    }

    fn own_upload(
        device: &Self::Device,
        dtype: DType,
        count: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Option<CubeTensor<Self>> {
        crate::upload::cuda::upload(device, dtype, count, fill)
    }

    fn vendor_product(product: &Product<Self>) -> bool {
        cublaslt::run(product)
    }

    fn own_attention(
        qkv: [&CubeTensor<Self>; 3],
        index: &Tiled<Self>,
        o: &CubeTensor<Self>,
        lse: &CubeTensor<Self>,
    ) -> bool {
        hopper::forward(qkv, index, o, lse)
    }

    fn own_attention_gradient(
        qkv: [&CubeTensor<Self>; 3],
        o_and_gradient: [&CubeTensor<Self>; 2],
        lse: &CubeTensor<Self>,
        index: &Tiled<Self>,
        joined: &CubeTensor<Self>,
    ) -> bool {
        hopper::backward(qkv, o_and_gradient, lse, index, joined)
    }

    fn step_runner(
        program: &StepProgram<Cube<Self>>,
        pages: &[Pages<Cube<Self>>],
    ) -> Result<Box<dyn StepRunner<Cube<Self>>>, StepError> {
        crate::step::cuda::runner(program, pages)
    }

    fn step_bytes(program: &StepProgram<Cube<Self>>) -> usize {
        crate::step::cuda::bytes(program)
    }
}

/// Runs the product.
pub(crate) fn run<R: ProductRuntime>(product: Product<R>) {
    let [m, n, _] = product.dims();
    if R::vendor_product(&product) {
        return;
    }
    let Product { a, b, c, alpha, plus } = product;
    let dtype = a.dtype();
    let beta = if plus.is_some() { 1.0 } else { 0.0 };
    if let Some(source) = plus {
        place(source.part(), &c, 1.0, 0.0);
    }
    match burn_cubecl::kernel::matmul::matmul(a.part(), b.part(), None, Default::default(), dtype) {
        Ok(result) => place(result, &c, alpha, beta),
        Err(error) => panic!("Burn's product [{m}, {n}] cannot be launched on this device: {error:?}"),
    }
}

/// `α · a b` as a new tensor `[m, n]` of the given dtype.
pub(crate) fn new<R: ProductRuntime>(
    a: &Matrix<R>,
    b: &Matrix<R>,
    alpha: f32,
    dtype: DType,
) -> CubeTensor<R> {
    let c = uninitialized(&a.tensor, [a.shape()[0], b.shape()[1]], dtype);
    run(Product { a: a.clone(), b: b.clone(), c: Matrix::new(c.clone()), alpha, plus: None });
    c
}

/// `c ← α · result + β · c`.
pub(crate) fn place<R: CubeRuntime>(result: CubeTensor<R>, c: &Matrix<R>, alpha: f32, beta: f32) {
    let result = into_contiguous(cast(result, c.dtype()));
    let [m, n] = c.dims;
    let client = result.client.clone();
    let target = c.tensor.handle.clone();
    let length = target.size_in_used() as usize / c.dtype().size();
    let cubes = CubeCount::Static(((m * n) as u32).div_ceil(256), 1, 1);
    // SAFETY: every thread below m n reads element i of a contiguous tensor of m n elements, and writes element
    // offset + (i / n) · stride + i % n of the buffer that the part lies in.
    unsafe {
        place_kernel::launch_unchecked::<R>(
            &client,
            cubes,
            CubeDim::new_1d(256),
            result.into_array_arg(),
            ArrayArg::from_raw_parts(target, length),
            c.offset,
            n,
            c.row_stride(),
            alpha,
            beta,
            c.dtype().into(),
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn place_kernel<F: Float>(
    result: &Array<F>,
    c: &mut Array<F>,
    offset: usize,
    n: usize,
    stride: usize,
    alpha: f32,
    beta: f32,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < result.len() {
        let place = offset + (ABSOLUTE_POS / n) * stride + ABSOLUTE_POS % n;
        let mut value = f32::cast_from(result[ABSOLUTE_POS]) * alpha;
        if beta != 0.0 {
            value += f32::cast_from(c[place]) * beta;
        }
        c[place] = F::cast_from(value);
    }
}
