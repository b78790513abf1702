//! The launcher's last words after a failure: one report that says who failed first, how, why, and where to read on.

use crate::oversight::watch::{RankState, Watch};
use crate::ranks::evidence::Evidence;
use crate::ranks::signals::Ending;
use std::fmt::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

/// What the report says.
#[derive(Debug, Clone)]
pub(crate) struct FailureReport {
    /// The rank that failed first, or is to blame.
    pub(crate) rank: usize,
    /// Its host.
    pub(crate) host: String,
    /// Its process.
    pub(crate) pid: i32,
    /// How it ended.
    pub(crate) ending: Ending,
    /// How long it ran.
    pub(crate) after: Duration,
    /// The step that it was in, counted from 1, where that is known.
    pub(crate) step: Option<u64>,
    /// Whether memory was short, where that may have been.
    pub(crate) evidence: Option<Evidence>,
    /// The last lines of its stderr.
    pub(crate) last_lines: Vec<String>,
    /// Ranks that failed by themselves with the same last lines.
    pub(crate) same: Vec<usize>,
    /// Ranks that failed by themselves in another way: the rank, how, and its last line of stderr.
    pub(crate) also: Vec<(usize, Ending, String)>,
    /// Ranks that the launcher ended.
    pub(crate) torn_down: Vec<usize>,
    /// Ranks that had ended well before.
    pub(crate) finished: Vec<usize>,
    /// The log file of the rank that failed.
    pub(crate) log: Option<PathBuf>,
    /// The launcher's exit code.
    pub(crate) exit_code: u8,
    /// All attempts, where the job was to be started again after a failure.
    pub(crate) earlier: Option<Earlier>,
}

/// The attempts at a job that was started again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Earlier {
    /// How each of them failed, in one line; the last one too.
    pub(crate) attempts: Vec<String>,
    /// Why there is no further one; empty where the last went well.
    pub(crate) why: String,
}

impl fmt::Display for Earlier {
    /// `2 restarts`, and a line for each attempt that failed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let restarts = if self.why.is_empty() { self.attempts.len() } else { self.attempts.len() - 1 };
        write!(f, "{restarts} restart{}", if restarts == 1 { "" } else { "s" })?;
        if !self.why.is_empty() {
            write!(f, "; no further one: {}", self.why)?;
        }
        for (index, attempt) in self.attempts.iter().enumerate() {
            write!(f, "\n    attempt {}: {attempt}", index + 1)?;
        }
        Ok(())
    }
}

impl FailureReport {
    /// The failure in one line.
    pub(crate) fn summary(&self) -> String {
        let mut text = if self.ending == Ending::HostLost {
            format!("host {} was lost", self.host)
        } else {
            format!("rank {} on {} {}", self.rank, self.host, self.ending.words())
        };
        if self.evidence.as_ref().is_some_and(|evidence| evidence.out_of_memory) {
            text.push_str(", out of memory");
        }
        if let Some(step) = self.step {
            let _ = write!(text, " in step {step}");
        }
        let _ = write!(text, ", after {}", seconds(self.after));
        if let Some(line) = self.last_lines.last().filter(|line| !line.is_empty()) {
            let _ = write!(text, ": {line}");
        }
        text
    }
}

impl fmt::Display for FailureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ending == Ending::HostLost {
            let mut lost = self.same.clone();
            lost.insert(0, self.rank);
            writeln!(f, "deepspeed: host {} failed: it was lost after {}", self.host, seconds(self.after))?;
            writeln!(f, "  with it:   {}", ranks(&lost))?;
        } else {
            writeln!(f, "deepspeed: rank {} failed: {}", self.rank, self.ending.words())?;
            writeln!(
                f,
                "  where:     host {}, process {}, after {}",
                self.host,
                self.pid,
                seconds(self.after)
            )?;
        }
        if let Some(meaning) = self.ending.meaning() {
            writeln!(f, "  meaning:   {meaning}")?;
        }
        if let Some(step) = self.step {
            writeln!(f, "  step:      {step}")?;
        }
        if let Some(evidence) = &self.evidence {
            writeln!(f, "  evidence:  {}", evidence.text)?;
        }
        if !self.same.is_empty() && self.ending != Ending::HostLost {
            writeln!(f, "  same end:  {} failed with the same last lines", ranks(&self.same))?;
        }
        for (rank, ending, line) in &self.also {
            let line = if line.is_empty() { String::new() } else { format!(": {line}") };
            writeln!(f, "  followed:  rank {rank} {}{line}", ending.words())?;
        }
        if !self.torn_down.is_empty() {
            writeln!(f, "  ended:     {}, by the launcher because of this", ranks(&self.torn_down))?;
        }
        if !self.finished.is_empty() {
            writeln!(f, "  finished:  {}, before this", ranks(&self.finished))?;
        }
        match &self.log {
            Some(path) => writeln!(f, "  full log:  {}", path.display())?,
            None => {
                writeln!(f, "  full log:  none kept; --enable_each_rank_log DIR keeps one for each rank")?;
            }
        }
        if let Some(earlier) = &self.earlier {
            writeln!(f, "  restarts:  {earlier}")?;
        }
        writeln!(f, "  exit code: {}", self.exit_code)?;
        if self.last_lines.is_empty() {
            return writeln!(f, "  it wrote nothing to stderr");
        }
        writeln!(f, "  the end of its stderr:")?;
        for line in &self.last_lines {
            writeln!(f, "  | {line}")?;
        }
        Ok(())
    }
}

/// What is known of one rank.
#[derive(Debug, Clone, Default)]
pub(crate) struct RankFacts {
    /// Its host.
    pub(crate) host: String,
    /// Its process.
    pub(crate) pid: i32,
    /// The last lines of its stderr.
    pub(crate) last_lines: Vec<String>,
    /// Whether memory was short, where that may have been.
    pub(crate) evidence: Option<Evidence>,
    /// Its log file.
    pub(crate) log: Option<PathBuf>,
    /// The step that it was in.
    pub(crate) step: Option<u64>,
}

/// The report on a job that failed because of the rank `cause`. The watch counts ranks from 0; the first has the rank `first`.
pub(crate) fn compose(
    watch: &Watch,
    first: usize,
    (cause, ending): (usize, Ending),
    exit_code: u8,
    facts: impl Fn(usize) -> RankFacts,
) -> FailureReport {
    let of_cause = facts(cause);
    let mut report = FailureReport {
        rank: first + cause,
        host: of_cause.host,
        pid: of_cause.pid,
        ending,
        after: watch.failed_at(cause),
        step: of_cause.step,
        evidence: of_cause.evidence,
        last_lines: of_cause.last_lines,
        same: Vec::new(),
        also: Vec::new(),
        torn_down: Vec::new(),
        finished: Vec::new(),
        log: of_cause.log,
        exit_code,
        earlier: None,
    };
    // Ranks go in step; of those on a lost host nothing is known but what the others say.
    report.step =
        report.step.or_else(|| (0..watch.ranks().len()).filter_map(|index| facts(index).step).min());
    for (index, state) in watch.ranks().iter().enumerate().filter(|(index, _)| *index != cause) {
        let rank = first + index;
        match *state {
            RankState::Ended { ending, .. } if ending.is_success() => report.finished.push(rank),
            RankState::Ended { ending: Ending::HostLost, .. } if ending == Ending::HostLost => {
                report.same.push(rank);
            }
            RankState::Ended { ending, .. } => {
                let lines = facts(index).last_lines;
                if report.ending != Ending::HostLost && is_same_end(&report.last_lines, &lines) {
                    report.same.push(rank);
                } else {
                    report.also.push((rank, ending, lines.last().cloned().unwrap_or_default()));
                }
            }
            RankState::TornDown { .. } | RankState::Running => report.torn_down.push(rank),
        }
    }
    report
}

/// `40 ms`, `1.2 s`, `3 min 5 s`, `2 h 10 min`.
fn seconds(time: Duration) -> String {
    let whole = time.as_secs();
    match whole {
        0 => format!("{} ms", time.as_millis()),
        1..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// `rank 3`, `ranks 0-2, 5`.
pub(crate) fn ranks(list: &[usize]) -> String {
    let mut text = String::from(if list.len() == 1 { "rank " } else { "ranks " });
    text.push_str(&crate::plan::cores::list_cores(list).replace(',', ", "));
    text
}

/// Whether two ends of stderr say the same.
pub(crate) fn is_same_end(one: &[String], other: &[String]) -> bool {
    !one.is_empty() && shape(one) == shape(other)
}

/// Lines but for their numbers, since ranks differ in ranks, processes, addresses and times.
pub(crate) fn shape(lines: &[String]) -> String {
    let mut shape = String::new();
    for line in lines {
        let mut in_number = false;
        for c in line.chars() {
            let digit = c.is_ascii_digit();
            if !digit {
                shape.push(c);
            } else if !in_number {
                shape.push('#');
            }
            in_number = digit;
        }
        let _ = writeln!(shape);
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_rank() {
        let report = FailureReport {
            rank: 1,
            host: "node".into(),
            pid: 77,
            ending: Ending::Signal(9),
            after: Duration::from_millis(12_340),
            step: Some(7),
            evidence: Some(Evidence { out_of_memory: false, text: "no out-of-memory event seen".into() }),
            last_lines: vec![],
            same: vec![],
            also: vec![(3, Ending::Code(1), "CommError: rank 1 is gone".into())],
            torn_down: vec![0, 2],
            finished: vec![],
            log: None,
            exit_code: 137,
            earlier: None,
        };
        insta::assert_snapshot!(report, @r"
            deepspeed: rank 1 failed: killed by signal 9 (SIGKILL)
              where:     host node, process 77, after 12.3 s
              step:      7
              evidence:  no out-of-memory event seen
              followed:  rank 3 exited with code 1: CommError: rank 1 is gone
              ended:     ranks 0, 2, by the launcher because of this
              full log:  none kept; --enable_each_rank_log DIR keeps one for each rank
              exit code: 137
              it wrote nothing to stderr
            ");
    }

    #[test]
    fn an_exception_on_every_rank() {
        let report = FailureReport {
            rank: 0,
            host: "node".into(),
            pid: 77,
            ending: Ending::Code(1),
            after: Duration::from_secs(4000),
            step: None,
            evidence: None,
            last_lines: vec!["Traceback (most recent call last):".into(), "ValueError: no".into()],
            same: vec![1, 2, 3, 7],
            also: vec![],
            torn_down: vec![4],
            finished: vec![5],
            log: Some("logs/20260101000000_rank0.log".into()),
            exit_code: 1,
            earlier: Some(Earlier {
                attempts: vec![
                    "host worker-2 was lost in step 4, after 9.0 s".into(),
                    "rank 0 failed".into(),
                ],
                why: "--max_restarts=1 is used up".into(),
            }),
        };
        assert_eq!(report.summary(), "rank 0 on node exited with code 1, after 1 h 6 min: ValueError: no");
        insta::assert_snapshot!(report, @r"
            deepspeed: rank 0 failed: exited with code 1
              where:     host node, process 77, after 1 h 6 min
              same end:  ranks 1-3, 7 failed with the same last lines
              ended:     rank 4, by the launcher because of this
              finished:  rank 5, before this
              full log:  logs/20260101000000_rank0.log
              restarts:  1 restart; no further one: --max_restarts=1 is used up
                attempt 1: host worker-2 was lost in step 4, after 9.0 s
                attempt 2: rank 0 failed
              exit code: 1
              the end of its stderr:
              | Traceback (most recent call last):
              | ValueError: no
            ");
    }

    #[test]
    fn ends_are_compared_without_their_numbers() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        assert!(is_same_end(&lines("a\nrank 1 at 10:12"), &lines("a\nrank 23 at 7:1")));
        assert!(!is_same_end(&lines("a"), &lines("b")));
        assert!(!is_same_end(&[], &[]));
    }
}
