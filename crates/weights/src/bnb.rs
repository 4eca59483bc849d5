//! One 4-bit weight as bitsandbytes stores it: packed codes, block scales, and a JSON state in a tensor of bytes.
//!
//! The stored parts are handed on as they are, bit for bit; nothing is dequantized and quantized again. Codes may be
//! stored as numbers of any type (`bnb_4bit_quant_storage`), because only their bytes count. What it trades: one block
//! size and one code book, the ones QLoRA uses. What it refuses: fp4, int8, other block sizes, and a code book that
//! differs from NF4's.

use buzzer_kernels::nf4::{self, BLOCK, DoubleQuant, NESTED_BLOCK, NF4_CODE};
use serde::Deserialize;
use serde_json::Value;

use crate::error::Place;
use crate::{Checkpoint, WeightsError};

/// What follows the weight's name in the name of its state; the quantization type follows this.
const STATE: &str = ".quant_state.bitsandbytes__";
/// What stands in place of `weight` in the name of an int8 weight's scales.
const INT8_SCALES: &str = ".SCB";
/// A `[out, in]` weight in NF4, as stored.
///
/// Element `e` of the row-major weight is `table[code(e)] * absmax[e / 64]`, where `code(e)` is the high half of
/// byte `e / 2` for even `e` and its low half for odd `e`.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4Stored {
    /// `[out, in]` of the weight before it was quantized.
    pub shape: [usize; 2],
    /// Two codes a byte, the first in the high half; `ceil(out * in / 2)` bytes.
    pub codes: Vec<u8>,
    /// One scale per 64 weights.
    pub absmax: Absmax,
    /// The type that bitsandbytes gives the dequantized weight: `float32`, `float16` or `bfloat16`.
    pub dtype: String,
}

/// The scales of an [`Nf4Stored`], `ceil(out * in / 64)` of them.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// As f32.
    Plain(Vec<f32>),
    /// Quantized themselves, by bitsandbytes' signed dynamic map.
    Double(DoubleQuant),
}

/// The JSON in `NAME.weight.quant_state.bitsandbytes__nf4`.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f32>,
}

impl Absmax {
    /// The scales as f32.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::Plain(values) => values.clone(),
            Self::Double(scales) => nf4::restore_absmax(scales),
        }
    }
}

impl Nf4Stored {
    /// Whether a weight (by its full name, `...q_proj.weight`) is stored quantized by bitsandbytes, in any type.
    #[must_use]
    pub fn is_stored(checkpoint: &Checkpoint, weight: &str) -> bool {
        let four = ["nf4", "fp4"].iter().any(|kind| checkpoint.contains(&format!("{weight}{STATE}{kind}")));
        four || checkpoint.contains(&int8_scales(weight))
    }

    /// Whether bitsandbytes has written a checkpoint: some weight in it has a state or scales of its own.
    #[must_use]
    pub fn any_stored(checkpoint: &Checkpoint) -> bool {
        checkpoint.names().any(|name| name.contains(STATE) || name.ends_with(INT8_SCALES))
    }

    /// Whether what follows a linear's path in a name belongs to its int8 form.
    pub(crate) fn is_of_int8(rest: &str) -> bool {
        rest == INT8_SCALES || rest == ".weight_format"
    }

    /// The weight of this name, `...q_proj.weight`, if its shape before quantization was `[out, in]` as expected.
    ///
    /// # Errors
    /// If it is not stored in NF4 with blocks of 64 (and of 256 for double quantization), if a part is missing or of
    /// the wrong size, or if its shape is another.
    pub fn read(
        checkpoint: &Checkpoint,
        weight: &str,
        expected_shape: [usize; 2],
    ) -> Result<Self, WeightsError> {
        let stored = Self::read_any_shape(checkpoint, weight)?;
        if stored.shape == expected_shape {
            return Ok(stored);
        }
        Err(WeightsError::Shape {
            path: checkpoint.file_of(weight)?.to_owned(),
            flag: checkpoint.flag(),
            tensor: weight.to_owned(),
            found: stored.shape.to_vec(),
            expected: expected_shape.to_vec(),
        })
    }

    /// [`Self::read`] of whatever shape the weight has.
    ///
    /// # Errors
    /// As [`Self::read`], less the shape.
    pub fn read_any_shape(checkpoint: &Checkpoint, weight: &str) -> Result<Self, WeightsError> {
        let place = Place { path: checkpoint.file_of(weight)?, flag: checkpoint.flag() };
        let refuse = |message: String| place.quantized(weight, message);
        let state = State::read(checkpoint, weight, place)?;
        let &[rows, columns] = state.shape.as_slice() else {
            return Err(refuse(format!("its shape {:?} is not that of a matrix", state.shape)));
        };
        let codes = checkpoint.read_bytes(weight)?;
        if rows.checked_mul(columns).map(|elements| elements.div_ceil(2)) != Some(codes.len()) {
            let found = codes.len();
            return Err(refuse(format!("{found} bytes of codes do not hold the shape {rows} x {columns}")));
        }
        let table = checkpoint.read_f32(&format!("{weight}.quant_map"), &[NF4_CODE.len()])?;
        if table.iter().zip(NF4_CODE).any(|(found, known)| (found - known).abs() > 1e-6) {
            return Err(refuse(format!("its code book {table:?} is not NF4's")));
        }
        let blocks = (rows * columns).div_ceil(BLOCK);
        let absmax = match state.nested_blocksize {
            None => Absmax::Plain(checkpoint.read_f32(&format!("{weight}.absmax"), &[blocks])?),
            Some(NESTED_BLOCK) => Absmax::read_double(checkpoint, weight, blocks, &state, place)?,
            Some(size) => return Err(refuse(format!("its nested block size is {size}, not {NESTED_BLOCK}"))),
        };
        Ok(Self { shape: [rows, columns], codes, absmax, dtype: state.dtype })
    }
}

impl Absmax {
    fn read_double(
        checkpoint: &Checkpoint,
        weight: &str,
        blocks: usize,
        state: &State,
        place: Place<'_>,
    ) -> Result<Self, WeightsError> {
        let part = |name: &str| format!("{weight}.{name}");
        checkpoint.expect_shape(&part("absmax"), &[blocks])?;
        let (_, codes) = checkpoint.read_u8(&part("absmax"))?;
        let nested_absmax = checkpoint.read_f32(&part("nested_absmax"), &[blocks.div_ceil(NESTED_BLOCK)])?;
        let map = nf4::dynamic_code();
        if checkpoint.read_f32(&part("nested_quant_map"), &[map.len()])? != map {
            let message = "its nested_quant_map is not bitsandbytes' signed dynamic map";
            return Err(place.quantized(weight, message.into()));
        }
        let offset = state.nested_offset.filter(|offset| offset.is_finite());
        let offset =
            offset.ok_or_else(|| place.quantized(weight, "its state has no usable nested_offset".into()))?;
        if let Some(dtype) = state.nested_dtype.as_deref().filter(|&dtype| dtype != "float32") {
            return Err(place.quantized(weight, format!("its nested scales are {dtype}, not float32")));
        }
        Ok(Self::Double(DoubleQuant { codes, nested_absmax, offset }))
    }
}

/// The name of an int8 weight's scales.
fn int8_scales(weight: &str) -> String {
    format!("{}{INT8_SCALES}", weight.strip_suffix(".weight").unwrap_or(weight))
}

impl State {
    fn read(checkpoint: &Checkpoint, weight: &str, place: Place<'_>) -> Result<Self, WeightsError> {
        let refuse = |message: String| place.quantized(weight, message);
        if checkpoint.contains(&format!("{weight}{STATE}fp4")) {
            return Err(refuse("its type is fp4".into()));
        }
        if checkpoint.contains(&int8_scales(weight)) {
            return Err(refuse("its type is int8".into()));
        }
        let (_, json) = checkpoint.read_u8(&format!("{weight}{STATE}nf4"))?;
        let state: Self = serde_json::from_slice(&json).map_err(|error| {
            let text: Value = String::from_utf8_lossy(&json[..json.len().min(80)]).into();
            refuse(format!("its state is not usable: {error} in {text}"))
        })?;
        match (state.quant_type.as_str(), state.blocksize) {
            ("nf4", BLOCK) => Ok(state),
            ("nf4", size) => Err(refuse(format!("its block size is {size}, not {BLOCK}"))),
            (kind, _) => Err(refuse(format!("its type is `{kind}`"))),
        }
    }
}
