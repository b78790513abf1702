//! Saving behind training: everything is copied, a thread writes the copy, and the ranks learn of its end together.
//!
//! ```text
//! save_checkpoint   agree on a tag, copy, agree that all have a copy      training stands still
//! step, step, ...   the threads write; with its vote on the gradients     training goes on
//!                   each rank tells whether its thread is done
//! the step in which all are: finish_save                                  one exchange of how it went
//! ```

use std::{
    io, mem,
    path::Path,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use deepspeed_checkpoint::{
    BackgroundSave, Commit, CopyPair, Draft, Failure, Outcome, Presence, Role, SnapshotMemory,
};
use deepspeed_comm::CommError;
use deepspeed_core::{DType, Rank};
use deepspeed_kernels::parallel::Workers;

use super::{SaveRequest, agree::agree};
use crate::{Engine, EngineError};

/// A wait for a save is told after this long, and then every [`TELL_EVERY`].
const TELL_AFTER: Duration = Duration::from_secs(2);
/// Progress is told this often.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Bytes that one thread copies at a time.
const COPY_BYTES: usize = 16 << 20;
/// What is left for random states, a client's state and buffers in memory that is taken in advance.
const SLACK_BYTES: usize = 1 << 20;

/// The memory that snapshots are copied into.
#[derive(Debug, Default)]
pub(crate) enum Memory {
    /// None yet.
    #[default]
    None,
    /// A thread asks the system for it, so that the first save need not.
    Coming(JoinHandle<io::Result<SnapshotMemory>>),
    /// There, and not in use.
    There(SnapshotMemory),
}

impl Memory {
    /// Lets a thread ask for `bytes`.
    pub(crate) fn come(bytes: usize) -> Self {
        let work = move || SnapshotMemory::with_capacity(bytes);
        match thread::Builder::new().name("checkpoint-memory".to_owned()).spawn(work) {
            Ok(thread) => Self::Coming(thread),
            // Then the first save asks.
            Err(_) => Self::None,
        }
    }

    /// What there is, or memory that grows when it is needed; a refusal is then an error of the save.
    fn take(&mut self) -> SnapshotMemory {
        match mem::take(self) {
            Self::None => SnapshotMemory::default(),
            Self::Coming(thread) => thread.join().ok().and_then(Result::ok).unwrap_or_default(),
            Self::There(memory) => memory,
        }
    }
}

/// A save that goes on behind training.
#[derive(Debug)]
pub(crate) struct Saving {
    save: BackgroundSave,
    began: Instant,
    /// How long training stood still for it.
    stood_still: Duration,
    told: Instant,
}

impl Saving {
    /// [`Saving::status`] of a thread that is not done.
    pub(crate) const GOES_ON: u8 = 0;
    pub(crate) const OVER: u8 = 1;

    /// Whether this rank's thread is done, for the others.
    pub(crate) fn status(&self) -> u8 {
        if self.save.outcome().is_some() { Self::OVER } else { Self::GOES_ON }
    }

    /// How far it is, when that was last told some time ago.
    pub(crate) fn progress_line(&mut self) -> Option<String> {
        if self.told.elapsed() < TELL_EVERY {
            return None;
        }
        self.told = Instant::now();
        Some(format!(
            "writing checkpoint {} behind training: {}",
            self.save.folder().display(),
            self.progress()
        ))
    }

    fn progress(&self) -> String {
        let (written, total) = self.save.progress();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        format!(
            "{:.0} of {:.0} MiB of this rank in {:.1} s",
            mib(written),
            mib(total),
            self.began.elapsed().as_secs_f64()
        )
    }

    /// Waits for the thread and says so if that takes long.
    fn finish(self, tell: bool) -> (SnapshotMemory, Outcome, String) {
        let mut patience = TELL_AFTER;
        while !self.save.wait(patience) {
            patience = TELL_EVERY;
            if tell {
                tracing::warn!(
                    "waiting for checkpoint {} to be written: {}",
                    self.save.folder().display(),
                    self.progress()
                );
            }
        }
        let line = format!(
            "saved checkpoint {}: {}, behind training, which stood still for {:.3} s",
            self.save.folder().display(),
            self.progress(),
            self.stood_still.as_secs_f64()
        );
        let (memory, outcome) = self.save.finish();
        (memory, outcome, line)
    }
}

impl Engine {
    /// Copies what this rank has to save and lets a thread write it.
    pub(super) fn save_behind(
        &mut self,
        request: &SaveRequest<'_>,
        draft: Option<Draft>,
        folder: &Path,
        tag: &str,
    ) -> Result<(), EngineError> {
        let began = Instant::now();
        let group = self.group.clone();
        let group = &*group;
        let memory = self.snapshots.take();
        let copied = Presence::announce(folder, group.rank().index()).and_then(|presence| {
            let writer = self.writer(folder, request)?;
            Ok((presence, writer.snapshot(memory, |pairs| copy(&self.workers, pairs))?))
        });
        let ((presence, snapshot), _) = agree(group, "checkpoint snapshot", copied, |_| Vec::new())?;
        let role = match draft {
            Some(draft) => Role::First(Box::new(Commit {
                draft,
                parts: self.commit_parts(request),
                save_latest: request.save_latest,
                keep_last: self.settings.saving.keep_last,
            })),
            None => Role::Other { dir: request.dir.to_owned(), tag: tag.to_owned() },
        };
        let started = BackgroundSave::start(presence, snapshot, role);
        let (started, problem) = match started {
            Ok(save) => (Some(save), Ok(())),
            Err(error) => (None, Err(error)),
        };
        let agreed = agree(group, "checkpoint threads", problem, |()| Vec::new());
        let now = Instant::now();
        self.saving =
            started.map(|save| Saving { save, began, stood_still: now.duration_since(began), told: now });
        if let Err(error) = agreed {
            // The threads that did start find that one rank is missing, and give up.
            if let Some(saving) = self.saving.take() {
                let (memory, ..) = saving.finish(false);
                self.snapshots = Memory::There(memory);
            }
            return Err(error);
        }
        Ok(())
    }

    /// Waits for a save that goes on behind training, and says how it went; `None` if there is none. Collective.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] on every rank if it failed on any; the checkpoints there were are untouched.
    pub fn finish_save(&mut self) -> Result<Option<String>, EngineError> {
        let Some(saving) = self.saving.take() else { return Ok(None) };
        let group = self.group.clone();
        group.set_activity("waiting for a checkpoint to be written");
        let (memory, outcome, line) = saving.finish(group.rank() == Rank(0));
        self.snapshots = Memory::There(memory);
        let message = match &outcome {
            Ok(_) => Vec::new(),
            Err(Failure { rank, problem }) => {
                [&u32::try_from(*rank).unwrap_or(u32::MAX).to_le_bytes()[..], problem.as_bytes()].concat()
            }
        };
        let all = group.all_gather_bytes("end of the checkpoint", &message);
        group.set_activity("");
        match (verdict(all), outcome) {
            (Ok(()), Ok(retired)) => {
                let gone = match &retired.removed[..] {
                    [] => String::new(),
                    removed => format!("; removed older ones: {}", removed.join(", ")),
                };
                for problem in retired.problems {
                    tracing::warn!("an older checkpoint could not be removed: {problem}");
                }
                Ok(Some(format!("{line}{gone}")))
            }
            // A group that has failed tells less than this.
            (_, Err(failure)) if failure.rank == group.rank().index() => Err(failed(failure)),
            (Err(error), _) => Err(error),
            (Ok(()), Err(failure)) => Err(failed(failure)),
        }
    }

    /// As [`Engine::finish_save`], for a rank that cannot count on the others any more: before its end.
    ///
    /// # Errors
    /// As [`Engine::finish_save`], as far as this rank knows.
    pub fn finish_save_alone(&mut self) -> Result<(), EngineError> {
        let Some(saving) = self.saving.take() else { return Ok(()) };
        let (_, outcome, _) = saving.finish(self.group.rank() == Rank(0));
        outcome.map(drop).map_err(failed)
    }

    /// Lets a thread take the memory that saves behind training copy into, if there are to be any, so that the first of them
    /// need not. For a caller who knows that the memory is there.
    pub fn take_snapshot_memory(&mut self) {
        if self.settings.saving.behind {
            self.snapshots = Memory::come(self.snapshot_bytes());
        }
    }

    /// Bytes of memory that a snapshot of the engine's own state takes on this rank.
    fn snapshot_bytes(&self) -> usize {
        let per_element = |unit: &deepspeed_core::Unit| {
            let on_disk = self.offloaded.as_ref().is_some_and(|it| it.holds(unit.id));
            let master = usize::from(unit.dtype != DType::F32);
            let state = if on_disk { 0 } else { (master + self.states) * DType::F32.size() };
            unit.dtype.size() + state
        };
        let trained: usize = self.layout.units.iter().map(|unit| unit.shard_len * per_element(unit)).sum();
        let frozen = self.weights.as_ref().map_or(0, |it| it.frozen.bytes(&it.frozen_layout));
        trained + frozen + SLACK_BYTES
    }
}

fn failed(Failure { rank, problem }: Failure) -> EngineError {
    EngineError::Checkpoint { rank: Rank::from_index(rank), problem }
}

/// What all ranks make of what each knows: the words of a rank that failed itself, if there is one.
fn verdict(all: Result<Vec<Vec<u8>>, CommError>) -> Result<(), EngineError> {
    let all = all?;
    let failures = all.iter().enumerate().filter_map(|(teller, message)| {
        let (rank, problem) = message.split_first_chunk::<4>()?;
        let rank = usize::try_from(u32::from_le_bytes(*rank)).ok()?;
        let problem = String::from_utf8_lossy(problem).into_owned();
        Some((rank != teller, Failure { rank, problem }))
    });
    match failures.min_by_key(|(second_hand, _)| *second_hand) {
        None => Ok(()),
        Some((_, failure)) => Err(failed(failure)),
    }
}

/// Copies with all threads of the rank.
fn copy(workers: &Workers, pairs: Vec<CopyPair<'_>>) {
    let mut parts: Vec<CopyPair<'_>> = Vec::with_capacity(pairs.len());
    for (from, to) in pairs {
        parts.extend(from.chunks(COPY_BYTES).zip(to.chunks_mut(COPY_BYTES)));
    }
    workers.each(parts, |(from, to)| deepspeed_kernels::copy_past_cache(from, to));
}

#[cfg(test)]
mod tests {
    use deepspeed_checkpoint::{CommitParts, ParamRecord, RankWriter, SliceSource, kind};
    use deepspeed_core::{ParamSpec, Span};

    use super::*;

    #[test]
    fn progress_is_told_now_and_then_and_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let draft = Draft::begin(dir.path(), "t", 1).unwrap();
        let folder = draft.folder().to_owned();
        let presence = Presence::announce(&folder, 0).unwrap();
        let spec = ParamSpec { name: "w".into(), shape: vec![3 << 18], dtype: DType::F32, group: 0 };
        let values = vec![0.5f32; 3 << 18];
        let mut writer = RankWriter::new(&folder, Rank(0), 1);
        let data = Span::from(&values[..]);
        let slice = SliceSource { name: &spec.name, kind: kind::WEIGHT, shape: &spec.shape, offset: 0, data };
        writer.slice(slice).unwrap();
        let workers = Workers::new(1).unwrap();
        let snapshot = writer.snapshot(SnapshotMemory::default(), |pairs| copy(&workers, pairs)).unwrap();
        let parts = CommitParts {
            world: 1,
            stage: 0,
            dtype: DType::F32,
            params: vec![ParamRecord::from(&spec)],
            tied: vec![],
            state: serde_json::Value::Null,
            frozen_excluded: false,
        };
        let role = Role::First(Box::new(Commit { draft, parts, save_latest: true, keep_last: None }));
        let save = BackgroundSave::start(presence, snapshot, role).unwrap();
        assert!(save.wait(Duration::from_secs(60)));

        let now = Instant::now();
        let mut saving = Saving { save, began: now, stood_still: Duration::from_millis(2), told: now };
        assert_eq!((saving.progress_line(), saving.status()), (None, Saving::OVER));
        saving.told = now.checked_sub(TELL_EVERY).unwrap();
        let line = saving.progress_line().unwrap();
        assert!(line.contains("/t behind training: 3 of 3 MiB of this rank in "), "{line}");
        assert_eq!(saving.progress_line(), None);
        let (_, outcome, line) = saving.finish(false);
        assert!(outcome.is_ok() && line.ends_with("which stood still for 0.002 s"), "{line}");
    }
}
