//! What can be wrong with settings of optimizers, schedules and loss scaling.

/// A setting that cannot be used, or a run that cannot go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptimError {
    /// A key that `owner` (an optimizer or a schedule) does not have.
    #[error("{owner} has no parameter `{key}`{}; it accepts: {}", hint(.nearest), .accepted.join(", "))]
    UnknownKey {
        /// The optimizer or schedule, by the name users give it.
        owner: &'static str,
        /// The key as given.
        key: String,
        /// The accepted key that is spelt most like it, if one is close.
        nearest: Option<&'static str>,
        /// All accepted keys.
        accepted: &'static [&'static str],
    },
    /// A value of the wrong type or out of range.
    #[error("{owner}: `{key}` must be {expected}, got {value}")]
    BadValue {
        /// The optimizer or schedule.
        owner: &'static str,
        /// The key.
        key: String,
        /// What is allowed, as «a number of at least 0».
        expected: &'static str,
        /// The value as given, as JSON.
        value: String,
    },
    /// A value that the original or torch knows and this engine does not do.
    #[error("{owner}: `{key}: {value}` is not supported: {reason}")]
    Unsupported {
        /// The optimizer or schedule.
        owner: &'static str,
        /// The key.
        key: String,
        /// The value as given, as JSON.
        value: String,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// `max_grad_norm` among an optimizer's parameters.
    #[error(
        "{owner}: `max_grad_norm` is not a parameter of an optimizer; set the top-level key `gradient_clipping` \
         to {value} instead"
    )]
    MaxGradNorm {
        /// The optimizer.
        owner: &'static str,
        /// The value as given, as JSON.
        value: String,
    },
    /// Settings that exclude each other.
    #[error("{owner}: {reason}")]
    Contradiction {
        /// The optimizer or schedule.
        owner: &'static str,
        /// Which, and what to do.
        reason: String,
    },
    /// An optimizer that is not built in.
    #[error("unknown optimizer `{name}`, built in are: {}", .known.join(", "))]
    UnknownOptimizer {
        /// The name as given.
        name: String,
        /// The built-in ones.
        known: &'static [&'static str],
    },
    /// A schedule that is not built in.
    #[error("unknown learning-rate schedule `{name}`{}, built in are: {}", hint(.nearest), .known.join(", "))]
    UnknownSchedule {
        /// The name as given.
        name: String,
        /// The built-in name that is spelt most like it, if one is close.
        nearest: Option<&'static str>,
        /// The built-in ones.
        known: &'static [&'static str],
    },
    /// A key that a schedule cannot do without.
    #[error("{owner} needs the parameter `{key}`")]
    MissingKey {
        /// The schedule.
        owner: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A list with one value for each parameter group, of another length.
    #[error("{owner}: `{key}` lists {given} values for {groups} parameter groups")]
    GroupCount {
        /// The schedule.
        owner: &'static str,
        /// The key.
        key: &'static str,
        /// Values in the list.
        given: usize,
        /// Parameter groups of the optimizer.
        groups: usize,
    },
    /// Gradients overflow although the loss scale is as small as it may be.
    #[error(
        "gradients overflow at the smallest loss scale allowed, {scale}: the loss is not finite, or the model needs \
         bf16 or fp32; look for NaN in the inputs and too high a learning rate"
    )]
    LossScaleAtMinimum {
        /// The scale, equal to `min_loss_scale`.
        scale: f64,
    },
}

fn hint(nearest: &Option<&'static str>) -> String {
    nearest.map(|name| format!(", did you mean `{name}`?")).unwrap_or_default()
}

/// The one of `known` spelt most like `name`, if close enough to be a typo.
pub(crate) fn nearest(name: &str, known: &'static [&'static str]) -> Option<&'static str> {
    let name = name.to_lowercase();
    known
        .iter()
        .map(|candidate| (strsim::jaro_winkler(&name, &candidate.to_lowercase()), *candidate))
        .filter(|(similarity, _)| *similarity > 0.85)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
