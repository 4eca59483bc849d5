//! A linear layer: a weight that is dense or packed in four bits, and a low-rank correction where there is one.

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use buzzer_kernels::qlora_linear::Input;
use buzzer_kernels::{Dropout, FrozenWeight, KernelBackend, LinearPart, LoraTerm, Nf4Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{LlamaConfig, ModelError, Target};

/// A weight `[out, in]`.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one per linear layer, and the larger one is the usual one")]
pub enum Weight<B: Backend> {
    /// As it is, in f32, f16 or bf16.
    Dense(Param<Tensor<B, 2>>),
    /// Frozen, in four bits.
    Nf4(Nf4Tensor<B>),
}

/// The low-rank factors of one layer; f32.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// `A [r, in]`.
    pub a: Param<Tensor<B, 2>>,
    /// `B [out, r]`.
    pub b: Param<Tensor<B, 2>>,
    /// alpha / r, or alpha / √r.
    pub scale: f64,
}

/// A linear layer without bias.
#[derive(Module, Debug)]
pub struct LoraLinear<B: Backend> {
    /// The weight.
    pub weight: Weight<B>,
    /// The correction.
    pub lora: Option<Lora<B>>,
}

/// Which layers are corrected, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraSettings {
    /// r.
    pub rank: usize,
    /// The correction is scaled by alpha / r.
    pub alpha: f64,
    /// Scale by alpha / √r instead (Kalajdzievski, <https://arxiv.org/abs/2312.03732>).
    pub rslora: bool,
    /// The linears with a correction.
    pub targets: Vec<Target>,
}

impl LoraSettings {
    /// The factor in front of the correction.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// # Errors
    /// If the rank is 0, alpha is not positive, or no linear is named.
    pub fn check(&self) -> Result<(), ModelError> {
        let wrong = |flag, found, choose| Err(ModelError::Setting { flag, found, choose });
        if self.rank == 0 {
            return wrong("--rank", "0".into(), "a rank from 1 on");
        }
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return wrong("--alpha", self.alpha.to_string(), "a positive number");
        }
        if self.targets.is_empty() {
            return wrong("--targets", "none".into(), "all linears, or some of the seven");
        }
        Ok(())
    }

    /// Numbers in the factors of a model of this shape.
    #[must_use]
    pub fn parameters(&self, config: &LlamaConfig) -> usize {
        let widths = |&target: &Target| config.linear_shape(target).iter().sum::<usize>();
        config.num_hidden_layers * self.rank * self.targets.iter().map(widths).sum::<usize>()
    }
}

impl<B: Backend> Weight<B> {
    /// A dense weight that is not trained.
    #[must_use]
    pub fn frozen(tensor: Tensor<B, 2>) -> Self {
        Self::Dense(Param::from_tensor(tensor).set_require_grad(false))
    }

    /// `[out, in]`.
    #[must_use]
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.val().dims(),
            Self::Nf4(weight) => weight.dims(),
        }
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => {
                weight.val().dims().iter().product::<usize>() * weight.val().dtype().size()
            }
            Self::Nf4(weight) => weight.bytes(),
        }
    }
}

impl<B: KernelBackend> Weight<B> {
    /// The weight as a dense tensor.
    #[must_use]
    pub fn dense(&self, dtype: DType) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => weight.val().cast(dtype),
            Self::Nf4(weight) => B::nf4_dequantize(weight, dtype),
        }
    }
}

impl<B: Backend> Lora<B> {
    /// PEFT's initial factors: A uniform in ±1/√in, B zero, so that the correction begins as nothing.
    ///
    /// `seed` and `stream` decide A on every backend alike.
    #[must_use]
    pub fn init(
        dims: [usize; 2],
        settings: &LoraSettings,
        seed: u64,
        stream: u64,
        device: &B::Device,
    ) -> Self {
        let [out, inner] = dims;
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(stream);
        let bound = 1.0 / (inner as f32).sqrt();
        let unit = |word: u32| (word >> 8) as f32 / (1 << 24) as f32;
        let values =
            (0..settings.rank * inner).map(|_| (2.0 * unit(generator.next_u32()) - 1.0) * bound).collect();
        let a = TensorData::new::<f32, _>(values, [settings.rank, inner]);
        let b = Tensor::zeros([out, settings.rank], (device, DType::F32));
        Self::new(Tensor::from_data(a, (device, DType::F32)), b, settings.scale())
    }

    /// Factors `A [r, in]` and `B [out, r]` with their scale.
    #[must_use]
    pub fn new(a: Tensor<B, 2>, b: Tensor<B, 2>, scale: f64) -> Self {
        Self { a: Param::from_tensor(a), b: Param::from_tensor(b), scale }
    }

    pub(crate) fn term(&self) -> LoraTerm<B> {
        LoraTerm { a: self.a.val(), b: self.b.val(), scale: self.scale }
    }
}

impl<B: Backend> LoraLinear<B> {
    /// A layer without correction.
    #[must_use]
    pub fn new(weight: Weight<B>) -> Self {
        Self { weight, lora: None }
    }

    /// Whether the weight itself is trained.
    fn is_trained(&self) -> bool {
        matches!(&self.weight, Weight::Dense(weight) if weight.val().is_require_grad())
    }

    /// The weight as the operations take it.
    pub(crate) fn frozen(&self) -> FrozenWeight<B> {
        match &self.weight {
            Weight::Dense(weight) => FrozenWeight::Dense(weight.val()),
            Weight::Nf4(weight) => FrozenWeight::Nf4(weight.clone()),
        }
    }

    pub(crate) fn part(&self) -> LinearPart<B> {
        self.part_with(&self.lora)
    }

    /// The weight with another correction than its own.
    pub(crate) fn part_with(&self, lora: &Option<Lora<B>>) -> LinearPart<B> {
        LinearPart { weight: self.frozen(), lora: lora.as_ref().map(Lora::term) }
    }
}

/// Layers on one input `x [n, in]`, their results side by side `[n, Σ out]`.
pub(crate) fn project<B: KernelBackend>(
    layers: &[&LoraLinear<B>],
    x: Tensor<B, 2>,
    dropout: Option<Dropout>,
) -> Tensor<B, 2> {
    if !layers.iter().any(|layer| layer.is_trained()) {
        return B::qlora_linear(x, &layers.iter().map(|layer| layer.part()).collect::<Vec<_>>(), dropout);
    }
    let dropped = dropout.map_or(x.clone(), |dropout| B::dropout(x.clone(), dropout));
    let result = |layer: &&LoraLinear<B>| {
        let y = x.clone().matmul(layer.weight.dense(x.dtype()).transpose());
        match &layer.lora {
            Some(lora) => y + lora.term().forward(dropped.clone()),
            None => y,
        }
    };
    Tensor::cat(layers.iter().map(result).collect(), 1)
}

impl<B: KernelBackend> LoraLinear<B> {
    /// The layer with its correction added into a dense weight: `W + s · B A`, in f32.
    ///
    /// It is the product of a linear layer with the weight `Aᵀ`, whose factors are not rounded: Burn's own would round them to TF32
    /// on CUDA cards that have it.
    #[must_use]
    pub fn merged(&self, dtype: DType) -> Tensor<B, 2> {
        let weight = self.weight.dense(DType::F32);
        let Some(lora) = &self.lora else { return weight.cast(dtype) };
        let [a, b] = [&lora.a, &lora.b].map(|factor| factor.val().cast(DType::F32));
        let x = b.mul_scalar(lora.scale);
        let input = Input { x: x.clone().into(), dropped: x, residual: Some(weight) };
        let part = LinearPart { weight: FrozenWeight::Dense(a.transpose()), lora: None };
        B::qlora_project(input, &[part]).y.cast(dtype)
    }
}
