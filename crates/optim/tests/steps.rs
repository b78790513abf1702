//! A step through the public door, for each optimizer.

use deepspeed_kernels::cast;
use deepspeed_optim::{
    Hyper, LambSums, OptimizerKind, Shard, lamb_apply, lamb_direction, state_names, update,
};
use half::bf16;

const LEN: usize = 100;

/// Minimises the sum of squares for `steps` from 1 and returns the parameters.
fn descend(hyper: &Hyper, steps: u64) -> Vec<f32> {
    let mut param = vec![1.0f32; LEN];
    let mut out = vec![bf16::ZERO; LEN];
    let mut states = vec![vec![0.0f32; LEN]; state_names(hyper).len()];
    let mut direction = vec![0.0f32; LEN];
    for step in 1..=steps {
        let grad: Vec<f32> = param.iter().map(|p| 2.0 * p).collect();
        let mut state: Vec<&mut [f32]> = states.iter_mut().map(Vec::as_mut_slice).collect();
        let mut shard = Shard {
            param: &mut param,
            grad: (&grad[..]).into(),
            state: &mut state,
            grad_scale: 1.0,
            out: Some((&mut out[..]).into()),
        };
        if hyper.kind().is_elementwise() {
            update(hyper, step, shard);
        } else {
            let sums: LambSums = lamb_direction(hyper, step, &mut shard, &mut direction);
            lamb_apply(hyper, step, sums, &mut param, &direction, Some((&mut out[..]).into()));
        }
        let mut expected = vec![bf16::ZERO; LEN];
        cast((&param[..]).into(), (&mut expected[..]).into());
        assert_eq!(out, expected);
    }
    param
}

#[test]
fn every_optimizer_descends() {
    for name in OptimizerKind::NAMES {
        let (kind, _) = OptimizerKind::from_name(name).unwrap();
        let mut hyper = Hyper::defaults(kind);
        hyper.lr = 0.01;
        let end = descend(&hyper, 50);
        assert!(end.iter().all(|p| *p > -0.1 && *p < 0.96), "{name} ends at {}", end[0]);
    }
    let mut momentum = Hyper::defaults(OptimizerKind::Sgd);
    (momentum.lr, momentum.momentum) = (0.001, 0.9);
    assert!(descend(&momentum, 50)[0] < 0.9);
}

#[test]
fn states_have_the_names_of_torch() {
    let names = |kind| state_names(&Hyper::defaults(kind));
    assert_eq!(names(OptimizerKind::AdamW), ["exp_avg", "exp_avg_sq"]);
    assert_eq!(names(OptimizerKind::Lion), ["exp_avg"]);
    assert_eq!(names(OptimizerKind::Adagrad), ["sum"]);
    assert!(names(OptimizerKind::Sgd).is_empty());
    let mut momentum = Hyper::defaults(OptimizerKind::Sgd);
    momentum.momentum = 0.9;
    assert_eq!(state_names(&momentum), ["momentum_buffer"]);
}

#[test]
#[should_panic(expected = "AdamW was given 1 state tensors")]
fn missing_state_is_noticed() {
    let mut state = [0.0f32; 2];
    update(
        &Hyper::defaults(OptimizerKind::AdamW),
        1,
        Shard {
            param: &mut [0.0; 2],
            grad: (&[0.0f32; 2][..]).into(),
            state: &mut [&mut state],
            grad_scale: 1.0,
            out: None,
        },
    );
}
