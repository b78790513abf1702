//! One run of items through a stream: read ahead, in the caller's hands, written behind.

use std::{array, collections::VecDeque};

use deepspeed_core::{Span, SpanMut};

use crate::{Access, Direction, Item, Result, Stream, Traffic};

/// Items on their way through a [`Stream`].
///
/// [`Pass::finish`] waits for the last write and returns what went wrong. Dropping a pass waits as well, and leaves the
/// error to the stream's next call.
#[derive(Debug)]
pub struct Pass<'p> {
    stream: &'p mut Stream,
    items: &'p [Item],
    access: &'p [Access],
    /// Slots of the items that are being read or ready, in the order of the items.
    ahead: VecDeque<usize>,
    /// Items handed to the caller so far; `ahead` has the next ones.
    given: usize,
}

impl<'p> Pass<'p> {
    pub(crate) fn start(stream: &'p mut Stream, items: &'p [Item], access: &'p [Access]) -> Self {
        let mut pass = Self { stream, items, access, ahead: VecDeque::new(), given: 0 };
        pass.read_ahead(pass.stream.depth.read_ahead);
        pass
    }

    /// The next item, with its numbers in memory; `None` after the last one.
    ///
    /// # Errors
    /// The first error of any read or write so far.
    pub fn load_next(&mut self) -> Result<Option<Loaded<'_, 'p>>> {
        self.stream.poll()?;
        let Some(item) = self.items.get(self.given) else { return Ok(None) };
        let depth = self.stream.depth.read_ahead;
        let slot = loop {
            // One more than is read ahead: the one that is asked for.
            self.read_ahead(depth + 1);
            match self.ahead.front() {
                Some(&slot) if self.stream.is_settled(slot) => break slot,
                _ => self.stream.wait()?,
            }
        };
        self.ahead.pop_front();
        self.given += 1;
        self.read_ahead(depth);
        Ok(Some(Loaded { pass: self, item, slot: Some(slot) }))
    }

    /// Waits for all writes and says how much was moved.
    ///
    /// Items that were not asked for are left as they are.
    ///
    /// # Errors
    /// The first error of any read or write.
    pub fn finish(self) -> Result<Traffic> {
        self.stream.drain()?;
        Ok(self.stream.traffic)
    }

    /// Starts reading until `limit` items are ahead of the caller, or no slot is free.
    fn read_ahead(&mut self, limit: usize) {
        while self.ahead.len() < limit
            && let Some(item) = self.items.get(self.given + self.ahead.len())
            && let Some(slot) = self.stream.take_free()
        {
            self.stream.begin(slot, Direction::Read, &item.regions, self.access);
            self.ahead.push_back(slot);
        }
    }

    /// Starts writing a slot, and waits until no more are on their way than may be.
    fn write_behind(&mut self, slot: usize, item: &Item) -> Result<()> {
        self.stream.begin(slot, Direction::Write, &item.regions, self.access);
        self.stream.poll()?;
        while self.stream.writing > self.stream.depth.write_behind {
            self.stream.wait()?;
        }
        Ok(())
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        // The stream keeps the error.
        let _ = self.stream.drain();
    }
}

/// An item in memory, for its caller to read and change.
///
/// Dropped, it is forgotten; [`Loaded::write_back`] keeps the changes.
#[derive(Debug)]
pub struct Loaded<'a, 'p> {
    pass: &'a mut Pass<'p>,
    item: &'p Item,
    /// `None` once it has been written back.
    slot: Option<usize>,
}

impl<'p> Loaded<'_, 'p> {
    /// Which item it is.
    pub fn item(&self) -> &'p Item {
        self.item
    }

    /// The numbers of lane `lane`: as many as its region has.
    ///
    /// # Panics
    /// If there is no such lane.
    pub fn lane(&self, lane: usize) -> Span<'_> {
        self.pass.stream.buffers(self.slot())[lane].span().slice(0, self.item.regions[lane].len())
    }

    /// The numbers of lane `lane`, writable.
    ///
    /// # Panics
    /// If there is no such lane.
    pub fn lane_mut(&mut self, lane: usize) -> SpanMut<'_> {
        let slot = self.slot();
        let span = self.pass.stream.buffers_mut(slot)[lane].span_mut();
        span.split_at(self.item.regions[lane].len()).0
    }

    /// The numbers of all lanes, writable.
    pub fn lanes_mut(&mut self) -> impl Iterator<Item = SpanMut<'_>> {
        let (slot, item) = (self.slot(), self.item);
        let buffers = self.pass.stream.buffers_mut(slot);
        buffers
            .iter_mut()
            .zip(&item.regions)
            .map(|(buffer, region)| buffer.span_mut().split_at(region.len()).0)
    }

    /// The numbers of all lanes as fp32.
    ///
    /// # Panics
    /// If a lane has another dtype.
    pub fn f32_slices(&mut self) -> Vec<&mut [f32]> {
        let (slot, item) = (self.slot(), self.item);
        let buffers = self.pass.stream.buffers_mut(slot);
        buffers
            .iter_mut()
            .zip(&item.regions)
            .map(|(buffer, region)| &mut buffer.as_f32_mut()[..region.len()])
            .collect()
    }

    /// The numbers of all `N` lanes as fp32.
    ///
    /// # Panics
    /// If there are not `N` lanes, or one has another dtype.
    pub fn f32_lanes<const N: usize>(&mut self) -> [&mut [f32]; N] {
        assert_eq!(self.item.regions.len(), N, "lanes of the stream");
        let mut slices = self.f32_slices().into_iter();
        array::from_fn(|_| slices.next().expect("invariant: as many slices as lanes"))
    }

    /// Starts writing the lanes back that the pass may write, and waits if too many are on their way already.
    ///
    /// # Errors
    /// The first error of any read or write so far.
    pub fn write_back(mut self) -> Result<()> {
        match self.slot.take() {
            Some(slot) => self.pass.write_behind(slot, self.item),
            None => Ok(()),
        }
    }

    fn slot(&self) -> usize {
        self.slot.expect("invariant: only write_back takes the slot, and it consumes the item")
    }
}

impl Drop for Loaded<'_, '_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.pass.stream.give_free(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Mutex},
        time::Duration,
    };

    use deepspeed_core::DType;

    use super::*;
    use crate::{Depth, Lane, OffloadError, Store, engine::Engine, request::Request};

    /// An engine that keeps what it gets, as a device does that no longer answers.
    #[derive(Clone, Default)]
    struct Silent(Arc<Mutex<Vec<Request>>>);

    impl Engine for Silent {
        fn submit(&self, request: Request) {
            self.0.lock().unwrap().push(request);
        }
    }

    fn items(store: &Store) -> Vec<Item> {
        let regions = [(); 3].map(|()| store.allocate(1000, DType::F32).unwrap());
        regions.iter().map(|region| Item::whole(0, &[*region])).collect()
    }

    #[test]
    fn a_device_that_does_not_answer_is_an_error_and_keeps_its_memory() {
        let device = Silent::default();
        let store = Store::on(device.clone(), 1 << 20, Duration::from_millis(20));
        let items = items(&store);
        let mut stream = Stream::new(&store, &[Lane::f32(1000)], Depth { read_ahead: 1, write_behind: 0 });
        let mut pass = stream.pass(&items, &[Access::Update]).unwrap();
        let error = pass.load_next().unwrap_err();
        assert!(matches!(error, OffloadError::Stalled { in_flight: 2, .. }), "{error}");
        drop(pass);
        assert_eq!(stream.pass(&items, &[Access::Update]).unwrap_err().to_string(), error.to_string());
        drop(stream);
        // What the device still has may still be written.
        for request in device.0.lock().unwrap().iter_mut() {
            request.buffer_mut().as_f32_mut().fill(1.0);
        }
    }

    #[test]
    fn a_request_that_is_lost_is_an_error() {
        let device = Silent::default();
        let store = Store::on(device.clone(), 1 << 20, Duration::from_secs(60));
        let items = items(&store);
        let mut stream = Stream::new(&store, &[Lane::f32(1000)], Depth { read_ahead: 2, write_behind: 0 });
        let mut pass = stream.pass(&items, &[Access::Update]).unwrap();
        device.0.lock().unwrap().clear();
        assert!(matches!(pass.load_next().unwrap_err(), OffloadError::Abandoned { .. }));
    }

    #[test]
    fn answers_may_come_in_any_order() {
        let device = Silent::default();
        let store = Store::on(device.clone(), 1 << 20, Duration::from_secs(60));
        let items = items(&store);
        let mut stream = Stream::new(&store, &[Lane::f32(1000)], Depth { read_ahead: 2, write_behind: 2 });
        let answer_newest_first = || {
            for mut request in device.0.lock().unwrap().drain(..).rev() {
                let offset = request.offset as f32;
                if request.direction == Direction::Read {
                    request.buffer_mut().as_f32_mut().fill(offset);
                }
                request.finish(Ok(()));
            }
        };
        let mut pass = stream.pass(&items, &[Access::Update]).unwrap();
        for item in &items {
            answer_newest_first();
            let mut loaded = pass.load_next().unwrap().unwrap();
            let offset = item.regions[0].offset() as f32;
            assert!(loaded.f32_slices()[0].iter().all(|x| *x == offset));
            loaded.write_back().unwrap();
        }
        answer_newest_first();
        assert_eq!(pass.finish().unwrap().written_bytes, 3 * 4096);
    }
}
