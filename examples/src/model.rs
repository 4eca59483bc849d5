//! The base model, its tokenizer and an adapter, from arguments.

use std::path::{Path, PathBuf};

use buzzer::Device;
use buzzer::kernels::KernelBackend;
use buzzer::model::Llama;
use buzzer::text::{Renderer, Template, Tokenizer};
use buzzer::weights::{Adapter, Quantization, attach_adapter, describe, load_llama};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::planning::{DtypeArg, device_dtype};
use crate::{AnswerArgs, Failure, RepoName, Wanted, local};

/// The base model that ships with the project.
pub(crate) const TINY_LLAMA: &str = "datasets/tiny-llama";
/// The two forms of a tokenizer in a model's folder, in the order in which they are looked for.
pub(crate) const TOKENIZER_FORMS: [&str; 2] = ["tokenizer.json", "tokenizer.model"];
/// What is read with a tokenizer, or goes with it into another library.
pub(crate) const TOKENIZER_NEIGHBOURS: [&str; 4] =
    ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"];
/// How Hugging Face's libraries sample from a model; it goes with the model.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";

/// Which model to use.
#[derive(Args, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelArgs {
    /// Folder of a Llama 2 model: Hugging Face's (config.json with safetensors or PyTorch files, bitsandbytes' 4 bits
    /// too) or Meta's (params.json, consolidated.*.pth); or a GGUF file; or the name of a repository on the Hugging Face
    /// hub, org/name or org/name@revision
    #[arg(long, value_name = "DIR", default_value = TINY_LLAMA)]
    #[serde(rename = "path")]
    pub model: PathBuf,
    /// What `model` was before [`Self::fetch`] put a folder in its place.
    #[arg(skip)]
    #[serde(skip)]
    repository: Option<RepoName>,
    /// A tokenizer.json, a tokenizer.model, or the folder of one, if it does not lie beside the model
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// How the frozen weights are held
    #[arg(long, value_enum, default_value_t)]
    pub quantization: QuantizationArg,
    /// Dtype to compute in [default: bf16 or f16 on a CUDA card, whichever it has; f32 elsewhere]
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
}

/// A model to answer with: base, adapter, prompt, device.
#[derive(Args, Clone, Debug)]
pub struct AnswererArgs {
    /// The base.
    #[command(flatten)]
    pub model: ModelArgs,
    /// How to answer.
    #[command(flatten)]
    pub answer: AnswerArgs,
    /// PEFT adapter to put onto the model: a folder, or the name of a repository as for --model
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Prompt: question, category or chat for answers; clue for writing clues
    #[arg(long, default_value = "question")]
    pub template: Template,
    /// Device to run on: cpu, cuda, cuda:N or wgpu, as far as they are built in [default: the best one here]
    #[arg(long, default_value_t, hide_default_value = true)]
    pub device: Device,
    /// Folder for report.json
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// [`Quantization`] as an argument.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuantizationArg {
    /// Dense
    None,
    /// Four bits, scales in f32
    Nf4,
    /// Four bits, scales in eight
    #[default]
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

impl Default for ModelArgs {
    fn default() -> Self {
        Self {
            model: TINY_LLAMA.into(),
            repository: None,
            tokenizer: None,
            quantization: QuantizationArg::default(),
            dtype: None,
        }
    }
}

impl ModelArgs {
    /// Puts the folder of its files in the place of a name on the hub, after fetching those that are not here.
    ///
    /// # Errors
    /// If they are neither here nor to be had.
    pub fn fetch(&mut self, wanted: Wanted<'_>) -> Result<(), Failure> {
        // The sample's path would be a name as well, for whoever starts a program in another folder.
        if !Self::is_sample_path(&self.model) && !self.model.exists() {
            self.repository = RepoName::of_model(&self.model);
            self.model = local(&self.model, wanted)?;
        }
        Ok(())
    }

    /// What other libraries know the model by: its repository, or the path.
    #[must_use]
    pub fn base_name(&self) -> String {
        self.repository.as_ref().map_or_else(|| self.model.display().to_string(), |name| name.id().to_owned())
    }

    /// Opens the tokenizer.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn open_tokenizer(&self) -> Result<Tokenizer, Failure> {
        // A GGUF file's tokenizer is looked for beside it.
        let is_gguf = self.model.extension().is_some_and(|extension| extension == "gguf");
        let beside = if is_gguf { self.model.with_file_name(".") } else { self.model.clone() };
        Ok(Tokenizer::from_file(self.tokenizer.as_deref().unwrap_or(&beside))?)
    }

    /// Whether this is the folder of the model that ships with the project.
    #[must_use]
    pub fn is_sample_path(path: &Path) -> bool {
        path == Path::new(TINY_LLAMA)
    }
}

/// Loads model and tokenizer, and checks that they belong together.
///
/// # Errors
/// If a file is missing or damaged, or the tokenizer has ids that the model has no row for, or the device does not
/// compute in the dtype.
pub fn load_base<B: KernelBackend>(args: &ModelArgs, device: &B::Device) -> Result<Base<B>, Failure> {
    let dtype = device_dtype::<B>(args.dtype, device)?;
    let tokenizer = args.open_tokenizer()?;
    let model = load_llama::<B>(&args.model, args.quantization.into(), dtype, device)?;
    tokenizer.check_vocab(model.config().vocab_size)?;
    // Buffers of packing are of no use to what follows.
    B::memory_cleanup(device);
    Ok(Base { model, tokenizer })
}

impl AnswererArgs {
    /// [`ModelArgs::fetch`] of the whole model, and the same for the adapter.
    ///
    /// # Errors
    /// As [`ModelArgs::fetch`].
    pub fn fetch(&mut self) -> Result<(), Failure> {
        self.model.fetch(Wanted::Model)?;
        if let Some(adapter) = &mut self.adapter {
            *adapter = local(adapter, Wanted::Adapter)?;
        }
        Ok(())
    }

    /// Loads the model with its adapter, which is described on the error stream, and the renderer of its prompts.
    ///
    /// # Errors
    /// If a file is missing or damaged, or parts do not belong together.
    pub fn load<B: KernelBackend>(&self, device: &B::Device) -> Result<(Llama<B>, Renderer), Failure> {
        let Base { mut model, tokenizer } = load_base::<B>(&self.model, device)?;
        if let Some(dir) = &self.adapter {
            let adapter = Adapter::read(dir)?;
            attach_adapter(&mut model, &adapter, dir)?;
            eprintln!("adapter   {}", describe(&adapter));
        }
        Ok((model, Renderer::new(tokenizer, self.template)))
    }
}
