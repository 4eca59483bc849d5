//! Products of few rows with weights in four bits, and the corrections in the same pass.
//!
//! Thirty-two units share four rows of a weight and up to eight rows of x. Each unit reads eight words of eight
//! codes of each of the four rows before it uses one: neighbours read neighbouring words and neighbouring vectors
//! of x, and the loads in flight hide the memory's delay. Levels come from 16 words of shared memory, one bank
//! each. A unit restores one scale for 64 values; the others get it from that unit's register where planes have 32
//! units. The low-rank part adds `s u Bᵀ`, with u = x Aᵀ from a small kernel before. Weights that share x are one
//! launch.
//!
//! Bytes moved: codes and scales of the weights once for every eight rows, A and B once. What it trades: products
//! are taken in f32, without tensor cores, so that from some sixteen rows on unpacking the weights for a large
//! product is faster. The order of a row's sums does not depend on the other rows. What it refuses: dense weights,
//! widths that are no multiple of a block.

use burn::tensor::{DType, Tensor as DenseTensor};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::device::{Cube, primitive, tensor, uninitialized, vector_width_of, widest};
use crate::nf4::kernel::{DeviceScales, load_table};
use crate::nf4::{BLOCK, NESTED_BLOCK, NF4_CODE, dynamic_code};
use crate::product::ProductRuntime;
use crate::reduce::{has_planes, over_cube};
use crate::{FrozenWeight, LoraTerm, RowGroup};

/// Most rows that this is for.
const MOST_ROWS: usize = 16;
/// Rows of x that are multiplied at once.
const ROWS: usize = 8;
/// Most weights that share x.
const PARTS: usize = 3;
/// Units that share rows of a weight.
const LANES: usize = 32;
const UNITS: usize = 256;
/// Rows of a weight that those units have.
const OUTS: usize = 4;
/// Values in a word.
const PER_WORD: usize = 8;
/// Words that a unit reads before it uses one, so that each unit has one scale to restore.
const AHEAD: usize = BLOCK / PER_WORD;

/// The operation by this kernel; `None` for rows and weights that it is not for.
///
/// The backend does not use it yet: it has not run on a card, and software Vulkan takes minutes to compile it.
#[must_use]
pub fn grouped<R: ProductRuntime>(
    x: DenseTensor<Cube<R>, 2>,
    weights: &[FrozenWeight<Cube<R>>],
    groups: &[RowGroup<Cube<R>>],
    residual: Option<DenseTensor<Cube<R>, 2>>,
) -> Option<DenseTensor<Cube<R>, 2>> {
    let input = x.clone();
    fits(x.dims()[0], weights)
        .then(|| super::by_groups(x, weights, groups, |loras| forward(input, weights, loras, residual)))
}

/// Whether the kernel multiplies rows of these weights.
fn fits<R: ProductRuntime>(n: usize, weights: &[FrozenWeight<Cube<R>>]) -> bool {
    let packed = |weight: &FrozenWeight<Cube<R>>| match weight {
        FrozenWeight::Nf4(weight) => Some((weight.is_double(), weight.dims()[1])),
        FrozenWeight::Dense(_) => None,
    };
    let first = weights.first().and_then(packed);
    let alike = weights.iter().all(|weight| packed(weight) == first);
    let blocks = first.is_some_and(|(_, inner)| inner > 0 && inner.is_multiple_of(BLOCK));
    (1..=MOST_ROWS).contains(&n) && weights.len() <= PARTS && alike && blocks
}

/// x `[n, in]` to `[n, Σ out]`, for weights that [`fits`] names.
fn forward<R: ProductRuntime>(
    x: DenseTensor<Cube<R>, 2>,
    weights: &[FrozenWeight<Cube<R>>],
    loras: &[Option<LoraTerm<Cube<R>>>],
    residual: Option<DenseTensor<Cube<R>, 2>>,
) -> DenseTensor<Cube<R>, 2> {
    let x = into_contiguous(primitive(x));
    let residual = residual.map(|residual| into_contiguous(primitive(residual)));
    let factors = |side: fn(&LoraTerm<Cube<R>>) -> DenseTensor<Cube<R>, 2>| {
        let factor = |lora| into_contiguous(primitive(side(lora)));
        loras.iter().flatten().map(factor).collect::<Vec<CubeTensor<R>>>()
    };
    let (a, b) = (factors(|lora| lora.a.clone()), factors(|lora| lora.b.clone()));
    let u = (!a.is_empty()).then(|| low(&x, a));
    let out = weights.iter().map(|weight| weight.dims()[0]).sum();
    let y = uninitialized(&x, [x.meta.shape()[0], out], x.dtype);
    launch(&x, weights, loras, u.map(|u| (u, b)), residual, &y);
    tensor(y)
}

/// One of 1, 2, 4 and 8, so that few kernels are compiled.
fn rows_at_once(n: usize) -> usize {
    n.next_power_of_two().min(ROWS)
}

/// u `[n, Σ r]`, f32, of A's of one dtype.
fn low<R: CubeRuntime>(x: &CubeTensor<R>, a: Vec<CubeTensor<R>>) -> CubeTensor<R> {
    let [n, inner] = [x.meta.shape()[0], x.meta.shape()[1]];
    let total: usize = a.iter().map(|a| a.meta.shape()[0]).sum();
    let u = uninitialized(x, [n, total], DType::F32);
    let (factor, most) = (a[0].dtype, widest(x.dtype).min(widest(a[0].dtype)));
    let width =
        vector_width_of(most, inner, &[x]).min(vector_width_of(most, inner, &a.iter().collect::<Vec<_>>()));
    // SAFETY: a cube reads one row of an A that has it, and rows of x that are clamped to the last; it writes
    // elements of rows below n.
    unsafe {
        low_kernel::launch_unchecked::<R>(
            &x.client,
            CubeCount::Static(total as u32, n.div_ceil(ROWS) as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            width,
            x.clone().into_tensor_arg(),
            a.into_iter().map(CubeTensor::into_tensor_arg).collect::<SequenceArg<R, _>>(),
            u.clone().into_tensor_arg(),
            n,
            inner / width,
            total,
            rows_at_once(n),
            has_planes(x),
            x.dtype.into(),
            factor.into(),
        );
    }
    u
}

/// u of one row of A and up to eight rows of x.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn low_kernel<F: Float, G: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    factors: &Sequence<Tensor<Vector<G, N>>>,
    u: &mut Tensor<f32>,
    n: usize,
    vectors: usize,
    total: usize,
    #[comptime] rows: usize,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
    #[define(G)] _factor: StorageType,
) {
    let row = CUBE_POS_X as usize;
    let first = CUBE_POS_Y as usize * ROWS;
    let mut sums = Array::<f32>::new(rows);
    #[unroll]
    for i in 0..rows {
        sums[i] = f32::new(0.0);
    }
    let mut start = 0usize;
    #[unroll]
    for k in 0..factors.len().comptime() {
        let a = factors.index(k);
        let end = start + a.shape(0);
        if row >= start && row < end {
            let mut at = UNIT_POS as usize;
            while at < vectors {
                let a = Vector::<f32, N>::cast_from(a[(row - start) * vectors + at]);
                #[unroll]
                for i in 0..rows {
                    let product = a * Vector::<f32, N>::cast_from(x[min(first + i, n - 1) * vectors + at]);
                    #[unroll]
                    for j in 0..N::value() {
                        sums[i] += product[j];
                    }
                }
                at += UNITS;
            }
        }
        start = end;
    }
    let unit = UNIT_POS as usize;
    if comptime!(planes) {
        // A plane has four units or more.
        let mut parts = SharedMemory::<f32>::new(comptime!(UNITS / 4 * rows));
        #[unroll]
        for i in 0..rows {
            let part = plane_sum(sums[i]);
            if UNIT_POS_PLANE == 0 {
                parts[(UNIT_POS / PLANE_DIM) as usize * rows + i] = part;
            }
        }
        sync_cube();
        if unit < rows && first + unit < n {
            let mut sum = f32::new(0.0);
            for plane in 0..CUBE_DIM.div_ceil(PLANE_DIM) as usize {
                sum += parts[plane * rows + unit];
            }
            u[(first + unit) * total + row] = sum;
        }
    } else {
        for i in 0..rows {
            let sum = over_cube(sums[i], UNITS, false, false);
            if unit == 0 && first + i < n {
                u[(first + i) * total + row] = sum;
            }
            sync_cube();
        }
    }
}

/// One weight.
#[derive(CubeType, CubeLaunch)]
struct Packed {
    codes: Tensor<i32>,
    /// Codes of the scales; without double quantization not read.
    scale_codes: Tensor<i32>,
    /// Second-level scales, or the scales themselves.
    scales: Tensor<f32>,
    offset: Tensor<f32>,
    /// The group of units that has its first rows, and the one after its last.
    first_group: usize,
    end_group: usize,
    out: usize,
    /// The column of y that it begins with.
    column: usize,
    /// r; 0 without a correction.
    rank: usize,
    /// The column of u that it begins with.
    low_column: usize,
    /// s.
    scale: f32,
}

fn launch<R: ProductRuntime>(
    x: &CubeTensor<R>,
    weights: &[FrozenWeight<Cube<R>>],
    loras: &[Option<LoraTerm<Cube<R>>>],
    low: Option<(CubeTensor<R>, Vec<CubeTensor<R>>)>,
    residual: Option<CubeTensor<R>>,
    y: &CubeTensor<R>,
) {
    let [n, inner] = [x.meta.shape()[0], x.meta.shape()[1]];
    let (mut group, mut column, mut low_column, mut double) = (0, 0, 0, false);
    let mut parts = SequenceArg::new();
    for (weight, lora) in weights.iter().zip(loras) {
        let FrozenWeight::Nf4(weight) = weight else { panic!("dense weights do not fit") };
        let (codes, scales) = weight.device_parts();
        double = matches!(scales, DeviceScales::Double { .. });
        let (scale_codes, scales, offset) = match scales {
            DeviceScales::Plain(absmax) => (codes.clone(), absmax.clone(), absmax),
            DeviceScales::Double { codes, nested, offset } => (codes, nested, offset),
        };
        let (out, rank) = (weight.dims()[0], lora.as_ref().map_or(0, |lora| lora.a.dims()[0]));
        let end = group + out.div_ceil(OUTS);
        parts.push(PackedLaunch::new(
            codes.into_tensor_arg(),
            scale_codes.into_tensor_arg(),
            scales.into_tensor_arg(),
            offset.into_tensor_arg(),
            group,
            end,
            out,
            column,
            rank,
            low_column,
            lora.as_ref().map_or(0.0, |lora| lora.scale as f32),
        ));
        (group, column, low_column) = (end, column + out, low_column + rank);
    }
    // Where there is no correction, another tensor stands for u or B.
    let (u, b) = low.unwrap_or_else(|| (uninitialized(x, [1], DType::F32), vec![x.clone()]));
    let factor = b[0].dtype;
    let mut left = b.iter();
    let b = loras.iter().map(|lora| lora.as_ref().and_then(|_| left.next()).unwrap_or(&b[0]).clone());
    let b = b.map(CubeTensor::into_tensor_arg).collect::<SequenceArg<R, _>>();
    let corrected = loras.iter().any(Option::is_some);
    let width = vector_width_of(widest(x.dtype), inner, &[x]);
    let added = residual.is_some();
    let residual = residual.unwrap_or_else(|| x.clone());
    // SAFETY: rows of weights and of x are clamped to their last, words and blocks to the last of a row; only
    // elements that exist are written, each by one unit.
    unsafe {
        few_rows_kernel::launch_unchecked::<R>(
            &x.client,
            CubeCount::Static(group.div_ceil(UNITS / LANES) as u32, n.div_ceil(ROWS) as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            width,
            x.clone().into_tensor_arg(),
            parts,
            u.into_tensor_arg(),
            b,
            residual.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            n,
            inner,
            column,
            low_column,
            Form { rows: rows_at_once(n), corrected, double, added, reach: Reach::of(x) },
            x.dtype.into(),
            factor.into(),
        );
    }
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Form {
    /// Rows of x at once.
    rows: usize,
    /// Whether a weight has a correction.
    corrected: bool,
    /// Whether scales are in eight bits.
    double: bool,
    /// Whether there is a residual.
    added: bool,
    /// How far the planes reach.
    reach: Reach,
}

impl Form {
    /// Whether loops are written out. A software device takes minutes to compile what a card does in a second.
    fn unrolled(self) -> bool {
        self.reach == Reach::All
    }
}

/// Which of the units that share rows are in one plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Reach {
    /// All of them, and nobody else.
    All,
    /// Some of them, and nobody else.
    Some,
    /// There are no sums over planes, or they would be over too many.
    None,
}

impl Reach {
    fn of<R: CubeRuntime>(x: &CubeTensor<R>) -> Self {
        let hardware = &x.client.properties().hardware;
        match (has_planes(x), hardware.plane_size_min as usize, hardware.plane_size_max as usize) {
            (true, LANES, LANES) => Self::All,
            (true, _, most) if most <= LANES => Self::Some,
            _ => Self::None,
        }
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn few_rows_kernel<F: Float, G: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    parts: &Sequence<Packed>,
    u: &Tensor<f32>,
    factors: &Sequence<Tensor<G>>,
    residual: &Tensor<F>,
    y: &mut Tensor<F>,
    n: usize,
    inner: usize,
    columns: usize,
    low_columns: usize,
    #[comptime] form: Form,
    #[define(F)] _dtype: StorageType,
    #[define(G)] _factor: StorageType,
) {
    let rows = comptime!(form.rows);
    let mut levels = SharedMemory::<f32>::new(16usize);
    let mut dynamic = SharedMemory::<f32>::new(256usize);
    load_table(&mut levels, comptime!(NF4_CODE.to_vec()));
    if comptime!(form.double) {
        load_table(&mut dynamic, comptime!(dynamic_code().to_vec()));
    }
    sync_cube();
    let group = CUBE_POS_X as usize * (UNITS / LANES) + UNIT_POS as usize / LANES;
    let lane = UNIT_POS as usize % LANES;
    let first = CUBE_POS_Y as usize * ROWS;
    let mut sums = Array::<f32>::new(comptime!(rows * OUTS));
    #[unroll]
    for i in 0..comptime!(rows * OUTS) {
        sums[i] = f32::new(0.0);
    }
    let mut column = 0usize;
    let mut here = 0usize;
    #[unroll]
    for k in 0..parts.len().comptime() {
        let part = parts.index(k);
        if group >= part.first_group && group < part.end_group {
            let row = (group - part.first_group) * OUTS;
            column = part.column + row;
            here = min(part.out - row, OUTS);
            multiply::<F, N>(x, part, row, &levels, &dynamic, &mut sums, first, n, inner, lane, form);
            if comptime!(form.corrected) {
                correct::<G>(u, part, factors.index(k), row, &mut sums, first, n, low_columns, lane, rows);
            }
        }
    }
    let count = comptime!(rows * OUTS);
    let sum = over_lanes(&sums, lane, count, comptime!(form.reach));
    let (i, r) = (lane / OUTS, lane % OUTS);
    if lane < count && first + i < n && r < here {
        let place = (first + i) * columns + column + r;
        if comptime!(form.added) {
            y[place] = F::cast_from(sum + f32::cast_from(residual[place]));
        } else {
            y[place] = F::cast_from(sum);
        }
    }
}

/// Sums over the units that share rows; the unit numbered e gets the e-th.
///
/// Barriers are few, because a software device keeps all it has in registers across each one of them.
#[cube]
fn over_lanes(sums: &Array<f32>, lane: usize, #[comptime] count: usize, #[comptime] reach: Reach) -> f32 {
    let unit = UNIT_POS as usize;
    let mut own = f32::new(0.0);
    if comptime!(reach == Reach::All) {
        #[unroll]
        for e in 0..count {
            let sum = plane_sum(sums[e]);
            own = select(lane == e, sum, own);
        }
    } else if comptime!(reach == Reach::Some) {
        // A plane has four units or more.
        let mut parts = SharedMemory::<f32>::new(comptime!(UNITS / 4 * count));
        #[unroll]
        for e in 0..count {
            let part = plane_sum(sums[e]);
            if UNIT_POS_PLANE == 0 {
                parts[(UNIT_POS / PLANE_DIM) as usize * count + e] = part;
            }
        }
        sync_cube();
        if lane < count {
            let planes = LANES / PLANE_DIM as usize;
            for plane in 0..planes {
                own += parts[(unit / LANES * planes + plane) * count + lane];
            }
        }
    } else {
        let mut parts = SharedMemory::<f32>::new(UNITS);
        for e in 0..count {
            parts[unit] = sums[e];
            sync_cube();
            if lane == e {
                for other in 0..LANES {
                    own += parts[unit - lane + other];
                }
            }
            sync_cube();
        }
    }
    own
}

/// The scale of a block.
#[cube]
fn restore(part: &Packed, dynamic: &SharedMemory<f32>, block: usize, #[comptime] double: bool) -> f32 {
    if comptime!(double) {
        let code = (u32::cast_from(part.scale_codes[block / 4]) >> (8 * (block % 4) as u32)) & 255;
        dynamic[code as usize] * part.scales[block / NESTED_BLOCK] + part.offset[0]
    } else {
        part.scales[block]
    }
}

/// Adds this unit's products of four rows of a weight and the rows of x.
#[cube]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn multiply<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    part: &Packed,
    row: usize,
    levels: &SharedMemory<f32>,
    dynamic: &SharedMemory<f32>,
    sums: &mut Array<f32>,
    first: usize,
    n: usize,
    inner: usize,
    lane: usize,
    #[comptime] form: Form,
) {
    let words = inner / PER_WORD;
    let blocks = inner / BLOCK;
    let unrolled = comptime!(form.unrolled());
    let mut base = 0usize;
    while base < words {
        let mut packed = Array::<u32>::new(comptime!(OUTS * AHEAD));
        let mut scales = Array::<f32>::new(OUTS);
        let block = base / AHEAD + lane;
        #[unroll(unrolled)]
        for r in 0..OUTS {
            let row = min(row + r, part.out - 1);
            #[unroll(unrolled)]
            for i in 0..AHEAD {
                let word = min(base + i * LANES + lane, words - 1);
                packed[r * AHEAD + i] = u32::cast_from(part.codes[row * words + word]);
            }
            // Blocks past the row's end have scale 0, so that what is read there adds nothing.
            let scale = restore(part, dynamic, row * blocks + min(block, blocks - 1), comptime!(form.double));
            scales[r] = select(block < blocks, scale, f32::new(0.0));
        }
        #[unroll(unrolled)]
        for i in 0..AHEAD {
            let word = base + i * LANES + lane;
            let mut weights = Array::<f32>::new(comptime!(OUTS * PER_WORD));
            #[unroll(unrolled)]
            for r in 0..OUTS {
                let mut scale = scales[r];
                if comptime!(form.reach == Reach::All) {
                    scale = plane_shuffle(scales[r], (i * (LANES / AHEAD) + lane / AHEAD) as u32);
                } else {
                    let block = word / AHEAD;
                    let row = min(row + r, part.out - 1);
                    let own =
                        restore(part, dynamic, row * blocks + min(block, blocks - 1), comptime!(form.double));
                    scale = select(block < blocks, own, f32::new(0.0));
                }
                #[unroll]
                for j in 0..PER_WORD {
                    let shift = comptime!((4 * (j ^ 1)) as u32);
                    let level = levels[((packed[r * AHEAD + i] >> shift) & 15) as usize];
                    weights[r * PER_WORD + j] = level * scale;
                }
            }
            let place = min(word, words - 1) * PER_WORD;
            add::<F, N>(x, &weights, sums, first, n, inner, place, form);
        }
        base += comptime!(LANES * AHEAD);
    }
}

/// Adds the products of eight values of four rows of a weight and of the rows of x.
#[cube]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn add<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    weights: &Array<f32>,
    sums: &mut Array<f32>,
    first: usize,
    n: usize,
    inner: usize,
    place: usize,
    #[comptime] form: Form,
) {
    let width = N::value().comptime();
    #[unroll(form.unrolled())]
    for i in 0..comptime!(form.rows) {
        let from = (min(first + i, n - 1) * inner + place) / width;
        #[unroll]
        for k in 0..PER_WORD / width {
            let x = Vector::<f32, N>::cast_from(x[from + k]);
            #[unroll]
            for j in 0..width {
                #[unroll]
                for r in 0..OUTS {
                    sums[i * OUTS + r] += x[j] * weights[r * PER_WORD + k * width + j];
                }
            }
        }
    }
}

/// Adds this unit's part of `s u Bᵀ`.
#[cube]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn correct<G: Float>(
    u: &Tensor<f32>,
    part: &Packed,
    b: &Tensor<G>,
    row: usize,
    sums: &mut Array<f32>,
    first: usize,
    n: usize,
    low_columns: usize,
    lane: usize,
    #[comptime] rows: usize,
) {
    let mut j = lane;
    while j < part.rank {
        let mut factors = Array::<f32>::new(OUTS);
        #[unroll]
        for r in 0..OUTS {
            let row = min(row + r, part.out - 1);
            factors[r] = part.scale * f32::cast_from(b[row * part.rank + j]);
        }
        #[unroll]
        for i in 0..rows {
            let u = u[min(first + i, n - 1) * low_columns + part.low_column + j];
            #[unroll]
            for r in 0..OUTS {
                sums[i * OUTS + r] += u * factors[r];
            }
        }
        j += LANES;
    }
}
