//! A GGUF file's header and tensors, read with plain reads and checked until every range in it can be trusted.
//!
//! Lists (the vocabulary) are passed over: the tokenizer is read from its own file. What it trades: a seek per tensor instead of a map of the
//! file. What it refuses: versions but 2 and 3, big-endian files, counts and lengths that the file has no bytes for, tensors
//! that overlap or are no whole blocks, names that stand twice, and lists of lists.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::{ALIGNMENT, BlockType, MAGIC, kind};
use crate::WeightsError;
use crate::error::Place;

/// More pairs or tensors than any model has.
const MAX_PAIRS: u64 = 1 << 14;
const MAX_TENSORS: u64 = 1 << 17;
const MAX_DIMS: u32 = 4;
/// Blocks that are converted at a time.
const CHUNK_BLOCKS: usize = 1 << 14;
/// Reserved for a text before its bytes have been seen.
const FIRST_BYTES: u64 = 1 << 12;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Metadata {
    /// A whole number of any width.
    Integer(i128),
    /// A fraction.
    Float(f64),
    /// Yes or no.
    Bool(bool),
    /// A text.
    Text(String),
    /// A list, of which only the length is kept.
    List {
        /// Its length.
        length: u64,
    },
}

/// A GGUF file with its header checked.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    flag: &'static str,
    file: File,
    metadata: BTreeMap<String, Metadata>,
    tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies in the file.
#[derive(Debug)]
struct Entry {
    block_type: BlockType,
    /// Slowest dimension first.
    shape: Vec<usize>,
    start: u64,
    bytes: u64,
}

impl Gguf {
    /// Opens a file and reads its header; `flag` is what errors name.
    ///
    /// # Errors
    /// If it cannot be read, is no GGUF file, or contradicts itself or its size.
    pub fn open(path: &Path, flag: &'static str) -> Result<Self, WeightsError> {
        let place = Place { path, flag };
        // Asked before the file is opened: opening a named pipe would wait for a writer.
        let metadata = std::fs::metadata(path).map_err(|source| place.read(source))?;
        if !metadata.is_file() {
            return Err(place.gguf("it is no regular file"));
        }
        let file = File::open(path).map_err(|source| place.read(source))?;
        let mut reader = Reader { place, file: BufReader::new(&file), at: 0, size: metadata.len() };
        let header = reader.header()?;
        Ok(Self { path: path.to_owned(), flag, file, metadata: header.metadata, tensors: header.tensors })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A value of the metadata.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Metadata> {
        self.metadata.get(key)
    }

    /// Every tensor's name, in alphabetical order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// How a tensor is stored, and its shape, slowest dimension first.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<(BlockType, &[usize])> {
        self.tensors.get(name).map(|entry| (entry.block_type, entry.shape.as_slice()))
    }

    /// A tensor of the expected shape in f32, into a buffer that is used again.
    ///
    /// # Errors
    /// If there is no such tensor, its shape is another, it cannot be read, or holds a NaN or an infinity.
    pub fn read_f32_into(
        &self,
        name: &str,
        expected_shape: &[usize],
        values: &mut Vec<f32>,
    ) -> Result<(), WeightsError> {
        let entry = self.entry(name)?;
        if entry.shape != expected_shape {
            return Err(WeightsError::Shape {
                path: self.path.clone(),
                flag: self.flag,
                tensor: name.to_owned(),
                found: entry.shape.clone(),
                expected: expected_shape.to_vec(),
            });
        }
        let (block, block_bytes) = entry.block_type.block();
        values.resize(entry.shape.iter().product(), 0.0);
        let mut file = &self.file;
        file.seek(SeekFrom::Start(entry.start)).map_err(|source| self.place().read(source))?;
        let mut bytes = vec![0; CHUNK_BLOCKS.min(values.len().div_ceil(block)) * block_bytes];
        for (chunk, out) in values.chunks_mut(CHUNK_BLOCKS * block).enumerate() {
            let bytes = &mut bytes[..out.len() / block * block_bytes];
            file.read_exact(bytes).map_err(|source| self.place().read(source))?;
            if let Some(inside) = entry.block_type.decode(bytes, out) {
                return Err(WeightsError::NotFinite {
                    path: self.path.clone(),
                    flag: self.flag,
                    tensor: name.to_owned(),
                    index: chunk * CHUNK_BLOCKS * block + inside,
                    value: out[inside],
                });
            }
        }
        Ok(())
    }

    pub(super) fn place(&self) -> Place<'_> {
        Place { path: &self.path, flag: self.flag }
    }

    fn entry(&self, name: &str) -> Result<&Entry, WeightsError> {
        self.tensors.get(name).ok_or_else(|| WeightsError::MissingTensor {
            path: self.path.clone(),
            flag: self.flag,
            tensor: name.to_owned(),
            count: self.tensors.len(),
        })
    }
}

#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, Metadata>,
    tensors: BTreeMap<String, Entry>,
}

/// Walks over a header and never past the file's end.
struct Reader<'a> {
    place: Place<'a>,
    file: BufReader<&'a File>,
    at: u64,
    size: u64,
}

impl Reader<'_> {
    fn header(&mut self) -> Result<Header, WeightsError> {
        if self.size < 4 || self.bytes::<4>()? != MAGIC {
            return Err(self.place.gguf("it does not begin with GGUF"));
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            let message = format!("its version is {version:#x}; 2 and 3 are read here, little-endian");
            return Err(self.place.gguf(message));
        }
        let (tensors, pairs) = (self.u64()?, self.u64()?);
        if pairs > MAX_PAIRS || tensors > MAX_TENSORS {
            let message =
                format!("it announces {pairs} pairs and {tensors} tensors, more than any model has");
            return Err(self.place.gguf(message));
        }
        let mut header = Header::default();
        for _ in 0..pairs {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(&key, kind)?;
            if header.metadata.insert(key.clone(), value).is_some() {
                return Err(self.place.gguf(format!("the key `{key}` stands in it twice")));
            }
        }
        for _ in 0..tensors {
            let (name, entry) = self.entry()?;
            if header.tensors.contains_key(&name) {
                return Err(self.place.entry(&name, "it stands twice in the header".into()));
            }
            header.tensors.insert(name, entry);
        }
        self.place_tensors(&mut header)?;
        Ok(header)
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Metadata, WeightsError> {
        Ok(match kind {
            kind::U8 => Metadata::Integer(u8::from_le_bytes(self.bytes()?).into()),
            kind::I8 => Metadata::Integer(i8::from_le_bytes(self.bytes()?).into()),
            kind::U16 => Metadata::Integer(u16::from_le_bytes(self.bytes()?).into()),
            kind::I16 => Metadata::Integer(i16::from_le_bytes(self.bytes()?).into()),
            kind::U32 => Metadata::Integer(self.u32()?.into()),
            kind::I32 => Metadata::Integer(i32::from_le_bytes(self.bytes()?).into()),
            kind::U64 => Metadata::Integer(self.u64()?.into()),
            kind::I64 => Metadata::Integer(i64::from_le_bytes(self.bytes()?).into()),
            kind::F32 => Metadata::Float(f32::from_le_bytes(self.bytes()?).into()),
            kind::F64 => Metadata::Float(f64::from_le_bytes(self.bytes()?)),
            kind::BOOL => Metadata::Bool(self.bytes::<1>()? != [0]),
            kind::STRING => Metadata::Text(self.text()?),
            kind::ARRAY => Metadata::List { length: self.skip_list(key)? },
            other => return Err(self.place.gguf(format!("the key `{key}` has the unknown type {other}"))),
        })
    }

    /// The length of a list that is passed over.
    fn skip_list(&mut self, key: &str) -> Result<u64, WeightsError> {
        let (kind, length) = (self.u32()?, self.u64()?);
        let width = match kind {
            kind::U8 | kind::I8 | kind::BOOL => 1,
            kind::U16 | kind::I16 => 2,
            kind::U32 | kind::I32 | kind::F32 => 4,
            kind::U64 | kind::I64 | kind::F64 => 8,
            kind::STRING => {
                for _ in 0..length {
                    let bytes = self.u64()?;
                    self.skip(bytes)?;
                }
                return Ok(length);
            }
            other => {
                return Err(self.place.gguf(format!("the list `{key}` has elements of the type {other}")));
            }
        };
        self.skip(length.saturating_mul(width))?;
        Ok(length)
    }

    /// A tensor's entry; its start is still counted from where the data begins.
    fn entry(&mut self) -> Result<(String, Entry), WeightsError> {
        let name = self.text()?;
        let place = self.place;
        let refuse = |message: String| place.entry(&name, message);
        let dims = self.u32()?;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(refuse(format!("it has {dims} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(self.u64()?);
        }
        shape.reverse();
        let number = self.u32()?;
        let Some(block_type) = BlockType::ALL.into_iter().find(|known| known.number() == number) else {
            let message = format!("it has ggml's type {number}; F32, F16, Q4_0 and Q8_0 are read here");
            return Err(refuse(message));
        };
        let start = self.u64()?;
        let sizes: Option<Vec<usize>> = shape.iter().map(|&dim| usize::try_from(dim).ok()).collect();
        let bytes = sizes.as_ref().and_then(|sizes| {
            let elements = sizes.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim))?;
            block_type.bytes(elements, *sizes.last()?)
        });
        let (Some(shape), Some(bytes)) = (sizes, bytes) else {
            return Err(refuse(format!("the shape {shape:?} is none that {block_type:?} can have")));
        };
        Ok((name, Entry { block_type, shape, start, bytes: bytes as u64 }))
    }

    /// Finds where the data begins, and checks that every tensor lies in it and none on another.
    fn place_tensors(&mut self, header: &mut Header) -> Result<(), WeightsError> {
        let alignment = match header.metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(&Metadata::Integer(value)) if (1..=1 << 20).contains(&value) && value.count_ones() == 1 => {
                value as u64
            }
            Some(other) => return Err(self.place.gguf(format!("its alignment is {other:?}"))),
        };
        let data = self.at.next_multiple_of(alignment);
        let mut ordered: Vec<(&String, &mut Entry)> = header.tensors.iter_mut().collect();
        ordered.sort_by_key(|(_, entry)| (entry.start, entry.bytes));
        let mut end = 0;
        for (name, entry) in ordered {
            let place = self.place;
            let range = || format!("its {} bytes at {} of the data", entry.bytes, entry.start);
            if !entry.start.is_multiple_of(alignment) || entry.start < end {
                let message = format!("{} are not aligned, or lie on another tensor's", range());
                return Err(place.entry(name, message));
            }
            let after = entry.start.checked_add(entry.bytes);
            let Some(after) = after.filter(|&after| after <= self.size.saturating_sub(data)) else {
                let message =
                    format!("{} go past the end of the file, which has {} bytes", range(), self.size);
                return Err(place.entry(name, message));
            };
            end = after;
            entry.start += data;
        }
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, WeightsError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WeightsError> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], WeightsError> {
        let mut bytes = [0; N];
        self.claim(N as u64)?;
        self.file.read_exact(&mut bytes).map_err(|source| self.place.read(source))?;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, WeightsError> {
        let length = self.u64()?;
        self.claim(length)?;
        let mut bytes = Vec::with_capacity(length.min(FIRST_BYTES) as usize);
        let found = (&mut self.file).take(length).read_to_end(&mut bytes);
        match found {
            Ok(found) if found as u64 == length => {}
            Ok(_) => return Err(self.place.read(ErrorKind::UnexpectedEof.into())),
            Err(source) => return Err(self.place.read(source)),
        }
        String::from_utf8(bytes)
            .map_err(|_| self.place.gguf(format!("the text before byte {} is not UTF-8", self.at)))
    }

    fn skip(&mut self, length: u64) -> Result<(), WeightsError> {
        self.claim(length)?;
        // A file's size fits an i64, and `claim` has seen that the length does not pass it.
        self.file.seek_relative(length as i64).map_err(|source| self.place.read(source))
    }

    /// Moves on, if the file has so many bytes.
    fn claim(&mut self, length: u64) -> Result<(), WeightsError> {
        let after = self.at.checked_add(length).filter(|&after| after <= self.size);
        self.at = after.ok_or_else(|| {
            let message =
                format!("it has {} bytes, and its header asks for {length} more at {}", self.size, self.at);
            self.place.gguf(message)
        })?;
        Ok(())
    }
}
