//! The engine for where io_uring is refused: a pool of threads in `pread` and `pwrite`.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread,
};

use crate::{
    Direction, OffloadError, Options, PAGE, Result,
    request::{Fault, Request, progress},
};

use super::{Engine, workers::Workers};

/// Each thread serves one request at a time, block by block; a request is divided among `Options::threads` of them.
pub(super) struct Threads {
    // Dropped before `workers`: that is what ends them.
    queue: Sender<Request>,
    workers: Workers,
}

impl Threads {
    pub(super) fn start(file: &Arc<File>, options: &Options) -> Result<Self> {
        let (queue, requests) = mpsc::channel();
        let requests = Arc::new(Mutex::new(requests));
        let mut workers = Workers::new();
        let (block, parts) = (options.block_size, options.threads);
        for _ in 0..options.queue_depth.min(Options::MAX_POOL) {
            let (file, requests) = (Arc::clone(file), Arc::clone(&requests));
            workers.spawn(move || work(&file, &requests, block, parts)).map_err(|error| {
                OffloadError::Engine {
                    engine: "a thread pool",
                    reason: format!(
                        "a thread cannot be started: {error}; raise `ulimit -u` or lower aio.queue_depth"
                    ),
                }
            })?;
        }
        Ok(Self { queue, workers })
    }

    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }
}

impl Engine for Threads {
    fn submit(&self, request: Request) {
        // It fails only after every worker has panicked; the request then answers for itself.
        let _ = self.queue.send(request);
    }
}

/// Serves requests until there will be no more.
fn work(file: &File, requests: &Mutex<Receiver<Request>>, block: usize, parts: usize) {
    loop {
        let next = requests.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut request) = next else { return };
        let outcome = serve(file, &mut request, block, parts);
        request.finish(outcome);
    }
}

/// Moves all bytes of a request, in up to `parts` runs side by side.
fn serve(file: &File, request: &mut Request, block: usize, parts: usize) -> Result<(), Fault> {
    let (direction, offset, bytes) = (request.direction, request.offset, request.bytes);
    let run = bytes.div_ceil(parts).next_multiple_of(PAGE).max(block);
    match direction {
        Direction::Read => {
            let mut memory = request.buffer_mut().span_mut();
            let memory = &mut memory.as_bytes_mut()[..bytes];
            side_by_side(memory.chunks_mut(run), offset, run, |run, offset| {
                run.chunks_mut(block)
                    .zip((offset..).step_by(block))
                    .try_for_each(|(block, at)| read(file, block, at))
            })
        }
        Direction::Write => {
            let memory = &request.buffer().span().as_bytes()[..bytes];
            side_by_side(memory.chunks(run), offset, run, |run, offset| {
                run.chunks(block)
                    .zip((offset..).step_by(block))
                    .try_for_each(|(block, at)| write(file, block, at))
            })
        }
    }
}

/// Calls `serve` with each of `runs` and its offset, all at once, and returns the first error in the order of offsets.
fn side_by_side<R: Send>(
    mut runs: impl ExactSizeIterator<Item = R>,
    offset: u64,
    run: usize,
    serve: impl Fn(R, u64) -> Result<(), Fault> + Sync,
) -> Result<(), Fault> {
    let Some(first) = runs.next() else { return Ok(()) };
    thread::scope(|scope| {
        let serve = &serve;
        let others: Vec<_> = runs
            .zip((offset..).step_by(run).skip(1))
            .map(|(run, offset)| scope.spawn(move || serve(run, offset)))
            .collect();
        let mut outcome = serve(first, offset);
        for other in others {
            outcome = outcome.and(other.join().unwrap_or(Err(Fault::Abandoned)));
        }
        outcome
    })
}

fn read(file: &File, memory: &mut [u8], offset: u64) -> Result<(), Fault> {
    let bytes = memory.len();
    exactly(offset, bytes, |done| file.read_at(&mut memory[done..], offset + done as u64))
}

fn write(file: &File, memory: &[u8], offset: u64) -> Result<(), Fault> {
    exactly(offset, memory.len(), |done| file.write_at(&memory[done..], offset + done as u64))
}

/// Calls `step` with how many bytes are done until all `bytes` are.
fn exactly(offset: u64, bytes: usize, mut step: impl FnMut(usize) -> io::Result<usize>) -> Result<(), Fault> {
    let mut done = 0;
    while done < bytes {
        match step(done) {
            Ok(moved) => match progress(moved, bytes - done) {
                Some(whole) => done += whole,
                None => return Err(Fault::Short { offset, bytes, moved: done + moved }),
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(Fault::Os { offset, bytes, source }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_moves_are_continued_and_nothing_is_an_error() {
        let mut steps =
            [Ok(PAGE + 7), Err(io::Error::from(io::ErrorKind::Interrupted)), Ok(2 * PAGE)].into_iter();
        let mut asked = Vec::new();
        exactly(0, 3 * PAGE, |done| {
            asked.push(done);
            steps.next().unwrap()
        })
        .unwrap();
        assert_eq!(asked, [0, PAGE, PAGE]);

        let fault = exactly(8192, PAGE, |_| Ok(100)).unwrap_err();
        assert!(matches!(fault, Fault::Short { offset: 8192, bytes: PAGE, moved: 100 }));
    }

    #[test]
    fn the_first_error_in_the_order_of_offsets_wins() {
        let fault = side_by_side([0, 1, 2].into_iter(), 100, 10, |run, offset| match run {
            0 => Ok(()),
            _ => Err(Fault::Short { offset, bytes: 0, moved: 0 }),
        });
        assert!(matches!(fault, Err(Fault::Short { offset: 110, .. })));
    }
}
