//! Which of a client's optimizers may work on shards.

use deepspeed_zero::Residency;

use crate::{EngineError, OptimizerChoice};

/// The optimizers of `torch.optim` that look at each element alone, so that a shard is as good as a whole parameter.
const ELEMENT_WISE: [&str; 11] =
    ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"];

/// Refuses to shard the state of an optimizer that is not known to bear it, unless the config says so.
pub(crate) fn check_client(class: &str, state: Residency, allow_untested: bool) -> Result<(), EngineError> {
    let (module, name) = class.rsplit_once('.').unwrap_or(("", class));
    let known = module.starts_with("torch.optim") && ELEMENT_WISE.contains(&name);
    if state == Residency::Whole || known || allow_untested {
        return Ok(());
    }
    Err(EngineError::Usage(format!(
        "{class} is not known to work on shards of parameters, which is what ZeRO stages 1 and 2 give it. If it looks at \
         each element alone, set zero_allow_untested_optimizer to true; if not, use stage 0"
    )))
}

/// Whether there is state to keep on a disk.
///
/// # Errors
/// [`EngineError::Usage`] for a client's optimizer, which makes its state in memory.
pub(crate) fn has_state_for_a_disk(optimizer: &OptimizerChoice) -> Result<bool, EngineError> {
    match optimizer {
        OptimizerChoice::Native(_) => Ok(true),
        OptimizerChoice::Absent => Ok(false),
        OptimizerChoice::Client { class } => Err(EngineError::Usage(format!(
            "zero_optimization.offload_optimizer.device \"nvme\" streams optimizer state through memory, and {class} makes \
             its state itself, in memory and in a form that only it knows: use Adam, AdamW, SGD, Adagrad, Lion or Lamb by \
             the config's optimizer block or of deepspeed.ops, or device \"cpu\""
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_element_wise_optimizers_of_torch_are_sharded_unasked() {
        assert!(check_client("torch.optim.adamw.AdamW", Residency::Shard, false).is_ok());
        assert!(check_client("torch.optim.lbfgs.LBFGS", Residency::Shard, false).is_err());
        assert!(check_client("mine.AdamW", Residency::Shard, false).is_err());
        assert!(check_client("mine.AdamW", Residency::Shard, true).is_ok());
        assert!(check_client("mine.AdamW", Residency::Whole, false).is_ok());
    }
}
