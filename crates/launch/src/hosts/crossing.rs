//! The way to the hosts through pdsh, mpirun or srun: one process that starts an agent on each, which call back.

use crate::error::LaunchError;
use crate::hosts::callers::Callers;
use crate::hosts::connection::unblock;
use crate::hosts::listen;
use crate::plan::hosts_plan::HostsPlan;
use crate::ranks::spawn;
use crate::reach::CallBack;
use crate::reach::runner::Runner;
use crate::reach::runner_error;
use crate::wire::handshake;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal};
use std::io::{self, Read};
use std::net::TcpStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// So much of what the runner says is kept.
const KEPT: usize = 64 * 1024;

/// Longer lines of its output are no announcements.
const LONGEST_LINE: usize = 8 * 1024;

/// How long the runner may go on after it has said that a host cannot be reached, in case it tries again.
const AGAIN: Duration = Duration::from_secs(3);

/// How long the runner may take to end when its agents have, and again when it was told to.
const END: Duration = Duration::from_millis(1500);

/// The runner's process and the agents that call.
#[derive(Debug)]
pub(crate) struct Crossing {
    runner: Runner,
    hosts: Vec<String>,
    child: Child,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    line: Vec<u8>,
    said: Vec<u8>,
    callers: Callers,
    notes: Vec<String>,
    /// Since when there are words of a host that cannot be reached.
    alarmed: Option<Instant>,
    over: bool,
    /// Whether srun asks Slurm for a job of its own.
    asks_for_job: bool,
}

/// What one look has brought.
#[derive(Debug, Default)]
pub(crate) struct Tended {
    /// Agents that have called, each with its host.
    pub(crate) agents: Vec<(usize, TcpStream)>,
    /// What the runner says that the user should know at once.
    pub(crate) notes: Vec<String>,
    /// Hosts that will not answer, each with the reason, though the runner goes on.
    pub(crate) failed: Vec<(usize, String)>,
    /// The runner is over: what that means for each host that has no agent, and for those that have.
    pub(crate) over: Option<(Vec<String>, String)>,
}

impl Crossing {
    /// Starts the runner.
    ///
    /// # Errors
    /// It cannot be started, or this machine has no address at which agents can call.
    pub(crate) fn open(plan: &HostsPlan) -> Result<Self, LaunchError> {
        let hosts: Vec<&str> = plan.parts.iter().map(|part| part.host.as_str()).collect();
        let listeners = listen::listeners(&plan.reach.launcher_addr, &hosts)?;
        let addresses = listen::describe(&listeners)?;
        let callers = Callers::new(listeners, hosts.len())?;
        let call_back = CallBack { addresses, fingerprint: callers.fingerprint() };
        let line = plan.reach.lines(&plan.parts, &call_back).swap_remove(0);
        let error =
            |source: io::Error| LaunchError::System { what: "starting the launcher's runner", source };
        let mut command = Command::new(&line[0]);
        // In a group of its own, a Ctrl-C at the terminal does not reach it before the ranks have been told.
        command
            .args(&line[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        spawn::tie_to_launcher(&mut command, rustix::process::getpid(), None);
        let mut child = command.spawn().map_err(error)?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        unblock(stdout.as_ref()).and_then(|()| unblock(stderr.as_ref())).map_err(error)?;
        Ok(Self {
            runner: plan.runner,
            hosts: hosts.into_iter().map(str::to_owned).collect(),
            child,
            stdout,
            stderr,
            line: Vec::new(),
            said: Vec::new(),
            callers,
            notes: Vec::new(),
            alarmed: None,
            over: false,
            asks_for_job: plan.runner == Runner::Slurm && !plan.reach.in_slurm_job,
        })
    }

    /// What to wait for. That the runner ends is told by SIGCHLD.
    pub(crate) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let stdout = self.stdout.as_ref().map(|stdout| PollFd::new(stdout, PollFlags::IN));
        let stderr = self.stderr.as_ref().map(|stderr| PollFd::new(stderr, PollFlags::IN));
        self.callers.poll_fds().chain(stdout).chain(stderr)
    }

    /// Takes in what the runner says and who calls.
    pub(crate) fn tend(&mut self) -> Tended {
        self.listen();
        let (runner, hosts) = (self.runner, &self.hosts);
        let agents = self.callers.tend(|place| host_of(runner, hosts, place));
        let notes = std::mem::take(&mut self.notes);
        let mut tended = Tended { agents, notes, failed: self.unreachable(), over: None };
        if !self.over
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.over = true;
            self.listen();
            let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(0);
            tended.over = Some(self.explain(code));
        }
        tended
    }

    /// Hosts without an agent, once the runner has had its time to try again: those that its words name, or all where they name none.
    fn unreachable(&self) -> Vec<(usize, String)> {
        if self.over || self.alarmed.is_none_or(|since| since.elapsed() < AGAIN) {
            return Vec::new();
        }
        let said = String::from_utf8_lossy(&self.said);
        let missing = || self.hosts.iter().enumerate().filter(|(at, _)| !self.callers.is_announced(*at));
        let named = missing().any(|(_, host)| runner_error::names(&said, host));
        missing()
            .filter(|(_, host)| !named || runner_error::names(&said, host))
            .map(|(at, host)| (at, runner_error::unreachable(&said, host)))
            .collect()
    }

    /// What it means that the runner has ended with this code.
    fn explain(&self, code: i32) -> (Vec<String>, String) {
        let said = String::from_utf8_lossy(&self.said);
        let missing = self.hosts.iter().enumerate().map(|(at, host)| {
            runner_error::explain(self.runner, self.callers.is_announced(at), code, &said, host)
        });
        (missing.collect(), runner_error::lost(self.runner, code, &said))
    }

    /// Why a host that has not answered in time may not have.
    pub(crate) fn why_late(&self, at: usize) -> Option<String> {
        let said = String::from_utf8_lossy(&self.said);
        runner_error::late(self.callers.is_announced(at), &said, &self.hosts[at])
    }

    /// How many callers were no agents.
    pub(crate) fn strangers(&self) -> usize {
        self.callers.refused
    }

    fn listen(&mut self) {
        let mut buffer = [0; 16 * 1024];
        while let Some(stdout) = &mut self.stdout {
            match stdout.read(&mut buffer) {
                Ok(0) => self.stdout = None,
                Ok(length) => self.hear(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.stdout = None,
            }
        }
        while let Some(stderr) = &mut self.stderr {
            match stderr.read(&mut buffer) {
                Ok(0) => self.stderr = None,
                Ok(length) => self.keep(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.stderr = None,
            }
        }
    }

    /// Output, line by line: announcements, and what else a host's shell may print.
    fn hear(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < LONGEST_LINE {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).into_owned();
            self.line.clear();
            match handshake::find_announcement(&line) {
                Some((place, print)) => {
                    if let Some(at) = host_of(self.runner, &self.hosts, &place) {
                        self.callers.announce(at, print);
                    }
                }
                None => self.keep(format!("{line}\n").as_bytes()),
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.runner == Runner::Slurm {
            // The wait for an allocation may be long.
            let text = String::from_utf8_lossy(bytes);
            self.notes
                .extend(text.lines().filter(|line| line.contains("queued and waiting")).map(str::to_owned));
        }
        if self.alarmed.is_none() && runner_error::is_alarming(&String::from_utf8_lossy(bytes)) {
            self.alarmed = Some(Instant::now());
        }
        self.said.extend_from_slice(bytes);
        let surplus = self.said.len().saturating_sub(KEPT);
        self.said.drain(..surplus);
    }

    /// Waits for the runner, whose agents are over, and ends it if it does not end. What it still says is taken in, so that nobody waits
    /// for that. `slurm_job` is the job of the agents, if it is known: Slurm would keep its nodes if its srun was killed.
    pub(crate) fn close(&mut self, slurm_job: Option<&str>) {
        let code = self.end();
        if self.asks_for_job
            && code.is_none()
            && let Some(job) = slurm_job
        {
            // Where there is no scancel there was no srun.
            let cancelled = Command::new("scancel")
                .arg(job)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn();
            if let Ok(mut child) = cancelled {
                await_end(&mut child, END);
                // It has ended, or the controller does not answer.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }

    /// Ends the runner; its exit code, or none where a signal has ended it.
    fn end(&mut self) -> Option<i32> {
        let group = Pid::from_child(&self.child);
        for signal in [Signal::TERM, Signal::KILL] {
            let began = Instant::now();
            while began.elapsed() < END {
                self.listen();
                if let Some(status) = await_end(&mut self.child, Duration::from_millis(2)) {
                    return status.code();
                }
            }
            // With it its ssh clients.
            let _ = rustix::process::kill_process_group(group, signal);
        }
        None
    }
}

fn await_end(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if began.elapsed() < patience => std::thread::sleep(Duration::from_millis(1)),
            _ => return None,
        }
    }
}

impl Drop for Crossing {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = rustix::process::kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// The host of a place: its number by pdsh and mpirun, its name by Slurm, which has an order of its own.
fn host_of(runner: Runner, hosts: &[String], place: &str) -> Option<usize> {
    if runner != Runner::Slurm {
        return place.parse().ok().filter(|at| *at < hosts.len());
    }
    let short = |name: &str| name.split('.').next().unwrap_or(name).to_owned();
    hosts
        .iter()
        .position(|host| host == place)
        .or_else(|| hosts.iter().position(|host| short(host) == short(place)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let hosts = ["a-1".to_owned(), "a-2.local".to_owned()];
        assert_eq!(host_of(Runner::Slurm, &hosts, "a-2"), Some(1));
        assert_eq!(host_of(Runner::Slurm, &hosts, "0"), None);
        assert_eq!(host_of(Runner::Pdsh, &hosts, "1"), Some(1));
        assert_eq!(host_of(Runner::Mpich, &hosts, "2"), None);
        assert_eq!(host_of(Runner::OpenMpi, &hosts, "a-1"), None);
    }
}
