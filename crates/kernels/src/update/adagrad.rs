//! Adagrad.

use deepspeed_core::{Span, SpanMut};

use super::for_blocks;
use crate::{Isa, isa::kernel};

/// The numbers of one Adagrad step, as `torch.optim.Adagrad`:
///
/// ```text
/// g = grad * grad_scale + weight_decay * p
/// s = s + g^2
/// p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdagradCoefficients {
    lr: f32,
    eps: f32,
    weight_decay: f32,
}

impl AdagradCoefficients {
    /// For update number `step`, counted from 1.
    pub fn new(lr: f64, lr_decay: f64, eps: f64, weight_decay: f64, step: u64) -> Self {
        let lr = lr / (1.0 + step.saturating_sub(1) as f64 * lr_decay);
        Self { lr: lr as f32, eps: eps as f32, weight_decay: weight_decay as f32 }
    }
}

/// One Adagrad step; `sum` is the sum of squared gradients. See [`AdagradCoefficients`].
///
/// # Panics
/// If lengths differ.
pub fn adagrad(
    param: &mut [f32],
    grad: Span<'_>,
    grad_scale: f32,
    sum: &mut [f32],
    coefficients: &AdagradCoefficients,
    out: Option<SpanMut<'_>>,
) {
    adagrad_on(Isa::active(), param, grad, grad_scale, sum, coefficients, out);
}

/// [`adagrad`] on a given instruction set.
///
/// # Panics
/// If lengths differ or this machine does not have `isa`.
pub fn adagrad_on(
    isa: Isa,
    param: &mut [f32],
    grad: Span<'_>,
    grad_scale: f32,
    sum: &mut [f32],
    coefficients: &AdagradCoefficients,
    out: Option<SpanMut<'_>>,
) {
    assert_eq!(sum.len(), param.len(), "sum of squares and parameter of different length");
    for_blocks(isa, param, grad, out, |range, param, grad| {
        block(isa, param, grad, grad_scale, &mut sum[range], coefficients);
    });
}

kernel! {
    fn block(param: &mut [f32], grad: &[f32], grad_scale: f32, sum: &mut [f32], c: &AdagradCoefficients) {
        let c = *c;
        for ((p, g), s) in param.iter_mut().zip(grad).zip(sum) {
            let g = g * grad_scale + c.weight_decay * *p;
            *s += g * g;
            *p -= c.lr * (g / (s.sqrt() + c.eps));
        }
    }
}
