//! What moves the bytes of an [`OverBytes`](crate::OverBytes) group.

use std::{fmt, time::Duration};

use deepspeed_core::Rank;

/// How far a transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All bytes are where they belong.
    Done,
    /// Not yet: [`ByteTransport::wait`] tells when.
    Pending,
    /// The program was asked to stop (a signal) while it waited.
    Interrupted,
}

/// Moves bytes between ranks; every rank begins the same transfers in the same order, one at a time.
///
/// Until a transfer is over, the memory it was given stays where it is and nobody else touches it. Where a caller does
/// not wait for that, it leaves the memory to the transport for the rest of the process and calls
/// [`abandon`](Self::abandon).
pub trait ByteTransport: Send + Sync + fmt::Debug {
    /// Part `r` of `send` goes to rank `r`; part `r` of `receive` comes from it. All parts are equally long.
    ///
    /// # Errors
    /// What went wrong, in words.
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<Progress, String>;

    /// Every rank's bytes, equally many, in rank order.
    ///
    /// # Errors
    /// What went wrong, in words.
    fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<Progress, String>;

    /// `root`'s bytes on every rank.
    ///
    /// # Errors
    /// What went wrong, in words.
    fn broadcast(&self, data: &mut [u8], root: Rank) -> Result<Progress, String>;

    /// Waits for the transfer that was begun last, `at_most` this long. For transports that block until a transfer is
    /// over, there is nothing to wait for.
    ///
    /// # Errors
    /// What went wrong, in words.
    fn wait(&self, at_most: Duration) -> Result<Progress, String> {
        let _ = at_most;
        Ok(Progress::Done)
    }

    /// Nobody waits for the transfer that was begun last any more, and no other one will begin.
    fn abandon(&self) {}
}
