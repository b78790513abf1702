//! Every setting of ds_config.json, declared once: name, type, default, what becomes of it, and what it means.
//!
//! The checks, the defaults of the typed config, the JSON Schema, `deepspeed config explain` and docs/config-reference.md
//! all read this table. To build a feature, change the status of its settings here and read them in `config.rs`.

mod blocks;
mod optimizer;
mod precision;
mod scheduler;
mod top;
mod zero;

pub use optimizer::{OPTIMIZERS, TORCH_OPTIMIZERS};
pub use scheduler::{SCHEDULERS, TORCH_SCHEDULERS};
pub(crate) use top::FOREIGN_KEYS;

/// What values a setting takes.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number in a range, both ends included; may be written `5e8`.
    Int {
        /// The least value.
        min: i64,
        /// The greatest value.
        max: i64,
    },
    /// A whole number of 1 or more, or `Infinity`.
    IntOrInfinity,
    /// A finite number in a range.
    Float {
        /// The least value.
        min: f64,
        /// The greatest value.
        max: f64,
        /// Whether `min` itself is excluded.
        above: bool,
    },
    /// A list of this many finite numbers of 0 or more and below 1 (the betas of an optimizer).
    Fractions(usize),
    /// A finite number, or a list of them (one for each parameter group).
    Numbers,
    /// A finite number of 0 or more, or a list of them (one for each parameter group).
    Rates,
    /// Text.
    Text,
    /// One of some words; upper and lower case are the same.
    Choice(&'static [&'static str]),
    /// `fp32`, `fp16`, `bf16` or their long forms.
    DType,
    /// A list of anything.
    List,
    /// A block whose keys are all in the table.
    Block,
    /// `true`, `false` or a block whose keys are all in the table.
    BoolOrBlock,
    /// A block whose keys are judged elsewhere.
    Open,
    /// Any value.
    Anything,
}

impl Kind {
    /// What is allowed, in words.
    pub fn allowed(self) -> String {
        match self {
            Self::Bool => "true or false".to_owned(),
            Self::Int { min, max: i64::MAX } => format!("a whole number, {min} or more"),
            Self::Int { min, max } => format!("a whole number from {min} to {max}"),
            Self::IntOrInfinity => "a whole number, 1 or more, or Infinity".to_owned(),
            Self::Float { min, max: f64::INFINITY, above: true } => format!("a number above {min}"),
            Self::Float { min: f64::NEG_INFINITY, max: f64::INFINITY, .. } => "a number".to_owned(),
            Self::Float { min, max: f64::INFINITY, .. } => format!("a number, {min} or more"),
            Self::Float { min, max, above } => {
                format!("a number {} {min} up to {max}", if above { "above" } else { "from" })
            }
            Self::Fractions(count) => format!("a list of {count} numbers from 0 to below 1"),
            Self::Numbers => "a number, or a list of numbers, one for each parameter group".to_owned(),
            Self::Rates => {
                "a number, 0 or more, or a list of such numbers, one for each parameter group".to_owned()
            }
            Self::Text => "text".to_owned(),
            Self::Choice(words) => words.join(", "),
            Self::DType => "fp32, fp16, bf16".to_owned(),
            Self::List => "a list".to_owned(),
            Self::Block | Self::Open => "a block in { }".to_owned(),
            Self::BoolOrBlock => "true, false or a block in { }".to_owned(),
            Self::Anything => "any value".to_owned(),
        }
    }

    /// Any whole number of 0 or more.
    pub(crate) const COUNT: Self = Self::Int { min: 0, max: i64::MAX };
    /// Any whole number of 1 or more.
    pub(crate) const POSITIVE: Self = Self::Int { min: 1, max: i64::MAX };
    /// Any finite number.
    pub(crate) const NUMBER: Self = Self::Float { min: f64::NEG_INFINITY, max: f64::INFINITY, above: false };
    /// Any finite number of 0 or more.
    pub(crate) const NON_NEGATIVE: Self = Self::Float { min: 0.0, max: f64::INFINITY, above: false };
    /// Any finite number above 0.
    pub(crate) const ABOVE_ZERO: Self = Self::Float { min: 0.0, max: f64::INFINITY, above: true };
}

/// What the value `"auto"` of a setting means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AutoRule {
    /// It is an ordinary wrong value.
    NotAllowed,
    /// The default of the setting.
    Default,
    /// Somebody must have replaced it before the engine starts.
    FilledBy(&'static str),
}

/// Which values of a setting ask for what it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Asks {
    /// The key being there at all.
    Present,
    /// Any value but the default.
    NonDefault,
    /// A block whose `enabled` is true.
    Enabled,
    /// None by itself: another setting decides, and this one only tunes it.
    Never,
}

/// What becomes of a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// The engine obeys it.
    Built,
    /// Known, and an error when it asks for its feature.
    NotBuilt {
        /// The feature, as `offloading of optimizer state`.
        feature: &'static str,
        /// When it asks.
        asks: Asks,
    },
    /// Rejected here and by the original.
    Removed {
        /// What to use in its place.
        instead: &'static str,
        /// When it asks.
        asks: Asks,
    },
    /// Accepted, and nothing depends on it.
    NoEffect {
        /// Why nothing does.
        why: &'static str,
    },
}

/// One setting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Setting {
    /// Its keys from the top, joined by points.
    pub path: &'static str,
    /// What values it takes. `null` always means "not set".
    pub kind: Kind,
    /// The value when it is not set, as JSON; `null` where there is none.
    pub default: &'static str,
    /// What `"auto"` means.
    pub auto: AutoRule,
    /// What becomes of it.
    pub status: Status,
    /// Other names of its last key.
    pub aliases: &'static [&'static str],
    /// What it means, one sentence or two.
    pub meaning: &'static str,
}

impl Setting {
    /// The last key of the path.
    pub fn key(&self) -> &'static str {
        self.path.rsplit('.').next().unwrap_or(self.path)
    }

    /// The path of the block it stands in; empty at the top.
    pub fn parent(&self) -> &'static str {
        self.path.rsplit_once('.').map_or("", |(parent, _)| parent)
    }

    /// Whether `key` is its last key or an alias of it.
    pub fn is_named(&self, key: &str) -> bool {
        self.key() == key || self.aliases.contains(&key)
    }

    const fn alias(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    const fn auto(mut self, rule: AutoRule) -> Self {
        self.auto = rule;
        self
    }
}

/// Who fills in "auto".
pub(crate) const TRAINER: AutoRule = AutoRule::FilledBy("the Hugging Face Trainer or accelerate");

const fn setting(
    path: &'static str,
    kind: Kind,
    default: &'static str,
    status: Status,
    meaning: &'static str,
) -> Setting {
    Setting { path, kind, default, auto: AutoRule::Default, status, aliases: &[], meaning }
}

const fn built(path: &'static str, kind: Kind, default: &'static str, meaning: &'static str) -> Setting {
    setting(path, kind, default, Status::Built, meaning)
}

const fn no_effect(
    path: &'static str,
    kind: Kind,
    default: &'static str,
    meaning: &'static str,
    why: &'static str,
) -> Setting {
    setting(path, kind, default, Status::NoEffect { why }, meaning)
}

const fn not_built(
    path: &'static str,
    kind: Kind,
    default: &'static str,
    meaning: &'static str,
    feature: &'static str,
    asks: Asks,
) -> Setting {
    setting(path, kind, default, Status::NotBuilt { feature, asks }, meaning)
}

const fn removed(path: &'static str, asks: Asks, instead: &'static str) -> Setting {
    setting(
        path,
        Kind::Anything,
        "null",
        Status::Removed { instead, asks },
        "Removed; rejected as by DeepSpeed 0.19.8.",
    )
}

/// All settings, blocks before what they hold.
pub fn settings() -> impl Iterator<Item = &'static Setting> {
    [top::SETTINGS, precision::SETTINGS, zero::SETTINGS, blocks::SETTINGS].into_iter().flatten()
}

/// The setting with this full path, aliases aside.
pub fn find(path: &str) -> Option<&'static Setting> {
    settings().find(|setting| setting.path == path)
}

/// The settings that stand directly in a block; the empty path is the top.
pub fn children(parent: &str) -> impl Iterator<Item = &'static Setting> {
    settings().filter(move |setting| setting.parent() == parent)
}

/// An optimizer or schedule of ours and the parameters it takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Named {
    /// Its name; upper and lower case are the same.
    pub name: &'static str,
    /// Its parameters; the path of each is its name alone.
    pub params: &'static [Setting],
    /// What it is.
    pub meaning: &'static str,
}

impl Named {
    /// The parameter of this name or alias.
    pub fn param(&self, key: &str) -> Option<&'static Setting> {
        self.params.iter().find(|setting| setting.is_named(key))
    }
}

/// The entry with this name, whatever its case.
pub fn find_named(entries: &'static [Named], name: &str) -> Option<&'static Named> {
    entries.iter().find(|entry| entry.name.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_path_is_declared_once_and_has_its_block() {
        let mut seen = HashSet::new();
        for setting in settings() {
            assert!(seen.insert(setting.path), "{} is declared twice", setting.path);
            for alias in setting.aliases {
                assert!(
                    children(setting.parent()).all(|sibling| sibling.key() != *alias),
                    "{alias} is a name and an alias"
                );
            }
            if !setting.parent().is_empty() {
                let block = find(setting.parent()).expect(setting.path);
                assert!(matches!(block.kind, Kind::Block | Kind::BoolOrBlock), "{}", block.path);
            }
        }
    }

    #[test]
    fn every_default_is_json_and_every_meaning_a_sentence() {
        for setting in settings().chain(OPTIMIZERS.iter().chain(SCHEDULERS).flat_map(|entry| entry.params)) {
            assert!(crate::json::parse(setting.default).is_ok(), "{}", setting.path);
            assert!(setting.meaning.ends_with('.'), "{}", setting.path);
        }
    }
}
