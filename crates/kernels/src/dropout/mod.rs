//! Dropout whose mask is a function of a key and a place, and is never stored.
//!
//! Element i survives if word `i mod 4` of `philox(counter = i div 4, key)` is at least `p · 2³²`; survivors are divided
//! by `1 - p`. The backward pass, and the forward pass that is run again for it, draw the same mask from the same key.
//!
//! The generator is Philox 4x32 with ten rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011),
//! <https://doi.org/10.1145/2063384.2063405>. On the host it is run on all cores.

#[cfg(feature = "cubecl")]
pub mod kernel;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

/// Elements that one thread draws before it takes the next piece of work; a multiple of four.
const CHUNK: usize = 1 << 14;

/// The mask of one application of dropout.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an element is dropped, from 0 up to, but not including, 1.
    pub probability: f64,
    /// Distinguishes this application from every other one of the run.
    pub key: u64,
}

impl Dropout {
    /// The same probability for a part of a computation, with a key of its own.
    #[must_use]
    pub fn derive(self, part: u64) -> Self {
        // The finaliser of SplitMix64 (Steele et al., 2014) spreads neighbouring parts over all keys.
        let mut key = self.key.wrapping_add((part + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        key = (key ^ (key >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        key = (key ^ (key >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self { key: key ^ (key >> 31), ..self }
    }

    /// `mask / (1 - p)` as factors, 0 where an element is dropped.
    #[must_use]
    pub fn factors(self, count: usize) -> Vec<f32> {
        let threshold = (self.probability * 4_294_967_296.0) as u32;
        let kept = (1.0 / (1.0 - self.probability)) as f32;
        let key = [self.key as u32, (self.key >> 32) as u32];
        let mut factors = vec![0.0; count];
        factors.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, factors)| {
            for (quad, factors) in factors.chunks_mut(4).enumerate() {
                let counter = (chunk * (CHUNK / 4) + quad) as u64;
                let words = philox([counter as u32, (counter >> 32) as u32, 0, 0], key);
                for (factor, word) in factors.iter_mut().zip(words) {
                    *factor = if word >= threshold { kept } else { 0.0 };
                }
            }
        });
        factors
    }

    /// `drop(x)`; the reference draws the mask on the host.
    #[must_use]
    pub fn apply<B: Backend, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        if self.probability == 0.0 {
            return x;
        }
        let dims = x.dims();
        let factors = TensorData::new(self.factors(dims.iter().product()), dims);
        let factors = Tensor::<B, D>::from_data(factors, (&x.device(), x.dtype()));
        x * factors
    }
}

/// Ten rounds of Philox 4x32.
#[must_use]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(counter[0]) * 0xD251_1F53;
        let high = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_gives_the_published_vectors() {
        // Known answers that Random123 ships for philox4x32-10.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn the_mask_is_a_function_of_key_and_place() {
        let dropout = Dropout { probability: 0.1, key: 5 };
        let long = dropout.factors(100_001);
        assert_eq!(long[..777], dropout.factors(777));
        let dropped = long.iter().filter(|&&factor| factor == 0.0).count();
        assert!((9_500..10_500).contains(&dropped), "{dropped}");
        assert!(long.iter().all(|&factor| factor == 0.0 || (factor - 1.0 / 0.9).abs() < 1e-6));
        assert_ne!(long, dropout.derive(0).factors(100_001));
        assert_ne!(dropout.derive(0).key, dropout.derive(1).key);
    }
}
