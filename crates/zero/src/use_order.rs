//! The order in which units were used in the last pass, and what it tells: what comes next, and how far away it is.

/// One use of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) unit: usize,
    /// Whether a backward pass used it.
    pub(crate) backward: bool,
}

/// Records the uses of a pass (a forward and the backward that follows it) and compares them with those of the last one.
///
/// As soon as a use differs from the record there is nothing to foresee until the pass is over; the next one is compared
/// with this one.
#[derive(Clone, Debug, Default)]
pub(crate) struct UseOrder {
    recorded: Vec<Use>,
    current: Vec<Use>,
    /// How many uses of `recorded` have happened in this pass.
    position: usize,
    differs: bool,
}

impl UseOrder {
    /// A unit is used.
    pub(crate) fn used(&mut self, unit: usize, backward: bool) {
        let this = Use { unit, backward };
        self.current.push(this);
        self.differs |= self.recorded.get(self.position) != Some(&this);
        self.position += usize::from(!self.differs);
    }

    /// A forward pass begins. One that no backward pass followed is recorded only where nothing else is.
    pub(crate) fn begin(&mut self) {
        if self.recorded.is_empty() {
            std::mem::swap(&mut self.recorded, &mut self.current);
        }
        self.restart();
    }

    /// The backward pass is over.
    pub(crate) fn end(&mut self) {
        std::mem::swap(&mut self.recorded, &mut self.current);
        self.restart();
    }

    fn restart(&mut self) {
        self.current.clear();
        self.position = 0;
        self.differs = false;
    }

    /// The uses to expect from here on, those of a backward pass only where there will be one.
    pub(crate) fn upcoming(&self, with_backward: bool) -> impl Iterator<Item = usize> + '_ {
        let rest = if self.differs { &[] } else { &self.recorded[self.position..] };
        rest.iter().take_while(move |it| with_backward || !it.backward).map(|it| it.unit)
    }

    /// Elements of the units used before `unit` is again; `None` if it is not, or only further away than `limit`.
    pub(crate) fn distance(
        &self,
        unit: usize,
        with_backward: bool,
        limit: usize,
        elements: impl Fn(usize) -> usize,
    ) -> Option<usize> {
        let mut distance = 0usize;
        let mut last = None;
        for next in self.upcoming(with_backward) {
            if next == unit {
                return Some(distance);
            }
            if last != Some(next) {
                distance = distance.saturating_add(elements(next));
            }
            if distance > limit {
                return None;
            }
            last = Some(next);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(order: &mut UseOrder, forward: &[usize], backward: &[usize]) {
        order.begin();
        forward.iter().for_each(|unit| order.used(*unit, false));
        backward.iter().for_each(|unit| order.used(*unit, true));
        order.end();
    }

    fn upcoming(order: &UseOrder, with_backward: bool) -> Vec<usize> {
        order.upcoming(with_backward).collect()
    }

    #[test]
    fn the_second_pass_knows_the_first() {
        let mut order = UseOrder::default();
        assert!(upcoming(&order, true).is_empty());
        pass(&mut order, &[0, 1, 2], &[2, 1, 0]);
        order.begin();
        order.used(0, false);
        order.used(1, false);
        assert_eq!(upcoming(&order, true), [2, 2, 1, 0]);
        assert_eq!(upcoming(&order, false), [2]);
        assert_eq!(order.distance(1, true, 100, |_| 10), Some(10));
        assert_eq!(order.distance(0, true, 100, |_| 10), Some(20));
        assert_eq!(order.distance(0, true, 15, |_| 10), None);
        assert_eq!(order.distance(0, false, 100, |_| 10), None);
    }

    #[test]
    fn another_order_is_followed_only_once_it_was_seen() {
        let mut order = UseOrder::default();
        pass(&mut order, &[0, 1], &[1, 0]);
        order.begin();
        order.used(1, false);
        assert!(upcoming(&order, true).is_empty());
        order.used(0, false);
        assert!(upcoming(&order, true).is_empty());
        order.end();
        order.begin();
        assert_eq!(upcoming(&order, true), [1, 0]);
    }

    #[test]
    fn evaluation_does_not_replace_what_training_recorded() {
        let mut order = UseOrder::default();
        pass(&mut order, &[0, 1], &[1, 0]);
        for _ in 0..2 {
            order.begin();
            order.used(0, false);
            assert_eq!(upcoming(&order, false), [1]);
            order.used(1, false);
        }
        order.begin();
        assert_eq!(upcoming(&order, true), [0, 1, 1, 0]);
    }

    #[test]
    fn a_model_that_is_only_evaluated_is_recorded_too() {
        let mut order = UseOrder::default();
        order.begin();
        order.used(3, false);
        order.used(4, false);
        order.begin();
        assert_eq!(upcoming(&order, false), [3, 4]);
    }
}
