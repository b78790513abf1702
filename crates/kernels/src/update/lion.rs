//! Lion.

use deepspeed_core::{Span, SpanMut};

use super::for_blocks;
use crate::{Isa, isa::kernel};

/// The numbers of one Lion step, from «Symbolic Discovery of Optimization Algorithms» (Chen et al., 2023), as
/// DeepSpeed's CPU Lion:
///
/// ```text
/// g = grad * grad_scale
/// p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
/// m = beta2 * m + (1 - beta2) * g
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionCoefficients {
    lr: f32,
    keep: f32,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
}

impl LionCoefficients {
    /// The same for every step.
    pub fn new(lr: f64, betas: (f64, f64), weight_decay: f64) -> Self {
        Self {
            lr: lr as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            beta1: betas.0 as f32,
            beta2: betas.1 as f32,
            one_minus_beta1: (1.0 - betas.0) as f32,
            one_minus_beta2: (1.0 - betas.1) as f32,
        }
    }
}

/// One Lion step. See [`LionCoefficients`].
///
/// # Panics
/// If lengths differ.
pub fn lion(
    param: &mut [f32],
    grad: Span<'_>,
    grad_scale: f32,
    exp_avg: &mut [f32],
    coefficients: &LionCoefficients,
    out: Option<SpanMut<'_>>,
) {
    lion_on(Isa::active(), param, grad, grad_scale, exp_avg, coefficients, out);
}

/// [`lion`] on a given instruction set.
///
/// # Panics
/// If lengths differ or this machine does not have `isa`.
pub fn lion_on(
    isa: Isa,
    param: &mut [f32],
    grad: Span<'_>,
    grad_scale: f32,
    exp_avg: &mut [f32],
    coefficients: &LionCoefficients,
    out: Option<SpanMut<'_>>,
) {
    assert_eq!(exp_avg.len(), param.len(), "moment and parameter of different length");
    for_blocks(isa, param, grad, out, |range, param, grad| {
        block(isa, param, grad, grad_scale, &mut exp_avg[range], coefficients);
    });
}

kernel! {
    fn block(param: &mut [f32], grad: &[f32], grad_scale: f32, exp_avg: &mut [f32], c: &LionCoefficients) {
        let c = *c;
        for ((p, g), m) in param.iter_mut().zip(grad).zip(exp_avg) {
            let g = g * grad_scale;
            let direction = c.beta1 * *m + c.one_minus_beta1 * g;
            // Zero has no sign and a NaN stays one.
            let sign = if direction > 0.0 { 1.0 } else { direction };
            let sign = if direction < 0.0 { -1.0 } else { sign };
            *p = *p * c.keep - c.lr * sign;
            *m = c.beta2 * *m + c.one_minus_beta2 * g;
        }
    }
}
