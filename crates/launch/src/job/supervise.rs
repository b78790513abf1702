//! Runs a plan: starts the ranks, merges their output, watches, and ends them all when one fails.
//!
//! One thread, one `poll` for the ranks' pipes and the signals, no waking without a reason. What to do is decided by
//! [`crate::oversight::watch`]; this module carries it out with [`crate::ranks`]. Invariants:
//!
//! - SUP-1: after a failure or an interrupt no descendant is left when this function returns.
//! - SUP-2: after a failure the exit code is not 0.

use crate::console::Console;
use crate::error::LaunchError;
use crate::job::attempts::JobEnd;
use crate::job::inbox::Inbox;
use crate::oversight::merge::Stream;
use crate::oversight::report::{self, RankFacts};
use crate::oversight::watch::Event;
use crate::oversight::{Oversight, Wording};
use crate::plan::LaunchPlan;
use crate::ranks::pty;
use crate::ranks::spawn::Streams;
use crate::ranks::{self, Change, Chunk, Ranks};
use crate::secret;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use signal_hook::consts::signal::{SIGCHLD, SIGWINCH};
use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::process::Stdio;

const WORDING: Wording = Wording { ranks: "the ranks", none_left: "no rank is left" };

/// The job while it runs.
struct Supervisor<'a> {
    plan: &'a LaunchPlan,
    console: &'a Console,
    ranks: Ranks,
    oversight: Oversight<'a>,
}

/// Runs the plan to its end.
///
/// # Errors
/// The ranks could not be started; then none is left running.
pub(crate) fn run(plan: &LaunchPlan, inbox: &mut Inbox, console: &Console) -> Result<JobEnd, LaunchError> {
    let mut supervisor = Supervisor {
        plan,
        console,
        ranks: Ranks::new()?,
        oversight: Oversight::new(console, WORDING, plan.first_rank(), plan.ranks.len()),
    };
    // The parts of a job that is started by hand cannot agree on a secret; the user can give them one in the environment.
    let secret = (plan.ranks.len() == plan.world).then(secret::new).transpose()?;
    supervisor.ranks.start(plan, secret.as_deref(), streams)?;
    supervisor.watch_over(inbox)?;
    Ok(supervisor.conclude())
}

impl Supervisor<'_> {
    /// Passes the terminal's new size on to rank 0.
    fn resize(&self) {
        if let Some(ours) = self.ranks.pipe(0, Stream::Stdout).filter(|_| io::stdout().is_terminal()) {
            pty::resize(ours, io::stdout());
        }
        if let Some(ours) = self.ranks.pipe(0, Stream::Stderr).filter(|_| io::stderr().is_terminal()) {
            pty::resize(ours, io::stderr());
        }
    }

    /// Waits and acts until every rank is over.
    fn watch_over(&mut self, inbox: &mut Inbox) -> Result<(), LaunchError> {
        while !self.oversight.is_over() {
            self.wait(inbox)?;
            let signals = inbox.take();
            if signals.contains(&SIGCHLD) {
                self.reap();
            }
            for signal in signals {
                match signal {
                    SIGCHLD => {}
                    SIGWINCH => self.resize(),
                    _ => self.oversight.on(Event::Interrupted(signal)),
                }
            }
            self.oversight.tick();
            for signal in self.oversight.take_signals() {
                self.ranks.signal(Signal::from_named_raw(signal).unwrap_or(Signal::TERM));
            }
        }
        Ok(())
    }

    /// Sleeps until a pipe has something, a signal arrives or a deadline passes; takes in the output.
    fn wait(&mut self, inbox: &Inbox) -> Result<(), LaunchError> {
        let timeout = self.oversight.deadline().map(|deadline| {
            let wait = deadline.saturating_sub(self.oversight.now());
            Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: i64::from(wait.subsec_nanos()) }
        });
        let mut sources: Vec<(usize, Stream)> = Vec::new();
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        for (index, stream, pipe) in self.ranks.pipes() {
            sources.push((index, stream));
            fds.push(PollFd::new(pipe, PollFlags::IN));
        }
        fds.extend(inbox.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(errno) => {
                return Err(LaunchError::System { what: "waiting for the ranks", source: errno.into() });
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        for ((rank, stream), _) in sources.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            self.read(rank, stream);
        }
        Ok(())
    }

    /// Takes in what a pipe holds, up to one buffer; returns whether there may be more.
    fn read(&mut self, index: usize, stream: Stream) -> bool {
        let mut buffer = [0; 64 * 1024];
        let rank = self.plan.ranks[index].rank;
        let length = match self.ranks.read(index, stream, &mut buffer) {
            Chunk::Bytes(length) => length,
            Chunk::Again => return true,
            Chunk::Nothing => return false,
            Chunk::Lost(error) => {
                self.console.warn(&format!("output of rank {rank} is lost: {error}"));
                return false;
            }
        };
        let bytes = &buffer[..length];
        if let Err(error) = self.ranks.log(index, bytes) {
            self.console.warn(&format!("the log of rank {rank} ends here: {error}"));
        }
        self.oversight.output(index, stream, bytes);
        true
    }

    /// Collects every child that is over, ranks and orphans.
    fn reap(&mut self) {
        while let Some((index, change)) = self.ranks.reap() {
            let ending = match change {
                Change::Ended(ending) => ending,
                Change::Stopped(signal) => {
                    self.oversight.on(Event::Stopped { rank: index, signal });
                    continue;
                }
                Change::Continued => {
                    self.oversight.on(Event::Continued { rank: index });
                    continue;
                }
            };
            for stream in [Stream::Stdout, Stream::Stderr] {
                while self.read(index, stream) {}
            }
            let last_words = self.ranks.tail(index).last_words();
            self.oversight.ended(index, ending, &last_words);
        }
    }

    /// Cleans up and says how it went.
    fn conclude(&mut self) -> JobEnd {
        if !self.oversight.is_success() {
            ranks::sweep();
        }
        self.ranks.dismiss_guard();
        let ranks = &self.ranks;
        let mut end = self.oversight.end(|index| RankFacts {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid: ranks.pid(index),
            last_lines: ranks.tail(index).last_lines(),
            evidence: None,
            log: ranks.log_path(index),
            step: ranks.step(index),
        });
        if let Some(report) = &mut end.report {
            // Looked for once, and for the rank that is to blame.
            report.evidence = ranks.evidence(report.rank - self.plan.first_rank(), report.ending);
        }
        self.report_stuck();
        end
    }

    /// Names processes that are there even after SIGKILL.
    fn report_stuck(&self) {
        let stuck: Vec<usize> = (0..self.ranks.len()).filter(|index| self.ranks.is_alive(*index)).collect();
        if !stuck.is_empty() {
            let names: Vec<usize> = stuck.iter().map(|index| self.plan.ranks[*index].rank).collect();
            let mut text = format!("{} cannot be ended (they hang in the kernel):", report::ranks(&names));
            for index in stuck {
                let _ = write!(text, " process {}", self.ranks.pid(index));
            }
            self.console.report(&text);
        }
    }
}

/// What a rank reads and writes. Rank 0 may read what is piped in; a terminal cannot be read from a background group, so it is not
/// passed on. Where the launcher writes to a terminal, rank 0 does too; where none can be had, a pipe will do.
fn streams(rank: usize) -> Streams {
    if rank != 0 {
        return Streams { stdin: Stdio::null(), terminals: [None, None] };
    }
    let stdin = if io::stdin().is_terminal() { Stdio::null() } else { Stdio::inherit() };
    let stdout = if io::stdout().is_terminal() { pty::open(io::stdout()).ok() } else { None };
    let stderr = if io::stderr().is_terminal() { pty::open(io::stderr()).ok() } else { None };
    Streams { stdin, terminals: [stdout, stderr] }
}
