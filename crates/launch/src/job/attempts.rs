//! Runs a job, and runs it again as long as [`crate::job::restart`] says so: every attempt has ranks, a port and a secret of its own.

use crate::console::Console;
use crate::error::LaunchError;
use crate::hosts;
use crate::job::inbox::Inbox;
use crate::job::preflight;
use crate::job::restart::{Failure, FailureKind, Policy, Restarts, Verdict};
use crate::job::supervise;
use crate::oversight::report::{Earlier, FailureReport};
use crate::oversight::watch::Outcome;
use crate::plan::Plan;
use crate::ranks::signals::{self, Ending};
use rustix::event::{PollFd, PollFlags, Timespec};
use signal_hook::consts::signal::{SIGCHLD, SIGWINCH};
use std::time::{Duration, Instant};

/// How a job has ended.
#[derive(Debug)]
pub(crate) struct JobEnd {
    pub(crate) outcome: Outcome,
    /// The report, after a failure.
    pub(crate) report: Option<FailureReport>,
}

/// Runs the plan to its end, with as many attempts as the policy allows, and returns the exit code.
///
/// # Errors
/// The first attempt could not be started, or a signal came before its ranks ran.
pub(crate) fn run(plan: &Plan, policy: Policy, console: &Console) -> Result<u8, LaunchError> {
    let mut inbox = Inbox::open()?;
    let mut restarts = Restarts::new(policy);
    let mut last: Option<FailureReport> = None;
    loop {
        let failure = match (attempt(plan, &restarts, &mut inbox, console), &last) {
            (Ok(JobEnd { outcome, report: None }), _) => {
                if outcome == Outcome::Success && restarts.count() > 0 {
                    console.info(&format!("done after {}", earlier(&restarts, String::new())));
                }
                return Ok(outcome.exit_code());
            }
            (Ok(JobEnd { report: Some(report), .. }), _) => Failure::of(last.insert(report)),
            (Err(LaunchError::Hosts { problems }), Some(_)) => did_not_start(&restarts, &problems),
            (Err(error @ LaunchError::Interrupted { .. }), Some(_)) | (Err(error), None) => {
                return Err(error);
            }
            (Err(error), Some(report)) => {
                let mut report = report.clone();
                report.earlier = Some(earlier(&restarts, format!("the next one cannot be started: {error}")));
                console.report(&report.to_string());
                return Ok(report.exit_code);
            }
        };
        let summary = failure.summary.clone();
        match (restarts.on_failure(failure), &mut last) {
            (Verdict::Restart { count, after }, _) => {
                let pause = match after.as_secs() {
                    0 => String::new(),
                    seconds => format!(" in {seconds} s"),
                };
                console.report(&format!(
                    "deepspeed: {summary}\n  all ranks start again{pause}: restart {count} of {}",
                    restarts.most()
                ));
                if let Some(signal) = pause_for(&mut inbox, after)? {
                    return Err(LaunchError::Interrupted {
                        signal: signals::name(signal).unwrap_or("a signal"),
                        code: Ending::Signal(signal).shell_code(),
                    });
                }
            }
            (Verdict::Stop(why), Some(report)) => {
                if restarts.most() > 0 {
                    report.earlier = Some(earlier(&restarts, why.to_string()));
                }
                console.report(&report.to_string());
                return Ok(report.exit_code);
            }
            (Verdict::Stop(_), None) => return Ok(1),
        }
    }
}

/// One attempt, with what the ranks find in their environment of those before it.
fn attempt(
    plan: &Plan,
    restarts: &Restarts,
    inbox: &mut Inbox,
    console: &Console,
) -> Result<JobEnd, LaunchError> {
    let mut plan = plan.clone();
    if restarts.most() > 0 {
        plan.tell_restarts(restarts.count(), restarts.most(), restarts.failures().last());
    }
    match plan {
        Plan::Here(mut plan) => {
            preflight::check(&mut plan)?;
            console.info(&plan.summary());
            console.debug(&plan.to_string());
            supervise::run(&plan, inbox, console)
        }
        Plan::Hosts(plan) => {
            console.info(&plan.summary());
            console.debug(&plan.to_string());
            hosts::run(plan, inbox, console)
        }
    }
}

/// Hosts that cannot be reached for another attempt are lost.
fn did_not_start(restarts: &Restarts, problems: &[(String, String)]) -> Failure {
    let problems: Vec<String> = problems.iter().map(|(host, what)| format!("host {host}: {what}")).collect();
    Failure {
        kind: FailureKind::HostLost,
        code: None,
        step: None,
        last_lines: Vec::new(),
        summary: format!("restart {} could not begin: {}", restarts.count(), problems.join("; ")),
    }
}

/// All attempts, and why there is no further one.
fn earlier(restarts: &Restarts, why: String) -> Earlier {
    Earlier { why, attempts: restarts.failures().iter().map(|failure| failure.summary.clone()).collect() }
}

/// Waits; returns the signal that ends the job, if one comes.
fn pause_for(inbox: &mut Inbox, pause: Duration) -> Result<Option<i32>, LaunchError> {
    let began = Instant::now();
    loop {
        if let Some(signal) = inbox.take().into_iter().find(|signal| !matches!(*signal, SIGCHLD | SIGWINCH)) {
            return Ok(Some(signal));
        }
        let left = pause.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        let timeout =
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds: Vec<PollFd<'_>> =
            inbox.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(LaunchError::System { what: "waiting to start again", source: errno.into() });
            }
        }
    }
}
