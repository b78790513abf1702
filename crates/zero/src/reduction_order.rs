//! In which order units are reduced during a backward pass: the same on every rank, whatever order hooks fire in.

use deepspeed_core::UnitId;

/// Hands out units to reduce, last unit of the layout first, as their gradients become complete. Pure.
///
/// Backward reaches the last modules first, so this is about the order in which gradients appear. A unit whose
/// gradients are complete early waits for those before it; one that never is (a branch not taken, an expert without a
/// token) waits, with all behind it, for the end of the pass. So every rank makes the same collectives in the same
/// order, and a rank that is ahead waits in one of them instead of entering another.
#[derive(Clone, Debug)]
pub struct ReductionOrder {
    /// By unit id: whether the unit's gradients are complete in this pass.
    complete: Vec<bool>,
    /// Units handed out in this pass; they are the last ones of the layout.
    handed_out: usize,
}

impl ReductionOrder {
    /// The order of `units` units.
    pub fn new(units: usize) -> Self {
        Self { complete: vec![false; units], handed_out: 0 }
    }

    /// The gradients of `unit` are complete: the units that can be reduced now, in order.
    ///
    /// A unit that was handed out already is not handed out again.
    pub fn complete(&mut self, unit: UnitId) -> Vec<UnitId> {
        self.complete[unit.index()] = true;
        let mut due = Vec::new();
        while let Some(next) = self.next().filter(|unit| self.complete[unit.index()]) {
            due.push(next);
            self.handed_out += 1;
        }
        due
    }

    /// The pass is over: the units that were not handed out, in order, and a fresh start.
    pub fn finish(&mut self) -> Vec<UnitId> {
        let rest = (0..self.complete.len() - self.handed_out).rev().map(UnitId::from_index).collect();
        self.reset();
        rest
    }

    /// Whether `unit` was handed out in this pass.
    pub fn is_handed_out(&self, unit: UnitId) -> bool {
        unit.index() >= self.complete.len() - self.handed_out
    }

    /// Whether any unit was handed out in this pass.
    pub fn has_begun(&self) -> bool {
        self.handed_out > 0
    }

    /// Forgets the pass.
    pub fn reset(&mut self) {
        self.complete.fill(false);
        self.handed_out = 0;
    }

    fn next(&self) -> Option<UnitId> {
        let left = self.complete.len() - self.handed_out;
        left.checked_sub(1).map(UnitId::from_index)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn numbers(units: &[UnitId]) -> Vec<usize> {
        units.iter().map(|unit| unit.index()).collect()
    }

    #[test]
    fn a_unit_waits_for_those_behind_it_in_the_layout() {
        let mut order = ReductionOrder::new(4);
        let unit = UnitId::from_index;
        assert_eq!(numbers(&order.complete(unit(3))), [3]);
        assert!(order.complete(unit(1)).is_empty());
        assert_eq!(numbers(&order.complete(unit(2))), [2, 1]);
        assert!(order.is_handed_out(unit(1)) && !order.is_handed_out(unit(0)));
        assert!(order.complete(unit(1)).is_empty());
        assert_eq!(numbers(&order.finish()), [0]);
        assert_eq!(numbers(&order.finish()), [3, 2, 1, 0]);
    }

    proptest! {
        #[test]
        fn the_order_does_not_depend_on_the_hooks(fired in prop::collection::vec(0usize..8, 0..20)) {
            let mut order = ReductionOrder::new(8);
            let mut seen = Vec::new();
            for unit in fired {
                seen.extend(numbers(&order.complete(UnitId::from_index(unit))));
            }
            seen.extend(numbers(&order.finish()));
            prop_assert_eq!(seen, [7, 6, 5, 4, 3, 2, 1, 0]);
        }
    }
}
