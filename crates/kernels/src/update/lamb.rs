//! Lamb, in two phases: its step length needs two norms of each whole parameter, which may lie on several ranks.

use deepspeed_core::{Span, SpanMut};

use super::{bias_correction, for_blocks};
use crate::{Isa, isa::kernel, reduce::SquareSum};

/// The numbers of one Lamb step, from «Large Batch Optimization for Deep Learning» (You et al., 2019), as
/// DeepSpeed's FusedLamb:
///
/// ```text
/// g = grad * grad_scale
/// m = beta1 * m + (1 - beta1) * g
/// v = beta2 * v + (1 - beta2) * g^2
/// u = m / (sqrt(v) + eps) + weight_decay * p
/// p = p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * trust_ratio * u      (lr alone without bias correction)
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LambCoefficients {
    /// The factor of `trust_ratio * u` above.
    pub step_size: f64,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    eps: f32,
    weight_decay: f32,
}

impl LambCoefficients {
    /// For update number `step`, counted from 1.
    pub fn new(
        lr: f64,
        betas: (f64, f64),
        eps: f64,
        weight_decay: f64,
        with_bias_correction: bool,
        step: u64,
    ) -> Self {
        let (beta1, beta2) = betas;
        let c1 = bias_correction(beta1, step, with_bias_correction);
        let c2 = bias_correction(beta2, step, with_bias_correction);
        Self {
            step_size: lr * c2.sqrt() / c1,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            eps: eps as f32,
            weight_decay: weight_decay as f32,
        }
    }
}

/// What the trust ratio of a parameter is made of; sums over its parts add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LambSums {
    /// Sum of the squares of the parameter before the step.
    pub param: f64,
    /// Sum of the squares of the direction.
    pub direction: f64,
}

impl std::ops::AddAssign for LambSums {
    fn add_assign(&mut self, other: Self) {
        self.param += other.param;
        self.direction += other.direction;
    }
}

/// Norm of the parameter by norm of the direction, within `min..=max`; 1 if either norm is zero.
pub fn trust_ratio(sums: LambSums, min: f64, max: f64) -> f64 {
    if sums.param == 0.0 || sums.direction == 0.0 {
        return 1.0;
    }
    let ratio = sums.param.sqrt() / sums.direction.sqrt();
    if ratio > max {
        max
    } else if ratio < min {
        min
    } else {
        ratio
    }
}

/// First phase, for one parameter or a part of it: updates the moments, writes `u` into `direction`, leaves the
/// parameter. See [`LambCoefficients`].
///
/// # Panics
/// If lengths differ.
pub fn lamb_direction(
    param: &[f32],
    grad: Span<'_>,
    grad_scale: f32,
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    coefficients: &LambCoefficients,
    direction: &mut [f32],
) -> LambSums {
    lamb_direction_on(Isa::active(), param, grad, grad_scale, exp_avg, exp_avg_sq, coefficients, direction)
}

/// [`lamb_direction`] on a given instruction set.
///
/// # Panics
/// If lengths differ or this machine does not have `isa`.
pub fn lamb_direction_on(
    isa: Isa,
    param: &[f32],
    grad: Span<'_>,
    grad_scale: f32,
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    coefficients: &LambCoefficients,
    direction: &mut [f32],
) -> LambSums {
    assert_eq!(exp_avg.len(), param.len(), "first moment and parameter of different length");
    assert_eq!(exp_avg_sq.len(), param.len(), "second moment and parameter of different length");
    assert_eq!(direction.len(), param.len(), "direction and parameter of different length");
    let (mut param_squares, mut direction_squares) = (SquareSum::new(), SquareSum::new());
    for_blocks(isa, direction, grad, None, |range, direction, grad| {
        let param = &param[range.clone()];
        let (exp_avg, exp_avg_sq) = (&mut exp_avg[range.clone()], &mut exp_avg_sq[range]);
        direction_block(isa, param, grad, grad_scale, exp_avg, exp_avg_sq, coefficients, direction);
        param_squares.add(isa, param);
        direction_squares.add(isa, direction);
    });
    LambSums { param: param_squares.total(), direction: direction_squares.total() }
}

/// Second phase: `param -= step * direction`, where `step` is the step size times the trust ratio, and the cast
/// into `out`.
///
/// # Panics
/// If lengths differ.
pub fn lamb_apply(param: &mut [f32], direction: &[f32], step: f32, out: Option<SpanMut<'_>>) {
    lamb_apply_on(Isa::active(), param, direction, step, out);
}

/// [`lamb_apply`] on a given instruction set.
///
/// # Panics
/// If lengths differ or this machine does not have `isa`.
pub fn lamb_apply_on(isa: Isa, param: &mut [f32], direction: &[f32], step: f32, out: Option<SpanMut<'_>>) {
    for_blocks(isa, param, direction.into(), out, |_, param, direction| {
        apply_block(isa, param, direction, step);
    });
}

kernel! {
    fn direction_block(
        param: &[f32],
        grad: &[f32],
        grad_scale: f32,
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
        c: &LambCoefficients,
        direction: &mut [f32],
    ) {
        let c = *c;
        for ((((p, g), m), v), u) in param.iter().zip(grad).zip(exp_avg).zip(exp_avg_sq).zip(direction) {
            let g = g * grad_scale;
            *m = c.beta1 * *m + c.one_minus_beta1 * g;
            *v = c.beta2 * *v + c.one_minus_beta2 * (g * g);
            *u = *m / (v.sqrt() + c.eps) + c.weight_decay * p;
        }
    }
}

kernel! {
    fn apply_block(param: &mut [f32], direction: &[f32], step: f32) {
        for (p, u) in param.iter_mut().zip(direction) {
            *p -= step * u;
        }
    }
}
