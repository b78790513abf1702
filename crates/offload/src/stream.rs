//! The buffers of a pipeline between a store and memory, and what is in flight between them.

use std::{
    iter,
    sync::mpsc::{self, Receiver, Sender},
    time::{Duration, Instant},
};

use deepspeed_core::{AlignedBuffer, DType};

use crate::{
    Direction, Item, OffloadError, Pass, Region, Result, Store,
    region::padded_bytes,
    request::{Completion, Request, Tag},
};

/// What one lane of a stream holds at a time: at most `len` elements of `dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// The element type of the lane's regions.
    pub dtype: DType,
    /// Elements of its longest region.
    pub len: usize,
}

impl Lane {
    /// A lane of fp32 numbers.
    pub fn f32(len: usize) -> Self {
        Self { dtype: DType::F32, len }
    }
}

/// What a pass does with a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read from the store, never written back (gradients).
    Read,
    /// Read, changed, written back (optimizer state).
    Update,
    /// Only written (first values). The memory handed out holds leftover numbers.
    Overwrite,
}

impl Access {
    fn moves(self, direction: Direction) -> bool {
        match direction {
            Direction::Read => self != Self::Overwrite,
            Direction::Write => self != Self::Read,
        }
    }
}

/// How far a stream's I/O may run apart from its caller. A stream has `1 + read_ahead + write_behind` slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Items that may be read before they are asked for; 0 (`pipeline_read` false): reads wait for the caller.
    pub read_ahead: usize,
    /// Items that may be on their way out while the caller goes on; 0 (`pipeline_write` false): the caller waits for
    /// its writes.
    pub write_behind: usize,
}

impl Depth {
    /// The depth that makes use of `slots` slots with the keys `pipeline_read` and `pipeline_write` of the config; a
    /// pipeline takes a slot for each of its sides, even if `slots` is less.
    pub fn with_slots(slots: usize, pipeline_read: bool, pipeline_write: bool) -> Self {
        let apart = slots.saturating_sub(1).max(usize::from(pipeline_read) + usize::from(pipeline_write));
        let (read_ahead, write_behind) = match (pipeline_read, pipeline_write) {
            (false, false) => (0, 0),
            (true, false) => (apart, 0),
            (false, true) => (0, apart),
            (true, true) => (apart.div_ceil(2), apart / 2),
        };
        Self { read_ahead, write_behind }
    }
}

impl Default for Depth {
    /// One item each way.
    fn default() -> Self {
        Self { read_ahead: 1, write_behind: 1 }
    }
}

/// What a pass has moved, and how long its caller waited for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes read from the store, padding included.
    pub read_bytes: u64,
    /// Bytes written to the store, padding included.
    pub written_bytes: u64,
    /// Time the caller spent waiting for the device.
    pub waited: Duration,
}

/// A fixed number of buffers through which a [`Pass`] moves its items.
///
/// Made once and used for every step: its memory is all the memory there is ([`Stream::buffer_bytes`]), and each number
/// enters it once per pass. The first error is kept; every later call returns it.
#[derive(Debug)]
pub struct Stream {
    store: Store,
    lanes: Vec<Lane>,
    pub(crate) depth: Depth,
    slots: Vec<Slot>,
    /// Slots that hold nothing.
    free: Vec<usize>,
    /// Slots that are being written.
    pub(crate) writing: usize,
    in_flight: usize,
    reply: Sender<Completion>,
    completions: Receiver<Completion>,
    failed: Option<OffloadError>,
    pub(crate) traffic: Traffic,
}

/// Memory for one item.
#[derive(Debug)]
struct Slot {
    /// One for each lane; empty while a request has it.
    buffers: Vec<AlignedBuffer>,
    /// Requests that have a buffer of it.
    pending: usize,
    writing: bool,
}

impl Stream {
    /// A stream over regions of `store`, with memory for `1 + depth.read_ahead + depth.write_behind` items of `lanes`.
    pub fn new(store: &Store, lanes: &[Lane], depth: Depth) -> Self {
        let (reply, completions) = mpsc::channel();
        let slot = || Slot {
            buffers: lanes
                .iter()
                .map(|lane| {
                    AlignedBuffer::zeroed(padded_bytes(lane.len, lane.dtype) / lane.dtype.size(), lane.dtype)
                })
                .collect(),
            pending: 0,
            writing: false,
        };
        let slots: Vec<Slot> =
            iter::repeat_with(slot).take(1 + depth.read_ahead + depth.write_behind).collect();
        Self {
            store: store.clone(),
            lanes: lanes.to_vec(),
            depth,
            free: (0..slots.len()).collect(),
            slots,
            writing: 0,
            in_flight: 0,
            reply,
            completions,
            failed: None,
            traffic: Traffic::default(),
        }
    }

    /// Bytes of all buffers: what the stream will ever have in memory.
    pub fn buffer_bytes(&self) -> usize {
        let slot: usize = self.lanes.iter().map(|lane| padded_bytes(lane.len, lane.dtype)).sum();
        self.slots.len() * slot
    }

    /// Starts moving `items` through memory, in order; lane `i` of each is treated as `access[i]` says.
    ///
    /// Reading begins at once, as far as `read_ahead` allows. Nobody else may write the regions until the pass ends.
    ///
    /// # Errors
    /// [`OffloadError::Arguments`] if items do not fit the lanes, or if regions that are written overlap others; the
    /// stream's first error, if it has failed.
    pub fn pass<'p>(&'p mut self, items: &'p [Item], access: &'p [Access]) -> Result<Pass<'p>> {
        self.store.check_process()?;
        self.check()?;
        self.judge(items, access)
            .map_err(|problem| OffloadError::Arguments { call: "Stream::pass", problem })?;
        self.traffic = Traffic::default();
        Ok(Pass::start(self, items, access))
    }

    /// Says what is wrong with the arguments of a pass.
    fn judge(&self, items: &[Item], access: &[Access]) -> Result<(), String> {
        if access.len() != self.lanes.len() {
            return Err(format!(
                "access for {} lanes, but the stream has {}",
                access.len(),
                self.lanes.len()
            ));
        }
        for (index, item) in items.iter().enumerate() {
            if item.regions.len() != self.lanes.len() {
                return Err(format!(
                    "item {index} has {} regions, but the stream has {} lanes",
                    item.regions.len(),
                    self.lanes.len()
                ));
            }
            for (i, (region, lane)) in iter::zip(&item.regions, &self.lanes).enumerate() {
                if !self.store.owns(region) {
                    return Err(format!("region {i} of item {index} belongs to another store"));
                }
                if region.dtype() != lane.dtype || region.len() > lane.len {
                    return Err(format!(
                        "region {i} of item {index} has {} {} elements, but its lane holds {} of {}",
                        region.len(),
                        region.dtype(),
                        lane.len,
                        lane.dtype
                    ));
                }
            }
        }
        if access.iter().any(|access| access.moves(Direction::Write)) {
            let mut regions: Vec<&Region> = items.iter().flat_map(|item| &item.regions).collect();
            regions.retain(|region| !region.is_empty());
            regions.sort_unstable_by_key(|region| region.offset());
            for (one, next) in iter::zip(&regions, regions.iter().skip(1)) {
                if one.offset() + one.padded_bytes() as u64 > next.offset() {
                    return Err(format!("two regions overlap at byte {} of the store", next.offset()));
                }
            }
        }
        Ok(())
    }

    /// A slot that holds nothing.
    pub(crate) fn take_free(&mut self) -> Option<usize> {
        self.free.pop()
    }

    /// Gives back a slot of [`Stream::take_free`].
    pub(crate) fn give_free(&mut self, slot: usize) {
        self.free.push(slot);
    }

    /// Whether no buffer of the slot is on its way.
    pub(crate) fn is_settled(&self, slot: usize) -> bool {
        self.slots[slot].pending == 0
    }

    /// The buffers of a slot, one per lane, padded to whole pages.
    pub(crate) fn buffers(&self, slot: usize) -> &[AlignedBuffer] {
        &self.slots[slot].buffers
    }

    /// The buffers of a slot, one per lane, padded to whole pages.
    pub(crate) fn buffers_mut(&mut self, slot: usize) -> &mut [AlignedBuffer] {
        &mut self.slots[slot].buffers
    }

    /// Starts moving the lanes of a slot, as far as `access` has them moved.
    ///
    /// A slot that is written is free again when all of it has arrived.
    pub(crate) fn begin(&mut self, slot: usize, direction: Direction, regions: &[Region], access: &[Access]) {
        for (lane, (region, access)) in iter::zip(regions, access).enumerate() {
            if region.is_empty() || !access.moves(direction) {
                continue;
            }
            let bytes = region.padded_bytes();
            let Slot { buffers, pending, .. } = &mut self.slots[slot];
            let buffer = std::mem::replace(&mut buffers[lane], AlignedBuffer::zeroed(0, region.dtype()));
            *pending += 1;
            self.in_flight += 1;
            *match direction {
                Direction::Read => &mut self.traffic.read_bytes,
                Direction::Write => &mut self.traffic.written_bytes,
            } += bytes as u64;
            let tag = Tag { slot, lane };
            self.store.submit(Request::new(
                direction,
                region.offset(),
                bytes,
                buffer,
                tag,
                self.reply.clone(),
            ));
        }
        if direction == Direction::Write {
            if self.is_settled(slot) {
                self.give_free(slot);
            } else {
                self.slots[slot].writing = true;
                self.writing += 1;
            }
        }
    }

    /// The first error, if there was one.
    pub(crate) fn check(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Takes in the answers that are there.
    pub(crate) fn poll(&mut self) -> Result<()> {
        while let Ok(completion) = self.completions.try_recv() {
            self.take_back(completion);
        }
        self.check()
    }

    /// Waits for one answer.
    pub(crate) fn wait(&mut self) -> Result<()> {
        let began = Instant::now();
        let answer = self.completions.recv_timeout(self.store.stall());
        self.traffic.waited += began.elapsed();
        match answer {
            Ok(completion) => self.take_back(completion),
            // Not disconnected: `self.reply` is the other end.
            Err(_) => {
                self.failed.get_or_insert(OffloadError::Stalled {
                    folder: self.store.describe().folder.clone(),
                    in_flight: self.in_flight,
                    waited: self.store.stall(),
                });
            }
        }
        self.check()
    }

    /// Waits until nothing is in flight; all slots are free then.
    pub(crate) fn drain(&mut self) -> Result<()> {
        // What does not answer is not waited for twice: the requests own their memory.
        while self.in_flight > 0 && !matches!(self.failed, Some(OffloadError::Stalled { .. })) {
            // The first error is kept, and returned below.
            let _ = self.wait();
        }
        self.check()?;
        self.free = (0..self.slots.len()).collect();
        Ok(())
    }

    fn take_back(&mut self, Completion { tag, buffer, direction, outcome }: Completion) {
        let slot = &mut self.slots[tag.slot];
        slot.buffers[tag.lane] = buffer;
        slot.pending -= 1;
        self.in_flight -= 1;
        if slot.pending == 0 && slot.writing {
            slot.writing = false;
            self.writing -= 1;
            self.free.push(tag.slot);
        }
        if let Err(fault) = outcome {
            let error = self.store.error(direction, fault);
            self.failed.get_or_insert(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_go_to_the_sides_that_are_pipelined() {
        let depth = |slots, read, write| {
            let Depth { read_ahead, write_behind } = Depth::with_slots(slots, read, write);
            (read_ahead, write_behind)
        };
        assert_eq!(depth(4, false, false), (0, 0));
        assert_eq!(depth(4, true, false), (3, 0));
        assert_eq!(depth(4, false, true), (0, 3));
        assert_eq!(depth(4, true, true), (2, 1));
        assert_eq!(depth(0, true, true), (1, 1));
    }
}
