//! Checking every byte of a checkpoint, on all cores, to the end: everything that is wrong and not only the first of it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use deepspeed_core::Rank;

use crate::{CheckpointError, Progress, Source, inspect::folder_size};

/// Bytes that one share of the work has, about: what one checksum covers in checkpoints of ours.
const SHARE_BYTES: u64 = 4 << 20;
/// The work has no more shares than this.
const MAX_SHARES: u64 = 1 << 14;

/// Checks every byte of every file on `threads` threads. Returns what is wrong, in the order of the files.
pub fn verify(source: &dyn Source, threads: usize, progress: &dyn Progress) -> Vec<CheckpointError> {
    let (bytes, files) = folder_size(source.folder());
    // At least one for each checksum: within a share the first problem hides the others.
    let shares = (bytes.div_ceil(SHARE_BYTES) + files).clamp(1, MAX_SHARES);
    let count = usize::try_from(shares).unwrap_or(1);
    progress.begin("checking", bytes);
    let next = AtomicUsize::new(0);
    let problems = Mutex::new(Vec::new());
    let work = || {
        loop {
            let share = next.fetch_add(1, Ordering::Relaxed);
            if share >= count {
                return;
            }
            if let Err(problem) = source.verify_share(Rank::from_index(share), count) {
                problems.lock().unwrap_or_else(PoisonError::into_inner).push((share, problem));
            }
            progress.advance(bytes / shares);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.clamp(1, count) {
            scope.spawn(work);
        }
        work();
    });
    let mut problems = problems.into_inner().unwrap_or_else(PoisonError::into_inner);
    problems.sort_by_key(|(share, _)| *share);
    problems.into_iter().map(|(_, problem)| problem).collect()
}
