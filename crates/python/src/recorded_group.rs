//! A process group whose collectives are counted: the communication logger's view of the engine.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use deepspeed_comm::{CommError, Group, Into, Pieces, PiecesMut, Produce};
use deepspeed_core::{DType, Rank, SpanMut};
use deepspeed_monitor::CommsLog;

/// Another group, and where its calls are counted.
#[derive(Debug)]
pub(crate) struct RecordedGroup {
    inner: Arc<dyn Group>,
    log: Arc<Mutex<CommsLog>>,
}

impl RecordedGroup {
    pub(crate) fn new(inner: Arc<dyn Group>, log: Arc<Mutex<CommsLog>>) -> Self {
        Self { inner, log }
    }

    fn timed<T>(&self, operation: &str, bytes: usize, call: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let found = call();
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.add(&format!("engine {operation}"), bytes as u64, began.elapsed());
        found
    }
}

impl Group for RecordedGroup {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn world(&self) -> usize {
        self.inner.world()
    }

    fn transport(&self) -> &str {
        self.inner.transport()
    }

    fn shares_memory(&self) -> bool {
        self.inner.shares_memory()
    }

    fn set_activity(&self, activity: &str) {
        self.inner.set_activity(activity);
    }

    fn barrier(&self, what: &str) -> Result<(), CommError> {
        self.timed("barrier", 0, || self.inner.barrier(what))
    }

    fn all_gather_bytes(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.timed("all_gather", mine.len(), || self.inner.all_gather_bytes(what, mine))
    }

    fn all_reduce(&self, what: &str, data: &mut [f32]) -> Result<(), CommError> {
        self.timed("all_reduce", size_of_val(data), || self.inner.all_reduce(what, data))
    }

    fn broadcast(&self, what: &str, root: Rank, data: SpanMut<'_>) -> Result<(), CommError> {
        let bytes = data.len() * data.dtype().size();
        self.timed("broadcast", bytes, || self.inner.broadcast(what, root, data))
    }

    fn reduce_scatter(
        &self,
        what: &str,
        input: &Pieces<'_>,
        shard: &mut [f32],
        scale: f32,
        into: Into,
    ) -> Result<f64, CommError> {
        let bytes = input.runs.iter().map(|(_, run)| run.len() * run.dtype().size()).sum();
        self.timed("reduce_scatter", bytes, || self.inner.reduce_scatter(what, input, shard, scale, into))
    }

    fn all_gather(
        &self,
        what: &str,
        dtype: DType,
        produce: &mut Produce<'_>,
        output: &mut PiecesMut<'_>,
    ) -> Result<(), CommError> {
        // The update of the weights runs inside: its time counts, too.
        let bytes = output.len / self.inner.world().max(1) * dtype.size();
        self.timed("all_gather", bytes, || self.inner.all_gather(what, dtype, produce, output))
    }
}
