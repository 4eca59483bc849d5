//! The base model, its tokenizer and an adapter, from arguments.

use std::path::{Path, PathBuf};

use buzzer::burn::tensor::DType;
use buzzer::kernels::KernelBackend;
use buzzer::model::Llama;
use buzzer::text::Tokenizer;
use buzzer::weights::{Adapter, Quantization, attach_adapter, describe, load_llama};
use clap::{Args, ValueEnum};

use crate::Failure;

/// The base model that ships with the project.
pub(crate) const TINY_LLAMA: &str = "datasets/tiny-llama";

/// Which model to use.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Folder of a Hugging Face Llama 2 model (config.json, safetensors, tokenizer.json)
    #[arg(long, value_name = "DIR", default_value = TINY_LLAMA)]
    pub model: PathBuf,
    /// A tokenizer.json or its folder, if it does not lie beside the model
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// How the frozen weights are held
    #[arg(long, value_enum, default_value_t = QuantizationArg::Nf4Double)]
    pub quantization: QuantizationArg,
}

/// [`Quantization`] as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QuantizationArg {
    /// Dense
    None,
    /// Four bits, scales in f32
    Nf4,
    /// Four bits, scales in eight
    Nf4Double,
}

impl From<QuantizationArg> for Quantization {
    fn from(argument: QuantizationArg) -> Self {
        match argument {
            QuantizationArg::None => Self::None,
            QuantizationArg::Nf4 => Self::Nf4,
            QuantizationArg::Nf4Double => Self::Nf4Double,
        }
    }
}

/// A model on a device and its tokenizer.
#[derive(Debug)]
pub struct Base<B: KernelBackend> {
    /// The model.
    pub model: Llama<B>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl ModelArgs {
    /// Opens the tokenizer.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn open_tokenizer(&self) -> Result<Tokenizer, Failure> {
        Ok(Tokenizer::from_file(self.tokenizer.as_deref().unwrap_or(&self.model))?)
    }

    /// Whether this is the model that ships with the project.
    #[must_use]
    pub fn is_sample(&self) -> bool {
        self.model == Path::new(TINY_LLAMA)
    }
}

/// Loads model and tokenizer, and checks that they belong together.
///
/// # Errors
/// If a file is missing or damaged, or the tokenizer has ids that the model has no row for.
pub fn load_base<B: KernelBackend>(args: &ModelArgs, device: &B::Device) -> Result<Base<B>, Failure> {
    let tokenizer = args.open_tokenizer()?;
    let model = load_llama::<B>(&args.model, args.quantization.into(), DType::F32, device)?;
    tokenizer.check_vocab(model.config().vocab_size)?;
    Ok(Base { model, tokenizer })
}

/// Reads an adapter and puts it onto the model; says in words what it is.
///
/// # Errors
/// If it cannot be read or does not fit.
pub fn attach<B: KernelBackend>(model: &mut Llama<B>, dir: &Path) -> Result<String, Failure> {
    let adapter = Adapter::read(dir)?;
    attach_adapter(model, &adapter, dir)?;
    Ok(describe(&adapter))
}
