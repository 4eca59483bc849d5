//! Losses of rows of logits and their gradients on a device, one cube a row.
//!
//! A unit keeps its vectors of the row in registers, if they fit there: then logits are read once and gradients written once.
//! Longer rows are read twice. Largest logit and sum of exponentials come from one sweep, in which a unit rescales its sum
//! where it meets a larger logit. What it refuses: targets beyond the vocabulary, whose loss is left undefined.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::features::Plane;
use cubecl::prelude::*;

use crate::nf4::kernel::{cubes, empty, rows_side_by_side, vector_width, widest};

/// Vectors of 16 bytes that a unit keeps in registers.
const HELD: usize = 16;

/// Combines one number of each unit of a cube, by maximum or by sum, in a fixed order; every unit gets the result.
///
/// `units` is a power of two.
#[cube]
pub(crate) fn over_cube(
    value: f32,
    #[comptime] units: usize,
    #[comptime] planes: bool,
    #[comptime] largest: bool,
) -> f32 {
    if comptime!(planes) { by_planes(value, units, largest) } else { by_halves(value, units, largest) }
}

#[cube]
fn by_planes(value: f32, #[comptime] units: usize, #[comptime] largest: bool) -> f32 {
    // A plane has four units or more.
    let mut parts = SharedMemory::<f32>::new(comptime!(units.div_ceil(4)));
    let part = if comptime!(largest) { plane_max(value) } else { plane_sum(value) };
    if UNIT_POS_PLANE == 0 {
        parts[(UNIT_POS / PLANE_DIM) as usize] = part;
    }
    sync_cube();
    let mut result = parts[0];
    for plane in 1..CUBE_DIM.div_ceil(PLANE_DIM) as usize {
        result = join(result, parts[plane], largest);
    }
    result
}

#[cube]
fn by_halves(value: f32, #[comptime] units: usize, #[comptime] largest: bool) -> f32 {
    let unit = UNIT_POS as usize;
    let mut parts = SharedMemory::<f32>::new(units);
    parts[unit] = value;
    sync_cube();
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        if unit < half {
            let other = parts[unit + half];
            parts[unit] = join(parts[unit], other, largest);
        }
        sync_cube();
        half /= 2;
    }
    parts[0]
}

#[cube]
fn join(a: f32, b: f32, #[comptime] largest: bool) -> f32 {
    if comptime!(largest) { max(a, b) } else { a + b }
}

/// Whether sums and maxima over planes can be used.
pub(crate) fn has_planes<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    x.client.properties().features.plane.contains(Plane::Ops)
}

/// e to the power of x by the card's approximation: relative to the result, x times 2⁻²³ and 3 · 10⁻⁷ at most.
///
/// Infinities and NaN stay what they are; the flags choose the instruction and nothing else on CUDA.
#[cube(fast_math = FastMath::ReducedPrecision | FastMath::NotNaN | FastMath::NotInf)]
fn exponential<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    x.exp()
}

/// Takes a vector into the largest logit so far and the sums of exponentials relative to that.
#[cube]
fn meet<N: Size>(x: Vector<f32, N>, peak: &mut f32, sum: &mut Vector<f32, N>) {
    let mut largest = *peak;
    #[unroll]
    for i in 0..N::value() {
        largest = max(largest, x[i]);
    }
    let shrunk = exponential::<Const<1>>(Vector::new(*peak - largest))[0];
    *sum = *sum * Vector::new(shrunk) + exponential::<N>(x - Vector::new(largest));
    *peak = largest;
}

#[cube(launch_unchecked)]
fn rows_kernel<F: Float, D: Float, N: Size>(
    logits: &Tensor<Vector<F, N>>,
    targets: &Tensor<i32>,
    losses: &mut Tensor<f32>,
    d_logits: &mut ComptimeOption<Tensor<Vector<D, N>>>,
    scale: f32,
    #[comptime] units: usize,
    #[comptime] held: usize,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
    #[define(D)] _gradient_dtype: StorageType,
) {
    let row = CUBE_POS as usize;
    if row >= logits.shape(0) {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let vectors = logits.shape(1) / N::value();
    let start = row * (logits.stride(0) / N::value());
    let target = targets[row];
    let bears_loss = target >= 0;
    let place = select(bears_loss, target, 0i32) as usize;
    let (column_of_target, lane_of_target) = (place / N::value(), place % N::value());

    let mut kept = Array::<Vector<F, N>>::new(comptime!(if held > 0 { held } else { 1 }));
    #[unroll]
    for i in 0..held {
        let column = unit + i * units;
        if column < vectors {
            kept[i] = logits[start + column];
        }
    }
    let mut peak = f32::new(f32::MIN);
    let mut sum = Vector::<f32, N>::new(0.0);
    let mut chosen = SharedMemory::<f32>::new(1usize);
    if comptime!(held > 0) {
        #[unroll]
        for i in 0..held {
            let column = unit + i * units;
            if column < vectors {
                let x = Vector::<f32, N>::cast_from(kept[i]);
                meet::<N>(x, &mut peak, &mut sum);
                keep_chosen::<N>(x, column == column_of_target, lane_of_target, &mut chosen);
            }
        }
    } else {
        let mut column = unit;
        while column < vectors {
            let x = Vector::<f32, N>::cast_from(logits[start + column]);
            meet::<N>(x, &mut peak, &mut sum);
            keep_chosen::<N>(x, column == column_of_target, lane_of_target, &mut chosen);
            column += units;
        }
    }
    let mut total = f32::new(0.0);
    #[unroll]
    for i in 0..N::value() {
        total += sum[i];
    }
    let highest = over_cube(peak, units, planes, true);
    let total = over_cube(total * (peak - highest).exp(), units, planes, false);
    if unit == 0 {
        losses[row] = select(bears_loss, total.ln() + (highest - chosen[0]), 0.0);
    }
    #[comptime]
    if let ComptimeOption::Some(d_logits) = d_logits {
        let factor = select(bears_loss, scale / total, 0.0);
        let one = select(bears_loss, scale, 0.0);
        if comptime!(held > 0) {
            #[unroll]
            for i in 0..held {
                let column = unit + i * units;
                if column < vectors {
                    let x = Vector::<f32, N>::cast_from(kept[i]);
                    let lane = select(column == column_of_target, lane_of_target, N::value().runtime());
                    let d = gradient::<N>(x, highest, factor, one, lane, bears_loss);
                    d_logits[row * vectors + column] = Vector::cast_from(d);
                }
            }
        } else {
            let mut column = unit;
            while column < vectors {
                let x = Vector::<f32, N>::cast_from(logits[start + column]);
                let lane = select(column == column_of_target, lane_of_target, N::value().runtime());
                let d = gradient::<N>(x, highest, factor, one, lane, bears_loss);
                d_logits[row * vectors + column] = Vector::cast_from(d);
                column += units;
            }
        }
    }
}

/// Puts the logit of the target where unit 0 finds it after [`over_cube`].
#[cube]
fn keep_chosen<N: Size>(x: Vector<f32, N>, here: bool, lane: usize, chosen: &mut SharedMemory<f32>) {
    if here {
        #[unroll]
        for i in 0..N::value() {
            if i == lane {
                chosen[0] = x[i];
            }
        }
    }
}

/// `(softmax - onehot) · scale` of one vector, whose lane `lane` is the target if there is such a lane.
#[cube]
fn gradient<N: Size>(
    x: Vector<f32, N>,
    highest: f32,
    factor: f32,
    one: f32,
    lane: usize,
    bears_loss: bool,
) -> Vector<f32, N> {
    let mut d = exponential::<N>(x - Vector::new(highest)) * Vector::new(factor);
    if lane < N::value() {
        #[unroll]
        for i in 0..N::value() {
            if i == lane {
                d[i] -= one;
            }
        }
    }
    // A row that bears no loss can hold infinities, of which 0 times the exponential is NaN.
    if !bears_loss {
        d = Vector::new(0.0);
    }
    d
}

/// Losses `[n]` in f32 of logits `[n, v]` against targets `[n]` (i32); 0 where the target is negative.
#[must_use]
pub fn losses<R: CubeRuntime>(logits: CubeTensor<R>, targets: CubeTensor<R>) -> CubeTensor<R> {
    launch(logits, targets, None).0
}

/// [`losses`], and `(softmax - onehot) · scale` `[n, v]` in `dtype`: the gradient of the scaled sum of the losses.
///
/// The gradient is written over the logits if they are of that dtype, contiguous and held by nobody else.
#[must_use]
pub fn rows<R: CubeRuntime>(
    logits: CubeTensor<R>,
    targets: CubeTensor<R>,
    scale: f32,
    dtype: DType,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let (losses, d_logits) = launch(logits, targets, Some((scale, dtype)));
    (losses, d_logits.expect("a gradient, since one was asked for"))
}

fn launch<R: CubeRuntime>(
    logits: CubeTensor<R>,
    targets: CubeTensor<R>,
    gradient: Option<(f32, DType)>,
) -> (CubeTensor<R>, Option<CubeTensor<R>>) {
    let (logits, targets) = (rows_side_by_side(logits), into_contiguous(targets));
    let [n, v] = [logits.meta.shape()[0], logits.meta.shape()[1]];
    assert_eq!(
        (targets.meta.num_elements(), targets.dtype),
        (n, DType::I32),
        "targets of {n} rows of logits"
    );
    let losses = empty(&logits, &[n], DType::F32);
    let in_place = |dtype| logits.dtype == dtype && logits.can_mut() && logits.is_contiguous();
    let alias = gradient.is_some_and(|(_, dtype)| in_place(dtype));
    let d_logits =
        gradient.map(|(_, dtype)| if alias { logits.clone() } else { empty(&logits, &[n, v], dtype) });
    if n == 0 || v == 0 {
        return (losses, d_logits);
    }
    let gradient_dtype = gradient.map_or(logits.dtype, |(_, dtype)| dtype);
    let width = vector_width(widest(logits.dtype).min(widest(gradient_dtype)), v, &[&logits]);
    let vectors = v / width;
    let units = vectors.div_ceil(4).next_power_of_two().clamp(32, limit(&logits));
    let held = vectors.div_ceil(units);
    let written = d_logits.clone().map(|d| if alias { d.as_tensor_alias(0) } else { d.into_tensor_arg() });
    // SAFETY: cubes past the last row end at once; units neither read nor write past the end of a row. In place, a unit
    // writes only vectors that it has read itself and will not read again.
    unsafe {
        rows_kernel::launch_unchecked::<R>(
            &logits.client,
            cubes(n),
            CubeDim::new_1d(units as u32),
            width,
            logits.clone().into_tensor_arg(),
            targets.into_tensor_arg(),
            losses.clone().into_tensor_arg(),
            written.into(),
            gradient.map_or(1.0, |(scale, _)| scale),
            units,
            if held <= HELD { held } else { 0 },
            has_planes(&logits),
            logits.dtype.into(),
            gradient_dtype.into(),
        );
    }
    (losses, d_logits)
}

/// Units of a cube at most: two cubes of 512 fit a multiprocessor, and vectors of the largest vocabularies their registers.
fn limit<R: CubeRuntime>(x: &CubeTensor<R>) -> usize {
    (x.client.properties().hardware.max_units_per_cube as usize).min(512)
}
