//! A pseudo-terminal for rank 0's output where the launcher's own is a terminal, so that progress bars and colours appear as they
//! would without a launcher in between.

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Opens a pseudo-terminal of the size of the terminal `like`; returns the launcher's end and the rank's end.
///
/// Bytes pass unchanged: the real terminal turns line feeds into new lines, not this one.
pub(crate) fn open(like: impl AsFd) -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&ours)?;
    rustix::pty::unlockpt(&ours)?;
    let name = rustix::pty::ptsname(&ours, Vec::new())?;
    let theirs = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    let mut settings = rustix::termios::tcgetattr(&theirs)?;
    settings.make_raw();
    rustix::termios::tcsetattr(&theirs, OptionalActions::Now, &settings)?;
    resize(&theirs, like);
    Ok((ours, theirs))
}

/// Gives a pseudo-terminal the size of the terminal `like`.
pub(crate) fn resize(pty: impl AsFd, like: impl AsFd) {
    if let Ok(size) = rustix::termios::tcgetwinsize(like) {
        // A program that does not learn the size uses a default one.
        let _ = rustix::termios::tcsetwinsize(pty, size);
    }
}
