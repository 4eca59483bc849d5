//! A merge as a Hugging Face folder: safetensors in one or many files, an index if there are many, `config.json`.
//!
//! What it trades: every file is forced to the disk before the next begins. What it refuses: numbers that the element
//! type cannot hold.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::Merge;
use crate::parts::Part;
use crate::write::{Planned, TensorSink, elements_of, pytorch_metadata, write_tensors};
use crate::{FloatType, WeightsError, write_json};

const CONFIG: &str = "config.json";

/// Writes a merge into a folder that is there, all tensors as one type, in files of at most `shard_bytes` each where
/// its largest tensor allows; `done` hears of every tensor.
///
/// # Errors
/// If the base is damaged, a number does not fit the type, or a file cannot be written.
pub fn write_merged(
    dir: &Path,
    merge: &Merge<'_>,
    float_type: FloatType,
    shard_bytes: u64,
    mut done: impl FnMut(),
) -> Result<(), WeightsError> {
    let plan = |part: Part| {
        let shape = part.shape(merge.config());
        vec![Planned { name: part.hf_name(), dtype: float_type.dtype(), shape }]
    };
    let parts = Part::all(merge.config()).into_iter().map(|part| (part, plan(part))).collect();
    let mut values = Vec::new();
    write_shards(dir, parts, shard_bytes, |part, sink| {
        merge.read(part, &mut values)?;
        sink.floats(&values, float_type)?;
        done();
        Ok(())
    })?;
    let mut config = base_config(merge)?;
    set_dtype(&mut config, float_type);
    config.remove("quantization_config");
    write_json(&dir.join(CONFIG), &config)
}

/// Cuts a list of parts into files, in order, and writes them and their index.
pub(super) fn write_shards(
    dir: &Path,
    parts: Vec<(Part, Vec<Planned>)>,
    shard_bytes: u64,
    mut fill: impl FnMut(Part, &mut TensorSink<'_, '_>) -> Result<(), WeightsError>,
) -> Result<(), WeightsError> {
    let (shards, total) = cut(parts, shard_bytes);
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in (1_usize..).zip(shards) {
        let file = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{number:05}-of-{count:05}.safetensors"),
        };
        let planned: Vec<Planned> = shard.iter().flat_map(|(_, planned)| planned.clone()).collect();
        weight_map.extend(planned.iter().map(|planned| (planned.name.clone(), file.clone())));
        write_tensors(&dir.join(&file), planned, &pytorch_metadata(), |sink| {
            shard.iter().try_for_each(|(part, _)| fill(*part, sink))
        })?;
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
}

type Shard = Vec<(Part, Vec<Planned>)>;

/// The files, and the bytes of all tensors together.
fn cut(parts: Vec<(Part, Vec<Planned>)>, shard_bytes: u64) -> (Vec<Shard>, u64) {
    let (mut shards, mut used, mut total) = (vec![Shard::new()], 0, 0);
    for (part, planned) in parts {
        let bytes: u64 = planned.iter().map(bytes_of).sum();
        if used + bytes > shard_bytes && used > 0 {
            shards.push(Shard::new());
            used = 0;
        }
        used += bytes;
        total += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push((part, planned));
        }
    }
    (shards, total)
}

fn bytes_of(planned: &Planned) -> u64 {
    elements_of(&planned.shape).unwrap_or(0) as u64 * (planned.dtype.bitsize() / 8) as u64
}

/// The base's `config.json`, so that nothing which it says beside the sizes is lost; made from the sizes where there
/// is none.
pub(super) fn base_config(merge: &Merge<'_>) -> Result<Map<String, Value>, WeightsError> {
    let path = merge.base.join(CONFIG);
    let known = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let made = || merge.config().to_hugging_face(1, 2, "float32");
    match known.unwrap_or_else(made) {
        Value::Object(fields) => Ok(fields),
        _ => Err(WeightsError::write(&path, std::io::ErrorKind::InvalidData)),
    }
}

/// Under the key that the file has: transformers 5 writes `dtype`, older ones `torch_dtype`, and both read both.
pub(super) fn set_dtype(config: &mut Map<String, Value>, float_type: FloatType) {
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.into(), float_type.to_string().into());
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

    #[test]
    fn files_are_cut_between_tensors_and_none_is_empty() {
        let part = |elements: usize| {
            let planned = Planned { name: "x".into(), dtype: Dtype::F16, shape: vec![elements] };
            (Part::Norm, vec![planned])
        };
        let sizes = |bytes: u64, elements: &[usize]| {
            let (shards, total) = cut(elements.iter().map(|&elements| part(elements)).collect(), bytes);
            assert_eq!(total, 2 * elements.iter().sum::<usize>() as u64);
            shards.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(20, &[5, 5, 5]), [2, 1]);
        assert_eq!(sizes(19, &[5, 5, 5]), [1, 1, 1]);
        assert_eq!(sizes(8, &[50, 1, 3, 50]), [1, 2, 1]);
        assert_eq!(sizes(1000, &[50, 1, 3, 50]), [4]);
    }
}
