//! How a store does its I/O: the keys of the `aio` block of the config, and what tests choose.

use std::time::Duration;

use crate::{OffloadError, PAGE, Result};

/// Environment variable that decides for [`EngineChoice::Auto`]: `io_uring` or `threads`.
pub const ENGINE_VARIABLE: &str = "DEEPSPEED_OFFLOAD_IO";

/// Which I/O engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel allows it, else the thread pool; [`ENGINE_VARIABLE`] decides where it is set.
    #[default]
    Auto,
    /// io_uring; an error where it is refused.
    IoUring,
    /// A pool of threads, each in `pread` or `pwrite`.
    Threads,
}

/// How a store does its I/O.
///
/// The defaults are DeepSpeed's, except for `queue_depth`, which is 8 there: more in flight keeps the device busy while
/// the thread that hands over waits for a core, which it shares with the update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The I/O engine.
    pub engine: EngineChoice,
    /// Whether to go around the page cache (`O_DIRECT`) where the filesystem allows it.
    pub direct: bool,
    /// `aio.block_size`: bytes in one request to the kernel; a multiple of 4096.
    pub block_size: usize,
    /// `aio.queue_depth`: io_uring: reads in flight at once, and as many writes, per ring; thread pool: threads (at
    /// most [`Options::MAX_POOL`]).
    pub queue_depth: usize,
    /// `aio.intra_op_parallelism` (`aio.thread_count`): io_uring: rings, each with a thread of its own; thread pool:
    /// threads that share one large request.
    pub threads: usize,
    /// `aio.single_submit`: hand requests to io_uring one by one instead of in batches. The thread pool always does.
    pub single_submit: bool,
    /// `aio.overlap_events`: with io_uring, hand over the next request whenever one is done; if false, a batch of
    /// `queue_depth` is awaited as a whole before the next. The thread pool always overlaps.
    pub overlap_events: bool,
    /// How long to wait for an answer from the device before it counts as stuck.
    pub stall: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            engine: EngineChoice::Auto,
            direct: true,
            block_size: 1 << 20,
            queue_depth: 32,
            threads: 1,
            single_submit: false,
            overlap_events: true,
            stall: Duration::from_secs(300),
        }
    }
}

impl Options {
    /// Threads in the pool, at most.
    pub const MAX_POOL: usize = 16;

    /// Checks the ranges.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |name, value: usize, expected| {
            Err(OffloadError::Setting { name, value: value.to_string(), expected })
        };
        if self.block_size == 0 || !self.block_size.is_multiple_of(PAGE) || self.block_size > 1 << 30 {
            return wrong(
                "aio.block_size",
                self.block_size,
                "a multiple of 4096 bytes up to 1073741824 (1 GiB)",
            );
        }
        if !(1..=4096).contains(&self.queue_depth) {
            return wrong("aio.queue_depth", self.queue_depth, "1 to 4096 requests");
        }
        if !(1..=64).contains(&self.threads) {
            return wrong("aio.intra_op_parallelism", self.threads, "1 to 64 threads");
        }
        Ok(())
    }
}

impl EngineChoice {
    /// The choice with [`ENGINE_VARIABLE`], whose value is `variable`, taken into account.
    pub(crate) fn resolve(self, variable: Option<&str>) -> Result<Self> {
        match (self, variable) {
            (Self::IoUring | Self::Threads, _) | (Self::Auto, None) => Ok(self),
            (Self::Auto, Some("io_uring")) => Ok(Self::IoUring),
            (Self::Auto, Some("threads")) => Ok(Self::Threads),
            (Self::Auto, Some(other)) => Err(OffloadError::Setting {
                name: ENGINE_VARIABLE,
                value: other.into(),
                expected: "io_uring or threads",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_range_is_refused_by_name() {
        let error = Options { block_size: 1000, ..Options::default() }.check().unwrap_err();
        assert_eq!(
            error.to_string(),
            "aio.block_size = 1000 for offload: a multiple of 4096 bytes up to 1073741824 (1 GiB)"
        );
        assert!(Options { queue_depth: 0, ..Options::default() }.check().is_err());
        assert!(Options { threads: 65, ..Options::default() }.check().is_err());
        assert!(Options::default().check().is_ok());
    }

    #[test]
    fn the_variable_decides_only_where_nobody_chose() {
        assert_eq!(EngineChoice::Auto.resolve(Some("threads")).unwrap(), EngineChoice::Threads);
        assert_eq!(EngineChoice::IoUring.resolve(Some("threads")).unwrap(), EngineChoice::IoUring);
        assert_eq!(EngineChoice::Auto.resolve(None).unwrap(), EngineChoice::Auto);
        assert!(EngineChoice::Auto.resolve(Some("libaio")).is_err());
    }
}
