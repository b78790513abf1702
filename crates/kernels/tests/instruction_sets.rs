//! Every kernel gives the same bits on every instruction set, whatever the numbers and lengths.

mod common;

use common::{Numbers, assert_same, narrow, same64};
use deepspeed_core::{DType, Span};
use deepspeed_kernels::{
    Isa, add_assign_on, cast_on, reduce_ranks_on, scale_in_place_on, sum_squares_on,
    update::{
        AdagradCoefficients, AdamCoefficients, LambCoefficients, LionCoefficients, SgdCoefficients,
        adagrad_on, adam_on, lamb_apply_on, lamb_direction_on, lion_on, sgd_on,
    },
};
use half::{bf16, f16};
use proptest::prelude::*;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// What `run` computes on the baseline and on each wider instruction set.
fn on_all<R>(run: impl Fn(Isa) -> R, same: impl Fn(&R, &R, Isa)) {
    let baseline = run(Isa::Scalar);
    for isa in Isa::supported() {
        same(&run(isa), &baseline, isa);
    }
}

/// Runs an update on copies of `arrays`, with the model's copy in bf16, and compares all of it.
fn same_update(
    arrays: &[Vec<f32>],
    grad: Span<'_>,
    run: impl Fn(Isa, &mut [Vec<f32>], Span<'_>, &mut [bf16]),
) {
    on_all(
        |isa| {
            let mut arrays = arrays.to_vec();
            let mut out = vec![bf16::ZERO; grad.len()];
            run(isa, &mut arrays, grad, &mut out);
            (arrays, out)
        },
        |(arrays, out), (expected, expected_out), isa| {
            for (array, expected) in arrays.iter().zip(expected) {
                assert_same(array, expected, isa);
            }
            let bits = |copy: &[bf16]| copy.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(out), bits(expected_out), "model's copy on {isa:?}");
        },
    );
}

/// Short lengths, and lengths around blocks.
fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![0usize..70, 500usize..530, 1000usize..1100]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sums(len in lengths(), seed: u64, scale in -2.0f32..2.0, add: bool, ranks in 1usize..5) {
        let mut numbers = Numbers::new(seed);
        let dtypes: Vec<DType> = (0..ranks).map(|_| DTYPES[numbers.below(3)]).collect();
        let inputs: Vec<Vec<u8>> = dtypes.iter().map(|dtype| narrow(&numbers.any(len), *dtype)).collect();
        let spans: Vec<Span<'_>> =
            inputs.iter().zip(&dtypes).map(|(bytes, dtype)| common::span(bytes, len, *dtype)).collect();
        let shard = numbers.any(len);
        on_all(
            |isa| {
                let mut reduced = shard.clone();
                let squares = reduce_ranks_on(isa, &spans, scale, &mut reduced, add);
                assert!(same64(squares, sum_squares_on(isa, (&reduced[..]).into())), "one order of summation");
                let mut added = shard.clone();
                add_assign_on(isa, &mut added, spans[0]);
                scale_in_place_on(isa, &mut added, scale);
                (reduced, added, squares, sum_squares_on(isa, spans[0]))
            },
            |ours, expected, isa| {
                assert_same(&ours.0, &expected.0, isa);
                assert_same(&ours.1, &expected.1, isa);
                assert!(same64(ours.2, expected.2) && same64(ours.3, expected.3), "squares on {isa:?}");
            },
        );
    }

    #[test]
    fn casts(len in lengths(), seed: u64) {
        let values = Numbers::new(seed).any(len);
        for from in DTYPES {
            let bytes = narrow(&values, from);
            for to in DTYPES {
                on_all(
                    |isa| {
                        let mut out = vec![0u8; len * 4];
                        let dst = common::span_mut(&mut out, len, to);
                        cast_on(isa, common::span(&bytes, len, from), dst);
                        out
                    },
                    |ours, expected, isa| assert_eq!(ours, expected, "{from} to {to} on {isa:?}"),
                );
            }
        }
    }

    #[test]
    fn updates(len in lengths(), seed: u64, grad_scale in 0.0f32..2.0, flag: bool, dtype in 0usize..3) {
        let mut numbers = Numbers::new(seed);
        let grad = narrow(&numbers.any(len), DTYPES[dtype]);
        let grad = common::span(&grad, len, DTYPES[dtype]);
        let mut arrays: Vec<Vec<f32>> = (0..3).map(|_| numbers.any(len)).collect();
        // Squares are not negative.
        arrays[2].iter_mut().for_each(|x| *x = x.abs());
        let step = 1 + numbers.below(1000) as u64;
        let decay = 0.1;

        let adam = AdamCoefficients::new(1e-3, (0.9, 0.999), 1e-8, decay, step.is_multiple_of(2), flag, step);
        same_update(&arrays, grad, |isa, arrays, grad, out| {
            let [p, m, v] = arrays else { unreachable!() };
            adam_on(isa, p, grad, grad_scale, m, v, &adam, Some(out.into()));
        });
        let sgd = SgdCoefficients::new(0.1, 0.9, if flag { 0.0 } else { 0.3 }, flag, decay, step);
        same_update(&arrays, grad, |isa, arrays, grad, out| {
            let [p, b, _] = arrays else { unreachable!() };
            sgd_on(isa, p, grad, grad_scale, Some(b), &sgd, Some(out.into()));
        });
        let plain = SgdCoefficients::new(0.1, 0.0, 0.0, false, decay, step);
        same_update(&arrays, grad, |isa, arrays, grad, out| {
            sgd_on(isa, &mut arrays[0], grad, grad_scale, None, &plain, Some(out.into()));
        });
        let adagrad = AdagradCoefficients::new(0.01, 0.1, 1e-10, decay, step);
        same_update(&arrays, grad, |isa, arrays, grad, out| {
            let [p, _, s] = arrays else { unreachable!() };
            adagrad_on(isa, p, grad, grad_scale, s, &adagrad, Some(out.into()));
        });
        let lion = LionCoefficients::new(1e-3, (0.9, 0.99), decay);
        same_update(&arrays, grad, |isa, arrays, grad, out| {
            let [p, m, _] = arrays else { unreachable!() };
            lion_on(isa, p, grad, grad_scale, m, &lion, Some(out.into()));
        });
        let lamb = LambCoefficients::new(1e-3, (0.9, 0.999), 1e-6, decay, flag, step);
        same_update(&arrays, grad, |isa, arrays, grad, out| {
            let [p, m, v] = arrays else { unreachable!() };
            let mut direction = vec![0.0; grad.len()];
            let sums = lamb_direction_on(isa, p, grad, grad_scale, m, v, &lamb, &mut direction);
            assert!(same64(sums.param, sum_squares_on(isa, (&p[..]).into())));
            assert!(same64(sums.direction, sum_squares_on(isa, (&direction[..]).into())));
            lamb_apply_on(isa, p, &direction, 0.01, Some(out.into()));
        });
    }
}

/// All 65536 patterns of both 16-bit types, to fp32 and back, on every instruction set.
#[test]
fn every_16_bit_number_survives_fp32() {
    let patterns: Vec<u16> = (0..=u16::MAX).collect();
    let halves: Vec<f16> = patterns.iter().map(|bits| f16::from_bits(*bits)).collect();
    let brains: Vec<bf16> = patterns.iter().map(|bits| bf16::from_bits(*bits)).collect();
    for isa in Isa::supported() {
        let mut wide = vec![0.0f32; patterns.len()];
        let mut back = vec![f16::ZERO; patterns.len()];
        cast_on(isa, (&halves[..]).into(), (&mut wide[..]).into());
        cast_on(isa, (&wide[..]).into(), (&mut back[..]).into());
        for ((half, wide), back) in halves.iter().zip(&wide).zip(&back) {
            if half.is_nan() {
                assert!(wide.is_nan() && back.to_bits() == 0x7e00);
            } else {
                assert_eq!((wide.to_bits(), back.to_bits()), (half.to_f32().to_bits(), half.to_bits()));
            }
        }
        let mut back = vec![bf16::ZERO; patterns.len()];
        cast_on(isa, (&brains[..]).into(), (&mut wide[..]).into());
        cast_on(isa, (&wide[..]).into(), (&mut back[..]).into());
        for ((brain, wide), back) in brains.iter().zip(&wide).zip(&back) {
            if brain.is_nan() {
                assert!(wide.is_nan() && back.to_bits() == 0x7fc0);
            } else {
                assert_eq!((wide.to_bits(), back.to_bits()), (brain.to_f32().to_bits(), brain.to_bits()));
            }
        }
    }
}

/// The upper half of every fp32 number with the lower halves that decide rounding, against the `half` crate.
#[test]
fn narrowing_rounds_to_nearest_even() {
    const LOW: [u32; 8] = [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001];
    let values: Vec<f32> =
        (0..=0xffffu32).flat_map(|high| LOW.map(|low| f32::from_bits(high << 16 | low))).collect();
    for isa in Isa::supported() {
        let mut halves = vec![f16::ZERO; values.len()];
        let mut brains = vec![bf16::ZERO; values.len()];
        cast_on(isa, (&values[..]).into(), (&mut halves[..]).into());
        cast_on(isa, (&values[..]).into(), (&mut brains[..]).into());
        for ((value, half), brain) in values.iter().zip(&halves).zip(&brains) {
            if value.is_nan() {
                assert!(half.is_nan() && brain.is_nan());
            } else {
                assert_eq!(half.to_bits(), f16::from_f32(*value).to_bits(), "{:#010x}", value.to_bits());
                assert_eq!(brain.to_bits(), bf16::from_f32(*value).to_bits(), "{:#010x}", value.to_bits());
            }
        }
    }
}
