//! A GGUF file as a model on a device.
//!
//! One tensor at a time, restored to f32 and quantized again only if NF4 is asked for. What it refuses: architectures other
//! than `llama`, scaled rotary positions, and rotary positions over a part of a head.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{DType, Shape, Tensor, TensorData};
use buzzer_kernels::{KernelBackend, Nf4Tensor};
use buzzer_model::{Block, Llama, LlamaConfig, Weight};
use rayon::prelude::*;

use super::{Gguf, Metadata, from_gguf_rows, reordered_heads};
use crate::error::Place;
use crate::load::{Filling, RUN, joined};
use crate::open::WEIGHT_FILES;
use crate::parts::Part;
use crate::{Quantization, WeightsError, meta};

const FLAG: &str = "--model";
/// Larger sizes than any model has would make the number of all weights overflow.
const MAX_SIZE: i128 = 1 << 20;

/// The GGUF file that a path means: itself, or the only one of a folder without another form of the model.
pub(crate) fn gguf_file(path: &Path) -> Option<PathBuf> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|extension| extension == "gguf");
    if !path.is_dir() {
        return is_gguf(path).then(|| path.to_owned());
    }
    if WEIGHT_FILES.iter().any(|name| path.join(name).exists()) || meta::is_folder(path) {
        return None;
    }
    let entries = std::fs::read_dir(path).ok()?;
    let mut files = entries.flatten().map(|entry| entry.path()).filter(|path| is_gguf(path));
    files.next().filter(|_| files.next().is_none())
}

/// The sizes in a GGUF file's metadata.
pub(crate) fn read_gguf_config(path: &Path) -> Result<LlamaConfig, WeightsError> {
    Gguf::open(path, FLAG)?.config()
}

impl Gguf {
    /// The sizes of the model.
    ///
    /// # Errors
    /// If it is of another architecture, or lacks a size.
    pub fn config(&self) -> Result<LlamaConfig, WeightsError> {
        let place = self.place();
        match self.get("general.architecture") {
            Some(Metadata::Text(name)) if name == "llama" => {}
            other => {
                let message = format!("its architecture is {other:?}; `llama` is read here");
                return Err(place.gguf(message));
            }
        }
        if let Some(scaling) =
            self.get("llama.rope.scaling.type").filter(|kind| **kind != Metadata::Text("none".into()))
        {
            return Err(
                place.gguf(format!("its rotary positions are scaled ({scaling:?}), which is not supported"))
            );
        }
        let heads = self.size("llama.attention.head_count")?;
        let hidden = self.size("llama.embedding_length")?;
        let keys = self.size_or("llama.attention.head_count_kv", heads)?;
        let head_dim = self.size_or("llama.attention.key_length", hidden / heads)?;
        let equal = ["llama.attention.value_length", "llama.rope.dimension_count"];
        for key in equal {
            let found = self.size_or(key, head_dim)?;
            if found != head_dim {
                return Err(place.gguf(format!("`{key}` is {found}, and its heads are {head_dim} wide")));
            }
        }
        if !heads.is_multiple_of(keys) || head_dim == 0 || !head_dim.is_multiple_of(2) {
            let message =
                format!("{heads} heads over {keys} of keys, each {head_dim} wide, are not supported");
            return Err(place.gguf(message));
        }
        if heads * head_dim > MAX_SIZE as usize {
            return Err(place.gguf(format!("its {heads} heads are {head_dim} wide, too wide for so many")));
        }
        // The embedding has the last word on the number of its rows.
        let rows = self.tensor(&Part::Embedding.gguf_name()).and_then(|(_, shape)| shape.first().copied());
        let vocab = rows.ok_or_else(|| place.gguf("it has no embedding"))?;
        if !(1..=MAX_SIZE).contains(&(vocab as i128)) {
            return Err(place.gguf(format!("its embedding has {vocab} rows, no size")));
        }
        let layers = self.size("llama.block_count")?;
        let mlp = self.size("llama.feed_forward_length")?;
        Ok(LlamaConfig::new(vocab, hidden, mlp, layers, heads, keys, head_dim)
            .with_max_position_embeddings(self.size_or("llama.context_length", 4096)?)
            .with_rms_norm_eps(self.float("llama.attention.layer_norm_rms_epsilon", 1e-5)?)
            .with_rope_theta(self.float("llama.rope.freq_base", 10_000.0)?)
            .with_tie_word_embeddings(!self.contains(&Part::Head.gguf_name())))
    }

    fn size(&self, key: &str) -> Result<usize, WeightsError> {
        match self.get(key) {
            Some(&Metadata::Integer(value)) if (1..=MAX_SIZE).contains(&value) => Ok(value as usize),
            other => Err(self.place().gguf(format!("`{key}` is {other:?}, no size"))),
        }
    }

    fn size_or(&self, key: &str, otherwise: usize) -> Result<usize, WeightsError> {
        if self.get(key).is_some() { self.size(key) } else { Ok(otherwise) }
    }

    /// Stored as f32, and meant as the nearest number with as few digits as f32 can tell apart.
    fn float(&self, key: &str, otherwise: f64) -> Result<f64, WeightsError> {
        match self.get(key) {
            None => Ok(otherwise),
            Some(&Metadata::Float(value)) if value > 0.0 && value.is_finite() => {
                Ok((value as f32).to_string().parse().unwrap_or(value))
            }
            other => Err(self.place().gguf(format!("`{key}` is {other:?}, no positive number"))),
        }
    }
}

/// Reads a GGUF file onto a device; embedding, norms and head in `dtype`.
pub(crate) fn load_gguf<B: KernelBackend>(
    path: &Path,
    quantization: Quantization,
    dtype: DType,
    device: &B::Device,
) -> Result<Llama<B>, WeightsError> {
    let gguf = Gguf::open(path, FLAG)?;
    let config = gguf.config()?;
    let mut loader = Loader::<B> {
        gguf: &gguf,
        config: &config,
        quantization,
        dtype,
        device,
        stored: Vec::new(),
        values: Vec::new(),
    };
    let embedding = loader.frozen(Part::Embedding)?;
    let blocks = (0..config.num_hidden_layers)
        .map(|layer| {
            let attention_norm = loader.frozen(Part::AttentionNorm(layer))?;
            let mlp_norm = loader.frozen(Part::MlpNorm(layer))?;
            Block::build(&config, attention_norm, mlp_norm, |target| {
                loader.linear(Part::Linear(layer, target))
            })
        })
        .collect::<Result<Vec<Block<B>>, WeightsError>>()?;
    let norm = loader.frozen(Part::Norm)?;
    let head = (!config.tie_word_embeddings).then(|| loader.frozen(Part::Head)).transpose()?;
    refuse_foreign(&gguf, &config)?;
    Ok(Llama::new(&config, embedding, blocks, norm, head))
}

/// Refuses what was left out of the computation: biases, factors of rotary positions, blocks beyond the last.
fn refuse_foreign(gguf: &Gguf, config: &LlamaConfig) -> Result<(), WeightsError> {
    let known: BTreeSet<String> = Part::all(config).into_iter().map(Part::gguf_name).collect();
    match gguf.names().find(|&name| !known.contains(name)) {
        Some(name) => Err(WeightsError::ForeignTensor {
            path: gguf.path().to_owned(),
            tensor: name.to_owned(),
            message: "is none of Llama's".into(),
        }),
        None => Ok(()),
    }
}

struct Loader<'a, B: KernelBackend> {
    gguf: &'a Gguf,
    config: &'a LlamaConfig,
    quantization: Quantization,
    dtype: DType,
    device: &'a B::Device,
    /// As it stands in the file, and with its rows in Hugging Face's order.
    stored: Vec<f32>,
    values: Vec<f32>,
}

impl<B: KernelBackend> Loader<'_, B> {
    /// Reads a part into `values`.
    fn read(&mut self, part: Part) -> Result<(), WeightsError> {
        let (name, shape) = (part.gguf_name(), part.shape(self.config));
        match reordered_heads(part, self.config) {
            None => self.gguf.read_f32_into(&name, &shape, &mut self.values),
            Some(heads) => {
                self.gguf.read_f32_into(&name, &shape, &mut self.stored)?;
                from_gguf_rows(&self.stored, heads, self.config.hidden_size, &mut self.values);
                Ok(())
            }
        }
    }

    fn tensor<const D: usize>(&mut self, part: Part) -> Result<Tensor<B, D>, WeightsError> {
        self.read(part)?;
        let shape = part.shape(self.config);
        if B::PACKS_ON_DEVICE {
            let mut whole = Filling::new(self.values.len(), self.dtype, self.device);
            self.runs().for_each(|run| whole.push(run));
            return Ok(whole.tensor.reshape(Shape::from(shape)));
        }
        Ok(Tensor::from_data(TensorData::new(self.values.clone(), shape), (self.device, self.dtype)))
    }

    /// What was read last on the device, in runs `[1, n]`.
    fn runs(&self) -> impl Iterator<Item = Tensor<B, 2>> {
        self.values.chunks(RUN).map(|run| {
            let fill = &mut |out: &mut [u8]| {
                let out = out.as_chunks_mut().0;
                out.par_iter_mut().zip(run).for_each(|(out, value)| *out = value.to_le_bytes());
            };
            B::upload(self.device, DType::F32, run.len(), fill)
        })
    }

    fn frozen<const D: usize>(&mut self, part: Part) -> Result<Param<Tensor<B, D>>, WeightsError> {
        Ok(Param::from_tensor(self.tensor(part)?).set_require_grad(false))
    }

    fn linear(&mut self, part: Part) -> Result<Weight<B>, WeightsError> {
        if self.quantization == Quantization::None {
            return Ok(Weight::frozen(self.tensor(part)?));
        }
        self.read(part)?;
        let [out, inner, ..] = part.shape(self.config)[..] else {
            unreachable!("a linear is a matrix");
        };
        let double = self.quantization == Quantization::Nf4Double;
        if B::PACKS_ON_DEVICE {
            let packed = self.runs().map(|run| B::nf4_quantize(run, false)).collect();
            return Ok(joined(packed, [out, inner], double));
        }
        Ok(Weight::Nf4(Nf4Tensor::quantize(&self.values, [out, inner], double, self.device)))
    }
}

impl Place<'_> {
    pub(super) fn gguf(self, message: impl std::fmt::Display) -> WeightsError {
        WeightsError::Gguf { path: self.path.to_owned(), flag: self.flag, message: message.to_string() }
    }
}
