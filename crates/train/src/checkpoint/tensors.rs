//! The file of the moments: which tensors it holds, and back.

use std::collections::BTreeMap;
use std::path::Path;

use buzzer_model::{Target, block_tensor};
use buzzer_weights::{Checkpoint, StoredTensor, StoredValues, WeightsError};

use crate::HostMoments;

/// The flag that names a run's folder.
const FLAG: &str = "--resume";
/// What stands between a linear's name and the moment's.
const SIDES: [&str; 2] = ["lora_A", "lora_B"];
const FIRST: &str = "first";
const SECOND: &str = "second";
/// Largest magnitudes of blocks: only beside moments in 8 bits.
const FIRST_SCALES: &str = "first_scales";
const SECOND_SCALES: &str = "second_scales";

type AllMoments = BTreeMap<(usize, Target), [HostMoments; 2]>;

fn name(layer: usize, target: Target, side: &str, moment: &str) -> String {
    block_tensor(layer, &format!("{}.{side}.{moment}", target.hf_path()))
}

/// Every moment under its name, flat.
pub(super) fn to_write(moments: &AllMoments) -> Vec<StoredTensor<'_>> {
    let mut tensors = Vec::new();
    for (&(layer, target), pair) in moments {
        for (side, moments) in SIDES.into_iter().zip(pair) {
            let mut push = |moment: &str, length: usize, values| {
                tensors.push(StoredTensor {
                    name: name(layer, target, side, moment),
                    shape: vec![length],
                    values,
                });
            };
            match moments {
                HostMoments::Full { first, second } => {
                    push(FIRST, first.len(), StoredValues::F32(first));
                    push(SECOND, second.len(), StoredValues::F32(second));
                }
                HostMoments::EightBit { first, first_scales, second, second_scales } => {
                    push(FIRST, first.len(), StoredValues::U8(first));
                    push(FIRST_SCALES, first_scales.len(), StoredValues::F32(first_scales));
                    push(SECOND, second.len(), StoredValues::U8(second));
                    push(SECOND_SCALES, second_scales.len(), StoredValues::F32(second_scales));
                }
            }
        }
    }
    tensors
}

/// The moments of these linears, as far as the file has any.
pub(super) fn read<'a>(
    path: &Path,
    linears: impl Iterator<Item = &'a (usize, Target)>,
) -> Result<AllMoments, WeightsError> {
    let file = Checkpoint::open_for(path, FLAG)?;
    let trained = linears.filter(|&&(layer, target)| file.contains(&name(layer, target, SIDES[0], FIRST)));
    let pair = |&(layer, target): &(usize, Target)| {
        let [a, b] = SIDES.map(|side| read_moments(&file, layer, target, side));
        Ok(((layer, target), [a?, b?]))
    };
    trained.map(pair).collect()
}

fn read_moments(
    file: &Checkpoint,
    layer: usize,
    target: Target,
    side: &str,
) -> Result<HostMoments, WeightsError> {
    let name_of = |moment| name(layer, target, side, moment);
    let numbers = |moment| file.read_f32_any_shape(&name_of(moment)).map(|(_, values)| values);
    let bytes = |moment| file.read_u8(&name_of(moment)).map(|(_, bytes)| bytes);
    if file.contains(&name_of(FIRST_SCALES)) {
        return Ok(HostMoments::EightBit {
            first: bytes(FIRST)?,
            first_scales: numbers(FIRST_SCALES)?,
            second: bytes(SECOND)?,
            second_scales: numbers(SECOND_SCALES)?,
        });
    }
    Ok(HostMoments::Full { first: numbers(FIRST)?, second: numbers(SECOND)? })
}
