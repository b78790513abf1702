//! Adam and AdamW.

use deepspeed_core::{Span, SpanMut};

use super::{bias_correction, for_blocks};
use crate::{Isa, isa::kernel};

/// The numbers of one Adam step.
///
/// With bias corrections `c1 = 1 - beta1^t`, `c2 = 1 - beta2^t` (1 when disabled), the form of DeepSpeed's
/// FusedAdam:
///
/// ```text
/// g = grad * grad_scale            (+ weight_decay * p   unless decoupled)
/// m = beta1 * m + (1 - beta1) * g
/// v = beta2 * v + (1 - beta2) * g^2
/// p = p - lr * ((m / c1) / (sqrt(v / c2) + eps)          (+ weight_decay * p   if decoupled))
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamCoefficients {
    lr: f32,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    inverse_c1: f32,
    inverse_c2: f32,
    eps: f32,
    weight_decay: f32,
    decoupled: bool,
}

impl AdamCoefficients {
    /// For update number `step`, counted from 1. `decoupled` is AdamW; otherwise the decay is L2 regularisation.
    pub fn new(
        lr: f64,
        betas: (f64, f64),
        eps: f64,
        weight_decay: f64,
        with_bias_correction: bool,
        decoupled: bool,
        step: u64,
    ) -> Self {
        let (beta1, beta2) = betas;
        Self {
            lr: lr as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            inverse_c1: bias_correction(beta1, step, with_bias_correction).recip() as f32,
            inverse_c2: bias_correction(beta2, step, with_bias_correction).recip() as f32,
            eps: eps as f32,
            weight_decay: weight_decay as f32,
            decoupled,
        }
    }
}

/// One Adam or AdamW step. See [`AdamCoefficients`].
///
/// # Panics
/// If lengths differ.
pub fn adam(
    param: &mut [f32],
    grad: Span<'_>,
    grad_scale: f32,
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    coefficients: &AdamCoefficients,
    out: Option<SpanMut<'_>>,
) {
    adam_on(Isa::active(), param, grad, grad_scale, exp_avg, exp_avg_sq, coefficients, out);
}

/// [`adam`] on a given instruction set.
///
/// # Panics
/// If lengths differ or this machine does not have `isa`.
pub fn adam_on(
    isa: Isa,
    param: &mut [f32],
    grad: Span<'_>,
    grad_scale: f32,
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    coefficients: &AdamCoefficients,
    out: Option<SpanMut<'_>>,
) {
    assert_eq!(exp_avg.len(), param.len(), "first moment and parameter of different length");
    assert_eq!(exp_avg_sq.len(), param.len(), "second moment and parameter of different length");
    let block = if coefficients.decoupled { block::<Decoupled> } else { block::<L2> };
    for_blocks(isa, param, grad, out, |range, param, grad| {
        let (exp_avg, exp_avg_sq) = (&mut exp_avg[range.clone()], &mut exp_avg_sq[range]);
        block(isa, param, grad, grad_scale, exp_avg, exp_avg_sq, coefficients);
    });
}

/// Where weight decay enters.
trait Decay {
    const DECOUPLED: bool;
}

struct Decoupled;
struct L2;

impl Decay for Decoupled {
    const DECOUPLED: bool = true;
}

impl Decay for L2 {
    const DECOUPLED: bool = false;
}

kernel! {
    fn block<D: Decay>(
        param: &mut [f32],
        grad: &[f32],
        grad_scale: f32,
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
        c: &AdamCoefficients,
    ) {
        let c = *c;
        for (((p, g), m), v) in param.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq) {
            let mut g = g * grad_scale;
            if !D::DECOUPLED {
                g += c.weight_decay * *p;
            }
            *m = c.beta1 * *m + c.one_minus_beta1 * g;
            *v = c.beta2 * *v + c.one_minus_beta2 * (g * g);
            let mut update = (*m * c.inverse_c1) / ((*v * c.inverse_c2).sqrt() + c.eps);
            if D::DECOUPLED {
                update += c.weight_decay * *p;
            }
            *p -= c.lr * update;
        }
    }
}
