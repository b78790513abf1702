//! A disk that crashes or fails at one chosen operation.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses its part")]

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use deepspeed_checkpoint::disk::{Disk, DiskFile, RealDisk};

/// What happens at the chosen operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// The process ends: this and all later operations do not happen. A write may happen in part.
    Crash,
    /// The operation fails with this error number; later ones work.
    Errno(i32),
}

/// The real disk, but for the chosen operation. Clones are one and the same disk.
#[derive(Clone, Debug)]
pub struct FaultyDisk {
    counter: Arc<Counter>,
    can_exchange: bool,
}

#[derive(Debug)]
struct Counter {
    done: AtomicUsize,
    at: AtomicUsize,
    fault: Fault,
}

impl Counter {
    /// Counts an operation that changes the disk and fails the chosen one.
    fn tick(&self) -> io::Result<()> {
        let number = self.done.fetch_add(1, Ordering::SeqCst);
        let at = self.at.load(Ordering::SeqCst);
        match self.fault {
            Fault::Crash if number >= at => Err(io::Error::other("crashed")),
            Fault::Errno(errno) if number == at => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }
}

impl FaultyDisk {
    /// Nothing fails before [`FaultyDisk::fail_at`].
    pub fn new(fault: Fault, can_exchange: bool) -> Self {
        let (done, at) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        Self { counter: Arc::new(Counter { done, at, fault }), can_exchange }
    }

    /// Chooses the operation, counted from now on. Nobody uses the disk meanwhile.
    pub fn fail_at(&self, at: usize) {
        self.counter.done.store(0, Ordering::SeqCst);
        self.counter.at.store(at, Ordering::SeqCst);
    }

    /// Whether the chosen operation has come.
    pub fn has_failed(&self) -> bool {
        self.counter.done.load(Ordering::SeqCst) > self.counter.at.load(Ordering::SeqCst)
    }
}

impl Disk for FaultyDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.counter.tick()?;
        RealDisk.create_dir(path)
    }

    fn create_file(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn DiskFile>> {
        self.counter.tick()?;
        let file = RealDisk.create_file(path, bytes)?;
        Ok(Box::new(FaultyFile { counter: Arc::clone(&self.counter), file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.counter.tick()?;
        RealDisk.rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        if !self.can_exchange {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.counter.tick()?;
        RealDisk.exchange(one, other)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.counter.tick()?;
        RealDisk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.counter.tick()?;
        RealDisk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.counter.tick()?;
        RealDisk.sync_dir(path)
    }
}

struct FaultyFile {
    counter: Arc<Counter>,
    file: Box<dyn DiskFile>,
}

impl DiskFile for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let ticked = self.counter.tick();
        if ticked.is_err() {
            self.file.write(&bytes[..bytes.len() / 2])?;
        }
        ticked?;
        self.file.write(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.counter.tick()
    }
}
