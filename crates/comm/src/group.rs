//! What every process group offers, whatever carries the bytes.
//!
//! The two collectives that training lives on are shaped for sharding rather than for flat arrays: the input of a
//! reduce-scatter is the gradients *where the framework left them*, and an all-gather asks for each piece of the
//! caller's shard just before it is published, so that the optimizer update and the exchange are one pass.

use std::{fmt, ops::Range};

use deepspeed_core::{DType, Rank, Span, SpanMut};

use crate::CommError;

/// A unit's elements where they lie: runs of memory with their offset inside the unit.
///
/// Runs are in ascending order and do not overlap; what no run covers reads as zero.
#[derive(Debug, Default)]
pub struct Pieces<'a> {
    /// Number of elements of the whole, gaps included.
    pub len: usize,
    /// `(offset inside the whole, memory)`.
    pub runs: Vec<(usize, Span<'a>)>,
}

/// As [`Pieces`], writable; what no run covers is dropped.
#[derive(Debug, Default)]
pub struct PiecesMut<'a> {
    /// Number of elements of the whole, gaps included.
    pub len: usize,
    /// `(offset inside the whole, memory)`.
    pub runs: Vec<(usize, SpanMut<'a>)>,
}

/// Whether a reduction replaces what the caller's shard held or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// Replace: the first micro-batch of an accumulation.
    Store,
    /// Add: the micro-batches after it.
    Add,
}

/// Fills one range of the caller's shard (first argument, inside the shard) into the memory given (second
/// argument, as many elements as the range is long).
pub type Produce<'a> = dyn FnMut(Range<usize>, SpanMut<'_>) + 'a;

/// A process group: ranks `0..world` that call the same collectives in the same order.
///
/// Every collective takes `what`, the name of what it moves ("unit blocks.7", "gradient norm"): it is part of the
/// fingerprint by which ranks notice that they disagree, and of the sentence a user reads when one never arrives.
/// The first error is kept: after it every call fails with the same error.
pub trait Group: Send + Sync + fmt::Debug {
    /// This process's rank in the group.
    fn rank(&self) -> Rank;

    /// Number of ranks.
    fn world(&self) -> usize;

    /// What carries the bytes, for the start summary: `none`, `threads`, `shared memory`, `torch.distributed (gloo)`.
    fn transport(&self) -> &str;

    /// Whether all ranks can map the same memory ([`crate::Region`]): they are on one host, and nothing else was asked
    /// for.
    fn shares_memory(&self) -> bool {
        false
    }

    /// Says what the caller's program is doing ("save_checkpoint"), for the report of a rank that waits for it.
    fn set_activity(&self, activity: &str);

    /// Waits until every rank has called.
    ///
    /// # Errors
    /// [`CommError`], as for every collective: a peer is gone, disagrees, or did not arrive before the deadline.
    fn barrier(&self, what: &str) -> Result<(), CommError>;

    /// Every rank's bytes, in rank order. Lengths may differ between ranks. For votes and small facts, but any
    /// length works.
    ///
    /// # Errors
    /// [`CommError`].
    fn all_gather_bytes(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;

    /// The element-wise sum over ranks, added in rank order, on every rank.
    ///
    /// # Errors
    /// [`CommError`].
    fn all_reduce(&self, what: &str, data: &mut [f32]) -> Result<(), CommError>;

    /// `root`'s elements on every rank.
    ///
    /// # Errors
    /// [`CommError`].
    fn broadcast(&self, what: &str, root: Rank, data: SpanMut<'_>) -> Result<(), CommError>;

    /// The caller's shard of the sum over ranks: `shard[i] = scale * sum over ranks, in rank order and in fp32, of
    /// element rank * shard.len() + i`, stored or added.
    ///
    /// `input.len == shard.len() * world`; the runs' dtypes may differ from each other, not between ranks.
    /// Returns the sum of squares of `shard` afterwards, in f64 and in an order that depends only on
    /// `shard.len()`; it is not finite exactly if some element is not.
    ///
    /// # Errors
    /// [`CommError`].
    fn reduce_scatter(
        &self,
        what: &str,
        input: &Pieces<'_>,
        shard: &mut [f32],
        scale: f32,
        into: Into,
    ) -> Result<f64, CommError>;

    /// Publishes the caller's shard and fills `output` with everybody's.
    ///
    /// `produce` is called for consecutive ranges that cover `0..output.len / world` once, in order, on the
    /// caller's thread. Every run of `output` is filled from the shard of the rank that owns it, the caller's own
    /// shard too where a run covers it (leave it out where `produce` has already put the elements in place).
    ///
    /// # Errors
    /// [`CommError`].
    fn all_gather(
        &self,
        what: &str,
        dtype: DType,
        produce: &mut Produce<'_>,
        output: &mut PiecesMut<'_>,
    ) -> Result<(), CommError>;
}
