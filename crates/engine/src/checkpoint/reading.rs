//! Many reads at once: elements of a checkpoint to where they belong, on all threads of the rank.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use deepspeed_checkpoint::{CheckpointError, Source};
use deepspeed_core::{Fragment, Rank, SpanMut, Unit};
use deepspeed_kernels::parallel::Workers;

use super::read_cast;

/// Elements that one thread reads at a time.
const PIECE: usize = 2 << 20;

/// Elements of one kind of one parameter, and the memory they go to.
pub(super) struct Wanted<'a> {
    pub(super) name: &'a str,
    pub(super) kind: &'a str,
    /// The first element, counted in the parameter.
    pub(super) start: usize,
    pub(super) target: SpanMut<'a>,
}

/// Reads everything; parts of large parameters at the same time.
///
/// # Errors
/// The first [`CheckpointError`] that a thread met. The targets then hold some of both.
pub(super) fn read_all(
    checkpoint: &dyn Source,
    workers: &Workers,
    wanted: Vec<Wanted<'_>>,
) -> Result<(), CheckpointError> {
    let mut pieces = Vec::with_capacity(wanted.len());
    for Wanted { name, kind, mut start, mut target } in wanted {
        while target.len() > PIECE {
            let (piece, rest) = target.split_at(PIECE);
            pieces.push(Wanted { name, kind, start, target: piece });
            (start, target) = (start + PIECE, rest);
        }
        pieces.push(Wanted { name, kind, start, target });
    }
    let failed = Mutex::new(None);
    let stop = AtomicBool::new(false);
    workers.each(pieces, |Wanted { name, kind, start, mut target }| {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = read_cast(checkpoint, name, kind, start..start + target.len(), &mut target) {
            stop.store(true, Ordering::Relaxed);
            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// The parts of this rank's shard of `unit` that belong to parameters, each with the parameter's elements it holds.
pub(super) fn cut<'a>(unit: &Unit, rank: Rank, shard: SpanMut<'a>) -> Vec<(Fragment, SpanMut<'a>)> {
    let range = unit.shard(rank);
    let (mut rest, mut at) = (shard, range.start);
    let mut parts = Vec::new();
    for fragment in unit.fragments(range) {
        let (_, from) = rest.split_at(fragment.unit_offset - at);
        let (own, later) = from.split_at(fragment.len);
        (rest, at) = (later, fragment.unit_offset + fragment.len);
        parts.push((fragment, own));
    }
    parts
}

/// Checks share `index` of `count` of all bytes of a checkpoint, on `threads` threads.
///
/// # Errors
/// The first [`CheckpointError`] that a thread met.
pub(super) fn verify(
    checkpoint: &dyn Source,
    (index, count): (usize, usize),
    threads: usize,
) -> Result<(), CheckpointError> {
    let threads = threads.max(1);
    let check =
        |thread: usize| checkpoint.verify_share(Rank::from_index(index * threads + thread), count * threads);
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|thread| scope.spawn(move || check(thread))).collect();
        let own = check(0);
        others.into_iter().fold(own, |result, other| match other.join() {
            Ok(other) => result.and(other),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}
