//! The collectives of ranks on one host, over the rings of a [`Segment`].

use std::{
    fmt,
    ops::Range,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError, atomic::Ordering},
    time::Duration,
};

use deepspeed_core::{DType, Rank, Span, SpanMut};
use deepspeed_kernels::{cast, reduce_ranks};

use crate::{
    CommError,
    chunks::{Chunks, Parts, all_gather_problem, broadcast_problem, reduce_scatter_problem, shard_range},
    fingerprint::{Fingerprint, Operation, decode_dtype, encode_dtype},
    group::{Group, Into, Pieces, PiecesMut, Produce},
    pieces::{Reducer, Reduction},
    ring::{Lane, Ring, Slots, elements, elements_mut},
    segment::{Membership, SLOTS, Segment},
    wait,
    watch::{self, Watch},
};

/// How a shared-memory group behaves.
#[derive(Clone)]
pub struct Options {
    /// How long a rank waits for a peer before all fail.
    pub deadline: Duration,
    /// How long a rank waits before it warns who is missing.
    pub notice_after: Duration,
    /// Bytes of each rank's ring, at least; used by who creates the segment. What is larger than the
    /// second-level cache of a core is slower.
    pub ring_bytes: usize,
    /// Asked about twenty times a second while waiting; `true` ends the wait with [`CommError::Interrupted`].
    pub interrupt: Option<Interrupt>,
}

/// See [`Options::interrupt`].
pub type Interrupt = std::sync::Arc<dyn Fn() -> bool + Send + Sync>;

impl Default for Options {
    /// Half an hour, 5 seconds, 2 MiB, no interrupt.
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30 * 60),
            notice_after: Duration::from_secs(5),
            ring_bytes: 2 << 20,
            interrupt: None,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("deadline", &self.deadline)
            .field("notice_after", &self.notice_after)
            .field("ring_bytes", &self.ring_bytes)
            .field("interrupt", &self.interrupt.is_some())
            .finish()
    }
}

/// Elements that a small all-reduce sends whole to every rank, in one exchange instead of two.
const SMALL: usize = 16384;
/// Chunks that a rank publishes ahead of the one it reads.
const AHEAD: usize = 8;
/// As [`AHEAD`], of each kind, for the all-reduce.
const REDUCE_AHEAD: usize = 2;
const _: () = assert!(AHEAD <= SLOTS && 2 * REDUCE_AHEAD < SLOTS);

/// A rank of a group whose ranks share a [`Segment`].
///
/// Dropping it leaves the group; peers that then wait for this rank fail with
/// [`CommError::PeerGone`].
pub struct SharedMemory {
    segment: Segment,
    me: usize,
    /// The process that joined, which a fork of it is not.
    pid: u32,
    transport: &'static str,
    state: Mutex<State>,
    /// Held while the activity is replaced, which has one writer at a time.
    activity: Mutex<()>,
    failed: OnceLock<CommError>,
}

struct State {
    seq: u64,
    ring: Ring,
    watch: Watch,
    reducer: Reducer,
}

/// The ranks of a group of threads, in rank order.
///
/// # Errors
/// As [`Segment::for_threads`].
pub fn threads(world: usize, options: &Options) -> Result<Vec<SharedMemory>, CommError> {
    let segment = Segment::for_threads(world, options)?;
    (0..world).map(|rank| SharedMemory::join(&segment, Rank::from_index(rank), options)).collect()
}

impl SharedMemory {
    /// Takes the seat of `rank`. Does not wait for the others: the first collective does.
    ///
    /// # Errors
    /// [`CommError::Segment`] if there is no such rank or somebody has its seat; the group's error if it has
    /// already failed.
    pub fn join(segment: &Segment, rank: Rank, options: &Options) -> Result<Self, CommError> {
        let (me, world) = (rank.index(), segment.world());
        if me >= world {
            return Err(CommError::Segment(format!("rank {rank} cannot join a group of {world} ranks")));
        }
        segment.poisoned().map_or(Ok(()), Err)?;
        segment.control(me).member.0.join(std::process::id(), watch::start_time()).map_err(|taken| {
            let by = match taken {
                Membership::Joined { pid, .. } => format!("process {pid} has joined as that rank"),
                Membership::Left { pid } | Membership::Panicked { pid } => {
                    format!("process {pid} was that rank and has left; a rank joins once")
                }
                Membership::Absent => "another process is joining as that rank".to_owned(),
            };
            CommError::Segment(format!("rank {rank} cannot join: {by}"))
        })?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self {
            segment: segment.clone(),
            me,
            pid: std::process::id(),
            transport: if segment.handle().is_some() { "shared memory" } else { "threads" },
            state: Mutex::new(State {
                seq: 0,
                ring: Ring::new(world > cores),
                watch: Watch::new(me, world, options.clone()),
                reducer: Reducer::new(),
            }),
            activity: Mutex::new(()),
            failed: OnceLock::new(),
        })
    }

    /// Runs one collective: records and compares its fingerprint, and keeps its error.
    fn call<T>(
        &self,
        operation: Operation,
        what: &str,
        describe: impl FnOnce(Fingerprint) -> Fingerprint,
        problem: Option<String>,
        body: impl FnOnce(&mut Lane<'_>, &mut Reducer) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        let mut state = self.lock();
        if let Some(error) = self.failed.get() {
            return Err(error.clone());
        }
        if let Some(error) = self.segment.poisoned() {
            return Err(self.fail(error));
        }
        if let Some(problem) = problem {
            let rank = Rank::from_index(self.me);
            return Err(self.fail(CommError::Arguments { rank, operation, what: what.to_owned(), problem }));
        }
        let State { seq, ring, watch, reducer } = &mut *state;
        *seq += 1;
        let call = describe(Fingerprint::new(operation, *seq, what));
        let control = self.segment.control(self.me);
        control.history.push(&call);
        control.member.0.entered.store(*seq, Ordering::Release);
        let unwinding = PoisonOnPanic { group: self, call: &call };
        let result = body(&mut Lane::new(&self.segment, self.me, ring, watch, &call), reducer);
        drop(unwinding);
        match result {
            Ok(value) => {
                control.member.0.finished.store(*seq, Ordering::Release);
                Ok(value)
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Keeps the group's first error, which may be another than `error`.
    fn fail(&self, error: CommError) -> CommError {
        let first = match error {
            CommError::Poisoned { .. } => error,
            own => self.segment.poison(self.me as u32, &own).unwrap_or(own),
        };
        self.failed.get_or_init(|| first).clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // After a panic inside a call every further call fails before it touches the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the peers if a call unwinds: they would wait for a rank that is in no state to go on.
struct PoisonOnPanic<'a> {
    group: &'a SharedMemory,
    call: &'a Fingerprint,
}

impl Drop for PoisonOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Fingerprint { operation, seq, what, .. } = self.call;
            self.group.fail(CommError::Panicked {
                rank: Rank::from_index(self.group.me),
                operation: *operation,
                seq: *seq,
                what: what.clone(),
            });
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            return;
        }
        let control = self.segment.control(self.me);
        control.member.0.leave(std::thread::panicking());
        wait::wake(&control.published.0);
        wait::wake(&control.consumed.0);
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory")
            .field("rank", &self.me)
            .field("segment", &self.segment)
            .field("failed", &self.failed.get())
            .finish_non_exhaustive()
    }
}

impl Group for SharedMemory {
    fn rank(&self) -> Rank {
        Rank::from_index(self.me)
    }

    fn world(&self) -> usize {
        self.segment.world()
    }

    fn transport(&self) -> &str {
        self.transport
    }

    fn shares_memory(&self) -> bool {
        true
    }

    fn set_activity(&self, activity: &str) {
        let _one = self.activity.lock().unwrap_or_else(PoisonError::into_inner);
        self.segment.control(self.me).activity.set(activity);
    }

    fn barrier(&self, what: &str) -> Result<(), CommError> {
        self.call(
            Operation::Barrier,
            what,
            |call| call,
            None,
            |lane, _| {
                lane.write(|_| ())?;
                lane.read(|_| ())
            },
        )
    }

    fn all_gather_bytes(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.call(
            Operation::AllGatherBytes,
            what,
            |call| call,
            None,
            |lane, _| gather_bytes(lane, self.world(), mine),
        )
    }

    fn all_reduce(&self, what: &str, data: &mut [f32]) -> Result<(), CommError> {
        let len = data.len();
        let describe = |call: Fingerprint| call.elements(len).dtype(DType::F32);
        self.call(Operation::AllReduce, what, describe, None, |lane, _| {
            if self.world() == 1 {
                return Ok(());
            }
            if len <= SMALL {
                self.all_reduce_at_once(lane, data)
            } else {
                self.all_reduce_in_shards(lane, data)
            }
        })
    }

    fn broadcast(&self, what: &str, root: Rank, mut data: SpanMut<'_>) -> Result<(), CommError> {
        let (len, dtype) = (data.len(), data.dtype());
        let describe = |call: Fingerprint| call.elements(len).dtype(dtype).root(root);
        let problem = broadcast_problem(root, self.world());
        self.call(Operation::Broadcast, what, describe, problem, |lane, _| {
            let chunks = Chunks::new(len, lane.capacity() / dtype.size());
            pipeline(
                lane,
                &chunks,
                &mut data,
                |data, range, slot| {
                    if self.me == root.index() {
                        let source = data.as_span().slice(range.start, range.len());
                        cast(source, elements_mut(slot, 0, range.len(), dtype));
                    }
                },
                |data, range, slots| {
                    if self.me != root.index() {
                        let source = elements(slots.of(root.index()), 0, range.len(), dtype);
                        cast(source, data.slice_mut(range.start, range.len()));
                    }
                    Ok(())
                },
            )
        })
    }

    fn reduce_scatter(
        &self,
        what: &str,
        input: &Pieces<'_>,
        shard: &mut [f32],
        scale: f32,
        into: Into,
    ) -> Result<f64, CommError> {
        let world = self.world();
        let describe = |call: Fingerprint| call.elements(input.len);
        let problem = reduce_scatter_problem(input, shard.len(), world);
        self.call(Operation::ReduceScatter, what, describe, problem, |lane, reducer| {
            let capacity = lane.capacity();
            let parts = Parts::new(self.me, world, capacity);
            let chunks = Chunks::new(shard.len(), parts.stride / size_of::<f32>());
            let dtype = input.wire_dtype();
            let reduction =
                Reduction { input, start: self.me * shard.len(), me: self.me, world, scale, into };
            let shard_len = shard.len();
            let mut squares = 0.0;
            pipeline(
                lane,
                &chunks,
                shard,
                |_, range, slot| {
                    slot[capacity] = encode_dtype(dtype) as u8;
                    let Some(dtype) = dtype else { return };
                    for peer in (0..world).filter(|peer| *peer != self.me) {
                        let target = &mut elements_mut(slot, parts.to(peer), range.len(), dtype);
                        input.read(&shard_range(peer, shard_len, &range), target);
                    }
                },
                |shard, range, slots| {
                    let mut sources: Vec<Option<Span<'_>>> = Vec::with_capacity(world);
                    for rank in 0..world {
                        let slot = slots.of(rank);
                        let dtype = if rank == self.me { None } else { wire_dtype(rank, slot[capacity])? };
                        sources.push(dtype.map(|dtype| elements(slot, parts.from(rank), range.len(), dtype)));
                    }
                    reducer.reduce(&reduction, &range, |rank| sources[rank], shard, &mut squares);
                    Ok(())
                },
            )?;
            Ok(squares)
        })
    }

    fn all_gather(
        &self,
        what: &str,
        dtype: DType,
        produce: &mut Produce<'_>,
        output: &mut PiecesMut<'_>,
    ) -> Result<(), CommError> {
        let world = self.world();
        let (len, shard_len) = (output.len, output.len / world);
        let describe = |call: Fingerprint| call.elements(len).dtype(dtype);
        let problem = all_gather_problem(output, world);
        self.call(Operation::AllGather, what, describe, problem, |lane, _| {
            let chunks = Chunks::new(shard_len, lane.capacity() / dtype.size());
            pipeline(
                lane,
                &chunks,
                output,
                |_, range, slot| {
                    let len = range.len();
                    if len > 0 {
                        produce(range, elements_mut(slot, 0, len, dtype));
                    }
                },
                |output, range, slots| {
                    for rank in 0..world {
                        let elements = elements(slots.of(rank), 0, range.len(), dtype);
                        output.write(&shard_range(rank, shard_len, &range), elements);
                    }
                    Ok(())
                },
            )
        })
    }
}

impl SharedMemory {
    /// Every rank sends all it has to all, and all add up: one exchange instead of two, but more bytes.
    fn all_reduce_at_once(&self, lane: &mut Lane<'_>, data: &mut [f32]) -> Result<(), CommError> {
        let chunks = Chunks::new(data.len(), lane.capacity() / size_of::<f32>());
        pipeline(
            lane,
            &chunks,
            data,
            |data, range, slot| {
                let target = elements_mut(slot, 0, range.len(), DType::F32);
                cast(Span::from(&data[range]), target);
            },
            |data, range, slots| {
                let inputs: Vec<Span<'_>> = (0..self.world())
                    .map(|rank| elements(slots.of(rank), 0, range.len(), DType::F32))
                    .collect();
                reduce_ranks(&inputs, 1.0, &mut data[range], false);
                Ok(())
            },
        )
    }

    /// Reduce-scatter and all-gather, chunk by chunk: while one chunk's sums are on their way to the peers, the
    /// next ones' summands are too.
    ///
    /// ```text
    /// R: parts for the peers' shards    G: sums of the own shard    here REDUCE_AHEAD = 2
    /// published  R0 R1    G0 R2    G1 R3       G2 R4 ..
    /// consumed         R0       R1       G0 R2       G1 R3 ..
    /// ```
    fn all_reduce_in_shards(&self, lane: &mut Lane<'_>, data: &mut [f32]) -> Result<(), CommError> {
        let (world, len) = (self.world(), data.len());
        // Whole cache lines; the last shards may be short or empty.
        let shard_len = len.div_ceil(world).next_multiple_of(64);
        let parts = Parts::new(self.me, world, lane.capacity());
        let chunks = Chunks::new(shard_len, parts.stride / size_of::<f32>());
        let clip = |rank: usize, range: &Range<usize>| {
            let whole = shard_range(rank, shard_len, range);
            whole.start.min(len)..whole.end.min(len)
        };
        let scatter = |lane: &mut Lane<'_>, data: &[f32], chunk: usize| {
            lane.write(|slot| {
                for peer in (0..world).filter(|peer| *peer != self.me) {
                    let part = &data[clip(peer, &chunks.range(chunk))];
                    let target = elements_mut(slot, parts.to(peer), part.len(), DType::F32);
                    cast(Span::from(part), target);
                }
            })
        };
        let gather = |lane: &mut Lane<'_>, data: &mut [f32], chunk: usize| {
            lane.read(|slots| {
                for rank in 0..world {
                    let target = &mut data[clip(rank, &chunks.range(chunk))];
                    cast(elements(slots.of(rank), 0, target.len(), DType::F32), SpanMut::from(target));
                }
            })
        };
        let ahead = REDUCE_AHEAD;
        for chunk in 0..chunks.count.min(ahead) {
            scatter(lane, data, chunk)?;
        }
        for chunk in 0..chunks.count {
            if chunk >= ahead {
                gather(lane, data, chunk - ahead)?;
            }
            let range = shard_range(self.me, shard_len, &chunks.range(chunk));
            let own = &data[range.start.min(len)..range.end.min(len)];
            lane.exchange(|slots, slot| {
                let inputs: Vec<Span<'_>> = (0..world)
                    .map(|rank| match rank == self.me {
                        true => Span::from(own),
                        false => elements(slots.of(rank), parts.from(rank), own.len(), DType::F32),
                    })
                    .collect();
                let mut sums = elements_mut(slot, 0, own.len(), DType::F32);
                let sums = sums.as_f32_mut().expect("invariant: asked for fp32");
                reduce_ranks(&inputs, 1.0, sums, false);
            })?;
            if chunk + ahead < chunks.count {
                scatter(lane, data, chunk + ahead)?;
            }
        }
        for chunk in chunks.count.saturating_sub(ahead)..chunks.count {
            gather(lane, data, chunk)?;
        }
        Ok(())
    }
}

/// Publishes all chunks, [`AHEAD`] of reading them. `data` is what both closures work on.
fn pipeline<D: ?Sized>(
    lane: &mut Lane<'_>,
    chunks: &Chunks,
    data: &mut D,
    mut fill: impl FnMut(&mut D, Range<usize>, &mut [u8]),
    mut drain: impl FnMut(&mut D, Range<usize>, &Slots<'_>) -> Result<(), CommError>,
) -> Result<(), CommError> {
    let mut written = 0;
    for read in 0..chunks.count {
        while written < chunks.count.min(read + AHEAD) {
            lane.write(|slot| fill(data, chunks.range(written), slot))?;
            written += 1;
        }
        lane.read(|slots| drain(data, chunks.range(read), slots))??;
    }
    Ok(())
}

/// Every rank's length and bytes, one after another, in as many chunks as the longest needs.
fn gather_bytes(lane: &mut Lane<'_>, world: usize, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
    let capacity = lane.capacity();
    let head = size_of::<u64>();
    lane.write(|slot| {
        let first = mine.len().min(capacity - head);
        slot[..head].copy_from_slice(&(mine.len() as u64).to_le_bytes());
        slot[head..head + first].copy_from_slice(&mine[..first]);
    })?;
    let mut all = vec![Vec::new(); world];
    let mut lens = vec![0; world];
    lane.read(|slots| {
        for (rank, (bytes, len)) in all.iter_mut().zip(&mut lens).enumerate() {
            let slot = slots.of(rank);
            let mut eight = [0; 8];
            eight.copy_from_slice(&slot[..head]);
            *len = u64::from_le_bytes(eight) as usize;
            bytes.extend_from_slice(&slot[head..][..(*len).min(capacity - head)]);
        }
    })?;
    let longest = lens.iter().copied().max().unwrap_or(0);
    let mut next = capacity - head;
    while next < longest {
        lane.write(|slot| {
            let rest = mine.get(next..).unwrap_or_default();
            let rest = &rest[..rest.len().min(capacity)];
            slot[..rest.len()].copy_from_slice(rest);
        })?;
        lane.read(|slots| {
            for (rank, (bytes, len)) in all.iter_mut().zip(&lens).enumerate() {
                let rest = len.saturating_sub(next).min(capacity);
                bytes.extend_from_slice(&slots.of(rank)[..rest]);
            }
        })?;
        next += capacity;
    }
    Ok(all)
}

fn wire_dtype(rank: usize, code: u8) -> Result<Option<DType>, CommError> {
    decode_dtype(u64::from(code)).ok_or_else(|| {
        CommError::Segment(format!(
            "rank {rank} sent a dtype of code {code}; do all ranks run the same build?"
        ))
    })
}
