//! Which optimizer.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An optimizer that this engine computes itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam; in DeepSpeed's convention with decoupled decay unless `adam_w_mode` is false.
    Adam,
    /// Adam with decoupled weight decay.
    AdamW,
    /// Stochastic gradient descent, with or without momentum.
    Sgd,
    /// Adagrad.
    Adagrad,
    /// Lion.
    Lion,
    /// Lamb.
    Lamb,
}

impl OptimizerKind {
    /// The names that [`OptimizerKind::from_name`] knows.
    pub const NAMES: &'static [&'static str] = &["Adam", "AdamW", "SGD", "Adagrad", "Lion", "Lamb"];

    /// The optimizer that `optimizer.type` means, in any case, and its default of `adam_w_mode`.
    ///
    /// `Adam` means AdamW unless `adam_w_mode` is false. Other names belong to `torch.optim`, which is the Python
    /// face's matter.
    pub fn from_name(name: &str) -> Option<(Self, bool)> {
        let kind = match name.to_ascii_lowercase().as_str() {
            "adam" => Self::Adam,
            "adamw" => Self::AdamW,
            "sgd" => Self::Sgd,
            "adagrad" => Self::Adagrad,
            "lion" => Self::Lion,
            "lamb" => Self::Lamb,
            _ => return None,
        };
        Some((kind, matches!(kind, Self::Adam | Self::AdamW)))
    }

    /// The name users give it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Adam => "Adam",
            Self::AdamW => "AdamW",
            Self::Sgd => "SGD",
            Self::Adagrad => "Adagrad",
            Self::Lion => "Lion",
            Self::Lamb => "Lamb",
        }
    }

    /// Whether an element's update depends on that element alone, so that shards may be cut anywhere.
    ///
    /// All but Lamb, whose step needs two norms of each whole parameter.
    pub const fn is_elementwise(self) -> bool {
        !matches!(self, Self::Lamb)
    }

    /// Whether it has `betas`, which OneCycle then cycles.
    pub const fn has_betas(self) -> bool {
        matches!(self, Self::Adam | Self::AdamW | Self::Lion | Self::Lamb)
    }
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_in_any_case() {
        for name in OptimizerKind::NAMES {
            let (kind, _) = OptimizerKind::from_name(&name.to_uppercase()).unwrap();
            assert_eq!(kind.name(), *name);
        }
        assert_eq!(OptimizerKind::from_name("Adam"), Some((OptimizerKind::Adam, true)));
        assert_eq!(OptimizerKind::from_name("sgd"), Some((OptimizerKind::Sgd, false)));
        assert_eq!(OptimizerKind::from_name("RMSprop"), None);
    }
}
