//! The engine's collectives on top of anything that moves bytes between ranks: torch.distributed, MPI.
//!
//! The transport never adds numbers. A reduce-scatter is an all-to-all in the gradients' own dtype followed by the same
//! reduction, in fp32 and in rank order, as on shared memory; so every transport gives the same bits and sends half the
//! bytes that fp32 would. Each message carries its call's fingerprint, so ranks that disagree notice.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use deepspeed_core::{AlignedBuffer, DType, Rank, Span, SpanMut};

use crate::{
    CommError, Options,
    board::{Board, Farewell},
    byte_transport::{ByteTransport, Progress},
    chunks::{all_gather_problem, reduce_scatter_problem},
    fingerprint::{CallName, Fingerprint, Operation},
    group::{Group, Into, Pieces, PiecesMut, Produce},
    lookout::{Lookout, Member},
    pieces::{Reducer, Reduction},
    vigil::Caller,
};

/// Bytes of a message before its payload: the fingerprint.
const HEADER: usize = Fingerprint::BYTES;

/// Bytes that [`Group::all_gather_bytes`] sends at once; longer messages take a second round.
const INLINE: usize = 256;

/// Bytes that a broadcast moves at once.
const BROADCAST: usize = 4 << 20;

/// How long the transport waits at a time: as late as this, an interrupt or an error of the group ends a wait.
const SLICE: Duration = Duration::from_millis(200);

/// A process group whose bytes are moved by `T`.
///
/// Dropping it leaves the group.
#[derive(Debug)]
pub struct OverBytes<T> {
    transport: T,
    rank: Rank,
    world: usize,
    name: String,
    seq: AtomicU64,
    activity: Mutex<String>,
    failed: Mutex<Option<CommError>>,
    lookout: Option<Lookout>,
    /// Memory for messages, sent and received, kept for the next call: what allocators keep of freed buffers can be more.
    messages: Mutex<Vec<AlignedBuffer>>,
}

impl<T: ByteTransport> OverBytes<T> {
    /// The group of `world` ranks in which this process is `rank`; `name` says what carries the bytes. It waits as long
    /// as its transport does.
    pub fn new(transport: T, rank: Rank, world: usize, name: String) -> Self {
        let (seq, activity, failed) = (AtomicU64::new(0), Mutex::default(), Mutex::default());
        Self {
            transport,
            rank,
            world,
            name,
            seq,
            activity,
            failed,
            lookout: None,
            messages: Mutex::default(),
        }
    }

    /// The same group, whose ranks tell each other on `board` where they are: a wait that lasts warns who is missing,
    /// ends at the deadline of `options`, and ends with the same error on all ranks. `members` are the ranks' processes.
    ///
    /// # Errors
    /// [`CommError::Io`] where no thread can be started.
    pub fn watched(
        mut self,
        board: Box<dyn Board>,
        members: Vec<Member>,
        options: &Options,
    ) -> Result<Self, CommError> {
        assert_eq!(members.len(), self.world, "one process for each rank");
        self.lookout = Some(Lookout::open(board, self.rank, members, options)?);
        Ok(self)
    }

    /// How to leave the group when this process ends; nothing where it is not [`watched`](Self::watched).
    pub fn farewell(&self) -> Option<Farewell> {
        self.lookout.as_ref().map(Lookout::farewell)
    }

    /// Runs one call under its own number; after an error no further call is made.
    fn call<R>(
        &self,
        operation: Operation,
        what: &str,
        len: usize,
        dtype: Option<DType>,
        work: impl FnOnce(&Fingerprint) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_none() {
            *failed = self.lookout.as_ref().and_then(Lookout::error);
        }
        if let Some(error) = &*failed {
            return Err(error.clone());
        }
        let seq = self.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let mut fingerprint = Fingerprint::new(operation, seq, what).elements(len);
        if let Some(dtype) = dtype {
            fingerprint = fingerprint.dtype(dtype);
        }
        let Some(lookout) = &self.lookout else {
            return work(&fingerprint).inspect_err(|error| *failed = Some(error.clone()));
        };
        lookout.enter(&fingerprint);
        match work(&fingerprint) {
            Ok(value) => {
                lookout.finish();
                Ok(value)
            }
            Err(error) => {
                let error = lookout.settle(error);
                *failed = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Memory of at least so many bytes each, to be given back to [`keep`](Self::keep): to send from, to receive in.
    fn lend(&self, sent: usize, received: usize) -> (AlignedBuffer, AlignedBuffer) {
        let mut kept = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let mut of = |bytes: usize| {
            let fits = kept.iter().position(|buffer| buffer.len() * DType::BF16.size() >= bytes);
            let found = fits.or_else(|| kept.len().checked_sub(1)).map(|index| kept.swap_remove(index));
            let large_enough = found.filter(|buffer| buffer.len() * DType::BF16.size() >= bytes);
            large_enough.unwrap_or_else(|| AlignedBuffer::zeroed(bytes / DType::BF16.size(), DType::BF16))
        };
        let received = of(received);
        (of(sent), received)
    }

    /// Takes back what [`lend`](Self::lend) gave.
    fn keep(&self, messages: [AlignedBuffer; 2]) {
        *self.messages.lock().unwrap_or_else(PoisonError::into_inner) = messages.into();
    }

    fn caller(&self) -> Caller {
        let activity = self.activity.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Caller { rank: self.rank, transport: self.name.clone(), activity }
    }

    fn transport_error(&self, fingerprint: &Fingerprint, problem: String) -> CommError {
        let Caller { rank, transport, activity } = self.caller();
        CommError::Transport { rank, call: Box::new(fingerprint.clone()), transport, activity, problem }
    }

    /// Moves `bytes` as `begin` says, and gives them back when that is over.
    fn moved<B>(
        &self,
        call: &Fingerprint,
        mut bytes: B,
        begin: impl FnOnce(&T, &mut B) -> Result<Progress, String>,
    ) -> Result<B, CommError> {
        let progress = begin(&self.transport, &mut bytes);
        match self.complete(call, progress) {
            Ok(()) => Ok(bytes),
            Err(error) => {
                // The transport may still be writing there, and this was the group's last call.
                std::mem::forget(bytes);
                self.transport.abandon();
                Err(error)
            }
        }
    }

    /// Waits until what was begun is over.
    fn complete(&self, call: &Fingerprint, mut progress: Result<Progress, String>) -> Result<(), CommError> {
        let mut vigil = None;
        loop {
            match progress {
                Ok(Progress::Done) => return Ok(()),
                Ok(Progress::Interrupted) => {
                    let (rank, operation, seq, what) =
                        (self.rank, call.operation, call.seq, call.what.clone());
                    return Err(CommError::Interrupted { rank, operation, seq, what });
                }
                Ok(Progress::Pending) | Err(_) => {}
            }
            let Some(lookout) = &self.lookout else {
                progress = match progress {
                    Err(problem) => return Err(self.transport_error(call, problem)),
                    Ok(_) => self.transport.wait(SLICE),
                };
                continue;
            };
            let vigil = vigil.get_or_insert_with(|| lookout.vigil(self.caller(), call));
            if let Err(problem) = progress {
                return Err(lookout.explain(vigil, problem));
            }
            lookout.keep(vigil)?;
            progress = self.transport.wait(SLICE);
        }
    }

    /// Checks that the message of `rank` belongs to the same call, and gives its payload.
    fn payload<'m>(&self, mine: &Fingerprint, rank: usize, message: &'m [u8]) -> Result<&'m [u8], CommError> {
        let (header, payload) = message.split_at(HEADER);
        match Fingerprint::from_bytes(header) {
            Some(theirs) if theirs == *mine => Ok(payload),
            Some(theirs) => Err(CommError::Mismatch {
                my_rank: self.rank,
                mine: Box::new(mine.clone()),
                rank: Rank::from_index(rank),
                theirs: Box::new(theirs),
            }),
            None => {
                let name = CallName { operation: mine.operation, seq: mine.seq, what: &mine.what };
                let problem = format!("what rank {rank} sent for {name} is no message of ours");
                Err(self.transport_error(mine, problem))
            }
        }
    }

    /// All ranks' payloads, equally long.
    fn gather(&self, fingerprint: &Fingerprint, payload: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let mut mine = fingerprint.to_bytes().to_vec();
        mine.extend_from_slice(payload);
        let all = vec![0; mine.len() * self.world];
        let (mine, all) =
            self.moved(fingerprint, (mine, all), |transport, (mine, all)| transport.all_gather(mine, all))?;
        let messages = all.chunks_exact(mine.len()).enumerate();
        messages.map(|(rank, message)| self.payload(fingerprint, rank, message).map(<[u8]>::to_vec)).collect()
    }
}

impl<T: ByteTransport> Group for OverBytes<T> {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn transport(&self) -> &str {
        &self.name
    }

    fn set_activity(&self, activity: &str) {
        activity.clone_into(&mut self.activity.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(lookout) = &self.lookout {
            lookout.set_activity(activity);
        }
    }

    fn barrier(&self, what: &str) -> Result<(), CommError> {
        self.call(Operation::Barrier, what, 0, None, |call| self.gather(call, &[]).map(drop))
    }

    fn all_gather_bytes(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.call(Operation::AllGatherBytes, what, 0, None, |call| {
            let mut first = [0; 8 + INLINE];
            first[..8].copy_from_slice(&(mine.len() as u64).to_le_bytes());
            let inline = mine.len().min(INLINE);
            first[8..8 + inline].copy_from_slice(&mine[..inline]);
            let all = self.gather(call, &first)?;
            let length = |message: &[u8]| {
                let word = message.first_chunk::<8>().map_or(0, |word| u64::from_le_bytes(*word));
                usize::try_from(word).unwrap_or(usize::MAX)
            };
            let longest = all.iter().map(|message| length(message)).max().unwrap_or(0);
            if longest <= INLINE {
                return Ok(all.iter().map(|message| message[8..8 + length(message)].to_vec()).collect());
            }
            let mut padded = mine.to_vec();
            padded.resize(longest, 0);
            let whole = self.gather(call, &padded)?;
            Ok(whole.iter().zip(&all).map(|(bytes, first)| bytes[..length(first)].to_vec()).collect())
        })
    }

    fn all_reduce(&self, what: &str, data: &mut [f32]) -> Result<(), CommError> {
        let part = data.len().div_ceil(self.world);
        let mut shard = vec![0.0f32; part];
        let input = Pieces { len: part * self.world, runs: vec![(0, Span::from(&*data))] };
        self.reduce_scatter(what, &input, &mut shard, 1.0, Into::Store)?;
        let mut produce = |range: std::ops::Range<usize>, mut target: SpanMut<'_>| {
            let bytes = Span::from(&shard[range]).as_bytes();
            target.as_bytes_mut().copy_from_slice(bytes);
        };
        let mut output = PiecesMut { len: part * self.world, runs: vec![(0, SpanMut::from(data))] };
        self.all_gather(what, DType::F32, &mut produce, &mut output)
    }

    fn broadcast(&self, what: &str, root: Rank, mut data: SpanMut<'_>) -> Result<(), CommError> {
        let (len, dtype) = (data.len(), data.dtype());
        self.call(Operation::Broadcast, what, len, Some(dtype), |call| {
            self.gather(call, &root.0.to_le_bytes())?;
            // Piece by piece through memory of the group's own: a call that fails leaves it to the transport.
            let bytes = data.as_bytes_mut();
            let (mut piece, spare) = self.lend(bytes.len().min(BROADCAST), 0);
            for part in bytes.chunks_mut(BROADCAST) {
                if root == self.rank {
                    piece.span_mut().as_bytes_mut()[..part.len()].copy_from_slice(part);
                }
                piece = self.moved(call, piece, |transport, piece| {
                    transport.broadcast(&mut piece.span_mut().as_bytes_mut()[..part.len()], root)
                })?;
                if root != self.rank {
                    part.copy_from_slice(&piece.span().as_bytes()[..part.len()]);
                }
            }
            self.keep([piece, spare]);
            Ok(())
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
        let wire = input.wire_dtype().unwrap_or(DType::F32);
        let part = shard.len();
        self.call(Operation::ReduceScatter, what, input.len, Some(wire), |call| {
            if let Some(problem) = reduce_scatter_problem(input, part, self.world) {
                let (rank, operation, what) = (self.rank, Operation::ReduceScatter, what.to_owned());
                return Err(CommError::Arguments { rank, operation, what, problem });
            }
            // A message begins at a multiple of 64 bytes, so payloads are aligned for every dtype.
            let message = (HEADER + part * wire.size()).next_multiple_of(64);
            let total = message * self.world;
            let (mut send, receive) = self.lend(total, total);
            let mut to_all = send.span_mut();
            for (rank, bytes) in to_all.as_bytes_mut()[..total].chunks_exact_mut(message).enumerate() {
                bytes[..HEADER].copy_from_slice(&call.to_bytes());
                if rank != self.rank.index() {
                    let range = rank * part..(rank + 1) * part;
                    input.read(&range, &mut numbers_mut(&mut bytes[HEADER..], part, wire));
                }
            }
            let (send, receive) = self.moved(call, (send, receive), |transport, (send, receive)| {
                let mut received = receive.span_mut();
                transport.all_to_all(&send.span().as_bytes()[..total], &mut received.as_bytes_mut()[..total])
            })?;
            let received = &receive.span().as_bytes()[..total];
            let mut peers = Vec::with_capacity(self.world);
            for (rank, bytes) in received.chunks_exact(message).enumerate() {
                peers.push(numbers(self.payload(call, rank, bytes)?, part, wire));
            }
            let me = self.rank.index();
            let reduction = Reduction { input, start: me * part, me, world: self.world, scale, into };
            let mut squares = 0.0;
            Reducer::new().reduce(&reduction, &(0..part), |rank| Some(peers[rank]), shard, &mut squares);
            self.keep([send, receive]);
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
        let part = output.len / self.world;
        self.call(Operation::AllGather, what, output.len, Some(dtype), |call| {
            if let Some(problem) = all_gather_problem(output, self.world) {
                let (rank, operation, what) = (self.rank, Operation::AllGather, what.to_owned());
                return Err(CommError::Arguments { rank, operation, what, problem });
            }
            let message = (HEADER + part * dtype.size()).next_multiple_of(64);
            let total = message * self.world;
            let (mut mine, all) = self.lend(total, total);
            let mut mine_span = mine.span_mut();
            let bytes = &mut mine_span.as_bytes_mut()[..total];
            bytes[..HEADER].copy_from_slice(&call.to_bytes());
            produce(0..part, numbers_mut(&mut bytes[HEADER..], part, dtype));
            // The same for each rank, and not the transport's own all-gather: Gloo's takes memory for the whole once more, on
            // threads whose allocators keep it.
            for rank in 1..self.world {
                bytes.copy_within(..message, rank * message);
            }
            let (mine, all) = self.moved(call, (mine, all), |transport, (mine, all)| {
                let mut received = all.span_mut();
                transport.all_to_all(&mine.span().as_bytes()[..total], &mut received.as_bytes_mut()[..total])
            })?;
            for (rank, bytes) in all.span().as_bytes()[..total].chunks_exact(message).enumerate() {
                let payload = self.payload(call, rank, bytes)?;
                output.write(&(rank * part..(rank + 1) * part), numbers(payload, part, dtype));
            }
            self.keep([mine, all]);
            Ok(())
        })
    }
}

/// The first `len` elements of a payload.
fn numbers(payload: &[u8], len: usize, dtype: DType) -> Span<'_> {
    assert!(
        payload.len() >= len * dtype.size() && payload.as_ptr().addr().is_multiple_of(dtype.size()),
        "a whole payload"
    );
    // SAFETY: long enough and aligned, as just checked; any bytes are numbers; borrowed for the span's life.
    unsafe { Span::from_raw(payload.as_ptr(), len, dtype) }
}

/// As [`numbers`], writable.
fn numbers_mut(payload: &mut [u8], len: usize, dtype: DType) -> SpanMut<'_> {
    assert!(
        payload.len() >= len * dtype.size() && payload.as_ptr().addr().is_multiple_of(dtype.size()),
        "a whole payload"
    );
    // SAFETY: as in `numbers`, and the borrow is exclusive.
    unsafe { SpanMut::from_raw(payload.as_mut_ptr(), len, dtype) }
}
