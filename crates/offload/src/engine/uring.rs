//! The engine for Linux 5.6 and later: io_uring, one ring per thread.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc::{self, Sender},
    },
};

use io_uring::{IoUring, Probe, opcode};
use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};

use crate::{Options, request::Request};

use super::{Engine, driver::Driver, workers::Workers};

/// Rings with a driver thread each; requests are dealt to them in turn.
pub(super) struct Uring {
    rings: Vec<Ring>,
    turn: AtomicUsize,
    // After `rings`: its senders must be gone before the threads are joined.
    workers: Workers,
}

/// The submitting side of one driver.
struct Ring {
    /// `None` once the engine is being dropped.
    requests: Option<Sender<Request>>,
    bell: Arc<Bell>,
}

impl Uring {
    /// Starts the rings, or says in words why the system does not let us.
    pub(super) fn start(file: &Arc<File>, options: &Options) -> Result<Self, String> {
        let mut engine = Self { rings: Vec::new(), turn: AtomicUsize::new(0), workers: Workers::new() };
        for _ in 0..options.threads {
            // Reads, writes, and the bell.
            let ring = open_ring(2 * options.queue_depth as u32 + 1)?;
            let bell = Arc::new(Bell::new().map_err(|error| format!("no eventfd: {error}"))?);
            let (requests, incoming) = mpsc::channel();
            engine.rings.push(Ring { requests: Some(requests), bell: Arc::clone(&bell) });
            let (file, options) = (Arc::clone(file), options.clone());
            engine
                .workers
                .spawn(move || Driver::new(ring, file, bell, incoming, &options).run())
                .map_err(|error| format!("a thread cannot be started: {error}; raise `ulimit -u`"))?;
        }
        Ok(engine)
    }
}

impl Engine for Uring {
    fn submit(&self, request: Request) {
        let ring = &self.rings[self.turn.fetch_add(1, Relaxed) % self.rings.len()];
        if let Some(requests) = &ring.requests {
            // It fails only after the driver has panicked; the request then answers for itself.
            let _ = requests.send(request);
            ring.bell.ring();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.requests = None;
        self.bell.ring();
    }
}

/// Opens a small ring and closes it.
pub(super) fn probe() -> Result<(), String> {
    open_ring(2).map(drop)
}

/// A ring that has been seen to work.
fn open_ring(entries: u32) -> Result<IoUring, String> {
    let mut ring = IoUring::new(entries).map_err(|error| refusal(&error))?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|_| "the kernel is older than Linux 5.6".to_string())?;
    let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::PollAdd::CODE];
    if !needed.into_iter().all(|code| probe.is_supported(code)) {
        return Err("the kernel is older than Linux 5.6".into());
    }
    // A seccomp filter may allow the set-up and refuse the use.
    // SAFETY: a no-op refers to no memory.
    unsafe { ring.submission().push(&opcode::Nop::new().build()) }.expect("invariant: a new ring is empty");
    ring.submit_and_wait(1).map_err(|error| refusal(&error))?;
    ring.completion().for_each(drop);
    Ok(ring)
}

/// Why io_uring was refused, in words.
fn refusal(error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSYS) => "the kernel has none".into(),
        Some(Errno::PERM | Errno::ACCESS) => {
            "not permitted (a container's seccomp profile, or sysctl kernel.io_uring_disabled)".into()
        }
        Some(Errno::NOMEM) => "its memory is refused (raise `ulimit -l`)".into(),
        _ => error.to_string(),
    }
}

/// Wakes a driver that waits for its ring: an eventfd the ring polls.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

impl Bell {
    fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Wakes the driver, now or when it next waits.
    fn ring(&self) {
        // It fails only if the counter is full, and then the bell is ringing anyway.
        let _ = rustix::io::write(self.0.as_fd(), &1u64.to_ne_bytes());
    }

    /// Silences the bell.
    pub(super) fn clear(&self) {
        // It fails only if the bell is silent.
        let _ = rustix::io::read(self.0.as_fd(), &mut [0u8; 8]);
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
