//! The one line per `steps_per_print` that says how training goes.

use std::{fmt, time::Duration};

use crate::{Phase, PhaseTimes};

/// What the line says; figures since the line before it.
#[derive(Clone, Copy, Debug)]
pub struct StepLine {
    /// Boundaries passed.
    pub global_steps: u64,
    /// Updates skipped so far.
    pub skipped_steps: u64,
    /// This rank's last loss, not divided by the accumulation steps, if it is known.
    pub loss: Option<f64>,
    /// The last global gradient norm, unscaled, before clipping.
    pub norm: Option<f64>,
    /// Learning rate of the first parameter group at the last step.
    pub learning_rate: f64,
    /// The loss scale, 1 outside fp16.
    pub loss_scale: f64,
    /// Samples of all ranks since the last line.
    pub samples: u64,
    /// Wall-clock time since the last line.
    pub elapsed: Duration,
    /// Where this rank's time went since the last line.
    pub times: PhaseTimes,
    /// Tell milliseconds per step instead of shares of the time.
    pub breakdown: bool,
    /// Boundaries since the last line.
    pub steps: u64,
}

impl fmt::Display for StepLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.global_steps)?;
        if let Some(loss) = self.loss {
            write!(f, " | loss {loss:.4}")?;
        }
        if let Some(norm) = self.norm {
            write!(f, " | norm {norm:.4}")?;
        }
        write!(f, " | lr {:.3e}", self.learning_rate)?;
        if self.loss_scale != 1.0 {
            write!(f, " | loss scale {}", self.loss_scale)?;
        }
        if self.skipped_steps > 0 {
            write!(f, " | skipped {}", self.skipped_steps)?;
        }
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 {
            write!(f, " | {:.1} samples/s |", self.samples as f64 / seconds)?;
            for phase in Phase::ALL {
                let spent = self.times.get(phase).as_secs_f64();
                if self.breakdown {
                    write!(f, " {phase} {:.2} ms", 1e3 * spent / self.steps.max(1) as f64)?;
                } else {
                    write!(f, " {phase} {:.0}%", 100.0 * spent / seconds)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_only_what_is_known() {
        let mut times = PhaseTimes::default();
        times.add(Phase::Forward, Duration::from_millis(250));
        times.add(Phase::Update, Duration::from_millis(100));
        let line = StepLine {
            global_steps: 10,
            skipped_steps: 0,
            loss: Some(2.5),
            norm: None,
            learning_rate: 3e-4,
            loss_scale: 1.0,
            samples: 80,
            elapsed: Duration::from_secs(1),
            times,
            breakdown: false,
            steps: 10,
        };
        assert_eq!(
            line.to_string(),
            "step 10 | loss 2.5000 | lr 3.000e-4 | 80.0 samples/s | forward 25% backward 0% reduce 0% update 10%"
        );
        let line = StepLine { breakdown: true, ..line };
        assert!(
            line.to_string().ends_with("| forward 25.00 ms backward 0.00 ms reduce 0.00 ms update 10.00 ms")
        );
    }
}
