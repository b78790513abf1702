//! WarmupLR, WarmupDecayLR, WarmupCosineLR.

use std::f64::consts::PI;

use super::params::{Params, PerGroup};
use crate::OptimError;

pub(super) const KEYS: &[&str] =
    &["warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "last_batch_iteration"];
pub(super) const DECAY_KEYS: &[&str] = &[
    "total_num_steps",
    "warmup_min_lr",
    "warmup_max_lr",
    "warmup_num_steps",
    "warmup_type",
    "last_batch_iteration",
];
pub(super) const COSINE_KEYS: &[&str] = &[
    "total_num_steps",
    "warmup_min_ratio",
    "warmup_num_steps",
    "cos_min_ratio",
    "warmup_type",
    "last_batch_iteration",
];

/// The rise from 0 to 1 over the first `steps` iterations.
#[derive(Clone, Debug, PartialEq)]
struct Rise {
    steps: i64,
    linear: bool,
}

impl Rise {
    fn new(params: &Params<'_>) -> Result<Self, OptimError> {
        // Two at least: the logarithm of 1 is no divisor.
        let steps = params.positive_integer("warmup_num_steps")?.unwrap_or(1000).max(2);
        Ok(Self { steps, linear: params.linear("warmup_type")?.unwrap_or(false) })
    }

    /// `ln(iteration + 1) / ln(steps)` or `iteration / steps`; `None` once it is over.
    fn at(&self, iteration: i64) -> Option<f64> {
        if iteration >= self.steps {
            return None;
        }
        Some(if self.linear {
            iteration as f64 / self.steps as f64
        } else {
            (self.steps as f64).ln().recip() * (iteration as f64 + 1.0).ln()
        })
    }
}

/// From the lowest rate to the highest; then constant, or linearly down to the lowest again.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Warmup {
    min: PerGroup,
    /// `None` is the rate that the group came with.
    max: Option<PerGroup>,
    rise: Rise,
    total: Option<f64>,
}

impl Warmup {
    pub(super) fn constant(params: &Params<'_>) -> Result<Self, OptimError> {
        Ok(Self {
            min: params.per_group("warmup_min_lr")?.unwrap_or(PerGroup::All(0.0)),
            max: params.per_group("warmup_max_lr")?,
            rise: Rise::new(params)?,
            total: None,
        })
    }

    pub(super) fn decaying(params: &Params<'_>) -> Result<Self, OptimError> {
        let mut warmup = Self::constant(params)?;
        warmup.total = Some(params.require("total_num_steps", params.at_least_zero("total_num_steps")?)?);
        if warmup.max.is_none() && !params.is_null("warmup_max_lr") {
            warmup.max = Some(PerGroup::All(0.001));
        }
        Ok(warmup)
    }

    pub(super) fn decays(&self) -> bool {
        self.total.is_some()
    }

    pub(super) fn per_group(&self) -> Vec<(&'static str, &PerGroup)> {
        let max = self.max.iter().map(|max| ("warmup_max_lr", max));
        std::iter::once(("warmup_min_lr", &self.min)).chain(max).collect()
    }

    pub(super) fn lr(&self, iteration: i64, base_lrs: &[f64]) -> Vec<f64> {
        let progress = if iteration < 0 { 0.0 } else { self.progress(iteration) };
        let rate = |(group, base): (usize, &f64)| {
            let min = self.min.get(group);
            let max = self.max.as_ref().map_or(*base, |max| max.get(group));
            min + (max - min) * progress
        };
        base_lrs.iter().enumerate().map(rate).collect()
    }

    fn progress(&self, iteration: i64) -> f64 {
        if let Some(rising) = self.rise.at(iteration) {
            return rising;
        }
        let Some(total) = self.total else { return 1.0 };
        let left = total - iteration as f64;
        (left / (total - self.rise.steps as f64).max(1.0)).max(0.0)
    }
}

/// A factor on the groups' rates: a rise, then half a cosine down.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct WarmupCosine {
    rise: Rise,
    total: f64,
    rise_from: f64,
    fall_to: f64,
}

impl WarmupCosine {
    pub(super) fn new(params: &Params<'_>) -> Result<Self, OptimError> {
        Ok(Self {
            rise: Rise::new(params)?,
            total: params.require("total_num_steps", params.at_least_zero("total_num_steps")?)?,
            rise_from: params.number("warmup_min_ratio")?.unwrap_or(0.0),
            fall_to: params.number("cos_min_ratio")?.unwrap_or(1e-4),
        })
    }

    pub(super) fn ratio(&self, iteration: i64) -> f64 {
        if iteration < 0 {
            return 0.0;
        }
        if let Some(rising) = self.rise.at(iteration) {
            return self.rise_from + (1.0 - self.rise_from) * rising;
        }
        let fallen = (iteration - self.rise.steps + 1) as f64;
        let progress = (fallen / (self.total - self.rise.steps as f64).max(1.0)).min(1.0);
        let cosine = (1.0 + (PI * progress).cos()) / 2.0;
        (self.fall_to + (1.0 - self.fall_to) * cosine).max(0.0)
    }
}
