//! LoRA adapters as PEFT directories: `adapter_config.json` beside `adapter_model.safetensors`.
//!
//! Whatever PEFT version wrote the configuration, unknown keys are passed over, but a key that changes what the
//! adapter computes is refused by its name, because an adapter applied nearly right is worse than one not applied.
//! What it trades: the adapter lives in host memory as f32, at most a few hundred megabytes. What it refuses: all but
//! plain LoRA of one rank on the same linears of every layer of a Llama model, and pickled `adapter_model.bin` files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use buzzer_model::Target;

use crate::checkpoint::no_weights;
use crate::error::Place;
use crate::write::{TensorToWrite, pytorch_metadata};
use crate::{Checkpoint, FloatType, NewFolder, WeightsError, write_json, write_safetensors};

mod config;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const FLAG: &str = "--adapter";
const PREFIX: &str = "base_model.model.model.layers.";

/// What a PEFT configuration says about a plain LoRA adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The model that the adapter was trained on, a name or a path, if known.
    pub base_model: Option<String>,
    /// The rank r of both factors.
    pub rank: usize,
    /// The numerator of the scaling.
    pub alpha: f64,
    /// The dropout in front of the factors while training.
    pub dropout: f64,
    /// The linears that have factors, the same in every layer.
    pub targets: BTreeSet<Target>,
    /// Whether the scaling is `alpha / sqrt(r)` (<https://arxiv.org/abs/2312.03732>) instead of `alpha / r`.
    pub use_rslora: bool,
}

impl AdapterConfig {
    /// What the product of the factors is multiplied by: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.
    #[must_use]
    pub fn scaling(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// The two factors of one linear: its weight W `[out, in]` acts as `W + scaling * B A`.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// `[r, in]`, row by row.
    pub a: Vec<f32>,
    /// `[out, r]`, row by row.
    pub b: Vec<f32>,
    /// Columns of `a`.
    pub in_features: usize,
    /// Rows of `b`.
    pub out_features: usize,
}

/// A LoRA adapter in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Rank, scaling and targets.
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
    /// Reads a PEFT directory; f32, f16 and bf16 factors become f32.
    ///
    /// # Errors
    /// If a file is missing or damaged, if the configuration asks for more than plain LoRA, or if the factors are
    /// not exactly those that it announces: every target in every layer from 0 on, both factors, of its rank, and of
    /// one shape per target.
    pub fn read(dir: &Path) -> Result<Self, WeightsError> {
        let config = AdapterConfig::read(&dir.join(CONFIG))?;
        let path = dir.join(TENSORS);
        if !path.is_file() {
            return Err(no_weights(Place { path: dir, flag: FLAG }, TENSORS));
        }
        let checkpoint = Checkpoint::open_for(&path, FLAG)?;
        let mut keys: BTreeMap<(usize, Target), [Option<&str>; 2]> = BTreeMap::new();
        for key in checkpoint.names() {
            let refuse = |message: String| adapter_key(&path, key, message);
            let (layer, target, side) = parse_key(key).ok_or_else(|| {
                refuse(
                    "it is no LoRA factor of a Llama linear (…layers.N.self_attn.q_proj.lora_A.weight)"
                        .into(),
                )
            })?;
            let slot = &mut keys.entry((layer, target)).or_default()[side as usize];
            if let Some(other) = slot.replace(key) {
                return Err(refuse(format!("`{other}` is the same factor")));
            }
        }
        let mut tensors = BTreeMap::new();
        for ((layer, target), sides) in keys {
            let (a, b) = match sides {
                [Some(a), Some(b)] => (a, b),
                [a, b] => {
                    let present = a.or(b).unwrap_or_default();
                    let partner = key_of(layer, target, if a.is_none() { Side::A } else { Side::B });
                    return Err(adapter_key(&path, present, format!("its partner `{partner}` is missing")));
                }
            };
            tensors.insert((layer, target), Factors::read(&checkpoint, a, b, config.rank)?);
        }
        let adapter = Self { config, tensors };
        adapter.check(&path)?;
        Ok(adapter)
    }

    /// Writes a directory that PEFT 0.13 and later load, the factors as f32. It appears whole or not at all, in place of
    /// an older one, whose other files it keeps.
    ///
    /// # Errors
    /// If the factors do not agree with the configuration or hold NaN or infinity, or if a file cannot be written.
    /// What stood there before is kept then.
    pub fn write(&self, dir: &Path) -> Result<(), WeightsError> {
        let path = dir.join(TENSORS);
        self.check(&path)?;
        let mut tensors = Vec::with_capacity(2 * self.tensors.len());
        for (&(layer, target), factors) in &self.tensors {
            let sides = [
                (Side::A, [self.config.rank, factors.in_features], &factors.a),
                (Side::B, [factors.out_features, self.config.rank], &factors.b),
            ];
            tensors.extend(sides.map(|(side, shape, values)| TensorToWrite {
                name: key_of(layer, target, side),
                shape: shape.to_vec(),
                values: values.into(),
            }));
        }
        let folder = NewFolder::begin(dir)?;
        write_safetensors(&folder.path().join(TENSORS), &tensors, FloatType::F32, &pytorch_metadata())?;
        write_json(&folder.path().join(CONFIG), &self.config.to_json())?;
        folder.replace(&[])
    }

    /// How many layers have factors.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.tensors.last_key_value().map_or(0, |(&(layer, _), _)| layer.saturating_add(1))
    }

    /// That every target of the configuration has factors in every layer, of one shape per target, and no other has.
    fn check(&self, path: &Path) -> Result<(), WeightsError> {
        let targets = &self.config.targets;
        if self.tensors.is_empty() || targets.is_empty() || self.config.rank == 0 {
            let message = "it announces no factors, or there are none".to_owned();
            return Err(WeightsError::AdapterConfig { path: path.with_file_name(CONFIG), message });
        }
        // Walks what is there beside what should be there, so that a layer number of 10^18 costs nothing.
        let due = (0..).flat_map(|layer| targets.iter().map(move |&target| (layer, target)));
        for (&(layer, target), due) in self.tensors.keys().zip(due) {
            if (layer, target) == due {
                continue;
            }
            let key = key_of(layer, target, Side::A);
            if !targets.contains(&target) {
                let message = format!("{target} is not among the target_modules of {CONFIG}");
                return Err(adapter_key(path, &key, message));
            }
            return Err(missing(path, due));
        }
        let last = self.layers() - 1;
        if let Some(&target) = targets.iter().find(|&&target| !self.tensors.contains_key(&(last, target))) {
            return Err(missing(path, (last, target)));
        }
        self.check_shapes(path)
    }

    fn check_shapes(&self, path: &Path) -> Result<(), WeightsError> {
        let rank = self.config.rank;
        for (&(layer, target), factors) in &self.tensors {
            let Some(first) = self.tensors.get(&(0, target)) else {
                continue;
            };
            let sides = [
                (Side::A, [rank, factors.in_features], [rank, first.in_features], factors.a.len()),
                (Side::B, [factors.out_features, rank], [first.out_features, rank], factors.b.len()),
            ];
            for (side, found, expected, values) in sides {
                let key = key_of(layer, target, side);
                if found != expected {
                    let reason = format!("as in layer 0, for {target}");
                    return Err(adapter_shape(path, &key, &found, expected, reason));
                }
                if found[0].checked_mul(found[1]) != Some(values) {
                    return Err(adapter_key(path, &key, format!("{values} elements do not fill {found:?}")));
                }
            }
        }
        Ok(())
    }
}

impl Factors {
    fn read(checkpoint: &Checkpoint, a: &str, b: &str, rank: usize) -> Result<Self, WeightsError> {
        let (a_shape, b_shape) = (checkpoint.shape(a)?, checkpoint.shape(b)?);
        let in_features = a_shape.last().copied().unwrap_or(0);
        let out_features = b_shape.first().copied().unwrap_or(0);
        let sides = [(a, a_shape, [rank, in_features]), (b, b_shape, [out_features, rank])];
        for (key, found, expected) in sides {
            if found != expected {
                let reason = format!("r is {rank} in {CONFIG}");
                return Err(adapter_shape(checkpoint.path(), key, found, expected, reason));
            }
        }
        let a = checkpoint.read_f32_any_shape(a)?.1;
        let b = checkpoint.read_f32_any_shape(b)?.1;
        Ok(Self { a, b, in_features, out_features })
    }
}

/// An adapter in one line for people: base, rank, scaling, targets, layers and parameters.
#[must_use]
pub fn describe(adapter: &Adapter) -> String {
    let config = &adapter.config;
    let targets: Vec<&str> = config.targets.iter().map(|target| target.hf_name()).collect();
    let parameters: usize = adapter.tensors.values().map(|factors| factors.a.len() + factors.b.len()).sum();
    format!(
        "LoRA of {base}: rank {rank}, scaling {scaling}{kind}, {targets} in {layers} layers, {parameters} parameters",
        base = config.base_model.as_deref().unwrap_or("an unnamed model"),
        rank = config.rank,
        scaling = config.scaling(),
        kind = if config.use_rslora { " (rsLoRA)" } else { "" },
        targets = targets.join(" "),
        layers = adapter.layers(),
    )
}

/// PEFT's key of a factor.
fn key_of(layer: usize, target: Target, side: Side) -> String {
    format!("{PREFIX}{layer}.{}.lora_{side:?}.weight", target.hf_path())
}

/// The reverse of [`key_of`]; an adapter's name, `default`, may stand in front of `weight`.
fn parse_key(key: &str) -> Option<(usize, Target, Side)> {
    let (number, rest) = key.strip_prefix(PREFIX)?.split_once('.')?;
    let layer: usize = number.parse().ok().filter(|layer: &usize| layer.to_string() == number)?;
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
    let message = "it is missing, and every target_modules entry needs factors in every layer".to_owned();
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
