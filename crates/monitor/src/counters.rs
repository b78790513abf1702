//! The engine's counters: the one definition of each.

use serde::{Deserialize, Serialize};

/// How far training has come. Every rank counts the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Calls of `step()`: micro-batches, boundaries or not.
    pub micro_steps: u64,
    /// Accumulation boundaries passed, skipped updates included.
    pub global_steps: u64,
    /// Samples of all ranks up to the last boundary, skipped updates included.
    pub global_samples: u64,
    /// Boundaries whose update was skipped because a gradient was not finite.
    pub skipped_steps: u64,
    /// Updates the optimizer has made: the step number of its bias correction.
    pub optimizer_steps: u64,
}

impl Counters {
    /// A micro-batch that is not at a boundary.
    pub fn micro_step(&mut self) {
        self.micro_steps += 1;
    }

    /// A boundary at which `train_batch_size` samples have been seen, with or without an update.
    pub fn boundary(&mut self, train_batch_size: u64, applied: bool) {
        self.micro_steps += 1;
        self.global_steps += 1;
        self.global_samples += train_batch_size;
        if applied {
            self.optimizer_steps += 1;
        } else {
            self.skipped_steps += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skipped_boundary_counts_samples_but_no_update() {
        let mut counters = Counters::default();
        counters.micro_step();
        counters.boundary(8, true);
        counters.boundary(8, false);
        let expected = Counters {
            micro_steps: 3,
            global_steps: 2,
            global_samples: 16,
            skipped_steps: 1,
            optimizer_steps: 1,
        };
        assert_eq!(counters, expected);
    }
}
