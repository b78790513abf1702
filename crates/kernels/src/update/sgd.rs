//! Stochastic gradient descent with momentum.

use deepspeed_core::{Span, SpanMut};

use super::for_blocks;
use crate::{Isa, isa::kernel};

/// The numbers of one SGD step, as `torch.optim.SGD`:
///
/// ```text
/// g = grad * grad_scale + weight_decay * p
/// b = momentum * b + (1 - dampening) * g      (without dampening in the first step, from b = 0)
/// p = p - lr * (g + momentum * b  if nesterov, else b)
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdCoefficients {
    lr: f32,
    momentum: f32,
    gradient_share: f32,
    weight_decay: f32,
    nesterov: bool,
}

impl SgdCoefficients {
    /// For update number `step`, counted from 1.
    pub fn new(lr: f64, momentum: f64, dampening: f64, nesterov: bool, weight_decay: f64, step: u64) -> Self {
        let gradient_share = if step <= 1 { 1.0 } else { (1.0 - dampening) as f32 };
        Self {
            lr: lr as f32,
            momentum: momentum as f32,
            gradient_share,
            weight_decay: weight_decay as f32,
            nesterov,
        }
    }
}

/// One SGD step; `momentum_buffer` is needed exactly if the momentum is not zero. See [`SgdCoefficients`].
///
/// # Panics
/// If lengths differ, or the momentum is not zero and there is no buffer.
pub fn sgd(
    param: &mut [f32],
    grad: Span<'_>,
    grad_scale: f32,
    momentum_buffer: Option<&mut [f32]>,
    coefficients: &SgdCoefficients,
    out: Option<SpanMut<'_>>,
) {
    sgd_on(Isa::active(), param, grad, grad_scale, momentum_buffer, coefficients, out);
}

/// [`sgd`] on a given instruction set.
///
/// # Panics
/// As [`sgd`], or if this machine does not have `isa`.
pub fn sgd_on(
    isa: Isa,
    param: &mut [f32],
    grad: Span<'_>,
    grad_scale: f32,
    momentum_buffer: Option<&mut [f32]>,
    coefficients: &SgdCoefficients,
    out: Option<SpanMut<'_>>,
) {
    if coefficients.momentum == 0.0 {
        for_blocks(isa, param, grad, out, |_, param, grad| plain(isa, param, grad, grad_scale, coefficients));
        return;
    }
    let buffer = momentum_buffer.expect("invariant: SGD with momentum has a momentum buffer");
    assert_eq!(buffer.len(), param.len(), "momentum buffer and parameter of different length");
    for_blocks(isa, param, grad, out, |range, param, grad| {
        with_momentum(isa, param, grad, grad_scale, &mut buffer[range], coefficients);
    });
}

kernel! {
    fn plain(param: &mut [f32], grad: &[f32], grad_scale: f32, c: &SgdCoefficients) {
        let c = *c;
        for (p, g) in param.iter_mut().zip(grad) {
            *p -= c.lr * (g * grad_scale + c.weight_decay * *p);
        }
    }
}

kernel! {
    fn with_momentum(
        param: &mut [f32],
        grad: &[f32],
        grad_scale: f32,
        buffer: &mut [f32],
        c: &SgdCoefficients,
    ) {
        let c = *c;
        for ((p, g), b) in param.iter_mut().zip(grad).zip(buffer) {
            let g = g * grad_scale + c.weight_decay * *p;
            *b = c.momentum * *b + c.gradient_share * g;
            *p -= c.lr * if c.nesterov { g + c.momentum * *b } else { *b };
        }
    }
}
