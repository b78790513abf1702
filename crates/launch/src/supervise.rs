//! Runs a plan: starts the ranks, merges their output, watches, and ends them all when one fails.
//!
//! One thread, one `poll` for the ranks' pipes and the signals, no waking without a reason. What to do is decided by
//! [`crate::watch`]; this module carries it out. Invariants:
//!
//! - SUP-1: a rank that is alive is in a process group of its own and dies with this process.
//! - SUP-2: after a failure or an interrupt no descendant is left when this function returns.
//! - SUP-3: after a failure the exit code is not 0.

use crate::console::Console;
use crate::descendants;
use crate::error::LaunchError;
use crate::evidence::OutOfMemory;
use crate::guard::Guard;
use crate::inbox::Inbox;
use crate::logs;
use crate::merge::{Merger, Output, Stream};
use crate::plan::LaunchPlan;
use crate::pty;
use crate::report::{self, FailureReport};
use crate::signals::{self, Ending};
use crate::spawn::{self, Streams};
use crate::tail::Tail;
use crate::watch::{Action, Event, Outcome, Patience, RankState, Watch, is_victim};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, WaitOptions};
use signal_hook::consts::signal::{SIGCHLD, SIGPIPE, SIGWINCH};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

/// How long to wait for the end of processes that were killed; one that hangs in the kernel may never end.
const AFTER_KILL: Duration = Duration::from_secs(3);

/// How long the sweep for left-over processes may take.
const SWEEP: Duration = Duration::from_millis(500);

/// A rank as the supervisor holds it.
struct Running {
    pid: Pid,
    alive: bool,
    pipes: [Option<File>; 2],
    stderr: Tail,
    log: Option<fs_err::File>,
}

/// The job while it runs.
struct Supervisor<'a> {
    plan: &'a LaunchPlan,
    console: &'a Console,
    began: Instant,
    ranks: Vec<Running>,
    guard: Guard,
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
    // Orphans of ranks become children of this process, so that they can be found and ended.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|e| LaunchError::System { what: "becoming the parent of orphans", source: e.into() })?;
    let world = plan.world_size();
    let mut supervisor = Supervisor {
        plan,
        console,
        began: Instant::now(),
        ranks: Vec::with_capacity(world),
        guard: Guard::start(),
        merger: Merger::new(world, [io::stdout().is_terminal(), io::stderr().is_terminal()]),
        watch: Watch::new(world, Patience::default()),
        killed_at: None,
        out_of_memory: OutOfMemory::watch(),
    };
    if let Err(error) = supervisor.start() {
        supervisor.signal(Signal::KILL);
        supervisor.sweep();
        return Err(error);
    }
    supervisor.watch_over(&mut inbox)?;
    Ok(supervisor.conclude())
}

impl Supervisor<'_> {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Starts every rank.
    fn start(&mut self) -> Result<(), LaunchError> {
        let mut logs = match &self.plan.rank_log_dir {
            Some(folder) => logs::create(folder, self.plan.world_size(), SystemTime::now())?,
            None => Vec::new(),
        }
        .into_iter();
        let secret = new_secret()?;
        let launcher = rustix::process::getpid();
        for rank in &self.plan.ranks {
            let started = spawn::start(rank, &secret, streams(rank.rank), launcher)?;
            self.guard.started(started.pid);
            self.ranks.push(Running {
                pid: started.pid,
                alive: true,
                pipes: [Some(started.stdout), Some(started.stderr)],
                stderr: Tail::default(),
                log: logs.next(),
            });
        }
        Ok(())
    }

    /// Passes the terminal's new size on to rank 0.
    fn resize(&self) {
        if let Some(Running { pipes: [stdout, stderr], .. }) = self.ranks.first() {
            if let Some(ours) = stdout.as_ref().filter(|_| io::stdout().is_terminal()) {
                pty::resize(ours, io::stdout());
            }
            if let Some(ours) = stderr.as_ref().filter(|_| io::stderr().is_terminal()) {
                pty::resize(ours, io::stderr());
            }
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
        for (index, rank) in self.ranks.iter().enumerate() {
            for stream in [Stream::Stdout, Stream::Stderr] {
                if let Some(pipe) = &rank.pipes[stream as usize] {
                    sources.push((index, stream));
                    fds.push(PollFd::new(pipe, PollFlags::IN));
                }
            }
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
        let now = self.now();
        let rank = &mut self.ranks[index];
        let slot = &mut rank.pipes[stream as usize];
        let Some(pipe) = slot else { return false };
        let length = match pipe.read(&mut buffer) {
            Ok(0) => {
                *slot = None;
                return false;
            }
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            // How a pseudo-terminal says that nobody holds its other end any more.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                *slot = None;
                return false;
            }
            Err(error) => {
                *slot = None;
                self.console.warn(&format!("output of rank {index} is lost: {error}"));
                return false;
            }
        };
        let bytes = &buffer[..length];
        if stream == Stream::Stderr {
            rank.stderr.push(bytes);
        }
        if let Some(log) = &mut rank.log
            && let Err(error) = log.write_all(bytes)
        {
            self.console.warn(&format!("the log of rank {index} ends here: {error}"));
            rank.log = None;
        }
        let outputs = self.merger.push(now, index, stream, bytes);
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
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let Some(index) = self.ranks.iter().position(|rank| rank.alive && rank.pid == pid) else {
                continue;
            };
            let ending = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ending::Code(code),
                (None, Some(signal)) => Ending::Signal(signal),
                // Stopped or continued: not an end.
                (None, None) => continue,
            };
            self.ranks[index].alive = false;
            self.guard.ended(pid);
            for stream in [Stream::Stdout, Stream::Stderr] {
                while self.read(index, stream) {}
            }
            let rest = self.merger.finish(index);
            self.write(rest);
            let victim = is_victim(&self.ranks[index].stderr.last_words());
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
                self.signal(
                    Signal::from_named_raw(signal).filter(|s| *s != Signal::PIPE).unwrap_or(Signal::TERM),
                );
            }
            Action::Terminate => self.signal(Signal::TERM),
            Action::Kill => {
                self.killed_at = Some(now);
                self.signal(Signal::KILL);
            }
        }
    }

    /// Says something on a fresh line.
    fn announce(&mut self, text: &str) {
        let ends = self.merger.end_lines();
        self.write(ends);
        self.console.info(text);
    }

    /// Sends a signal to the process group of every rank that still runs.
    fn signal(&self, signal: Signal) {
        for rank in self.ranks.iter().filter(|rank| rank.alive) {
            // The only possible failure is that the group is gone, which is what the signal is for.
            let _ = rustix::process::kill_process_group(rank.pid, signal);
        }
    }

    /// Ends what the ranks have left behind, whatever group or session it has moved to.
    fn sweep(&self) {
        let began = Instant::now();
        let mut pause = Duration::from_micros(200);
        loop {
            while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
            let left = descendants::of(rustix::process::getpid());
            if left.is_empty() || began.elapsed() > SWEEP {
                return;
            }
            for pid in left {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(20));
        }
    }

    /// Cleans up and says how it went.
    fn conclude(&mut self) -> u8 {
        let outcome = self.watch.outcome().unwrap_or(Outcome::Success);
        if outcome != Outcome::Success {
            self.sweep();
        }
        let ends = self.merger.end_lines();
        self.write(ends);
        match outcome {
            Outcome::Success => {}
            Outcome::Failed { cause, ending } => {
                let report = self.report(cause, ending, outcome.exit_code());
                self.console.report(&report.to_string());
            }
            Outcome::Interrupted(signal) => {
                let name = signals::name(signal).unwrap_or("a signal");
                self.console.info(&format!("ended by {name}; no rank is left"));
            }
        }
        let stuck: Vec<usize> = (0..self.ranks.len()).filter(|rank| self.ranks[*rank].alive).collect();
        if !stuck.is_empty() {
            let mut text = format!("{} cannot be ended (they hang in the kernel):", report::ranks(&stuck));
            for rank in stuck {
                let _ = write!(text, " process {}", self.ranks[rank].pid);
            }
            self.console.report(&text);
        }
        outcome.exit_code()
    }

    fn report(&self, cause: usize, ending: Ending, exit_code: u8) -> FailureReport {
        let pid = self.ranks[cause].pid.as_raw_nonzero().get();
        let last_lines = self.ranks[cause].stderr.last_lines();
        let mut report = FailureReport {
            rank: cause,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid,
            ending,
            after: Duration::ZERO,
            evidence: matches!(ending, Ending::Signal(9) | Ending::Code(137))
                .then(|| self.out_of_memory.explain(pid)),
            last_lines,
            same: Vec::new(),
            also: Vec::new(),
            torn_down: Vec::new(),
            finished: Vec::new(),
            log: self.ranks[cause].log.as_ref().map(|log| PathBuf::from(log.path())),
            exit_code,
        };
        for (rank, state) in self.watch.ranks().iter().enumerate() {
            match *state {
                RankState::Ended { at, .. } if rank == cause => report.after = at,
                RankState::Ended { ending, .. } if ending.is_success() => report.finished.push(rank),
                RankState::Ended { ending, .. } => {
                    let lines = self.ranks[rank].stderr.last_lines();
                    if report::is_same_end(&report.last_lines, &lines) {
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

fn write_all(to: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// 32 random bytes in hexadecimal.
fn new_secret() -> Result<String, LaunchError> {
    let mut bytes = [0; 32];
    fs_err::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|source| LaunchError::File { what: "no random numbers for the job's secret", source })?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}
