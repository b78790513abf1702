//! What is whole when, on made-up models.

use proptest::prelude::*;

use super::{
    Action::{Gather, Release},
    *,
};

const TRAIN: Circumstances = Circumstances { grad: true, in_backward: false };
const EVALUATE: Circumstances = Circumstances { grad: false, in_backward: false };
const AGAIN: Circumstances = Circumstances { grad: true, in_backward: true };

/// Nothing stays, nothing comes early.
const LEAN: GatherLimits = GatherLimits {
    prefetch_bucket_size: 0,
    max_live_parameters: 0,
    max_reuse_distance: 0,
    param_persistence_threshold: 0,
    model_persistence_threshold: 0,
    module_granularity_threshold: 0,
};

fn units(count: usize, trained: bool) -> Vec<UnitFacts> {
    vec![UnitFacts { elements: 10, largest_param: 5, trained }; count]
}

/// One module per unit; module `count` is the root without units.
fn chain(count: usize, trained: bool, limits: GatherLimits) -> ResidentUnits {
    let mut state = ResidentUnits::new(&units(count, trained), limits);
    for unit in 0..count {
        state.add_module(vec![unit], vec![]);
    }
    state.add_module(vec![], vec![]);
    state
}

fn forward(state: &mut ResidentUnits, order: &[usize], now: Circumstances) -> Vec<Vec<Action>> {
    let root = state.modules.len() - 1;
    let mut seen = vec![state.enter(root, now)];
    for module in order {
        seen.push(state.enter(*module, now));
        assert!(state.is_resident(*module));
        seen.push(state.leave(*module, now, false));
    }
    seen.push(state.leave(root, now, false));
    seen.retain(|actions| !actions.is_empty());
    seen
}

fn backward(state: &mut ResidentUnits, order: &[usize]) -> Vec<Vec<Action>> {
    let root = state.modules.len() - 1;
    let (_, actions) = state.enter_backward(root, false);
    let mut seen = vec![actions];
    for module in order {
        let (call, actions) = state.enter_backward(*module, true);
        seen.push(actions);
        assert!(state.is_resident(*module));
        seen.push(state.delivered(*module));
        seen.push(state.leave_backward(call));
    }
    seen.push(state.end_pass());
    seen.retain(|actions| !actions.is_empty());
    seen
}

#[test]
fn a_unit_is_there_during_forward_and_backward_alone() {
    let mut state = chain(2, true, LEAN);
    let seen = forward(&mut state, &[0, 1], TRAIN);
    assert_eq!(seen, [[Gather(0)], [Release(0)], [Gather(1)], [Release(1)]]);
    let seen = backward(&mut state, &[1, 0]);
    assert_eq!(seen, [[Gather(1)], [Release(1)], [Gather(0)], [Release(0)]]);
    assert_eq!(state.live(), 0);
}

#[test]
fn a_trained_unit_stays_until_its_gradients_are_there_and_its_calls_are_over() {
    let mut state = chain(1, true, LEAN);
    forward(&mut state, &[0], TRAIN);
    let (first, _) = state.enter_backward(0, true);
    let (second, _) = state.enter_backward(0, true);
    assert!(state.leave_backward(first).is_empty());
    assert!(state.delivered(0).is_empty());
    assert_eq!(state.leave_backward(second), [Release(0)]);
    let (_, actions) = state.enter_backward(0, false);
    assert_eq!(actions, [Gather(0)]);
    assert_eq!(state.delivered(0), [Release(0)]);
}

#[test]
fn a_frozen_unit_stays_until_its_calls_are_over() {
    let mut state = chain(1, false, LEAN);
    forward(&mut state, &[0], TRAIN);
    let (call, _) = state.enter_backward(0, true);
    assert_eq!(state.leave_backward(call), [Release(0)]);
    let (call, _) = state.enter_backward(0, true);
    state.enter_backward(0, false);
    assert!(state.leave_backward(call).is_empty());
    assert_eq!(state.end_pass(), [Release(0)]);
}

#[test]
fn a_unit_without_all_gradients_is_released_at_the_end_of_the_pass() {
    let mut state = chain(2, true, LEAN);
    forward(&mut state, &[0, 1], TRAIN);
    let (call, _) = state.enter_backward(1, true);
    assert!(state.leave_backward(call).is_empty());
    assert_eq!(state.end_pass(), [Release(1)]);
}

#[test]
fn recomputation_in_backward_releases_nothing_that_backward_needs() {
    let mut state = chain(2, true, LEAN);
    forward(&mut state, &[0, 1], TRAIN);
    let (call, _) = state.enter_backward(1, true);
    assert_eq!(state.enter(0, AGAIN), [Gather(0)]);
    assert!(state.leave(0, AGAIN, false).is_empty());
    assert!(state.enter(1, AGAIN).is_empty());
    assert!(state.leave(1, AGAIN, false).is_empty());
    assert!(state.delivered(1).is_empty());
    assert_eq!(state.leave_backward(call), [Release(1)]);
    let (call, actions) = state.enter_backward(0, true);
    assert!(actions.is_empty());
    assert!(state.leave_backward(call).is_empty());
    assert_eq!(state.delivered(0), [Release(0)]);
}

#[test]
fn what_a_module_borrows_is_there_in_its_backward_too() {
    let mut state = chain(1, true, LEAN);
    state.enter(1, TRAIN);
    assert_eq!(state.borrow(0, TRAIN), [Gather(0)]);
    assert!(state.is_active(0));
    assert_eq!(state.leave(1, TRAIN, false), [Release(0)]);
    let (_, actions) = state.enter_backward(1, false);
    assert_eq!(actions, [Gather(0)]);
    assert_eq!(state.delivered(0), [Release(0)]);
}

#[test]
fn what_is_borrowed_outside_of_modules_stays_until_the_pass_is_over() {
    let mut state = chain(2, true, LEAN);
    assert_eq!(state.borrow(0, TRAIN), [Gather(0)]);
    forward(&mut state, &[1], TRAIN);
    assert!(state.is_resident(0));
    assert_eq!(state.end_pass(), [Release(0)]);
}

#[test]
fn a_hidden_output_keeps_its_unit_until_the_pass_is_over() {
    let mut state = chain(1, true, LEAN);
    state.enter(0, TRAIN);
    assert!(state.leave(0, TRAIN, true).is_empty());
    assert_eq!(state.end_pass(), [Release(0)]);
    state.enter(0, EVALUATE);
    assert_eq!(state.leave(0, EVALUATE, true), [Release(0)]);
}

#[test]
fn prefetching_follows_the_last_pass_as_far_as_the_bucket_goes() {
    let limits = GatherLimits { prefetch_bucket_size: 20, max_live_parameters: 1000, ..LEAN };
    let mut state = chain(4, true, limits);
    forward(&mut state, &[0, 1, 2, 3], TRAIN);
    backward(&mut state, &[3, 2, 1, 0]);
    state.updated();
    assert_eq!(state.pin(&[3]), [Gather(3)]);
    assert_eq!(state.unpin(&[3]), [Release(3)]);
    let seen = forward(&mut state, &[0, 1, 2, 3], TRAIN);
    assert_eq!(seen[0], [Gather(0), Gather(1), Gather(2)]);
    assert_eq!(seen[1..4], [[Release(0)], [Release(1)], [Release(2)]]);
    assert_eq!(seen[4], [Gather(3), Gather(2), Gather(1)]);
    assert_eq!(backward(&mut state, &[3, 2, 1, 0]).last().map(|last| &last[..]), Some(&[Release(0)][..]));
}

#[test]
fn another_order_than_the_last_is_safe() {
    let limits = GatherLimits { prefetch_bucket_size: 20, max_live_parameters: 30, ..LEAN };
    let mut state = chain(4, true, limits);
    for order in [[0, 1, 2, 3], [3, 1, 0, 2], [3, 1, 0, 2], [2, 2, 0, 0]] {
        forward(&mut state, &order, TRAIN);
        backward(&mut state, &order);
        assert_eq!(state.live(), 0);
    }
}

#[test]
fn a_unit_used_again_soon_stays() {
    let limits = GatherLimits { max_live_parameters: 1000, max_reuse_distance: 10, ..LEAN };
    let mut state = chain(3, true, limits);
    forward(&mut state, &[0, 1, 2], TRAIN);
    backward(&mut state, &[2, 1, 0]);
    let seen = forward(&mut state, &[0, 1, 2], TRAIN);
    assert_eq!(seen, [[Gather(0)], [Release(0)], [Gather(1)], [Gather(2)]]);
    assert_eq!(backward(&mut state, &[2, 1, 0])[0], [Release(2)]);
    assert_eq!(state.live(), 0);
    // Nothing comes after an evaluation.
    let seen = forward(&mut state, &[0, 1, 2], EVALUATE);
    assert_eq!(seen.len(), 6);
    assert_eq!(state.live(), 0);
}

#[test]
fn what_stays_makes_room_for_what_is_needed() {
    let limits = GatherLimits { max_live_parameters: 20, max_reuse_distance: 1000, ..LEAN };
    let mut state = chain(4, true, limits);
    forward(&mut state, &[0, 1, 2, 3], TRAIN);
    backward(&mut state, &[3, 2, 1, 0]);
    let seen = forward(&mut state, &[0, 1, 2, 3], TRAIN);
    assert_eq!(seen[2], [Release(0), Gather(2)]);
    assert_eq!(seen[3], [Release(1), Gather(3)]);
}

#[test]
fn small_units_stay_until_the_update() {
    let limits = GatherLimits { param_persistence_threshold: 5, model_persistence_threshold: 25, ..LEAN };
    let mut state = chain(3, true, limits);
    assert!(state.is_persistent(0) && state.is_persistent(1) && !state.is_persistent(2));
    forward(&mut state, &[0, 1, 2], TRAIN);
    backward(&mut state, &[2, 1, 0]);
    assert_eq!((state.is_resident(0), state.is_resident(2)), (true, false));
    assert_eq!(state.updated(), [Release(0), Release(1)]);
}

#[test]
fn pinned_units_are_whole_for_whoever_asked() {
    let mut state = chain(2, true, LEAN);
    assert_eq!(state.pin(&[1, 0]), [Gather(0), Gather(1)]);
    assert!(state.pin(&[0]).is_empty());
    assert_eq!(state.updated(), [Gather(0), Gather(1)]);
    forward(&mut state, &[0], EVALUATE);
    assert_eq!(state.unpin(&[1, 0]), [Release(1)]);
    assert_eq!(state.unpin(&[0]), [Release(0)]);
}

#[test]
fn a_call_that_ended_without_saying_so_ends_with_the_one_around_it() {
    let mut state = chain(1, true, LEAN);
    state.enter(1, TRAIN);
    state.enter(0, TRAIN);
    assert_eq!(state.leave(1, TRAIN, false), [Release(0)]);
    assert!(state.leave(0, TRAIN, false).is_empty());
}

#[test]
fn a_backward_pass_that_nobody_ended_ends_with_the_next_forward() {
    let mut state = chain(2, true, LEAN);
    forward(&mut state, &[0], TRAIN);
    state.enter_backward(0, true);
    assert_eq!(state.enter(1, TRAIN), [Release(0), Gather(1)]);
}

fn limits() -> impl Strategy<Value = GatherLimits> {
    (0usize..40, 0usize..60, 0usize..40, 0usize..8, 0usize..40).prop_map(
        |(prefetch, live, reuse, param, model)| GatherLimits {
            prefetch_bucket_size: prefetch,
            max_live_parameters: live,
            max_reuse_distance: reuse,
            param_persistence_threshold: param,
            model_persistence_threshold: model,
            module_granularity_threshold: 0,
        },
    )
}

proptest! {
    /// RESIDENCY-1, whatever the limits and the order; and actions say what the state says.
    #[test]
    fn a_unit_is_there_whenever_it_is_used(
        limits in limits(),
        passes in prop::collection::vec((prop::collection::vec(0usize..5, 1..8), any::<bool>()), 1..6),
    ) {
        let mut state = chain(5, true, limits);
        let mut whole = [false; 5];
        let mut apply = |actions: &[Action]| {
            for action in actions {
                match action {
                    Gather(unit) => {
                        assert!(!whole[*unit]);
                        whole[*unit] = true;
                    }
                    Release(unit) => {
                        assert!(whole[*unit]);
                        whole[*unit] = false;
                    }
                }
            }
            whole.iter().filter(|it| **it).count() * 10
        };
        for (order, train) in passes {
            let now = if train { TRAIN } else { EVALUATE };
            for actions in forward(&mut state, &order, now) {
                apply(&actions);
            }
            prop_assert_eq!(apply(&[]), state.live());
            if train {
                let reversed: Vec<usize> = order.iter().rev().copied().collect();
                for actions in backward(&mut state, &reversed) {
                    apply(&actions);
                }
            }
            let persistent = (0..5).filter(|unit| state.is_persistent(*unit)).count() * 10;
            prop_assert!(state.live() <= persistent);
            if train {
                apply(&state.updated());
                prop_assert_eq!(state.live(), 0);
            }
        }
    }

    /// RESIDENCY-3: what is whole beside what is used now, or stays for being small, keeps to the limit.
    #[test]
    fn limits_hold(limits in limits(), order in prop::collection::vec(0usize..5, 1..8)) {
        let mut state = chain(5, true, limits);
        for _ in 0..3 {
            for unit in &order {
                state.enter(5, TRAIN);
                state.enter(*unit, TRAIN);
                let persistent = (0..5).filter(|it| state.is_persistent(*it)).count() * 10;
                prop_assert!(state.live() <= limits.max_live_parameters.max(10) + persistent);
                state.leave(*unit, TRAIN, false);
                state.leave(5, TRAIN, false);
            }
            state.end_pass();
        }
    }
}
