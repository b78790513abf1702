//! The thread that owns one io_uring: cuts requests into pieces and keeps `queue_depth` of them in flight each way.
//!
//! ```text
//! incoming requests --> transfers (buffer + what is issued) --> pieces in flight <--> kernel
//!         ^ bell: an eventfd that the ring polls, so that the one wait covers requests and completions
//! ```

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    thread,
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types::Fd};
use rustix::{event::PollFlags, io::Errno};

use crate::{
    Direction, Options,
    request::{Fault, Request, progress},
};

use super::uring::Bell;

/// `user_data` of the bell's poll; pieces have the index of their place.
const BELL: u64 = u64::MAX;

/// One ring and what it is doing.
pub(super) struct Driver {
    ring: IoUring,
    file: Arc<File>,
    bell: Arc<Bell>,
    incoming: Receiver<Request>,
    block: usize,
    single_submit: bool,
    overlap_events: bool,
    /// Requests that are being served; a place is reused when its request is answered.
    transfers: Vec<Option<Transfer>>,
    /// Reads, and writes. Each has `depth` requests in flight of its own, so that neither holds up the other.
    queues: [Queue; 2],
    depth: usize,
    /// The queue that the next piece comes from if both have one.
    turn: usize,
    /// The pieces in flight, one place for each that may be.
    pieces: Vec<Option<Piece>>,
    /// Places in `pieces` that are empty.
    vacant: Vec<usize>,
    /// Whether the ring polls the bell.
    listening: bool,
    /// Whether requests may still come.
    open: bool,
}

/// What goes in one direction.
#[derive(Default)]
struct Queue {
    /// Transfers with bytes that are not issued yet, oldest first.
    waiting: VecDeque<usize>,
    /// Pieces in flight.
    in_flight: usize,
}

/// A request on its way.
struct Transfer {
    request: Request,
    /// The request's memory. Nobody but the kernel touches it from the first piece issued to the last one done.
    base: *mut u8,
    /// Bytes issued, from the start.
    issued: usize,
    /// Pieces in flight.
    in_flight: usize,
    fault: Option<Fault>,
}

/// Part of a transfer, as the kernel has it.
#[derive(Clone, Copy)]
struct Piece {
    transfer: usize,
    start: usize,
    bytes: usize,
}

/// The index in `queues` of this direction.
fn queue_of(direction: Direction) -> usize {
    match direction {
        Direction::Read => 0,
        Direction::Write => 1,
    }
}

impl Driver {
    pub(super) fn new(
        ring: IoUring,
        file: Arc<File>,
        bell: Arc<Bell>,
        incoming: Receiver<Request>,
        options: &Options,
    ) -> Self {
        Self {
            ring,
            file,
            bell,
            incoming,
            block: options.block_size,
            single_submit: options.single_submit,
            overlap_events: options.overlap_events,
            transfers: Vec::new(),
            queues: Default::default(),
            depth: options.queue_depth,
            turn: 0,
            pieces: vec![None; 2 * options.queue_depth],
            vacant: (0..2 * options.queue_depth).rev().collect(),
            listening: false,
            open: true,
        }
    }

    /// Serves requests until there will be no more and all are answered.
    pub(super) fn run(mut self) {
        let mut done = Vec::with_capacity(self.pieces.len() + 1);
        loop {
            self.accept();
            let mut outcome = self.issue();
            if !self.open && self.queues.iter().all(|queue| queue.in_flight == 0 && queue.waiting.is_empty())
            {
                return;
            }
            self.listen();
            if outcome.is_ok() {
                outcome = self.enter(1);
            }
            if let Err(error) = outcome {
                return self.give_up(&error);
            }
            done.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
            for (place, result) in done.drain(..) {
                if place == BELL {
                    self.listening = false;
                    self.bell.clear();
                } else {
                    self.settle(place as usize, result);
                }
            }
        }
    }

    /// Takes in the requests that have come.
    fn accept(&mut self) {
        while self.open {
            match self.incoming.try_recv() {
                Ok(mut request) => {
                    let queue = queue_of(request.direction);
                    let base = request.buffer_mut().span_mut().as_bytes_mut().as_mut_ptr();
                    let transfer = Some(Transfer { request, base, issued: 0, in_flight: 0, fault: None });
                    let place = self.transfers.iter().position(Option::is_none).unwrap_or_else(|| {
                        self.transfers.push(None);
                        self.transfers.len() - 1
                    });
                    self.transfers[place] = transfer;
                    self.queues[queue].waiting.push_back(place);
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.open = false,
            }
        }
    }

    /// Fills the ring with pieces of the waiting transfers: of reads and writes in turn, and of each the oldest first.
    fn issue(&mut self) -> io::Result<()> {
        let mut room = self.queues.each_ref().map(|queue| match queue.in_flight {
            0 => self.depth,
            // A batch is awaited as a whole.
            _ if !self.overlap_events => 0,
            busy => self.depth - busy,
        });
        loop {
            let next = [self.turn, 1 - self.turn].into_iter().find_map(|i| {
                self.queues[i].waiting.front().filter(|_| room[i] > 0).map(|index| (i, *index))
            });
            let Some((direction, index)) = next else { return Ok(()) };
            self.turn = 1 - direction;
            room[direction] -= 1;
            let queue = &mut self.queues[direction];
            let transfer = self.transfers[index].as_mut().expect("invariant: a waiting transfer exists");
            let start = transfer.issued;
            let bytes = self.block.min(transfer.request.bytes - start);
            transfer.issued += bytes;
            transfer.in_flight += 1;
            queue.in_flight += 1;
            if transfer.issued == transfer.request.bytes {
                queue.waiting.pop_front();
            }
            let place = self.vacant.pop().expect("invariant: a place is vacant");
            self.push_piece(place, Piece { transfer: index, start, bytes });
            if self.single_submit {
                self.enter(0)?;
            }
        }
    }

    /// Puts a piece into the submission queue under `place`.
    fn push_piece(&mut self, place: usize, piece: Piece) {
        let transfer = self.transfers[piece.transfer].as_ref().expect("invariant: a piece has a transfer");
        let fd = Fd(self.file.as_raw_fd());
        let memory = transfer.base.wrapping_add(piece.start);
        let bytes = u32::try_from(piece.bytes).expect("invariant: a block is at most 1 GiB");
        let offset = transfer.request.offset + piece.start as u64;
        let entry = match transfer.request.direction {
            Direction::Read => opcode::Read::new(fd, memory, bytes).offset(offset).build(),
            Direction::Write => opcode::Write::new(fd, memory.cast_const(), bytes).offset(offset).build(),
        };
        let entry = entry.user_data(place as u64);
        self.pieces[place] = Some(piece);
        // SAFETY: the memory lies inside the buffer of the transfer's request (`Request::new` has checked the size,
        // and start + bytes <= request.bytes). The transfer owns that buffer and stays in `self.transfers` until none
        // of its pieces is in flight (`settle`); where the driver ends before that, the buffer is leaked (`give_up`,
        // `drop`). So it stays allocated while the kernel uses it. `base` is the only access to it meanwhile, and
        // pieces do not overlap, so a read by the kernel races with nobody. The file is kept open by `self.file`.
        unsafe { self.push(&entry) };
    }

    /// Has the ring poll the bell, so that a new request ends the wait.
    fn listen(&mut self) {
        if !self.listening && self.open {
            self.listening = true;
            let poll = opcode::PollAdd::new(Fd(self.bell.as_raw_fd()), PollFlags::IN.bits() as u32);
            // SAFETY: a poll refers to no memory, and `self.bell` keeps the descriptor open.
            unsafe { self.push(&poll.build().user_data(BELL)) };
        }
    }

    /// # Safety
    /// What `entry` refers to stays valid until its completion has been seen.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise.
        unsafe { self.ring.submission().push(entry) }
            .expect("invariant: the ring has an entry for each place and the bell");
    }

    /// Hands the submission queue to the kernel and waits for `want` completions.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::INTR) => {}
                    // The kernel is short of memory or wants its completions read: the caller reads them and comes again.
                    Some(Errno::AGAIN | Errno::BUSY) => {
                        thread::sleep(Duration::from_millis(1));
                        return Ok(());
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    /// Takes note of what became of the piece at `place`.
    fn settle(&mut self, place: usize, result: i32) {
        let piece = self.pieces[place].take().expect("invariant: a completion belongs to a piece in flight");
        let transfer = self.transfers[piece.transfer].as_mut().expect("invariant: a piece has a transfer");
        let offset = transfer.request.offset + piece.start as u64;
        let rest = match usize::try_from(result) {
            Ok(moved) if moved == piece.bytes => None,
            Ok(moved) => match progress(moved, piece.bytes) {
                Some(whole) => {
                    Some(Piece { start: piece.start + whole, bytes: piece.bytes - whole, ..piece })
                }
                None => {
                    transfer.fault.get_or_insert(Fault::Short { offset, bytes: piece.bytes, moved });
                    None
                }
            },
            Err(_) if [Errno::INTR, Errno::AGAIN].map(Errno::raw_os_error).contains(&-result) => Some(piece),
            Err(_) => {
                let source = io::Error::from_raw_os_error(-result);
                transfer.fault.get_or_insert(Fault::Os { offset, bytes: piece.bytes, source });
                None
            }
        };
        if let Some(rest) = rest {
            self.push_piece(place, rest);
            return;
        }
        self.vacant.push(place);
        let queue = &mut self.queues[queue_of(transfer.request.direction)];
        transfer.in_flight -= 1;
        queue.in_flight -= 1;
        if transfer.fault.is_some() && transfer.issued < transfer.request.bytes {
            transfer.issued = transfer.request.bytes;
            queue.waiting.retain(|waiting| *waiting != piece.transfer);
        }
        if transfer.in_flight == 0
            && transfer.issued == transfer.request.bytes
            && let Some(transfer) = self.transfers[piece.transfer].take()
        {
            transfer.request.finish(transfer.fault.map_or(Ok(()), Err));
        }
    }

    /// Answers every request with `error`: the ring is of no more use.
    fn give_up(&mut self, error: &io::Error) {
        let code = error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
        let fail = |request: Request| {
            let (offset, bytes) = (request.offset, request.bytes);
            request.finish(Err(Fault::Os { offset, bytes, source: io::Error::from_raw_os_error(code) }));
        };
        for mut transfer in self.transfers.drain(..).flatten() {
            if transfer.in_flight > 0 {
                transfer.request.leak_buffer();
            }
            fail(transfer.request);
        }
        self.queues = Default::default();
        while let Ok(request) = self.incoming.recv() {
            fail(request);
        }
    }
}

impl Drop for Driver {
    /// After a panic the kernel may still be at work in the memory of what was in flight: it is never freed.
    fn drop(&mut self) {
        for transfer in self.transfers.iter_mut().flatten() {
            if transfer.in_flight > 0 {
                transfer.request.leak_buffer();
            }
        }
    }
}
