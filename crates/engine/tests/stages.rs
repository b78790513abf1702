//! The numbers do not depend on the stage (ZERO-3), and they are right.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use deepspeed_core::{DType, UnitId};
use deepspeed_engine::{OnNonFinite, Settings};
use deepspeed_optim::{DynamicLossScale, LossScaler, OptimizerKind};
use deepspeed_zero::Stage;
use support::{Replica, ranks, target};

const KINDS: [OptimizerKind; 6] = [
    OptimizerKind::Adam,
    OptimizerKind::AdamW,
    OptimizerKind::Sgd,
    OptimizerKind::Adagrad,
    OptimizerKind::Lion,
    OptimizerKind::Lamb,
];

fn settings(stage: Stage, precision: DType, accumulation: u64, unit_len: usize) -> Settings {
    Settings {
        stage,
        precision,
        accumulation_steps: accumulation,
        on_non_finite: if precision == DType::F32 { OnNonFinite::Fail } else { OnNonFinite::Skip },
        gradient_clipping: 0.8,
        unit_len,
        ..Settings::default()
    }
}

fn scaler(precision: DType) -> LossScaler {
    match precision {
        DType::F16 => {
            let settings = DynamicLossScale { initial_scale_power: 8, ..DynamicLossScale::default() };
            LossScaler::dynamic(settings).unwrap()
        }
        DType::F32 | DType::BF16 => LossScaler::fixed(1.0),
    }
}

/// Weights of all ranks and the norms of a short run.
fn run(
    world: usize,
    kind: OptimizerKind,
    settings: &Settings,
    micro_steps: usize,
) -> Vec<(Vec<u8>, Vec<f64>)> {
    ranks(world, |group| {
        let mut replica = Replica::new(settings.clone(), kind, scaler(settings.precision), group);
        let mut norms = Vec::new();
        for _ in 0..micro_steps {
            if replica.micro_step().unwrap().boundary {
                norms.push(replica.engine.norm().unwrap());
            }
        }
        (replica.bytes(), norms)
    })
}

#[test]
fn every_stage_gives_the_same_bits() {
    for kind in KINDS {
        for precision in [DType::F32, DType::BF16, DType::F16] {
            for world in 1..=4 {
                let results: Vec<_> = [Stage::Zero, Stage::One, Stage::Two, Stage::Three]
                    .into_iter()
                    .map(|stage| run(world, kind, &settings(stage, precision, 1, 200), 5))
                    .collect();
                assert_eq!(results[0], results[1], "{kind} {precision} world {world}");
                assert_eq!(results[0], results[2], "{kind} {precision} world {world}");
                assert_eq!(results[0], results[3], "{kind} {precision} world {world}");
                for rank in 1..world {
                    assert_eq!(
                        results[0][0], results[0][rank],
                        "ranks agree: {kind} {precision} world {world}"
                    );
                }
            }
        }
    }
}

#[test]
fn reducing_during_the_pass_changes_no_bit() {
    for world in 1..=3 {
        let early = ranks(world, |group| {
            let settings = settings(Stage::Two, DType::BF16, 1, 200);
            let mut replica = Replica::new(settings, OptimizerKind::Adam, scaler(DType::BF16), group);
            let units = replica.engine.unit_params();
            assert!(units.len() > 1);
            for step in 0..4 {
                let gradients = replica.gradients();
                let mut spans: Vec<_> = gradients.iter().map(|it| Some(it.span())).collect();
                // Ranks complete their units in different orders, and one of them only at the end of the pass.
                let rank = replica.engine.group().rank().index();
                for turn in 0..units.len() - 1 {
                    let unit = (turn + rank + step) % units.len();
                    let due = replica.engine.complete_unit(UnitId::from_index(unit));
                    replica.engine.reduce_units(&due, &spans, 1.0).unwrap();
                    for param in due.iter().flat_map(|unit| &units[unit.index()]) {
                        spans[*param] = None;
                    }
                }
                replica.micro_step_with(&spans).unwrap();
            }
            (replica.bytes(), replica.engine.norm())
        });
        let whole = ranks(world, |group| {
            let settings = settings(Stage::Two, DType::BF16, 1, 200);
            let mut replica = Replica::new(settings, OptimizerKind::Adam, scaler(DType::BF16), group);
            for _ in 0..4 {
                replica.micro_step().unwrap();
            }
            (replica.bytes(), replica.engine.norm())
        });
        assert_eq!(early, whole, "world {world}");
    }
}

#[test]
fn a_gradient_that_comes_after_its_unit_was_reduced_is_added() {
    let norms = |late: bool| {
        ranks(2, |group| {
            let settings = settings(Stage::Two, DType::F32, 1, 200);
            let mut replica = Replica::new(settings, OptimizerKind::Adam, scaler(DType::F32), group);
            let gradients = replica.gradients();
            let spans: Vec<_> = gradients.iter().map(|it| Some(it.span())).collect();
            let mut rest = spans.clone();
            // On one rank only: the last unit is reduced without one of its gradients, which comes afterwards.
            if late && replica.engine.group().rank().index() == 1 {
                let units = replica.engine.unit_params();
                let last = units.last().unwrap();
                let mut first: Vec<_> = spans.clone();
                first[last[0]] = None;
                let due = replica.engine.complete_unit(UnitId::from_index(units.len() - 1));
                replica.engine.reduce_units(&due, &first, 1.0).unwrap();
                for param in &last[1..] {
                    rest[*param] = None;
                }
            }
            replica.micro_step_with(&rest).unwrap();
            (replica.bytes(), replica.engine.norm())
        })
    };
    assert_eq!(norms(true), norms(false));
}

#[test]
fn accumulation_agrees_among_stages_to_rounding() {
    for world in [1, 3] {
        let norms =
            |stage| run(world, OptimizerKind::Adam, &settings(stage, DType::F32, 4, 100), 12).remove(0).1;
        let (whole, sharded) = (norms(Stage::One), norms(Stage::Two));
        assert_eq!(whole.len(), 3);
        for (a, b) in whole.iter().zip(&sharded) {
            assert!((a - b).abs() <= 1e-6 * a, "{a} {b}");
        }
    }
}

#[test]
fn the_first_norm_is_that_of_the_mean_gradient() {
    for world in 1..=4 {
        let (_, norms) =
            run(world, OptimizerKind::Sgd, &settings(Stage::Two, DType::F32, 1, 1 << 20), 1).remove(0);
        let mut square_sum = 0.0;
        for (p, shape) in support::SHAPES.iter().enumerate() {
            for i in 0..shape.iter().product::<usize>() {
                let weight = f64::from((((p * 13 + i * 7) % 97) as f32 / 97.0 - 0.5) * 1.001);
                let mean: f64 = (0..world).map(|rank| weight - f64::from(target(p, i, rank, 0))).sum::<f64>()
                    / world as f64;
                square_sum += mean * mean;
            }
        }
        assert!((norms[0] - square_sum.sqrt()).abs() < 1e-6 * norms[0], "world {world}");
    }
}

#[test]
fn training_comes_close_to_the_mean_target() {
    let norms = ranks(2, |group| {
        let settings = Settings { gradient_clipping: 0.0, ..settings(Stage::Two, DType::F32, 1, 100) };
        let mut replica = Replica::new(settings, OptimizerKind::Sgd, scaler(DType::F32), group);
        replica.hypers.iter_mut().for_each(|hyper| (hyper.lr, hyper.weight_decay) = (0.1, 0.0));
        let mut norms = Vec::new();
        for _ in 0..100 {
            replica.micro = 0;
            replica.micro_step().unwrap();
            norms.push(replica.engine.norm().unwrap());
        }
        norms
    });
    assert!(norms[0][99] < 0.05 * norms[0][0], "{} -> {}", norms[0][0], norms[0][99]);
}

#[test]
fn an_overflow_skips_the_step_on_every_rank_and_changes_no_weight() {
    let outcome = ranks(2, |group| {
        let mut replica = Replica::new(
            settings(Stage::Two, DType::F16, 1, 100),
            OptimizerKind::Adam,
            scaler(DType::F16),
            group,
        );
        let before = replica.bytes();
        let mut gradients = replica.gradients();
        if replica.engine.group().rank().0 == 1 {
            let mut span = gradients[4].span_mut();
            span.as_f16_mut().unwrap()[100] = half::f16::INFINITY;
        }
        let spans: Vec<_> = gradients.iter().map(|it| Some(it.span())).collect();
        let report = replica.micro_step_with(&spans).unwrap();
        assert!(!report.applied && report.boundary);
        assert_eq!(before, replica.bytes());
        assert_eq!(replica.engine.counters().skipped_steps, 1);
        report.skipped.unwrap()
    });
    assert_eq!(outcome[0], outcome[1]);
    assert!(outcome[0].contains("`p4` is infinite"), "{}", outcome[0]);
}

#[test]
fn a_nan_in_fp32_is_an_error_that_names_the_parameter() {
    let outcome = ranks(3, |group| {
        let mut replica = Replica::new(
            settings(Stage::One, DType::F32, 1, 100),
            OptimizerKind::Adam,
            scaler(DType::F32),
            group,
        );
        let before = replica.bytes();
        let mut gradients = replica.gradients();
        if replica.engine.group().rank().0 == 2 {
            gradients[0].as_f32_mut()[34] = f32::NAN;
        }
        let spans: Vec<_> = gradients.iter().map(|it| Some(it.span())).collect();
        let error = replica.micro_step_with(&spans).unwrap_err().to_string();
        assert_eq!(before, replica.bytes());
        error
    });
    assert!(outcome.iter().all(|error| error.contains("the gradient of `p0` is NaN")), "{outcome:?}");
}

#[test]
fn a_parameter_without_gradient_is_named_once_and_counts_as_zero() {
    let outcome = ranks(2, |group| {
        let mut replica = Replica::new(
            settings(Stage::Two, DType::F32, 1, 100),
            OptimizerKind::Sgd,
            scaler(DType::F32),
            group,
        );
        let report = |replica: &mut Replica| {
            let gradients = replica.gradients();
            let spans: Vec<_> =
                gradients.iter().enumerate().map(|(p, it)| (p != 1 && p != 3).then(|| it.span())).collect();
            replica.micro_step_with(&spans).unwrap()
        };
        (report(&mut replica).unused, report(&mut replica).unused)
    });
    assert_eq!(outcome[0].0, ["p1", "p3"]);
    assert!(outcome[0].1.is_empty());
}

#[test]
fn gradients_of_an_unscaled_loss_give_the_same_numbers() {
    let norms = |scaled: bool| {
        ranks(2, |group| {
            let settings = settings(Stage::One, DType::F32, 2, 100);
            let mut replica = Replica::new(settings, OptimizerKind::Adam, LossScaler::fixed(64.0), group);
            for _ in 0..2 {
                let mut gradients = replica.gradients();
                let mut factor = 1.0;
                if !scaled {
                    factor = replica.engine.missing_factor(false, false);
                    for gradient in &mut gradients {
                        deepspeed_kernels::scale_in_place(gradient.as_f32_mut(), 1.0 / factor);
                    }
                }
                let spans: Vec<_> = gradients.iter().map(|it| Some(it.span())).collect();
                replica.engine.end_backward(&spans, factor).unwrap();
                let mut weights: Vec<_> = replica.weights.iter_mut().map(|it| it.span_mut()).collect();
                replica.engine.step(&replica.hypers, &mut weights).unwrap();
            }
            replica.engine.norm().unwrap()
        })
    };
    assert_eq!(norms(true), norms(false));
}
