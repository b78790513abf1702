//! A request to move one buffer, and the answer that brings the buffer back.

use std::{fmt, io, mem, sync::mpsc::Sender};

use deepspeed_core::AlignedBuffer;

use crate::PAGE;

/// Read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// Whose request it is: slot and lane of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    pub(crate) slot: usize,
    pub(crate) lane: usize,
}

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The system refused to move `bytes` at `offset`.
    Os { offset: u64, bytes: usize, source: io::Error },
    /// Of `bytes` at `offset` only `moved` were moved.
    Short { offset: u64, bytes: usize, moved: usize },
    /// The thread that served it ended.
    Abandoned,
}

/// Moves the first `bytes` of `buffer` from or to `offset` of the file. Owns the buffer while it is served.
///
/// It answers when it is dropped: [`Request::finish`] is the orderly way; a thread that panics answers
/// [`Fault::Abandoned`].
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) direction: Direction,
    /// A multiple of [`PAGE`].
    pub(crate) offset: u64,
    /// A multiple of [`PAGE`], above zero, at most the buffer's size.
    pub(crate) bytes: usize,
    buffer: AlignedBuffer,
    tag: Tag,
    reply: Sender<Completion>,
    outcome: Result<(), Fault>,
}

/// The answer to a [`Request`].
#[derive(Debug)]
pub(crate) struct Completion {
    pub(crate) tag: Tag,
    /// The request's buffer; empty if it had to be given up.
    pub(crate) buffer: AlignedBuffer,
    pub(crate) direction: Direction,
    pub(crate) outcome: Result<(), Fault>,
}

impl Request {
    /// # Panics
    /// If offset and size are not whole pages, or the buffer is too small.
    pub(crate) fn new(
        direction: Direction,
        offset: u64,
        bytes: usize,
        buffer: AlignedBuffer,
        tag: Tag,
        reply: Sender<Completion>,
    ) -> Self {
        assert!(
            offset.is_multiple_of(PAGE as u64) && bytes.is_multiple_of(PAGE),
            "requests are made of whole pages"
        );
        assert!(0 < bytes && bytes <= buffer.len() * buffer.dtype().size(), "a request fits its buffer");
        Self { direction, offset, bytes, buffer, tag, reply, outcome: Err(Fault::Abandoned) }
    }

    /// The memory to be moved.
    pub(crate) fn buffer(&self) -> &AlignedBuffer {
        &self.buffer
    }

    /// The memory to be moved.
    pub(crate) fn buffer_mut(&mut self) -> &mut AlignedBuffer {
        &mut self.buffer
    }

    /// Answers.
    pub(crate) fn finish(mut self, outcome: Result<(), Fault>) {
        self.outcome = outcome;
    }

    /// Gives the buffer up without freeing it: for memory that the kernel may still use.
    pub(crate) fn leak_buffer(&mut self) {
        let empty = AlignedBuffer::zeroed(0, self.buffer.dtype());
        mem::forget(mem::replace(&mut self.buffer, empty));
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let empty = AlignedBuffer::zeroed(0, self.buffer.dtype());
        let completion = Completion {
            tag: self.tag,
            buffer: mem::replace(&mut self.buffer, empty),
            direction: self.direction,
            outcome: mem::replace(&mut self.outcome, Ok(())),
        };
        // Nobody is waiting any more where this fails, and the buffer goes the way of all memory.
        let _ = self.reply.send(completion);
    }
}

/// Of `wanted` bytes the system moved `moved`: how many of them count, in whole pages, or `None` if there is no use in
/// asking for the rest.
///
/// Direct I/O goes on only from a page's start, so a page that came in part is asked for again.
pub(crate) fn progress(moved: usize, wanted: usize) -> Option<usize> {
    let whole = moved.min(wanted) / PAGE * PAGE;
    (whole > 0).then_some(whole)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use deepspeed_core::DType;

    use super::*;

    #[test]
    fn a_dropped_request_answers() {
        let (reply, completions) = mpsc::channel();
        let buffer = AlignedBuffer::zeroed(1024, DType::F32);
        drop(Request::new(Direction::Read, 0, PAGE, buffer, Tag { slot: 3, lane: 1 }, reply));
        let completion = completions.recv().unwrap();
        assert_eq!((completion.tag, completion.buffer.len()), (Tag { slot: 3, lane: 1 }, 1024));
        assert!(matches!(completion.outcome, Err(Fault::Abandoned)));
    }

    #[test]
    fn only_whole_pages_count_as_progress() {
        assert_eq!(progress(PAGE, 2 * PAGE), Some(PAGE));
        assert_eq!(progress(PAGE + 1, 2 * PAGE), Some(PAGE));
        assert_eq!(progress(PAGE - 1, 2 * PAGE), None);
        assert_eq!(progress(0, PAGE), None);
    }
}
