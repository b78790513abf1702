//! How often each collective ran, on how many bytes, and how fast.

use std::{collections::BTreeMap, fmt, time::Duration};

use crate::memory::Bytes;

/// Calls of collectives, by operation and by bytes of one rank.
#[derive(Clone, Debug)]
pub struct CommsLog {
    world: usize,
    /// The operations that are recorded; `None` for all.
    only: Option<Vec<String>>,
    calls: BTreeMap<(String, u64), Vec<Duration>>,
}

/// Bytes per second: what the caller sees, and what each link carries ("bus"), which does not depend on the number of
/// ranks (nccl-tests, doc/PERFORMANCE.md).
fn rates(operation: &str, bytes: u64, time: Duration, world: usize) -> (f64, f64) {
    let seconds = time.as_secs_f64();
    if seconds == 0.0 {
        return (0.0, 0.0);
    }
    let n = world.max(1) as f64;
    let seen = bytes as f64 / seconds;
    let others = (n - 1.0) / n;
    match operation {
        name if name.contains("all_reduce") => (seen, seen * 2.0 * others),
        // One rank's bytes are one of n parts.
        name if name.contains("all_gather") => (seen * n, seen * n * others),
        name if name.contains("reduce_scatter") || name.contains("all_to_all") => (seen, seen * others),
        _ => (seen, seen),
    }
}

impl CommsLog {
    /// An empty log of a group of `world` ranks, for these operations or, with `None`, for all.
    pub fn new(world: usize, only: Option<Vec<String>>) -> Self {
        Self { world, only, calls: BTreeMap::new() }
    }

    /// Adds a call that moved `bytes` of one rank in `time`; returns a line that says so, or `None` where the operation is
    /// not recorded.
    pub fn add(&mut self, operation: &str, bytes: u64, time: Duration) -> Option<String> {
        if self.only.as_ref().is_some_and(|only| !only.iter().any(|name| name == operation)) {
            return None;
        }
        self.calls.entry((operation.to_owned(), bytes)).or_default().push(time);
        let (seen, bus) = rates(operation, bytes, time, self.world);
        Some(format!(
            "{operation} | {} | {:.3} ms | {:.3} GB/s | bus {:.3} GB/s",
            Bytes(bytes),
            1e3 * time.as_secs_f64(),
            seen / 1e9,
            bus / 1e9
        ))
    }

    /// By operation and bytes of one rank: the seconds of each call.
    pub fn calls(&self) -> impl Iterator<Item = (&str, u64, Vec<f64>)> {
        self.calls.iter().map(|((operation, bytes), times)| {
            (operation.as_str(), *bytes, times.iter().map(Duration::as_secs_f64).collect())
        })
    }

    /// Forgets all calls.
    pub fn reset(&mut self) {
        self.calls.clear();
    }
}

impl fmt::Display for CommsLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.calls.is_empty() {
            return f.write_str("no collective was recorded");
        }
        write!(
            f,
            "{:<24}{:>12}{:>8}{:>14}{:>12}{:>12}{:>12}",
            "operation", "bytes", "calls", "total ms", "mean ms", "GB/s", "bus GB/s"
        )?;
        for ((operation, bytes), times) in &self.calls {
            let total: Duration = times.iter().sum();
            let mean = total / u32::try_from(times.len()).unwrap_or(u32::MAX);
            let (seen, bus) = rates(operation, *bytes, mean, self.world);
            write!(
                f,
                "\n{operation:<24}{:>12}{:>8}{:>14.3}{:>12.3}{:>12.3}{:>12.3}",
                Bytes(*bytes),
                times.len(),
                1e3 * total.as_secs_f64(),
                1e3 * mean.as_secs_f64(),
                seen / 1e9,
                bus / 1e9
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_one_size_are_one_line() {
        let mut log = CommsLog::new(4, None);
        assert_eq!(log.to_string(), "no collective was recorded");
        for ms in [1, 3] {
            log.add("all_reduce", 1_000_000, Duration::from_millis(ms));
        }
        log.add("all_reduce", 8, Duration::from_millis(1));
        let text = log.to_string();
        assert_eq!(text.lines().count(), 3);
        let line: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        // 1 MB in 2 ms; each of 4 ranks sends and receives 2 * 3/4 of it.
        assert_eq!(line[line.len() - 5..], ["2", "4.000", "2.000", "0.500", "0.750"]);
        log.reset();
        assert_eq!(log.calls().count(), 0);
        let mut some = CommsLog::new(4, Some(vec!["broadcast".to_owned()]));
        assert_eq!(some.add("all_reduce", 8, Duration::ZERO), None);
        assert!(some.add("broadcast", 8, Duration::ZERO).unwrap().starts_with("broadcast | 8 B | 0.000 ms"));
    }
}
