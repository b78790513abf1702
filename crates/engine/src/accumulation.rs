//! Which micro-batch is an accumulation boundary.

/// Counts micro-batches and says when gradients are due. Pure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accumulation {
    steps: u64,
    micro_steps: u64,
    forced: Option<bool>,
    suspended: bool,
}

impl Accumulation {
    /// `steps` micro-batches make one update.
    pub fn new(steps: u64) -> Self {
        Self { steps: steps.max(1), micro_steps: 0, forced: None, suspended: false }
    }

    /// Micro-batches that make one update.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Changes how many micro-batches make one update.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps.max(1);
    }

    /// Continues from a saved position.
    pub fn set_micro_steps(&mut self, micro_steps: u64) {
        self.micro_steps = micro_steps;
    }

    /// Whether the current micro-batch is the last one before an update.
    pub fn is_boundary(&self) -> bool {
        !self.suspended && self.forced.unwrap_or((self.micro_steps + 1).is_multiple_of(self.steps))
    }

    /// The caller decides about boundaries from here on (`Some`), or counting does (`None`).
    pub fn force(&mut self, boundary: Option<bool>) {
        self.forced = boundary;
    }

    /// Enters or leaves a stretch without communication (`no_sync`), in which no micro-batch is a boundary.
    pub fn suspend(&mut self, suspended: bool) {
        self.suspended = suspended;
    }

    /// Whether communication is suspended.
    pub fn is_suspended(&self) -> bool {
        self.suspended
    }

    /// The current micro-batch is over.
    pub fn advance(&mut self) {
        self.micro_steps += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_nth_micro_batch_is_a_boundary() {
        let mut accumulation = Accumulation::new(3);
        let mut seen = Vec::new();
        for _ in 0..7 {
            seen.push(accumulation.is_boundary());
            accumulation.advance();
        }
        assert_eq!(seen, [false, false, true, false, false, true, false]);
    }

    #[test]
    fn the_caller_may_decide_and_no_sync_beats_all() {
        let mut accumulation = Accumulation::new(1);
        accumulation.force(Some(false));
        assert!(!accumulation.is_boundary());
        accumulation.force(Some(true));
        assert!(accumulation.is_boundary());
        accumulation.suspend(true);
        assert!(!accumulation.is_boundary());
    }
}
