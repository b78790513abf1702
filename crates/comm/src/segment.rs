//! The memory that the ranks of one host share: who may map it, what lies where.
//!
//! ```text
//! | Header: magic, version, world, nonce, poison | Control of rank 0 | .. | ring of rank 0 | ring of rank 1 | .. |
//! ```
//!
//! The memory is a sealed memfd: it has no name in any file system, cannot shrink under a mapping, and the kernel
//! frees it when the last process that maps it is gone, however it went. Ranks that are threads of one process use
//! an anonymous mapping instead.

use std::{
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    mem::size_of,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

use crate::{
    BLOCK, CommError, Options,
    error::ErrorKind,
    fingerprint::{Activity, History},
    wait::{self, Word},
};

/// The most ranks that one segment serves.
pub const MAX_WORLD: usize = 64;

/// Chunks of a rank that peers may have yet to read. Many: a chunk that its reader fetches a while after it was
/// written comes from the shared cache, which is faster than from the writer's own.
pub(crate) const SLOTS: usize = 16;

/// Bytes behind the data of a slot, where a rank says what the data is: one cache line.
pub(crate) const LABEL: usize = 64;

/// Changes whenever the meaning of a byte of the segment does.
const VERSION: u32 = 1;
const MAGIC: u64 = u64::from_le_bytes(*b"ds-comm\0");
const NAME: &str = "deepspeed-comm";
const PAGE: usize = 4096;
const POISON_BYTES: usize = 3072;

/// Memory shared by the ranks of one host, made by one of them (or by the launcher) and opened by the others.
///
/// Clones are handles to the same memory.
#[derive(Clone)]
pub struct Segment {
    inner: Arc<Inner>,
}

struct Inner {
    map: MmapRaw,
    geometry: Geometry,
    /// `pid:fd:nonce`; none for memory of threads.
    handle: Option<String>,
    /// Kept open by the creator, so that peers can open it; closes itself with the last handle.
    _file: Option<OwnedFd>,
}

/// Where things lie, a pure function of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    world: usize,
    slot_bytes: usize,
}

impl Geometry {
    fn new(world: usize, ring_bytes: usize) -> Self {
        // The smallest chunk of a reduce-scatter is one block for each peer, in fp32.
        let least = world.saturating_sub(1).max(1) * BLOCK * 4;
        Self { world, slot_bytes: (ring_bytes / SLOTS).max(least).next_multiple_of(PAGE) }
    }

    fn control(&self, rank: usize) -> usize {
        assert!(rank < self.world, "rank {rank} of {}", self.world);
        size_of::<Header>() + rank * size_of::<Control>()
    }

    fn slot(&self, rank: usize, slot: usize) -> usize {
        assert!(rank < self.world && slot < SLOTS, "slot {slot} of rank {rank} of {}", self.world);
        size_of::<Header>()
            + self.world * size_of::<Control>()
            + (rank * SLOTS + slot) * (self.slot_bytes + LABEL)
    }

    fn total(&self) -> usize {
        let rings = self.world * SLOTS * (self.slot_bytes + LABEL);
        (size_of::<Header>() + self.world * size_of::<Control>() + rings).next_multiple_of(PAGE)
    }
}

/// The first page of a segment.
#[repr(C, align(4096))]
struct Header {
    magic: AtomicU64,
    nonce: AtomicU64,
    version: AtomicU32,
    world: AtomicU32,
    slot_bytes: AtomicU64,
    poison: Poison,
}

/// The first error of the group (COMM-8).
#[repr(C)]
struct Poison {
    /// [`CLEAN`], [`WRITING`] or [`POISONED`].
    state: AtomicU32,
    rank: AtomicU32,
    kind: AtomicU32,
    len: AtomicU32,
    text: [AtomicU8; POISON_BYTES],
}

const CLEAN: u32 = 0;
const WRITING: u32 = 1;
const POISONED: u32 = 2;

/// What one rank tells its peers, apart from the data. Only that rank writes it, but for the waiter counts.
#[repr(C, align(4096))]
pub(crate) struct Control {
    /// Chunks it has published (COMM-1).
    pub(crate) published: Padded<Word>,
    /// Chunks of its peers it has consumed (COMM-1).
    pub(crate) consumed: Padded<Word>,
    pub(crate) member: Padded<Member>,
    pub(crate) history: History,
    pub(crate) activity: Activity,
}

/// Keeps what it holds out of the cache lines, and of the pairs of lines that are prefetched together, of others.
#[repr(C, align(128))]
pub(crate) struct Padded<T>(pub(crate) T);

/// Who a rank is and how far it got.
#[repr(C)]
pub(crate) struct Member {
    state: AtomicU32,
    pid: AtomicU32,
    /// The process's start time in clock ticks, which tells it from a later one of the same pid.
    started: AtomicU64,
    /// Number of the last call it entered.
    pub(crate) entered: AtomicU64,
    /// Number of the last call it finished.
    pub(crate) finished: AtomicU64,
}

/// Whether a rank is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Membership {
    Absent,
    Joined { pid: u32, started: u64 },
    Left { pid: u32 },
    Panicked { pid: u32 },
}

const ABSENT: u32 = 0;
const JOINING: u32 = 1;
const JOINED: u32 = 2;
const LEFT: u32 = 3;
const PANICKED: u32 = 4;

impl Member {
    /// Claims the seat for a process; fails if somebody has it or had it.
    pub(crate) fn join(&self, pid: u32, started: u64) -> Result<(), Membership> {
        if self.state.compare_exchange(ABSENT, JOINING, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return Err(self.get());
        }
        self.pid.store(pid, Ordering::Relaxed);
        self.started.store(started, Ordering::Relaxed);
        self.state.store(JOINED, Ordering::Release);
        Ok(())
    }

    pub(crate) fn leave(&self, panicked: bool) {
        self.state.store(if panicked { PANICKED } else { LEFT }, Ordering::Release);
    }

    pub(crate) fn get(&self) -> Membership {
        let state = self.state.load(Ordering::Acquire);
        let pid = self.pid.load(Ordering::Relaxed);
        match state {
            JOINED => Membership::Joined { pid, started: self.started.load(Ordering::Relaxed) },
            LEFT => Membership::Left { pid },
            PANICKED => Membership::Panicked { pid },
            _ => Membership::Absent,
        }
    }
}

impl Segment {
    /// Memory for `world` ranks in this and other processes of this user.
    ///
    /// # Errors
    /// [`CommError::Segment`] for a world of 0 or above [`MAX_WORLD`]; [`CommError::Io`] if memory is refused.
    pub fn create(world: usize, options: &Options) -> Result<Self, CommError> {
        let geometry = Self::geometry(world, options)?;
        let failed = |what: &str| format!("{what} ({} bytes)", geometry.total());
        let file = rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| CommError::io(failed("memfd_create"), e))?;
        rustix::fs::ftruncate(&file, geometry.total() as u64)
            .map_err(|e| CommError::io(failed("ftruncate"), e))?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(|e| CommError::io(failed("seal"), e))?;
        let map = MmapOptions::new()
            .len(geometry.total())
            .map_raw(&file)
            .map_err(|e| CommError::io(failed("mmap"), e))?;
        let nonce = RandomState::new().build_hasher().finish();
        let handle = format!("{}:{}:{nonce:016x}", std::process::id(), file.as_raw_fd());
        let inner = Inner { map, geometry, handle: Some(handle), _file: Some(file) };
        Ok(Self { inner: Arc::new(inner) }.initialised(nonce))
    }

    /// Memory for `world` ranks that are threads of this process.
    ///
    /// # Errors
    /// As [`Segment::create`].
    pub fn for_threads(world: usize, options: &Options) -> Result<Self, CommError> {
        let geometry = Self::geometry(world, options)?;
        let map = MmapOptions::new()
            .len(geometry.total())
            .map_anon()
            .map_err(|e| CommError::io(format!("mmap ({} bytes)", geometry.total()), e))?;
        let inner = Inner { map: map.into(), geometry, handle: None, _file: None };
        Ok(Self { inner: Arc::new(inner) }.initialised(0))
    }

    /// The memory that another process of this user has created, by its [`Segment::handle`].
    ///
    /// # Errors
    /// [`CommError::Segment`] if the handle is malformed, stale, of another user or of another version;
    /// [`CommError::Io`] if the creator is gone or in another pid namespace.
    pub fn open(handle: &str) -> Result<Self, CommError> {
        let refused = |why: &str| CommError::Segment(format!("handle `{handle}` {why}"));
        let (pid, fd, nonce) = parse_handle(handle)
            .ok_or_else(|| refused("is malformed, expected `pid:fd:nonce` as Segment::handle gives it"))?;
        let path = format!("/proc/{pid}/fd/{fd}");
        let gone = "is the process that created the segment alive, on this host and in this pid namespace?";
        let target = fs_read_link(&path).map_err(|e| CommError::io(format!("reading {path} ({gone})"), e))?;
        if !target.starts_with(&format!("/memfd:{NAME}")) {
            return Err(refused(&format!("is stale: {path} is {target}")));
        }
        let file = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
            .map_err(|e| CommError::io(format!("opening {path} ({gone})"), e))?;
        let stat = rustix::fs::fstat(&file).map_err(|e| CommError::io(format!("fstat of {path}"), e))?;
        let user = rustix::process::geteuid().as_raw();
        if stat.st_uid != user {
            return Err(refused(&format!("belongs to user {}, this process is user {user}", stat.st_uid)));
        }
        let seals =
            rustix::fs::fcntl_get_seals(&file).map_err(|e| CommError::io(format!("seals of {path}"), e))?;
        let bytes = usize::try_from(stat.st_size).unwrap_or(0);
        if !seals.contains(SEALS) || bytes < size_of::<Header>() {
            return Err(refused("is not a finished segment"));
        }
        let map = MmapOptions::new()
            .len(bytes)
            .map_raw(&file)
            .map_err(|e| CommError::io(format!("mmap of {path} ({bytes} bytes)"), e))?;
        // The geometry that the header states is believed only after it was compared with the file's size.
        let mut inner = Inner {
            map,
            geometry: Geometry { world: 0, slot_bytes: 0 },
            handle: Some(handle.to_owned()),
            _file: None,
        };
        let header = inner.header();
        if header.magic.load(Ordering::Acquire) != MAGIC {
            return Err(refused("is not a finished segment"));
        }
        let version = header.version.load(Ordering::Relaxed);
        if version != VERSION {
            return Err(refused(&format!(
                "is of protocol version {version}, this program speaks {VERSION}: all ranks must run the same build"
            )));
        }
        if header.nonce.load(Ordering::Relaxed) != nonce {
            return Err(refused("is stale: its nonce is another segment's"));
        }
        let world = header.world.load(Ordering::Relaxed) as usize;
        let slot_bytes = usize::try_from(header.slot_bytes.load(Ordering::Relaxed)).unwrap_or(0);
        let geometry = Geometry { world, slot_bytes };
        let fits = (1..=MAX_WORLD).contains(&world)
            && slot_bytes <= bytes
            && slot_bytes.is_multiple_of(PAGE)
            && slot_bytes >= Geometry::new(world, 0).slot_bytes
            && geometry.total() == bytes;
        if !fits {
            return Err(refused(&format!("has a header that contradicts its size of {bytes} bytes")));
        }
        inner.geometry = geometry;
        Ok(Self { inner: Arc::new(inner) })
    }

    fn geometry(world: usize, options: &Options) -> Result<Geometry, CommError> {
        if !(1..=MAX_WORLD).contains(&world) {
            return Err(CommError::Segment(format!("world of {world} ranks, expected 1 to {MAX_WORLD}")));
        }
        Ok(Geometry::new(world, options.ring_bytes))
    }

    fn initialised(self, nonce: u64) -> Self {
        let header = self.inner.header();
        header.nonce.store(nonce, Ordering::Relaxed);
        header.version.store(VERSION, Ordering::Relaxed);
        header.world.store(self.inner.geometry.world as u32, Ordering::Relaxed);
        header.slot_bytes.store(self.inner.geometry.slot_bytes as u64, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        self
    }

    /// What other processes pass to [`Segment::open`], by whatever channel; `None` for memory of threads.
    ///
    /// It is good for as long as the creator keeps the segment or a group that joined it.
    pub fn handle(&self) -> Option<&str> {
        self.inner.handle.as_deref()
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.inner.geometry.world
    }

    pub(crate) fn slot_bytes(&self) -> usize {
        self.inner.geometry.slot_bytes
    }

    pub(crate) fn control(&self, rank: usize) -> &Control {
        let offset = self.inner.geometry.control(rank);
        // SAFETY: the offset lies inside the mapping and is a multiple of the page, as the geometry says; the
        // mapping lives as long as `self`; `Control` holds only atomics, for which any bytes are valid and which
        // others may write at any time.
        unsafe { &*self.inner.map.as_mut_ptr().add(offset).cast::<Control>() }
    }

    /// The first byte of a slot: [`Segment::slot_bytes`] of data and [`LABEL`] more may be accessed by whom the
    /// protocol lets. Aligned to a cache line.
    pub(crate) fn slot(&self, rank: usize, slot: usize) -> *mut u8 {
        self.inner.map.as_mut_ptr().wrapping_add(self.inner.geometry.slot(rank, slot))
    }

    /// Makes `error` the group's error unless there is one, wakes all who wait, and returns the group's error if
    /// it is another.
    pub(crate) fn poison(&self, rank: u32, error: &CommError) -> Option<CommError> {
        let poison = &self.inner.header().poison;
        if poison.state.compare_exchange(CLEAN, WRITING, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // Another rank is first; it may still be writing, but not for long unless it was killed at it.
            for _ in 0..1000 {
                if let Some(first) = self.poisoned() {
                    return Some(first);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            return None;
        }
        let message = error.to_string();
        let bytes = &message.as_bytes()[..message.floor_char_boundary(POISON_BYTES)];
        for (cell, byte) in poison.text.iter().zip(bytes) {
            cell.store(*byte, Ordering::Relaxed);
        }
        poison.len.store(bytes.len() as u32, Ordering::Relaxed);
        poison.rank.store(rank, Ordering::Relaxed);
        poison.kind.store(error.kind() as u32, Ordering::Relaxed);
        poison.state.store(POISONED, Ordering::Release);
        for rank in 0..self.world() {
            let control = self.control(rank);
            wait::wake(&control.published.0);
            wait::wake(&control.consumed.0);
        }
        None
    }

    /// The group's first error, if there is one.
    pub(crate) fn poisoned(&self) -> Option<CommError> {
        let poison = &self.inner.header().poison;
        if poison.state.load(Ordering::Acquire) != POISONED {
            // A rank that is killed while it writes is found dead by its peers, whose error then stays their own.
            return None;
        }
        let len = (poison.len.load(Ordering::Relaxed) as usize).min(POISON_BYTES);
        let bytes: Vec<u8> = poison.text[..len].iter().map(|cell| cell.load(Ordering::Relaxed)).collect();
        Some(CommError::Poisoned {
            rank: deepspeed_core::Rank(poison.rank.load(Ordering::Relaxed)),
            kind: ErrorKind::from_code(poison.kind.load(Ordering::Relaxed)),
            message: String::from_utf8_lossy(&bytes).into_owned(),
        })
    }
}

impl Inner {
    fn header(&self) -> &Header {
        // SAFETY: every mapping is at least one header long and page-aligned; as in `Segment::control`.
        unsafe { &*self.map.as_mut_ptr().cast::<Header>() }
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("handle", &self.inner.handle)
            .field("geometry", &self.inner.geometry)
            .finish_non_exhaustive()
    }
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

fn parse_handle(handle: &str) -> Option<(u32, u32, u64)> {
    let mut parts = handle.split(':');
    let (pid, fd, nonce) = (parts.next()?, parts.next()?, parts.next()?);
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if parts.next().is_some() || !digits(pid) || !digits(fd) || !digits(nonce) {
        return None;
    }
    Some((pid.parse().ok()?, fd.parse().ok()?, u64::from_str_radix(nonce, 16).ok()?))
}

fn fs_read_link(path: &str) -> rustix::io::Result<String> {
    Ok(rustix::fs::readlink(path, Vec::new())?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_controls_are_pages() {
        assert_eq!(size_of::<Header>(), PAGE);
        assert_eq!(size_of::<Control>(), PAGE);
    }

    #[test]
    fn opens_by_handle_in_the_same_process_too() {
        let options = Options { ring_bytes: 1 << 20, ..Options::default() };
        let created = Segment::create(3, &options).unwrap();
        let opened = Segment::open(created.handle().unwrap()).unwrap();
        assert_eq!(opened.inner.geometry, created.inner.geometry);
        created.control(2).member.0.entered.store(7, Ordering::Release);
        assert_eq!(opened.control(2).member.0.entered.load(Ordering::Acquire), 7);
    }

    #[test]
    fn wrong_handles_are_refused_with_a_reason() {
        let created = Segment::create(2, &Options::default()).unwrap();
        let handle = created.handle().unwrap().to_owned();
        let mut parts: Vec<&str> = handle.split(':').collect();
        parts[2] = "1";
        let nonce = Segment::open(&parts.join(":")).unwrap_err().to_string();
        assert!(nonce.contains("nonce"), "{nonce}");
        for malformed in ["", "1:2", "1:2:3:4", "x:2:3", "1:+2:3", "1:2:"] {
            let error = Segment::open(malformed).unwrap_err().to_string();
            assert!(error.contains("malformed"), "{malformed}: {error}");
        }
        drop(created);
        assert!(Segment::open(&handle).is_err());
        let null = std::fs::File::open("/dev/null").unwrap();
        let other = format!("{}:{}:0", std::process::id(), null.as_raw_fd());
        assert!(Segment::open(&other).unwrap_err().to_string().contains("stale"));
    }

    #[test]
    fn nobody_can_shrink_it() {
        let created = Segment::create(2, &Options::default()).unwrap();
        let file = created.inner._file.as_ref().unwrap();
        assert!(rustix::fs::ftruncate(file, 0).is_err());
    }

    #[test]
    fn the_first_error_is_kept() {
        let segment = Segment::for_threads(2, &Options::default()).unwrap();
        assert!(segment.poisoned().is_none());
        assert!(segment.poison(1, &CommError::Segment("first".into())).is_none());
        let kept = segment.poison(0, &CommError::Segment("second".into())).unwrap();
        assert_eq!(kept.to_string(), "shared-memory group: first");
        assert_eq!(kept.kind(), ErrorKind::Segment);
    }

    #[test]
    fn whoever_is_not_first_to_fail_waits_for_the_first_error() {
        for _ in 0..200 {
            let segment = Segment::for_threads(4, &Options { ring_bytes: 0, ..Options::default() }).unwrap();
            let errors: Vec<String> = std::thread::scope(|scope| {
                let ranks: Vec<_> = (0..4u32)
                    .map(|rank| {
                        let segment = &segment;
                        scope.spawn(move || {
                            let own = CommError::Segment(format!("of rank {rank}"));
                            segment.poison(rank, &own).unwrap_or(own).to_string()
                        })
                    })
                    .collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        }
    }

    #[test]
    fn worlds_out_of_range_are_refused() {
        for world in [0, 65] {
            assert!(Segment::create(world, &Options::default()).is_err());
        }
        assert!(Segment::for_threads(64, &Options::default()).is_ok());
    }
}
