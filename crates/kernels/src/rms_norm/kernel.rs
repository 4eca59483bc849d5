//! Root-mean-square normalisation on a device, one cube a row, each in one pass over memory.
//!
//! A unit keeps its vectors of the row in registers from the sum to the write. Everything it needs is read before the
//! cube waits for the sum, so that other cubes of the multiprocessor are not the only ones to hide the memory's latency.
//! What it trades: a row too wide for the registers of a cube spills.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::Dropout;
use crate::device::{SplitGradient, cubes, side_by_side, spacious, uninitialized, vector_width};
use crate::dropout::kernel::{Mask, factors, mask};
use crate::reduce::has_planes;
use crate::rows::{dims, row_stride};

/// How a cube divides a row.
#[derive(Clone, Copy)]
struct Division {
    /// Elements in a vector.
    width: usize,
    /// Units, a power of two from 64 on.
    units: usize,
    /// Vectors of each unit.
    count: usize,
    /// Whether the runtime sums over planes.
    planes: bool,
}

impl Division {
    /// Two vectors a unit, as long as there are units for that.
    fn new<R: CubeRuntime>(d: usize, tensors: &[&CubeTensor<R>]) -> Self {
        let most = (tensors[0].client.properties().hardware.max_units_per_cube as usize).min(512);
        let width = vector_width(d, tensors);
        let vectors = d / width;
        let units = vectors.div_ceil(2).next_power_of_two().clamp(64, most);
        Self { width, units, count: vectors.div_ceil(units), planes: has_planes(tensors[0]) }
    }

    fn dim(self) -> CubeDim {
        CubeDim::new_1d(self.units as u32)
    }
}

/// The row of a cube among [`cubes`].
#[cube]
fn cube_row() -> usize {
    (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize
}

/// The sum over the units of a cube; every unit gets the same bits.
#[cube]
fn sum_over_cube<S: Size>(
    value: Vector<f32, S>,
    #[comptime] units: usize,
    #[comptime] planes: bool,
) -> Vector<f32, S> {
    let unit = UNIT_POS as usize;
    let mut total = Vector::<f32, S>::new(0.0);
    if comptime!(planes) {
        // A plane has four units or more.
        let mut sums = SharedMemory::<Vector<f32, S>>::new(units / 4);
        let sum = plane_sum(value);
        if UNIT_POS_PLANE == 0 {
            sums[unit / PLANE_DIM as usize] = sum;
        }
        sync_cube();
        for plane in 0..CUBE_DIM.div_ceil(PLANE_DIM) as usize {
            total += sums[plane];
        }
    } else {
        let mut sums = SharedMemory::<Vector<f32, S>>::new(units);
        sums[unit] = value;
        sync_cube();
        let mut half = comptime!(units / 2).runtime();
        while half > 0 {
            if unit < half {
                let other = sums[unit + half];
                sums[unit] += other;
            }
            sync_cube();
            half /= 2;
        }
        total = sums[0];
    }
    total
}

#[cube]
fn sum_over_vector<N: Size>(value: Vector<f32, N>) -> f32 {
    let mut sum = f32::new(0.0);
    #[unroll]
    for i in 0..N::value() {
        sum += value[i];
    }
    sum
}

/// The vectors of this unit: every `units`-th of a row, and zeros past its end.
#[cube]
fn load<F: Float, N: Size>(
    from: &Tensor<Vector<F, N>>,
    start: usize,
    vectors: usize,
    #[comptime] units: usize,
    #[comptime] count: usize,
) -> Array<Vector<F, N>> {
    let mut values = Array::<Vector<F, N>>::new(count);
    #[unroll]
    for i in 0..count {
        let column = UNIT_POS as usize + i * units;
        let mut value = Vector::<F, N>::new(F::new(0.0));
        if column < vectors {
            value = from[start + column];
        }
        values[i] = value;
    }
    values
}

#[cube]
fn as_f32<F: Float, N: Size>(values: &Array<Vector<F, N>>, #[comptime] i: usize) -> Vector<f32, N> {
    Vector::<f32, N>::cast_from(values[i])
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward_kernel<F: Float, W: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    weight: &Tensor<Vector<W, N>>,
    y: &mut Tensor<Vector<F, N>>,
    dropped: &mut ComptimeOption<Tensor<Vector<F, N>>>,
    mask: &ComptimeOption<Mask>,
    epsilon: f32,
    n: usize,
    vectors: usize,
    stride: usize,
    y_stride: usize,
    #[comptime] units: usize,
    #[comptime] count: usize,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
    #[define(W)] _weight_dtype: StorageType,
) {
    let row = cube_row();
    if row >= n {
        terminate!();
    }
    let x = load::<F, N>(x, row * stride, vectors, units, count);
    let mut squares = f32::new(0.0);
    #[unroll]
    for i in 0..count {
        let value = as_f32::<F, N>(&x, i);
        squares += sum_over_vector::<N>(value * value);
    }
    let squares = Vector::<f32, Const<1>>::new(squares);
    let total = sum_over_cube::<Const<1>>(squares, units, planes)[0];
    let d = (vectors * N::value()) as f32;
    let rho = Vector::<f32, N>::new((total / d + epsilon).inverse_sqrt());
    #[unroll]
    for i in 0..count {
        let column = UNIT_POS as usize + i * units;
        if column < vectors {
            let value = as_f32::<F, N>(&x, i) * rho * Vector::cast_from(weight[column]);
            let place = row * vectors + column;
            y[row * y_stride + column] = Vector::cast_from(value);
            #[comptime]
            if let ComptimeOption::Some(dropped) = dropped {
                #[comptime]
                if let ComptimeOption::Some(mask) = mask {
                    dropped[place] = Vector::cast_from(value * factors::<N>(mask, place * N::value()));
                }
            }
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn backward_kernel<F: Float, W: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    weight: &Tensor<Vector<W, N>>,
    grad: &Tensor<Vector<F, N>>,
    low_rank: &ComptimeOption<Tensor<Vector<F, N>>>,
    mask: &ComptimeOption<Mask>,
    residual: &ComptimeOption<Tensor<Vector<F, N>>>,
    dx: &mut Tensor<Vector<F, N>>,
    epsilon: f32,
    n: usize,
    vectors: usize,
    stride: usize,
    grad_stride: usize,
    low_rank_stride: usize,
    residual_stride: usize,
    #[comptime] units: usize,
    #[comptime] count: usize,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
    #[define(W)] _weight_dtype: StorageType,
) {
    let row = cube_row();
    if row >= n {
        terminate!();
    }
    let x = load::<F, N>(x, row * stride, vectors, units, count);
    let mut g = load::<F, N>(grad, row * grad_stride, vectors, units, count);
    let w = load::<W, N>(weight, 0usize, vectors, units, count);
    #[comptime]
    let past = match residual {
        ComptimeOption::Some(past) => load::<F, N>(past, row * residual_stride, vectors, units, count),
        ComptimeOption::None => Array::<Vector<F, N>>::new(count),
    };
    #[comptime]
    if let ComptimeOption::Some(low_rank) = low_rank {
        let low_rank = load::<F, N>(low_rank, row * low_rank_stride, vectors, units, count);
        #[unroll]
        for i in 0..count {
            let mut value = as_f32::<F, N>(&low_rank, i);
            #[comptime]
            if let ComptimeOption::Some(mask) = mask {
                let place = row * vectors + UNIT_POS as usize + i * units;
                value *= factors::<N>(mask, place * N::value());
            }
            g[i] = Vector::cast_from(as_f32::<F, N>(&g, i) + value);
        }
    }
    let (mut squares, mut products) = (f32::new(0.0), f32::new(0.0));
    #[unroll]
    for i in 0..count {
        let value = as_f32::<F, N>(&x, i);
        squares += sum_over_vector::<N>(value * value);
        products += sum_over_vector::<N>(value * as_f32::<F, N>(&g, i) * as_f32::<W, N>(&w, i));
    }
    let mut sums = Vector::<f32, Const<2>>::empty();
    sums[0] = squares;
    sums[1] = products;
    let sums = sum_over_cube::<Const<2>>(sums, units, planes);
    let d = (vectors * N::value()) as f32;
    let rho = (sums[0] / d + epsilon).inverse_sqrt();
    let along = Vector::<f32, N>::new(rho * rho * rho * (sums[1] / d));
    let rho = Vector::<f32, N>::new(rho);
    #[unroll]
    for i in 0..count {
        let column = UNIT_POS as usize + i * units;
        if column < vectors {
            let gw = as_f32::<F, N>(&g, i) * as_f32::<W, N>(&w, i);
            let mut value = gw * rho - as_f32::<F, N>(&x, i) * along;
            if residual.is_some() {
                value += as_f32::<F, N>(&past, i);
            }
            dx[row * vectors + column] = Vector::cast_from(value);
        }
    }
}

/// `w · x̂` `[n, d]` of rows `[n, d]`; the weight `[d]` can have another float dtype than x.
#[must_use]
pub fn forward<R: CubeRuntime>(x: CubeTensor<R>, weight: CubeTensor<R>, epsilon: f64) -> CubeTensor<R> {
    forward_dropout(x, weight, epsilon, None, 0).0
}

/// [`forward`] with so many spare columns behind the rows of its result y, and with the same values `drop(y)`, which is
/// y itself without dropout.
#[must_use]
pub fn forward_dropout<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    epsilon: f64,
    dropout: Option<Dropout>,
    spare: usize,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let (x, weight) = (side_by_side(x), side_by_side(weight));
    let [n, d] = dims(&x);
    assert_eq!(weight.meta.shape()[0], d, "the weight of a norm");
    let dropout = dropout.filter(|dropout| dropout.probability > 0.0);
    let y = spacious(&x, [n, d], spare, x.dtype);
    let dropped = dropout.map(|_| uninitialized(&x, [n, d], x.dtype));
    let division = Division::new(d, &[&x, &weight, &y]);
    // SAFETY: cubes past the last row end at once, and units read and write no vector past the end of a row.
    unsafe {
        forward_kernel::launch_unchecked::<R>(
            &x.client,
            cubes(n),
            division.dim(),
            division.width,
            x.clone().into_tensor_arg(),
            weight.clone().into_tensor_arg(),
            y.clone().into_tensor_arg(),
            dropped.clone().map(CubeTensor::into_tensor_arg).into(),
            dropout.map(|dropout| mask(dropout, [n, d])).into(),
            epsilon as f32,
            n,
            d / division.width,
            row_stride(&x, division.width),
            row_stride(&y, division.width),
            division.units,
            division.count,
            division.planes,
            x.dtype.into(),
            weight.dtype.into(),
        );
    }
    let dropped = dropped.unwrap_or_else(|| y.clone());
    (y, dropped)
}

/// The gradient `[n, d]` of [`forward`] for x, from the gradient of its result; plus `residual` `[n, d]`, the gradient
/// that flows past the norm.
///
/// # Panics
///
/// If gradients have another shape or dtype than x.
#[must_use]
pub fn backward<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    epsilon: f64,
    grad: SplitGradient<R>,
    residual: Option<CubeTensor<R>>,
) -> CubeTensor<R> {
    let [x, weight] = [x, weight].map(side_by_side);
    let residual = residual.map(side_by_side);
    let SplitGradient { base: grad, low_rank, dropout } = grad;
    let [n, d] = dims(&x);
    for grad in [&grad].into_iter().chain(&low_rank).chain(&residual) {
        assert_eq!((dims(grad), grad.dtype), ([n, d], x.dtype), "the gradient of a norm");
    }
    let dx = uninitialized(&x, [n, d], x.dtype);
    let tensors = [&x, &weight, &grad].into_iter().chain(&low_rank).chain(&residual).collect::<Vec<_>>();
    let division = Division::new(d, &tensors);
    let strides = [&x, &grad].map(|x| row_stride(x, division.width));
    let [low_rank_stride, residual_stride] =
        [&low_rank, &residual].map(|x| x.as_ref().map_or(0, |x| row_stride(x, division.width)));
    // SAFETY: cubes past the last row end at once, and units read and write no vector past the end of a row.
    unsafe {
        backward_kernel::launch_unchecked::<R>(
            &x.client,
            cubes(n),
            division.dim(),
            division.width,
            x.clone().into_tensor_arg(),
            weight.clone().into_tensor_arg(),
            grad.into_tensor_arg(),
            low_rank.map(CubeTensor::into_tensor_arg).into(),
            dropout.map(|dropout| mask(dropout, [n, d])).into(),
            residual.map(CubeTensor::into_tensor_arg).into(),
            dx.clone().into_tensor_arg(),
            epsilon as f32,
            n,
            d / division.width,
            strides[0],
            strides[1],
            low_rank_stride,
            residual_stride,
            division.units,
            division.count,
            division.planes,
            x.dtype.into(),
            weight.dtype.into(),
        );
    }
    dx
}
