//! A checkpoint as a table of named tensors: one safetensors file, or a Hugging Face folder of one or many.
//!
//! Files are mapped, not read, and tensors are converted a window at a time whose pages are handed back at once, so a
//! 13 GB checkpoint passes through the memory of its largest tensor. What it trades: a file that another program cuts
//! while it is open ends this one with a bus error, as with every mapped file. What it refuses: pickled checkpoints,
//! which are programs, and NaN or infinity, which would only show up as a loss much later.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use crate::WeightsError;
use crate::error::Place;
use crate::header::{self, Pairs};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes that are converted before their pages are handed back; a multiple of every element's size.
const WINDOW_BYTES: usize = 4 << 20;
/// Elements that are converted and then looked at while they are still in the first cache.
const BLOCK: usize = 2048;

/// Named tensors in one or many mapped files.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    flag: &'static str,
    files: Vec<MappedFile>,
    entries: BTreeMap<String, Entry>,
}

/// Where a tensor lies. The offsets are of the whole file and inside it.
#[derive(Debug)]
struct Entry {
    file: usize,
    info: TensorInfo,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: Pairs<String>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, or a Hugging Face folder: `model.safetensors.index.json` with its shards if there
    /// is one, else `model.safetensors`. Headers are read and checked, tensors are not touched.
    ///
    /// Of a sharded checkpoint exactly the tensors that the index names are visible.
    ///
    /// # Errors
    /// If there is no such file, if one is missing, cut or damaged, or if an index names a file outside its folder.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        Self::open_for(path, "--model")
    }

    /// [`Self::open`] for a path that another flag than `--model` named; errors then name that flag.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for(path: &Path, flag: &'static str) -> Result<Self, WeightsError> {
        if !path.is_dir() {
            let is_index = path.to_string_lossy().ends_with(".index.json");
            return if is_index { Self::sharded(path, flag) } else { Self::single(path, flag) };
        }
        let (index, single) = (path.join(INDEX), path.join(SINGLE));
        if index.is_file() {
            Self::sharded(&index, flag)
        } else if single.is_file() {
            Self::single(&single, flag)
        } else {
            let wanted = "model.safetensors or model.safetensors.index.json";
            Err(no_weights(Place { path, flag }, wanted))
        }
    }

    fn single(path: &Path, flag: &'static str) -> Result<Self, WeightsError> {
        let (file, tensors) = MappedFile::open(Place { path, flag })?;
        let entries = tensors.into_iter().map(|(name, info)| (name, Entry { file: 0, info })).collect();
        Ok(Self { path: path.to_owned(), flag, files: vec![file], entries })
    }

    fn sharded(index: &Path, flag: &'static str) -> Result<Self, WeightsError> {
        let place = Place { path: index, flag };
        let unusable = |message: String| WeightsError::Index { path: index.to_owned(), flag, message };
        let json = fs::read(index).map_err(|source| place.read(source))?;
        let ShardIndex { weight_map } =
            serde_json::from_slice(&json).map_err(|error| unusable(error.to_string()))?;
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
                return Err(unusable(format!("tensor `{tensor}` stands in it twice")));
            }
            let Some(info) = headers[file].remove(&tensor) else {
                return Err(WeightsError::NotInShard { path: index.to_owned(), flag, tensor, shard });
            };
            entries.insert(tensor, Entry { file, info });
        }
        Ok(Self { path: index.to_owned(), flag, files, entries })
    }

    /// The file that was opened: the single file or the index.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor's name, in alphabetical order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// A tensor's shape, slowest dimension first.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], WeightsError> {
        Ok(&self.entry(name)?.info.shape)
    }

    /// A tensor's element type in the file.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn dtype(&self, name: &str) -> Result<Dtype, WeightsError> {
        Ok(self.entry(name)?.info.dtype)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn file_of(&self, name: &str) -> Result<&Path, WeightsError> {
        Ok(&self.files[self.entry(name)?.file].path)
    }

    /// A tensor of the expected shape, row by row, from f32, f16 or bf16 to f32. Exact: f32 holds every value of the
    /// other two.
    ///
    /// # Errors
    /// If there is no such tensor, if its shape or element type is another, or if it holds a NaN or an infinity.
    pub fn read_f32(&self, name: &str, expected_shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
        self.expect_shape(name, expected_shape)?;
        Ok(self.read_f32_any_shape(name)?.1)
    }

    /// [`Self::read_f32`] into a buffer that is used again: it takes the tensor's length, its old content is lost. On
    /// many tensors of one size this is several times as fast, because fresh memory costs more than the conversion.
    ///
    /// # Errors
    /// As [`Self::read_f32`]; the buffer's content is then undefined.
    pub fn read_f32_into(
        &self,
        name: &str,
        expected_shape: &[usize],
        values: &mut Vec<f32>,
    ) -> Result<(), WeightsError> {
        self.expect_shape(name, expected_shape)?;
        let entry = self.float_entry(name)?;
        values.resize(entry.elements(), 0.0);
        self.fill_f32(name, entry, values)
    }

    /// [`Self::read_f32`] of whatever shape the tensor has, which comes first.
    ///
    /// # Errors
    /// As [`Self::read_f32`], less the shape.
    pub fn read_f32_any_shape(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), WeightsError> {
        let entry = self.float_entry(name)?;
        let mut values = vec![0.0; entry.elements()];
        self.fill_f32(name, entry, &mut values)?;
        Ok((entry.info.shape.clone(), values))
    }

    /// A tensor of bytes and its shape.
    ///
    /// # Errors
    /// If there is no such tensor, or if it is not stored as U8.
    pub fn read_u8(&self, name: &str) -> Result<(Vec<usize>, Vec<u8>), WeightsError> {
        let entry = self.entry(name)?;
        if entry.info.dtype != Dtype::U8 {
            return Err(self.wrong_dtype(name, entry, "U8"));
        }
        let (start, end) = entry.info.data_offsets;
        let mut values = Vec::with_capacity(end - start);
        self.for_each_window(entry, |_, bytes| values.extend_from_slice(bytes));
        Ok((entry.info.shape.clone(), values))
    }

    /// A tensor of whole numbers, from I64 or I32, and its shape.
    ///
    /// # Errors
    /// If there is no such tensor, or if it is stored as another type.
    pub fn read_i64(&self, name: &str) -> Result<(Vec<usize>, Vec<i64>), WeightsError> {
        let entry = self.entry(name)?;
        let wide = match entry.info.dtype {
            Dtype::I64 => true,
            Dtype::I32 => false,
            _ => return Err(self.wrong_dtype(name, entry, "I64 or I32")),
        };
        let mut values = Vec::with_capacity(entry.elements());
        self.for_each_window(entry, |_, bytes| {
            if wide {
                values.extend(bytes.as_chunks().0.iter().map(|&value| i64::from_le_bytes(value)));
            } else {
                values.extend(bytes.as_chunks().0.iter().map(|&value| i64::from(i32::from_le_bytes(value))));
            }
        });
        Ok((entry.info.shape.clone(), values))
    }

    /// The flag that named this checkpoint.
    pub(crate) fn flag(&self) -> &'static str {
        self.flag
    }

    pub(crate) fn expect_shape(&self, name: &str, expected: &[usize]) -> Result<(), WeightsError> {
        let entry = self.entry(name)?;
        if entry.info.shape == expected {
            return Ok(());
        }
        Err(WeightsError::Shape {
            path: self.files[entry.file].path.clone(),
            flag: self.flag,
            tensor: name.to_owned(),
            found: entry.info.shape.clone(),
            expected: expected.to_vec(),
        })
    }

    fn entry(&self, name: &str) -> Result<&Entry, WeightsError> {
        self.entries.get(name).ok_or_else(|| WeightsError::MissingTensor {
            path: self.path.clone(),
            flag: self.flag,
            tensor: name.to_owned(),
            count: self.entries.len(),
        })
    }

    fn float_entry(&self, name: &str) -> Result<&Entry, WeightsError> {
        let entry = self.entry(name)?;
        match entry.info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(entry),
            _ => Err(self.wrong_dtype(name, entry, "F32, F16 or BF16")),
        }
    }

    /// Converts an entry of [`Self::float_entry`] into a slice of its length.
    fn fill_f32(&self, name: &str, entry: &Entry, values: &mut [f32]) -> Result<(), WeightsError> {
        let element_bytes = entry.info.dtype.bitsize() / 8;
        let mut not_finite = None;
        self.for_each_window(entry, |start, bytes| {
            let start = start / element_bytes;
            let out = &mut values[start..][..bytes.len() / element_bytes];
            if not_finite.is_none() {
                not_finite = convert(entry.info.dtype, bytes, out).map(|place| start + place);
            }
        });
        let Some(index) = not_finite else {
            return Ok(());
        };
        Err(WeightsError::NotFinite {
            path: self.files[entry.file].path.clone(),
            flag: self.flag,
            tensor: name.to_owned(),
            index,
            value: values[index],
        })
    }

    fn wrong_dtype(&self, name: &str, entry: &Entry, accepted: &'static str) -> WeightsError {
        WeightsError::Dtype {
            path: self.files[entry.file].path.clone(),
            flag: self.flag,
            tensor: name.to_owned(),
            found: entry.info.dtype,
            accepted,
        }
    }

    /// Shows a tensor's bytes in order, each window with its offset in the tensor, and hands its pages back.
    fn for_each_window(&self, entry: &Entry, mut visit: impl FnMut(usize, &[u8])) {
        let file = &self.files[entry.file];
        let (start, end) = entry.info.data_offsets;
        for window in (start..end).step_by(WINDOW_BYTES) {
            let window_end = end.min(window + WINDOW_BYTES);
            visit(window - start, &file.map[window..window_end]);
            file.release(window, window_end);
        }
    }
}

impl Entry {
    /// How many elements there are; the header's check has seen that the product does not overflow.
    fn elements(&self) -> usize {
        self.info.shape.iter().product()
    }
}

impl MappedFile {
    /// Maps a file and reads its header.
    fn open(place: Place<'_>) -> Result<(Self, BTreeMap<String, TensorInfo>), WeightsError> {
        // Asked before the file is opened: opening a named pipe would wait for a writer.
        let metadata = fs::metadata(place.path).map_err(|source| place.read(source))?;
        if !metadata.is_file() {
            return Err(place.header("it is no regular file"));
        }
        let file = File::open(place.path).map_err(|source| place.read(source))?;
        // SAFETY: the map is read-only and this program never writes to a file in place (`write_atomic` puts a new
        // file under the old name, which leaves this one as it was). Bytes are only ever copied out and checked, none
        // is trusted to stay: the header is parsed into owned values once. Another program that cuts the file short
        // meanwhile causes a bus error, which ends this program; the module's documentation says so.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| place.read(source))?;
        let tensors = header::parse(&map, place)?;
        Ok((Self { path: place.path.to_owned(), map }, tensors))
    }

    /// Tells the kernel that these bytes are done with. Costs memory only if it fails, so the answer is dropped.
    #[cfg(unix)]
    fn release(&self, start: usize, end: usize) {
        use memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is a read-only view of a file that nobody here writes, so a page that is dropped comes back
        // from the file with the same bytes. No borrow of the window is alive in this thread, and a reader in another
        // thread, or of a neighbouring tensor on the same page, sees those same bytes before and after.
        let _ = unsafe { self.map.unchecked_advise_range(DontNeed, start, end - start) };
    }

    #[cfg(not(unix))]
    fn release(&self, _start: usize, _end: usize) {}
}

/// Opens a file that an index names, which must be inside the index's folder.
fn open_shard(
    index: Place<'_>,
    tensor: &str,
    shard: &str,
) -> Result<(MappedFile, BTreeMap<String, TensorInfo>), WeightsError> {
    let (path, flag) = (index.path.to_owned(), index.flag);
    let inside = Path::new(shard).components().all(|part| matches!(part, Component::Normal(_)));
    if shard.is_empty() || !inside {
        return Err(WeightsError::ShardOutside {
            path,
            flag,
            tensor: tensor.to_owned(),
            shard: shard.to_owned(),
        });
    }
    let file = index.path.with_file_name(shard);
    if !file.exists() {
        return Err(WeightsError::ShardMissing { path, flag, shard: shard.to_owned() });
    }
    MappedFile::open(Place { path: &file, flag })
}

/// Says what was looked for in a folder, and what is there instead.
pub(crate) fn no_weights(place: Place<'_>, wanted: &'static str) -> WeightsError {
    let foreign = |name: &String| [".bin", ".pt", ".pth", ".gguf"].iter().any(|end| name.ends_with(end));
    let names = fs::read_dir(place.path).into_iter().flatten().flatten();
    let mut found: Vec<String> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(foreign).collect();
    found.sort();
    found.truncate(3);
    let found = match found.as_slice() {
        [] => String::new(),
        names => format!(" (there is {}: convert it to safetensors first)", names.join(", ")),
    };
    WeightsError::NoWeights { path: place.path.to_owned(), flag: place.flag, wanted, found }
}

/// Converts little-endian floats of any alignment; the place of the first one that is not finite.
fn convert(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Option<usize> {
    let block_bytes = BLOCK * dtype.bitsize() / 8;
    let mut bits = [0_u16; BLOCK];
    for (place, (bytes, out)) in bytes.chunks(block_bytes).zip(out.chunks_mut(BLOCK)).enumerate() {
        match dtype {
            Dtype::F32 => {
                let values = bytes.as_chunks().0;
                out.iter_mut().zip(values).for_each(|(out, &value)| *out = f32::from_le_bytes(value));
            }
            Dtype::F16 => {
                let bits = &mut bits[..out.len()];
                let values = bytes.as_chunks().0;
                bits.iter_mut().zip(values).for_each(|(bits, &value)| *bits = u16::from_le_bytes(value));
                bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(out);
            }
            _ => {
                let values = bytes.as_chunks().0;
                let widen = |value| f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16);
                out.iter_mut().zip(values).for_each(|(out, &value)| *out = widen(value));
            }
        }
        // Without an early end, so that the compiler looks at many at once.
        if !out.iter().fold(true, |finite, value| finite & value.is_finite()) {
            return out.iter().position(|value| !value.is_finite()).map(|inside| place * BLOCK + inside);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn every_half_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let mut out = [0.0];
            let expected =
                [(Dtype::F16, f16::from_bits(bits).to_f32()), (Dtype::BF16, bf16::from_bits(bits).to_f32())];
            for (dtype, expected) in expected {
                let bad = convert(dtype, &bits.to_le_bytes(), &mut out);
                assert_eq!(bad, (!expected.is_finite()).then_some(0), "{dtype} {bits:#x}");
                assert!(bad.is_some() || out[0].to_bits() == expected.to_bits(), "{dtype} {bits:#x}");
            }
        }
    }

    #[test]
    fn long_and_misaligned_tensors_are_converted_whole() {
        let count = 2 * BLOCK + 3;
        let mut bytes = vec![9];
        bytes.extend((0..count).flat_map(|i| f16::from_f32(i as f32 % 1999.0).to_le_bytes()));
        let mut out = vec![0.0; count];
        assert_eq!(convert(Dtype::F16, &bytes[1..], &mut out), None);
        assert!(out.iter().enumerate().all(|(i, &value)| value == i as f32 % 1999.0));

        let mut bytes: Vec<u8> = (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect();
        bytes[4 * (BLOCK + 5)..][..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
        assert_eq!(convert(Dtype::F32, &bytes, &mut out), Some(BLOCK + 5));
    }
}
