//! The file that holds a rank's offloaded state.

use std::{
    fmt,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use deepspeed_core::DType;

use crate::{
    Direction, OffloadError, Options, Region, Result,
    engine::{self, Engine},
    error::size,
    file,
    region::padded_bytes,
    request::{Fault, Request},
};

/// The number of the next store made in this process.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// A private file of one rank on NVMe, and the engine that reads and writes it.
///
/// The file has no name and its space is reserved from the start; both are gone when the last clone of the store is
/// dropped or the process ends, however it ends. Fresh regions read as zeros. Cloning is cheap.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    id: u64,
    capacity: u64,
    taken: AtomicU64,
    engine: Box<dyn Engine>,
    description: Description,
    stall: Duration,
    process: u32,
}

/// The I/O engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring.
    IoUring,
    /// A pool of threads in `pread` and `pwrite`.
    Threads,
}

/// What a store is and does, for the log: its `Display` is one line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Description {
    /// The folder, `nvme_path`.
    pub folder: PathBuf,
    /// The filesystem's name.
    pub filesystem: String,
    /// Bytes of the file.
    pub capacity: u64,
    /// Whether the bytes are reserved on the disk, so that it cannot run full during training.
    pub reserved: bool,
    /// Why the page cache is used; `None` with direct I/O.
    pub buffered: Option<&'static str>,
    /// The engine.
    pub engine: EngineKind,
    /// The engine in words: threads, requests in flight, and why it was chosen where it is the second choice.
    pub engine_words: String,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {} ({}), ", size(self.capacity), self.folder.display(), self.filesystem)?;
        match self.buffered {
            None => f.write_str("direct I/O")?,
            Some(reason) => write!(f, "through the page cache ({reason})")?,
        }
        if !self.reserved {
            f.write_str(", space not reserved (the filesystem cannot)")?;
        }
        write!(f, ", {}", self.engine_words)
    }
}

impl Store {
    /// Makes a store of `capacity` bytes (rounded up to whole pages) in `folder` and reserves its space.
    ///
    /// # Errors
    /// [`OffloadError::Folder`], [`OffloadError::NoSpace`], [`OffloadError::Reserve`] where the folder does not serve;
    /// [`OffloadError::Setting`] for options out of range; [`OffloadError::Engine`] if the engine asked for is refused.
    pub fn create(folder: &Path, capacity: u64, options: &Options) -> Result<Self> {
        options.check()?;
        let capacity = capacity.checked_next_multiple_of(crate::PAGE as u64).unwrap_or(capacity);
        let file = file::create(folder, capacity, options.direct)?;
        let engine = engine::start(&Arc::new(file.file), options)?;
        let description = Description {
            folder: folder.into(),
            filesystem: file.filesystem,
            capacity,
            reserved: file.reserved,
            buffered: file.buffered,
            engine: engine.kind,
            engine_words: engine.words,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                id: NEXT_ID.fetch_add(1, Relaxed),
                capacity,
                taken: AtomicU64::new(0),
                engine: engine.engine,
                description,
                stall: options.stall,
                process: process::id(),
            }),
        })
    }

    /// Bytes that a region of `len` elements of `dtype` takes of a store: add these up for [`Store::create`].
    ///
    /// # Panics
    /// If they do not fit the address space.
    pub fn bytes_of(len: usize, dtype: DType) -> u64 {
        padded_bytes(len, dtype) as u64
    }

    /// Hands out a region of `len` elements of `dtype` that nobody else has; all zero.
    ///
    /// # Errors
    /// [`OffloadError::Exhausted`] if the rest of the store is too small.
    pub fn allocate(&self, len: usize, dtype: DType) -> Result<Region> {
        let Inner { capacity, taken, description, .. } = &*self.inner;
        let asked = Self::bytes_of(len, dtype);
        let fits = |taken: u64| taken.checked_add(asked).filter(|end| end <= capacity);
        match taken.fetch_update(Relaxed, Relaxed, fits) {
            Ok(offset) => Ok(Region::new(self.inner.id, offset, len, dtype)),
            Err(taken) => Err(OffloadError::Exhausted {
                folder: description.folder.clone(),
                asked,
                taken,
                capacity: *capacity,
            }),
        }
    }

    /// What the store is and does.
    pub fn describe(&self) -> &Description {
        &self.inner.description
    }

    /// A store whose device is whatever `engine` makes of it.
    #[cfg(test)]
    pub(crate) fn on(engine: impl Engine + 'static, capacity: u64, stall: Duration) -> Self {
        let description = Description {
            folder: "/test".into(),
            filesystem: String::new(),
            capacity,
            reserved: true,
            buffered: None,
            engine: EngineKind::Threads,
            engine_words: String::new(),
        };
        let id = NEXT_ID.fetch_add(1, Relaxed);
        let (engine, taken, process) = (Box::new(engine), AtomicU64::new(0), process::id());
        Self { inner: Arc::new(Inner { id, capacity, taken, engine, description, stall, process }) }
    }

    /// How long to wait for the device.
    pub(crate) fn stall(&self) -> Duration {
        self.inner.stall
    }

    /// Whether `region` was handed out by this store.
    pub(crate) fn owns(&self, region: &Region) -> bool {
        region.store() == self.inner.id
    }

    /// Whether this process has the threads that do the I/O.
    pub(crate) fn check_process(&self) -> Result<()> {
        let (owner, child) = (self.inner.process, process::id());
        if owner == child {
            return Ok(());
        }
        Err(OffloadError::Forked { folder: self.inner.description.folder.clone(), owner, child })
    }

    /// Hands a request to the engine.
    pub(crate) fn submit(&self, request: Request) {
        self.inner.engine.submit(request);
    }

    /// `fault` as an error that names the file.
    pub(crate) fn error(&self, direction: Direction, fault: Fault) -> OffloadError {
        let folder = self.inner.description.folder.clone();
        match fault {
            Fault::Os { offset, bytes, source } => {
                OffloadError::Io { direction, offset, bytes, folder, source: Arc::new(source) }
            }
            Fault::Short { offset, bytes, moved } => {
                OffloadError::Short { direction, offset, bytes, moved, folder }
            }
            Fault::Abandoned => OffloadError::Abandoned { folder },
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("description", &self.inner.description)
            .field("taken", &self.inner.taken.load(Relaxed))
            .finish_non_exhaustive()
    }
}
