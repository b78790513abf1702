//! What can go wrong in a training step.

use deepspeed_checkpoint::CheckpointError;
use deepspeed_comm::CommError;
use deepspeed_core::LayoutError;
use deepspeed_offload::OffloadError;
use deepspeed_zero::ZeroError;

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// State on a disk could not be read or written.
    #[error(transparent)]
    Offload(#[from] OffloadError),
    /// The accelerator, or the framework that works on it, failed.
    #[error(transparent)]
    Device(#[from] crate::DeviceError),
    /// A checkpoint could not be read, said by the rank that could not.
    #[error(transparent)]
    Read(#[from] CheckpointError),
    /// The run does not fit into memory.
    #[error("{0}")]
    Memory(String),
    /// The parameters have no layout.
    #[error("the model's parameters cannot be laid out: {0}")]
    Layout(#[from] LayoutError),
    /// `step()` without a gradient.
    #[error(
        "step() at an accumulation boundary, but no parameter has a gradient: call backward(loss) on a loss that \
         depends on the trainable parameters before step()"
    )]
    NoGradient,
    /// Parameters that never got a gradient, where the config forbids it.
    #[error(
        "no gradient reached {} of {total} trainable parameters in the first step: {}; use them in forward, freeze \
         them (requires_grad = False), or set zero_optimization.ignore_unused_parameters to true",
        .names.len(), summary(.names)
    )]
    Unused {
        /// Their names.
        names: Vec<String>,
        /// Number of trainable parameters.
        total: usize,
    },
    /// A NaN or an infinity where none is expected.
    #[error(
        "gradients are not finite at step {step}: {found}; no weight has been changed. Lower the learning rate, look \
         at this batch and the loss for a division by zero or a logarithm of zero{hint}"
    )]
    NonFinite {
        /// Boundaries passed before this one, plus one.
        step: u64,
        /// Which gradient.
        found: String,
        /// More advice, or nothing.
        hint: &'static str,
    },
    /// Ranks that have gathered or reduced different units, found where nothing else would tell.
    #[error(
        "since the last step rank {rank} has gathered other weights on its device than rank 0, or in another order, so that \
         ranks have computed with each other's units; no weight has been changed. At ZeRO stage 3 ranks run the same modules \
         in the same order; what they may choose apart (experts, branches) belongs below one leaf: \
         deepspeed.utils.set_z3_leaf_modules"
    )]
    Exchanges {
        /// The first rank that differs from rank 0.
        rank: deepspeed_core::Rank,
    },
    /// A gradient or weight whose length is not the parameter's.
    #[error("{what} of parameter `{name}` has {got} elements, the parameter has {expected}")]
    Length {
        /// "gradient" or "weights".
        what: &'static str,
        /// The parameter's name.
        name: String,
        /// Elements lent.
        got: usize,
        /// Elements of the parameter.
        expected: usize,
    },
    /// Weights lent in another dtype than they were registered with.
    #[error(
        "the weights of parameter `{name}` are {got}, but they were {expected} when the engine was made; do not cast \
         the module after deepspeed.initialize"
    )]
    WeightDType {
        /// The parameter's name.
        name: String,
        /// The dtype lent.
        got: deepspeed_core::DType,
        /// The dtype registered.
        expected: deepspeed_core::DType,
    },
    /// A number of parameters or parameter groups that is not the registered one.
    #[error("{got} {what} given, the engine was made for {expected}")]
    Count {
        /// "gradients", "weights", "parameter groups".
        what: &'static str,
        /// How many were given.
        got: usize,
        /// How many there are.
        expected: usize,
    },
    /// Saving or loading a checkpoint failed on one rank, and so on all.
    #[error("rank {rank}: {problem}")]
    Checkpoint {
        /// The rank on which it failed.
        rank: deepspeed_core::Rank,
        /// Its error.
        problem: String,
    },
    /// A checkpoint holds other bytes than were written, found by one rank before anything was loaded.
    #[error("rank {rank}: {problem}")]
    DamagedCheckpoint {
        /// The rank that found it.
        rank: deepspeed_core::Rank,
        /// What is wrong.
        problem: String,
    },
    /// A setting or a call that does not fit the others.
    #[error("{0}")]
    Usage(String),
    /// The system refused the threads that update weights.
    #[error("cannot start the threads that update weights: {0}; set OMP_NUM_THREADS to fewer")]
    Threads(String),
    /// An optimizer, schedule or loss scale refused.
    #[error(transparent)]
    Optim(#[from] deepspeed_optim::OptimError),
}

impl EngineError {
    /// The same of a checkpoint whose contents were only checked.
    pub(crate) fn damaged(self) -> Self {
        match self {
            Self::Checkpoint { rank, problem } => Self::DamagedCheckpoint { rank, problem },
            other => other,
        }
    }
}

fn summary(names: &[String]) -> String {
    let shown: Vec<&str> = names.iter().take(5).map(String::as_str).collect();
    let more = names.len().saturating_sub(shown.len());
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

impl From<ZeroError> for EngineError {
    fn from(error: ZeroError) -> Self {
        match error {
            ZeroError::Comm(error) => Self::Comm(error),
            ZeroError::Offload(error) => Self::Offload(error),
            other => Self::Usage(other.to_string()),
        }
    }
}
