//! Matrix products of device tensors, into a place that exists already.
//!
//! ```text
//! c ← α · op(a) op(b) + β · c          op(x) = x or xᵀ;  all row-major, rows may lie further apart than they are long
//! ```
//!
//! A runtime with a vendor library runs it there; others multiply with Burn and write the result into its place with one
//! kernel. What it refuses: to allocate the result, so that neighbouring results share a buffer and gradients add up
//! where they lie.

#[cfg(feature = "cuda")]
mod cublaslt;

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::device::{contiguous, row_stride, slice_rows};

/// One product.
pub(crate) struct Product<R: CubeRuntime> {
    /// `[m, k]`, or `[k, m]` if transposed.
    pub(crate) a: CubeTensor<R>,
    /// Whether a is taken as its transpose.
    pub(crate) a_transposed: bool,
    /// `[k, n]`, or `[n, k]` if transposed; the dtype of a.
    pub(crate) b: CubeTensor<R>,
    /// Whether b is taken as its transpose.
    pub(crate) b_transposed: bool,
    /// `[m, n]`, in the dtype of a or in f32.
    pub(crate) c: CubeTensor<R>,
    /// α.
    pub(crate) alpha: f32,
    /// β.
    pub(crate) beta: f32,
}

impl<R: CubeRuntime> Product<R> {
    /// `[m, n, k]`.
    fn dims(&self) -> [usize; 3] {
        let dims = |tensor: &CubeTensor<R>| [tensor.meta.shape()[0], tensor.meta.shape()[1]];
        let ([a_rows, a_columns], [b_rows, b_columns]) = (dims(&self.a), dims(&self.b));
        let (m, k) = if self.a_transposed { (a_columns, a_rows) } else { (a_rows, a_columns) };
        let (b_k, n) = if self.b_transposed { (b_columns, b_rows) } else { (b_rows, b_columns) };
        assert_eq!(k, b_k, "both factors have the same inner dimension");
        assert_eq!([m, n], dims(&self.c), "the result has the product's shape");
        [m, n, k]
    }
}

/// A runtime and the library that multiplies for it.
pub trait ProductRuntime: CubeRuntime {
    /// Whether large products go to a vendor library on this device; if not, why.
    ///
    /// # Errors
    /// With the reason, for a program to print.
    fn vendor_products(device: &Self::Device) -> Result<(), String>;

    /// Runs the product in the vendor's library if there is one; says whether it did.
    #[doc(hidden)]
    #[allow(private_interfaces, reason = "implemented in this crate only")]
    fn vendor_product(product: &Product<Self>) -> bool;
}

#[cfg(feature = "wgpu")]
impl ProductRuntime for cubecl::wgpu::WgpuRuntime {
    fn vendor_products(_: &Self::Device) -> Result<(), String> {
        Err("this runtime has none".into())
    }

    #[allow(private_interfaces, reason = "implemented in this crate only")]
    fn vendor_product(_: &Product<Self>) -> bool {
        false
    }
}

#[cfg(feature = "cuda")]
impl ProductRuntime for cubecl::cuda::CudaRuntime {
    fn vendor_products(device: &Self::Device) -> Result<(), String> {
        cublaslt::available(device)
    }

    #[allow(private_interfaces, reason = "implemented in this crate only")]
    fn vendor_product(product: &Product<Self>) -> bool {
        cublaslt::run(product)
    }
}

/// Runs the product.
pub(crate) fn run<R: ProductRuntime>(mut product: Product<R>) {
    for factor in [&mut product.a, &mut product.b] {
        if row_stride(factor).is_none() {
            *factor = into_contiguous(factor.clone());
        }
    }
    if R::vendor_product(&product) {
        return;
    }
    let [m, n, _] = product.dims();
    let Product { a, a_transposed, b, b_transposed, c, alpha, beta } = product;
    let turned = |x: CubeTensor<R>, transposed| if transposed { transpose(x) } else { x };
    let out_dtype = a.dtype;
    let result = burn_cubecl::kernel::matmul::matmul(
        turned(a, a_transposed),
        turned(b, b_transposed),
        None,
        Default::default(),
        out_dtype,
    );
    match result {
        Ok(result) => place(result, c, [m, n], alpha, beta),
        Err(error) => panic!("Burn's product [{m}, {n}] cannot be launched on this device: {error:?}"),
    }
}

/// `op(a) op(b)` as a new tensor `[m, n]` of the given dtype.
pub(crate) fn new<R: ProductRuntime>(
    [a, b]: [CubeTensor<R>; 2],
    [a_transposed, b_transposed]: [bool; 2],
    alpha: f32,
    dtype: DType,
) -> CubeTensor<R> {
    let m = a.meta.shape()[usize::from(a_transposed)];
    let n = b.meta.shape()[usize::from(!b_transposed)];
    let c = contiguous(&a, [m, n], dtype);
    run(Product { a, a_transposed, b, b_transposed, c: c.clone(), alpha, beta: 0.0 });
    c
}

fn transpose<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    burn_cubecl::ops::swap_dims(x, 0, 1)
}

/// `c ← α · result + β · c`.
fn place<R: CubeRuntime>(
    result: CubeTensor<R>,
    c: CubeTensor<R>,
    [m, n]: [usize; 2],
    alpha: f32,
    beta: f32,
) {
    let result = into_contiguous(cast(result, c.dtype));
    let stride = row_stride(&c).unwrap_or(n);
    let client = c.client.clone();
    let dtype = c.dtype.into();
    let (length, cube_dim) = (m * n, CubeDim::new_1d(256));
    let cubes = CubeCount::Static((length as u32).div_ceil(256), 1, 1);
    let target = slice_rows(&c, stride, m);
    // SAFETY: every thread below m n reads element i of a contiguous tensor of m n elements and writes row i / n,
    // column i % n of a buffer of m rows that lie `stride` apart.
    unsafe {
        place_kernel::launch_unchecked::<R>(
            &client,
            cubes,
            cube_dim,
            result.into_array_arg(),
            target,
            n,
            stride,
            alpha,
            beta,
            dtype,
        );
    }
}

#[cube(launch_unchecked)]
fn place_kernel<F: Float>(
    result: &Array<F>,
    c: &mut Array<F>,
    n: usize,
    stride: usize,
    alpha: f32,
    beta: f32,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < result.len() {
        let place = (ABSOLUTE_POS / n) * stride + ABSOLUTE_POS % n;
        let mut value = f32::cast_from(result[ABSOLUTE_POS]) * alpha;
        if beta != 0.0 {
            value += f32::cast_from(c[place]) * beta;
        }
        c[place] = F::cast_from(value);
    }
}
