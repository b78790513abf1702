//! Every transport gives the results that the trait promises, and the same bits as every other.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use deepspeed_comm::{Group, Into, Options, Pieces, Segment, Solo};
use deepspeed_core::Span;
use support::{conformance, options, role, run_threads, say, spawn_ranks};

const ROUNDS: u64 = 60;

#[test]
fn one_rank_alone_or_in_shared_memory_is_the_same() {
    let group = Solo::new();
    let alone = conformance(&group, 11, ROUNDS);
    assert_eq!((group.world(), group.transport()), (1, "none"));
    assert_eq!(run_threads(1, &options(), |group| conformance(&group, 11, ROUNDS)), [alone]);
}

#[test]
fn threads_give_the_same_bits_whatever_the_size_of_the_ring() {
    for world in 2..=4 {
        let [small, large] = [1 << 14, 1 << 22].map(|ring_bytes| {
            let options = Options { ring_bytes, ..options() };
            run_threads(world, &options, |group| conformance(&group, world as u64, ROUNDS))
        });
        assert_eq!(small, large);
    }
}

#[test]
fn processes_give_the_same_bits_as_threads() {
    for world in 1..=4 {
        let threads = run_threads(world, &options(), |group| conformance(&group, 5, ROUNDS / 2));
        let segment = Segment::create(world, &options()).unwrap();
        let mut ranks = spawn_ranks(&segment, "conformance");
        let digests: Vec<String> = ranks.iter().map(support::RankProcess::line).collect();
        assert_eq!(digests, threads.iter().map(u64::to_string).collect::<Vec<_>>());
        for rank in &mut ranks {
            assert!(rank.wait().success());
        }
    }
}

/// Not a test of its own: what the ranks' processes run.
#[test]
fn child() {
    if let Some((role, group)) = role(&options()) {
        assert_eq!(role, "conformance");
        assert_eq!(group.transport(), "shared memory");
        say(conformance(&group, 5, ROUNDS / 2));
    }
}

#[test]
fn more_ranks_than_anybody_has_here() {
    run_threads(17, &options(), |group| conformance(&group, 3, 12));
}

#[test]
fn the_sum_of_squares_is_not_finite_exactly_if_an_element_is_not() {
    for (value, finite) in [(f32::MAX, true), (f32::INFINITY, false), (f32::NAN, false)] {
        let results = run_threads(2, &options(), |group| {
            let mut input = vec![0.0f32; 20_000];
            if group.rank().0 == 1 {
                input[9_999] = value;
            }
            let pieces = Pieces { len: input.len(), runs: vec![(0, Span::from(&input[..]))] };
            let mut shard = vec![1.0; 10_000];
            group.reduce_scatter("unit", &pieces, &mut shard, 1.0, Into::Add).unwrap()
        });
        assert_eq!(results[0].is_finite(), finite);
        assert_eq!(results[1], 10_000.0);
    }
}

#[test]
fn ranks_may_run_ahead_by_calls() {
    // COMM-1, COMM-7: one rank is slow, the other makes calls as far as the rings let it.
    run_threads(2, &options(), |group| {
        for call in 0..200 {
            if group.rank().0 == 1 && call % 50 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(30));
            }
            let mut data = [call as f32, 1.0];
            group.all_reduce("pair", &mut data).unwrap();
            assert_eq!(data, [2.0 * call as f32, 2.0]);
        }
    });
}
