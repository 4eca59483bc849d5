//! PyTorch's files (`torch.save` since version 1.6): a zip archive of one pickle and the raw bytes of every storage.
//!
//! The archive is stored without compression, so a tensor is a range of the mapped file, like one of a safetensors file,
//! and loading one touches nothing else. The pickle, which is a program, is not run: [`pickle`] knows the few names
//! that tensors need and stops at any other. What it trades: only row-major tensors. What it refuses: compressed or
//! encrypted archives, big-endian ones, archives of scripted models, and the format before 1.6.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use safetensors::tensor::TensorInfo;

use crate::WeightsError;
use crate::error::Place;
use crate::mapped::Tensors;

mod pickle;
mod zip;

use pickle::{Fault, Stored};

/// How a zip archive begins.
const ZIP: &[u8] = b"PK\x03\x04";
/// How PyTorch's files before 1.6 begin: a pickle in protocol 2 of one long number.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// Names and shapes of a 70B model take 200 kB; this bounds the work that a hostile one can ask for.
const MAX_PICKLE_BYTES: usize = 16 << 20;

/// Whether these bytes begin like any file that PyTorch has ever written.
pub(crate) fn is_pytorch(bytes: &[u8]) -> bool {
    bytes.starts_with(ZIP) || bytes.starts_with(LEGACY)
}

/// Every tensor of a state dict by name, its offsets counted from the start of the file.
///
/// # Errors
/// If the bytes are no archive of PyTorch's, or the pickle in it does anything but name tensors inside the archive.
pub(crate) fn parse(bytes: &[u8], place: Place<'_>) -> Result<Tensors, WeightsError> {
    if bytes.starts_with(LEGACY) {
        let message = "it has the format before PyTorch 1.6: load it there and save it again";
        return Err(place.pytorch(message.into()));
    }
    let archive = Archive::open(bytes).map_err(|message| place.pytorch(message))?;
    let pickle = &bytes[archive.pickle.clone()];
    if pickle.len() > MAX_PICKLE_BYTES {
        return Err(place.pytorch(format!("its data.pkl has {} bytes, too many for names", pickle.len())));
    }
    let stored = pickle::read(pickle).map_err(|fault| match fault {
        Fault::Damaged(message) => place.pytorch(message),
        Fault::Code(name) => {
            WeightsError::PickledCode { path: place.path.to_owned(), flag: place.flag, name }
        }
    })?;
    let mut tensors = BTreeMap::new();
    for (name, stored) in stored {
        let info = archive.locate(&stored).map_err(|message| place.entry(name, message))?;
        match tensors.entry(name.to_owned()) {
            Entry::Occupied(first) => {
                return Err(place.entry(first.key(), "it stands twice in the file".into()));
            }
            Entry::Vacant(free) => free.insert(info),
        };
    }
    Ok(tensors)
}

/// The members of an archive that matter.
struct Archive<'a> {
    pickle: Range<usize>,
    /// The storages by key.
    storages: BTreeMap<&'a str, Range<usize>>,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, String> {
        let members = zip::members(bytes)?;
        let mut pickles = members.iter().filter_map(|(name, range)| {
            let folder = name.strip_suffix("data.pkl")?;
            (folder.is_empty() || folder.ends_with('/')).then_some((folder, range.clone()))
        });
        let (folder, pickle) = match (pickles.next(), pickles.next()) {
            (Some(pickle), None) => pickle,
            (None, _) => return Err("it is a zip archive without data.pkl, so none of PyTorch's".into()),
            (Some(_), Some(_)) => return Err("it has more than one data.pkl".into()),
        };
        let inside = || members.iter().filter_map(|(name, range)| Some((name.strip_prefix(folder)?, range)));
        let order = inside().find(|(name, _)| *name == "byteorder").map(|(_, range)| &bytes[range.clone()]);
        if let Some(order) = order.filter(|order| order.trim_ascii() != b"little") {
            return Err(format!("its byte order is `{}`, not `little`", order.escape_ascii()));
        }
        let storages =
            inside().filter_map(|(name, range)| Some((name.strip_prefix("data/")?, range.clone())));
        Ok(Self { pickle, storages: storages.collect() })
    }

    /// The bytes of a tensor, which must lie in its storage row by row.
    fn locate(&self, stored: &Stored<'_>) -> Result<TensorInfo, String> {
        let Stored { dtype, key, elements, offset, shape, stride } = stored;
        let storage = self
            .storages
            .get(key)
            .ok_or_else(|| format!("its storage `data/{key}` is not in the archive"))?;
        let size = dtype.bitsize() / 8;
        if elements.checked_mul(size) != Some(storage.len()) {
            let bytes = storage.len();
            return Err(format!("its storage of {elements} elements in {dtype} has {bytes} bytes"));
        }
        let count = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
        let end = count.and_then(|count| count.checked_add(*offset));
        let (Some(count), Some(_)) = (count, end.filter(|end| end <= elements)) else {
            return Err(format!(
                "shape {shape:?} from element {offset} on is not inside its storage of {elements} elements"
            ));
        };
        if count > 0 && !is_row_major(shape, stride) {
            return Err(format!(
                "shape {shape:?} is stored with strides {stride:?}, not row by row: save `.contiguous()` tensors"
            ));
        }
        let start = storage.start + offset * size;
        Ok(TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (start, start + count * size) })
    }
}

fn is_row_major(shape: &[usize], stride: &[usize]) -> bool {
    let mut due = 1;
    shape.len() == stride.len()
        && shape.iter().zip(stride).rev().all(|(&dim, &stride)| {
            let right = dim == 1 || stride == due;
            due *= dim;
            right
        })
}

#[cfg(test)]
mod tests;
