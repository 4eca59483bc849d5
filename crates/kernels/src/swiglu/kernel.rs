//! The gate of the MLP on a device, for gate and up that lie side by side in one row.
//!
//! Forward reads a and c and writes y; backward reads a, c and g and writes both gradients. A unit has one vector of each.
//! With dropout of what follows, the forward pass writes the dropped rows too, which saves reading y again.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::Dropout;
use crate::device::{SplitGradient, side_by_side, spacious, uninitialized, vector_width};
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
    y: &mut ComptimeOption<Tensor<Vector<F, N>>>,
    dropped: &mut ComptimeOption<Tensor<Vector<F, N>>>,
    mask: &ComptimeOption<Mask>,
    n: usize,
    vectors: usize,
    stride: usize,
    y_stride: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (row, column) = (row(), column());
    if row < n && column < vectors {
        let from = row * stride + column;
        let gate = gate_up[from];
        let up = gate_up[from + vectors];
        let gate = Vector::<f32, N>::cast_from(gate);
        let value = gate * sigmoid::<N>(gate) * Vector::<f32, N>::cast_from(up);
        #[comptime]
        if let ComptimeOption::Some(y) = y {
            y[row * y_stride + column] = Vector::cast_from(value);
        }
        let place = row * vectors + column;
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
    low_rank: &ComptimeOption<Tensor<Vector<F, N>>>,
    mask: &ComptimeOption<Mask>,
    out: &mut Tensor<Vector<F, N>>,
    n: usize,
    vectors: usize,
    stride: usize,
    grad_stride: usize,
    low_rank_stride: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (row, column) = (row(), column());
    if row < n && column < vectors {
        let from = row * stride + column;
        let gate = gate_up[from];
        let up = gate_up[from + vectors];
        let grad = grad[row * grad_stride + column];
        let (gate, up) = (Vector::<f32, N>::cast_from(gate), Vector::<f32, N>::cast_from(up));
        let mut grad = Vector::<f32, N>::cast_from(grad);
        #[comptime]
        if let ComptimeOption::Some(low_rank) = low_rank {
            let mut value = Vector::<f32, N>::cast_from(low_rank[row * low_rank_stride + column]);
            #[comptime]
            if let ComptimeOption::Some(mask) = mask {
                value *= factors::<N>(mask, (row * vectors + column) * N::value());
            }
            grad += value;
        }
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
    forward_dropout(gate_up, None, 0).0
}

/// [`forward`] with so many spare columns behind the rows of its result y, and with the same values `drop(y)`, which is
/// y itself without dropout.
#[must_use]
pub fn forward_dropout<R: CubeRuntime>(
    gate_up: CubeTensor<R>,
    dropout: Option<Dropout>,
    spare: usize,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let gate_up = side_by_side(gate_up);
    let [n, both] = dims(&gate_up);
    let y = spacious(&gate_up, [n, both / 2], spare, gate_up.dtype);
    let dropout = dropout.filter(|dropout| dropout.probability > 0.0);
    let dropped = dropout.map(|_| uninitialized(&gate_up, [n, both / 2], gate_up.dtype));
    launch_forward(&gate_up, Some(&y), dropped.as_ref().zip(dropout));
    let dropped = dropped.unwrap_or_else(|| y.clone());
    (y, dropped)
}

/// `drop(y)` of [`forward`]'s y, and nothing else.
#[must_use]
pub fn forward_dropped<R: CubeRuntime>(gate_up: CubeTensor<R>, dropout: Option<Dropout>) -> CubeTensor<R> {
    let Some(dropout) = dropout.filter(|dropout| dropout.probability > 0.0) else {
        return forward(gate_up);
    };
    let gate_up = side_by_side(gate_up);
    let [n, both] = dims(&gate_up);
    let dropped = uninitialized(&gate_up, [n, both / 2], gate_up.dtype);
    launch_forward(&gate_up, None, Some((&dropped, dropout)));
    dropped
}

/// Writes y, drop(y) or both.
fn launch_forward<R: CubeRuntime>(
    gate_up: &CubeTensor<R>,
    y: Option<&CubeTensor<R>>,
    dropped: Option<(&CubeTensor<R>, Dropout)>,
) {
    let [n, both] = dims(gate_up);
    let f = both / 2;
    let tensors = [gate_up].into_iter().chain(y).collect::<Vec<_>>();
    let width = vector_width(f, &tensors);
    let (cubes, units) = launch_shape(n, f / width);
    let argument = |x: &CubeTensor<R>| x.clone().into_tensor_arg();
    // SAFETY: units past the last row or the last vector of a row neither read nor write.
    unsafe {
        forward_kernel::launch_unchecked::<R>(
            &gate_up.client,
            cubes,
            units,
            width,
            argument(gate_up),
            y.map(argument).into(),
            dropped.map(|(dropped, _)| argument(dropped)).into(),
            dropped.map(|(_, dropout)| mask(dropout, [n, f])).into(),
            n,
            f / width,
            row_stride(gate_up, width),
            y.map_or(0, |y| row_stride(y, width)),
            gate_up.dtype.into(),
        );
    }
}

/// The gradient `[n, 2 f]` of [`forward`] for its argument, from the gradient `[n, f]` of its result; written
/// over the argument if nobody else holds it.
///
/// # Panics
///
/// If the gradient has another dtype or other rows than the argument.
#[must_use]
pub fn backward<R: CubeRuntime>(gate_up: CubeTensor<R>, grad: SplitGradient<R>) -> CubeTensor<R> {
    let gate_up = side_by_side(gate_up);
    let SplitGradient { base: grad, low_rank, dropout } = grad;
    let [n, f] = dims(&grad);
    assert_eq!((dims(&gate_up), gate_up.dtype), ([n, 2 * f], grad.dtype), "the gradient of a gate");
    if let Some(low_rank) = &low_rank {
        assert_eq!((dims(low_rank), low_rank.dtype), ([n, f], grad.dtype), "the gradient through factors");
    }
    let in_place = gate_up.can_mut() && gate_up.is_contiguous();
    let out = if in_place { gate_up.clone() } else { uninitialized(&grad, [n, 2 * f], grad.dtype) };
    let tensors = [&gate_up, &grad].into_iter().chain(&low_rank).collect::<Vec<_>>();
    let width = vector_width(f, &tensors);
    let (cubes, units) = launch_shape(n, f / width);
    let strides = [&gate_up, &grad].map(|x| row_stride(x, width));
    let low_rank_stride = low_rank.as_ref().map_or(0, |x| row_stride(x, width));
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
            low_rank.map(CubeTensor::into_tensor_arg).into(),
            dropout.map(|dropout| mask(dropout, [n, f])).into(),
            if in_place { out.as_tensor_alias(0) } else { out.clone().into_tensor_arg() },
            n,
            f / width,
            strides[0],
            strides[1],
            low_rank_stride,
            grad.dtype.into(),
        );
    }
    out
}
