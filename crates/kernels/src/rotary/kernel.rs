//! Rotary position embedding on a device, for rows that hold the heads of one token side by side.
//!
//! A unit turns one vector of the first half of a head with the vector of the second half. Bytes moved: in place, the
//! turned columns are read and written; else the whole row is.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::device::{side_by_side, uninitialized, vector_width};
use crate::rows::{column, dims, launch_shape, row, row_stride};

/// Counts are vectors: `half` of half a head, `pairs` of the first halves of all heads that are turned, `kept` of the
/// columns after those, which the last units copy unless the rows are turned in place.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn turn_kernel<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    cos: &Tensor<Vector<f32, N>>,
    sin: &Tensor<Vector<f32, N>>,
    y: &mut Tensor<Vector<F, N>>,
    sign: f32,
    n: usize,
    stride: usize,
    cos_stride: usize,
    sin_stride: usize,
    #[comptime] half: usize,
    #[comptime] pairs: usize,
    #[comptime] kept: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (row, unit) = (row(), column());
    if row < n {
        let from = row * stride;
        let to = row * (2 * pairs + kept);
        if unit < pairs {
            let i = unit % half;
            let first = unit + unit - i;
            let (a, b) = (x[from + first], x[from + first + half]);
            let cos = cos[row * cos_stride + i];
            let sin = sin[row * sin_stride + i] * Vector::new(sign);
            let (a, b) = (Vector::<f32, N>::cast_from(a), Vector::<f32, N>::cast_from(b));
            y[to + first] = Vector::cast_from(a * cos - b * sin);
            y[to + first + half] = Vector::cast_from(b * cos + a * sin);
        } else if unit < pairs + kept {
            y[to + pairs + unit] = x[from + pairs + unit];
        }
    }
}

/// Rows `[n, width]` whose first `heads` heads of `head_dim` columns are turned by the row's angles, or back by them if
/// `inverse`; the other columns stay. Cosines and sines `[n, head_dim / 2]` in f32. Written over `rows` if those are
/// contiguous and nobody else holds them.
///
/// # Panics
///
/// If the heads are wider than the row, or the angles are not f32 of that shape.
#[must_use]
pub fn apply<R: CubeRuntime>(
    rows: CubeTensor<R>,
    cos: CubeTensor<R>,
    sin: CubeTensor<R>,
    heads: usize,
    head_dim: usize,
    inverse: bool,
) -> CubeTensor<R> {
    let [x, cos, sin] = [rows, cos, sin].map(side_by_side);
    let [n, all] = dims(&x);
    assert!(heads * head_dim <= all, "{heads} heads of {head_dim} columns in a row of {all}");
    for angles in [&cos, &sin] {
        assert_eq!(
            (dims(angles), angles.dtype),
            ([n, head_dim / 2], DType::F32),
            "angles of rotary embedding"
        );
    }
    let in_place = x.can_mut() && x.is_contiguous();
    let y = if in_place { x.clone() } else { uninitialized(&x, [n, all], x.dtype) };
    // A power of two divides the bitwise or of two numbers if it divides both.
    let width = vector_width((head_dim / 2) | all, &[&x, &cos, &sin]);
    let half = head_dim / 2 / width;
    let pairs = heads * half;
    let kept = all / width - 2 * pairs;
    let (cubes, units) = launch_shape(n, if in_place { pairs } else { pairs + kept });
    let written = if in_place { y.as_tensor_alias(0) } else { y.clone().into_tensor_arg() };
    let strides = [&x, &cos, &sin].map(|x| row_stride(x, width));
    // SAFETY: units past the last row or past what is copied neither read nor write; in place, a unit writes only the
    // two vectors that it has read.
    unsafe {
        turn_kernel::launch_unchecked::<R>(
            &y.client,
            cubes,
            units,
            width,
            x.into_tensor_arg(),
            cos.into_tensor_arg(),
            sin.into_tensor_arg(),
            written,
            if inverse { -1.0 } else { 1.0 },
            n,
            strides[0],
            strides[1],
            strides[2],
            half,
            pairs,
            kept,
            y.dtype.into(),
        );
    }
    y
}
