//! The world of one rank: no transport, the same arithmetic.

use std::sync::Mutex;

use deepspeed_core::{AlignedBuffer, DType, Rank, SpanMut};

use crate::{
    CommError, chunks,
    fingerprint::Operation,
    group::{Group, Into, Pieces, PiecesMut, Produce},
    pieces::{Reducer, Reduction},
};

/// A group of one.
#[derive(Debug, Default)]
pub struct Solo {
    failed: Mutex<Option<CommError>>,
}

/// The most elements that are asked for at a time, which with the optimizer's state should stay in the cache.
const RANGE: usize = 1 << 15;
/// A run with fewer elements than this left is filled by copying, together with its neighbours.
const DIRECT: usize = 1 << 12;

impl Solo {
    /// A group of one.
    pub fn new() -> Self {
        Self::default()
    }

    fn check(&self, operation: Operation, what: &str, problem: Option<String>) -> Result<(), CommError> {
        let mut failed = self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let (None, Some(problem)) = (&*failed, problem) {
            *failed = Some(CommError::Arguments { rank: Rank(0), operation, what: what.to_owned(), problem });
        }
        failed.clone().map_or(Ok(()), Err)
    }
}

impl Group for Solo {
    fn rank(&self) -> Rank {
        Rank(0)
    }

    fn world(&self) -> usize {
        1
    }

    fn transport(&self) -> &str {
        "none"
    }

    fn shares_memory(&self) -> bool {
        true
    }

    fn set_activity(&self, _activity: &str) {}

    fn barrier(&self, what: &str) -> Result<(), CommError> {
        self.check(Operation::Barrier, what, None)
    }

    fn all_gather_bytes(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.check(Operation::AllGatherBytes, what, None)?;
        Ok(vec![mine.to_vec()])
    }

    fn all_reduce(&self, what: &str, _data: &mut [f32]) -> Result<(), CommError> {
        self.check(Operation::AllReduce, what, None)
    }

    fn broadcast(&self, what: &str, root: Rank, _data: SpanMut<'_>) -> Result<(), CommError> {
        self.check(Operation::Broadcast, what, chunks::broadcast_problem(root, 1))
    }

    fn reduce_scatter(
        &self,
        what: &str,
        input: &Pieces<'_>,
        shard: &mut [f32],
        scale: f32,
        into: Into,
    ) -> Result<f64, CommError> {
        let problem = chunks::reduce_scatter_problem(input, shard.len(), 1);
        self.check(Operation::ReduceScatter, what, problem)?;
        let mut squares = 0.0;
        let reduction = Reduction { input, start: 0, me: 0, world: 1, scale, into };
        Reducer::new().reduce(&reduction, &(0..shard.len()), |_| None, shard, &mut squares);
        Ok(squares)
    }

    fn all_gather(
        &self,
        what: &str,
        dtype: DType,
        produce: &mut Produce<'_>,
        output: &mut PiecesMut<'_>,
    ) -> Result<(), CommError> {
        self.check(Operation::AllGather, what, chunks::all_gather_problem(output, 1))?;
        let mut scratch = AlignedBuffer::zeroed(RANGE.min(output.len), dtype);
        let mut start = 0;
        while start < output.len {
            let end = output.len.min(start + RANGE);
            let index = output.runs.partition_point(|(offset, run)| offset + run.len() <= start);
            match output.runs.get_mut(index) {
                // Straight to where it shall be.
                Some((offset, run))
                    if *offset <= start
                        && run.dtype() == dtype
                        && (*offset + run.len() >= end || *offset + run.len() - start >= DIRECT) =>
                {
                    let end = end.min(*offset + run.len());
                    produce(start..end, run.slice_mut(start - *offset, end - start));
                    start = end;
                }
                _ => {
                    produce(start..end, scratch.span_mut().slice_mut(0, end - start));
                    output.write(&(start..end), scratch.span().slice(0, end - start));
                    start = end;
                }
            }
        }
        Ok(())
    }
}
