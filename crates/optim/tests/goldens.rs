//! Schedules against the original 0.19.8 and optimizers against torch: `goldens.json`, recorded by `record_goldens.py`.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use deepspeed_optim::{Hyper, Schedule, Shard, state_names, update};
use serde_json::Value;

fn goldens() -> Value {
    serde_json::from_str(include_str!("goldens.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    numbers(value).into_iter().map(|number| number as f32).collect()
}

fn close(ours: f64, theirs: f64) -> bool {
    (ours - theirs).abs() <= 1e-14 + 1e-12 * theirs.abs()
}

#[test]
fn schedules_agree_with_the_original() {
    let goldens = goldens();
    let base_lrs = numbers(&goldens["base_lrs"]);
    for case in goldens["schedules"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let schedule = Schedule::from_config(name, case["params"].as_object().unwrap()).unwrap();
        schedule.check_groups(base_lrs.len()).unwrap();
        for (index, lr) in case["lr"].as_array().unwrap().iter().enumerate() {
            let iteration = schedule.start() + index as i64;
            let ours = schedule.at(iteration, &base_lrs);
            for (ours, theirs) in ours.lr.iter().zip(numbers(lr)) {
                assert!(close(*ours, theirs), "{case} at {iteration}: {ours}, original {theirs}");
            }
            assert_eq!(ours.betas.is_some(), !case["betas"].is_null());
            for (ours, theirs) in
                ours.betas.iter().flatten().zip(case["betas"][index].as_array().into_iter().flatten())
            {
                let theirs = numbers(theirs);
                let same = close(ours.0, theirs[0]) && close(ours.1, theirs[1]);
                assert!(same, "{case} at {iteration}: betas {ours:?}, original {theirs:?}");
            }
        }
    }
}

#[test]
fn optimizers_agree_with_torch() {
    let goldens = goldens();
    for case in goldens["optimizers"].as_array().unwrap() {
        let hyper =
            Hyper::from_config(case["name"].as_str().unwrap(), case["params"].as_object().unwrap()).unwrap();
        let mut param = floats(&case["start"]);
        let mut states = vec![vec![0.0f32; param.len()]; state_names(&hyper).len()];
        let grads = case["grads"].as_array().unwrap();
        let steps = case["steps"].as_array().unwrap();
        for (step, (grad, expected)) in (1..).zip(grads.iter().zip(steps)) {
            let grad = floats(grad);
            let mut state: Vec<&mut [f32]> = states.iter_mut().map(Vec::as_mut_slice).collect();
            let shard = Shard {
                param: &mut param,
                grad: (&grad[..]).into(),
                state: &mut state,
                grad_scale: 1.0,
                out: None,
            };
            update(&hyper, step, shard);
            for (ours, theirs) in param.iter().zip(floats(expected)) {
                assert!(
                    (ours - theirs).abs() <= 1e-6,
                    "{} step {step}: {ours}, torch {theirs}",
                    case["name"]
                );
            }
        }
    }
}
