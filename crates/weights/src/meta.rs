//! Llama in the form in which Meta gives it out: `params.json` beside `consolidated.00.pth` and its siblings.
//!
//! Each shard holds what one card computed: some rows of most matrices, some columns of the others. They are put together
//! here, under Hugging Face's names, and the rows of queries and keys are reordered, because Meta turns neighbouring
//! columns of a head together and Hugging Face its two halves. What it trades: the numbers of Llama 2 that `params.json`
//! leaves out (positions) are taken for granted. What it refuses: scaled rotary positions, shards that disagree, tensors
//! of other models.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use buzzer_model::{LlamaConfig, block_tensor};
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};

use crate::WeightsError;
use crate::checkpoint::Entry;
use crate::error::Place;
use crate::layout::{Joined, Layout};
use crate::mapped::{MappedFile, Tensors};
use crate::open::Opened;

const PARAMS: &str = "params.json";
/// Cards that one model was ever split between are 8; this only bounds the names that are tried.
const MAX_SHARDS: usize = 100;
/// A table of frequencies that follows from the configuration.
const FREQUENCIES: &str = "rope.freqs";

/// How a tensor was split, and what its rows are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Split {
    /// Every shard has all of it.
    Copies,
    /// Every shard has some rows.
    Rows,
    /// Rows in heads whose partners are neighbours.
    Heads,
    /// Every shard has some columns.
    Columns,
    /// Llama 2 split the embedding by columns, later models by rows.
    Embedding,
}

/// Meta's name inside a block, Hugging Face's, and how it is split.
const BLOCK: [(&str, &str, Split); 9] = [
    ("attention.wq.weight", "self_attn.q_proj.weight", Split::Heads),
    ("attention.wk.weight", "self_attn.k_proj.weight", Split::Heads),
    ("attention.wv.weight", "self_attn.v_proj.weight", Split::Rows),
    ("attention.wo.weight", "self_attn.o_proj.weight", Split::Columns),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", Split::Rows),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", Split::Rows),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", Split::Columns),
    ("attention_norm.weight", "input_layernorm.weight", Split::Copies),
    ("ffn_norm.weight", "post_attention_layernorm.weight", Split::Copies),
];

/// What `params.json` says.
struct Params {
    dim: usize,
    layers: usize,
    heads: usize,
    groups: usize,
    norm_eps: f64,
    rope_theta: f64,
}

/// Whether a folder holds a model in this form.
pub(crate) fn is_folder(dir: &Path) -> bool {
    dir.join(PARAMS).is_file() && shard(dir, 0).is_file()
}

fn shard(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("consolidated.{number:02}.pth"))
}

/// The configuration of the model in a folder; the sizes that `params.json` does not hold are those of the tensors.
pub(crate) fn read_config(dir: Place<'_>) -> Result<LlamaConfig, WeightsError> {
    let params = Params::read(dir)?;
    let Opened { entries, .. } = open(dir)?;
    let rows = |name: &str| match entries.get(name) {
        Some(entry) => Ok(entry.shape.first().copied().unwrap_or(0)),
        None => Err(dir.meta(format!("there is no `{name}` among its tensors"))),
    };
    let config = json!({
        "model_type": "llama",
        "vocab_size": rows("model.embed_tokens.weight")?,
        "hidden_size": params.dim,
        "intermediate_size": rows(&block_tensor(0, "mlp.gate_proj.weight"))?,
        "num_hidden_layers": params.layers,
        "num_attention_heads": params.heads,
        "num_key_value_heads": params.groups,
        "rms_norm_eps": params.norm_eps,
        "rope_theta": params.rope_theta,
    });
    let origin = dir.path.join(PARAMS).display().to_string();
    Ok(LlamaConfig::from_hugging_face(&config.to_string(), &origin)?)
}

/// Maps all shards and puts their tensors together.
pub(crate) fn open(dir: Place<'_>) -> Result<Opened, WeightsError> {
    let params = Params::read(dir)?;
    let (mut files, mut headers) = (Vec::new(), Vec::new());
    for number in 0..MAX_SHARDS {
        let path = shard(dir.path, number);
        if !path.is_file() {
            break;
        }
        let (file, tensors) = MappedFile::open(Place { path: &path, flag: dir.flag })?;
        files.push(file);
        headers.push(tensors);
    }
    let names: Vec<String> = headers.first().into_iter().flat_map(BTreeMap::keys).cloned().collect();
    let mut entries = BTreeMap::new();
    for name in names.iter().filter(|name| *name != FREQUENCIES) {
        let joined = join(name, &headers, &params).map_err(|message| dir.meta(message))?;
        entries.insert(joined.0, joined.1);
    }
    Ok(Opened { path: dir.path.to_owned(), files, entries })
}

/// Hugging Face's name of a tensor, and how it was split.
fn rename(name: &str) -> Option<(String, Split)> {
    Some(match name {
        "tok_embeddings.weight" => ("model.embed_tokens.weight".into(), Split::Embedding),
        "norm.weight" => ("model.norm.weight".into(), Split::Copies),
        "output.weight" => ("lm_head.weight".into(), Split::Rows),
        name => {
            let (number, rest) = name.strip_prefix("layers.")?.split_once('.')?;
            let layer: usize = number.parse().ok()?;
            let &(_, theirs, split) = BLOCK.iter().find(|(ours, ..)| *ours == rest)?;
            (block_tensor(layer, theirs), split)
        }
    })
}

/// One tensor from its parts in all shards.
fn join(name: &str, shards: &[Tensors], params: &Params) -> Result<(String, Entry), String> {
    let (renamed, split) = rename(name).ok_or_else(|| format!("tensor `{name}` is none of Llama 2's"))?;
    let parts: Vec<&TensorInfo> = shards.iter().filter_map(|shard| shard.get(name)).collect();
    let first = parts[0];
    if parts.len() != shards.len() {
        return Err(format!("tensor `{name}` is in {} of its {} shards", parts.len(), shards.len()));
    }
    if let Some(other) = parts.iter().find(|part| part.shape != first.shape || part.dtype != first.dtype) {
        return Err(format!(
            "tensor `{name}` has shape {:?} in {} in one shard and {:?} in {} in another",
            first.shape, first.dtype, other.shape, other.dtype
        ));
    }
    if split == Split::Copies {
        return Ok((renamed, Entry::run(0, first.clone())));
    }
    let &[rows, columns] = first.shape.as_slice() else {
        return Err(format!("tensor `{name}` has shape {:?}, which is no matrix's", first.shape));
    };
    let side_by_side = match split {
        Split::Embedding => columns != params.dim,
        split => split == Split::Columns,
    };
    let head = (split == Split::Heads).then_some(params.dim / params.heads);
    let count = parts.len();
    if head.is_some_and(|head| !rows.is_multiple_of(head)) {
        return Err(format!("tensor `{name}` has {rows} rows, which are no whole heads"));
    }
    let [all_rows, all_columns] = if side_by_side { [1, count] } else { [count, 1] };
    let whole = rows.checked_mul(all_rows).zip(columns.checked_mul(all_columns));
    let (all_rows, all_columns) = whole.ok_or_else(|| format!("tensor `{name}` is too large"))?;
    let layout = Layout::Joined(Joined {
        parts: parts.iter().enumerate().map(|(file, part)| (file, part.data_offsets.0)).collect(),
        rows,
        row_bytes: columns * first.dtype.bitsize() / 8,
        side_by_side,
        head,
    });
    Ok((renamed, Entry { dtype: first.dtype, shape: vec![all_rows, all_columns], layout }))
}

impl Params {
    fn read(dir: Place<'_>) -> Result<Self, WeightsError> {
        let path = dir.path.join(PARAMS);
        let place = Place { path: &path, flag: dir.flag };
        let json = fs::read(&path).map_err(|source| place.read(source))?;
        Self::parse(&json).map_err(|message| place.meta(message))
    }

    fn parse(json: &[u8]) -> Result<Self, String> {
        let keys: Map<String, Value> = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let size = |key: &str, default: Option<usize>| match keys.get(key) {
            None => default.ok_or_else(|| format!("`{key}` is missing")),
            Some(value) => match value.as_u64() {
                // As in a `config.json`: far above any width, and products stay inside 64 bits.
                Some(size @ 1..=0x0010_0000) => Ok(size as usize),
                _ => Err(format!("`{key}` is {value}, but must be a whole number from 1 to 1048576")),
            },
        };
        let number = |key: &str, default: Option<f64>| match keys.get(key) {
            None => default.ok_or_else(|| format!("`{key}` is missing")),
            Some(value) => value
                .as_f64()
                .filter(|&number| number > 0.0)
                .ok_or_else(|| format!("`{key}` is {value}, but must be a positive number")),
        };
        if let Some(scaled) = keys.get("use_scaled_rope").filter(|value| **value != Value::Bool(false)) {
            return Err(format!(
                "`use_scaled_rope` is {scaled}: it is a later Llama; supported are Llama 2's plain rotary positions"
            ));
        }
        let (dim, heads) = (size("dim", None)?, size("n_heads", None)?);
        if !dim.is_multiple_of(2 * heads) {
            return Err(format!("`dim` is {dim}, which {heads} heads of even width do not fill"));
        }
        Ok(Self {
            dim,
            layers: size("n_layers", None)?,
            heads,
            groups: size("n_kv_heads", Some(heads))?,
            norm_eps: number("norm_eps", None)?,
            rope_theta: number("rope_theta", Some(10_000.0))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_checked() {
        let refused = [
            ("[]", "invalid type"),
            (r#"{"dim": 8, "n_heads": 2, "n_layers": 1}"#, "`norm_eps` is missing"),
            (r#"{"dim": 8, "n_heads": 0, "n_layers": 1, "norm_eps": 1e-5}"#, "`n_heads` is 0"),
            (r#"{"dim": 6, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-5}"#, "heads of even width"),
            (r#"{"dim": 8, "n_heads": 2, "n_layers": -1, "norm_eps": 1e-5}"#, "`n_layers` is -1"),
            (r#"{"dim": 8, "n_heads": 2, "n_layers": 1, "norm_eps": "x"}"#, "`norm_eps` is \"x\""),
            (
                r#"{"dim": 8, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-5, "use_scaled_rope": true}"#,
                "later Llama",
            ),
        ];
        for (json, piece) in refused {
            let error = Params::parse(json.as_bytes()).err().unwrap();
            assert!(error.contains(piece), "{json}: {error}");
        }
        let params = Params::parse(br#"{"dim": 8, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-6}"#).unwrap();
        assert_eq!((params.groups, params.norm_eps, params.rope_theta), (2, 1e-6, 10_000.0));
    }

    #[test]
    fn names_of_other_models_are_not_guessed_at() {
        assert_eq!(
            rename("layers.7.attention.wk.weight"),
            Some(("model.layers.7.self_attn.k_proj.weight".into(), Split::Heads))
        );
        for name in
            ["layers.7.attention.wk.bias", "layers.x.attention.wk.weight", "layers.7", "vision.weight"]
        {
            assert_eq!(rename(name), None, "{name}");
        }
    }
}
