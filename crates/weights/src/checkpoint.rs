//! A checkpoint as a table of named tensors, whatever files they come from.
//!
//! Files are mapped, and tensors are converted a window at a time whose pages are handed back at once, so a
//! 13 GB checkpoint passes through the memory of its largest tensor. What it trades: one element type out, f32, for
//! every float that comes in, but for [`Checkpoint::read_values`], which reads the file into memory that is there. What it refuses: NaN or infinity, which would only show up as a loss much later.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::WeightsError;
use crate::error::Place;
use crate::layout::Layout;
use crate::mapped::MappedFile;
use crate::open::{self, Opened};

/// Elements that are converted and then looked at while they are still in the first cache.
const BLOCK: usize = 2048;
/// Elements that one core takes at a time; a window has many of them.
const PART: usize = 1 << 16;

/// Named tensors in one or many mapped files.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    flag: &'static str,
    files: Vec<MappedFile>,
    entries: BTreeMap<String, Entry>,
}

/// A tensor of a checkpoint. Its layout has as many bytes as its shape asks for.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) layout: Layout,
}

/// Why a part of a tensor is not there.
enum Fault {
    /// Number of the file that could not be read.
    Read(usize, std::io::Error),
    /// Number of the value in the tensor, and what it is.
    NotFinite(usize, f32),
}

impl Checkpoint {
    /// Opens a file of weights, an index of several (`*.index.json`), or a folder: Hugging Face's with safetensors or
    /// with PyTorch files, single or sharded, or Meta's with `params.json` and `consolidated.*.pth`. Where a folder has
    /// several forms, safetensors are taken before PyTorch's files, an index before a single file, and Meta's form
    /// last. Headers are read and checked, tensors are not touched.
    ///
    /// Of an indexed checkpoint exactly the tensors that the index names are visible. Meta's tensors are visible under
    /// Hugging Face's names and in its order of rows.
    ///
    /// # Errors
    /// If there is no such file, if one is missing, cut or damaged, if an index names a file outside its folder, or if
    /// a PyTorch file holds anything but tensors.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        Self::open_for(path, "--model")
    }

    /// [`Self::open`] for a path that another flag than `--model` named; errors then name that flag.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for(path: &Path, flag: &'static str) -> Result<Self, WeightsError> {
        let Opened { path, files, entries } = open::open(path, flag)?;
        Ok(Self { path, flag, files, entries })
    }

    /// What was opened: the single file, the index, or Meta's folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(MappedFile::path)
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
        Ok(&self.entry(name)?.shape)
    }

    /// A tensor's element type in the file.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn dtype(&self, name: &str) -> Result<Dtype, WeightsError> {
        Ok(self.entry(name)?.dtype)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn file_of(&self, name: &str) -> Result<&Path, WeightsError> {
        Ok(self.file(self.entry(name)?).path())
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
        Ok((entry.shape.clone(), values))
    }

    /// The dtype that a tensor of floats is stored in: F32, F16 or BF16.
    ///
    /// # Errors
    /// If there is no such tensor, or if it is stored as another type.
    pub fn float_dtype(&self, name: &str) -> Result<DType, WeightsError> {
        self.float_entry(name).map(|entry| burn_dtype(entry.dtype))
    }

    /// Writes values of a tensor of floats, row by row and from number `first` on, as many as have room in `out`: in the dtype that the
    /// tensor is stored in (F32, F16 or BF16), or in f32. Little-endian; all cores read.
    ///
    /// # Errors
    /// If there is no such tensor, if it is no tensor of floats, has not so many values, or one of these is a NaN or an infinity, or if
    /// the file cannot be read.
    pub fn read_values(
        &self,
        name: &str,
        first: usize,
        as_f32: bool,
        out: &mut [u8],
    ) -> Result<(), WeightsError> {
        let entry = self.float_entry(name)?;
        let value_bytes = if as_f32 { size_of::<f32>() } else { entry.dtype.bitsize() / 8 };
        let (found, count) = (entry.elements(), out.len() / value_bytes);
        if first.checked_add(count).is_none_or(|end| end > found) {
            let message = format!("has {found} values, and {count} from number {first} on were asked for");
            return Err(Place { path: self.file(entry).path(), flag: self.flag }.entry(name, message));
        }
        let read = |(part, out): (usize, &mut [u8])| {
            self.read_part(entry, first + part * PART, as_f32, out).map_err(|fault| (part, fault)).err()
        };
        let faults = out.par_chunks_mut(PART * value_bytes).enumerate().filter_map(read);
        match faults.min_by_key(|(part, _)| *part) {
            None => Ok(()),
            Some((_, Fault::NotFinite(place, value))) => Err(self.not_finite(name, entry, place, value)),
            Some((_, Fault::Read(file, source))) => {
                Err(Place { path: self.files[file].path(), flag: self.flag }.read(source))
            }
        }
    }

    /// The part of [`Self::read_values`] that one core takes at a time.
    fn read_part(&self, entry: &Entry, first: usize, as_f32: bool, out: &mut [u8]) -> Result<(), Fault> {
        let stored_bytes = entry.dtype.bitsize() / 8;
        let read = |out: &mut [u8]| {
            let read = entry.layout.read_at(&self.files, first * stored_bytes, out);
            read.map_err(|(file, source)| Fault::Read(file, source))
        };
        let not_finite = |place: usize, value: f32| Fault::NotFinite(first + place, value);
        if !as_f32 {
            read(out)?;
            let Some(place) = first_not_finite(entry.dtype, out) else { return Ok(()) };
            let mut value = [0.0];
            convert(entry.dtype, &out[place * stored_bytes..][..stored_bytes], &mut value);
            return Err(not_finite(place, value[0]));
        }
        let count = out.len() / size_of::<f32>();
        let (mut stored, mut values) = (vec![0; count * stored_bytes], vec![0.0; count]);
        read(&mut stored)?;
        if let Some(place) = convert(entry.dtype, &stored, &mut values) {
            return Err(not_finite(place, values[place]));
        }
        out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_le_bytes());
        Ok(())
    }

    /// A tensor of bytes and its shape.
    ///
    /// # Errors
    /// If there is no such tensor, or if it is not stored as U8.
    pub fn read_u8(&self, name: &str) -> Result<(Vec<usize>, Vec<u8>), WeightsError> {
        let entry = self.entry(name)?;
        if entry.dtype != Dtype::U8 {
            return Err(self.wrong_dtype(name, entry, "U8"));
        }
        Ok((entry.shape.clone(), self.bytes_of(entry)))
    }

    /// A tensor's bytes as they stand in the file, whatever its element type.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>, WeightsError> {
        Ok(self.bytes_of(self.entry(name)?))
    }

    /// A tensor of whole numbers, from I64 or I32, and its shape.
    ///
    /// # Errors
    /// If there is no such tensor, or if it is stored as another type.
    pub fn read_i64(&self, name: &str) -> Result<(Vec<usize>, Vec<i64>), WeightsError> {
        let entry = self.entry(name)?;
        let wide = match entry.dtype {
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
        Ok((entry.shape.clone(), values))
    }

    /// The flag that named this checkpoint.
    pub(crate) fn flag(&self) -> &'static str {
        self.flag
    }

    pub(crate) fn expect_shape(&self, name: &str, expected: &[usize]) -> Result<(), WeightsError> {
        let entry = self.entry(name)?;
        if entry.shape == expected {
            return Ok(());
        }
        Err(WeightsError::Shape {
            path: self.file(entry).path().to_owned(),
            flag: self.flag,
            tensor: name.to_owned(),
            found: entry.shape.clone(),
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
        match entry.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(entry),
            _ => Err(self.wrong_dtype(name, entry, "F32, F16 or BF16")),
        }
    }

    /// Converts an entry of [`Self::float_entry`] into a slice of its length.
    fn fill_f32(&self, name: &str, entry: &Entry, values: &mut [f32]) -> Result<(), WeightsError> {
        let element_bytes = entry.dtype.bitsize() / 8;
        let mut not_finite = None;
        self.for_each_window(entry, |start, bytes| {
            let start = start / element_bytes;
            let out = &mut values[start..][..bytes.len() / element_bytes];
            if not_finite.is_none() {
                not_finite = convert_shared(entry.dtype, bytes, out).map(|place| start + place);
            }
        });
        let Some(index) = not_finite else {
            return Ok(());
        };
        Err(self.not_finite(name, entry, index, values[index]))
    }

    fn not_finite(&self, name: &str, entry: &Entry, index: usize, value: f32) -> WeightsError {
        WeightsError::NotFinite {
            path: self.file(entry).path().to_owned(),
            flag: self.flag,
            tensor: name.to_owned(),
            index,
            value,
        }
    }

    fn wrong_dtype(&self, name: &str, entry: &Entry, accepted: &'static str) -> WeightsError {
        WeightsError::Dtype {
            path: self.file(entry).path().to_owned(),
            flag: self.flag,
            tensor: name.to_owned(),
            found: entry.dtype,
            accepted,
        }
    }

    fn bytes_of(&self, entry: &Entry) -> Vec<u8> {
        let mut values = Vec::with_capacity(entry.elements() * entry.dtype.bitsize() / 8);
        self.for_each_window(entry, |_, bytes| values.extend_from_slice(bytes));
        values
    }

    fn file(&self, entry: &Entry) -> &MappedFile {
        &self.files[entry.layout.file()]
    }

    fn for_each_window(&self, entry: &Entry, visit: impl FnMut(usize, &[u8])) {
        entry.layout.for_each_window(&self.files, visit);
    }
}

impl Entry {
    /// How many elements there are; the header's check has seen that the product does not overflow.
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// [`convert`] by all cores, if it is worth it.
fn convert_shared(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Option<usize> {
    if out.len() <= PART {
        return convert(dtype, bytes, out);
    }
    let part_bytes = PART * dtype.bitsize() / 8;
    let parts = bytes.par_chunks(part_bytes).zip(out.par_chunks_mut(PART)).enumerate();
    parts.filter_map(|(part, (bytes, out))| Some(part * PART + convert(dtype, bytes, out)?)).min()
}

/// Burn's name of a dtype of floats.
fn burn_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

/// The place of the first of little-endian floats whose exponent has all bits.
fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    fn first<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
        let values = bytes.as_chunks().0;
        // Without an early end, so that the compiler looks at many at once.
        let any = values.iter().fold(false, |any, &value| any | bad(value));
        if any { values.iter().position(|&value| bad(value)) } else { None }
    }
    let half = |exponent: u16| first(bytes, move |value| u16::from_le_bytes(value) & exponent == exponent);
    match dtype {
        Dtype::F16 => half(0x7c00),
        Dtype::BF16 => half(0x7f80),
        _ => first(bytes, |value| u32::from_le_bytes(value) & 0x7f80_0000 == 0x7f80_0000),
    }
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
                assert_eq!(first_not_finite(dtype, &bits.to_le_bytes()), bad, "{dtype} {bits:#x}");
                assert_eq!(bad, (!expected.is_finite()).then_some(0), "{dtype} {bits:#x}");
                assert!(bad.is_some() || out[0].to_bits() == expected.to_bits(), "{dtype} {bits:#x}");
            }
        }
    }

    #[test]
    fn cores_share_a_tensor_and_the_first_wrong_number_is_told() {
        let count = 3 * PART + 5;
        let mut bytes = vec![9];
        bytes.extend((0..count).flat_map(|i| f16::from_f32(i as f32 % 1999.0).to_le_bytes()));
        let mut out = vec![0.0; count];
        assert_eq!(convert_shared(Dtype::F16, &bytes[1..], &mut out), None);
        assert!(out.iter().enumerate().all(|(i, &value)| value == i as f32 % 1999.0));
        for place in [count - 1, 2 * PART, PART + 17] {
            bytes[1 + 2 * place..][..2].copy_from_slice(&f16::NAN.to_le_bytes());
            assert_eq!(convert_shared(Dtype::F16, &bytes[1..], &mut out), Some(place));
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
