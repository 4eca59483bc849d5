//! The factor that keeps gradients inside the range of f16.
//!
//! A gradient below 6e-8 is 0 in f16, and above 65,504 infinite. The loss is multiplied by a power of two before the
//! backward pass, halved whenever a gradient overflows, and doubled after a long time without one (Micikevicius et al.,
//! "Mixed Precision Training", <https://arxiv.org/abs/1710.03740>). Other dtypes have the range of f32 and need none.

/// The scale that a run begins with.
const FIRST: f64 = 65_536.0;
/// Steps without overflow after which it is doubled.
const PATIENCE: u32 = 2_000;

/// Dynamic loss scaling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LossScale {
    value: f64,
    dynamic: bool,
    good_steps: u32,
}

impl LossScale {
    pub(crate) fn new(dynamic: bool) -> Self {
        Self { value: if dynamic { FIRST } else { 1.0 }, dynamic, good_steps: 0 }
    }

    pub(crate) fn value(&self) -> f64 {
        self.value
    }

    /// Learns whether the step's gradient overflowed; false if it did and no smaller scale is left to try.
    pub(crate) fn adapt(&mut self, overflowed: bool) -> bool {
        if overflowed {
            self.good_steps = 0;
            self.value /= 2.0;
            return self.dynamic && self.value >= 1.0;
        }
        self.good_steps += 1;
        if self.dynamic && self.good_steps == PATIENCE {
            self.good_steps = 0;
            self.value *= 2.0;
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
        assert_eq!(scale.value(), FIRST / 2.0);
        for _ in 0..PATIENCE {
            assert!(scale.adapt(false));
        }
        assert_eq!(scale.value(), FIRST);
        assert!((0..16).all(|_| scale.adapt(true)));
        assert!(!scale.adapt(true), "below 1 a smaller scale cannot help");
        assert!(!LossScale::new(false).adapt(true));
    }
}
