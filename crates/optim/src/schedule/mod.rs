//! The learning-rate schedules of DeepSpeed's configs, as pure functions of the iteration.
//!
//! Iterations count optimizer steps that were not skipped. A schedule starts at −1: [`Schedule::at`] of −1 is what
//! the optimizer holds for its first step, and the engine moves to the next iteration *after* each step. The
//! first two steps of a warm-up therefore run at its lowest rate, as in the original. All of its state is the
//! iteration, `last_batch_iteration` in checkpoints.

mod cycle;
mod params;
mod range_test;
mod warmup;

use serde_json::{Map, Value};

use crate::{OptimError, error::nearest};
use cycle::OneCycle;
use params::Params;
use range_test::RangeTest;
use warmup::{Warmup, WarmupCosine};

/// A schedule with its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    policy: Policy,
    start: i64,
}

#[derive(Clone, Debug, PartialEq)]
enum Policy {
    Warmup(Warmup),
    WarmupCosine(WarmupCosine),
    RangeTest(RangeTest),
    OneCycle(OneCycle),
}

/// What a schedule sets, one value for each parameter group.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// Learning rates.
    pub lr: Vec<f64>,
    /// Betas, where the schedule cycles momentum. They are for optimizers that have betas
    /// ([`crate::OptimizerKind::has_betas`]) and mean nothing to others.
    pub betas: Option<Vec<(f64, f64)>>,
}

impl Schedule {
    /// The names that [`Schedule::from_config`] knows.
    pub const NAMES: &'static [&'static str] =
        &["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"];

    /// What `scheduler.type` and `scheduler.params` of a config mean together. A `null` value is the default.
    ///
    /// # Errors
    /// [`OptimError`] for an unknown name, an unknown or missing key, and values of the wrong type or out of
    /// range.
    pub fn from_config(name: &str, params: &Map<String, Value>) -> Result<Self, OptimError> {
        let (policy, params) = match name {
            "LRRangeTest" => {
                let params = Params::new("LRRangeTest", params, range_test::KEYS)?;
                (Policy::RangeTest(RangeTest::new(&params)?), params)
            }
            "OneCycle" => {
                let params = Params::new("OneCycle", params, cycle::KEYS)?;
                (Policy::OneCycle(OneCycle::new(&params)?), params)
            }
            "WarmupLR" => {
                let params = Params::new("WarmupLR", params, warmup::KEYS)?;
                (Policy::Warmup(Warmup::constant(&params)?), params)
            }
            "WarmupDecayLR" => {
                let params = Params::new("WarmupDecayLR", params, warmup::DECAY_KEYS)?;
                (Policy::Warmup(Warmup::decaying(&params)?), params)
            }
            "WarmupCosineLR" => {
                let params = Params::new("WarmupCosineLR", params, warmup::COSINE_KEYS)?;
                (Policy::WarmupCosine(WarmupCosine::new(&params)?), params)
            }
            _ => {
                return Err(OptimError::UnknownSchedule {
                    name: name.to_owned(),
                    nearest: nearest(name, Self::NAMES),
                    known: Self::NAMES,
                });
            }
        };
        Ok(Self { policy, start: params.start()? })
    }

    /// The name users give it.
    pub fn name(&self) -> &'static str {
        match &self.policy {
            Policy::Warmup(warmup) if warmup.decays() => "WarmupDecayLR",
            Policy::Warmup(_) => "WarmupLR",
            Policy::WarmupCosine(_) => "WarmupCosineLR",
            Policy::RangeTest(_) => "LRRangeTest",
            Policy::OneCycle(_) => "OneCycle",
        }
    }

    /// The iteration it starts at: −1 unless `last_batch_iteration` is among its settings.
    pub fn start(&self) -> i64 {
        self.start
    }

    /// Checks that settings given as lists have one value for each of `groups` parameter groups.
    ///
    /// # Errors
    /// [`OptimError::GroupCount`].
    pub fn check_groups(&self, groups: usize) -> Result<(), OptimError> {
        let owner = self.name();
        let lists = match &self.policy {
            Policy::Warmup(warmup) => warmup.per_group(),
            Policy::WarmupCosine(_) => Vec::new(),
            Policy::RangeTest(test) => test.per_group(),
            Policy::OneCycle(cycle) => cycle.per_group(),
        };
        for (key, list) in lists {
            if let Some(given) = list.count().filter(|given| *given != groups) {
                return Err(OptimError::GroupCount { owner, key, given, groups });
            }
        }
        Ok(())
    }

    /// The values at `iteration`, counted from −1. `base_lrs` are the rates of the parameter groups before any
    /// schedule: WarmupLR without a `warmup_max_lr` rises to them, WarmupCosineLR scales them.
    ///
    /// # Panics
    /// If [`Schedule::check_groups`] would refuse `base_lrs.len()`.
    pub fn at(&self, iteration: i64, base_lrs: &[f64]) -> Values {
        let groups = base_lrs.len();
        let (lr, betas) = match &self.policy {
            Policy::Warmup(warmup) => (warmup.lr(iteration, base_lrs), None),
            Policy::WarmupCosine(cosine) => {
                let ratio = cosine.ratio(iteration);
                (base_lrs.iter().map(|lr| lr * ratio).collect(), None)
            }
            Policy::RangeTest(test) => (test.lr(iteration, groups), None),
            Policy::OneCycle(cycle) => (cycle.lr(iteration, groups), cycle.betas(iteration, groups)),
        };
        Values { lr, betas }
    }
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "`json!` makes values")]
mod tests {
    use super::*;
    use serde_json::json;

    fn schedule(name: &str, params: Value) -> Result<Schedule, OptimError> {
        Schedule::from_config(name, params.as_object().unwrap())
    }

    fn error(name: &str, params: Value) -> String {
        schedule(name, params).unwrap_err().to_string()
    }

    /// Compares with values computed by hand from the table of the reference, to 1e-12.
    fn check(name: &str, params: Value, base: f64, expected: &[(i64, f64)]) {
        let schedule = schedule(name, params).unwrap();
        assert_eq!(schedule.name(), name);
        for (iteration, lr) in expected {
            let ours = schedule.at(*iteration, &[base]).lr[0];
            assert!((ours - lr).abs() < 1e-12, "{name} at {iteration}: {ours} instead of {lr}");
        }
    }

    #[test]
    fn warm_up_logarithmic() {
        // ln 1 = 0, ln 2 / ln 4 = 0.5, ln 4 / ln 4 = 1.
        let expected = [(-1, 0.0), (0, 0.0), (1, 0.005), (3, 0.01), (4, 0.01), (1000, 0.01)];
        check("WarmupLR", json!({"warmup_num_steps": 4, "warmup_max_lr": 0.01}), 7.0, &expected);
        // Without a maximum, the rate of the group.
        check("WarmupLR", json!({"warmup_num_steps": 4}), 0.01, &expected);
    }

    #[test]
    fn warm_up_linear_between_two_rates() {
        let params = json!({"warmup_num_steps": 10, "warmup_min_lr": 0.1, "warmup_max_lr": 1.1, "warmup_type": "linear"});
        check("WarmupLR", params, 7.0, &[(-1, 0.1), (0, 0.1), (1, 0.2), (9, 1.0), (10, 1.1), (11, 1.1)]);
    }

    #[test]
    fn warm_up_takes_at_least_two_steps() {
        let params = json!({"warmup_num_steps": 1, "warmup_max_lr": 1.0, "warmup_type": "linear"});
        check("WarmupLR", params, 7.0, &[(0, 0.0), (1, 0.5), (2, 1.0)]);
    }

    #[test]
    fn decay_reaches_zero_and_stays() {
        let params = json!({"total_num_steps": 14, "warmup_num_steps": 4, "warmup_max_lr": 1.0});
        check("WarmupDecayLR", params, 7.0, &[(1, 0.5), (4, 1.0), (5, 0.9), (13, 0.1), (14, 0.0), (99, 0.0)]);
        // The maximum is 0.001 by default, and the group's rate for null.
        let params = json!({"total_num_steps": 14, "warmup_num_steps": 4});
        check("WarmupDecayLR", params, 7.0, &[(4, 0.001)]);
        let params = json!({"total_num_steps": 14, "warmup_num_steps": 4, "warmup_max_lr": null});
        check("WarmupDecayLR", params, 7.0, &[(4, 7.0)]);
    }

    #[test]
    fn cosine_scales_the_groups_rate() {
        let params = json!({"total_num_steps": 12, "warmup_num_steps": 4, "cos_min_ratio": 0.2, "warmup_min_ratio": 0.1});
        // Half of the cosine is at iteration 4 - 1 + 8 / 2 = 7.
        let expected = [(-1, 0.0), (0, 0.2), (1, 1.1), (3, 2.0), (7, 1.2), (11, 0.4), (12, 0.4), (500, 0.4)];
        check("WarmupCosineLR", params, 2.0, &expected);
    }

    #[test]
    fn range_test_rises_smoothly_or_in_stairs() {
        let params = json!({"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 4, "lr_range_test_step_rate": 2.0});
        check("LRRangeTest", params, 7.0, &[(-1, 0.1), (0, 0.15), (3, 0.3), (7, 0.5)]);
        let params = json!({"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 4, "lr_range_test_staircase": true});
        check("LRRangeTest", params, 7.0, &[(-1, 0.1), (2, 0.1), (3, 0.2), (6, 0.2), (7, 0.3)]);
    }

    #[test]
    fn one_cycle_rises_falls_and_decays() {
        let params = json!({
            "cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4, "cycle_second_step_size": 8,
            "decay_step_size": 2, "decay_lr_rate": 0.5, "decay_mom_rate": 0.25
        });
        let expected =
            [(-1, 0.1), (0, 0.2), (3, 0.5), (4, 0.45), (7, 0.3), (11, 0.1), (12, 0.08), (13, 0.1 / 1.5)];
        check("OneCycle", params.clone(), 7.0, &expected);
        let schedule = schedule("OneCycle", params).unwrap();
        let momentum = |iteration| schedule.at(iteration, &[7.0]).betas.unwrap()[0];
        for (iteration, expected) in [(-1, 0.8), (0, 0.875), (3, 0.8), (7, 0.85), (11, 0.9), (12, 1.0125)] {
            let (beta1, beta2) = momentum(iteration);
            assert!((beta1 - expected).abs() < 1e-12, "momentum at {iteration}: {beta1}");
            assert_eq!(beta2, 0.99);
        }
    }

    #[test]
    fn one_cycle_in_stairs_and_without_momentum() {
        let params = json!({
            "cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 4, "cycle_first_stair_count": 2,
            "cycle_momentum": false
        });
        check(
            "OneCycle",
            params.clone(),
            7.0,
            &[(0, 0.0), (1, 0.5), (2, 0.5), (3, 1.0), (4, 0.5), (6, 0.0), (50, 0.0)],
        );
        assert_eq!(schedule("OneCycle", params).unwrap().at(5, &[7.0]).betas, None);
    }

    #[test]
    fn lists_give_each_group_its_own() {
        let both = schedule("WarmupLR", json!({"warmup_num_steps": 2, "warmup_max_lr": [1.0, 2.0]})).unwrap();
        both.check_groups(2).unwrap();
        assert_eq!(both.at(5, &[7.0, 7.0]).lr, [1.0, 2.0]);
        assert_eq!(
            both.check_groups(3).unwrap_err().to_string(),
            "WarmupLR: `warmup_max_lr` lists 2 values for 3 parameter groups"
        );
        let cycle = json!({"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": 1.0, "cycle_max_mom": [0.9, 0.95]});
        let cycle = schedule("OneCycle", cycle).unwrap();
        assert_eq!(cycle.at(-1, &[7.0; 2]).lr, [0.1, 0.2]);
        assert!(cycle.check_groups(1).unwrap_err().to_string().contains("cycle_min_lr"));
    }

    #[test]
    fn wrong_settings_say_what_to_do() {
        for bad in [json!(0), json!(-5), json!(10.0), json!("10"), json!(true)] {
            let message = error("WarmupLR", json!({"warmup_num_steps": bad}));
            assert_eq!(
                message,
                format!("WarmupLR: `warmup_num_steps` must be a positive integer, got {bad}")
            );
        }
        assert_eq!(error("WarmupDecayLR", json!({})), "WarmupDecayLR needs the parameter `total_num_steps`");
        assert_eq!(
            error("OneCycle", json!({"cycle_min_lr": 1})),
            "OneCycle needs the parameter `cycle_max_lr`"
        );
        assert!(error("WarmupLR", json!({"warmup_max": 1})).contains("did you mean `warmup_max_lr`?"));
        assert!(error("WarmupLR", json!({"warmup_type": "cubic"})).contains("\"log\" or \"linear\""));
        assert!(error("WarmupLR", json!({"warmup_max_lr": [1.0, "x"]})).contains("list of numbers"));
        assert!(error("LRRangeTest", json!({"lr_range_test_step_size": 0})).contains("positive integer"));
        let cycle = json!({"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 0});
        assert!(error("OneCycle", cycle).contains("above 0"));
        assert_eq!(
            error("WarmupLr", json!({})),
            "unknown learning-rate schedule `WarmupLr`, did you mean `WarmupLR`?, built in are: LRRangeTest, OneCycle, \
             WarmupLR, WarmupDecayLR, WarmupCosineLR"
        );
    }

    #[test]
    fn a_start_may_be_given() {
        assert_eq!(schedule("WarmupLR", json!({})).unwrap().start(), -1);
        assert_eq!(schedule("WarmupLR", json!({"last_batch_iteration": 41})).unwrap().start(), 41);
        assert!(error("WarmupLR", json!({"last_batch_iteration": -2})).contains("at least -1"));
    }
}
