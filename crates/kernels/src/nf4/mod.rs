//! Four-bit NormalFloat weights, packed as bitsandbytes packs them.
//!
//! A weight `[out, in]` is cut, row-major, into blocks of 64 values. A block keeps one scale, its largest magnitude m,
//! and for each value the index of the level nearest to `value / m` among 16 fixed levels:
//!
//! ```text
//! w[i] = level[code[i]] · m[i / 64]
//! ```
//!
//! With double quantization the scales themselves are kept as 8-bit codes: `m[j] = dynamic[c[j]] · s[j / 256] + o`.
//! Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", <https://arxiv.org/abs/2305.14314>.
//!
//! Bytes moved for n values: n / 2 codes and n / 16 bytes of scales (n / 64 with double quantization) read, n values
//! written.

mod codebook;
#[cfg(feature = "cubecl")]
pub(crate) mod cube;
mod host;
#[cfg(feature = "cubecl")]
pub mod kernel;
#[cfg(feature = "cubecl")]
pub(crate) mod scales;

use burn::module::{Module, Param, ParamId};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::KernelBackend;

pub use codebook::{NF4_CODE, dynamic_code, unsigned_dynamic_code};
pub use host::{DoubleQuant, Nf4Host, dequantize, double_quantize, quantize, restore_absmax};

/// Values that share one scale; the `blocksize` of bitsandbytes' 4-bit linear layer.
pub const BLOCK: usize = 64;
/// Scales that share one nested scale under double quantization.
pub const NESTED_BLOCK: usize = 256;

/// Packed parts that do not belong together.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {found} given where a weight [{out_features}, {in_features}] needs {needed}")]
pub struct Nf4Error {
    /// Which part.
    pub what: &'static str,
    /// Its length.
    pub found: usize,
    /// The length it must have.
    pub needed: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
}

/// The scales of a packed weight.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one per linear layer, and the larger one is the usual one")]
enum Scales<B: Backend> {
    /// One f32 a block `[m]`.
    Plain(Param<Tensor<B, 1>>),
    /// 8-bit codes of them.
    Double(DoubleScales<B>),
}

/// Doubly quantized scales, m of them.
#[derive(Module, Debug)]
pub struct DoubleScales<B: Backend> {
    /// Four codes a 32-bit word, lowest byte first `[m / 4 rounded up]`.
    codes: Param<Tensor<B, 1, Int>>,
    /// One f32 for 256 codes.
    nested: Param<Tensor<B, 1>>,
    /// Added to every scale.
    offset: Param<Tensor<B, 1>>,
}

/// A frozen weight `[out, in]` in four bits.
#[derive(Module, Debug)]
pub struct Nf4Tensor<B: Backend> {
    /// Eight codes a 32-bit word: the bytes of bitsandbytes, lowest byte first, the high half of a byte before the low.
    codes: Param<Tensor<B, 1, Int>>,
    scales: Scales<B>,
    out_features: usize,
    in_features: usize,
}

impl<B: Backend> Nf4Tensor<B> {
    /// Quantizes a dense weight, given row-major `[out, in]`, on the host.
    ///
    /// # Panics
    /// If there are not `out * in` values.
    #[must_use]
    pub fn quantize(values: &[f32], dims: [usize; 2], double: bool, device: &B::Device) -> Self {
        assert_eq!(values.len(), dims[0] * dims[1], "as many values as the shape holds");
        let packed = quantize(values);
        let scales = if double {
            Scales::Double(DoubleScales::of_host(&double_quantize(&packed.absmax), device))
        } else {
            Scales::Plain(frozen(Tensor::from_data(floats(packed.absmax), device)))
        };
        Self { codes: words(&packed.codes, device), scales, out_features: dims[0], in_features: dims[1] }
    }

    /// A weight of packed runs of its values, row by row; their scales are plain.
    ///
    /// # Panics
    /// If there is no run, if one's scales are quantized, if one but the last has no whole number of blocks, or if they are not as
    /// many values as the shape holds.
    #[must_use]
    pub fn join(runs: Vec<Self>, dims: [usize; 2]) -> Self {
        let lengths: Vec<_> = runs.iter().map(|run| run.out_features * run.in_features).collect();
        assert_eq!(lengths.iter().sum::<usize>(), dims[0] * dims[1], "as many values as the shape holds");
        let [whole @ .., _] = &lengths[..] else { panic!("a weight of no run") };
        assert!(whole.iter().all(|length| length.is_multiple_of(BLOCK)), "runs of whole blocks");
        let (codes, scales): (Vec<_>, Vec<_>) = runs
            .into_iter()
            .map(|run| match run.scales {
                Scales::Plain(absmax) => (run.codes.val(), absmax.val()),
                Scales::Double(_) => panic!("a run with quantized scales"),
            })
            .unzip();
        Self {
            codes: Param::initialized(ParamId::new(), Tensor::cat(codes, 0)),
            scales: Scales::Plain(frozen(Tensor::cat(scales, 0))),
            out_features: dims[0],
            in_features: dims[1],
        }
    }

    /// Takes codes and scales as bitsandbytes stores them without double quantization.
    ///
    /// # Errors
    /// If a part has another length than the shape asks for.
    pub fn from_parts(packed: Nf4Host, dims: [usize; 2], device: &B::Device) -> Result<Self, Nf4Error> {
        check(&packed.codes, packed.absmax.len(), dims)?;
        let scales = Scales::Plain(frozen(Tensor::from_data(floats(packed.absmax), device)));
        Ok(Self { codes: words(&packed.codes, device), scales, out_features: dims[0], in_features: dims[1] })
    }

    /// Takes codes and doubly quantized scales as bitsandbytes stores them.
    ///
    /// # Errors
    /// If a part has another length than the shape asks for.
    pub fn from_double_parts(
        codes: &[u8],
        scales: &DoubleQuant,
        dims: [usize; 2],
        device: &B::Device,
    ) -> Result<Self, Nf4Error> {
        check(codes, scales.codes.len(), dims)?;
        let needed = scales.codes.len().div_ceil(NESTED_BLOCK);
        part_length("second-level scales", scales.nested_absmax.len(), needed, dims)?;
        let scales = Scales::Double(DoubleScales::of_host(scales, device));
        Ok(Self { codes: words(codes, device), scales, out_features: dims[0], in_features: dims[1] })
    }

    /// `[out, in]`.
    #[must_use]
    pub fn dims(&self) -> [usize; 2] {
        [self.out_features, self.in_features]
    }

    /// Whether the scales are quantized too.
    #[must_use]
    pub fn is_double(&self) -> bool {
        matches!(self.scales, Scales::Double(_))
    }

    /// Where the weight lies.
    #[must_use]
    pub fn device(&self) -> B::Device {
        self.codes.val().device()
    }

    /// Bytes of the packed parts.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::Plain(absmax) => absmax.val().dims()[0],
            Scales::Double(double) => {
                double.codes.val().dims()[0] + double.nested.val().dims()[0] + double.offset.val().dims()[0]
            }
        };
        4 * (self.codes.val().dims()[0] + scales)
    }

    /// Copies the codes to the host, in bitsandbytes' order `[n / 2 rounded up]`.
    #[must_use]
    pub fn host_codes(&self) -> Vec<u8> {
        let mut bytes = word_bytes(self.codes.val());
        bytes.truncate((self.out_features * self.in_features).div_ceil(2));
        bytes
    }

    /// Copies the second-level scales to the host, if there are any.
    #[must_use]
    pub fn host_double(&self) -> Option<DoubleQuant> {
        let Scales::Double(double) = &self.scales else {
            return None;
        };
        let mut codes = word_bytes(double.codes.val());
        codes.truncate((self.out_features * self.in_features).div_ceil(BLOCK));
        Some(DoubleQuant {
            codes,
            nested_absmax: host_floats(double.nested.val()),
            offset: host_floats(double.offset.val()).first().copied().unwrap_or_default(),
        })
    }

    /// Copies the scales `[m]` to the host, restored where they are quantized.
    #[must_use]
    pub fn host_absmax(&self) -> Vec<f32> {
        match &self.scales {
            Scales::Plain(absmax) => host_floats(absmax.val()),
            Scales::Double(_) => self.host_double().as_ref().map(restore_absmax).unwrap_or_default(),
        }
    }
}

/// The composition of plain operations: codes to levels by a table, levels times scales.
#[must_use]
pub fn reference<B: Backend>(weight: &Nf4Tensor<B>, dtype: DType) -> Tensor<B, 2> {
    let [out, inner] = weight.dims();
    let device = weight.device();
    let count = out * inner;
    let blocks = count.div_ceil(BLOCK);
    // Within a word the bytes go up, within a byte the high half comes first.
    let codes = unpack::<B>(weight.codes.val(), &[4, 0, 12, 8, 20, 16, 28, 24], 0xF);
    let levels = Tensor::<B, 1>::from_data(floats(NF4_CODE.to_vec()), &device).select(0, codes);
    let padded = pad(levels.narrow(0, 0, count), blocks * BLOCK).reshape([blocks, BLOCK]);
    let scales = scales(&weight.scales, blocks, &device).reshape([blocks, 1]);
    let values = (padded * scales).reshape([blocks * BLOCK]).narrow(0, 0, count);
    values.reshape([out, inner]).cast(dtype)
}

fn scales<B: Backend>(scales: &Scales<B>, blocks: usize, device: &B::Device) -> Tensor<B, 1> {
    let double = match scales {
        Scales::Plain(absmax) => return absmax.val(),
        Scales::Double(double) => double,
    };
    let codes = unpack::<B>(double.codes.val(), &[0, 8, 16, 24], 0xFF).narrow(0, 0, blocks);
    let levels = Tensor::<B, 1>::from_data(floats(dynamic_code().to_vec()), device).select(0, codes);
    let groups = double.nested.val().dims()[0];
    let padded = pad(levels, groups * NESTED_BLOCK).reshape([groups, NESTED_BLOCK]);
    let nested = double.nested.val().reshape([groups, 1]);
    (padded * nested).reshape([groups * NESTED_BLOCK]).narrow(0, 0, blocks) + double.offset.val()
}

/// Fields of 32-bit words, in the order of `shifts`.
pub(crate) fn unpack<B: Backend>(words: Tensor<B, 1, Int>, shifts: &[i32], mask: i32) -> Tensor<B, 1, Int> {
    use burn::tensor::ElementConversion;
    let field =
        |&shift: &i32| words.clone().bitwise_right_shift_scalar(shift.elem()).bitwise_and_scalar(mask.elem());
    let total = words.dims()[0] * shifts.len();
    Tensor::stack::<2>(shifts.iter().map(field).collect(), 1).reshape([total])
}

/// Zeros after the values.
pub(crate) fn pad<B: Backend>(values: Tensor<B, 1>, to: usize) -> Tensor<B, 1> {
    let [length] = values.dims();
    if length == to {
        return values;
    }
    let zeros = Tensor::zeros([to - length], (&values.device(), values.dtype()));
    Tensor::cat(vec![values, zeros], 0)
}

/// Unpacks on the host into `out`, which holds the whole weight.
pub(crate) fn unpack_on_host<B: Backend>(weight: &Nf4Tensor<B>, out: &mut [f32]) {
    dequantize(&weight.host_codes(), &weight.host_absmax(), out);
}

fn check(codes: &[u8], absmax: usize, dims: [usize; 2]) -> Result<(), Nf4Error> {
    let count = dims[0] * dims[1];
    part_length("bytes of codes", codes.len(), count.div_ceil(2), dims)?;
    part_length("scales", absmax, count.div_ceil(BLOCK), dims)
}

fn part_length(what: &'static str, found: usize, needed: usize, dims: [usize; 2]) -> Result<(), Nf4Error> {
    if found == needed {
        return Ok(());
    }
    Err(Nf4Error { what, found, needed, out_features: dims[0], in_features: dims[1] })
}

impl<B: Backend> DoubleScales<B> {
    /// Scales that were quantized on the host.
    pub(crate) fn of_host(scales: &DoubleQuant, device: &B::Device) -> Self {
        Self {
            codes: words(&scales.codes, device),
            nested: frozen(Tensor::from_data(floats(scales.nested_absmax.clone()), device)),
            offset: frozen(Tensor::from_data(floats(vec![scales.offset]), device)),
        }
    }
}

impl<B: KernelBackend> Nf4Tensor<B> {
    /// The same weight with its scales in 8 bits; one whose scales are quantized stays as it is.
    #[must_use]
    pub fn with_quantized_scales(mut self) -> Self {
        if let Scales::Plain(absmax) = &self.scales {
            self.scales = Scales::Double(B::nf4_quantize_scales(absmax.val()));
        }
        self
    }
}

fn frozen<B: Backend>(tensor: Tensor<B, 1>) -> Param<Tensor<B, 1>> {
    Param::from_tensor(tensor).set_require_grad(false)
}

fn floats(values: Vec<f32>) -> TensorData {
    let length = values.len();
    TensorData::new(values, [length])
}

fn words<B: Backend>(bytes: &[u8], device: &B::Device) -> Param<Tensor<B, 1, Int>> {
    let word = |chunk: &[u8]| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        i32::from_le_bytes(word)
    };
    let words: Vec<i32> = bytes.chunks(4).map(word).collect();
    let length = words.len();
    let words = Tensor::<B, 1, Int>::from_data(TensorData::new(words, [length]), (device, DType::I32));
    Param::initialized(ParamId::new(), words)
}

fn word_bytes<B: Backend>(words: Tensor<B, 1, Int>) -> Vec<u8> {
    words.into_data().iter::<i32>().flat_map(i32::to_le_bytes).collect()
}

pub(crate) fn host_floats<B: Backend>(values: Tensor<B, 1>) -> Vec<f32> {
    let data = values.into_data();
    data.to_vec().unwrap_or_else(|_| data.iter().collect())
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::noise;

    #[test]
    fn the_host_and_the_reference_unpack_the_same_bits() {
        for (dims, double) in
            [([8, 64], false), ([8, 64], true), ([7, 33], true), ([3, 5], false), ([130, 140], true)]
        {
            let values = noise(dims[0] * dims[1], 7);
            let weight = Nf4Tensor::<Flex>::quantize(&values, dims, double, &Default::default());
            assert_eq!(weight.is_double(), double);
            let reference = reference(&weight, DType::F32).into_data();
            let host = Flex::nf4_dequantize(&weight, DType::F32).into_data();
            assert_eq!(reference.iter::<f32>().collect::<Vec<_>>(), host.iter::<f32>().collect::<Vec<_>>());
            let worst = values.iter().zip(host.iter::<f32>()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 0.2 * values.iter().fold(0.0, |m: f32, v| m.max(v.abs())), "{dims:?}: {worst}");
        }
    }

    #[test]
    fn runs_join_to_the_weight_packed_whole() {
        let (dims, device) = ([37, 70], Default::default());
        let values = noise(dims[0] * dims[1], 5);
        let whole = Nf4Tensor::<Flex>::quantize(&values, dims, false, &device);
        for length in [BLOCK, 10 * BLOCK, 41 * BLOCK] {
            let runs = values.chunks(length);
            let runs =
                runs.map(|run| Nf4Tensor::<Flex>::quantize(run, [1, run.len()], false, &device)).collect();
            let joined = Nf4Tensor::join(runs, dims);
            assert_eq!(joined.dims(), dims);
            assert_eq!(joined.host_codes(), whole.host_codes());
            assert_eq!(joined.host_absmax(), whole.host_absmax());
        }
    }

    #[test]
    fn parts_go_in_and_out_unchanged() {
        let values = noise(64 * 40, 3);
        let packed = quantize(&values);
        let double = double_quantize(&packed.absmax);
        let weight =
            Nf4Tensor::<Flex>::from_double_parts(&packed.codes, &double, [40, 64], &Default::default())
                .unwrap();
        assert_eq!(weight.host_codes(), packed.codes);
        let back = weight.host_double().unwrap();
        assert_eq!((back.codes, back.nested_absmax), (double.codes, double.nested_absmax));
        let plain = Nf4Tensor::<Flex>::from_parts(packed.clone(), [40, 64], &Default::default()).unwrap();
        assert_eq!(plain.host_absmax(), packed.absmax);
        let error = Nf4Tensor::<Flex>::from_parts(packed, [40, 65], &Default::default()).unwrap_err();
        assert!(error.to_string().contains("[40, 65]"), "{error}");
    }
}
