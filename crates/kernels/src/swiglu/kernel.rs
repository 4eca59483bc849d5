//! The gate of the MLP on a device, for gate and up that lie side by side in one row.
//!
//! Forward reads a and c and writes y; backward reads a, c and g and writes both gradients. A unit has one vector of each.
//! With dropout of what follows, the forward pass writes the dropped rows too, which saves reading y again.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::Dropout;
use crate::device::{side_by_side, uninitialized, vector_width};
use crate::dropout::kernel::{Mask, factors, mask};
use crate::rows::{column, dims, launch_shape, row, row_stride};

#[cube]
fn sigmoid<N: Size>(a: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0);
    // CubeCL 0.10 writes no CUDA code for the negative of a vector.
    let minus_a = Vector::<f32, N>::new(0.0) - a;
    one / (one + minus_a.exp())
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward_kernel<F: Float, N: Size>(
    gate_up: &Tensor<Vector<F, N>>,
    y: &mut Tensor<Vector<F, N>>,
    dropped: &mut ComptimeOption<Tensor<Vector<F, N>>>,
    mask: &ComptimeOption<Mask>,
    n: usize,
    vectors: usize,
    stride: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (row, column) = (row(), column());
    if row < n && column < vectors {
        let from = row * stride + column;
        let gate = gate_up[from];
        let up = gate_up[from + vectors];
        let gate = Vector::<f32, N>::cast_from(gate);
        let value = gate * sigmoid::<N>(gate) * Vector::<f32, N>::cast_from(up);
        let place = row * vectors + column;
        y[place] = Vector::cast_from(value);
        #[comptime]
        if let ComptimeOption::Some(dropped) = dropped {
            #[comptime]
            if let ComptimeOption::Some(mask) = mask {
                dropped[place] = Vector::cast_from(value * factors::<N>(mask, place * N::value()));
            }
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn backward_kernel<F: Float, N: Size>(
    gate_up: &Tensor<Vector<F, N>>,
    grad: &Tensor<Vector<F, N>>,
    out: &mut Tensor<Vector<F, N>>,
    n: usize,
    vectors: usize,
    stride: usize,
    grad_stride: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (row, column) = (row(), column());
    if row < n && column < vectors {
        let from = row * stride + column;
        let gate = gate_up[from];
        let up = gate_up[from + vectors];
        let grad = grad[row * grad_stride + column];
        let (gate, up) = (Vector::<f32, N>::cast_from(gate), Vector::<f32, N>::cast_from(up));
        let grad = Vector::<f32, N>::cast_from(grad);
        let sigma = sigmoid::<N>(gate);
        let one = Vector::<f32, N>::new(1.0);
        let to = row * 2 * vectors + column;
        out[to] = Vector::cast_from(grad * up * sigma * (one + gate * (one - sigma)));
        out[to + vectors] = Vector::cast_from(grad * gate * sigma);
    }
}

/// `silu(a) · c` `[n, f]` of rows `[n, 2 f]`: a in the first f columns, c in the others.
#[must_use]
pub fn forward<R: CubeRuntime>(gate_up: CubeTensor<R>) -> CubeTensor<R> {
    launch_forward(gate_up, None).0
}

/// [`forward`], and with the same values `drop(y)`.
#[must_use]
pub fn forward_dropout<R: CubeRuntime>(
    gate_up: CubeTensor<R>,
    dropout: Dropout,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let (y, dropped) = launch_forward(gate_up, (dropout.probability > 0.0).then_some(dropout));
    let dropped = dropped.unwrap_or_else(|| y.clone());
    (y, dropped)
}

fn launch_forward<R: CubeRuntime>(
    gate_up: CubeTensor<R>,
    dropout: Option<Dropout>,
) -> (CubeTensor<R>, Option<CubeTensor<R>>) {
    let gate_up = side_by_side(gate_up);
    let [n, both] = dims(&gate_up);
    let f = both / 2;
    let y = uninitialized(&gate_up, [n, f], gate_up.dtype);
    let dropped = dropout.map(|_| uninitialized(&gate_up, [n, f], gate_up.dtype));
    let width = vector_width(f, &[&gate_up]);
    let (cubes, units) = launch_shape(n, f / width);
    // SAFETY: units past the last row or the last vector of a row neither read nor write.
    unsafe {
        forward_kernel::launch_unchecked::<R>(
            &gate_up.client,
            cubes,
            units,
            width,
            gate_up.clone().into_tensor_arg(),
            y.clone().into_tensor_arg(),
            dropped.clone().map(CubeTensor::into_tensor_arg).into(),
            dropout.map(|dropout| mask(dropout, [n, f])).into(),
            n,
            f / width,
            row_stride(&gate_up, width),
            gate_up.dtype.into(),
        );
    }
    (y, dropped)
}

/// The gradient `[n, 2 f]` of [`forward`] for its argument, from the gradient `[n, f]` of its result; written
/// over the argument if nobody else holds it.
///
/// # Panics
///
/// If the gradient has another dtype or other rows than the argument.
#[must_use]
pub fn backward<R: CubeRuntime>(gate_up: CubeTensor<R>, grad: CubeTensor<R>) -> CubeTensor<R> {
    let (gate_up, grad) = (side_by_side(gate_up), side_by_side(grad));
    let [n, f] = dims(&grad);
    assert_eq!((dims(&gate_up), gate_up.dtype), ([n, 2 * f], grad.dtype), "the gradient of a gate");
    let in_place = gate_up.can_mut() && gate_up.is_contiguous();
    let out = if in_place { gate_up.clone() } else { uninitialized(&grad, [n, 2 * f], grad.dtype) };
    let width = vector_width(f, &[&gate_up, &grad]);
    let (cubes, units) = launch_shape(n, f / width);
    let strides = [&gate_up, &grad].map(|x| row_stride(x, width));
    // SAFETY: units past the last row or the last vector of a row neither read nor write. In place, a unit reads what it
    // writes, and nobody else does.
    unsafe {
        backward_kernel::launch_unchecked::<R>(
            &grad.client,
            cubes,
            units,
            width,
            gate_up.into_tensor_arg(),
            grad.clone().into_tensor_arg(),
            if in_place { out.as_tensor_alias(0) } else { out.clone().into_tensor_arg() },
            n,
            f / width,
            strides[0],
            strides[1],
            grad.dtype.into(),
        );
    }
    out
}
