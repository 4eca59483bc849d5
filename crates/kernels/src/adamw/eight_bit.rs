//! AdamW with its moments in 8 bits: 2 bytes of state an element instead of 8.
//!
//! Moments are cut into blocks of 256 values. A block keeps its largest magnitude in f32, and of each value the nearest
//! level of a map of 256, relative to that: the signed dynamic map for the first moment, the unsigned one for the second.
//! Dettmers et al., "8-bit Optimizers via Block-wise Quantization", <https://arxiv.org/abs/2110.02861>. The parameter moves by
//! moments that are not yet rounded.
//!
//! What it trades: a second moment below 1.6e-7 of its block's largest becomes 0. If the gradient is 0 too in the step
//! that follows, while the first moment is not, the change is that moment divided by ε. What it refuses: other maps
//! and block sizes.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::AdamW;
use crate::nf4::{dynamic_code, pack_bytes, unpack, unsigned_dynamic_code};

/// Values that share one scale.
pub const BLOCK_8BIT: usize = 256;

/// The moments of one parameter of n elements, flattened, in m = n / 256 (rounded up) blocks.
#[derive(Clone, Debug)]
pub struct AdamWState8<B: Backend> {
    /// Codes of m in the signed map, four a 32-bit word, lowest byte first `[64 m]`.
    pub first: Tensor<B, 1, Int>,
    /// Largest magnitude of each block of m, `[m]`, f32.
    pub first_scales: Tensor<B, 1>,
    /// Codes of v in the unsigned map, packed alike.
    pub second: Tensor<B, 1, Int>,
    /// Largest value of each block of v, `[m]`, f32.
    pub second_scales: Tensor<B, 1>,
}

impl<B: Backend> AdamWState8<B> {
    /// No steps taken yet of a parameter of so many elements.
    #[must_use]
    pub fn zeros(elements: usize, device: &B::Device) -> Self {
        let blocks = elements.div_ceil(BLOCK_8BIT);
        // Code 127 of the signed map is zero.
        let words = |code: i32| {
            let words = vec![code * 0x0101_0101; blocks * BLOCK_8BIT / 4];
            let length = words.len();
            Tensor::from_data(TensorData::new(words, [length]), (device, DType::I32))
        };
        let scales = || Tensor::zeros([blocks], (device, DType::F32));
        Self { first: words(127), first_scales: scales(), second: words(0), second_scales: scales() }
    }

    /// Both moments of `elements` elements, in f32.
    #[must_use]
    pub fn moments(&self, elements: usize) -> [Tensor<B, 1>; 2] {
        [
            restore(self.first.clone(), self.first_scales.clone(), dynamic_code()),
            restore(self.second.clone(), self.second_scales.clone(), unsigned_dynamic_code()),
        ]
        .map(|x| x.narrow(0, 0, elements))
    }
}

/// The composition of plain operations.
#[must_use]
pub fn reference8<B: Backend, const D: usize>(
    parameter: Tensor<B, D>,
    gradient: Tensor<B, D>,
    state: AdamWState8<B>,
    settings: &AdamW,
) -> (Tensor<B, D>, AdamWState8<B>) {
    let (dims, dtype) = (parameter.dims(), parameter.dtype());
    let elements = dims.iter().product::<usize>();
    let [first, second] = state.moments(elements);
    let moments = super::AdamWState { first, second };
    let parameter = parameter.reshape([elements]).cast(DType::F32);
    let gradient = gradient.reshape([elements]).cast(DType::F32);
    let (parameter, moments) = super::reference(parameter, gradient, moments, settings);
    let (first, first_scales) = quantize(moments.first, dynamic_code());
    let (second, second_scales) = quantize(moments.second, unsigned_dynamic_code());
    let state = AdamWState8 { first, first_scales, second, second_scales };
    (parameter.reshape(dims).cast(dtype), state)
}

fn levels<B: Backend>(map: &[f32; 256], device: &B::Device) -> Tensor<B, 1> {
    Tensor::from_data(TensorData::new(map.to_vec(), [256]), (device, DType::F32))
}

/// Level times scale, of whole blocks.
fn restore<B: Backend>(words: Tensor<B, 1, Int>, scales: Tensor<B, 1>, map: &[f32; 256]) -> Tensor<B, 1> {
    let blocks = scales.dims()[0];
    let codes = unpack::<B>(words, &[0, 8, 16, 24], 0xFF);
    let values = levels::<B>(map, &scales.device()).select(0, codes).reshape([blocks, BLOCK_8BIT]);
    (values * scales.reshape([blocks, 1])).reshape([blocks * BLOCK_8BIT])
}

/// Codes and scales of values, padded with zeros to whole blocks.
fn quantize<B: Backend>(values: Tensor<B, 1>, map: &[f32; 256]) -> (Tensor<B, 1, Int>, Tensor<B, 1>) {
    let device = values.device();
    let blocks = values.dims()[0].div_ceil(BLOCK_8BIT);
    let values = crate::nf4::pad(values, blocks * BLOCK_8BIT).reshape([blocks, BLOCK_8BIT]);
    let scales = values.clone().abs().max_dim(1);
    let divisor = scales.clone().mask_fill(scales.clone().equal_elem(0.0), 1.0);
    let codes = nearest((values / divisor).reshape([blocks * BLOCK_8BIT]), map, &device);
    let codes = codes.reshape([blocks * BLOCK_8BIT / 4, 4]);
    (pack_bytes(codes), scales.reshape([blocks]))
}

/// As many as there are midpoints of neighbouring levels below x, found by bisection.
fn nearest<B: Backend>(x: Tensor<B, 1>, map: &[f32; 256], device: &B::Device) -> Tensor<B, 1, Int> {
    let midpoints = map.windows(2).map(|pair| (pair[0] + pair[1]) * 0.5).collect::<Vec<_>>();
    let midpoints = Tensor::<B, 1>::from_data(TensorData::new(midpoints, [255]), (device, DType::F32));
    let mut codes = Tensor::<B, 1, Int>::zeros(x.dims(), (device, DType::I32));
    for step in [128, 64, 32, 16, 8, 4, 2, 1] {
        let upper = codes.clone().add_scalar(step);
        let below = midpoints.clone().select(0, upper.clone().sub_scalar(1)).lower(x.clone());
        codes = codes.mask_where(below, upper);
    }
    codes
}
