//! What an agent has to send, and the thread that says every second that the agent is there.
//!
//! The thread is there for a main thread that is held up, such as by a log file on a network file system that does not answer: the host is
//! not lost then. Whoever stops the process stops both.

use crate::wire::message::{self, Report};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often the agent says that it is there.
const BEAT: Duration = Duration::from_secs(1);

/// The queue before the connection, which does not block.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outgoing {
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Outgoing {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues whole frames.
    pub(crate) fn queue(&self, frames: &[u8]) {
        self.lock().extend_from_slice(frames);
    }

    /// How much is waiting.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Sends what is queued as far as the connection takes it; returns whether the connection is still there.
    pub(crate) fn send(&self) -> bool {
        let mut bytes = self.lock();
        while !bytes.is_empty() {
            match rustix::io::write(io::stdout(), &bytes) {
                Ok(length) => drop(bytes.drain(..length)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    /// Says every second that the agent is there, for as long as the connection lasts.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(crate) fn beat(&self) -> io::Result<()> {
        let alive = message::encode(&Report::Alive)?;
        let outgoing = self.clone();
        let beat = move || {
            loop {
                std::thread::sleep(BEAT);
                // What waits already says as much once it is read.
                if outgoing.len() == 0 {
                    outgoing.queue(&alive);
                }
                if !outgoing.send() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("beat".into()).spawn(beat).map(drop)
    }
}
