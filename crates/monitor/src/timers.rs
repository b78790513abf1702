//! Where a step's time goes.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// A part of the training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The model's forward pass.
    Forward,
    /// The model's backward pass, without communication.
    Backward,
    /// Reduction of gradients over ranks, waiting included.
    Reduce,
    /// Norm vote, optimizer update and publication of weights.
    Update,
}

impl Phase {
    /// All of them, in the order of a step.
    pub const ALL: [Self; 4] = [Self::Forward, Self::Backward, Self::Reduce, Self::Update];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Reduce => "reduce",
            Self::Update => "update",
        })
    }
}

/// Time spent per phase since the last report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseTimes {
    times: [Duration; 4],
}

impl PhaseTimes {
    /// Adds `elapsed` to `phase`.
    pub fn add(&mut self, phase: Phase, elapsed: Duration) {
        self.times[phase as usize] += elapsed;
    }

    /// Time spent in `phase`.
    pub fn get(&self, phase: Phase) -> Duration {
        self.times[phase as usize]
    }
}

/// Attributes wall-clock time to one phase at a time.
#[derive(Debug, Default)]
pub struct Stopwatch {
    running: Option<(Phase, Instant)>,
    times: PhaseTimes,
}

impl Stopwatch {
    /// At `now` one phase ends, if one was running, and `next` begins, if given.
    pub fn mark(&mut self, next: Option<Phase>, now: Instant) {
        if let Some((phase, since)) = self.running.take() {
            self.times.add(phase, now.saturating_duration_since(since));
        }
        self.running = next.map(|phase| (phase, now));
    }

    /// The phase that is running.
    pub fn running(&self) -> Option<Phase> {
        self.running.map(|(phase, _)| phase)
    }

    /// The times since the last call, leaving zeros.
    pub fn take(&mut self) -> PhaseTimes {
        std::mem::take(&mut self.times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_moment_belongs_to_one_phase() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut watch = Stopwatch::default();
        watch.mark(Some(Phase::Forward), at(0));
        watch.mark(Some(Phase::Backward), at(2));
        watch.mark(None, at(5));
        watch.mark(Some(Phase::Update), at(9));
        watch.mark(None, at(10));
        let times = watch.take();
        assert_eq!(times.get(Phase::Forward), Duration::from_secs(2));
        assert_eq!(times.get(Phase::Backward), Duration::from_secs(3));
        assert_eq!(times.get(Phase::Update), Duration::from_secs(1));
        assert_eq!(watch.take(), PhaseTimes::default());
    }
}
