//! One optimizer step on a shard.

use deepspeed_core::{Span, SpanMut};
use deepspeed_kernels::update::{
    self as kernels, AdagradCoefficients, AdamCoefficients, LambCoefficients, LionCoefficients,
    SgdCoefficients,
};

pub use deepspeed_kernels::update::LambSums;

use crate::{Hyper, OptimizerKind};

/// What a step reads and writes. All parts have one length.
#[derive(Debug)]
pub struct Shard<'a, 's> {
    /// The fp32 master parameters, updated in place.
    pub param: &'a mut [f32],
    /// The gradients, of any dtype.
    pub grad: Span<'a>,
    /// The state tensors in the order of [`state_names`], zero before the first step.
    pub state: &'a mut [&'s mut [f32]],
    /// Factor on the gradients: unscaling and clipping in one.
    pub grad_scale: f32,
    /// Receives the new parameters in its own dtype.
    pub out: Option<SpanMut<'a>>,
}

/// The names of the fp32 state tensors, each as long as the parameters; the names of torch and DeepSpeed.
///
/// SGD without momentum has none.
pub fn state_names(hyper: &Hyper) -> &'static [&'static str] {
    match hyper.kind() {
        OptimizerKind::Adam | OptimizerKind::AdamW | OptimizerKind::Lamb => &["exp_avg", "exp_avg_sq"],
        OptimizerKind::Lion => &["exp_avg"],
        OptimizerKind::Adagrad => &["sum"],
        OptimizerKind::Sgd if hyper.momentum == 0.0 => &[],
        OptimizerKind::Sgd => &["momentum_buffer"],
    }
}

/// One step of an elementwise optimizer; `step` counts updates from 1.
///
/// # Panics
/// If the state is not that of [`state_names`], lengths differ, or the optimizer is not elementwise (see
/// [`lamb_direction`]).
pub fn update(hyper: &Hyper, step: u64, shard: Shard<'_, '_>) {
    let Shard { param, grad, state, grad_scale, out } = shard;
    let Hyper { lr, betas, eps, weight_decay, .. } = *hyper;
    match (hyper.kind(), state) {
        (OptimizerKind::Adam | OptimizerKind::AdamW, [exp_avg, exp_avg_sq]) => {
            let coefficients = AdamCoefficients::new(
                lr,
                betas,
                eps,
                weight_decay,
                hyper.bias_correction,
                hyper.adam_w_mode,
                step,
            );
            kernels::adam(param, grad, grad_scale, exp_avg, exp_avg_sq, &coefficients, out);
        }
        (OptimizerKind::Sgd, state @ ([] | [_])) => {
            let Hyper { momentum, dampening, nesterov, .. } = *hyper;
            let coefficients = SgdCoefficients::new(lr, momentum, dampening, nesterov, weight_decay, step);
            let buffer = state.first_mut().map(|buffer| &mut **buffer);
            kernels::sgd(param, grad, grad_scale, buffer, &coefficients, out);
        }
        (OptimizerKind::Adagrad, [sum]) => {
            let coefficients = AdagradCoefficients::new(lr, hyper.lr_decay, eps, weight_decay, step);
            kernels::adagrad(param, grad, grad_scale, sum, &coefficients, out);
        }
        (OptimizerKind::Lion, [exp_avg]) => {
            let coefficients = LionCoefficients::new(lr, betas, weight_decay);
            kernels::lion(param, grad, grad_scale, exp_avg, &coefficients, out);
        }
        (OptimizerKind::Lamb, _) => panic!("Lamb is not elementwise: call lamb_direction and lamb_apply"),
        (kind, state) => panic!("{kind} was given {} state tensors", state.len()),
    }
}

fn lamb_coefficients(hyper: &Hyper, step: u64) -> LambCoefficients {
    let Hyper { lr, betas, eps, weight_decay, bias_correction, .. } = *hyper;
    LambCoefficients::new(lr, betas, eps, weight_decay, bias_correction, step)
}

/// What Lamb's trust ratio times the direction is multiplied with.
pub fn lamb_step_size(hyper: &Hyper, step: u64) -> f64 {
    lamb_coefficients(hyper, step).step_size
}

/// First phase of Lamb, for one parameter or the part of it that a rank has: updates the state, writes the raw
/// direction, and returns the sums to be added over all parts of the parameter. `shard.param` and `shard.out` stay
/// as they are.
///
/// # Panics
/// If there are not two state tensors or lengths differ.
pub fn lamb_direction(
    hyper: &Hyper,
    step: u64,
    shard: &mut Shard<'_, '_>,
    direction: &mut [f32],
) -> LambSums {
    let states = shard.state.len();
    let [exp_avg, exp_avg_sq] = shard.state else {
        panic!("Lamb was given {states} state tensors, it has 2");
    };
    let coefficients = lamb_coefficients(hyper, step);
    kernels::lamb_direction(
        shard.param,
        shard.grad,
        shard.grad_scale,
        exp_avg,
        exp_avg_sq,
        &coefficients,
        direction,
    )
}

/// Second phase of Lamb: applies the direction with the trust ratio that the parameter's `sums` give.
///
/// # Panics
/// If lengths differ.
pub fn lamb_apply(
    hyper: &Hyper,
    step: u64,
    sums: LambSums,
    param: &mut [f32],
    direction: &[f32],
    out: Option<SpanMut<'_>>,
) {
    let ratio = kernels::trust_ratio(sums, hyper.min_coeff, hyper.max_coeff);
    let length = lamb_coefficients(hyper, step).step_size * ratio;
    kernels::lamb_apply(param, direction, length as f32, out);
}
