//! What can go wrong between memory and the device, in words a user can act on.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use crate::Direction;

/// Why offloaded state could not be kept, read or written.
///
/// Cheap to clone: a [`Stream`](crate::Stream) keeps its first error and returns it from every later call.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OffloadError {
    /// No file can be made in the folder.
    #[error("cannot make a file for offloaded state in {} (nvme_path): {source}{}", folder.display(), folder_advice(source))]
    Folder {
        /// The folder, `nvme_path`.
        folder: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The state does not fit the disk.
    #[error(
        "{} of offloaded state do not fit in {} (nvme_path): {} are free; free space there, choose another \
         nvme_path, or train on more ranks",
        size(*asked), folder.display(), size(*free)
    )]
    NoSpace {
        /// The folder, `nvme_path`.
        folder: PathBuf,
        /// Bytes of this rank's state.
        asked: u64,
        /// Bytes free in the folder.
        free: u64,
    },
    /// The disk has room, but the system refuses to give it.
    #[error(
        "cannot reserve {} of offloaded state in {} (nvme_path), where {} are free: {source}{}",
        size(*asked), folder.display(), size(*free), reserve_advice(source)
    )]
    Reserve {
        /// The folder, `nvme_path`.
        folder: PathBuf,
        /// Bytes of this rank's state.
        asked: u64,
        /// Bytes free in the folder.
        free: u64,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A read or write failed.
    #[error(
        "{direction} of {bytes} bytes at offset {offset} of the offload file in {} failed: {source}{}",
        folder.display(), io_advice(source)
    )]
    Io {
        /// Read or write.
        direction: Direction,
        /// Where in the file.
        offset: u64,
        /// How many bytes were to be moved.
        bytes: usize,
        /// The folder, `nvme_path`.
        folder: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A read or write moved less than it was asked to, and will not move more.
    #[error(
        "{direction} of {bytes} bytes at offset {offset} of the offload file in {} moved {moved} and no more: the \
         filesystem has lost part of the file; check the disk, then resume from a checkpoint",
        folder.display()
    )]
    Short {
        /// Read or write.
        direction: Direction,
        /// Where in the file.
        offset: u64,
        /// How many bytes were to be moved.
        bytes: usize,
        /// How many were.
        moved: usize,
        /// The folder, `nvme_path`.
        folder: PathBuf,
    },
    /// The device has not answered for too long.
    #[error(
        "no answer for {:.0} s from the device behind {} (nvme_path), with {in_flight} requests in flight: see the \
         kernel's log for the device, then resume from a checkpoint",
        waited.as_secs_f64(), folder.display()
    )]
    Stalled {
        /// The folder, `nvme_path`.
        folder: PathBuf,
        /// Requests that are not answered.
        in_flight: usize,
        /// How long nothing came.
        waited: Duration,
    },
    /// An I/O thread ended before it had served a request.
    #[error("an I/O thread for the offload file in {} ended: the first panic above says why", folder.display())]
    Abandoned {
        /// The folder, `nvme_path`.
        folder: PathBuf,
    },
    /// The engine that was asked for cannot be used, or its threads cannot be started.
    #[error("cannot use {engine} for offloaded state: {reason}")]
    Engine {
        /// The engine.
        engine: &'static str,
        /// What refused it, and what to do.
        reason: String,
    },
    /// A setting is out of its range.
    #[error("{name} = {value} for offload: {expected}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// More regions were asked for than space was reserved for.
    #[error("a region of {asked} bytes does not fit: {taken} of the {capacity} bytes reserved in {} are taken", folder.display())]
    Exhausted {
        /// The folder, `nvme_path`.
        folder: PathBuf,
        /// Bytes of the region on disk.
        asked: u64,
        /// Bytes handed out before.
        taken: u64,
        /// Bytes reserved.
        capacity: u64,
    },
    /// The arguments of a call do not fit together.
    #[error("{call}: {problem}")]
    Arguments {
        /// The call.
        call: &'static str,
        /// What does not fit.
        problem: String,
    },
    /// The caller is a forked child; the threads that do the I/O stayed in its parent.
    #[error("the offload file in {} belongs to process {owner}; its forked child {child} cannot use it", folder.display())]
    Forked {
        /// The folder, `nvme_path`.
        folder: PathBuf,
        /// The process that made the store.
        owner: u32,
        /// The process that used it.
        child: u32,
    },
}

/// What to do when a file cannot be made.
fn folder_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; make the folder, or correct nvme_path",
        io::ErrorKind::NotADirectory => "; nvme_path must be a folder",
        io::ErrorKind::PermissionDenied => {
            "; give this user the right to write there, or choose another folder"
        }
        io::ErrorKind::ReadOnlyFilesystem => "; choose a folder on a disk that is mounted writable",
        io::ErrorKind::StorageFull => "; free space (or inodes) there, or choose another folder",
        _ => "",
    }
}

/// What to do when space is refused though it is there.
fn reserve_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => {
            "; another process took the space meanwhile: free some, or choose another folder"
        }
        io::ErrorKind::QuotaExceeded => "; ask for more quota, or choose another folder",
        io::ErrorKind::FileTooLarge => {
            "; the file is larger than the filesystem or `ulimit -f` allows: raise the limit, or train on more ranks"
        }
        _ => "",
    }
}

/// What to do when the device fails.
fn io_advice(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::IO) => {
            "; the device reports a fault: see the kernel's log, replace it, then resume from a checkpoint"
        }
        Some(rustix::io::Errno::NOSPC) => "; the disk is full: free space, then resume from a checkpoint",
        _ => "",
    }
}

/// A size for people: `1.5 GB`; below a kilobyte, in bytes.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if bytes < 1000 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        let texts = [0, 999, 1000, 999_949, 999_950, 12_000_000_000, u64::MAX].map(size);
        assert_eq!(texts, ["0 bytes", "999 bytes", "1.0 kB", "999.9 kB", "1.0 MB", "12.0 GB", "18446.7 PB"]);
    }

    #[test]
    fn a_device_fault_is_told_in_words() {
        let error = OffloadError::Io {
            direction: Direction::Write,
            offset: 8192,
            bytes: 4096,
            folder: "/mnt/nvme".into(),
            source: Arc::new(io::Error::from_raw_os_error(5)),
        };
        assert_eq!(
            error.to_string(),
            "write of 4096 bytes at offset 8192 of the offload file in /mnt/nvme failed: Input/output error (os error \
             5); the device reports a fault: see the kernel's log, replace it, then resume from a checkpoint"
        );
    }
}
