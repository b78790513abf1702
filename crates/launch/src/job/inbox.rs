//! Signals to the launcher as bytes in pipes, so that one `poll` waits for them and for the ranks' output alike.

use crate::error::LaunchError;
use fs_err as fs;
use signal_hook::consts::signal::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// The pipes, one for each signal.
#[derive(Debug)]
pub(crate) struct Inbox {
    pipes: Vec<(i32, UnixStream)>,
}

impl Inbox {
    /// Starts to catch SIGCHLD, SIGTERM, SIGWINCH, and, unless they are ignored (`nohup`, a shell's background job), SIGINT and SIGHUP.
    pub(crate) fn open() -> Result<Self, LaunchError> {
        let error = |source: io::Error| LaunchError::System { what: "catching signals", source };
        let ignored = fs::read_to_string("/proc/self/status").map_or(0, |status| ignored_signals(&status));
        let mut pipes = Vec::new();
        for signal in [SIGCHLD, SIGTERM, SIGWINCH, SIGINT, SIGHUP] {
            if matches!(signal, SIGINT | SIGHUP) && ignored & (1 << (signal - 1)) != 0 {
                continue;
            }
            let (receiver, sender) = UnixStream::pair().map_err(error)?;
            receiver.set_nonblocking(true).map_err(error)?;
            signal_hook::low_level::pipe::register(signal, sender).map_err(error)?;
            pipes.push((signal, receiver));
        }
        Ok(Self { pipes })
    }

    /// The pipes to poll.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.pipes.iter().map(|(_, pipe)| pipe.as_fd())
    }

    /// The signals that have arrived since the last call; each once.
    pub(crate) fn take(&mut self) -> Vec<i32> {
        let mut arrived = Vec::new();
        for (signal, pipe) in &mut self.pipes {
            let mut bytes = [0; 64];
            let mut any = false;
            while pipe.read(&mut bytes).is_ok_and(|length| length > 0) {
                any = true;
            }
            if any {
                arrived.push(*signal);
            }
        }
        arrived
    }
}

/// The mask of ignored signals in a `/proc/<pid>/status`.
fn ignored_signals(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_read() {
        assert_eq!(ignored_signals("Name:\tx\nSigIgn:\t0000000000001003\n"), 0x1003);
        assert_eq!(ignored_signals("Name:\tx\n"), 0);
    }
}
