//! LoRA adapters as PEFT directories: `adapter_config.json` beside `adapter_model.safetensors` or `adapter_model.bin`.
//!
//! Whatever PEFT version wrote the configuration, unknown keys are passed over, but a key that changes what the
//! adapter computes is refused by its name, because an adapter applied nearly right is worse than one not applied.
//! What it trades: the adapter lives in host memory as f32, at most a few hundred megabytes. What it refuses: all but
//! LoRA on the seven linears of Llama's blocks; any of them, in any layers, with ranks and scalings of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use buzzer_model::Target;

use crate::error::Place;
use crate::open::no_weights;
use crate::write::{TensorToWrite, pytorch_metadata};
use crate::{Checkpoint, FloatType, NewFolder, WeightsError, write_json, write_safetensors};

mod config;
mod modules;

use config::Read;
use modules::Module;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PICKLED: &str = "adapter_model.bin";
const WANTED: &str = "adapter_model.safetensors or adapter_model.bin";
const FLAG: &str = "--adapter";
const PREFIX: &str = "base_model.model.model.layers.";
/// Far above any Llama's, and few enough to ask a pattern about each.
const MAX_LAYERS: usize = 1000;

/// What a PEFT configuration says about a LoRA adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The model that the adapter was trained on, a name or a path, if known.
    pub base_model: Option<String>,
    /// The rank r of both factors, where no pattern says otherwise; see [`Factors::rank`].
    pub rank: usize,
    /// The numerator of the scaling, where no pattern says otherwise; see [`Factors::alpha`].
    pub alpha: f64,
    /// The dropout in front of the factors while training.
    pub dropout: f64,
    /// The linears that have factors, in every layer or in some.
    pub targets: BTreeSet<Target>,
    /// Whether all targets have factors in every layer, so that the model must have as many layers as the adapter.
    pub every_layer: bool,
    /// Whether the scaling is `alpha / sqrt(r)` (<https://arxiv.org/abs/2312.03732>) instead of `alpha / r`.
    pub use_rslora: bool,
}

/// The two factors of one linear: its weight W `[out, in]` acts as `W + s B A`, with s of [`AdapterConfig::scaling`].
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// `[r, in]`, row by row.
    pub a: Vec<f32>,
    /// `[out, r]`, row by row.
    pub b: Vec<f32>,
    /// r: rows of `a` and columns of `b`.
    pub rank: usize,
    /// The numerator of the scaling.
    pub alpha: f64,
    /// Columns of `a`.
    pub in_features: usize,
    /// Rows of `b`.
    pub out_features: usize,
}

impl AdapterConfig {
    /// What the product of these factors is multiplied by: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.
    #[must_use]
    pub fn scaling(&self, factors: &Factors) -> f64 {
        let rank = factors.rank as f64;
        factors.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// A LoRA adapter in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Defaults, targets and kind of scaling.
    pub config: AdapterConfig,
    /// The factors by layer (from 0) and linear.
    pub tensors: BTreeMap<(usize, Target), Factors>,
}

/// Which of the two factors a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    A,
    B,
}

impl Adapter {
    /// The names of the files that [`Self::write`] makes.
    pub const FILES: [&str; 2] = [CONFIG, TENSORS];

    /// Reads a PEFT directory; f32, f16 and bf16 factors become f32.
    ///
    /// # Errors
    /// If a file is missing or damaged, if the configuration asks for more than LoRA on Llama's linears, or if the
    /// factors are not exactly those that it announces, each of its rank and of one shape per target.
    pub fn read(dir: &Path) -> Result<Self, WeightsError> {
        let mut read = Read::from_file(&dir.join(CONFIG))?;
        let files = [TENSORS, PICKLED].map(|name| dir.join(name));
        let Some(path) = files.iter().find(|path| path.is_file()) else {
            return Err(no_weights(Place { path: dir, flag: FLAG }, WANTED));
        };
        let checkpoint = Checkpoint::open_for(path, FLAG)?;
        let keys = pairs(&checkpoint)?;
        let modules: Vec<Module> = keys.keys().map(|&(layer, target)| Module { layer, target }).collect();
        let numbers = read.numbers(&modules)?;
        let mut tensors = BTreeMap::new();
        for ((place, [a, b]), numbers) in keys.into_iter().zip(numbers) {
            tensors.insert(place, Factors::read(&checkpoint, [a, b], numbers)?);
        }
        read.check_announced(path, &tensors)?;
        read.config.targets = tensors.keys().map(|&(_, target)| target).collect();
        let adapter = Self { config: read.config, tensors };
        adapter.check(path)?;
        Ok(adapter)
    }

    /// Writes a directory that PEFT 0.13 and later load, the factors as f32. It appears whole or not at all, in place of
    /// an older one, whose other files it keeps.
    ///
    /// # Errors
    /// If the factors do not agree with the configuration or hold NaN or infinity, or if a file cannot be written.
    /// What stood there before is kept then.
    pub fn write(&self, dir: &Path) -> Result<(), WeightsError> {
        let folder = NewFolder::begin(dir)?;
        self.write_into(&folder)?;
        folder.replace(&[])
    }

    /// [`Self::write`] as a part of a folder that holds more.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_into(&self, folder: &NewFolder) -> Result<(), WeightsError> {
        let path = folder.path().join(TENSORS);
        self.check(&path)?;
        let mut tensors = Vec::with_capacity(2 * self.tensors.len());
        for (&(layer, target), factors) in &self.tensors {
            let sides = [
                (Side::A, [factors.rank, factors.in_features], &factors.a),
                (Side::B, [factors.out_features, factors.rank], &factors.b),
            ];
            tensors.extend(sides.map(|(side, shape, values)| TensorToWrite {
                name: key_of(layer, target, side),
                shape: shape.to_vec(),
                values: values.into(),
            }));
        }
        write_safetensors(&path, &tensors, FloatType::F32, &pytorch_metadata())?;
        write_json(&folder.path().join(CONFIG), &config::to_json(self))
    }

    /// The number of the last layer with factors, plus one.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.tensors.last_key_value().map_or(0, |(&(layer, _), _)| layer.saturating_add(1))
    }

    /// That the targets of the configuration are those that have factors, in every layer if it says so, and that all
    /// shapes agree.
    fn check(&self, path: &Path) -> Result<(), WeightsError> {
        let targets = &self.config.targets;
        if self.tensors.is_empty() || targets.is_empty() || self.config.rank == 0 {
            let message = "it announces no factors, or there are none".to_owned();
            return Err(WeightsError::AdapterConfig { path: path.with_file_name(CONFIG), message });
        }
        if let Some(&(layer, target)) = self.tensors.keys().find(|(_, target)| !targets.contains(target)) {
            return Err(unannounced(path, (layer, target)));
        }
        if self.config.every_layer {
            // Stops at the first gap, so that a layer number of 10^18 costs nothing.
            let due = (0..self.layers()).flat_map(|layer| targets.iter().map(move |&target| (layer, target)));
            if let Some(place) = due.into_iter().find(|place| !self.tensors.contains_key(place)) {
                return Err(missing(path, place));
            }
        }
        self.check_shapes(path)
    }

    fn check_shapes(&self, path: &Path) -> Result<(), WeightsError> {
        let mut firsts: BTreeMap<Target, (usize, &Factors)> = BTreeMap::new();
        for (&(layer, target), factors) in &self.tensors {
            let &mut (first_layer, first) = firsts.entry(target).or_insert((layer, factors));
            let rank = factors.rank;
            let sides = [
                (Side::A, [rank, factors.in_features], [rank, first.in_features], factors.a.len()),
                (Side::B, [factors.out_features, rank], [first.out_features, rank], factors.b.len()),
            ];
            for (side, found, expected, values) in sides {
                let key = key_of(layer, target, side);
                if found != expected {
                    let reason = format!("as in layer {first_layer}, for {target}");
                    return Err(adapter_shape(path, &key, &found, expected, reason));
                }
                if rank == 0 || found[0].checked_mul(found[1]) != Some(values) {
                    return Err(adapter_key(path, &key, format!("{values} elements do not fill {found:?}")));
                }
            }
        }
        Ok(())
    }
}

/// Rank and alpha of one module, and which key of the configuration gives the rank.
struct Numbers {
    rank: usize,
    rank_from: &'static str,
    alpha: f64,
}

impl Factors {
    fn read(checkpoint: &Checkpoint, [a, b]: [&str; 2], numbers: Numbers) -> Result<Self, WeightsError> {
        let Numbers { rank, rank_from, alpha } = numbers;
        let (a_shape, b_shape) = (checkpoint.shape(a)?, checkpoint.shape(b)?);
        let in_features = a_shape.last().copied().unwrap_or(0);
        let out_features = b_shape.first().copied().unwrap_or(0);
        let sides = [(a, a_shape, [rank, in_features]), (b, b_shape, [out_features, rank])];
        for (key, found, expected) in sides {
            if found != expected {
                let reason = format!("{rank_from} is {rank} in {CONFIG}");
                return Err(adapter_shape(checkpoint.path(), key, found, expected, reason));
            }
        }
        let a = checkpoint.read_f32_any_shape(a)?.1;
        let b = checkpoint.read_f32_any_shape(b)?.1;
        Ok(Self { a, b, rank, alpha, in_features, out_features })
    }
}

/// The keys of both factors of every linear that has any.
fn pairs(checkpoint: &Checkpoint) -> Result<BTreeMap<(usize, Target), [&str; 2]>, WeightsError> {
    let refuse = |key: &str, message: String| Err(adapter_key(checkpoint.path(), key, message));
    let mut found: BTreeMap<(usize, Target), [Option<&str>; 2]> = BTreeMap::new();
    for key in checkpoint.names() {
        let Some((layer, target, side)) = parse_key(key) else {
            let message = "it is no LoRA factor of a Llama linear (…layers.N.self_attn.q_proj.lora_A.weight)";
            return refuse(key, message.into());
        };
        let slot = &mut found.entry((layer, target)).or_default()[side as usize];
        if let Some(other) = slot.replace(key) {
            return refuse(key, format!("`{other}` is the same factor"));
        }
    }
    let mut pairs = BTreeMap::new();
    for ((layer, target), sides) in found {
        match sides {
            [Some(a), Some(b)] => drop(pairs.insert((layer, target), [a, b])),
            [a, b] => {
                let partner = key_of(layer, target, if a.is_none() { Side::A } else { Side::B });
                return refuse(a.or(b).unwrap_or_default(), format!("its partner `{partner}` is missing"));
            }
        }
    }
    Ok(pairs)
}

/// An adapter in one line for people: base, rank, scaling, targets, layers and parameters.
#[must_use]
pub fn describe(adapter: &Adapter) -> String {
    let config = &adapter.config;
    let targets: Vec<&str> = config.targets.iter().map(|target| target.hf_name()).collect();
    let parameters: usize = adapter.tensors.values().map(|factors| factors.a.len() + factors.b.len()).sum();
    let layers: BTreeSet<usize> = adapter.tensors.keys().map(|&(layer, _)| layer).collect();
    let (count, last) = (layers.len(), adapter.layers());
    let layers = match layers.first() {
        _ if adapter.tensors.len() == last.saturating_mul(targets.len()) => format!("in {count} layers"),
        Some(first) if count == 1 => format!("in layer {first}"),
        first => format!("in some of layers {} to {}", first.unwrap_or(&0), last.saturating_sub(1)),
    };
    format!(
        "LoRA of {base}: rank {rank}, scaling {scaling}{kind}, {targets} {layers}, {parameters} parameters",
        base = config.base_model.as_deref().unwrap_or("an unnamed model"),
        rank = range(adapter.tensors.values().map(|factors| factors.rank as f64)),
        scaling = range(adapter.tensors.values().map(|factors| config.scaling(factors))),
        kind = if config.use_rslora { " (rsLoRA)" } else { "" },
        targets = targets.join(" "),
    )
}

/// One number, or the least and the greatest of several.
fn range(values: impl Iterator<Item = f64> + Clone) -> impl fmt::Display {
    let (least, greatest) = (values.clone().fold(f64::MAX, f64::min), values.fold(f64::MIN, f64::max));
    if least < greatest { format!("{least} to {greatest}") } else { least.to_string() }
}

/// PEFT's key of a factor.
fn key_of(layer: usize, target: Target, side: Side) -> String {
    format!("{PREFIX}{layer}.{}.lora_{side:?}.weight", target.hf_path())
}

/// The reverse of [`key_of`]; an adapter's name, `default`, may stand in front of `weight`.
fn parse_key(key: &str) -> Option<(usize, Target, Side)> {
    let (number, rest) = key.strip_prefix(PREFIX)?.split_once('.')?;
    let layer: usize = number.parse().ok().filter(|layer: &usize| layer.to_string() == number)?;
    if layer >= MAX_LAYERS {
        return None;
    }
    let rest = rest.strip_suffix(".weight")?;
    let rest = rest.strip_suffix(".default").unwrap_or(rest);
    let (path, side) = match rest.rsplit_once('.')? {
        (path, "lora_A") => (path, Side::A),
        (path, "lora_B") => (path, Side::B),
        _ => return None,
    };
    let target = Target::ALL.into_iter().find(|target| target.hf_path() == path)?;
    Some((layer, target, side))
}

fn missing(path: &Path, (layer, target): (usize, Target)) -> WeightsError {
    let message = format!("it is missing, and {CONFIG} asks for it");
    adapter_key(path, &key_of(layer, target, Side::A), message)
}

fn unannounced(path: &Path, (layer, target): (usize, Target)) -> WeightsError {
    let message = format!("{target} of layer {layer} is not among the target_modules of {CONFIG}");
    adapter_key(path, &key_of(layer, target, Side::A), message)
}

fn adapter_key(path: &Path, key: &str, message: String) -> WeightsError {
    WeightsError::AdapterKey { path: path.to_owned(), key: key.to_owned(), message }
}

fn adapter_shape(
    path: &Path,
    key: &str,
    found: &[usize],
    expected: [usize; 2],
    reason: String,
) -> WeightsError {
    let (path, key, expected) = (path.to_owned(), key.to_owned(), expected.to_vec());
    WeightsError::AdapterShape { path, key, found: found.to_vec(), expected, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_written() {
        for target in Target::ALL {
            for side in [Side::A, Side::B] {
                assert_eq!(parse_key(&key_of(31, target, side)), Some((31, target, side)));
            }
        }
        let key = "base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight";
        assert_eq!(parse_key(key), Some((3, Target::Up, Side::B)));
    }

    #[test]
    fn other_keys_are_not_read() {
        for key in [
            "",
            "base_model.model.lm_head.lora_A.weight",
            "base_model.model.model.layers.+3.mlp.up_proj.lora_B.weight",
            "base_model.model.model.layers.03.mlp.up_proj.lora_B.weight",
            "base_model.model.model.layers.1000.mlp.up_proj.lora_B.weight",
            "base_model.model.model.layers.99999999999999999999999.mlp.up_proj.lora_B.weight",
            "base_model.model.model.layers.3.self_attn.up_proj.lora_B.weight",
            "base_model.model.model.layers.3.mlp.up_proj.lora_B",
            "base_model.model.model.layers.3.mlp.up_proj.lora_magnitude_vector.weight",
        ] {
            assert_eq!(parse_key(key), None, "{key}");
        }
    }

    #[test]
    fn targets_have_one_name_in_many_spellings() {
        for target in Target::ALL {
            let full = format!("model.layers.7.{}", target.hf_path());
            for name in [target.hf_name(), target.hf_path(), &full] {
                assert_eq!(name.parse::<Target>().unwrap(), target);
            }
        }
        for name in ["", "q", "lm_head", "mlp.q_proj", "xself_attn.q_proj", ".*q_proj"] {
            assert!(name.parse::<Target>().is_err(), "{name}");
        }
    }
}
