//! Files into models and models into files: the glue between plain host numbers and tensors on a device.
//!
//! A checkpoint is read one tensor at a time and quantized as it is read. A device with kernels gets a linear in runs, in the dtype
//! of the file or in f32 if it does not compute in that, and packs each run; else at most one linear is dense at a time, in f32 on
//! the host. All give the same codes and scales.
//! What it refuses: a tensor that is missing, of another shape than the configuration says, with a value that is no
//! number, or that has no place in Llama's blocks; and an adapter that belongs to another model.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::module::Param;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use buzzer_kernels::nf4::Nf4Host;
use buzzer_kernels::{KernelBackend, Nf4Tensor, host_floats};
use buzzer_model::{Block, Llama, LlamaConfig, Lora, LoraSettings, Target, Weight, block_tensor};
use serde_json::Value;

use crate::error::Place;
use crate::gguf::{gguf_file, load_gguf, read_gguf_config};
use crate::{
    Absmax, Adapter, AdapterConfig, Checkpoint, Factors, Nf4Stored, TensorToWrite, WeightsError, meta,
};

/// The flag that names a model's folder.
const FLAG: &str = "--model";

/// Values that go to a device at a time, through memory that is filled again and again: fresh memory costs a page fault every 4 KiB,
/// which took most of loading. A multiple of the values that share a scale.
pub(crate) const RUN: usize = 1 << 22;

/// How the linears of the blocks are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quantization {
    /// Dense, in the compute dtype.
    None,
    /// Four bits, scales in f32.
    Nf4,
    /// Four bits, scales in eight.
    #[default]
    Nf4Double,
}

/// Reads the `config.json` of a model's folder or, where there is none, Meta's `params.json` and shards; or the sizes in a
/// GGUF file.
///
/// # Errors
/// If it cannot be read, describes a model that is not run here, or names a quantization that is not bitsandbytes'.
pub fn read_config(dir: &Path) -> Result<LlamaConfig, WeightsError> {
    if let Some(file) = gguf_file(dir) {
        return read_gguf_config(&file);
    }
    let path = dir.join("config.json");
    if !path.exists() && meta::is_folder(dir) {
        return meta::read_config(Place { path: dir, flag: FLAG });
    }
    let place = Place { path: &path, flag: FLAG };
    let text = fs::read_to_string(&path).map_err(|source| place.read(source))?;
    let config = LlamaConfig::from_hugging_face(&text, &path.display().to_string())?;
    match quantized_by(&text) {
        Some(method) if method != "bitsandbytes" => Err(WeightsError::QuantizedBy { path, method }),
        _ => Ok(config),
    }
}

/// The method of quantization that a configuration names.
fn quantized_by(config: &str) -> Option<String> {
    let config: Value = serde_json::from_str(config).ok()?;
    let quantization = config.get("quantization_config").filter(|value| !value.is_null())?;
    match &quantization["quant_method"] {
        Value::String(method) => Some(method.clone()),
        // bitsandbytes is older than the key.
        Value::Null if quantization.get("load_in_4bit").is_some() => Some("bitsandbytes".into()),
        other => Some(other.to_string()),
    }
}

/// Reads a model's folder, or a GGUF file, onto a device; embedding, norms and head in `dtype`.
///
/// A checkpoint that bitsandbytes wrote is used as it is, whatever `quantization` says: what it holds in NF4 stays so, and
/// the linears that it left out stay dense. A head in NF4 is unpacked, because heads are dense here.
///
/// # Errors
/// If a file or tensor is missing or damaged, has another shape than the configuration says, or holds a NaN; and if the
/// blocks have tensors that are none of Llama's.
pub fn load_llama<B: KernelBackend>(
    dir: &Path,
    quantization: Quantization,
    dtype: DType,
    device: &B::Device,
) -> Result<Llama<B>, WeightsError> {
    if let Some(file) = gguf_file(dir) {
        return load_gguf(&file, quantization, dtype, device);
    }
    let (config, checkpoint, quantization) = open_base(dir, quantization)?;
    let mut loader = Loader { checkpoint: &checkpoint, quantization, dtype, device, buffer: Vec::new() };
    let table = [config.vocab_size, config.hidden_size];
    let embedding = loader.table("model.embed_tokens.weight", table)?;
    let blocks = (0..config.num_hidden_layers)
        .map(|layer| loader.block(&config, layer))
        .collect::<Result<Vec<Block<B>>, _>>()?;
    let norm = loader.norm("model.norm.weight", config.hidden_size)?;
    // Checkpoints of tied models may leave the head out or hold a copy of the embedding.
    let head = (!config.tie_word_embeddings).then(|| loader.table("lm_head.weight", table)).transpose()?;
    Ok(Llama::new(&config, embedding, blocks, norm, head))
}

/// The sizes and tensors of a folder, and what of a quantization is left to do where bitsandbytes was there before.
pub(crate) fn open_base(
    dir: &Path,
    quantization: Quantization,
) -> Result<(LlamaConfig, Checkpoint, Quantization), WeightsError> {
    let config = read_config(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    refuse_foreign(&checkpoint, &config)?;
    let quantization = if Nf4Stored::any_stored(&checkpoint) { Quantization::None } else { quantization };
    Ok((config, checkpoint, quantization))
}

/// Refuses what would be left out of the computation: biases, other tensors of a block, blocks beyond the last.
fn refuse_foreign(checkpoint: &Checkpoint, config: &LlamaConfig) -> Result<(), WeightsError> {
    for name in checkpoint.names() {
        let Some((number, rest)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
        else {
            continue;
        };
        let message = if !is_of_block(rest) {
            "is none of Llama's".to_owned()
        } else if number.parse::<usize>().is_ok_and(|layer| layer < config.num_hidden_layers) {
            continue;
        } else {
            format!("is beyond the {} layers of the configuration", config.num_hidden_layers)
        };
        let path = checkpoint.file_of(name)?.to_owned();
        return Err(WeightsError::ForeignTensor { path, tensor: name.to_owned(), message });
    }
    Ok(())
}

/// Whether a name inside a block is a linear's weight, with whatever bitsandbytes keeps for it, a norm's, or the table
/// of frequencies that old checkpoints carry.
fn is_of_block(name: &str) -> bool {
    let linear = |target: &Target| {
        let rest = name.strip_prefix(target.hf_path());
        rest.is_some_and(|rest| {
            rest == ".weight" || rest.starts_with(".weight.") || Nf4Stored::is_of_int8(rest)
        })
    };
    ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.rotary_emb.inv_freq"]
        .contains(&name)
        || Target::ALL.iter().any(linear)
}

struct Loader<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    quantization: Quantization,
    dtype: DType,
    device: &'a B::Device,
    /// Reused from tensor to tensor, because fresh memory costs more than the conversion.
    buffer: Vec<f32>,
}

impl<B: KernelBackend> Loader<'_, B> {
    fn block(&mut self, config: &LlamaConfig, layer: usize) -> Result<Block<B>, WeightsError> {
        let norm = |name: &str| block_tensor(layer, name);
        let attention_norm = self.norm(&norm("input_layernorm.weight"), config.hidden_size)?;
        let mlp_norm = self.norm(&norm("post_attention_layernorm.weight"), config.hidden_size)?;
        Block::build(config, attention_norm, mlp_norm, |target| {
            let name = block_tensor(layer, &format!("{}.weight", target.hf_path()));
            self.linear(&name, config.linear_shape(target))
        })
    }

    fn linear(&mut self, name: &str, shape: [usize; 2]) -> Result<Weight<B>, WeightsError> {
        if Nf4Stored::is_stored(self.checkpoint, name) {
            return stored_weight(Nf4Stored::read(self.checkpoint, name, shape)?, name, self);
        }
        if self.quantization == Quantization::None {
            return Ok(Weight::frozen(self.tensor(name, shape)?));
        }
        let double = self.quantization == Quantization::Nf4Double;
        if B::PACKS_ON_DEVICE {
            let mut packed = Vec::new();
            self.runs(name, &shape, |run| packed.push(B::nf4_quantize(run, false)))?;
            return Ok(joined(packed, shape, double));
        }
        self.checkpoint.read_f32_into(name, &shape, &mut self.buffer)?;
        Ok(Weight::Nf4(Nf4Tensor::quantize(&self.buffer, shape, double, self.device)))
    }

    /// The values of a tensor on the device, in runs `[1, n]` of the dtype of the file, or of f32 if the device does not compute in
    /// that. While one run goes to the device, the next one is read.
    fn runs(
        &self,
        name: &str,
        shape: &[usize],
        mut each: impl FnMut(Tensor<B, 2>),
    ) -> Result<(), WeightsError> {
        self.checkpoint.expect_shape(name, shape)?;
        let stored = self.checkpoint.float_dtype(name)?;
        let as_f32 = !B::supports_dtype(self.device, stored);
        let dtype = if as_f32 { DType::F32 } else { stored };
        let count: usize = shape.iter().product();
        for first in (0..count).step_by(RUN) {
            let mut read = Ok(());
            let fill = &mut |out: &mut [u8]| read = self.checkpoint.read_values(name, first, as_f32, out);
            let run = B::upload(self.device, dtype, RUN.min(count - first), fill);
            read?;
            each(run);
        }
        Ok(())
    }

    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<Param<Tensor<B, 2>>, WeightsError> {
        if Nf4Stored::is_stored(self.checkpoint, name) {
            let stored = stored_weight(Nf4Stored::read(self.checkpoint, name, shape)?, name, self)?;
            return Ok(Param::from_tensor(stored.dense(self.dtype)).set_require_grad(false));
        }
        Ok(Param::from_tensor(self.tensor(name, shape)?).set_require_grad(false))
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<Param<Tensor<B, 1>>, WeightsError> {
        Ok(Param::from_tensor(self.tensor(name, [width])?).set_require_grad(false))
    }

    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<B, D>, WeightsError> {
        if B::PACKS_ON_DEVICE {
            let mut whole = Filling::new(shape.iter().product(), self.dtype, self.device);
            self.runs(name, &shape, |run| whole.push(run))?;
            return Ok(whole.tensor.reshape(shape));
        }
        let values = self.checkpoint.read_f32(name, &shape)?;
        Ok(Tensor::from_data(TensorData::new(values, shape), (self.device, self.dtype)))
    }
}

/// A weight of packed runs of its values, whose scales are in 8 bits then if they are to be.
pub(crate) fn joined<B: KernelBackend>(
    runs: Vec<Nf4Tensor<B>>,
    shape: [usize; 2],
    double: bool,
) -> Weight<B> {
    let packed = Nf4Tensor::join(runs, shape);
    Weight::Nf4(if double { packed.with_quantized_scales() } else { packed })
}

/// A tensor `[1, n]` that is filled with runs of its values as they come, so that one run exists beside it.
pub(crate) struct Filling<B: Backend> {
    pub(crate) tensor: Tensor<B, 2>,
    filled: usize,
}

impl<B: Backend> Filling<B> {
    pub(crate) fn new(length: usize, dtype: DType, device: &B::Device) -> Self {
        Self { tensor: Tensor::empty([1, length], (device, dtype)), filled: 0 }
    }

    pub(crate) fn push(&mut self, run: Tensor<B, 2>) {
        let (begin, run) = (self.filled, run.cast(self.tensor.dtype()));
        self.filled += run.dims()[1];
        let end = self.filled;
        self.tensor.inplace(|tensor| tensor.slice_assign([0..1, begin..end], run));
    }
}

/// bitsandbytes' parts as a packed weight.
fn stored_weight<B: KernelBackend>(
    stored: Nf4Stored,
    name: &str,
    loader: &Loader<'_, B>,
) -> Result<Weight<B>, WeightsError> {
    let Nf4Stored { shape, codes, absmax, .. } = stored;
    let packed = match absmax {
        Absmax::Plain(absmax) => Nf4Tensor::from_parts(Nf4Host { codes, absmax }, shape, loader.device),
        Absmax::Double(scales) => Nf4Tensor::from_double_parts(&codes, &scales, shape, loader.device),
    };
    let packed = packed.map_err(|error| WeightsError::Packed {
        path: loader.checkpoint.path().to_owned(),
        tensor: name.to_owned(),
        message: error.to_string(),
    })?;
    Ok(Weight::Nf4(packed))
}

/// Puts an adapter's factors onto a model, in place of any it had.
///
/// # Errors
/// If the adapter has another number of layers, or factors of other widths, than the model; `dir` names it.
pub fn attach_adapter<B: KernelBackend>(
    model: &mut Llama<B>,
    adapter: &Adapter,
    dir: &Path,
) -> Result<(), WeightsError> {
    check_fits(model.config(), adapter, dir)?;
    let device = model.device();
    for (layer, block) in model.blocks.iter_mut().enumerate() {
        for target in Target::ALL {
            block.linear_mut(target).lora = adapter.tensors.get(&(layer, target)).map(|factors| {
                let tensor = |values: &[f32], shape: [usize; 2]| {
                    Tensor::from_data(TensorData::new(values.to_vec(), shape), (&device, DType::F32))
                };
                let a = tensor(&factors.a, [factors.rank, factors.in_features]);
                let b = tensor(&factors.b, [factors.out_features, factors.rank]);
                Lora::new(a, b, adapter.config.scaling(factors))
            });
        }
    }
    Ok(())
}

pub(crate) fn check_fits(config: &LlamaConfig, adapter: &Adapter, dir: &Path) -> Result<(), WeightsError> {
    let refuse = |what: String| Err(WeightsError::AdapterMisfit { path: dir.to_owned(), what });
    for ((layer, target), factors) in &adapter.tensors {
        let found = [factors.out_features, factors.in_features];
        let expected = config.linear_shape(*target);
        if found != expected {
            return refuse(format!(
                "its {target} in layer {layer} is for a weight {found:?}, the model's is {expected:?}"
            ));
        }
    }
    let (theirs, ours) = (adapter.layers(), config.num_hidden_layers);
    if theirs > ours || adapter.config.every_layer && theirs < ours {
        return refuse(format!("it has {theirs} layers, the model {ours}"));
    }
    Ok(())
}

/// Copies a model's factors to the host.
///
/// `settings` must be those that the model's corrections were made with.
#[must_use]
pub fn extract_adapter<B: KernelBackend>(
    model: &Llama<B>,
    settings: &LoraSettings,
    dropout: f64,
    base_model: Option<String>,
) -> Adapter {
    let factors = |(layer, target, lora): (usize, Target, &Lora<B>)| {
        let [rank, in_features] = lora.a.val().dims();
        let [out_features, _] = lora.b.val().dims();
        let [a, b] = [&lora.a, &lora.b].map(|factor| host_floats(factor.val()));
        ((layer, target), Factors { a, b, rank, alpha: settings.alpha, in_features, out_features })
    };
    let tensors: BTreeMap<_, _> = model.loras().map(factors).collect();
    let config = AdapterConfig {
        base_model,
        rank: settings.rank,
        alpha: settings.alpha,
        dropout,
        targets: settings.targets.iter().copied().collect(),
        every_layer: true,
        use_rslora: settings.rslora,
    };
    Adapter { config, tensors }
}

/// The settings that an adapter was made with, less what patterns say about single modules.
#[must_use]
pub fn adapter_settings(config: &AdapterConfig) -> LoraSettings {
    LoraSettings {
        rank: config.rank,
        alpha: config.alpha,
        rslora: config.use_rslora,
        targets: config.targets.iter().copied().collect(),
    }
}

/// Every weight of a model under its Hugging Face name, dense, corrections left out.
#[must_use]
pub fn model_tensors<B: KernelBackend>(model: &Llama<B>) -> Vec<TensorToWrite<'static>> {
    let mut tensors = vec![to_write("model.embed_tokens.weight".into(), model.embedding.val())];
    for (layer, block) in model.blocks.iter().enumerate() {
        for target in Target::ALL {
            let name = block_tensor(layer, &format!("{}.weight", target.hf_path()));
            tensors.push(to_write(name, block.linear(target).weight.dense(DType::F32)));
        }
        let [attention, mlp] = block.norms();
        tensors.push(to_write(block_tensor(layer, "input_layernorm.weight"), attention));
        tensors.push(to_write(block_tensor(layer, "post_attention_layernorm.weight"), mlp));
    }
    tensors.push(to_write("model.norm.weight".into(), model.norm.val()));
    if let Some(head) = &model.head {
        tensors.push(to_write("lm_head.weight".into(), head.val()));
    }
    tensors
}

fn to_write<B: Backend, const D: usize>(name: String, tensor: Tensor<B, D>) -> TensorToWrite<'static> {
    let shape = tensor.dims().to_vec();
    TensorToWrite { name, shape, values: host_floats(tensor).into() }
}
