//! Whether a job that has failed is started again: a pure function of its failures so far.
//!
//! ```text
//!   failure --> asked for by --restart_on? --> any left of --max_restarts? --> another step than before? --> restart
//!                      |  no                        |  no                           |  no
//!                      +----------------------------+-------------------------------+--> stop, and why
//! ```

use crate::nearest::nearest;
use crate::oversight::report::{FailureReport, is_same_end};
use crate::ranks::signals::Ending;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What a failure was, as far as it matters for starting again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// A signal ended a rank, and memory was not the reason.
    RankKilled,
    /// A rank was killed or gave up for want of memory.
    OutOfMemory,
    /// A rank exited with a code that is not 0.
    Exit,
    /// A host could not be reached any more.
    HostLost,
    /// A rank was stopped, or the others have waited in vain for one.
    Hang,
}

const KINDS: [FailureKind; 5] = [
    FailureKind::RankKilled,
    FailureKind::OutOfMemory,
    FailureKind::Exit,
    FailureKind::HostLost,
    FailureKind::Hang,
];

impl FailureKind {
    /// Its name, as `--restart_on` takes it and ranks find it in `DS_RESTART_REASON`.
    pub fn name(self) -> &'static str {
        match self {
            FailureKind::RankKilled => "rank-killed",
            FailureKind::OutOfMemory => "out-of-memory",
            FailureKind::Exit => "exit",
            FailureKind::HostLost => "host-lost",
            FailureKind::Hang => "hang",
        }
    }
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One word of `--restart_on`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartOn {
    /// Every failure.
    Any,
    /// Failures of this kind.
    Kind(FailureKind),
    /// A rank that exits with this code.
    Code(i32),
}

impl FromStr for RestartOn {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let word = text.trim().to_lowercase().replace('_', "-");
        if word == "any" {
            return Ok(RestartOn::Any);
        }
        if let Some(code) = word.strip_prefix("exit=") {
            return match code.parse() {
                Ok(code @ 1..=255) => Ok(RestartOn::Code(code)),
                _ => Err(format!("`{code}` is not an exit code from 1 to 255")),
            };
        }
        let names = KINDS.map(FailureKind::name);
        KINDS.into_iter().find(|kind| kind.name() == word).map(RestartOn::Kind).ok_or_else(|| {
            let near = nearest(&word, names.into_iter().chain(["any"]))
                .map_or_else(String::new, |near| format!("; did you mean '{near}'?"));
            format!("the kinds of failures are {}, exit=CODE and any{near}", names.join(", "))
        })
    }
}

/// When to start again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    /// At most so often; 0: never.
    pub(crate) most: u32,
    /// After these failures.
    pub(crate) on: Vec<RestartOn>,
}

/// A failure, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    /// The exit code of the rank that is to blame, where it had one.
    pub(crate) code: Option<i32>,
    /// The step that it was in, counted from 1, where that is known.
    pub(crate) step: Option<u64>,
    /// Its last lines.
    pub(crate) last_lines: Vec<String>,
    /// One line, for the report on all attempts.
    pub(crate) summary: String,
}

impl Failure {
    /// The failure that a report is about.
    pub(crate) fn of(report: &FailureReport) -> Self {
        let waited_in_vain = || report.last_lines.iter().any(|line| line.contains("CommTimeout"));
        let kind = match report.ending {
            Ending::HostLost => FailureKind::HostLost,
            Ending::Stopped(_) => FailureKind::Hang,
            _ if report.evidence.as_ref().is_some_and(|evidence| evidence.out_of_memory) => {
                FailureKind::OutOfMemory
            }
            // A shell says so of its child.
            Ending::Signal(_) | Ending::Code(129..=159) => FailureKind::RankKilled,
            Ending::Code(_) if waited_in_vain() => FailureKind::Hang,
            Ending::Code(_) => FailureKind::Exit,
        };
        let code = match report.ending {
            Ending::Code(code) => Some(code),
            _ => None,
        };
        let (step, last_lines) = (report.step, report.last_lines.clone());
        Self { kind, code, step, last_lines, summary: report.summary() }
    }
}

/// What to do after a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Start all ranks again, as the restart of this number, after a pause.
    Restart { count: u32, after: Duration },
    /// Leave it at that.
    Stop(Stop),
}

/// Why a job is not started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Nobody has asked for restarts.
    Off,
    /// Not after a failure of this kind.
    NotAsked(FailureKind),
    /// All restarts are used up.
    UsedUp(u32),
    /// This step has failed before.
    SameStep(u64),
    /// It has failed before with the same words, and before its first step.
    SameWords,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Off => write!(f, "restarts are off"),
            Stop::NotAsked(kind) => write!(f, "--restart_on does not name `{kind}`"),
            Stop::UsedUp(most) => write!(f, "--max_restarts={most} is used up"),
            Stop::SameStep(step) => {
                write!(f, "it has failed twice in step {step}, so that another restart would end there too")
            }
            Stop::SameWords => {
                write!(f, "it has failed twice before its first step with the same last lines")
            }
        }
    }
}

/// The longest pause before a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The failures of a job so far.
#[derive(Debug)]
pub(crate) struct Restarts {
    policy: Policy,
    failures: Vec<Failure>,
}

impl Restarts {
    pub(crate) fn new(policy: Policy) -> Self {
        Self { policy, failures: Vec::new() }
    }

    /// Takes in a failure and says what to do.
    pub(crate) fn on_failure(&mut self, failure: Failure) -> Verdict {
        let stop = self.stop(&failure);
        let kind = failure.kind;
        self.failures.push(failure);
        match stop {
            Some(stop) => Verdict::Stop(stop),
            None => Verdict::Restart { count: self.count(), after: self.pause(kind) },
        }
    }

    fn stop(&self, failure: &Failure) -> Option<Stop> {
        let Policy { most, on } = &self.policy;
        let is_asked = on.iter().any(|on| match *on {
            RestartOn::Any => true,
            RestartOn::Kind(kind) => kind == failure.kind,
            RestartOn::Code(code) => Some(code) == failure.code,
        });
        if *most == 0 {
            return Some(Stop::Off);
        }
        if !is_asked {
            return Some(Stop::NotAsked(failure.kind));
        }
        let is_same = |before: &&Failure| match (before.step, failure.step) {
            (Some(before), Some(now)) => before == now,
            (None, None) => {
                before.kind == failure.kind && is_same_end(&before.last_lines, &failure.last_lines)
            }
            _ => false,
        };
        if let Some(before) = self.failures.iter().find(is_same) {
            return Some(before.step.map_or(Stop::SameWords, Stop::SameStep));
        }
        (self.count() >= *most).then_some(Stop::UsedUp(*most))
    }

    /// A host that was lost may need a moment to come back; other failures need none.
    fn pause(&self, kind: FailureKind) -> Duration {
        if kind != FailureKind::HostLost {
            return Duration::ZERO;
        }
        let lost = self.failures.iter().rev().take_while(|failure| failure.kind == kind).count();
        let doublings = u32::try_from(lost.saturating_sub(1)).unwrap_or(u32::MAX).min(8);
        (Duration::from_secs(1) * (1 << doublings)).min(LONGEST_PAUSE)
    }

    /// How often the job was started again, or is about to be.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.failures.len()).unwrap_or(u32::MAX)
    }

    /// At most so many restarts.
    pub(crate) fn most(&self) -> u32 {
        self.policy.most
    }

    /// The failures, in order.
    pub(crate) fn failures(&self) -> &[Failure] {
        &self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn failure(kind: FailureKind, step: Option<u64>) -> Failure {
        Failure { kind, code: None, step, last_lines: vec![], summary: String::new() }
    }

    fn restarts(most: u32, on: &str) -> Restarts {
        Restarts::new(Policy { most, on: on.split(',').map(|word| word.parse().unwrap()).collect() })
    }

    fn restart(count: u32, seconds: u64) -> Verdict {
        Verdict::Restart { count, after: Duration::from_secs(seconds) }
    }

    #[test]
    fn off_unless_asked_for() {
        let killed = failure(FailureKind::RankKilled, Some(3));
        assert_eq!(restarts(0, "any").on_failure(killed.clone()), Verdict::Stop(Stop::Off));
        let mut some = restarts(2, "host-lost,exit=17");
        assert_eq!(some.on_failure(killed.clone()), Verdict::Stop(Stop::NotAsked(FailureKind::RankKilled)));
        assert_eq!(some.on_failure(Failure { code: Some(17), step: None, ..killed.clone() }), restart(2, 0));
        assert_eq!(restarts(2, "any").on_failure(killed), restart(1, 0));
    }

    #[test]
    fn the_same_step_twice_is_the_end() {
        let mut job = restarts(9, "any");
        assert_eq!(job.on_failure(failure(FailureKind::RankKilled, Some(7))), restart(1, 0));
        assert_eq!(job.on_failure(failure(FailureKind::Exit, Some(9))), restart(2, 0));
        assert_eq!(job.on_failure(failure(FailureKind::Exit, None)), restart(3, 0));
        assert_eq!(job.on_failure(failure(FailureKind::Exit, Some(7))), Verdict::Stop(Stop::SameStep(7)));
    }

    #[test]
    fn without_a_step_the_same_words_twice_are_the_end() {
        let says = |line: &str| Failure { last_lines: vec![line.into()], ..failure(FailureKind::Exit, None) };
        let mut job = restarts(9, "any");
        assert_eq!(job.on_failure(says("E: no file 1")), restart(1, 0));
        assert_eq!(job.on_failure(says("E: another")), restart(2, 0));
        assert_eq!(job.on_failure(says("E: no file 2")), Verdict::Stop(Stop::SameWords));
        let mut silent = restarts(2, "any");
        assert_eq!(silent.on_failure(failure(FailureKind::Exit, None)), restart(1, 0));
        assert_eq!(silent.on_failure(failure(FailureKind::Exit, None)), restart(2, 0));
        assert_eq!(silent.on_failure(failure(FailureKind::Exit, None)), Verdict::Stop(Stop::UsedUp(2)));
    }

    #[test]
    fn a_lost_host_is_given_time() {
        let mut job = restarts(20, "any");
        let pauses: Vec<Verdict> =
            (0..7).map(|_| job.on_failure(failure(FailureKind::HostLost, None))).collect();
        let expected = [1, 2, 4, 8, 16, 30, 30];
        assert_eq!(pauses, (1..).zip(expected).map(|(count, wait)| restart(count, wait)).collect::<Vec<_>>());
        job.on_failure(failure(FailureKind::Exit, None));
        assert_eq!(job.on_failure(failure(FailureKind::HostLost, None)), restart(9, 1));
    }

    #[test]
    fn kinds_are_read() {
        for kind in KINDS {
            assert_eq!(kind.name().parse(), Ok(RestartOn::Kind(kind)));
        }
        assert_eq!(" Out_Of_Memory".parse(), Ok(RestartOn::Kind(FailureKind::OutOfMemory)));
        assert_eq!("exit=3".parse(), Ok(RestartOn::Code(3)));
        assert!("exit=0".parse::<RestartOn>().is_err() && "exit=x".parse::<RestartOn>().is_err());
        let error = "host-los".parse::<RestartOn>().unwrap_err();
        assert!(error.contains("rank-killed") && error.contains("did you mean 'host-lost'?"), "{error}");
    }

    proptest! {
        /// However a job fails, it is started again at most so often, and no step fails more than twice.
        #[test]
        fn restarts_are_bounded(most in 0u32..6, steps in prop::collection::vec(prop::option::of(1u64..4), 0..12)) {
            let mut job = restarts(most, "any");
            let (mut count, mut seen) = (0, Vec::new());
            for step in steps {
                match job.on_failure(failure(FailureKind::RankKilled, step)) {
                    Verdict::Restart { count: now, .. } => {
                        count += 1;
                        prop_assert_eq!(now, count);
                        prop_assert!(step.is_none_or(|step| !seen.contains(&step)));
                        seen.extend(step);
                    }
                    Verdict::Stop(_) => break,
                }
            }
            prop_assert!(count <= most);
        }
    }
}
