//! The end of the ranks and all that they have started when the process that holds them (the launcher, or a host's agent) is killed or
//! stopped and cannot see to it.
//!
//! ```text
//!   launcher or agent ==== pipe ====> guard: this command again, in a group of its own, with an empty environment
//!        |  job MARK                    |
//!        |  start GROUP, end GROUP      |  which process groups live
//!        |  beat                        |  agents only: silence means that it is stopped
//!        |  done                        |  nothing is left to be ended
//!        X  the pipe closes             |  SIGKILL to the living groups, then to every process that has the mark in its environment,
//!                                       |  and to what descends from those
//! ```
//!
//! The kernel ends the ranks themselves (the parent-death signal). The guard finds the others: a process that has moved to a group or a
//! session of its own still has the environment that it was started with.

use crate::ranks::descendants;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// The variable by which the processes of one holder are known: random, new for each attempt and each host.
pub(crate) const MARK_VARIABLE: &str = "DS_JOB_MARK";

/// The hidden command that the guard runs.
pub const GUARD_COMMAND: &str = "__guard";

/// How often the guard of an agent hears from it.
const BEAT: Duration = Duration::from_secs(1);

/// An agent that has said nothing for so many seconds of the guard's own time is stopped. Longer than a launcher waits for it.
const SILENT: u32 = 8;

/// How long the guard looks for what is left.
const SEARCH: Duration = Duration::from_secs(5);

/// The line to the guard; the guard ends when this value does.
#[derive(Debug)]
pub(crate) struct Guard {
    line: Option<ChildStdin>,
}

impl Guard {
    /// Starts the guard. Where it cannot be had, the ranks themselves still die with this process.
    pub(crate) fn start() -> Self {
        let started = Command::new("/proc/self/exe")
            .arg0("deepspeed-guard")
            .arg(GUARD_COMMAND)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        Self { line: started.ok().and_then(|mut child| child.stdin.take()) }
    }

    /// By what the job's processes on this host are known.
    pub(crate) fn job(&mut self, mark: &str) {
        self.tell(&format!("job {mark}"));
    }

    /// A rank's group lives.
    pub(crate) fn started(&mut self, group: Pid) {
        self.tell(&format!("start {group}"));
    }

    /// A rank is over; its number may be used for another group from now on.
    pub(crate) fn ended(&mut self, group: Pid) {
        self.tell(&format!("end {group}"));
    }

    /// Says every second from now on, on a thread of its own, that this process is not stopped. Silence is taken for its end.
    ///
    /// # Errors
    /// There is no thread or no descriptor to be had.
    pub(crate) fn beat(&self) -> io::Result<()> {
        let Some(line) = &self.line else { return Ok(()) };
        let mut line = File::from(line.as_fd().try_clone_to_owned()?);
        let beat = move || {
            while line.write_all(b"beat\n").is_ok() {
                std::thread::sleep(BEAT);
            }
        };
        std::thread::Builder::new().name("guard".into()).spawn(beat).map(drop)
    }

    /// All that was to be ended is ended.
    pub(crate) fn done(&mut self) {
        self.tell("done");
    }

    fn tell(&mut self, line: &str) {
        // In one piece: the beats go through the same pipe.
        if let Some(pipe) = &mut self.line
            && pipe.write_all(format!("{line}\n").as_bytes()).is_err()
        {
            self.line = None;
        }
    }
}

/// What the guard knows.
#[derive(Debug, Default)]
struct Known {
    /// The entry of the environment by which the job's processes on this host are known.
    mark: Option<Vec<u8>>,
    /// Process groups of living ranks.
    living: Vec<Pid>,
    /// Seconds without a word, where words are to be expected.
    silent: Option<u32>,
    done: bool,
}

impl Known {
    fn take_in(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let group = |word: Option<&str>| word.and_then(|word| Pid::from_raw(word.parse().ok()?));
        match words.next() {
            Some("job") => {
                self.mark = words.next().map(|mark| format!("{MARK_VARIABLE}={mark}").into_bytes());
            }
            Some("start") => self.living.extend(group(words.next())),
            Some("end") => {
                let ended = group(words.next());
                self.living.retain(|living| Some(*living) != ended);
            }
            Some("beat") => self.silent = Some(0),
            Some("done") => self.done = true,
            _ => {}
        }
    }

    /// A second has passed without a word; whether that is one too many.
    fn is_silent_for_long(&mut self) -> bool {
        self.silent = self.silent.map(|seconds| seconds + 1);
        self.silent.is_some_and(|seconds| seconds >= SILENT)
    }
}

/// The guard's whole life.
pub(crate) fn run() {
    let holder = rustix::process::getppid();
    let mut known = Known::default();
    if await_the_end(&mut known) == End::Silence
        && let Some(holder) = holder.filter(|holder| rustix::process::getppid() == Some(*holder))
    {
        // It hangs or is stopped, and must not wake up to a job that is gone.
        let _ = rustix::process::kill_process(holder, Signal::KILL);
    }
    if !known.done {
        end_all(&known);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The pipe is closed: the process at its other end is gone, or has no more to say.
    Closed,
    /// That process is there and says nothing.
    Silence,
}

/// Takes in what is said until nothing more comes.
fn await_the_end(known: &mut Known) -> End {
    let stdin = io::stdin();
    let mut text: Vec<u8> = Vec::new();
    loop {
        // Whole seconds of waiting are counted, not the clock: after the machine has slept, nobody has been silent.
        let second = known.silent.map(|_| Timespec { tv_sec: 1, tv_nsec: 0 });
        let mut fds = [PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut fds, second.as_ref()) {
            Ok(0) if known.is_silent_for_long() => return End::Silence,
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return End::Closed,
        }
        let mut buffer = [0; 4096];
        match rustix::io::read(&stdin, &mut buffer) {
            Ok(0) => return End::Closed,
            Ok(length) => text.extend_from_slice(&buffer[..length]),
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return End::Closed,
        }
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            known.take_in(&String::from_utf8_lossy(&line));
        }
    }
}

/// Ends every process of the job on this host.
fn end_all(known: &Known) {
    for group in &known.living {
        // The only possible failure is that the group is gone, which is what the signal is for.
        let _ = rustix::process::kill_process_group(*group, Signal::KILL);
    }
    let began = Instant::now();
    while let Some(mark) = known.mark.as_ref().filter(|_| began.elapsed() < SEARCH) {
        let left = descendants::marked(mark);
        if left.is_empty() {
            return;
        }
        for pid in left {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_known() {
        let mut known = Known::default();
        for line in ["job abc\n", "start 12\n", "start 13\n", "end 12\n", "nonsense\n", "start x\n", "\n"] {
            known.take_in(line);
        }
        assert_eq!(known.mark, Some(b"DS_JOB_MARK=abc".to_vec()));
        assert_eq!(known.living, [Pid::from_raw(13).unwrap()]);
        assert!(!known.is_silent_for_long() && !known.done);
        known.take_in("done\n");
        assert!(known.done);
    }

    #[test]
    fn silence_counts_from_the_last_beat() {
        let mut known = Known::default();
        known.take_in("beat\n");
        for _ in 0..3 {
            for _ in 1..SILENT {
                assert!(!known.is_silent_for_long());
            }
            known.take_in("beat\n");
        }
        for _ in 1..SILENT {
            assert!(!known.is_silent_for_long());
        }
        assert!(known.is_silent_for_long());
    }
}
