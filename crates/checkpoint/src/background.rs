//! A save that goes on behind training: a thread of each rank writes its snapshot, rank 0's thread commits.
//!
//! The threads take part in no collective, which would get in the way of those of training. They meet in the draft's
//! folder instead:
//!
//! ```text
//! .tmp-TAG-NONCE/
//!   .writing-00001     locked for as long as rank 1's thread is at work: a rank that dies lets go of it
//!   .report-00001      what it has written, or why it could not
//!   .given-up          rank 0 has given up: nobody need go on
//! ```
//!
//! When all reports are there rank 0 commits, and lets go of the draft's lock. The others wait for that and then look
//! whether the checkpoint that is there now is the one they wrote. So a rank that fails or dies at any instant leaves
//! the older checkpoints as they were, and every rank learns how it ended without asking another.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    CheckpointError, CommitParts, Draft, RankRecord, Result, Retired, Snapshot, SnapshotMemory,
    disk::Disk,
    latest,
    lock::{self, Lock, Owner},
    retire,
};

/// How often a thread looks for what it waits for.
const POLL: Duration = Duration::from_millis(10);
/// How long rank 0 waits for the others to stop once it has given up.
const STOP: Duration = Duration::from_secs(10);
/// How long rank 0 waits while no rank reports and no file grows. Only where the file system has no locks does it come
/// to this.
const STALL: Duration = Duration::from_secs(1800);
/// Bytes of a report that nobody would write.
const MAX_REPORT: u64 = 1 << 30;

const GIVEN_UP: &str = ".given-up";

/// That this rank is going to write into a draft; the others see when it is gone.
#[derive(Debug)]
pub struct Presence(#[expect(dead_code, reason = "held, not read")] Lock);

impl Presence {
    /// Tells of `rank` in the draft's `folder`. Every rank does so before any of them starts.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn announce(folder: &Path, rank: usize) -> Result<Self> {
        let path = writing(folder, rank);
        lock::acquire(&path).map(Self).map_err(CheckpointError::io("lock", &path))
    }
}

/// What rank 0 does when everything has been written.
pub struct Commit {
    /// The draft.
    pub draft: Draft,
    /// What the manifest says of the whole.
    pub parts: CommitParts,
    /// Whether `latest` names the checkpoint afterwards.
    pub save_latest: bool,
    /// How many complete checkpoints stay; all of them if not given.
    pub keep_last: Option<usize>,
}

/// What a rank does beside writing.
pub enum Role {
    /// Rank 0 commits.
    First(Box<Commit>),
    /// The others wait for it.
    Other {
        /// The checkpoint directory.
        dir: PathBuf,
        /// The tag.
        tag: String,
    },
}

/// Why a save has failed, and on which rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The rank.
    pub rank: usize,
    /// Its error.
    pub problem: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}: {}", self.rank, self.problem)
    }
}

/// How a save has ended; what was retired is known to rank 0.
pub type Outcome = std::result::Result<Retired, Failure>;

/// What the thread and those who wait for it share.
struct Shared {
    /// Whose it is: a process forked from that one has no thread to wait for.
    process: u32,
    folder: PathBuf,
    total: u64,
    written: AtomicU64,
    outcome: Mutex<Option<Outcome>>,
    over: Condvar,
    /// Whether somebody has taken the outcome.
    told: AtomicBool,
}

impl Shared {
    fn outcome(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, outcome: Outcome) {
        self.outcome().get_or_insert(outcome);
        self.over.notify_all();
    }

    fn wait(&self, patience: Duration) -> bool {
        let waiting = self.over.wait_timeout_while(self.outcome(), patience, |outcome| outcome.is_none());
        waiting.unwrap_or_else(PoisonError::into_inner).0.is_some()
    }
}

/// Ends a save whose thread has panicked.
struct Ending(Arc<Shared>, usize);

impl Drop for Ending {
    fn drop(&mut self) {
        let problem = "the thread that writes the checkpoint has panicked".to_owned();
        self.0.end(Err(Failure { rank: self.1, problem }));
    }
}

/// The saves of this process whose outcome nobody has taken.
static UNTOLD: Mutex<Vec<Arc<Shared>>> = Mutex::new(Vec::new());

fn untold() -> MutexGuard<'static, Vec<Arc<Shared>>> {
    UNTOLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for all saves of this process that are still being written, as before it ends. Returns the folders of those
/// that have failed without anybody having been told, with the reason.
pub fn wait_for_all() -> Vec<(PathBuf, Failure)> {
    let mut failed = Vec::new();
    while let Some(shared) = { untold().pop() } {
        if shared.process != process::id() {
            continue;
        }
        while !shared.wait(STALL) {}
        if let Some(Err(failure)) = &*shared.outcome()
            && !shared.told.swap(true, Ordering::Relaxed)
        {
            failed.push((shared.folder.clone(), failure.clone()));
        }
    }
    failed
}

/// One rank's part of a save that goes on behind training.
pub struct BackgroundSave {
    shared: Arc<Shared>,
    thread: JoinHandle<SnapshotMemory>,
}

impl BackgroundSave {
    /// Starts to write `snapshot`. Whatever fails, failing to start included, is part of [`BackgroundSave::outcome`].
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if the system refuses a thread. The others learn of it: `presence` is let go.
    pub fn start(presence: Presence, snapshot: Snapshot, role: Role) -> Result<Self> {
        let folder = match &role {
            Role::First(commit) => commit.draft.target(),
            Role::Other { dir, tag } => dir.join(tag),
        };
        let shared = Arc::new(Shared {
            process: process::id(),
            folder,
            total: snapshot.bytes(),
            written: AtomicU64::new(0),
            outcome: Mutex::new(None),
            over: Condvar::new(),
            told: AtomicBool::new(false),
        });
        let rank = snapshot.rank().index();
        let ending = Ending(shared.clone(), rank);
        let draft = snapshot.folder().to_owned();
        let work = move || {
            let shared = &*ending.0;
            match role {
                Role::First(commit) => lead(presence, snapshot, *commit, shared),
                Role::Other { dir, tag } => follow(presence, snapshot, &dir, &tag, shared),
            }
        };
        let thread = thread::Builder::new().name("checkpoint-write".to_owned()).spawn(work);
        let thread = thread.map_err(CheckpointError::io("start a thread to write", &draft))?;
        untold().push(shared.clone());
        Ok(Self { shared, thread })
    }

    /// The checkpoint's folder, once it is complete.
    pub fn folder(&self) -> &Path {
        &self.shared.folder
    }

    /// Bytes written by this rank's thread, and bytes in all.
    pub fn progress(&self) -> (u64, u64) {
        (self.shared.written.load(Ordering::Relaxed), self.shared.total)
    }

    /// How it ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.shared.outcome().clone()
    }

    /// Waits for the end, but not longer than `patience`; true if it is over.
    pub fn wait(&self, patience: Duration) -> bool {
        self.shared.wait(patience)
    }

    /// Waits for the end and gives the memory back. Whoever calls this tells the outcome on.
    pub fn finish(self) -> (SnapshotMemory, Outcome) {
        while !self.shared.wait(STALL) {}
        let memory = self.thread.join().unwrap_or_default();
        self.shared.told.store(true, Ordering::Relaxed);
        untold().retain(|other| !Arc::ptr_eq(other, &self.shared));
        let outcome = self.shared.outcome().clone();
        (memory, outcome.unwrap_or_else(|| Ok(Retired::default())))
    }
}

impl fmt::Debug for BackgroundSave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (written, total) = self.progress();
        write!(f, "BackgroundSave({}, {written} of {total} bytes)", self.folder().display())
    }
}

/// What a rank leaves for rank 0.
#[derive(Serialize, Deserialize)]
enum Report {
    Written(RankRecord),
    Failed(String),
}

fn writing(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!(".writing-{rank:05}"))
}

fn reported(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!(".report-{rank:05}"))
}

/// Leaves a report, whole or not at all.
fn report(disk: &dyn Disk, folder: &Path, rank: usize, report: &Report) -> Result<()> {
    let path = reported(folder, rank);
    let unfinished = folder.join(format!(".report-{rank:05}.new"));
    let text = serde_json::to_vec(report).expect("invariant: records serialise to JSON");
    let mut file = disk
        .create_file(&unfinished, text.len() as u64)
        .map_err(CheckpointError::io("create", &unfinished))?;
    file.write(&text).map_err(CheckpointError::io("write", &unfinished))?;
    disk.rename(&unfinished, &path).map_err(CheckpointError::io("rename", &path))
}

/// The report of a rank, if it is there.
fn find_report(folder: &Path, rank: usize) -> Result<Option<Report>> {
    let path = reported(folder, rank);
    match fs::metadata(&path).and_then(|facts| {
        if facts.len() > MAX_REPORT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than any report"));
        }
        fs::read(&path)
    }) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(CheckpointError::Record),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CheckpointError::io("read", &path)(error)),
    }
}

/// Rank 0's thread.
fn lead(presence: Presence, snapshot: Snapshot, commit: Commit, shared: &Shared) -> SnapshotMemory {
    let Commit { draft, parts, save_latest, keep_last } = commit;
    let (disk, folder) = (snapshot.disk(), snapshot.folder().to_owned());
    let world = parts.world;
    let mine = |error: CheckpointError| Failure { rank: 0, problem: error.to_string() };
    let (memory, own) = snapshot.write(|bytes| {
        shared.written.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    });
    let records = own.map_err(mine).and_then(|own| {
        let mut records = vec![own];
        for rank in 1..world {
            records.push(gather(&folder, rank)?);
        }
        Ok(records)
    });
    let outcome = match records {
        Ok(records) => {
            let dir = draft.dir().to_owned();
            draft.commit(&records, parts, save_latest).map_err(mine).map(|_| match keep_last {
                Some(keep) => retire(&*disk, &dir, keep),
                None => Retired::default(),
            })
        }
        Err(failure) => {
            // What cannot be removed or told now, the next save tries again; the first error is the one to report.
            let _ = disk.create_file(&folder.join(GIVEN_UP), 0);
            let patience = Instant::now() + STOP;
            while (1..world).any(|rank| matches!(lock::owner(&writing(&folder, rank)), Ok(Owner::MayLive)))
                && Instant::now() < patience
            {
                thread::sleep(POLL);
            }
            let _ = draft.abort();
            Err(failure)
        }
    };
    drop(presence);
    shared.end(outcome);
    memory
}

/// Waits for what `rank` has written.
fn gather(folder: &Path, rank: usize) -> std::result::Result<RankRecord, Failure> {
    let failed = |rank, problem: String| Failure { rank, problem };
    let unreadable = |error: CheckpointError| failed(0, error.to_string());
    let lock_path = writing(folder, rank);
    let (mut bytes, mut since) = (0, Instant::now());
    loop {
        // Before the report is looked for: one that comes between the two is not missed.
        let owner = lock::owner(&lock_path);
        match find_report(folder, rank).map_err(unreadable)? {
            Some(Report::Written(record)) => return Ok(record),
            Some(Report::Failed(problem)) => return Err(failed(rank, problem)),
            None => {}
        }
        match owner {
            Ok(Owner::MayLive) => {}
            Ok(Owner::Dead(_) | Owner::NoLock) => {
                let problem =
                    "it has ended, or its thread has, before its part of the checkpoint was written";
                return Err(failed(rank, problem.to_owned()));
            }
            Err(error) => return Err(unreadable(CheckpointError::io("lock", &lock_path)(error))),
        }
        let now = folder_bytes(folder);
        if now != bytes {
            (bytes, since) = (now, Instant::now());
        } else if since.elapsed() > STALL {
            let problem = format!("nothing has been written for {} minutes", STALL.as_secs() / 60);
            return Err(failed(rank, problem));
        }
        thread::sleep(POLL);
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum()
}

/// The thread of another rank.
fn follow(presence: Presence, snapshot: Snapshot, dir: &Path, tag: &str, shared: &Shared) -> SnapshotMemory {
    let (disk, folder, rank) = (snapshot.disk(), snapshot.folder().to_owned(), snapshot.rank().index());
    let given_up = folder.join(GIVEN_UP);
    let (memory, record) = snapshot.write(|bytes| {
        shared.written.fetch_add(bytes as u64, Ordering::Relaxed);
        if given_up.exists() { Err(CheckpointError::GivenUp) } else { Ok(()) }
    });
    let text = match &record {
        Ok(record) => Report::Written(record.clone()),
        Err(error) => Report::Failed(error.to_string()),
    };
    let told = report(&*disk, &folder, rank, &text);
    drop(presence);
    let elsewhere = || Failure { rank: 0, problem: CheckpointError::GivenUp.to_string() };
    let outcome = match (record, told) {
        (Err(CheckpointError::GivenUp), _) => Err(elsewhere()),
        (Err(error), _) | (Ok(_), Err(error)) => Err(Failure { rank, problem: error.to_string() }),
        (Ok(record), Ok(())) => {
            let lock_path = lock::lock_path(&folder);
            while matches!(lock::owner(&lock_path), Ok(Owner::MayLive)) {
                thread::sleep(POLL);
            }
            match latest::find(dir, tag) {
                Ok((_, manifest)) if record.files.iter().all(|file| manifest.files.contains(file)) => {
                    Ok(Retired::default())
                }
                _ => Err(elsewhere()),
            }
        }
    };
    shared.end(outcome);
    memory
}
