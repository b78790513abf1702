//! Runs a plan: starts the ranks, merges their output, watches, and ends them all when one fails.
//!
//! One thread, one `poll` for the ranks' pipes and the signals, no waking without a reason. What to do is decided by
//! [`crate::watch`]; this module carries it out with [`crate::ranks`]. Invariants:
//!
//! - SUP-1: after a failure or an interrupt no descendant is left when this function returns.
//! - SUP-2: after a failure the exit code is not 0.

use crate::console::Console;
use crate::error::LaunchError;
use crate::evidence::OutOfMemory;
use crate::inbox::Inbox;
use crate::merge::{Merger, Output, Stream};
use crate::plan::LaunchPlan;
use crate::pty;
use crate::ranks::{self, Change, Chunk, Ranks};
use crate::report::{self, RankFacts};
use crate::secret;
use crate::signals;
use crate::spawn::Streams;
use crate::tail::Tail;
use crate::watch::{Action, Event, Outcome, Patience, Watch, is_victim};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use signal_hook::consts::signal::{SIGCHLD, SIGPIPE, SIGWINCH};
use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How long to wait for the end of processes that were killed; one that hangs in the kernel may never end.
pub(crate) const AFTER_KILL: Duration = Duration::from_secs(3);

/// The job while it runs.
struct Supervisor<'a> {
    plan: &'a LaunchPlan,
    console: &'a Console,
    began: Instant,
    ranks: Ranks,
    /// The end of each rank's stderr.
    tails: Vec<Tail>,
    merger: Merger,
    watch: Watch,
    killed_at: Option<Duration>,
    out_of_memory: OutOfMemory,
}

/// Runs the plan to its end and returns the exit code.
///
/// # Errors
/// The ranks could not be started; then none is left running.
pub(crate) fn run(plan: &LaunchPlan, console: &Console) -> Result<u8, LaunchError> {
    let mut inbox = Inbox::open()?;
    let world = plan.ranks.len();
    let first = plan.first_rank();
    let mut supervisor = Supervisor {
        plan,
        console,
        began: Instant::now(),
        ranks: Ranks::new()?,
        tails: (0..world).map(|_| Tail::default()).collect(),
        merger: Merger::new(first, world, [io::stdout().is_terminal(), io::stderr().is_terminal()]),
        watch: Watch::new(world, Patience::default()),
        killed_at: None,
        out_of_memory: OutOfMemory::watch(),
    };
    supervisor.ranks.start(plan, &secret::new()?, streams)?;
    supervisor.watch_over(&mut inbox)?;
    Ok(supervisor.conclude())
}

impl Supervisor<'_> {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

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
        while !self.watch.is_over() {
            self.wait(inbox)?;
            let signals = inbox.take();
            if signals.contains(&SIGCHLD) {
                self.reap();
            }
            for signal in signals {
                match signal {
                    SIGCHLD => {}
                    SIGWINCH => self.resize(),
                    _ => self.decide(Event::Interrupted(signal)),
                }
            }
            self.decide(Event::Tick);
            let held = self.merger.tick(self.now());
            self.write(held);
            if self.killed_at.is_some_and(|at| self.now() > at + AFTER_KILL) {
                self.watch.give_up();
            }
        }
        Ok(())
    }

    /// Sleeps until a pipe has something, a signal arrives or a deadline passes; takes in the output.
    fn wait(&mut self, inbox: &Inbox) -> Result<(), LaunchError> {
        let kill = self.killed_at.map(|at| at + AFTER_KILL + Duration::from_millis(1));
        let deadline = [self.watch.deadline(), self.merger.deadline(), kill].into_iter().flatten().min();
        let timeout = deadline.map(|deadline| {
            let wait = deadline.saturating_sub(self.now());
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
        if stream == Stream::Stderr {
            self.tails[index].push(bytes);
        }
        if let Err(error) = self.ranks.log(index, bytes) {
            self.console.warn(&format!("the log of rank {rank} ends here: {error}"));
        }
        let outputs = self.merger.push(self.now(), index, stream, bytes);
        self.write(outputs);
        true
    }

    /// Writes merged output; a reader that went away (`| head`) ends the job.
    fn write(&mut self, outputs: Vec<Output>) {
        for (stream, bytes) in outputs {
            let result = match stream {
                Stream::Stdout => write_all(&mut io::stdout().lock(), &bytes),
                Stream::Stderr => write_all(&mut io::stderr().lock(), &bytes),
            };
            if result.is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
                && self.killed_at.is_none()
            {
                self.decide(Event::Interrupted(SIGPIPE));
            }
        }
    }

    /// Collects every child that is over, ranks and orphans.
    fn reap(&mut self) {
        while let Some((index, change)) = self.ranks.reap() {
            let ending = match change {
                Change::Ended(ending) => ending,
                Change::Stopped(signal) => {
                    self.decide(Event::Stopped { rank: index, signal });
                    continue;
                }
                Change::Continued => {
                    self.decide(Event::Continued { rank: index });
                    continue;
                }
            };
            for stream in [Stream::Stdout, Stream::Stderr] {
                while self.read(index, stream) {}
            }
            let rest = self.merger.finish(index);
            self.write(rest);
            let victim = is_victim(&self.tails[index].last_words());
            self.decide(Event::Ended { rank: index, ending, victim });
        }
    }

    /// Lets the state machine decide, and does what it says.
    fn decide(&mut self, event: Event) {
        let now = self.now();
        let Some(action) = self.watch.on(now, event) else { return };
        match action {
            Action::PassOn(signal) => {
                let name = signals::name(signal).unwrap_or("a signal");
                let patience = Patience::default().interrupt.as_secs();
                if signal == SIGPIPE {
                    self.announce("nobody reads the output any more: ending the ranks");
                } else {
                    self.announce(&format!(
                        "{name}: passed on to the ranks, which have {patience} s to finish; once more ends them at once"
                    ));
                }
                // A rank that ignores SIGPIPE, as Python does, would not notice.
                self.ranks.signal(
                    Signal::from_named_raw(signal).filter(|s| *s != Signal::PIPE).unwrap_or(Signal::TERM),
                );
            }
            Action::Terminate => self.ranks.signal(Signal::TERM),
            Action::Kill => {
                self.killed_at = Some(now);
                self.ranks.signal(Signal::KILL);
            }
        }
    }

    /// Says something on a fresh line.
    fn announce(&mut self, text: &str) {
        let ends = self.merger.end_lines();
        self.write(ends);
        self.console.info(text);
    }

    /// Cleans up and says how it went.
    fn conclude(&mut self) -> u8 {
        let outcome = self.watch.outcome().unwrap_or(Outcome::Success);
        if outcome != Outcome::Success {
            ranks::sweep();
        }
        let ends = self.merger.end_lines();
        self.write(ends);
        match outcome {
            Outcome::Success => {}
            Outcome::Failed { cause, ending } => {
                let code = outcome.exit_code();
                let report =
                    report::compose(&self.watch, self.plan.first_rank(), (cause, ending), code, |index| {
                        let killed = index == cause && ending.may_be_out_of_memory();
                        RankFacts {
                            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
                            pid: self.ranks.pid(index),
                            last_lines: self.tails[index].last_lines(),
                            evidence: killed.then(|| self.out_of_memory.explain(self.ranks.pid(index))),
                            log: self.ranks.log_path(index),
                        }
                    });
                self.console.report(&report.to_string());
            }
            Outcome::Interrupted(signal) => {
                let name = signals::name(signal).unwrap_or("a signal");
                self.console.info(&format!("ended by {name}; no rank is left"));
            }
        }
        let stuck: Vec<usize> = (0..self.ranks.len()).filter(|index| self.ranks.is_alive(*index)).collect();
        if !stuck.is_empty() {
            let names: Vec<usize> = stuck.iter().map(|index| self.plan.ranks[*index].rank).collect();
            let mut text = format!("{} cannot be ended (they hang in the kernel):", report::ranks(&names));
            for index in stuck {
                let _ = write!(text, " process {}", self.ranks.pid(index));
            }
            self.console.report(&text);
        }
        outcome.exit_code()
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

pub(crate) fn write_all(to: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
