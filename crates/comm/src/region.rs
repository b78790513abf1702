//! Memory that all ranks of a host see, one physical copy of it: the weights of ZeRO stage 3.
//!
//! ```text
//!               one file without a name: a memfd, or an unlinked file on a disk
//!                 /                    |                   \
//!     rank 0: engine's view      rank 1: engine's view     ..    a rank writes only its own shards
//!             framework's view           framework's view  ..    what its tensors alias: see Access
//! ```

use std::{
    fmt,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use deepspeed_core::{DType, Rank, Span, SpanMut};
use memmap2::{MmapOptions, MmapRaw};
use rustix::{
    fs::{MemfdFlags, Mode, OFlags},
    mm::{Advice, MprotectFlags},
};

use crate::{CommError, Group, write_guard::WriteGuard};

const NAME: &str = "deepspeed-weights";
const PAGE: usize = 4096;

/// What the program of a rank may do with the framework's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read. Code which changes a weight in place would change it once per rank behind everybody's back, so it is
    /// stopped by the processor; [`Region::set_writable`] opens the view for a stretch on one rank.
    Guarded,
    /// Write, while a model is being built: what rank 0 writes is what all see; what another rank writes only that rank
    /// sees, until [`Region::refresh`].
    Draft,
}

/// Bytes shared by all ranks of a group, zero at first. The kernel frees them with the last process that maps them.
pub struct Region {
    writable: MmapRaw,
    view: MmapRaw,
    /// Whether what is written to the view stays with this rank.
    private: bool,
    /// Explains what it means that the view cannot be written.
    guard: Option<WriteGuard>,
    bytes: usize,
    /// Where the bytes lie, in words.
    place: String,
    on_disk: bool,
}

impl Region {
    /// Makes `bytes` bytes that every rank of `group` maps: host memory, or a file in `folder`. Collective.
    ///
    /// # Errors
    /// The same on every rank: [`CommError::Io`] if memory or disk is refused; [`CommError`] of the group.
    pub fn share(
        group: &dyn Group,
        what: &str,
        bytes: usize,
        folder: Option<&Path>,
        access: Access,
    ) -> Result<Arc<Self>, CommError> {
        let first = group.rank() == Rank(0);
        let made = if first { Some(Self::create(bytes, folder)) } else { None };
        let message = match &made {
            None => Ok(String::new()),
            Some(Ok(file)) => Ok(format!("{}:{}", std::process::id(), file.as_raw_fd())),
            Some(Err(error)) => Err(error.to_string()),
        };
        let handles = exchange(group, what, message)?;
        let file = made.unwrap_or_else(|| Self::open(&handles[0], bytes));
        let private = access == Access::Draft && !first;
        let mine = file.and_then(|file| Ok((Self::map(&file, bytes, folder, access, private)?, file)));
        // The creator closes its file only when everybody has opened it.
        exchange(group, what, mine.as_ref().map(|_| String::new()).map_err(ToString::to_string))?;
        mine.map(|(region, _)| Arc::new(region))
    }

    fn create(bytes: usize, folder: Option<&Path>) -> Result<OwnedFd, CommError> {
        let file = match folder {
            None => rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC)
                .map_err(|e| CommError::io(format!("memfd_create ({bytes} bytes)"), e))?,
            Some(folder) => unnamed_file(folder)?,
        };
        let reserve = |e| CommError::io(format!("reserving {bytes} bytes in {}", place(folder)), e);
        if folder.is_some() && bytes > 0 {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes as u64)
                .map_err(reserve)?;
        } else {
            rustix::fs::ftruncate(&file, bytes as u64).map_err(reserve)?;
        }
        Ok(file)
    }

    fn open(handle: &str, bytes: usize) -> Result<OwnedFd, CommError> {
        let malformed = || CommError::Segment(format!("`{handle}` is not the handle of shared weights"));
        let (pid, fd) = handle.split_once(':').ok_or_else(malformed)?;
        let (pid, fd): (u32, u32) =
            (pid.parse().map_err(|_| malformed())?, fd.parse().map_err(|_| malformed())?);
        let path = format!("/proc/{pid}/fd/{fd}");
        let file = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
            .map_err(|e| CommError::io(format!("opening {path} (the shared weights of rank 0)"), e))?;
        let stat = rustix::fs::fstat(&file).map_err(|e| CommError::io(format!("fstat of {path}"), e))?;
        let user = rustix::process::geteuid().as_raw();
        if stat.st_uid != user || usize::try_from(stat.st_size) != Ok(bytes) {
            return Err(CommError::Segment(format!(
                "{path} is not the shared weights of this job: it belongs to user {} and has {} bytes, expected user \
                 {user} and {bytes} bytes",
                stat.st_uid, stat.st_size
            )));
        }
        Ok(file)
    }

    fn map(
        file: &OwnedFd,
        bytes: usize,
        folder: Option<&Path>,
        access: Access,
        private: bool,
    ) -> Result<Self, CommError> {
        let failed = |e| CommError::io(format!("mmap of {bytes} bytes in {}", place(folder)), e);
        // A mapping of no bytes does not exist.
        let options = || {
            let mut options = MmapOptions::new();
            options.len(bytes.max(1));
            options
        };
        let writable = options().map_raw(file).map_err(failed)?;
        let view = match access {
            Access::Guarded => options().map_raw_read_only(file).map_err(failed)?,
            // SAFETY: the file has no name and is only mapped by ranks that follow this module's rules; the mapping is
            // only used through raw pointers.
            Access::Draft if private => unsafe { options().map_copy(file) }.map_err(failed)?.into(),
            Access::Draft => options().map_raw(file).map_err(failed)?,
        };
        let (place, on_disk) = (place(folder), folder.is_some());
        let start = view.as_ptr().addr();
        let guard = (access == Access::Guarded).then(|| WriteGuard::new(start..start + view.len()));
        Ok(Self { writable, view, private, guard, bytes, place, on_disk })
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether the framework's view is closed for writing until [`Region::set_writable`] opens it.
    pub fn is_guarded(&self) -> bool {
        self.guard.is_some()
    }

    /// Address of the framework's view. It stays for as long as the region lives.
    pub fn address(&self) -> usize {
        self.view.as_ptr().addr()
    }

    /// Elements of the engine's view, to read.
    ///
    /// # Safety
    /// No rank writes them for as long as the span lives.
    ///
    /// # Panics
    /// If they reach past the end or are misaligned.
    pub unsafe fn span(&self, offset: usize, len: usize, dtype: DType) -> Span<'_> {
        let start = self.check(offset, len, dtype);
        // SAFETY: inside the mapping and aligned, as just checked; any bytes are numbers; quiet by the caller's promise.
        unsafe { Span::from_raw(self.writable.as_ptr().add(start), len, dtype) }
    }

    /// Elements of the engine's view, to write.
    ///
    /// # Safety
    /// No rank reads or writes them for as long as the span lives, but through it.
    ///
    /// # Panics
    /// If they reach past the end or are misaligned.
    pub unsafe fn span_mut(&self, offset: usize, len: usize, dtype: DType) -> SpanMut<'_> {
        let start = self.check(offset, len, dtype);
        // SAFETY: as in `span`.
        unsafe { SpanMut::from_raw(self.writable.as_mut_ptr().add(start), len, dtype) }
    }

    fn check(&self, offset: usize, len: usize, dtype: DType) -> usize {
        let end = len.checked_mul(dtype.size()).and_then(|bytes| bytes.checked_add(offset));
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "{len} {dtype} at {offset} of {} bytes",
            self.bytes
        );
        assert!(offset.is_multiple_of(dtype.size()), "misaligned elements");
        offset
    }

    /// Opens or closes the framework's view of this rank for writing.
    ///
    /// # Errors
    /// [`CommError::Io`].
    pub fn set_writable(&self, writable: bool) -> Result<(), CommError> {
        let flags = if writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        // SAFETY: the range is this region's own mapping, whose file is open for reading and writing.
        unsafe { rustix::mm::mprotect(self.view.as_mut_ptr().cast(), self.view.len(), flags) }
            .map_err(|e| CommError::io("mprotect of the shared weights", e))
    }

    /// Shows everybody what this rank has written to `len` bytes from `offset` on of its view of a draft. Those who see
    /// it call [`Region::refresh`] afterwards.
    ///
    /// # Panics
    /// If they reach past the end.
    pub fn publish(&self, offset: usize, len: usize) {
        self.check(offset, len / 2, DType::BF16);
        if self.private {
            // SAFETY: both mappings are longer than `offset + len`, as just checked, and distinct; the caller is the one
            // rank that writes these bytes at this time.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    self.view.as_ptr().add(offset),
                    self.writable.as_mut_ptr().add(offset),
                    len,
                );
            }
        }
    }

    /// Forgets what this rank has written to the pages that `len` bytes from `offset` on lie in, of its view of a draft.
    ///
    /// # Errors
    /// [`CommError::Io`].
    pub fn refresh(&self, offset: usize, len: usize) -> Result<(), CommError> {
        let start = offset / PAGE * PAGE;
        let end = (offset + len).min(self.bytes);
        if !self.private || start >= end {
            return Ok(());
        }
        // SAFETY: inside the mapping. It is private: dropping its pages brings back the file's.
        unsafe {
            rustix::mm::madvise(self.view.as_mut_ptr().add(start).cast(), end - start, Advice::LinuxDontNeed)
        }
        .map_err(|e| CommError::io("madvise of a draft of the weights", e))
    }

    /// Gives the memory of `len` bytes from `offset` on back where a disk holds them; they are read again when next
    /// touched. Nothing happens in host memory, which is the only copy.
    ///
    /// # Errors
    /// [`CommError::Io`].
    pub fn drop_pages(&self, offset: usize, len: usize) -> Result<(), CommError> {
        let start = offset.next_multiple_of(PAGE);
        let end = (offset + len).min(self.bytes) / PAGE * PAGE;
        if !self.on_disk || start >= end {
            return Ok(());
        }
        for view in [&self.writable, &self.view] {
            // SAFETY: inside the mapping; a shared mapping of a file loses no data, its pages go back to the page cache.
            unsafe {
                rustix::mm::madvise(view.as_mut_ptr().add(start).cast(), end - start, Advice::LinuxDontNeed)
            }
            .map_err(|e| CommError::io("madvise of the shared weights", e))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} bytes in {})", self.bytes, self.place)
    }
}

fn place(folder: Option<&Path>) -> String {
    folder.map_or_else(|| "host memory".to_owned(), |folder| format!("a file in {}", folder.display()))
}

/// A file of this user in `folder` that no name leads to.
fn unnamed_file(folder: &Path) -> Result<OwnedFd, CommError> {
    let private = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let failed = |e| CommError::io(format!("making a file in {} for the weights", folder.display()), e);
    match rustix::fs::open(folder, flags | OFlags::TMPFILE, private) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = folder.join(format!("{NAME}-{}", std::process::id()));
            let file =
                rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, private).map_err(failed)?;
            rustix::fs::unlink(&path).map_err(failed)?;
            Ok(file)
        }
        opened => opened.map_err(failed),
    }
}

/// Every rank's message, or the first rank's error on all.
fn exchange(group: &dyn Group, what: &str, mine: Result<String, String>) -> Result<Vec<String>, CommError> {
    let (tag, text) = match mine {
        Ok(text) => (0, text),
        Err(text) => (1, text),
    };
    let all = group.all_gather_bytes(what, &[&[tag], text.as_bytes()].concat())?;
    let mut texts = Vec::with_capacity(all.len());
    for (rank, bytes) in all.iter().enumerate() {
        let text = String::from_utf8_lossy(bytes.get(1..).unwrap_or_default()).into_owned();
        if bytes.first() != Some(&0) {
            return Err(CommError::Segment(format!("{what}: rank {rank}: {text}")));
        }
        texts.push(text);
    }
    Ok(texts)
}
