//! Threads that end with their engine.

use std::{
    io, mem, process,
    thread::{Builder, JoinHandle},
};

/// Joined when dropped; the owner has told them to end before that.
#[derive(Debug)]
pub(super) struct Workers {
    threads: Vec<JoinHandle<()>>,
    process: u32,
}

impl Workers {
    pub(super) fn new() -> Self {
        Self { threads: Vec::new(), process: process::id() }
    }

    /// Starts one more.
    pub(super) fn spawn(&mut self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let name = format!("ds-offload-{}", self.threads.len());
        self.threads.push(Builder::new().name(name).stack_size(256 << 10).spawn(work)?);
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.threads.len()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for thread in self.threads.drain(..) {
            if self.process == process::id() {
                // A panic has been printed, and the requests it concerned were answered with an error.
                let _ = thread.join();
            } else {
                // A forked child has no such thread: joining it would wait for ever.
                mem::forget(thread);
            }
        }
    }
}
