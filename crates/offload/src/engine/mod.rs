//! The I/O engines: what serves [`Request`]s. They differ in speed only.

mod driver;
mod threads;
mod uring;
mod workers;

use std::{env, fs::File, sync::Arc};

use crate::{
    EngineChoice, EngineKind, OffloadError, Options, Result, options::ENGINE_VARIABLE, request::Request,
};

use self::{threads::Threads, uring::Uring};

/// Serves requests, many at once, in any order.
pub(crate) trait Engine: Send + Sync {
    /// Takes a request; its answer comes through the request's own channel. Does not wait for the device.
    fn submit(&self, request: Request);
}

/// An engine, and what to say about it.
pub(crate) struct Started {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) kind: EngineKind,
    pub(crate) words: String,
}

/// Starts the engine that `options` ask for on `file`.
pub(crate) fn start(file: &Arc<File>, options: &Options) -> Result<Started> {
    let variable = env::var_os(ENGINE_VARIABLE).map(|value| value.to_string_lossy().into_owned());
    match options.engine.resolve(variable.as_deref())? {
        EngineChoice::Threads => start_threads(file, options, "as asked for"),
        EngineChoice::IoUring => {
            start_uring(file, options).map_err(|reason| OffloadError::Engine { engine: "io_uring", reason })
        }
        EngineChoice::Auto => match start_uring(file, options) {
            Ok(started) => Ok(started),
            Err(reason) => start_threads(file, options, &format!("io_uring cannot be used: {reason}")),
        },
    }
}

/// Whether io_uring can be used here: what [`EngineChoice::Auto`] would find out.
///
/// # Errors
/// Why it is refused, in words.
pub fn probe_io_uring() -> Result<(), String> {
    uring::probe()
}

fn start_uring(file: &Arc<File>, options: &Options) -> Result<Started, String> {
    let engine = Uring::start(file, options)?;
    let rings = if options.threads == 1 { "1 ring".into() } else { format!("{} rings", options.threads) };
    let each = if options.threads == 1 { "" } else { " per ring" };
    let mut words = format!(
        "io_uring ({rings}, {} requests of {} kB in flight each way{each}",
        options.queue_depth,
        options.block_size >> 10
    );
    if options.single_submit {
        words += ", submitted one by one";
    }
    if !options.overlap_events {
        words += ", batch by batch";
    }
    words += ")";
    Ok(Started { engine: Box::new(engine), kind: EngineKind::IoUring, words })
}

fn start_threads(file: &Arc<File>, options: &Options, why: &str) -> Result<Started> {
    let engine = Threads::start(file, options)?;
    let mut words = format!("thread pool ({} threads", engine.len());
    if options.threads > 1 {
        words += &format!(", {} to a request", options.threads);
    }
    words += &format!(", blocks of {} kB; {why})", options.block_size >> 10);
    Ok(Started { engine: Box::new(engine), kind: EngineKind::Threads, words })
}
