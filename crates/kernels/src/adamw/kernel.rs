//! AdamW on a device: one launch a step of a parameter, and the norm of all gradients in few launches.
//!
//! [`step`] reads 16 bytes of an element and writes 12; [`step8`], with moments in 8 bits, reads 10 and writes 6. Both work in
//! place, also where somebody else holds the buffers: whoever calls them owns parameter and moments. [`sum_of_squares`]
//! reads every gradient once. It sums in a fixed order, without atomics, so that a run can be repeated bit for bit.
//! What it refuses: tensors of 2³² elements or more, and parameters or moments that are not contiguous.

use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime};
use cubecl::prelude::*;

use super::{AdamW, AdamWState8, BLOCK_8BIT};
use crate::device::{cubes, primitive, uninitialized, vector_width, vector_width_of, widest};
use crate::nf4::kernel::load_table;
use crate::nf4::{dynamic_code, unsigned_dynamic_code};
use crate::reduce::{has_planes, over_cube};

/// Units of a cube; a block of 8-bit moments has as many values.
const UNITS: usize = 256;
/// Vectors of which a unit sums the squares.
const SUMMED: usize = 16;
/// Blocks of 8-bit moments that a cube takes one after the other, for which it fills its tables once.
const BLOCKS: usize = 8;
/// Tensors that one launch sums.
const TOGETHER: usize = 16;

/// The numbers of one step as the equation needs them, rounded to f32 once.
#[derive(CubeType, CubeLaunch)]
struct Numbers {
    /// Of the gradient.
    scale: f32,
    beta_1: f32,
    rest_1: f32,
    beta_2: f32,
    rest_2: f32,
    /// 1 / √(1 - β₂ⁿ).
    root: f32,
    epsilon: f32,
    /// η / (1 - β₁ⁿ).
    rate: f32,
    /// 1 - η λ.
    decay: f32,
}

fn numbers<R: CubeRuntime>(settings: &AdamW, gradient_scale: f32) -> NumbersLaunch<R> {
    let AdamW { learning_rate, beta_1, beta_2, epsilon, weight_decay, step, .. } = *settings;
    let corrected = |beta: f64| 1.0 - beta.powf(step as f64);
    NumbersLaunch::new(
        gradient_scale,
        beta_1 as f32,
        (1.0 - beta_1) as f32,
        beta_2 as f32,
        (1.0 - beta_2) as f32,
        (1.0 / corrected(beta_2).sqrt()) as f32,
        epsilon as f32,
        (learning_rate / corrected(beta_1)) as f32,
        (1.0 - learning_rate * weight_decay) as f32,
    )
}

#[cube]
fn first_moment<N: Size>(m: Vector<f32, N>, g: Vector<f32, N>, numbers: &Numbers) -> Vector<f32, N> {
    m * Vector::new(numbers.beta_1) + g * Vector::new(numbers.rest_1)
}

#[cube]
fn second_moment<N: Size>(v: Vector<f32, N>, g: Vector<f32, N>, numbers: &Numbers) -> Vector<f32, N> {
    v * Vector::new(numbers.beta_2) + g * g * Vector::new(numbers.rest_2)
}

/// The parameter after the step, from moments that have seen its gradient.
#[cube]
fn moved<N: Size>(
    p: Vector<f32, N>,
    m: Vector<f32, N>,
    v: Vector<f32, N>,
    numbers: &Numbers,
) -> Vector<f32, N> {
    let root = v.sqrt() * Vector::new(numbers.root) + Vector::new(numbers.epsilon);
    p * Vector::new(numbers.decay) - m / root * Vector::new(numbers.rate)
}

#[cube(launch_unchecked)]
fn step_kernel<P: Float, G: Float, N: Size>(
    parameter: &mut Tensor<Vector<P, N>>,
    gradient: &Tensor<Vector<G, N>>,
    first: &mut Tensor<Vector<f32, N>>,
    second: &mut Tensor<Vector<f32, N>>,
    numbers: &Numbers,
    vectors: usize,
    #[define(P)] _dtype: StorageType,
    #[define(G)] _gradient_dtype: StorageType,
) {
    let i = CUBE_POS as usize * UNITS + UNIT_POS as usize;
    if i < vectors {
        let p = Vector::<f32, N>::cast_from(parameter[i]);
        let g = Vector::<f32, N>::cast_from(gradient[i]) * Vector::new(numbers.scale);
        let m = first_moment::<N>(first[i], g, numbers);
        let v = second_moment::<N>(second[i], g, numbers);
        first[i] = m;
        second[i] = v;
        parameter[i] = Vector::cast_from(moved::<N>(p, m, v, numbers));
    }
}

/// One dimension over the same buffer.
///
/// # Panics
/// If the tensor is not contiguous.
fn flat<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    assert!(x.is_contiguous(), "a parameter and its moments are contiguous: {:?}", x.meta.shape());
    let count = x.meta.num_elements();
    CubeTensor::new_contiguous(x.client, x.device, Shape::from(vec![count]), x.handle, x.dtype)
}

/// One step of a parameter, [`reference()`](super::reference) with the gradient multiplied by `gradient_scale` first.
///
/// Parameter (any float dtype), first and second moment (f32) are written **in place**, whether or not others hold their
/// buffers: clones of these tensors change with them. The gradient may have another float dtype.
///
/// # Panics
/// If shapes differ, moments are not f32, or parameter or moments are not contiguous.
pub fn step<R: CubeRuntime>(
    parameter: CubeTensor<R>,
    gradient: CubeTensor<R>,
    first: CubeTensor<R>,
    second: CubeTensor<R>,
    settings: &AdamW,
    gradient_scale: f32,
) {
    assert_eq!([first.dtype, second.dtype], [DType::F32; 2], "moments of AdamW");
    for other in [&gradient, &first, &second] {
        assert_eq!(other.meta.shape(), parameter.meta.shape(), "gradient and moments of a parameter");
    }
    let gradient = flat(into_contiguous(gradient));
    let [parameter, first, second] = [parameter, first, second].map(flat);
    let count = parameter.meta.num_elements();
    if count == 0 {
        return;
    }
    let most = widest(DType::F32);
    let width = vector_width_of(most, count, &[&parameter, &gradient, &first, &second]);
    let (client, vectors) = (parameter.client.clone(), count / width);
    let (dtype, gradient_dtype) = (parameter.dtype.into(), gradient.dtype.into());
    // SAFETY: units past the last vector neither read nor write, and the tensors are of one length.
    unsafe {
        step_kernel::launch_unchecked::<R>(
            &client,
            cubes(vectors.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            width,
            parameter.into_tensor_arg(),
            gradient.into_tensor_arg(),
            first.into_tensor_arg(),
            second.into_tensor_arg(),
            numbers(settings, gradient_scale),
            vectors,
            dtype,
            gradient_dtype,
        );
    }
}

/// Each cube sums a stretch of the tensor that is its row of the launch, and writes the sum to a slot of its own.
#[cube(launch_unchecked)]
fn squares_kernel<F: Float, N: Size>(
    tensors: &Sequence<Tensor<Vector<F, N>>>,
    sums: &mut Tensor<f32>,
    first_slot: usize,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
) {
    let mut squares = Vector::<f32, N>::new(0.0);
    let start = CUBE_POS_X as usize * (UNITS * SUMMED) + UNIT_POS as usize;
    let many = tensors.len().comptime();
    #[unroll]
    for k in 0..many {
        if CUBE_POS_Y as usize == k {
            let x = tensors.index(k);
            let vectors = x.shape(0) / N::value();
            #[unroll]
            for i in 0..SUMMED {
                let place = start + i * UNITS;
                if place < vectors {
                    let value = Vector::<f32, N>::cast_from(x[place]);
                    squares += value * value;
                }
            }
        }
    }
    let mut sum = f32::new(0.0);
    #[unroll]
    for i in 0..N::value() {
        sum += squares[i];
    }
    let sum = over_cube(sum, UNITS, planes, false);
    if UNIT_POS == 0 {
        sums[first_slot + (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize] = sum;
    }
}

#[cube(launch_unchecked)]
fn total_kernel(sums: &Tensor<f32>, total: &mut Tensor<f32>, slots: usize, #[comptime] planes: bool) {
    let mut sum = f32::new(0.0);
    let mut slot = UNIT_POS as usize;
    while slot < slots {
        sum += sums[slot];
        slot += UNITS;
    }
    let sum = over_cube(sum, UNITS, planes, false);
    if UNIT_POS == 0 {
        total[0] = sum;
    }
}

/// Tensors of one dtype and vector width, of about one size, which one launch sums.
struct Group<R: CubeRuntime> {
    tensors: Vec<CubeTensor<R>>,
    width: usize,
    cubes: usize,
}

impl<R: CubeRuntime> Group<R> {
    fn new(x: CubeTensor<R>) -> Self {
        let width = vector_width(x.meta.num_elements(), &[&x]);
        let cubes = x.meta.num_elements().div_ceil(width * UNITS * SUMMED).max(1);
        Self { tensors: vec![x], width, cubes }
    }

    /// Cubes past the end of the smallest tensor idle, so tensors of very different sizes are not summed together.
    fn takes(&self, other: &Self, most: usize) -> bool {
        let (small, large) = (self.cubes.min(other.cubes), self.cubes.max(other.cubes));
        self.tensors.len() < most
            && (self.tensors[0].dtype, self.width) == (other.tensors[0].dtype, other.width)
            && large <= 4 * small
    }

    fn slots(&self) -> usize {
        self.cubes * self.tensors.len()
    }
}

/// Tensors in their order, gathered to launches of at most `most`.
fn grouped<R: CubeRuntime>(tensors: Vec<CubeTensor<R>>, most: usize) -> Vec<Group<R>> {
    let mut groups: Vec<Group<R>> = vec![];
    for x in tensors.into_iter().filter(|x| x.meta.num_elements() > 0) {
        let single = Group::new(flat(into_contiguous(x)));
        match groups.iter_mut().rev().take(4).find(|group| group.takes(&single, most)) {
            Some(group) => {
                group.cubes = group.cubes.max(single.cubes);
                group.tensors.extend(single.tensors);
            }
            None => groups.push(single),
        }
    }
    groups
}

/// The sum `[1]` of the squares of all elements of all tensors, of any float dtypes, in f32; nothing if there is no tensor.
///
/// Up to 16 tensors share a launch; a last launch adds the partial sums. Order of summation depends on shapes only.
#[must_use]
pub fn sum_of_squares<R: CubeRuntime>(tensors: Vec<CubeTensor<R>>) -> Option<CubeTensor<R>> {
    let like = tensors.first()?.clone();
    let planes = has_planes(&like);
    let most = (like.client.properties().hardware.max_bindings as usize).saturating_sub(3).clamp(1, TOGETHER);
    let groups = grouped(tensors, most);
    let slots = groups.iter().map(Group::slots).sum::<usize>();
    let sums = uninitialized(&like, [slots.max(1)], DType::F32);
    let total = uninitialized(&like, [1], DType::F32);
    let dim = CubeDim::new_1d(UNITS as u32);
    let mut first_slot = 0;
    for group in groups {
        let slots = group.slots();
        let count = CubeCount::Static(group.cubes as u32, group.tensors.len() as u32, 1);
        let dtype = group.tensors[0].dtype.into();
        let tensors =
            group.tensors.into_iter().map(CubeTensor::into_tensor_arg).collect::<SequenceArg<R, _>>();
        let sums = sums.clone().into_tensor_arg();
        // SAFETY: units read no vector past the end of their tensor, and cubes write one slot each, all of which are there.
        unsafe {
            squares_kernel::launch_unchecked::<R>(
                &like.client,
                count,
                dim,
                group.width,
                tensors,
                sums,
                first_slot,
                planes,
                dtype,
            );
        }
        first_slot += slots;
    }
    // SAFETY: units read no slot past the last.
    unsafe {
        total_kernel::launch_unchecked::<R>(
            &like.client,
            CubeCount::Static(1, 1, 1),
            dim,
            sums.into_tensor_arg(),
            total.clone().into_tensor_arg(),
            slots,
            planes,
        );
    }
    Some(total)
}

/// As many as there are midpoints of neighbouring levels below `x`: the code of the nearest level.
#[cube]
fn nearest(x: f32, midpoints: &SharedMemory<f32>) -> u32 {
    let mut code = 0u32;
    #[unroll]
    for i in 0..8u32 {
        let step = comptime!(128u32 >> i);
        code += select(x > midpoints[(code + step - 1) as usize], step, 0u32);
    }
    code
}

/// Between each level and the next; the last entry is not used.
fn midpoints(levels: &[f32; 256]) -> Vec<f32> {
    let next = levels.iter().skip(1).chain([&levels[255]]);
    levels.iter().zip(next).map(|(a, b)| (a + b) * 0.5).collect()
}

/// One of four bytes of a word of a block.
#[cube]
fn code_of(words: &Tensor<i32>, block: usize, unit: usize) -> usize {
    let word = u32::cast_from(words[block * (UNITS / 4) + unit / 4]);
    ((word >> (8 * (unit % 4) as u32)) & 255) as usize
}

/// Writes codes that lie in shared memory, four a word, by a quarter of the units from `first` on.
#[cube]
fn write_codes(words: &mut Tensor<i32>, codes: &SharedMemory<u32>, block: usize, #[comptime] first: usize) {
    let unit = UNIT_POS as usize;
    if unit >= first && unit < first + UNITS / 4 {
        let place = unit - first;
        let mut word = 0u32;
        #[unroll]
        for i in 0..4usize {
            word |= codes[4 * place + i] << comptime!(8 * i as u32);
        }
        words[block * (UNITS / 4) + place] = i32::cast_from(word);
    }
}

/// The tables that a cube needs.
#[derive(CubeType)]
struct Tables {
    signed: SharedMemory<f32>,
    unsigned: SharedMemory<f32>,
    signed_midpoints: SharedMemory<f32>,
    unsigned_midpoints: SharedMemory<f32>,
}

#[cube]
fn load_tables() -> Tables {
    let mut signed = SharedMemory::<f32>::new(UNITS);
    let mut unsigned = SharedMemory::<f32>::new(UNITS);
    let mut signed_midpoints = SharedMemory::<f32>::new(UNITS);
    let mut unsigned_midpoints = SharedMemory::<f32>::new(UNITS);
    load_table(&mut signed, comptime!(dynamic_code().to_vec()));
    load_table(&mut unsigned, comptime!(unsigned_dynamic_code().to_vec()));
    load_table(&mut signed_midpoints, comptime!(midpoints(dynamic_code())));
    load_table(&mut unsigned_midpoints, comptime!(midpoints(unsigned_dynamic_code())));
    sync_cube();
    Tables { signed, unsigned, signed_midpoints, unsigned_midpoints }
}

#[cube(launch_unchecked)]
fn step8_kernel<P: Float, G: Float>(
    parameter: &mut Tensor<P>,
    gradient: &Tensor<G>,
    first: &mut Tensor<i32>,
    first_scales: &mut Tensor<f32>,
    second: &mut Tensor<i32>,
    second_scales: &mut Tensor<f32>,
    numbers: &Numbers,
    #[comptime] planes: bool,
    #[define(P)] _dtype: StorageType,
    #[define(G)] _gradient_dtype: StorageType,
) {
    let unit = UNIT_POS as usize;
    let tables = load_tables();
    let mut m_codes = SharedMemory::<u32>::new(UNITS);
    let mut v_codes = SharedMemory::<u32>::new(UNITS);
    let mut block = CUBE_POS as usize * BLOCKS;
    let end = min(block + BLOCKS, first_scales.shape(0));
    while block < end {
        let place = block * UNITS + unit;
        let here = place < parameter.shape(0);
        let (m, v) = (code_of(first, block, unit), code_of(second, block, unit));
        let (m_scale, v_scale) = (first_scales[block], second_scales[block]);
        let mut p = Vector::<f32, Const<1>>::new(0.0);
        let mut g = Vector::<f32, Const<1>>::new(0.0);
        if here {
            p = Vector::cast_from(parameter[place]);
            g = Vector::<f32, Const<1>>::cast_from(gradient[place]) * Vector::new(numbers.scale);
        }
        let m = first_moment::<Const<1>>(Vector::new(tables.signed[m] * m_scale), g, numbers);
        let v = second_moment::<Const<1>>(Vector::new(tables.unsigned[v] * v_scale), g, numbers);
        if here {
            parameter[place] = P::cast_from(moved::<Const<1>>(p, m, v, numbers)[0]);
        }
        let (m, v) = (m[0], v[0]);
        let m_scale = over_cube(m.abs(), UNITS, planes, true);
        let v_scale = over_cube(v, UNITS, planes, true);
        // A block of zeros keeps the code of zero.
        let one = f32::new(1.0);
        m_codes[unit] = nearest(m / select(m_scale > 0.0, m_scale, one), &tables.signed_midpoints);
        v_codes[unit] = nearest(v / select(v_scale > 0.0, v_scale, one), &tables.unsigned_midpoints);
        sync_cube();
        write_codes(first, &m_codes, block, 0usize);
        write_codes(second, &v_codes, block, comptime!(UNITS / 4));
        if unit == 0 {
            first_scales[block] = m_scale;
            second_scales[block] = v_scale;
        }
        // The next block overwrites what lies in shared memory.
        sync_cube();
        block += 1;
    }
}

/// [`step`] with moments in 8 bits, in one launch: [`reference8`](super::reference8) with the gradient multiplied by
/// `gradient_scale` first.
///
/// Parameter and state are written **in place**, whether or not others hold their buffers.
///
/// # Panics
/// If the state is that of another number of elements, or the parameter is not contiguous.
pub fn step8<R: CubeRuntime>(
    parameter: CubeTensor<R>,
    gradient: CubeTensor<R>,
    state: &AdamWState8<CubeBackend<R, f32, i32, u8>>,
    settings: &AdamW,
    gradient_scale: f32,
) {
    assert_eq!(gradient.meta.shape(), parameter.meta.shape(), "gradient of a parameter");
    let (parameter, gradient) = (flat(parameter), flat(into_contiguous(gradient)));
    let blocks = parameter.meta.num_elements().div_ceil(BLOCK_8BIT);
    assert_eq!(state.first_scales.dims()[0], blocks, "blocks of 8-bit moments");
    if blocks == 0 {
        return;
    }
    let (client, planes) = (parameter.client.clone(), has_planes(&parameter));
    let (dtype, gradient_dtype) = (parameter.dtype.into(), gradient.dtype.into());
    let codes = |words: &burn::tensor::Tensor<_, 1, burn::tensor::Int>| words.clone().into_primitive();
    // SAFETY: cubes take no block past the last, and units past the last element neither read nor write parameter
    // and gradient; the state has whole blocks.
    unsafe {
        step8_kernel::launch_unchecked::<R>(
            &client,
            cubes(blocks.div_ceil(BLOCKS)),
            CubeDim::new_1d(UNITS as u32),
            parameter.into_tensor_arg(),
            gradient.into_tensor_arg(),
            codes(&state.first).into_tensor_arg(),
            primitive(state.first_scales.clone()).into_tensor_arg(),
            codes(&state.second).into_tensor_arg(),
            primitive(state.second_scales.clone()).into_tensor_arg(),
            numbers(settings, gradient_scale),
            planes,
            dtype,
            gradient_dtype,
        );
    }
}
