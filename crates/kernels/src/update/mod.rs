//! Optimizer updates: fp32 master parameters and states, gradients of any dtype, the model's copy written on the
//! way.
//!
//! Each function is one pass over memory: it multiplies the gradient by `grad_scale` (unscaling and clipping in
//! one factor), updates state and parameter, and casts the new parameter into `out`. The numbers of a step that
//! are the same for all elements are computed beforehand, in fp64, into a `...Coefficients` value.
//!
//! All slices of a call have one length; each function panics if they differ.

mod adagrad;
mod adam;
mod lamb;
mod lion;
mod sgd;

use std::ops::Range;

use deepspeed_core::{Span, SpanMut};

pub use adagrad::{AdagradCoefficients, adagrad, adagrad_on};
pub use adam::{AdamCoefficients, adam, adam_on};
pub use lamb::{
    LambCoefficients, LambSums, lamb_apply, lamb_apply_on, lamb_direction, lamb_direction_on, trust_ratio,
};
pub use lion::{LionCoefficients, lion, lion_on};
pub use sgd::{SgdCoefficients, sgd, sgd_on};

use crate::{BLOCK, Isa, cast::widened, cast_on};

/// Calls `step(range, param[range], grad[range] in fp32)` block by block and casts each block into `out`.
fn for_blocks(
    isa: Isa,
    param: &mut [f32],
    grad: Span<'_>,
    mut out: Option<SpanMut<'_>>,
    mut step: impl FnMut(Range<usize>, &mut [f32], &[f32]),
) {
    let len = param.len();
    assert_eq!(grad.len(), len, "gradient and parameter of different length");
    if let Some(out) = &out {
        assert_eq!(out.len(), len, "output and parameter of different length");
    }
    let mut scratch = [0.0; BLOCK];
    for (index, param) in param.chunks_mut(BLOCK).enumerate() {
        let range = index * BLOCK..index * BLOCK + param.len();
        let grad = widened(isa, grad.slice(range.start, range.len()), &mut scratch);
        step(range.clone(), param, grad);
        if let Some(out) = &mut out {
            cast_on(isa, Span::from(&*param), out.slice_mut(range.start, range.len()));
        }
    }
}

/// `1 - beta^step`, and 1 without bias correction.
fn bias_correction(beta: f64, step: u64, enabled: bool) -> f64 {
    if enabled { 1.0 - beta.powf(step as f64) } else { 1.0 }
}
