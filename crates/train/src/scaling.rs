//! The factor that keeps gradients inside the range of f16.
//!
//! A gradient below 6e-8 is 0 in f16, and above 65,504 infinite. The loss is multiplied by a power of two before the
//! backward pass, halved whenever a gradient overflows, and doubled after a long time without one (Micikevicius et al.,
//! "Mixed Precision Training", <https://arxiv.org/abs/1710.03740>). Other dtypes have the range of f32 and need none.

use serde::{Deserialize, Serialize};

/// The logarithm to base 2 of the scale that a run begins with: 65,536.
const FIRST: i32 = 16;
/// Steps without overflow after which it is doubled.
const PATIENCE: u32 = 2_000;

/// Dynamic loss scaling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LossScale {
    /// The logarithm to base 2 of the scale, which is a power of two.
    exponent: i32,
    dynamic: bool,
    good_steps: u32,
}

impl LossScale {
    pub(crate) fn new(dynamic: bool) -> Self {
        Self { exponent: if dynamic { FIRST } else { 0 }, dynamic, good_steps: 0 }
    }

    /// What the loss is multiplied by.
    #[must_use]
    pub fn value(&self) -> f64 {
        2_f64.powi(self.exponent)
    }

    /// Whether it follows the gradients, as it does in f16.
    pub(crate) fn is_dynamic(&self) -> bool {
        self.dynamic
    }

    /// Learns whether the step's gradient overflowed; false if it did and no smaller scale is left to try.
    pub(crate) fn adapt(&mut self, overflowed: bool) -> bool {
        if overflowed {
            self.good_steps = 0;
            self.exponent -= 1;
            return self.dynamic && self.exponent >= 0;
        }
        self.good_steps += 1;
        if self.dynamic && self.good_steps == PATIENCE {
            self.good_steps = 0;
            self.exponent += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_follows_overflows() {
        let mut scale = LossScale::new(true);
        assert!(scale.adapt(true));
        assert_eq!(scale.value(), 32_768.0);
        for _ in 0..PATIENCE {
            assert!(scale.adapt(false));
        }
        assert_eq!(scale.value(), 65_536.0);
        assert!((0..16).all(|_| scale.adapt(true)));
        assert!(!scale.adapt(true), "below 1 a smaller scale cannot help");
        assert!(!LossScale::new(false).adapt(true));
    }

    #[test]
    fn a_scale_goes_on_from_where_it_was_stored() {
        let mut scale = LossScale::new(true);
        (0..7).for_each(|_| assert!(scale.adapt(true)));
        (0..PATIENCE - 1).for_each(|_| assert!(scale.adapt(false)));
        let mut read: LossScale = serde_json::from_str(&serde_json::to_string(&scale).unwrap()).unwrap();
        assert!(read.adapt(false) && scale.adapt(false));
        assert_eq!((read, read.value()), (scale, 1024.0));
    }
}
