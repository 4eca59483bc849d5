//! Which files make a checkpoint, and which tensors of them count.
//!
//! What it trades: a folder with several forms of one model is taken in a fixed order and not compared. What it refuses:
//! an index that leads out of its folder, names a tensor twice, or does not agree with its shards.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use crate::checkpoint::Entry;
use crate::error::Place;
use crate::header::Pairs;
use crate::layout::Layout;
use crate::mapped::{MappedFile, Tensors};
use crate::{WeightsError, meta};

/// Hugging Face's names of a model's weights, single or the index of several, in the order in which they are looked for in a
/// folder.
pub const WEIGHT_FILES: [&str; 4] = [
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
];
/// How the name of an index ends.
const INDEX: &str = ".index.json";
const WANTED: &str = "model.safetensors or pytorch_model.bin (or the .index.json of either), \
    or params.json with consolidated.00.pth,";

/// A checkpoint's files and the tensors in them.
pub(crate) struct Opened {
    /// What names the checkpoint: the single file, the index, or Meta's folder.
    pub(crate) path: PathBuf,
    pub(crate) files: Vec<MappedFile>,
    pub(crate) entries: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: Pairs<String>,
}

pub(crate) fn open(path: &Path, flag: &'static str) -> Result<Opened, WeightsError> {
    if !path.is_dir() {
        return open_file(Place { path, flag });
    }
    if let Some(file) = WEIGHT_FILES.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
        return open_file(Place { path: &file, flag });
    }
    if meta::is_folder(path) {
        return meta::open(Place { path, flag });
    }
    Err(no_weights(Place { path, flag }, WANTED))
}

fn open_file(place: Place<'_>) -> Result<Opened, WeightsError> {
    if place.path.to_string_lossy().ends_with(INDEX) {
        return sharded(place);
    }
    let (file, tensors) = MappedFile::open(place)?;
    let entries = tensors.into_iter().map(|(name, info)| (name, Entry::run(0, info))).collect();
    Ok(Opened { path: place.path.to_owned(), files: vec![file], entries })
}

impl Entry {
    /// A tensor in one run.
    pub(crate) fn run(file: usize, info: TensorInfo) -> Self {
        let (start, end) = info.data_offsets;
        Self { dtype: info.dtype, shape: info.shape, layout: Layout::Run { file, bytes: start..end } }
    }
}

impl ShardIndex {
    fn read(place: Place<'_>) -> Result<Self, WeightsError> {
        let json = fs::read(place.path).map_err(|source| place.read(source))?;
        serde_json::from_slice(&json).map_err(|error| place.index(error.to_string()))
    }
}

/// The files that an index (`*.index.json`) names, for whoever has to fetch them first; none is looked for.
///
/// # Errors
/// If the index cannot be read, is none, or names a file outside its folder; errors name `flag`.
pub fn indexed_files(index: &Path, flag: &'static str) -> Result<BTreeSet<String>, WeightsError> {
    let place = Place { path: index, flag };
    let ShardIndex { weight_map } = ShardIndex::read(place)?;
    for (tensor, shard) in &weight_map.0 {
        check_inside(place, tensor, shard)?;
    }
    Ok(weight_map.0.into_iter().map(|(_, shard)| shard).collect())
}

fn sharded(place: Place<'_>) -> Result<Opened, WeightsError> {
    let index = || place.path.to_owned();
    let ShardIndex { weight_map } = ShardIndex::read(place)?;
    let mut shards: HashMap<String, usize> = HashMap::new();
    let (mut files, mut headers, mut entries) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (tensor, shard) in weight_map.0 {
        let file = match shards.get(&shard) {
            Some(&file) => file,
            None => {
                let (file, header) = open_shard(place, &tensor, &shard)?;
                files.push(file);
                headers.push(header);
                shards.insert(shard.clone(), files.len() - 1);
                files.len() - 1
            }
        };
        if entries.contains_key(&tensor) {
            return Err(place.index(format!("tensor `{tensor}` stands in it twice")));
        }
        let Some(info) = headers[file].remove(&tensor) else {
            return Err(WeightsError::NotInShard { path: index(), flag: place.flag, tensor, shard });
        };
        entries.insert(tensor, Entry::run(file, info));
    }
    Ok(Opened { path: index(), files, entries })
}

/// Opens a file that an index names, which must be inside the index's folder.
fn open_shard(index: Place<'_>, tensor: &str, shard: &str) -> Result<(MappedFile, Tensors), WeightsError> {
    check_inside(index, tensor, shard)?;
    let (flag, file) = (index.flag, index.path.with_file_name(shard));
    if !file.exists() {
        let path = index.path.to_owned();
        return Err(WeightsError::ShardMissing { path, flag, shard: shard.to_owned() });
    }
    MappedFile::open(Place { path: &file, flag })
}

/// Refuses the name of a file that would not be inside the index's folder.
fn check_inside(index: Place<'_>, tensor: &str, shard: &str) -> Result<(), WeightsError> {
    let inside = Path::new(shard).components().all(|part| matches!(part, Component::Normal(_)));
    if !shard.is_empty() && inside {
        return Ok(());
    }
    Err(WeightsError::ShardOutside {
        path: index.path.to_owned(),
        flag: index.flag,
        tensor: tensor.to_owned(),
        shard: shard.to_owned(),
    })
}

/// Says what was looked for in a folder, and what is there instead.
pub(crate) fn no_weights(place: Place<'_>, wanted: &'static str) -> WeightsError {
    let foreign = |name: &String| {
        [".bin", ".pt", ".pth", ".gguf", ".safetensors", ".msgpack", ".h5"]
            .iter()
            .any(|end| name.ends_with(end))
    };
    let names = fs::read_dir(place.path).into_iter().flatten().flatten();
    let mut found: Vec<String> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(foreign).collect();
    found.sort();
    found.truncate(3);
    let found = match found.as_slice() {
        [] => String::new(),
        names => format!(" (there is {})", names.join(", ")),
    };
    WeightsError::NoWeights { path: place.path.to_owned(), flag: place.flag, wanted, found }
}
