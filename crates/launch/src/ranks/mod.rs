//! The ranks of this host as processes: started, read, signalled, collected. What is to be done with them is decided elsewhere, by
//! [`crate::job::supervise`] in a job on one host and by the launcher at the other end of the connection in [`crate::agent`].
//!
//! - RANKS-1: a rank that is alive is in a process group of its own and dies with this process.
//! - RANKS-2: after [`sweep`] no descendant of this process is left, but for those that hang in the kernel.

pub(crate) mod descendants;
pub(crate) mod evidence;
pub(crate) mod guard;
pub(crate) mod logs;
pub(crate) mod pty;
pub(crate) mod signals;
pub(crate) mod spawn;

use crate::error::LaunchError;
use crate::oversight::merge::Stream;
use crate::oversight::tail::Tail;
use crate::plan::{LaunchPlan, SECRET_VARIABLE};
use crate::ranks::evidence::{Evidence, OutOfMemory, Remains};
use crate::ranks::guard::{Guard, MARK_VARIABLE};
use crate::ranks::signals::Ending;
use crate::ranks::spawn::Streams;
use crate::secret;
use deepspeed_monitor::{PROGRESS_VARIABLE, ProgressFile};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions};
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How long the sweep for left-over processes may take.
const SWEEP: Duration = Duration::from_millis(1500);

struct Running {
    pid: Pid,
    alive: bool,
    pipes: [Option<File>; 2],
    log: Option<fs_err::File>,
    /// The end of its stderr.
    tail: Tail,
    /// Which step it is in; `None` where there is no descriptor left for it.
    progress: Option<ProgressFile>,
    /// What there was to be seen of it after its end.
    remains: Remains,
}

/// The ranks of this host, by local rank.
pub(crate) struct Ranks {
    ranks: Vec<Running>,
    guard: Guard,
    out_of_memory: OutOfMemory,
}

/// What came out of a pipe.
#[derive(Debug)]
pub(crate) enum Chunk {
    /// So many bytes.
    Bytes(usize),
    /// Nothing at the moment, but there may be more at once.
    Again,
    /// Nothing at the moment, or ever.
    Nothing,
    /// The rest is lost.
    Lost(io::Error),
}

/// What became of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// It is over.
    Ended(Ending),
    /// This signal has stopped it.
    Stopped(i32),
    /// It goes on.
    Continued,
}

impl Ranks {
    /// None yet.
    ///
    /// # Errors
    /// This process cannot become the parent of orphans.
    pub(crate) fn new() -> Result<Self, LaunchError> {
        // Orphans of ranks become children of this process, so that they can be found and ended.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(|e| LaunchError::System { what: "becoming the parent of orphans", source: e.into() })?;
        Ok(Self { ranks: Vec::new(), guard: Guard::start(), out_of_memory: OutOfMemory::watch() })
    }

    /// Starts every rank of the plan, with the job's secret if there is one. After an error, those that were started are ended.
    ///
    /// # Errors
    /// A log file or a rank that cannot be had.
    pub(crate) fn start(
        &mut self,
        plan: &LaunchPlan,
        secret: Option<&str>,
        streams: impl FnMut(usize) -> Streams,
    ) -> Result<(), LaunchError> {
        let started = self.start_each(plan, secret, streams);
        if started.is_err() {
            self.signal(Signal::KILL);
            sweep();
        }
        started
    }

    fn start_each(
        &mut self,
        plan: &LaunchPlan,
        secret: Option<&str>,
        mut streams: impl FnMut(usize) -> Streams,
    ) -> Result<(), LaunchError> {
        let mut logs = match &plan.rank_log_dir {
            Some(folder) => logs::create(folder, plan.ranks.iter().map(|rank| rank.rank), SystemTime::now())?,
            None => Vec::new(),
        }
        .into_iter();
        let launcher = rustix::process::getpid();
        let mark = secret::new()?;
        self.guard.job(&mark);
        for (index, rank) in plan.ranks.iter().enumerate() {
            // Without it the launcher does not know the step of a failure, and that is all.
            let progress = ProgressFile::create().ok();
            let path = progress.as_ref().map(ProgressFile::path);
            let mut private = vec![(MARK_VARIABLE, mark.as_str())];
            private.extend(secret.map(|secret| (SECRET_VARIABLE, secret)));
            private.extend(path.as_deref().map(|path| (PROGRESS_VARIABLE, path)));
            let started = spawn::start(rank, &private, streams(index), launcher)?;
            self.guard.started(started.pid);
            self.ranks.push(Running {
                pid: started.pid,
                alive: true,
                pipes: [Some(started.stdout), Some(started.stderr)],
                log: logs.next(),
                tail: Tail::default(),
                progress,
                remains: Remains::default(),
            });
        }
        Ok(())
    }

    /// Tells the guard from now on that this process is not stopped; when it is, the guard ends it and all that it holds.
    ///
    /// # Errors
    /// There is no thread or no descriptor to be had.
    pub(crate) fn beat(&self) -> io::Result<()> {
        self.guard.beat()
    }

    /// Tells the guard that there is nothing left for it to end.
    pub(crate) fn dismiss_guard(&mut self) {
        self.guard.done();
    }

    /// The outputs that are still open.
    pub(crate) fn pipes(&self) -> impl Iterator<Item = (usize, Stream, &File)> {
        self.ranks.iter().enumerate().flat_map(|(index, rank)| {
            [Stream::Stdout, Stream::Stderr]
                .into_iter()
                .filter_map(move |stream| Some((index, stream, rank.pipes[stream as usize].as_ref()?)))
        })
    }

    /// An output, if it is still open.
    pub(crate) fn pipe(&self, index: usize, stream: Stream) -> Option<&File> {
        self.ranks.get(index)?.pipes[stream as usize].as_ref()
    }

    /// Takes what an output holds, up to one buffer.
    pub(crate) fn read(&mut self, index: usize, stream: Stream, buffer: &mut [u8]) -> Chunk {
        let rank = &mut self.ranks[index];
        let slot = &mut rank.pipes[stream as usize];
        let Some(pipe) = slot else { return Chunk::Nothing };
        match pipe.read(buffer) {
            Ok(0) => {
                *slot = None;
                Chunk::Nothing
            }
            Ok(length) => {
                if stream == Stream::Stderr {
                    rank.tail.push(&buffer[..length]);
                }
                Chunk::Bytes(length)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Chunk::Again,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Chunk::Nothing,
            Err(error) => {
                *slot = None;
                // How a pseudo-terminal says that nobody holds its other end any more.
                if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) {
                    Chunk::Nothing
                } else {
                    Chunk::Lost(error)
                }
            }
        }
    }

    /// Writes to the rank's log, if it has one; after an error it has none any more.
    pub(crate) fn log(&mut self, index: usize, bytes: &[u8]) -> io::Result<()> {
        let log = &mut self.ranks[index].log;
        let Some(file) = log else { return Ok(()) };
        let written = file.write_all(bytes);
        if written.is_err() {
            *log = None;
        }
        written
    }

    /// The path of the rank's log.
    pub(crate) fn log_path(&self, index: usize) -> Option<PathBuf> {
        self.ranks.get(index)?.log.as_ref().map(|log| PathBuf::from(log.path()))
    }

    /// What has become of a rank since the last call, one at a time; orphans are collected on the way.
    pub(crate) fn reap(&mut self) -> Option<(usize, Change)> {
        self.look_at_the_dead();
        let options = WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED;
        while let Ok(Some((pid, status))) = rustix::process::wait(options) {
            let Some(index) = self.ranks.iter().position(|rank| rank.alive && rank.pid == pid) else {
                continue;
            };
            let change = if let Some(code) = status.exit_status() {
                Change::Ended(Ending::Code(code))
            } else if let Some(signal) = status.terminating_signal() {
                Change::Ended(Ending::Signal(signal))
            } else if let Some(signal) = status.stopping_signal() {
                Change::Stopped(signal)
            } else if status.continued() {
                Change::Continued
            } else {
                continue;
            };
            if matches!(change, Change::Ended(_)) {
                self.ranks[index].alive = false;
                self.guard.ended(pid);
            }
            return Some((index, change));
        }
        None
    }

    /// Notes what can only be seen of a process between its end and its collection.
    fn look_at_the_dead(&mut self) {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        for rank in self.ranks.iter_mut().filter(|rank| rank.alive) {
            if let Ok(Some(_)) = rustix::process::waitid(WaitId::Pid(rank.pid), options) {
                rank.remains = Remains::of(rank.pid.as_raw_nonzero().get());
            }
        }
    }

    /// What can be said of a rank that has ended like this, if memory may have had to do with it; after all that it has written was
    /// read.
    pub(crate) fn evidence(&self, index: usize, ending: Ending) -> Option<Evidence> {
        let rank = &self.ranks[index];
        self.out_of_memory.explain(self.pid(index), ending, &rank.remains, &rank.tail.last_words())
    }

    /// The end of the rank's stderr.
    pub(crate) fn tail(&self, index: usize) -> &Tail {
        &self.ranks[index].tail
    }

    /// The step that the rank is or was in, counted from 1, if it has said so.
    pub(crate) fn step(&self, index: usize) -> Option<u64> {
        self.ranks.get(index)?.progress.as_ref()?.step()
    }

    /// Sends a signal to the process group of every rank that still runs.
    pub(crate) fn signal(&self, signal: Signal) {
        for rank in self.ranks.iter().filter(|rank| rank.alive) {
            // The only possible failure is that the group is gone, which is what the signal is for.
            let _ = rustix::process::kill_process_group(rank.pid, signal);
        }
    }

    /// Whether the rank still runs.
    pub(crate) fn is_alive(&self, index: usize) -> bool {
        self.ranks.get(index).is_some_and(|rank| rank.alive)
    }

    /// Whether any rank still runs.
    pub(crate) fn any_alive(&self) -> bool {
        self.ranks.iter().any(|rank| rank.alive)
    }

    /// The process of each rank.
    pub(crate) fn pid(&self, index: usize) -> i32 {
        self.ranks[index].pid.as_raw_nonzero().get()
    }

    /// How many were started.
    pub(crate) fn len(&self) -> usize {
        self.ranks.len()
    }
}

/// Ends what the ranks have left behind, whatever group or session it has moved to.
pub(crate) fn sweep() {
    let began = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        let left = descendants::of(rustix::process::getpid());
        if left.is_empty() {
            return;
        }
        // On a busy machine looking alone may take longer than the time for all of it: what was seen is ended in any case.
        for pid in left {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        if began.elapsed() > SWEEP {
            return;
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(Duration::from_millis(20));
    }
}
