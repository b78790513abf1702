//! What a ZeRO stage means: who keeps which state, and when gradients are reduced.

/// A ZeRO stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Plain data parallelism.
    Zero,
    /// Optimizer state is sharded.
    One,
    /// Optimizer state and gradients are sharded.
    Two,
    /// Optimizer state, gradients and weights are sharded.
    Three,
}

impl Stage {
    /// The number users write: 0 to 3.
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// When the gradients of a micro-batch meet those of the other ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceAt {
    /// After every backward; only the shard is kept between micro-batches.
    MicroBatch,
    /// Once, after the last backward of an accumulation; the whole is kept, in fp32, between micro-batches.
    Boundary,
}

/// How much of something a rank keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// The rank's shard of each unit.
    Shard,
    /// All of it, on every rank.
    Whole,
}

/// What the stage decides. Everything else is the same at every stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// When gradients are reduced.
    pub reduce: ReduceAt,
    /// Where fp32 masters and optimizer moments live.
    pub state: Residency,
    /// Where the weights live that the model computes with.
    pub weights: Residency,
}

impl Policy {
    /// The policy of `stage`; `native` says that the engine's own kernels run the optimizer.
    ///
    /// At stage 0 our own optimizers are sharded in secret: the numbers are the same (ZERO-3) and the state takes
    /// a world's part of the memory. A client's optimizer may look at whole parameters (LBFGS, Muon), so at stage
    /// 0 it gets whole ones.
    pub fn new(stage: Stage, native: bool) -> Self {
        Self {
            reduce: if stage < Stage::Two { ReduceAt::Boundary } else { ReduceAt::MicroBatch },
            state: if stage == Stage::Zero && !native { Residency::Whole } else { Residency::Shard },
            weights: if stage == Stage::Three { Residency::Shard } else { Residency::Whole },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_client_optimizer_at_stage_0_sees_whole_state() {
        assert_eq!(Policy::new(Stage::Zero, false).state, Residency::Whole);
        assert_eq!(Policy::new(Stage::Zero, true).state, Residency::Shard);
        assert_eq!(Policy::new(Stage::One, false).state, Residency::Shard);
        assert_eq!(Policy::new(Stage::Two, true).reduce, ReduceAt::MicroBatch);
    }

    #[test]
    fn only_stage_3_shards_weights() {
        assert_eq!(Policy::new(Stage::Two, true).weights, Residency::Whole);
        let three = Policy::new(Stage::Three, false);
        assert_eq!((three.weights, three.state), (Residency::Shard, Residency::Shard));
        assert_eq!(three.reduce, ReduceAt::MicroBatch);
    }
}
