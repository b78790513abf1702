//! OneCycle: one rise and fall of the rate, against one fall and rise of the momentum, then a decay (Smith, 2018).

use super::params::{Params, PerGroup};
use crate::OptimError;

pub(super) const KEYS: &[&str] = &[
    "cycle_min_lr",
    "cycle_max_lr",
    "decay_lr_rate",
    "cycle_first_step_size",
    "cycle_second_step_size",
    "cycle_first_stair_count",
    "cycle_second_stair_count",
    "decay_step_size",
    "cycle_momentum",
    "cycle_min_mom",
    "cycle_max_mom",
    "decay_mom_rate",
    "last_batch_iteration",
];

/// The second beta while the first is cycled.
const BETA2: f64 = 0.99;

/// The schedule. `rise` and `fall` are the iterations of the two halves of the cycle.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct OneCycle {
    min_lr: PerGroup,
    max_lr: PerGroup,
    lr_decay: f64,
    rise: f64,
    fall: f64,
    rise_stairs: f64,
    fall_stairs: f64,
    /// Iterations per unit of decay; 0 is no decay.
    decay_step: f64,
    momentum: Option<Momentum>,
}

#[derive(Clone, Debug, PartialEq)]
struct Momentum {
    min: PerGroup,
    max: PerGroup,
    decay: f64,
}

impl OneCycle {
    pub(super) fn new(params: &Params<'_>) -> Result<Self, OptimError> {
        let rise = params.above_zero("cycle_first_step_size")?.unwrap_or(2000.0);
        let rise_stairs = params.at_least_zero("cycle_first_stair_count")?.unwrap_or(0.0);
        let momentum = Momentum {
            min: params.per_group("cycle_min_mom")?.unwrap_or(PerGroup::All(0.8)),
            max: params.per_group("cycle_max_mom")?.unwrap_or(PerGroup::All(0.9)),
            decay: params.number("decay_mom_rate")?.unwrap_or(0.0),
        };
        let with_momentum = params.boolean("cycle_momentum")?.unwrap_or(true);
        Ok(Self {
            min_lr: params.require("cycle_min_lr", params.per_group("cycle_min_lr")?)?,
            max_lr: params.require("cycle_max_lr", params.per_group("cycle_max_lr")?)?,
            lr_decay: params.number("decay_lr_rate")?.unwrap_or(0.0),
            rise,
            fall: params.at_least_zero("cycle_second_step_size")?.unwrap_or(rise),
            rise_stairs,
            fall_stairs: params.at_least_zero("cycle_second_stair_count")?.unwrap_or(rise_stairs),
            decay_step: params.at_least_zero("decay_step_size")?.unwrap_or(0.0),
            momentum: with_momentum.then_some(momentum),
        })
    }

    pub(super) fn per_group(&self) -> Vec<(&'static str, &PerGroup)> {
        let mut lists = vec![("cycle_min_lr", &self.min_lr), ("cycle_max_lr", &self.max_lr)];
        if let Some(momentum) = &self.momentum {
            lists.extend([("cycle_min_mom", &momentum.min), ("cycle_max_mom", &momentum.max)]);
        }
        lists
    }

    pub(super) fn lr(&self, iteration: i64, groups: usize) -> Vec<f64> {
        let rate: &dyn Fn(f64, f64) -> f64 = match self.phase(iteration) {
            Phase::Cycle(height) => &move |min, max| min + (max - min) * height,
            Phase::Decay(intervals) => &move |min, _| min / (1.0 + self.lr_decay * intervals),
        };
        (0..groups).map(|group| rate(self.min_lr.get(group), self.max_lr.get(group))).collect()
    }

    pub(super) fn betas(&self, iteration: i64, groups: usize) -> Option<Vec<(f64, f64)>> {
        let momentum = self.momentum.as_ref()?;
        let beta1: &dyn Fn(f64, f64) -> f64 = match self.phase(iteration) {
            // The original starts an optimizer at the lowest momentum although the cycle starts at the highest.
            _ if iteration < 0 => &|min, _| min,
            Phase::Cycle(height) => &move |min, max| max - (max - min) * height,
            Phase::Decay(intervals) => &move |_, max| max * (1.0 + momentum.decay * intervals),
        };
        Some(
            (0..groups)
                .map(|group| (beta1(momentum.min.get(group), momentum.max.get(group)), BETA2))
                .collect(),
        )
    }

    fn phase(&self, iteration: i64) -> Phase {
        let total = self.rise + self.fall;
        let iteration = iteration as f64;
        if iteration < total {
            Phase::Cycle(self.height(iteration + 1.0))
        } else if self.decay_step == 0.0 {
            Phase::Decay(0.0)
        } else {
            Phase::Decay((iteration - total + 1.0) / self.decay_step)
        }
    }

    /// The height of the cycle, 0 to 1, after `steps` steps.
    fn height(&self, steps: f64) -> f64 {
        let total = self.rise + self.fall;
        let turns = steps / total;
        // The original's order of operations, for its rounding.
        let position = 1.0 + turns - (1.0 + turns).floor();
        let rise = self.rise / total;
        let (height, stairs) = if position <= rise {
            (position / rise, self.rise_stairs)
        } else {
            ((position - 1.0) / (rise - 1.0), self.fall_stairs)
        };
        if stairs == 0.0 {
            return height;
        }
        // Stairs count from whole steps: a height just under a stair by rounding would be a whole stair too low.
        let step = steps % total;
        let stair =
            if step <= self.rise { step * stairs / self.rise } else { (total - step) * stairs / self.fall };
        stair.floor() / stairs
    }
}

enum Phase {
    /// Inside the cycle, at this height.
    Cycle(f64),
    /// After it, by this many decay intervals.
    Decay(f64),
}
