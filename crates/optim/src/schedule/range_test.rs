//! LRRangeTest: a rate that keeps rising, to find where training diverges (Smith, 2018).

use super::params::{Params, PerGroup};
use crate::OptimError;

pub(super) const KEYS: &[&str] = &[
    "lr_range_test_min_lr",
    "lr_range_test_step_size",
    "lr_range_test_step_rate",
    "lr_range_test_staircase",
    "last_batch_iteration",
];

/// `min * (1 + rate * (iteration + 1) / size)`, the quotient rounded down in a staircase.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RangeTest {
    min: PerGroup,
    size: i64,
    rate: f64,
    staircase: bool,
}

impl RangeTest {
    pub(super) fn new(params: &Params<'_>) -> Result<Self, OptimError> {
        Ok(Self {
            min: params.per_group("lr_range_test_min_lr")?.unwrap_or(PerGroup::All(1e-3)),
            size: params.positive_integer("lr_range_test_step_size")?.unwrap_or(2000),
            rate: params.number("lr_range_test_step_rate")?.unwrap_or(1.0),
            staircase: params.boolean("lr_range_test_staircase")?.unwrap_or(false),
        })
    }

    pub(super) fn per_group(&self) -> Vec<(&'static str, &PerGroup)> {
        vec![("lr_range_test_min_lr", &self.min)]
    }

    pub(super) fn lr(&self, iteration: i64, groups: usize) -> Vec<f64> {
        let intervals = (iteration as f64 + 1.0) / self.size as f64;
        let intervals = if self.staircase { intervals.floor() } else { intervals };
        (0..groups).map(|group| self.min.get(group) * (1.0 + self.rate * intervals)).collect()
    }
}
