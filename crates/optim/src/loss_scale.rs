//! Loss scaling: the factor on the loss that keeps fp16 gradients in range.
//!
//! A state machine fed once per optimizer step with «did the gradients overflow». The dynamic one behaves like
//! DeepSpeed's `DynamicLossScaler`: it halves on overflow once its hysteresis is used up, and doubles after every
//! window of clean steps.

use serde::{Deserialize, Serialize};

use crate::OptimError;

/// The factor between two scales.
const FACTOR: f64 = 2.0;

/// Settings of dynamic scaling; the names are those of the config's `fp16` block.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DynamicLossScale {
    /// The first scale is 2 to this power. Default 16.
    pub initial_scale_power: u32,
    /// Clean steps before the scale doubles. Default 1000.
    pub loss_scale_window: u64,
    /// Overflows tolerated before the scale halves; 1 halves at once. Default 2.
    pub hysteresis: u32,
    /// Whether every clean step restores the hysteresis, instead of only every doubling. Default off.
    pub consecutive_hysteresis: bool,
    /// The scale never falls below; an overflow there is an error. Default 1.
    pub min_loss_scale: f64,
}

impl Default for DynamicLossScale {
    fn default() -> Self {
        Self {
            initial_scale_power: 16,
            loss_scale_window: 1000,
            hysteresis: 2,
            consecutive_hysteresis: false,
            min_loss_scale: 1.0,
        }
    }
}

/// What a step did to the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScaleChange {
    /// Nothing.
    Kept,
    /// It went up after a window of clean steps.
    Raised {
        /// Before.
        from: f64,
        /// After.
        to: f64,
    },
    /// It went down after an overflow.
    Lowered {
        /// Before.
        from: f64,
        /// After.
        to: f64,
    },
}

/// The loss scale and how it changes; serialise it to checkpoint it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum LossScaler {
    /// One scale for the whole run: fp32 and bf16 (1), and fp16 with a given `loss_scale`.
    Static {
        /// The scale.
        scale: f64,
    },
    /// fp16 with `loss_scale: 0`.
    Dynamic {
        /// The settings.
        settings: DynamicLossScale,
        /// The scale now.
        scale: f64,
        /// Steps seen so far.
        iteration: i64,
        /// The step of the last overflow, −1 before the first.
        last_overflow: i64,
        /// Overflows left, counting the one that will halve the scale.
        hysteresis_left: u32,
    },
}

impl LossScaler {
    /// A scale that never changes.
    pub fn fixed(scale: f64) -> Self {
        Self::Static { scale }
    }

    /// Dynamic scaling from its start.
    ///
    /// # Errors
    /// [`OptimError::Contradiction`] if the window or the hysteresis is 0, or the initial scale is below the
    /// smallest.
    pub fn dynamic(settings: DynamicLossScale) -> Result<Self, OptimError> {
        let scale = f64::from(settings.initial_scale_power).exp2();
        let reason = if settings.loss_scale_window == 0 {
            "`loss_scale_window` must be at least 1".to_owned()
        } else if settings.hysteresis == 0 {
            "`hysteresis` must be at least 1".to_owned()
        } else if !(settings.min_loss_scale <= scale && scale.is_finite()) {
            let DynamicLossScale { initial_scale_power, min_loss_scale, .. } = settings;
            format!(
                "`initial_scale_power: {initial_scale_power}` starts at a loss scale of {scale}, which must be finite \
                 and not below `min_loss_scale: {min_loss_scale}`"
            )
        } else {
            let hysteresis_left = settings.hysteresis;
            return Ok(Self::Dynamic { settings, scale, iteration: 0, last_overflow: -1, hysteresis_left });
        };
        Err(OptimError::Contradiction { owner: "fp16", reason })
    }

    /// The factor to multiply the loss of the next step by.
    pub fn scale(&self) -> f64 {
        match self {
            Self::Static { scale } | Self::Dynamic { scale, .. } => *scale,
        }
    }

    /// Whether the scale can change.
    pub fn is_dynamic(&self) -> bool {
        matches!(self, Self::Dynamic { .. })
    }

    /// Takes note of a step: `overflow` if its gradients were not finite.
    ///
    /// # Errors
    /// [`OptimError::LossScaleAtMinimum`] if the scale would have to fall below the smallest; the state is then as
    /// before.
    pub fn update(&mut self, overflow: bool) -> Result<ScaleChange, OptimError> {
        let Self::Dynamic { settings, scale, iteration, last_overflow, hysteresis_left } = self else {
            return Ok(ScaleChange::Kept);
        };
        let from = *scale;
        let mut change = ScaleChange::Kept;
        if overflow {
            if *hysteresis_left > 1 {
                *hysteresis_left -= 1;
            } else if from == settings.min_loss_scale {
                return Err(OptimError::LossScaleAtMinimum { scale: from });
            } else {
                // The hysteresis stays used up: every further overflow halves too.
                *scale = (from / FACTOR).max(settings.min_loss_scale);
                change = ScaleChange::Lowered { from, to: *scale };
            }
            *last_overflow = *iteration;
        } else {
            if settings.consecutive_hysteresis {
                *hysteresis_left = settings.hysteresis;
            }
            let clean = (*iteration - *last_overflow - 1).unsigned_abs();
            if clean > 0 && clean.is_multiple_of(settings.loss_scale_window) {
                *hysteresis_left = settings.hysteresis;
                *scale = from * FACTOR;
                change = ScaleChange::Raised { from, to: *scale };
            }
        }
        *iteration += 1;
        Ok(change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn settings(hysteresis: u32, consecutive_hysteresis: bool) -> DynamicLossScale {
        DynamicLossScale {
            initial_scale_power: 4,
            loss_scale_window: 3,
            hysteresis,
            consecutive_hysteresis,
            min_loss_scale: 1.0,
        }
    }

    /// Scales after each step; `x` overflows, `.` is clean.
    fn scales(settings: DynamicLossScale, steps: &str) -> Vec<f64> {
        let mut scaler = LossScaler::dynamic(settings).unwrap();
        steps
            .chars()
            .map(|step| {
                let before = scaler.scale();
                let change = scaler.update(step == 'x').unwrap();
                let after = scaler.scale();
                match change {
                    ScaleChange::Kept => assert_eq!(before, after),
                    ScaleChange::Raised { from, to } => assert!((from, to) == (before, after) && to > from),
                    ScaleChange::Lowered { from, to } => assert!((from, to) == (before, after) && to < from),
                }
                after
            })
            .collect()
    }

    #[test]
    fn clean_steps_double_after_each_window() {
        // Clean step number 4 is the first after a whole window.
        assert_eq!(scales(settings(2, false), "......."), [16., 16., 16., 32., 32., 32., 64.]);
    }

    #[test]
    fn the_first_doubling_of_the_defaults_is_at_the_1001st_clean_step() {
        let all = scales(DynamicLossScale::default(), &".".repeat(1001));
        assert_eq!((all[999], all[1000]), (65536.0, 131_072.0));
    }

    #[test]
    fn hysteresis_tolerates_and_stays_used_up() {
        assert_eq!(scales(settings(1, false), "xx"), [8., 4.]);
        assert_eq!(scales(settings(2, false), "xxx"), [16., 8., 4.]);
        assert_eq!(scales(settings(3, false), "xxxx"), [16., 16., 8., 4.]);
        // A clean step alone does not restore it.
        assert_eq!(scales(settings(2, false), "x.x.x"), [16., 16., 8., 8., 4.]);
    }

    #[test]
    fn a_doubling_restores_the_hysteresis() {
        assert_eq!(
            scales(settings(2, false), "xx....xx"),
            [16., 8., 8., 8., 8., 16., 16., 8.],
            "the overflow resets the window, the doubling the hysteresis"
        );
    }

    #[test]
    fn consecutive_hysteresis_is_restored_by_every_clean_step() {
        assert_eq!(scales(settings(2, true), "x.x.xx"), [16., 16., 16., 16., 16., 8.]);
    }

    #[test]
    fn an_overflow_at_the_minimum_is_an_error_and_changes_nothing() {
        let mut scaler =
            LossScaler::dynamic(DynamicLossScale { min_loss_scale: 6.0, ..settings(1, false) }).unwrap();
        scaler.update(true).unwrap();
        assert_eq!(scaler.update(true), Ok(ScaleChange::Lowered { from: 8.0, to: 6.0 }));
        let before = scaler.clone();
        assert_eq!(scaler.update(true), Err(OptimError::LossScaleAtMinimum { scale: 6.0 }));
        assert_eq!(scaler, before);
    }

    #[test]
    fn the_hysteresis_also_delays_the_error_at_the_minimum() {
        let at_minimum = DynamicLossScale { initial_scale_power: 0, ..settings(2, false) };
        let mut scaler = LossScaler::dynamic(at_minimum).unwrap();
        assert_eq!(scaler.update(true), Ok(ScaleChange::Kept));
        assert!(scaler.update(true).is_err());
    }

    #[test]
    fn a_static_scale_never_changes() {
        let mut scaler = LossScaler::fixed(128.0);
        for overflow in [true, false, true] {
            assert_eq!(scaler.update(overflow), Ok(ScaleChange::Kept));
        }
        assert_eq!(scaler.scale(), 128.0);
        assert!(!scaler.is_dynamic());
    }

    #[test]
    fn the_state_resumes_where_it_was() {
        let steps = "x..x...x....xx..........x.....";
        let mut straight = LossScaler::dynamic(settings(2, false)).unwrap();
        let mut resumed = straight.clone();
        for step in steps.chars() {
            assert_eq!(straight.update(step == 'x'), resumed.update(step == 'x'));
            let text = serde_json::to_string(&resumed).unwrap();
            resumed = serde_json::from_str(&text).unwrap();
            assert_eq!(straight, resumed);
        }
    }

    #[test]
    fn impossible_settings_are_refused() {
        let refused = |settings| LossScaler::dynamic(settings).unwrap_err().to_string();
        let good = DynamicLossScale::default();
        assert!(refused(DynamicLossScale { loss_scale_window: 0, ..good }).contains("loss_scale_window"));
        assert!(refused(DynamicLossScale { hysteresis: 0, ..good }).contains("hysteresis"));
        assert!(refused(DynamicLossScale { min_loss_scale: 1e6, ..good }).contains("min_loss_scale"));
        assert!(refused(DynamicLossScale { initial_scale_power: 5000, ..good }).contains("finite"));
    }
}
