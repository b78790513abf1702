//! Everything that changes the disk goes through here, so that a test can make any single operation fail.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::mpsc::{self, SyncSender},
    thread::{self, JoinHandle},
};

use rustix::{
    fs::{CWD, FallocateFlags, RenameFlags},
    io::Errno,
};

/// The operations that change the disk.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Creates one folder, which must not exist.
    ///
    /// # Errors
    /// What the system says.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates a file, which must not exist, and reserves `bytes` for it where the file system can.
    ///
    /// # Errors
    /// What the system says; a full disk is found out here and not after gigabytes.
    fn create_file(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn DiskFile>>;

    /// Renames a file or folder; a file that `to` names is replaced, and so is an empty folder.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Swaps two names in one step.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::Unsupported`] or [`io::ErrorKind::InvalidInput`] where the file system
    /// cannot.
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system says.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty folder.
    ///
    /// # Errors
    /// What the system says.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a folder survive a loss of power.
    ///
    /// # Errors
    /// What the system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
}

/// A file that is being written from start to end.
pub trait DiskFile: Send {
    /// Appends all of `bytes`.
    ///
    /// # Errors
    /// What the system says.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes the content survive a loss of power.
    ///
    /// # Errors
    /// What the system says; also errors of earlier writes that went to memory first.
    fn sync(&mut self) -> io::Result<()>;
}

/// The real file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create_file(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        if bytes > 0 {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Box::new(RealFile { file, unsynced: 0, flusher: None }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match File::open(path)?.sync_all() {
            // Some network file systems cannot sync a folder and need not.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            result => result,
        }
    }
}

/// Bytes after which writing to the disk begins while the next ones are still being produced.
const FLUSH_BYTES: usize = 32 << 20;

/// A file whose content goes to the disk while it is being written, so that the final sync has little left to do.
struct RealFile {
    file: File,
    unsynced: usize,
    flusher: Option<Flusher>,
}

/// A thread that syncs the file each time it is told to. Small files need none.
struct Flusher {
    wake: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Flusher {
    fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (wake, woken) = mpsc::sync_channel::<()>(1);
        let work = move || woken.iter().try_for_each(|()| file.sync_data());
        let thread = thread::Builder::new().name("checkpoint-flush".to_owned()).spawn(work)?;
        Ok(Self { wake, thread })
    }
}

impl DiskFile for RealFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.unsynced += bytes.len();
        if self.unsynced >= FLUSH_BYTES {
            self.unsynced = 0;
            if self.flusher.is_none() {
                self.flusher = Some(Flusher::start(&self.file)?);
            }
            if let Some(flusher) = &self.flusher {
                // Full: it has been told already. Disconnected: it met an error, which `sync` reports.
                let _ = flusher.wake.try_send(());
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if let Some(Flusher { wake, thread }) = self.flusher.take() {
            drop(wake);
            // An error of a write is reported to one sync only: theirs may be the one.
            thread.join().map_err(|_| io::Error::other("the thread that syncs has panicked"))??;
        }
        self.file.sync_all()
    }
}

/// Removes a folder and all in it, or a file. Nothing there is fine: somebody else was faster.
pub(crate) fn remove_tree(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let absent_is_fine = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return absent_is_fine(disk.remove_file(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    for entry in fs::read_dir(path)? {
        remove_tree(disk, &entry?.path())?;
    }
    absent_is_fine(disk.remove_dir(path))
}

/// Whether the file system cannot do what was asked, as opposed to having failed.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput)
        || matches!(
            Errno::from_io_error(error),
            Some(Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOLCK)
        )
}
