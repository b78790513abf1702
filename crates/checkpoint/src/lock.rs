//! Tells a checkpoint that somebody is writing from one whose writer died: a locked file beside the temporary folder.
//!
//! The system releases the lock when the process ends, however it ends. The file exists and is locked before the
//! folder appears, and is removed after the folder is gone, so a folder whose lock can be taken has no writer.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{fs::FlockOperation, io::Errno};

use crate::disk;

/// How long [`acquire`] waits for a process that holds the lock.
const MAX_WAIT: Duration = Duration::from_secs(3);
/// How often it tries.
const RETRY: Duration = Duration::from_millis(5);

/// The lock file of the folder at `folder`.
pub(crate) fn lock_path(folder: &Path) -> PathBuf {
    let mut name = folder.file_name().unwrap_or_default().to_owned();
    name.push(".lock");
    folder.with_file_name(name)
}

/// A lock that is held until dropped; on file systems without locks it only marks the place.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a process that was just forked for another purpose shares the lock until it execs.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

/// Creates and locks the file at `path`.
///
/// The only other process that may hold it for a moment is one that looks for leftovers.
pub(crate) fn acquire(path: &Path) -> io::Result<Lock> {
    let patience = Instant::now() + MAX_WAIT;
    loop {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let lock = Lock(file);
                if is_at(&lock.0, path)? {
                    return Ok(lock);
                }
                // Somebody who cleans up took it for a leftover and removed it: make another.
            }
            Err(Errno::WOULDBLOCK) if Instant::now() < patience => std::thread::sleep(RETRY),
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, "another process holds it"));
            }
            Err(error) if disk::is_unsupported(&error.into()) => return Ok(Lock(file)),
            Err(error) => return Err(error.into()),
        }
    }
}

/// What is known about the writer of a temporary folder.
#[derive(Debug)]
pub(crate) enum Owner {
    /// It lives, or the file system cannot tell.
    MayLive,
    /// It is gone; the lock is ours now.
    Dead(#[expect(dead_code, reason = "held, not read")] Lock),
    /// There is no lock file.
    NoLock,
}

/// Finds out about the writer whose lock file is at `path`.
pub(crate) fn owner(path: &Path) -> io::Result<Owner> {
    let file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Owner::NoLock),
        Err(error) => return Err(error),
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Owner::Dead(Lock(file))),
        Err(Errno::WOULDBLOCK) => Ok(Owner::MayLive),
        Err(error) if disk::is_unsupported(&error.into()) => Ok(Owner::MayLive),
        Err(error) => Err(error.into()),
    }
}

/// Whether `path` still names this very file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let ours = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_lock_can_be_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        assert!(matches!(owner(&path).unwrap(), Owner::NoLock));
        let lock = acquire(&path).unwrap();
        assert!(matches!(owner(&path).unwrap(), Owner::MayLive));
        assert!(acquire(&path).is_err());
        drop(lock);
        assert!(matches!(owner(&path).unwrap(), Owner::Dead(_)));
    }
}
