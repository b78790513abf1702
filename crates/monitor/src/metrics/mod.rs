//! Metrics of training for other programs: what is recorded at a step, and the files it goes to.
//!
//! ```text
//! StepMetrics -> [Metric: tag, value, samples] -> CsvFolder         one file for each tag
//!                                              -> TensorBoardFile   one event file
//!                                              -> clients of vendors, in Python
//! ```

mod crc32c;
mod csv;
mod tensorboard;

use std::{fmt, io};

pub use csv::CsvFolder;
pub use tensorboard::TensorBoardFile;

use crate::{Phase, PhaseTimes};

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// What it is, as `Train/Samples/lr`.
    pub tag: String,
    /// The value.
    pub value: f64,
    /// Where it stands on the horizontal axis: samples of all ranks so far.
    pub samples: u64,
}

/// Where metrics go.
pub trait Sink: Send + fmt::Debug {
    /// Records the metrics, `now` being the seconds since 1970.
    ///
    /// # Errors
    /// The file cannot be written.
    fn write(&mut self, metrics: &[Metric], now: f64) -> io::Result<()>;
}

/// What is known at the end of a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepMetrics {
    /// Samples of all ranks so far.
    pub samples: u64,
    /// This rank's loss of the last micro-batch.
    pub loss: Option<f64>,
    /// The learning rate of the first parameter group.
    pub learning_rate: f64,
    /// The loss scale, in fp16.
    pub loss_scale: Option<f64>,
    /// The global gradient norm, unscaled, before clipping; infinite where the step was skipped.
    pub norm: Option<f64>,
    /// Where the time went, and in how many steps, where that is to be told.
    pub times: Option<(PhaseTimes, u64)>,
}

impl StepMetrics {
    /// The metrics, under the tags of the original. `grad_norm` is ours.
    pub fn metrics(&self) -> Vec<Metric> {
        let mut found = Vec::new();
        let mut add = |name: &str, value: f64| {
            found.push(Metric { tag: format!("Train/Samples/{name}"), value, samples: self.samples });
        };
        if let Some(loss) = self.loss {
            add("train_loss", loss);
        }
        add("lr", self.learning_rate);
        if let Some(scale) = self.loss_scale {
            add("loss_scale", scale);
        }
        if let Some(norm) = self.norm.filter(|norm| norm.is_finite()) {
            add("grad_norm", norm);
        }
        if let Some((times, steps)) = self.times {
            let per_step = |phase| 1e3 * times.get(phase).as_secs_f64() / steps.max(1) as f64;
            let (inner, reduce) = (per_step(Phase::Backward), per_step(Phase::Reduce));
            add("elapsed_time_ms_forward", per_step(Phase::Forward));
            add("elapsed_time_ms_backward", inner + reduce);
            add("elapsed_time_ms_backward_inner", inner);
            add("elapsed_time_ms_backward_allreduce", reduce);
            add("elapsed_time_ms_step", per_step(Phase::Update));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_what_is_known_is_recorded() {
        let known = StepMetrics {
            samples: 8,
            learning_rate: 0.5,
            norm: Some(f64::INFINITY),
            ..StepMetrics::default()
        };
        let tags = |known: &StepMetrics| known.metrics().into_iter().map(|it| it.tag).collect::<Vec<_>>();
        assert_eq!(tags(&known), ["Train/Samples/lr"]);
        let mut times = PhaseTimes::default();
        times.add(Phase::Backward, Duration::from_millis(30));
        times.add(Phase::Reduce, Duration::from_millis(10));
        let known = StepMetrics { loss: Some(2.0), norm: Some(1.5), times: Some((times, 2)), ..known };
        let all = known.metrics();
        assert_eq!(all.len(), 8);
        let backward = all.iter().find(|it| it.tag.ends_with("ms_backward")).unwrap();
        assert_eq!((backward.value, backward.samples), (20.0, 8));
    }
}
