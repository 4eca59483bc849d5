//! A base and an adapter as the tensors of one plain model: `W + s B A`, one tensor at a time.
//!
//! The base may be dense or stored by bitsandbytes in 4 bits, and a dense one may be rounded to NF4 first, which gives the
//! weights that QLoRA trained the adapter over. All arithmetic is f32 on the host, so the result does not depend on a
//! device, and the writers round once. What it trades: one processor's speed for memory of one tensor. What it refuses: an
//! adapter of another model.

mod bitsandbytes;
mod hugging_face;

use std::path::{Path, PathBuf};

use buzzer_kernels::nf4;
use buzzer_model::LlamaConfig;
use rayon::prelude::*;

use crate::load::{check_fits, open_base};
use crate::parts::Part;
use crate::{Adapter, Checkpoint, Factors, FloatType, Nf4Stored, Quantization, WeightsError};

pub use self::bitsandbytes::{Nf4Format, write_nf4};
pub use self::hugging_face::write_merged;

/// Where a merge takes its weights from.
#[derive(Debug)]
pub struct Merge<'a> {
    base: PathBuf,
    config: LlamaConfig,
    checkpoint: Checkpoint,
    adapter: Option<&'a Adapter>,
    quantization: Quantization,
}

/// What the linears of a base are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseForm {
    /// Numbers of 16 or 32 bits.
    Dense,
    /// bitsandbytes' NF4.
    Nf4,
}

impl<'a> Merge<'a> {
    /// Opens a base model's folder. With a `quantization`, linears are rounded to NF4 before the adapter's correction is
    /// added; a base that bitsandbytes wrote stays as it is, also what it left dense.
    ///
    /// # Errors
    /// If the base cannot be read or has tensors that are none of Llama's, or the adapter, which came from the folder named,
    /// has other shapes.
    pub fn open(
        base: &Path,
        adapter: Option<(&'a Adapter, &Path)>,
        quantization: Quantization,
    ) -> Result<Self, WeightsError> {
        let (config, checkpoint, quantization) = open_base(base, quantization)?;
        if let Some((adapter, dir)) = adapter {
            check_fits(&config, adapter, dir)?;
        }
        let base = base.to_owned();
        Ok(Self { base, config, checkpoint, adapter: adapter.map(|(adapter, _)| adapter), quantization })
    }

    /// The model's sizes.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// How the base stores its linears; bitsandbytes may have left some of them dense.
    #[must_use]
    pub fn base_form(&self) -> BaseForm {
        if Nf4Stored::any_stored(&self.checkpoint) { BaseForm::Nf4 } else { BaseForm::Dense }
    }

    /// The element type in which the base stores its embedding.
    ///
    /// # Errors
    /// If it has none.
    pub fn base_type(&self) -> Result<FloatType, WeightsError> {
        let dtype = self.checkpoint.dtype(&Part::Embedding.hf_name())?;
        let known = [FloatType::F32, FloatType::Bf16, FloatType::F16];
        Ok(known.into_iter().find(|known| known.dtype() == dtype).unwrap_or_default())
    }

    /// How many tensors the result has.
    #[must_use]
    pub fn tensors(&self) -> usize {
        Part::all(&self.config).len()
    }

    /// One tensor of the result, in f32, into a buffer that is used again.
    pub(crate) fn read(&self, part: Part, values: &mut Vec<f32>) -> Result<(), WeightsError> {
        let shape = part.shape(&self.config);
        if let Some(stored) = self.stored(part)? {
            values.resize(shape.iter().product(), 0.0);
            nf4::dequantize(&stored.codes, &stored.absmax.to_f32(), values);
        } else {
            self.checkpoint.read_f32_into(&part.hf_name(), &shape, values)?;
            if matches!(part, Part::Linear(..)) {
                round_to_nf4(values, self.quantization);
            }
        }
        if let Some(factors) = self.factors(part) {
            let scale = self.adapter.map_or(0.0, |adapter| adapter.config.scaling(factors));
            add_correction(values, factors, scale as f32);
        }
        Ok(())
    }

    /// The matrix as bitsandbytes stored it, if it did: a linear, or the head.
    pub(crate) fn stored(&self, part: Part) -> Result<Option<Nf4Stored>, WeightsError> {
        let name = part.hf_name();
        match part.shape(&self.config)[..] {
            [out, inner] if Nf4Stored::is_stored(&self.checkpoint, &name) => {
                Nf4Stored::read(&self.checkpoint, &name, [out, inner]).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Whether the adapter changes a tensor.
    pub(crate) fn is_corrected(&self, part: Part) -> bool {
        self.factors(part).is_some()
    }

    fn factors(&self, part: Part) -> Option<&'a Factors> {
        let Part::Linear(layer, target) = part else { return None };
        self.adapter?.tensors.get(&(layer, target))
    }
}

/// What NF4 leaves of a weight.
fn round_to_nf4(values: &mut [f32], quantization: Quantization) {
    let absmax = match quantization {
        Quantization::None => return,
        Quantization::Nf4 | Quantization::Nf4Double => nf4::quantize(values),
    };
    let scales = match quantization {
        Quantization::Nf4Double => nf4::restore_absmax(&nf4::double_quantize(&absmax.absmax)),
        _ => absmax.absmax,
    };
    nf4::dequantize(&absmax.codes, &scales, values);
}

/// `W += s B A`: the product is summed over the rank first, so a small correction is not lost term by term.
fn add_correction(values: &mut [f32], factors: &Factors, scale: f32) {
    let rank = factors.rank;
    let rows = values.par_chunks_exact_mut(factors.in_features);
    let sides = factors.b.par_chunks_exact(rank);
    rows.zip(sides).for_each_init(Vec::new, |sum, (row, side)| {
        sum.clear();
        sum.resize(row.len(), 0.0_f32);
        for (factor, a) in side.iter().zip(factors.a.chunks_exact(row.len())) {
            sum.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * a);
        }
        row.iter_mut().zip(&*sum).for_each(|(weight, sum)| *weight += scale * sum);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_correction_is_the_product_of_its_factors() {
        let (a, b) = (vec![1.0, 2.0, 3.0, 0.0, -1.0, 4.0], vec![1.0, 10.0, -2.0, 0.5]);
        let factors = Factors { a, b, rank: 2, alpha: 1.0, in_features: 3, out_features: 2 };
        let mut weight = vec![1.0; 6];
        add_correction(&mut weight, &factors, 0.5);
        assert_eq!(weight, [1.5, -3.0, 22.5, 0.0, -1.25, -1.0]);
    }

    #[test]
    fn rounding_to_nf4_twice_is_rounding_once() {
        let values: Vec<f32> = (0..640).map(|place| (place as f32 * 0.37).sin()).collect();
        let mut once = values.clone();
        round_to_nf4(&mut once, Quantization::Nf4);
        assert_ne!(once, values);
        let mut twice = once.clone();
        round_to_nf4(&mut twice, Quantization::Nf4);
        assert_eq!(twice, once);
        let mut none = values.clone();
        round_to_nf4(&mut none, Quantization::None);
        assert_eq!(none, values);
    }
}
