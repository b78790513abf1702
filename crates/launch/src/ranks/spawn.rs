//! The start of one rank: its own process group, tied to the launcher's life, its outputs piped.

use crate::error::LaunchError;
use crate::plan::RankPlan;
use rustix::process::{Pid, Signal};
use rustix::thread::CpuSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Where a rank's inputs and outputs go.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) stdin: Stdio,
    /// A pseudo-terminal's two ends, the launcher's first, for stdout and stderr; `None`: a pipe.
    pub(crate) terminals: [Option<(OwnedFd, OwnedFd)>; 2],
}

/// A rank's process and the reading ends of its outputs, which do not block.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) stdout: File,
    pub(crate) stderr: File,
}

/// Starts a rank; `private` variables are in no plan.
///
/// Must be called on the thread that lives as long as the job: the kernel sends the parent-death signal when the *thread* that
/// started the process ends.
pub(crate) fn start(
    rank: &RankPlan,
    private: &[(&str, &str)],
    streams: Streams,
    launcher: Pid,
) -> Result<Started, LaunchError> {
    let program = PathBuf::from(&rank.command[0]);
    let error = |source: io::Error| LaunchError::Spawn { rank: rank.rank, program: program.clone(), source };
    let [stdout, stderr] = streams.terminals.map(|ends| match ends {
        Some((ours, theirs)) => (Some(ours), Stdio::from(theirs)),
        None => (None, Stdio::piped()),
    });
    let mut command = Command::new(&program);
    command
        .args(&rank.command[1..])
        .envs(&rank.env)
        .envs(private.iter().copied())
        .stdin(streams.stdin)
        .stdout(stdout.1)
        .stderr(stderr.1)
        .process_group(0);
    tie_to_launcher(&mut command, launcher, rank.cores.as_deref());
    let mut child = command.spawn().map_err(error)?;
    let pid = Pid::from_child(&child);
    let reading_end = |end: Option<OwnedFd>| -> io::Result<File> {
        let end = end.expect("invariant: an output is a terminal or a pipe");
        rustix::io::ioctl_fionbio(&end, true)?;
        Ok(File::from(end))
    };
    let stdout = reading_end(stdout.0.or_else(|| child.stdout.take().map(OwnedFd::from))).map_err(error)?;
    let stderr = reading_end(stderr.0.or_else(|| child.stderr.take().map(OwnedFd::from))).map_err(error)?;
    Ok(Started { pid, stdout, stderr })
}

/// Makes the child die when the launcher does, even by SIGKILL, and binds it to its cores.
pub(crate) fn tie_to_launcher(command: &mut Command, launcher: Pid, cores: Option<&[usize]>) {
    tie(command, launcher, Signal::KILL, cores);
}

/// Sends the child this signal when its parent, this thread, ends in whatever way, and binds it to its cores.
#[expect(
    unsafe_code,
    reason = "the parent-death signal can only be asked for by the child itself, before it becomes the program"
)]
pub(crate) fn tie(command: &mut Command, parent: Pid, signal: Signal, cores: Option<&[usize]>) {
    let cores: Option<CpuSet> = cores.map(|list| {
        let mut set = CpuSet::new();
        for core in list {
            set.set(*core);
        }
        set
    });
    // SAFETY: the closure runs in the child between fork and exec, where only what is async-signal-safe is allowed. It makes three
    // system calls through rustix, which neither allocate nor take locks, on data that was copied into it before the fork.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(signal))?;
            // The parent may have died before the line above; then nobody would send the signal.
            if rustix::process::getppid() != Some(parent) {
                return Err(rustix::io::Errno::SRCH.into());
            }
            if let Some(cores) = &cores {
                rustix::thread::sched_setaffinity(None, cores)?;
            }
            Ok(())
        });
    }
}
