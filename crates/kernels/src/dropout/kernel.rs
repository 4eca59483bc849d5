//! Dropout on a device: the mask is drawn where it is used, and never stored.
//!
//! One draw of Philox gives the words of four consecutive elements, so a unit that has a vector of eight draws twice.
//! Bytes moved: x read, the result written, and the base read if there is one. What it trades: rows whose width is no
//! multiple of four draw once an element. What it refuses: 2³² elements or more, whose index exceeds 32 bits.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::Dropout;
use crate::device::{side_by_side, uninitialized, vector_width};
use crate::rows::{column, dims, launch_shape, row, row_stride};

/// [`Dropout`] as a kernel sees it.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Mask {
    low: u32,
    high: u32,
    threshold: u32,
    kept: f32,
}

/// A mask for `[n, d]` elements.
pub(crate) fn mask<R: CubeRuntime>(dropout: Dropout, dims: [usize; 2]) -> MaskLaunch<R> {
    assert!(
        u32::try_from(dims[0] * dims[1]).is_ok(),
        "dropout on a device of 2^32 elements or more: {dims:?}"
    );
    let threshold = (dropout.probability * 4_294_967_296.0) as u32;
    let kept = (1.0 / (1.0 - dropout.probability)) as f32;
    MaskLaunch::new(dropout.key as u32, (dropout.key >> 32) as u32, threshold, kept)
}

/// Ten rounds of Philox 4x32 with a counter below 2³², as [`super::philox`] does them on the host.
#[cube]
fn philox(counter: u32, mask: &Mask) -> Array<u32> {
    let mut words = Array::<u32>::new(4usize);
    let (mut a, mut b, mut c, mut d) = (counter, u32::new(0), u32::new(0), u32::new(0));
    let (mut low_key, mut high_key) = (mask.low, mask.high);
    #[unroll]
    for round in 0..10u32 {
        if comptime!(round > 0) {
            low_key += 0x9E37_79B9u32;
            high_key += 0xBB67_AE85u32;
        }
        let first_high = u32::mul_hi(a, 0xD251_1F53u32);
        let first_low = a * 0xD251_1F53u32;
        let second_high = u32::mul_hi(c, 0xCD9E_8D57u32);
        let second_low = c * 0xCD9E_8D57u32;
        a = second_high ^ b ^ low_key;
        b = second_low;
        c = first_high ^ d ^ high_key;
        d = first_low;
    }
    words[0] = a;
    words[1] = b;
    words[2] = c;
    words[3] = d;
    words
}

/// `mask / (1 - p)` of the elements from index `first` on, a multiple of N.
#[cube]
pub(crate) fn factors<N: Size>(mask: &Mask, first: usize) -> Vector<f32, N> {
    let mut factors = Vector::<f32, N>::empty();
    let width = N::value().comptime();
    let drawn = comptime!(if width < 4 { width } else { 4 });
    #[unroll]
    for quad in 0..width.div_ceil(4) {
        let words = philox((first / 4 + quad) as u32, mask);
        #[unroll]
        for i in 0..drawn {
            // Fewer than four elements begin anywhere in the four words.
            let word = if comptime!(width < 4) { words[first % 4 + i] } else { words[i] };
            factors[quad * 4 + i] = select(word >= mask.threshold, mask.kept, f32::new(0.0));
        }
    }
    factors
}

#[cube(launch_unchecked)]
fn apply_kernel<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    y: &mut Tensor<Vector<F, N>>,
    mask: &Mask,
    n: usize,
    vectors: usize,
    stride: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (row, column) = (row(), column());
    if row < n && column < vectors {
        let value = Vector::<f32, N>::cast_from(x[row * stride + column]);
        let place = row * vectors + column;
        y[place] = Vector::cast_from(value * factors::<N>(mask, place * N::value()));
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn add_kernel<F: Float, N: Size>(
    base: &Tensor<Vector<F, N>>,
    x: &Tensor<Vector<F, N>>,
    y: &mut Tensor<Vector<F, N>>,
    mask: &ComptimeOption<Mask>,
    n: usize,
    vectors: usize,
    base_stride: usize,
    stride: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (row, column) = (row(), column());
    if row < n && column < vectors {
        let place = row * vectors + column;
        let before = base[row * base_stride + column];
        let mut sum = Vector::<f32, N>::cast_from(x[row * stride + column]);
        let before = Vector::<f32, N>::cast_from(before);
        #[comptime]
        if let ComptimeOption::Some(mask) = mask {
            sum *= factors::<N>(mask, place * N::value());
        }
        y[place] = Vector::cast_from(before + sum);
    }
}

/// `drop(x)` of rows `[n, d]`, contiguous: x itself if nothing is dropped, and in its
/// memory if nobody else holds it.
#[must_use]
pub fn apply<R: CubeRuntime>(x: CubeTensor<R>, dropout: Dropout) -> CubeTensor<R> {
    if dropout.probability == 0.0 {
        return x;
    }
    let x = side_by_side(x);
    let [n, d] = dims(&x);
    let in_place = x.can_mut() && x.is_contiguous();
    let y = if in_place { x.clone() } else { uninitialized(&x, [n, d], x.dtype) };
    let width = vector_width(d, &[&x]);
    let (cubes, units) = launch_shape(n, d / width);
    // SAFETY: units past the last row or the last vector of a row neither read nor write.
    unsafe {
        apply_kernel::launch_unchecked::<R>(
            &x.client,
            cubes,
            units,
            width,
            x.clone().into_tensor_arg(),
            if in_place { y.as_tensor_alias(0) } else { y.clone().into_tensor_arg() },
            mask(dropout, [n, d]),
            n,
            d / width,
            row_stride(&x, width),
            x.dtype.into(),
        );
    }
    y
}

/// `base + drop(x)` of rows `[n, d]` of one dtype, contiguous; `base + x` without dropout. Written over `base` if that
/// is contiguous and nobody else holds it.
///
/// # Panics
///
/// If shapes or dtypes differ.
#[must_use]
pub fn add<R: CubeRuntime>(base: CubeTensor<R>, x: CubeTensor<R>, dropout: Option<Dropout>) -> CubeTensor<R> {
    assert_eq!((dims(&base), base.dtype), (dims(&x), x.dtype), "base and x of base + drop(x)");
    let (base, x) = (side_by_side(base), side_by_side(x));
    let [n, d] = dims(&x);
    let dropout = dropout.filter(|dropout| dropout.probability > 0.0);
    let in_place = base.can_mut() && base.is_contiguous();
    let y = if in_place { base.clone() } else { uninitialized(&x, [n, d], x.dtype) };
    let width = vector_width(d, &[&x, &base]);
    let (cubes, units) = launch_shape(n, d / width);
    let written = if in_place { y.as_tensor_alias(0) } else { y.clone().into_tensor_arg() };
    let strides = [&base, &x].map(|x| row_stride(x, width));
    // SAFETY: units past the last row or the last vector of a row neither read nor write; in place, a unit writes only
    // the vector that it has read.
    unsafe {
        add_kernel::launch_unchecked::<R>(
            &x.client,
            cubes,
            units,
            width,
            base.into_tensor_arg(),
            x.clone().into_tensor_arg(),
            written,
            dropout.map(|dropout| mask(dropout, [n, d])).into(),
            n,
            d / width,
            strides[0],
            strides[1],
            x.dtype.into(),
        );
    }
    y
}
