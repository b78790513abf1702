//! A stopwatch by name, for programs that time parts of their own.

use std::time::{Duration, Instant};

/// Adds up intervals.
#[derive(Clone, Debug, Default)]
pub struct Timer {
    since: Option<Instant>,
    total: Duration,
    recorded: Duration,
    count: u32,
}

impl Timer {
    /// Begins an interval at `now`.
    ///
    /// # Errors
    /// One is open.
    pub fn start(&mut self, now: Instant) -> Result<(), &'static str> {
        if self.since.is_some() {
            return Err("this timer is running: stop it before it is started again");
        }
        self.since = Some(now);
        Ok(())
    }

    /// Ends the interval at `now`; `record` says whether it counts for the mean.
    ///
    /// # Errors
    /// None is open.
    pub fn stop(&mut self, now: Instant, record: bool) -> Result<(), &'static str> {
        let since = self.since.take().ok_or("this timer is not running: start it first")?;
        let interval = now.saturating_duration_since(since);
        self.total += interval;
        if record {
            self.recorded += interval;
            self.count += 1;
        }
        Ok(())
    }

    /// Whether an interval is open.
    pub fn is_running(&self) -> bool {
        self.since.is_some()
    }

    /// The time of all intervals up to `now`, an open one included; with `reset` the next call counts from here.
    pub fn elapsed(&mut self, now: Instant, reset: bool) -> Duration {
        let open = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let elapsed = self.total + open;
        if reset {
            self.total = Duration::ZERO;
            self.since = self.since.map(|_| now);
        }
        elapsed
    }

    /// The mean of the recorded intervals.
    pub fn mean(&self) -> Duration {
        self.recorded.checked_div(self.count).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_add_up() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut timer = Timer::default();
        assert!(timer.stop(at(0), true).is_err());
        timer.start(at(0)).unwrap();
        assert!(timer.start(at(1)).is_err());
        timer.stop(at(10), true).unwrap();
        timer.start(at(20)).unwrap();
        assert_eq!(timer.elapsed(at(25), true), Duration::from_millis(15));
        timer.stop(at(50), true).unwrap();
        assert_eq!(timer.elapsed(at(60), false), Duration::from_millis(25));
        assert_eq!(timer.mean(), Duration::from_micros(17_500));
    }
}
