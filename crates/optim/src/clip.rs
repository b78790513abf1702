//! The factor that unscales and clips gradients.

/// Keeps the coefficient finite for a norm of zero.
const EPS: f64 = 1e-6;

/// The one factor by which gradients are multiplied before an update: it takes the loss scale out and, where the
/// true norm exceeds `clip`, brings it down to `clip`.
///
/// `scaled_norm` is the L2 norm of the gradients as they are, still multiplied by `loss_scale`. A `clip` of 0 (or
/// less) does not clip. The formula is that of DeepSpeed's ZeRO optimizers,
///
/// ```text
/// 1 / (max((scaled_norm / loss_scale + 1e-6) / clip, 1) * loss_scale)
/// ```
///
/// computed in fp64 and rounded once to the fp32 that kernels take. A NaN norm gives NaN, an infinite one 0: the
/// caller skips such a step.
pub fn grad_scale(scaled_norm: f64, loss_scale: f64, clip: f64) -> f32 {
    let excess = if clip > 0.0 { (scaled_norm / loss_scale + EPS) / clip } else { 1.0 };
    // `f64::max` would turn a NaN into 1.
    let excess = if excess < 1.0 { 1.0 } else { excess };
    (1.0 / (excess * loss_scale)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_norms_are_clipped() {
        assert_eq!(grad_scale(0.0, 1.0, 1.0), 1.0);
        assert_eq!(grad_scale(0.9, 1.0, 1.0), 1.0);
        assert_eq!(grad_scale(4.0, 1.0, 1.0), (1.0 / 4.000_001) as f32);
        assert_eq!(grad_scale(4.0, 1.0, 0.5), (0.5 / 4.000_001) as f32);
    }

    #[test]
    fn the_loss_scale_is_taken_out_before_comparing() {
        assert_eq!(grad_scale(65536.0 * 0.5, 65536.0, 1.0), 1.0 / 65536.0);
        assert_eq!(grad_scale(65536.0 * 2.0, 65536.0, 1.0), (1.0 / (2.000_001 * 65536.0)) as f32);
    }

    #[test]
    fn zero_is_off_and_bad_norms_show() {
        assert_eq!(grad_scale(1e9, 1.0, 0.0), 1.0);
        assert_eq!(grad_scale(1e9, 8.0, 0.0), 0.125);
        assert!(grad_scale(f64::NAN, 1.0, 1.0).is_nan());
        assert_eq!(grad_scale(f64::INFINITY, 1.0, 1.0), 0.0);
    }
}
