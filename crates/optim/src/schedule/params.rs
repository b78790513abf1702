//! Reading the settings of a schedule.

use serde_json::{Map, Value};

use crate::{OptimError, error::nearest};

/// One number for all parameter groups, or one for each.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum PerGroup {
    All(f64),
    Each(Vec<f64>),
}

impl PerGroup {
    /// The number of `group`.
    pub(super) fn get(&self, group: usize) -> f64 {
        match self {
            Self::All(value) => *value,
            Self::Each(values) => values[group],
        }
    }

    /// How many groups it was given for, if it is a list.
    pub(super) fn count(&self) -> Option<usize> {
        match self {
            Self::All(_) => None,
            Self::Each(values) => Some(values.len()),
        }
    }
}

/// The settings of one schedule, all of whose keys are known.
pub(super) struct Params<'a> {
    owner: &'static str,
    map: &'a Map<String, Value>,
}

/// The iteration that a schedule starts at: a key of every schedule.
const START: &str = "last_batch_iteration";

impl<'a> Params<'a> {
    /// Checks that each key is one of `accepted` (which lists [`START`] too).
    pub(super) fn new(
        owner: &'static str,
        map: &'a Map<String, Value>,
        accepted: &'static [&'static str],
    ) -> Result<Self, OptimError> {
        match map.keys().find(|key| !accepted.contains(&key.as_str())) {
            None => Ok(Self { owner, map }),
            Some(key) => Err(OptimError::UnknownKey {
                owner,
                key: key.clone(),
                nearest: nearest(key, accepted),
                accepted,
            }),
        }
    }

    /// The value, unless it is absent or null.
    fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there with the value null.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    fn parse<T>(
        &self,
        key: &str,
        expected: &'static str,
        parse: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, OptimError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match parse(value) {
            Some(parsed) => Ok(Some(parsed)),
            None => Err(OptimError::BadValue {
                owner: self.owner,
                key: key.to_owned(),
                expected,
                value: value.to_string(),
            }),
        }
    }

    pub(super) fn require<T>(&self, key: &'static str, value: Option<T>) -> Result<T, OptimError> {
        value.ok_or(OptimError::MissingKey { owner: self.owner, key })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, OptimError> {
        self.parse(key, "a number", Value::as_f64)
    }

    pub(super) fn at_least_zero(&self, key: &str) -> Result<Option<f64>, OptimError> {
        self.parse(key, "a number of at least 0", |value| value.as_f64().filter(|number| *number >= 0.0))
    }

    pub(super) fn above_zero(&self, key: &str) -> Result<Option<f64>, OptimError> {
        self.parse(key, "a number above 0", |value| value.as_f64().filter(|number| *number > 0.0))
    }

    pub(super) fn positive_integer(&self, key: &str) -> Result<Option<i64>, OptimError> {
        self.parse(key, "a positive integer", |value| value.as_i64().filter(|number| *number > 0))
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, OptimError> {
        self.parse(key, "true or false", Value::as_bool)
    }

    /// Whether a warm-up is linear; logarithmic is the other.
    pub(super) fn linear(&self, key: &str) -> Result<Option<bool>, OptimError> {
        self.parse(key, "\"log\" or \"linear\"", |value| match value.as_str() {
            Some("linear") => Some(true),
            Some("log") => Some(false),
            _ => None,
        })
    }

    pub(super) fn per_group(&self, key: &str) -> Result<Option<PerGroup>, OptimError> {
        self.parse(key, "a number, or a list of numbers, one for each parameter group", |value| {
            match value.as_array() {
                None => value.as_f64().map(PerGroup::All),
                Some(list) => list.iter().map(Value::as_f64).collect::<Option<_>>().map(PerGroup::Each),
            }
        })
    }

    pub(super) fn start(&self) -> Result<i64, OptimError> {
        let start = self.parse(START, "an integer of at least -1", |value| {
            value.as_i64().filter(|number| *number >= -1)
        })?;
        Ok(start.unwrap_or(-1))
    }
}
