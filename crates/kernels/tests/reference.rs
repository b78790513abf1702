//! The kernels against the formulas they document, computed element by element in fp64.

mod common;

use common::Numbers;
use deepspeed_core::{Span, SpanMut};
use deepspeed_kernels::{
    add_assign, cast, reduce_ranks, scale_in_place, sum_squares,
    update::{
        AdagradCoefficients, AdamCoefficients, LambCoefficients, LambSums, LionCoefficients, SgdCoefficients,
        adagrad, adam, lamb_apply, lamb_direction, lion, sgd, trust_ratio,
    },
};
use half::bf16;

const LEN: usize = 1037;
const STEPS: u64 = 20;
const GRAD_SCALE: f32 = 0.25;

/// Trains [`LEN`] parameters for [`STEPS`] steps with `run` in fp32 and `formula` in fp64, and compares.
///
/// `run` takes the step, parameters, gradients, two states and the model's copy; `formula` the step, a parameter, its
/// scaled gradient and its two states.
fn compare(
    run: impl Fn(u64, &mut [f32], Span<'_>, &mut [f32], &mut [f32], SpanMut<'_>),
    formula: impl Fn(u64, &mut f64, f64, &mut f64, &mut f64),
) {
    let mut numbers = Numbers::new(7);
    let mut param = numbers.ordinary(LEN, 1.0);
    let mut expected: Vec<f64> = param.iter().map(|p| f64::from(*p)).collect();
    let (mut a, mut b) = (vec![0.0; LEN], vec![0.0; LEN]);
    let mut states = vec![(0.0f64, 0.0f64); LEN];
    let mut out = vec![bf16::ZERO; LEN];
    for step in 1..=STEPS {
        let grad = numbers.ordinary(LEN, 4.0);
        run(step, &mut param, (&grad[..]).into(), &mut a, &mut b, (&mut out[..]).into());
        for (index, (p, (a, b))) in expected.iter_mut().zip(&mut states).enumerate() {
            formula(step, p, f64::from(grad[index] * GRAD_SCALE), a, b);
        }
    }
    for (index, (ours, expected)) in param.iter().zip(&expected).enumerate() {
        let error = (f64::from(*ours) - expected).abs();
        assert!(error < 5e-6, "parameter {index}: {ours}, expected {expected}");
        assert_eq!(out[index], bf16::from_f32(*ours), "the model's copy is the parameter");
    }
}

fn corrections(step: u64, enabled: bool) -> (f64, f64) {
    if enabled { (1.0 - 0.9f64.powf(step as f64), 1.0 - 0.999f64.powf(step as f64)) } else { (1.0, 1.0) }
}

#[test]
fn adam_in_all_its_modes() {
    for (corrected, decoupled) in [(true, true), (true, false), (false, true), (false, false)] {
        compare(
            |step, p, g, m, v, out| {
                let c = AdamCoefficients::new(1e-2, (0.9, 0.999), 1e-8, 0.1, corrected, decoupled, step);
                adam(p, g, GRAD_SCALE, m, v, &c, Some(out));
            },
            |step, p, g, m, v| {
                let g = if decoupled { g } else { g + 0.1 * *p };
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let (c1, c2) = corrections(step, corrected);
                let update = *m / c1 / ((*v / c2).sqrt() + 1e-8);
                *p -= 1e-2 * if decoupled { update + 0.1 * *p } else { update };
            },
        );
    }
}

#[test]
fn sgd_in_all_its_modes() {
    for (momentum, dampening, nesterov) in
        [(0.0, 0.0, false), (0.9, 0.0, false), (0.9, 0.5, false), (0.9, 0.0, true)]
    {
        compare(
            |step, p, g, buffer, _, out| {
                let c = SgdCoefficients::new(1e-2, momentum, dampening, nesterov, 0.1, step);
                let buffer = (momentum > 0.0).then_some(buffer);
                sgd(p, g, GRAD_SCALE, buffer, &c, Some(out));
            },
            |step, p, g, buffer, _| {
                let g = g + 0.1 * *p;
                *buffer = if step == 1 { g } else { momentum * *buffer + (1.0 - dampening) * g };
                let update = match (momentum > 0.0, nesterov) {
                    (false, _) => g,
                    (true, false) => *buffer,
                    (true, true) => g + momentum * *buffer,
                };
                *p -= 1e-2 * update;
            },
        );
    }
}

#[test]
fn adagrad_with_decaying_rate() {
    compare(
        |step, p, g, sum, _, out| {
            let c = AdagradCoefficients::new(1e-2, 0.1, 1e-10, 0.1, step);
            adagrad(p, g, GRAD_SCALE, sum, &c, Some(out));
        },
        |step, p, g, sum, _| {
            let g = g + 0.1 * *p;
            *sum += g * g;
            *p -= 1e-2 / (1.0 + (step - 1) as f64 * 0.1) * g / (sum.sqrt() + 1e-10);
        },
    );
}

#[test]
fn lion_moves_by_signs() {
    compare(
        |_, p, g, m, _, out| {
            lion(p, g, GRAD_SCALE, m, &LionCoefficients::new(1e-2, (0.9, 0.99), 0.1), Some(out));
        },
        |_, p, g, m, _| {
            let sign = (0.9 * *m + 0.1 * g).signum();
            *p = *p * (1.0 - 1e-2 * 0.1) - 1e-2 * sign;
            *m = 0.99 * *m + 0.01 * g;
        },
    );
}

#[test]
fn lion_has_no_direction_at_zero_and_keeps_nan() {
    let c = LionCoefficients::new(0.1, (0.9, 0.99), 0.0);
    let (mut p, mut m) = ([1.0f32, 1.0], [0.0f32, 0.0]);
    lion(&mut p, (&[0.0f32, f32::NAN][..]).into(), 1.0, &mut m, &c, None);
    assert!(p[0] == 1.0 && p[1].is_nan());
}

#[test]
fn lamb_in_two_phases() {
    let mut numbers = Numbers::new(11);
    let mut param = numbers.ordinary(LEN, 1.0);
    let (mut m, mut v, mut direction) = (vec![0.0; LEN], vec![0.0; LEN], vec![0.0; LEN]);
    let mut expected: Vec<(f64, f64, f64)> = param.iter().map(|p| (f64::from(*p), 0.0, 0.0)).collect();
    for step in 1..=STEPS {
        let grad = numbers.ordinary(LEN, 4.0);
        let c = LambCoefficients::new(1e-2, (0.9, 0.999), 1e-8, 0.1, true, step);
        // Two ranks, each with a part of the parameter.
        let mut sums = LambSums::default();
        for part in [0..400, 400..LEN] {
            sums += lamb_direction(
                &param[part.clone()],
                (&grad[part.clone()]).into(),
                GRAD_SCALE,
                &mut m[part.clone()],
                &mut v[part.clone()],
                &c,
                &mut direction[part],
            );
        }
        let ratio = trust_ratio(sums, 0.01, 10.0);
        lamb_apply(&mut param, &direction, (c.step_size * ratio) as f32, None);

        let (c1, c2) = corrections(step, true);
        let mut squares = (0.0, 0.0);
        let updates: Vec<f64> = expected
            .iter_mut()
            .zip(&grad)
            .map(|((p, m, v), g)| {
                let g = f64::from(g * GRAD_SCALE);
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let update = *m / (v.sqrt() + 1e-8) + 0.1 * *p;
                squares = (squares.0 + *p * *p, squares.1 + update * update);
                update
            })
            .collect();
        let ratio = (squares.0.sqrt() / squares.1.sqrt()).clamp(0.01, 10.0);
        for ((p, ..), update) in expected.iter_mut().zip(updates) {
            *p -= 1e-2 * c2.sqrt() / c1 * ratio * update;
        }
    }
    for (ours, (expected, ..)) in param.iter().zip(&expected) {
        assert!((f64::from(*ours) - expected).abs() < 5e-6, "{ours}, expected {expected}");
    }
}

#[test]
fn the_trust_ratio_is_limited_and_one_for_zeros() {
    let ratio = |param, direction| trust_ratio(LambSums { param, direction }, 0.01, 10.0);
    assert_eq!(ratio(4.0, 1.0), 2.0);
    assert_eq!((ratio(1e6, 1.0), ratio(1.0, 1e6)), (10.0, 0.01));
    assert_eq!((ratio(0.0, 1.0), ratio(1.0, 0.0)), (1.0, 1.0));
    assert!(ratio(f64::NAN, 1.0).is_nan());
}

#[test]
fn sixteen_bit_gradients_count_as_their_values() {
    let values = Numbers::new(3).ordinary(LEN, 1.0);
    let grad: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
    let wide: Vec<f32> = grad.iter().map(|x| x.to_f32()).collect();
    let step = |grad: Span<'_>| {
        let mut arrays = [values.clone(), vec![0.0; LEN], vec![0.0; LEN]];
        let [p, m, v] = &mut arrays;
        let c = AdamCoefficients::new(1e-3, (0.9, 0.999), 1e-8, 0.0, true, true, 1);
        adam(p, grad, 0.5, m, v, &c, None);
        arrays
    };
    assert_eq!(step((&grad[..]).into()), step((&wide[..]).into()));
}

#[test]
fn ranks_are_summed_in_order_then_scaled() {
    // In fp32, (1 + 2^-24) + 2^-24 rounds to 1 twice; summed in another order it would not.
    let inputs = [[1.0f32; 3], [2.0f32.powi(-24); 3], [2.0f32.powi(-24); 3]];
    let spans: Vec<Span<'_>> = inputs.iter().map(|input| Span::from(&input[..])).collect();
    let mut shard = [5.0f32; 3];
    assert_eq!(reduce_ranks(&spans, 0.5, &mut shard, false), 0.75);
    assert_eq!(shard, [0.5; 3]);
    assert_eq!(reduce_ranks(&spans, 0.5, &mut shard, true), 3.0);
    assert_eq!(shard, [1.0; 3]);
    assert_eq!(reduce_ranks(&spans[..1], 2.0, &mut shard, false), 12.0);
    assert_eq!(reduce_ranks(&[(&[0.0f32; 0][..]).into()], 1.0, &mut [], false), 0.0);
}

#[test]
fn any_number_of_ranks_of_any_dtype_gives_the_plain_sum() {
    let mut numbers = Numbers::new(5);
    for ranks in 1..=5 {
        let wide: Vec<Vec<f32>> = (0..ranks).map(|_| numbers.ordinary(LEN, 1.0)).collect();
        let brains: Vec<Vec<bf16>> =
            wide.iter().map(|x| x.iter().map(|x| bf16::from_f32(*x)).collect()).collect();
        for mixed in [false, true] {
            let spans: Vec<Span<'_>> =
                (0..ranks)
                    .map(|rank| {
                        if mixed && rank == 1 { (&wide[rank][..]).into() } else { (&brains[rank][..]).into() }
                    })
                    .collect();
            let mut shard = vec![0.0f32; LEN];
            let squares = reduce_ranks(&spans, 0.3, &mut shard, false);
            let mut naive = 0.0;
            for (index, ours) in shard.iter().enumerate() {
                let element = |rank: usize| match spans[rank].as_bf16() {
                    Some(brains) => brains[index].to_f32(),
                    None => wide[rank][index],
                };
                let sum = (1..ranks).fold(element(0), |sum, rank| sum + element(rank));
                assert_eq!(*ours, sum * 0.3);
                naive += f64::from(*ours) * f64::from(*ours);
            }
            assert!((squares - naive).abs() <= 1e-12 * naive);
        }
    }
}

#[test]
fn a_sum_of_squares_is_finite_exactly_if_every_element_is() {
    let mut values = vec![f32::MAX; 100];
    assert!(sum_squares((&values[..]).into()).is_finite());
    for (index, bad) in [(0, f32::NAN), (99, f32::INFINITY), (17, f32::NEG_INFINITY)] {
        values[index] = bad;
        assert!(!sum_squares((&values[..]).into()).is_finite());
        values[index] = 1.0;
    }
}

#[test]
fn plain_scaling_and_addition() {
    let mut x = [1.0f32, -2.0, 3.0];
    scale_in_place(&mut x, -2.0);
    add_assign(&mut x, (&[bf16::ONE; 3][..]).into());
    assert_eq!(x, [-1.0, 5.0, -5.0]);
}

#[test]
#[should_panic(expected = "cast of spans of different length")]
fn lengths_must_agree() {
    cast((&[0.0f32; 3][..]).into(), (&mut [bf16::ZERO; 2][..]).into());
}

#[test]
#[should_panic(expected = "first moment and parameter of different length")]
fn states_must_be_as_long_as_parameters() {
    let c = AdamCoefficients::new(1e-3, (0.9, 0.999), 1e-8, 0.0, true, true, 1);
    adam(&mut [0.0; 2], (&[0.0f32; 2][..]).into(), 1.0, &mut [0.0; 1], &mut [0.0; 2], &c, None);
}
