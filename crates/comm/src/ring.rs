//! Moving chunks through the rings: who may touch which slot when.
//!
//! This is the only file that turns the segment's bytes into references. [`Ring`] holds where the rank is,
//! [`Lane`] is a ring during one call.

use deepspeed_core::{DType, Span, SpanMut};

use crate::{
    CommError,
    error::CommError::Mismatch,
    fingerprint::Fingerprint,
    segment::{LABEL, SLOTS, Segment},
    wait::{Spin, reached, wait},
    watch::{Need, Watch},
};

/// Where a rank is in its ring and in its peers'. Counters run on from call to call and wrap around.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Chunks published by this rank.
    published: u32,
    /// Chunks consumed by this rank from each peer.
    consumed: u32,
    spin: Spin,
}

impl Ring {
    pub(crate) fn new(crowded: bool) -> Self {
        Self { published: 0, consumed: 0, spin: Spin::new(crowded) }
    }
}

/// A ring during one call.
pub(crate) struct Lane<'a> {
    segment: &'a Segment,
    me: usize,
    ring: &'a mut Ring,
    watch: &'a mut Watch,
    call: &'a Fingerprint,
    /// Whether the peers' fingerprints of this call were compared.
    compared: bool,
}

/// The slots of all ranks that hold one chunk, until it is consumed.
pub(crate) struct Slots<'a> {
    segment: &'a Segment,
    slot: usize,
}

impl<'a> Lane<'a> {
    pub(crate) fn new(
        segment: &'a Segment,
        me: usize,
        ring: &'a mut Ring,
        watch: &'a mut Watch,
        call: &'a Fingerprint,
    ) -> Self {
        Self { segment, me, ring, watch, call, compared: false }
    }

    /// Bytes of data of a chunk; the slices that are passed around have [`LABEL`] more.
    pub(crate) fn capacity(&self) -> usize {
        self.segment.slot_bytes()
    }

    /// Publishes the next chunk, which `fill` writes.
    ///
    /// At most [`SLOTS`] chunks may be published that this rank has not consumed itself.
    ///
    /// # Errors
    /// [`CommError`]: a peer that must consume an older chunk first does not.
    pub(crate) fn write<T>(&mut self, fill: impl FnOnce(&mut [u8]) -> T) -> Result<T, CommError> {
        let slot = self.claim()?;
        // SAFETY: `claim` returned it (COMM-2): nobody else touches the slot until `publish`, and this closure is
        // the only access by this rank, whose lane is borrowed exclusively.
        let result = fill(unsafe { std::slice::from_raw_parts_mut(slot, self.capacity() + LABEL) });
        self.publish();
        Ok(result)
    }

    /// Consumes the next chunk: `drain` reads every rank's slot of it.
    ///
    /// # Errors
    /// [`CommError`]: a peer does not publish it, or called something else.
    pub(crate) fn read<T>(&mut self, drain: impl FnOnce(&Slots<'_>) -> T) -> Result<T, CommError> {
        let slots = self.arrive()?;
        let result = drain(&slots);
        self.release();
        Ok(result)
    }

    /// Consumes the next chunk and publishes what `exchange` makes of it.
    ///
    /// # Errors
    /// As [`Lane::write`] and [`Lane::read`].
    pub(crate) fn exchange<T>(
        &mut self,
        exchange: impl FnOnce(&Slots<'_>, &mut [u8]) -> T,
    ) -> Result<T, CommError> {
        assert!(self.outstanding() >= 1 && self.outstanding() < SLOTS as u32, "the two chunks share a slot");
        let slot = self.claim()?;
        let slots = self.arrive()?;
        // SAFETY: as in `write`; `slots` gives the slots of an older chunk, not more than `SLOTS - 1` chunks older,
        // which are others than this one.
        let result =
            exchange(&slots, unsafe { std::slice::from_raw_parts_mut(slot, self.capacity() + LABEL) });
        self.release();
        self.publish();
        Ok(result)
    }

    /// Chunks this rank has published and not consumed.
    fn outstanding(&self) -> u32 {
        self.ring.published.wrapping_sub(self.ring.consumed)
    }

    /// The slot of the next chunk to publish, once every rank has consumed what it held.
    fn claim(&mut self) -> Result<*mut u8, CommError> {
        assert!(self.outstanding() < SLOTS as u32, "a rank must consume its own chunks too");
        // The slot held chunk `published - SLOTS`; before the first round this target is one that every counter
        // has reached.
        let target = self.ring.published.wrapping_sub(SLOTS as u32 - 1);
        for rank in 0..self.segment.world() {
            if rank != self.me {
                self.wait_for(rank, Need::Consumed(target))?;
            }
        }
        Ok(self.segment.slot(self.me, self.ring.published as usize % SLOTS))
    }

    fn publish(&mut self) {
        self.ring.published = self.ring.published.wrapping_add(1);
        self.segment.control(self.me).published.0.store(self.ring.published);
    }

    /// Every rank's slot of the next chunk to consume, once all have published it.
    fn arrive(&mut self) -> Result<Slots<'a>, CommError> {
        assert!(self.outstanding() > 0, "a rank must publish a chunk before it consumes it");
        let target = self.ring.consumed.wrapping_add(1);
        for rank in 0..self.segment.world() {
            if rank != self.me {
                self.wait_for(rank, Need::Published(target))?;
                if !self.compared {
                    self.compare(rank)?;
                }
            }
        }
        self.compared = true;
        Ok(Slots { segment: self.segment, slot: self.ring.consumed as usize % SLOTS })
    }

    fn release(&mut self) {
        self.ring.consumed = self.ring.consumed.wrapping_add(1);
        self.segment.control(self.me).consumed.0.store(self.ring.consumed);
    }

    fn wait_for(&mut self, rank: usize, need: Need) -> Result<(), CommError> {
        let control = self.segment.control(rank);
        let (word, target) = match need {
            Need::Published(target) => (&control.published.0, target),
            Need::Consumed(target) => (&control.consumed.0, target),
        };
        if reached(word.load(), target) {
            return Ok(());
        }
        self.watch.start();
        let (watch, segment, call) = (&mut *self.watch, self.segment, self.call);
        wait(word, target, &mut self.ring.spin, || watch.look(segment, call, need))
    }

    /// Compares a peer's fingerprint of this call with ours (COMM-7). The peer has published the call's first chunk.
    fn compare(&self, rank: usize) -> Result<(), CommError> {
        let theirs = self.segment.control(rank).history.get(self.call.seq);
        match theirs {
            Some(theirs) if theirs == *self.call => Ok(()),
            Some(theirs) => Err(Mismatch {
                my_rank: deepspeed_core::Rank::from_index(self.me),
                mine: Box::new(self.call.clone()),
                rank: deepspeed_core::Rank::from_index(rank),
                theirs: Box::new(theirs),
            }),
            None => Err(CommError::Segment(format!(
                "rank {rank} sent a chunk of {} without saying what it is; do all ranks run the same build?",
                self.call
            ))),
        }
    }
}

impl Slots<'_> {
    /// A rank's bytes of the chunk.
    pub(crate) fn of(&self, rank: usize) -> &[u8] {
        // SAFETY: between `Lane::arrive` and `Lane::release` nobody writes these slots (COMM-3).
        unsafe {
            std::slice::from_raw_parts(self.segment.slot(rank, self.slot), self.segment.slot_bytes() + LABEL)
        }
    }
}

/// `len` elements of `dtype` at `offset` bytes.
///
/// # Panics
/// If they reach past the end or are misaligned.
pub(crate) fn elements(bytes: &[u8], offset: usize, len: usize, dtype: DType) -> Span<'_> {
    let bytes = &bytes[offset..offset + len * dtype.size()];
    assert!(bytes.as_ptr().addr().is_multiple_of(dtype.size()), "misaligned elements");
    // SAFETY: alignment was checked, the elements are those of a borrowed slice, and any bytes are valid numbers.
    unsafe { Span::from_raw(bytes.as_ptr(), len, dtype) }
}

/// As [`elements`], writable.
///
/// # Panics
/// If they reach past the end or are misaligned.
pub(crate) fn elements_mut(bytes: &mut [u8], offset: usize, len: usize, dtype: DType) -> SpanMut<'_> {
    let bytes = &mut bytes[offset..offset + len * dtype.size()];
    assert!(bytes.as_ptr().addr().is_multiple_of(dtype.size()), "misaligned elements");
    // SAFETY: as in `elements`, and the slice is borrowed exclusively.
    unsafe { SpanMut::from_raw(bytes.as_mut_ptr(), len, dtype) }
}
