//! Files written whole or not at all, and safetensors streamed into them.
//!
//! A file is written under a temporary name in its own folder, forced to the disk, and renamed: whoever looks at the
//! name sees the old content or the new, never a part. What it trades: room for both at once. What it refuses: to
//! store NaN, infinity or a number that overflows the element type, because the reader would refuse it later.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use crate::{NewFolder, WeightsError};

/// Elements that are converted before they are written.
const BLOCK: usize = 1 << 16;
const BUFFER_BYTES: usize = 1 << 20;

/// The element type of a written file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FloatType {
    /// 32 bits, exact.
    #[default]
    F32,
    /// 16 bits, 8 of them for the exponent; rounds to nearest, ties to even.
    Bf16,
    /// 16 bits, 5 of them for the exponent; rounds to nearest, ties to even, and cannot hold more than 65,504.
    F16,
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorToWrite<'a> {
    /// Its name in the file.
    pub name: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Its elements, row by row.
    pub values: Cow<'a, [f32]>,
}

/// A tensor of a file that holds several element types.
#[derive(Clone, Debug)]
pub struct StoredTensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Its elements, row by row.
    pub values: StoredValues<'a>,
}

/// Elements that are stored as they are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StoredValues<'a> {
    /// Finite numbers of 32 bits.
    F32(&'a [f32]),
    /// Bytes.
    U8(&'a [u8]),
}

/// A tensor that a safetensors file will hold.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

/// Takes the tensors of one safetensors file in the order in which they were planned.
pub(crate) struct TensorSink<'a, 'f> {
    path: &'a Path,
    file: &'a mut BufWriter<&'f File>,
    planned: &'a mut [Planned],
    next: usize,
    scratch: Vec<u16>,
    bytes: Vec<u8>,
}

impl FloatType {
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    pub(crate) fn element_bytes(self) -> usize {
        self.dtype().bitsize() / 8
    }

    /// Converts to little-endian bytes; the place of the first element that is not finite or does not fit.
    pub(crate) fn encode(self, values: &[f32], scratch: &mut [u16], bytes: &mut Vec<u8>) -> Option<usize> {
        bytes.resize(values.len() * self.element_bytes(), 0);
        let halves = &mut scratch[..values.len()];
        // Both searches look at every element, which the compiler turns into many at once.
        let exponent = match self {
            Self::F32 => {
                let out = bytes.as_chunks_mut().0.iter_mut();
                out.zip(values).for_each(|(out, value)| *out = value.to_le_bytes());
                let finite = values.iter().fold(true, |finite, value| finite & value.is_finite());
                return if finite { None } else { values.iter().position(|value| !value.is_finite()) };
            }
            Self::Bf16 => {
                halves.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(values);
                0x7F80
            }
            Self::F16 => {
                halves.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values);
                0x7C00
            }
        };
        let out = bytes.as_chunks_mut().0.iter_mut();
        out.zip(&*halves).for_each(|(out, bits)| *out = bits.to_le_bytes());
        let finite = halves.iter().fold(true, |finite, bits| finite & (bits & exponent != exponent));
        if finite { None } else { halves.iter().position(|bits| bits & exponent == exponent) }
    }
}

impl fmt::Display for FloatType {
    /// PyTorch's name, as in a `config.json`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        })
    }
}

/// Writes a file that appears under its name only once it is complete and on the disk; on any error, whatever stood
/// there before stays and the part written is removed. The folder must exist. Map the errors of writing with
/// [`WeightsError::write`].
///
/// # Errors
/// Those of `fill`, and those of creating, forcing to disk and renaming.
pub fn write_atomic<T>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> Result<T, WeightsError>,
) -> Result<T, WeightsError> {
    write_atomic_file(path, |file| fill(file))
}

/// [`write_atomic`] for writers that come back to what they have written.
pub(crate) fn write_atomic_file<T>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> Result<T, WeightsError>,
) -> Result<T, WeightsError> {
    let fault = |source: std::io::Error| WeightsError::write(path, source);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".").suffix(".partial");
    #[cfg(unix)]
    {
        // What a plain create would ask for; the process's mask still applies.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let temporary = builder.tempfile_in(folder).map_err(fault)?;
    let mut buffered = BufWriter::with_capacity(BUFFER_BYTES, temporary.as_file());
    let answer = fill(&mut buffered)?;
    buffered.flush().map_err(fault)?;
    drop(buffered);
    temporary.as_file().sync_all().map_err(fault)?;
    temporary.persist(path).map_err(|error| fault(error.error))?;
    sync_folder(folder);
    Ok(answer)
}

/// Forces a rename in this folder to the disk. Not every file system can do this, and none needs it to keep the old
/// file or the new one, so its failure is no error.
pub(crate) fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

/// [`write_atomic`] of indented JSON with a line end.
///
/// # Errors
/// If the file cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), WeightsError> {
    write_atomic(path, |file| {
        serde_json::to_writer_pretty(&mut *file, value).map_err(|error| WeightsError::write(path, error))?;
        file.write_all(b"\n").map_err(|error| WeightsError::write(path, error))
    })
}

/// Writes a safetensors file, the tensors in the order given, all as one element type.
///
/// # Errors
/// If a name stands twice, a number of elements is not that of its shape, an element is not finite in `float_type`, or
/// the file cannot be written.
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorToWrite<'_>],
    float_type: FloatType,
    metadata: &BTreeMap<String, String>,
) -> Result<(), WeightsError> {
    let dtype = float_type.dtype();
    let plan = |tensor: &TensorToWrite<'_>| Planned {
        name: tensor.name.clone(),
        dtype,
        shape: tensor.shape.clone(),
    };
    write_tensors(path, tensors.iter().map(plan).collect(), metadata, |sink| {
        tensors.iter().try_for_each(|tensor| sink.floats(&tensor.values, float_type))
    })
}

/// Writes a safetensors file of tensors of several element types, in the order given.
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_stored(path: &Path, tensors: &[StoredTensor<'_>]) -> Result<(), WeightsError> {
    let plan = |tensor: &StoredTensor<'_>| {
        let dtype = match tensor.values {
            StoredValues::F32(_) => Dtype::F32,
            StoredValues::U8(_) => Dtype::U8,
        };
        Planned { name: tensor.name.clone(), dtype, shape: tensor.shape.clone() }
    };
    write_tensors(path, tensors.iter().map(plan).collect(), &pytorch_metadata(), |sink| {
        tensors.iter().try_for_each(|tensor| match tensor.values {
            StoredValues::F32(values) => sink.floats(values, FloatType::F32),
            StoredValues::U8(bytes) => sink.bytes(bytes),
        })
    })
}

/// Writes a safetensors file of tensors of any type: `fill` gives all of them, in the order planned.
pub(crate) fn write_tensors(
    path: &Path,
    mut planned: Vec<Planned>,
    metadata: &BTreeMap<String, String>,
    fill: impl FnOnce(&mut TensorSink<'_, '_>) -> Result<(), WeightsError>,
) -> Result<(), WeightsError> {
    let room = header_of(path, &planned, metadata)?.len();
    write_atomic_file(path, |file| {
        let fault = |source: std::io::Error| WeightsError::write(path, source);
        // The header is written last: only then is it known how much of its room each text has taken.
        file.write_all(&vec![b' '; size_of::<u64>() + room]).map_err(fault)?;
        let (scratch, bytes) = (vec![0; BLOCK], Vec::new());
        let mut sink = TensorSink { path, file, planned: &mut planned, next: 0, scratch, bytes };
        fill(&mut sink)?;
        let missing = sink.planned.get(sink.next);
        if let Some(missing) = missing {
            return Err(unwritable(path, &missing.name, "it was announced and never given".into()));
        }
        let mut header = header_of(path, &planned, metadata)?;
        header.resize(room, b' ');
        file.seek(SeekFrom::Start(0)).map_err(fault)?;
        file.write_all(&(room as u64).to_le_bytes()).map_err(fault)?;
        file.write_all(&header).map_err(fault)
    })
}

impl TensorSink<'_, '_> {
    /// The next tensor, from numbers.
    pub(crate) fn floats(&mut self, values: &[f32], float_type: FloatType) -> Result<(), WeightsError> {
        let Some(planned) = self.planned.get(self.next).filter(|planned| planned.dtype == float_type.dtype())
        else {
            return Err(self.unplanned());
        };
        if Some(values.len()) != elements_of(&planned.shape) {
            let message = format!("{} elements do not fill the shape {:?}", values.len(), planned.shape);
            return Err(unwritable(self.path, &planned.name, message));
        }
        for (block, part) in values.chunks(BLOCK).enumerate() {
            if let Some(inside) = float_type.encode(part, &mut self.scratch, &mut self.bytes) {
                let (index, value) = (block * BLOCK + inside, part[inside]);
                let advice = "check the training's loss, or store it as float32";
                let message = format!("element {index} is {value}, no finite {float_type}: {advice}");
                return Err(unwritable(self.path, &planned.name, message));
            }
            self.file.write_all(&self.bytes).map_err(|error| WeightsError::write(self.path, error))?;
        }
        self.next += 1;
        Ok(())
    }

    /// The next tensor, from bytes.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), WeightsError> {
        let Some(planned) = self.planned.get(self.next).filter(|planned| planned.dtype == Dtype::U8) else {
            return Err(self.unplanned());
        };
        if elements_of(&planned.shape) != Some(bytes.len()) {
            let message = format!("{} bytes do not fill the shape {:?}", bytes.len(), planned.shape);
            return Err(unwritable(self.path, &planned.name, message));
        }
        self.next += 1;
        self.file.write_all(bytes).map_err(|error| WeightsError::write(self.path, error))
    }

    /// The next tensor, from a text for which at most as many bytes as it has were planned.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), WeightsError> {
        match self.planned.get_mut(self.next).map(|planned| planned.shape.as_mut_slice()) {
            Some([length]) if *length >= text.len() => *length = text.len(),
            _ => return Err(self.unplanned()),
        }
        self.bytes(text.as_bytes())
    }

    fn unplanned(&self) -> WeightsError {
        let name = self.planned.get(self.next).map_or("", |planned| &planned.name);
        unwritable(self.path, name, "something else was given in its place".into())
    }
}

/// Writes a Hugging Face model folder: `model.safetensors` and `config.json`, in which `torch_dtype` becomes the type
/// written. The folder appears whole or not at all, in place of an older one, whose other files it keeps.
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_model(
    dir: &Path,
    config: &Value,
    tensors: &[TensorToWrite<'_>],
    float_type: FloatType,
) -> Result<(), WeightsError> {
    let folder = NewFolder::begin(dir)?;
    write_safetensors(&folder.path().join("model.safetensors"), tensors, float_type, &pytorch_metadata())?;
    let mut config = config.clone();
    if let Some(fields) = config.as_object_mut() {
        fields.insert("torch_dtype".into(), float_type.to_string().into());
    }
    write_json(&folder.path().join("config.json"), &config)?;
    // Readers would prefer an older model's index.
    folder.replace(&["model.safetensors.index.json"])
}

/// What Hugging Face's loaders want to see in a file of PyTorch tensors.
pub(crate) fn pytorch_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

pub(crate) fn elements_of(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim))
}

pub(crate) fn unwritable(path: &Path, tensor: &str, message: String) -> WeightsError {
    WeightsError::Unwritable { path: path.to_owned(), tensor: tensor.to_owned(), message }
}

/// A header as the safetensors crate would write it, but with the tensors in the caller's order.
struct Header<'a> {
    metadata: &'a BTreeMap<String, String>,
    tensors: Vec<(&'a str, TensorInfo)>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry("__metadata__", self.metadata)?;
        }
        for (name, info) in &self.tensors {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

/// The header's JSON, filled up with spaces so that the data begins at a multiple of 8.
fn header_of(
    path: &Path,
    planned: &[Planned],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, WeightsError> {
    let (mut names, mut tensors, mut start) = (BTreeSet::from(["__metadata__"]), Vec::new(), 0);
    for Planned { name, dtype, shape } in planned {
        if !names.insert(name) {
            return Err(unwritable(path, name, "its name is taken already".into()));
        }
        let bytes = elements_of(shape).and_then(|elements| elements.checked_mul(dtype.bitsize() / 8));
        let Some(end) = bytes.and_then(|bytes| bytes.checked_add(start)) else {
            return Err(unwritable(path, name, format!("no file holds the shape {shape:?}")));
        };
        let info = TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (start, end) };
        tensors.push((name.as_str(), info));
        start = end;
    }
    let mut json = serde_json::to_vec(&Header { metadata, tensors })
        .map_err(|error| WeightsError::write(path, error))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_to_nearest_and_overflow_is_found() {
        let (mut scratch, mut bytes) = (vec![0; 4], Vec::new());
        let values = [1.0, 1.0 + 3.0 / 512.0, -70_000.0];
        assert_eq!(FloatType::Bf16.encode(&values, &mut scratch, &mut bytes), None);
        assert_eq!(bytes[..4], [0x80, 0x3F, 0x81, 0x3F]);
        assert_eq!(FloatType::F16.encode(&values, &mut scratch, &mut bytes), Some(2));
        assert_eq!(FloatType::F16.encode(&values[..2], &mut scratch, &mut bytes), None);
        assert_eq!(bytes, [0x00, 0x3C, 0x06, 0x3C]);
        assert_eq!(FloatType::F32.encode(&[0.0, f32::NAN], &mut scratch, &mut bytes), Some(1));
    }

    #[test]
    fn a_file_of_other_tensors_than_planned_is_not_written() {
        type Fill = fn(&mut TensorSink<'_, '_>) -> Result<(), WeightsError>;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let plan = |name: &str, dtype, length| Planned { name: name.into(), dtype, shape: vec![length] };
        let write = |fill: Fill| {
            let planned = vec![plan("a", Dtype::F32, 2), plan("b", Dtype::U8, 5), plan("c", Dtype::U8, 1)];
            write_tensors(&path, planned, &pytorch_metadata(), fill)
        };
        let cases: [(Fill, &str); 6] = [
            (|sink| sink.floats(&[1.0, 2.0], FloatType::F32), "`b` is not written"),
            (|sink| sink.floats(&[1.0, 2.0], FloatType::F16), "`a` is not written"),
            (|sink| sink.floats(&[1.0], FloatType::F32), "1 elements do not fill"),
            (|sink| sink.bytes(&[0; 8]), "`a` is not written"),
            (|sink| sink.floats(&[1.0, 2.0], FloatType::F32).and_then(|()| sink.bytes(&[0; 4])), "4 bytes"),
            (|sink| sink.floats(&[1.0, 2.0], FloatType::F32).and_then(|()| sink.text("longer")), "`b`"),
        ];
        for (fill, piece) in cases {
            let error = write(fill).unwrap_err().to_string();
            assert!(error.contains(piece), "{error}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
        write(|sink| {
            sink.floats(&[1.0, 2.0], FloatType::F32)?;
            sink.text("abc")?;
            sink.bytes(b"d")
        })
        .unwrap();
        let bytes = fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("b").unwrap().data(), b"abc");
        assert_eq!(file.tensor("c").unwrap().data(), b"d");
    }

    #[test]
    fn the_data_begins_at_a_multiple_of_eight() {
        for length in 1..20 {
            let planned = [Planned { name: "n".repeat(length), dtype: Dtype::F32, shape: vec![1] }];
            let header = header_of(Path::new("x"), &planned, &pytorch_metadata()).unwrap();
            assert_eq!(header.len() % 8, 0);
        }
    }
}
