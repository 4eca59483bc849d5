//! The header of a safetensors file, checked until every byte range in it can be trusted.
//!
//! The types are the safetensors crate's; the checks are done here because its own reader keeps the last of two
//! entries with one name, does not say which tensor is wrong, and adds the offsets without watching for overflow. What
//! it trades: one pass more over a few hundred kilobytes. What it refuses: gaps, overlaps, bytes that belong to no
//! tensor, and headers over 100 MB.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::marker::PhantomData;

use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::WeightsError;
use crate::error::Place;

/// Bytes of the length in front of the header.
const LENGTH_BYTES: usize = 8;
/// The safetensors crate's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// How a file begins whose content is still at the server.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// A JSON object in the order of the file, with repeated keys still in it, less `__metadata__`.
pub(crate) struct Pairs<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Collect<V> {
            type Value = Pairs<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one entry per tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        pairs.push((key, map.next_value()?));
                    }
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect(PhantomData))
    }
}

/// Every tensor of a file, by name, its offsets counted from the start of the file.
///
/// # Errors
/// If the bytes are no safetensors file, or the header does not describe exactly these bytes.
pub(crate) fn parse(bytes: &[u8], place: Place<'_>) -> Result<BTreeMap<String, TensorInfo>, WeightsError> {
    let json = json_of(bytes, place)?;
    let data_start = LENGTH_BYTES + json.len();
    let Pairs(mut pairs): Pairs<TensorInfo> =
        serde_json::from_slice(json).map_err(|error| place.header(error))?;
    pairs.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    for (name, info) in &pairs {
        end = checked_end(end, info).map_err(|message| place.entry(name, message))?;
    }
    let (promised, actual) = (data_start as u64 + end as u64, bytes.len() as u64);
    if promised > actual {
        return Err(WeightsError::Truncated {
            path: place.path.to_owned(),
            flag: place.flag,
            promised,
            actual,
        });
    }
    if promised < actual {
        let message = format!("{} bytes at its end belong to no tensor", actual - promised);
        return Err(place.header(message));
    }
    let mut tensors = BTreeMap::new();
    for (name, mut info) in pairs {
        info.data_offsets = (data_start + info.data_offsets.0, data_start + info.data_offsets.1);
        match tensors.entry(name) {
            Entry::Occupied(first) => {
                return Err(place.entry(first.key(), "it stands twice in the header".into()));
            }
            Entry::Vacant(free) => free.insert(info),
        };
    }
    Ok(tensors)
}

/// The bytes between the length and the data.
fn json_of<'a>(bytes: &'a [u8], place: Place<'_>) -> Result<&'a [u8], WeightsError> {
    if bytes.starts_with(LFS_POINTER) {
        return Err(
            place.header("it is a Git LFS pointer, so its content was never fetched (`git lfs pull`)")
        );
    }
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(place.header(format!("it has {} bytes, too few for a header", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(place.header(format!("its header is said to be {length} bytes long")));
    }
    rest.get(..length as usize).ok_or_else(|| WeightsError::Truncated {
        path: place.path.to_owned(),
        flag: place.flag,
        promised: length + LENGTH_BYTES as u64,
        actual: bytes.len() as u64,
    })
}

/// The end of a tensor that must begin where the one before it ended. At most 2^61, so that sums cannot overflow.
fn checked_end(start: usize, info: &TensorInfo) -> Result<usize, String> {
    const LIMIT: usize = usize::MAX >> 3;
    let (begin, end) = info.data_offsets;
    if begin != start || end < begin || end > LIMIT {
        return Err(format!(
            "its bytes {begin} to {end} do not follow on byte {start}, where the last tensor ends"
        ));
    }
    let elements = info.shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
    let bits = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
    match bits {
        Some(bits) if bits % 8 == 0 && bits / 8 == end - begin => Ok(end),
        _ => Err(format!("shape {:?} in {} does not fill its {} bytes", info.shape, info.dtype, end - begin)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{BTreeMap, Place, TensorInfo, WeightsError};

    fn parse(bytes: &[u8]) -> Result<BTreeMap<String, TensorInfo>, WeightsError> {
        super::parse(bytes, Place { path: Path::new("x.safetensors"), flag: "--model" })
    }

    fn file(json: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 7);
        bytes
    }

    fn two_tensors() -> Vec<u8> {
        let json = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"a":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}}"#;
        file(json, 22)
    }

    #[test]
    fn offsets_are_of_the_whole_file() {
        let bytes = two_tensors();
        let tensors = parse(&bytes).unwrap();
        let end = bytes.len();
        assert_eq!(tensors["b"].data_offsets, (end - 22, end - 6));
        assert_eq!(tensors["a"].data_offsets, (end - 6, end));
        assert_eq!(tensors["b"].shape, [2, 2]);
    }

    #[test]
    fn every_contradiction_is_named() {
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#""w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
        };
        let good = entry("F32", "[2]", "[0,8]");
        let cases = [
            ("{", 0, "EOF"),
            ("[]", 0, "one entry per tensor"),
            ("{\"w\":3}", 0, "invalid type"),
            (&format!("{{{good}}}"), 7, "promises 70 bytes and it has 69"),
            (&format!("{{{good}}}"), 9, "1 bytes at its end belong to no tensor"),
            (&format!("{{{good},{good}}}"), 8, "do not follow on byte 8"),
            (&format!("{{{0},{0}}}", entry("F32", "[0]", "[0,0]")), 0, "it stands twice"),
            (&format!("{{{}}}", entry("F31", "[2]", "[0,8]")), 8, "unknown variant"),
            (&format!("{{{}}}", entry("F32", "[-2]", "[0,8]")), 8, "invalid value"),
            (&format!("{{{}}}", entry("F32", "[2]", "[8,0]")), 8, "do not follow on byte 0"),
            (&format!("{{{}}}", entry("F32", "[2]", "[4,12]")), 12, "do not follow on byte 0"),
            (
                &format!("{{{}}}", entry("F32", "[3]", "[0,8]")),
                8,
                "shape [3] in F32 does not fill its 8 bytes",
            ),
            (&format!("{{{}}}", entry("F4", "[3]", "[0,1]")), 1, "does not fill"),
            (&format!("{{{}}}", entry("U8", "[4294967296,4294967296]", "[0,0]")), 0, "does not fill"),
            (
                &format!("{{{}}}", entry("U8", "[18446744073709551615]", "[0,18446744073709551615]")),
                0,
                "do not follow on byte 0",
            ),
            (
                &format!("{{{}}}", entry("U8", "[1152921504606846976]", "[0,1152921504606846976]")),
                0,
                "promises 1152921504606847",
            ),
        ];
        for (json, data_bytes, expected) in cases {
            let error = parse(&file(json, data_bytes)).unwrap_err().to_string();
            assert!(error.contains(expected), "{json}: {error}");
            assert!(error.contains("x.safetensors") && error.contains("--model"), "{error}");
        }
    }

    #[test]
    fn sums_of_huge_offsets_do_not_wrap() {
        // Nine tensors of 2^61 bytes wrap a 64-bit sum to a small number, which is how they could pass for a tiny file.
        let size = 1_u64 << 61;
        let entry = |i: u64| {
            let (begin, end) = (size.wrapping_mul(i), size.wrapping_mul(i + 1));
            format!(r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{begin},{end}]}}"#)
        };
        let json = format!("{{{}}}", (0..9).map(entry).collect::<Vec<_>>().join(","));
        assert!(parse(&file(&json, 0)).is_err());
    }

    #[test]
    fn a_header_longer_than_the_file_is_refused() {
        for (length, expected) in
            [(1 << 20, "promises 1048584 bytes and it has 12"), (u64::MAX, "18446744073709551615 bytes long")]
        {
            let mut bytes = u64::to_le_bytes(length).to_vec();
            bytes.extend_from_slice(b"{}  ");
            let error = parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = parse(b"version https://git-lfs.github.com/spec/v1\noid").unwrap_err().to_string();
        assert!(error.contains("git lfs pull"), "{error}");
    }

    #[test]
    fn no_cut_and_no_changed_byte_panics() {
        let whole = two_tensors();
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "cut at {end}");
        }
        for place in 0..whole.len() {
            for byte in [0, b' ', b'"', b'0', b'9', b'[', b'}', 0x7F, 0xFF] {
                let mut bytes = whole.clone();
                bytes[place] = byte;
                if let Ok(tensors) = parse(&bytes) {
                    assert!(tensors.values().all(|info| info.data_offsets.1 <= bytes.len()));
                }
            }
        }
    }
}
