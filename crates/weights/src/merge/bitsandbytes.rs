//! A merge as the folder that bitsandbytes and transformers save for a model in 4 bits.
//!
//! Linears are quantized to NF4 in blocks of 64, tables and norms keep 16 or 32 bits. What it trades: a merged weight loses
//! to NF4 once more what the base had lost already. What it refuses: to quantize again what bitsandbytes stored and no
//! adapter has changed; such codes are written as they were read.

use std::path::Path;

use buzzer_kernels::nf4::{BLOCK, NESTED_BLOCK, NF4_CODE, double_quantize, dynamic_code, quantize};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::Merge;
use super::hugging_face::{base_config, set_dtype, write_shards};
use crate::parts::Part;
use crate::write::{Planned, TensorSink};
use crate::{Absmax, FloatType, Nf4Stored, WeightsError, write_json};

/// How to write a merge in NF4.
#[derive(Clone, Copy, Debug)]
pub struct Nf4Format {
    /// Whether the scales are quantized too.
    pub double: bool,
    /// The type of tables and norms, and the one that the linears are restored to and computed in.
    pub float_type: FloatType,
}

/// Writes a merge into a folder that is there, its linears in NF4, in files of at most `shard_bytes` each where its
/// largest tensor allows; `done` hears of every tensor.
///
/// # Errors
/// If the base is damaged, a number does not fit the type, or a file cannot be written.
pub fn write_nf4(
    dir: &Path,
    merge: &Merge<'_>,
    format: Nf4Format,
    shard_bytes: u64,
    mut done: impl FnMut(),
) -> Result<(), WeightsError> {
    let parts = Part::all(merge.config()).into_iter().map(|part| (part, plan(merge, part, format))).collect();
    let mut values = Vec::new();
    write_shards(dir, parts, shard_bytes, |part, sink| {
        match part {
            Part::Linear(..) => write_linear(sink, &packed(merge, part, format, &mut values)?)?,
            _ => {
                merge.read(part, &mut values)?;
                sink.floats(&values, format.float_type)?;
            }
        }
        done();
        Ok(())
    })?;
    let mut config = base_config(merge)?;
    set_dtype(&mut config, format.float_type);
    config.insert("quantization_config".into(), quantization_config(format));
    write_json(&dir.join("config.json"), &config)
}

/// The tensors that one part becomes.
fn plan(merge: &Merge<'_>, part: Part, format: Nf4Format) -> Vec<Planned> {
    let (name, shape) = (part.hf_name(), part.shape(merge.config()));
    if !matches!(part, Part::Linear(..)) {
        return vec![Planned { name, dtype: format.float_type.dtype(), shape }];
    }
    let elements: usize = shape.iter().product();
    let blocks = elements.div_ceil(BLOCK);
    let tensor = |suffix: &str, dtype, shape: &[usize]| Planned {
        name: format!("{name}{suffix}"),
        dtype,
        shape: shape.to_vec(),
    };
    let mut planned = vec![tensor("", Dtype::U8, &[elements.div_ceil(2), 1])];
    let scales = if format.double { Dtype::U8 } else { Dtype::F32 };
    planned.push(tensor(".absmax", scales, &[blocks]));
    planned.push(tensor(".quant_map", Dtype::F32, &[NF4_CODE.len()]));
    if format.double {
        planned.push(tensor(".nested_absmax", Dtype::F32, &[blocks.div_ceil(NESTED_BLOCK)]));
        planned.push(tensor(".nested_quant_map", Dtype::F32, &[dynamic_code().len()]));
    }
    // Room for the longest way to write the offset.
    let longest =
        state(&[shape[0], shape[1]], &format.float_type.to_string(), Some(-f32::MIN_POSITIVE)).len() + 8;
    planned.push(tensor(".quant_state.bitsandbytes__nf4", Dtype::U8, &[longest]));
    planned
}

/// A linear in NF4: as it was stored, if nothing has changed it.
fn packed(
    merge: &Merge<'_>,
    part: Part,
    format: Nf4Format,
    values: &mut Vec<f32>,
) -> Result<Nf4Stored, WeightsError> {
    let dtype = format.float_type.to_string();
    let untouched = if merge.is_corrected(part) { None } else { merge.stored(part)? };
    if let Some(stored) = untouched {
        let absmax = match (stored.absmax, format.double) {
            (Absmax::Plain(scales), true) => Absmax::Double(double_quantize(&scales)),
            (scales @ Absmax::Double(_), false) => Absmax::Plain(scales.to_f32()),
            (scales, _) => scales,
        };
        return Ok(Nf4Stored { absmax, dtype, ..stored });
    }
    merge.read(part, values)?;
    let quantized = quantize(values);
    let absmax = if format.double {
        Absmax::Double(double_quantize(&quantized.absmax))
    } else {
        Absmax::Plain(quantized.absmax)
    };
    let shape = part.shape(merge.config());
    Ok(Nf4Stored { shape: [shape[0], shape[1]], codes: quantized.codes, absmax, dtype })
}

/// In the order of [`plan`].
fn write_linear(sink: &mut TensorSink<'_, '_>, linear: &Nf4Stored) -> Result<(), WeightsError> {
    let float = FloatType::F32;
    sink.bytes(&linear.codes)?;
    let offset = match &linear.absmax {
        Absmax::Plain(scales) => {
            sink.floats(scales, float)?;
            sink.floats(&NF4_CODE, float)?;
            None
        }
        Absmax::Double(scales) => {
            sink.bytes(&scales.codes)?;
            sink.floats(&NF4_CODE, float)?;
            sink.floats(&scales.nested_absmax, float)?;
            sink.floats(dynamic_code(), float)?;
            Some(scales.offset)
        }
    };
    sink.text(&state(&linear.shape, &linear.dtype, offset))
}

/// The JSON of `quant_state`, with Python's spaces, so that a file equals bitsandbytes' own.
fn state([out, inner]: &[usize; 2], dtype: &str, offset: Option<f32>) -> String {
    let plain = format!(
        r#"{{"quant_type": "nf4", "blocksize": {BLOCK}, "dtype": "{dtype}", "shape": [{out}, {inner}]"#
    );
    match offset {
        None => plain + "}",
        Some(offset) => {
            let offset = json!(f64::from(offset));
            let nested = format!(r#""nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32""#);
            format!(r#"{plain}, {nested}, "nested_offset": {offset}}}"#)
        }
    }
}

/// What transformers writes for such a model.
fn quantization_config(format: Nf4Format) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": format.float_type.to_string(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": format.double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_written_as_python_writes_them() {
        assert_eq!(
            state(&[256, 688], "float32", None),
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [256, 688]}"#
        );
        let double = state(&[256, 688], "bfloat16", Some(0.080_962_956));
        let end = r#""shape": [256, 688], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.08096295595169067}"#;
        assert!(double.ends_with(end), "{double}");
    }

    #[test]
    fn every_state_fits_the_room_that_is_planned_for_it() {
        let length = |offset: f32| state(&[4096, 11008], "float32", Some(offset)).len();
        let room = length(-f32::MIN_POSITIVE) + 8;
        for offset in [0.0, -1.0 / 3.0, f32::MAX, f32::MIN, 1e-38, -1.1e-45, 0.133_519_65, -1.234_567_8e-5] {
            assert!(length(offset) <= room, "{offset}");
        }
    }
}
