//! Losses of rows of logits and their gradients on a device, one cube a row.
//!
//! A unit keeps its vectors of the row in registers, if they fit there: then logits are read once and gradients written once.
//! Longer rows are read twice. Largest logit and sum of exponentials come from one sweep, in which a unit rescales its sum
//! where it meets a larger logit. What it refuses: targets beyond the vocabulary, whose loss is left undefined.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::device::{cubes, side_by_side, uninitialized, vector_width_of, widest};
use crate::reduce::{has_planes, over_cube};

/// Vectors of 16 bytes that a unit keeps in registers.
const HELD: usize = 16;

/// e to the power of x by the card's approximation, wrong by 2 + 1.2 |x| units in the last place at most on CUDA.
///
/// Infinities and NaN stay what they are; the flags choose the instruction and nothing else on CUDA.
#[cube(fast_math = FastMath::ReducedPrecision | FastMath::NotNaN | FastMath::NotInf)]
fn exponential<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    x.exp()
}

/// Where the target of a row is: a vector of it, and an element of that. Negative targets bear no loss.
#[derive(CubeType)]
struct Target {
    column: usize,
    lane: usize,
    bears_loss: bool,
}

#[cube]
fn target_of<N: Size>(targets: &Tensor<i32>, row: usize) -> Target {
    let target = targets[row];
    let bears_loss = target >= 0;
    let place = select(bears_loss, target, 0i32) as usize;
    Target { column: place / N::value(), lane: place % N::value(), bears_loss }
}

/// Takes a vector into the largest logit so far and the sums of exponentials relative to that, and puts the logit of the
/// target where unit 0 finds it after [`over_cube`].
#[cube]
fn meet<N: Size>(
    x: Vector<f32, N>,
    column: usize,
    target: &Target,
    peak: &mut f32,
    sum: &mut Vector<f32, N>,
    chosen: &mut SharedMemory<f32>,
) {
    let mut largest = *peak;
    #[unroll]
    for i in 0..N::value() {
        largest = max(largest, x[i]);
    }
    let shrunk = exponential::<Const<1>>(Vector::new(*peak - largest))[0];
    *sum = *sum * Vector::new(shrunk) + exponential::<N>(x - Vector::new(largest));
    *peak = largest;
    if column == target.column {
        #[unroll]
        for i in 0..N::value() {
            if i == target.lane {
                chosen[0] = x[i];
            }
        }
    }
}

/// What every unit knows of a row after its first sweep.
#[derive(CubeType)]
struct Summary {
    /// Its largest logit.
    highest: f32,
    /// The scale over the sum of exponentials.
    factor: f32,
    /// The scale.
    one: f32,
}

/// `(softmax - onehot) · scale` of one vector.
#[cube]
fn gradient<N: Size>(x: Vector<f32, N>, column: usize, target: &Target, row: &Summary) -> Vector<f32, N> {
    let mut d = exponential::<N>(x - Vector::new(row.highest)) * Vector::new(row.factor);
    if column == target.column {
        #[unroll]
        for i in 0..N::value() {
            if i == target.lane {
                d[i] -= row.one;
            }
        }
    }
    // A row that bears no loss can hold infinities, of which 0 times the exponential is NaN.
    if !target.bears_loss {
        d = Vector::new(0.0);
    }
    d
}

#[cube]
fn sum_over_vector<N: Size>(x: Vector<f32, N>) -> f32 {
    let mut sum = f32::new(0.0);
    #[unroll]
    for i in 0..N::value() {
        sum += x[i];
    }
    sum
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
    let target = target_of::<N>(targets, row);
    // Of a row that does not fit, no vector is kept, and each is read from memory where it is used.
    let sweeps = if comptime!(held > 0) { held.runtime() } else { vectors.div_ceil(units) };
    let mut kept = Array::<Vector<F, N>>::new(comptime!(held.max(1)));
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
    #[unroll(held > 0)]
    for i in 0..sweeps {
        let column = unit + i * units;
        if column < vectors {
            let x = if comptime!(held > 0) { kept[i] } else { logits[start + column] };
            meet::<N>(Vector::cast_from(x), column, &target, &mut peak, &mut sum, &mut chosen);
        }
    }
    let highest = over_cube(peak, units, planes, true);
    let shrunk = exponential::<Const<1>>(Vector::new(peak - highest))[0];
    let total = over_cube(sum_over_vector::<N>(sum) * shrunk, units, planes, false);
    if unit == 0 {
        losses[row] = select(target.bears_loss, total.ln() + (highest - chosen[0]), 0.0);
    }
    #[comptime]
    if let ComptimeOption::Some(d_logits) = d_logits {
        let summary = Summary { highest, factor: scale / total, one: scale };
        #[unroll(held > 0)]
        for i in 0..sweeps {
            let column = unit + i * units;
            if column < vectors {
                let x = if comptime!(held > 0) { kept[i] } else { logits[start + column] };
                let d = gradient::<N>(Vector::cast_from(x), column, &target, &summary);
                d_logits[row * vectors + column] = Vector::cast_from(d);
            }
        }
    }
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
    let (logits, targets) = (side_by_side(logits), into_contiguous(targets));
    let [n, v] = [logits.meta.shape()[0], logits.meta.shape()[1]];
    assert_eq!(
        (targets.meta.num_elements(), targets.dtype),
        (n, DType::I32),
        "targets of {n} rows of logits"
    );
    let losses = uninitialized(&logits, [n], DType::F32);
    let in_place = |dtype| logits.dtype == dtype && logits.can_mut() && logits.is_contiguous();
    let alias = gradient.is_some_and(|(_, dtype)| in_place(dtype));
    let d_logits =
        gradient.map(|(_, dtype)| if alias { logits.clone() } else { uninitialized(&logits, [n, v], dtype) });
    if n == 0 || v == 0 {
        return (losses, d_logits);
    }
    let gradient_dtype = gradient.map_or(logits.dtype, |(_, dtype)| dtype);
    let width = vector_width_of(widest(logits.dtype).min(widest(gradient_dtype)), v, &[&logits]);
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
