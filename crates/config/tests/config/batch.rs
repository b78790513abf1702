use deepspeed_config::{BatchRequest, Given};
use proptest::prelude::*;

use crate::{config, report};

fn request(train: Option<usize>, micro: Option<usize>, accumulation: Option<usize>) -> BatchRequest {
    let given =
        |value: Option<usize>, line| value.map(|value| Given { value, origin: format!("line {line}") });
    BatchRequest { train: given(train, 2), micro: given(micro, 3), accumulation: given(accumulation, 4) }
}

#[test]
fn the_table() {
    let resolved = |train, micro, accumulation, world| {
        let batch = request(train, micro, accumulation).resolve(world, "").unwrap();
        (batch.train, batch.micro, batch.accumulation)
    };
    assert_eq!(resolved(Some(32), Some(4), Some(4), 2), (32, 4, 4));
    assert_eq!(resolved(Some(32), Some(4), None, 2), (32, 4, 4));
    assert_eq!(resolved(Some(32), None, Some(4), 2), (32, 4, 4));
    assert_eq!(resolved(None, Some(4), Some(4), 2), (32, 4, 4));
    assert_eq!(resolved(Some(32), None, None, 2), (32, 16, 1));
    assert_eq!(resolved(None, Some(4), None, 2), (8, 4, 1));
}

#[test]
fn the_sum_names_the_origin_of_every_number() {
    let batch = request(Some(32), Some(4), None).resolve(2, "2 slots on localhost").unwrap();
    assert_eq!(
        batch.explanation,
        "train_batch_size 32 (line 2) = train_micro_batch_size_per_gpu 4 (line 3) x \
         gradient_accumulation_steps 4 (derived) x world size 2 (2 slots on localhost)"
    );
}

#[test]
fn impossible_numbers_show_all_of_them_and_what_would_work() {
    let text = "{\n  \"train_batch_size\": 8,\n  \"train_micro_batch_size_per_gpu\": 2,\n  \"gradient_accumulation_steps\": 1\n}";
    let error = config(text).resolve_batch(2, "2 slots on localhost").unwrap_err();
    assert_eq!(
        error.to_string(),
        "\
the batch numbers do not fit together: 8 is not 2 x 1 x 2 = 4; train_batch_size = 8 (line 2), \
train_micro_batch_size_per_gpu = 2 (line 3), gradient_accumulation_steps = 1 (line 4), \
world size = 2 (2 slots on localhost) [config::batch]
 --> ds_config.json:2:23 (train_batch_size)
  |
2 |   \"train_batch_size\": 8,
  |                       ^
  |
3 |   \"train_micro_batch_size_per_gpu\": 2,
  |                                     ^
  |
4 |   \"gradient_accumulation_steps\": 1
  |                                  ^
  = hint: a world size of 4 would fit: check that the launcher started as many ranks as you meant
  = hint: train_batch_size 4 would work
  = hint: gradient_accumulation_steps 2 would work
  = hint: train_micro_batch_size_per_gpu 4 would work
  = hint: or delete one of the three: it is derived from the others"
    );
}

#[test]
fn a_rest_is_an_error_with_neighbours_that_work() {
    let problem = request(Some(8), None, None).resolve(3, "2 hosts in the hostfile").unwrap_err();
    assert_eq!(
        problem.message,
        "the batch numbers do not fit together: 8 samples cannot be dealt evenly to 3 ranks; \
         train_batch_size = 8 (line 2), world size = 3 (2 hosts in the hostfile)"
    );
    assert_eq!(problem.hints[0], "train_batch_size 6 or 9 would work");
    assert!(problem.hints[1].starts_with("or a world size of 1, 2, 4 or 8:"), "{:?}", problem.hints);

    let problem = request(Some(16), Some(3), None).resolve(2, "").unwrap_err();
    assert!(problem.message.contains("16 is not a multiple of 3 x 2 = 6"), "{}", problem.message);
    assert_eq!(problem.hints[0], "train_batch_size 12 or 18 would work");
    assert_eq!(problem.hints[1], "or train_micro_batch_size_per_gpu 1, 2, 4 or 8");
}

#[test]
fn without_a_batch_size_there_is_nothing_to_derive_from() {
    let error = config("{\"gradient_accumulation_steps\": 4}").resolve_batch(1, "").unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("neither train_batch_size nor train_micro_batch_size_per_gpu is given"),
        "{text}"
    );
}

#[test]
fn zero_and_overflow_are_errors() {
    assert!(report("{\"train_batch_size\": 0}").contains("a whole number, 1 or more"));
    let huge = request(None, Some(usize::MAX), Some(2)).resolve(2, "").unwrap_err();
    assert!(huge.message.contains("beyond 64 bits"), "{}", huge.message);
    let huge = request(Some(8), Some(usize::MAX), Some(2)).resolve(2, "").unwrap_err();
    assert!(huge.message.contains("beyond 64 bits"), "{}", huge.message);
    assert!(request(Some(1), None, None).resolve(0, "").is_err());
}

proptest! {
    #[test]
    fn what_is_resolved_fits_and_keeps_what_was_given(
        train in proptest::option::of(1..200usize),
        micro in proptest::option::of(1..20usize),
        accumulation in proptest::option::of(1..20usize),
        world in 1..9usize,
    ) {
        let request = request(train, micro, accumulation);
        let possible = match (train, micro, accumulation) {
            (None, None, _) => false,
            (None, Some(_), _) => true,
            (Some(train), micro, accumulation) => {
                let product = micro.unwrap_or(1) * accumulation.unwrap_or(1) * world;
                if micro.is_some() && accumulation.is_some() { train == product } else { train % product == 0 }
            }
        };
        match request.resolve(world, "") {
            Ok(batch) => {
                prop_assert!(possible);
                prop_assert_eq!(batch.train, batch.micro * batch.accumulation * world);
                prop_assert!(batch.micro > 0 && batch.accumulation > 0);
                prop_assert!(train.is_none_or(|train| train == batch.train));
                prop_assert!(micro.is_none_or(|micro| micro == batch.micro));
                prop_assert!(accumulation.is_none_or(|steps| steps == batch.accumulation));
            }
            Err(problem) => {
                prop_assert!(!possible, "{}", problem.message);
                prop_assert!(!problem.hints.is_empty());
            }
        }
    }
}
