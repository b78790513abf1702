//! What happens at a boundary, given the facts of all ranks. Pure, and the same on every rank.

/// What a gradient that is not finite means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnNonFinite {
    /// Expected now and then (fp16 with a loss scale, bf16 by default): this update is skipped.
    Skip,
    /// Not looked at (`bf16.check_grad_overflow: false`): the update is made.
    Apply,
    /// A defect (fp32): an error, before any weight is touched.
    Fail,
}

/// What to do at a boundary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Update with gradients times `grad_scale`, which undoes the loss scale and clips.
    Apply {
        /// Global L2 norm of the averaged gradients, unscaled, before clipping.
        norm: f64,
        /// Factor for every gradient.
        grad_scale: f32,
    },
    /// Make no update.
    Skip,
    /// Raise.
    Fail,
}

/// Decides from the sum over all ranks of squared, still scaled gradients.
///
/// The clip coefficient is that of the original's ZeRO path, see [`deepspeed_optim::clip`].
pub fn decide(square_sum: f64, loss_scale: f64, clip: f64, rule: OnNonFinite) -> Decision {
    let finite = square_sum.is_finite();
    match rule {
        OnNonFinite::Skip if !finite => Decision::Skip,
        OnNonFinite::Fail if !finite => Decision::Fail,
        _ => {
            let scaled_norm = square_sum.sqrt();
            let grad_scale = deepspeed_optim::clip::grad_scale(scaled_norm, loss_scale, clip);
            Decision::Apply { norm: scaled_norm / loss_scale, grad_scale }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_unscaled_and_before_clipping() {
        let Decision::Apply { norm, grad_scale } = decide(64.0 * 100.0, 8.0, 1.0, OnNonFinite::Skip) else {
            panic!("a finite norm applies")
        };
        assert_eq!(norm, 10.0);
        assert!((f64::from(grad_scale) - 1.0 / (10.0 * 8.0)).abs() < 1e-7);
    }

    #[test]
    fn what_is_not_finite_follows_the_rule() {
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(decide(bad, 1.0, 1.0, OnNonFinite::Skip), Decision::Skip);
            assert_eq!(decide(bad, 1.0, 1.0, OnNonFinite::Fail), Decision::Fail);
            assert!(matches!(decide(bad, 1.0, 1.0, OnNonFinite::Apply), Decision::Apply { .. }));
        }
    }
}
