//! What rank 0 reports, and how it is shown.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::job::Operation;

/// A line of rank 0 that is for us begins with this.
pub(super) const MARK: &str = "deepspeed-bench ";

/// The first report: who measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Header {
    /// Number of ranks.
    pub(super) world: usize,
    /// Number of hosts.
    pub(super) hosts: usize,
    /// What carries the bytes.
    pub(super) transport: String,
    /// Calls that are measured, of each size.
    pub(super) trials: u32,
    /// Calls before them.
    pub(super) warmups: u32,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// The collective.
    pub(super) op: Operation,
    /// The elements' type.
    pub(super) dtype: String,
    /// Bytes of the whole.
    pub(super) bytes: u64,
    /// Seconds of one call, on the slowest rank; `None` where the backend does not have it.
    pub(super) seconds: Option<f64>,
    /// Elements that came out wrong, on all ranks.
    pub(super) wrong: Option<u64>,
    /// Why there is no measurement.
    pub(super) skipped: Option<String>,
}

/// What a line of the launch's output is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Line {
    Header(Header),
    Measured(Measured),
    /// Somebody else's words.
    Other,
}

/// Reads a line.
pub(super) fn parse(line: &str) -> Line {
    let Some(text) = line.trim().strip_prefix(MARK) else { return Line::Other };
    if let Ok(header) = serde_json::from_str(text) {
        return Line::Header(header);
    }
    serde_json::from_str(text).map_or(Line::Other, Line::Measured)
}

impl Header {
    /// The heading of the table.
    pub(super) fn render(&self) -> String {
        let Self { world, hosts, transport, trials, warmups } = self;
        let plural = if *hosts == 1 { "" } else { "s" };
        format!(
            "{world} ranks on {hosts} host{plural}, {transport}; mean of {trials} calls after {warmups}\n\
             {:<14} {:>5} {:>12} {:>12} {:>12} {:>12} {:>6}\n",
            "op", "dtype", "bytes", "time us", "algbw GB/s", "busbw GB/s", "wrong"
        )
    }
}

impl Measured {
    /// Gigabytes (1e9) a second: algorithm, bus.
    fn bandwidth(&self, world: usize) -> Option<(f64, f64)> {
        let algorithm = self.bytes as f64 / self.seconds.filter(|seconds| *seconds > 0.0)? / 1e9;
        Some((algorithm, algorithm * self.op.bus_factor(world)))
    }

    /// A row of the table.
    pub(super) fn render(&self, world: usize) -> String {
        let (name, dtype, bytes) = (self.op.name(), &self.dtype, self.bytes);
        match (self.seconds, self.bandwidth(world)) {
            (Some(seconds), Some((algorithm, bus))) => {
                let wrong = self.wrong.map_or_else(|| "-".to_owned(), |wrong| wrong.to_string());
                let time = seconds * 1e6;
                format!(
                    "{name:<14} {dtype:>5} {bytes:>12} {time:>12.1} {algorithm:>12.3} {bus:>12.3} {wrong:>6}\n"
                )
            }
            _ => {
                let why = self.skipped.as_deref().unwrap_or("no time was taken");
                format!("{name:<14} {dtype:>5} {bytes:>12} skipped: {why}\n")
            }
        }
    }

    /// The same for programs.
    pub(super) fn to_json(&self, world: usize) -> Value {
        let bandwidth = self.bandwidth(world);
        serde_json::json!({
            "op": self.op,
            "dtype": self.dtype,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "algbw_gb_per_s": bandwidth.map(|(algorithm, _)| algorithm),
            "busbw_gb_per_s": bandwidth.map(|(_, bus)| bus),
            "wrong": self.wrong,
            "skipped": self.skipped,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_rank_0() {
        let header = Header { world: 4, hosts: 2, transport: "x".to_owned(), trials: 1, warmups: 0 };
        let measured = Measured {
            op: Operation::AllReduce,
            dtype: "fp32".to_owned(),
            bytes: 4_000_000,
            seconds: Some(0.001),
            wrong: Some(0),
            skipped: None,
        };
        let line = |value: Value| format!("{MARK}{value}\n");
        assert_eq!(parse(&line(serde_json::json!(header))), Line::Header(header));
        assert_eq!(parse(&line(serde_json::json!(measured))), Line::Measured(measured.clone()));
        assert_eq!(parse("a warning of torch"), Line::Other);
        assert_eq!(parse(&line(serde_json::json!(1))), Line::Other);
        let row = measured.render(4);
        let words: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(words, ["all_reduce", "fp32", "4000000", "1000.0", "4.000", "6.000", "0"]);
        let skipped = Measured { seconds: None, skipped: Some("not there".to_owned()), ..measured };
        assert!(skipped.render(4).ends_with("skipped: not there\n"));
    }
}
