//! What can go wrong while shards are updated.

use deepspeed_comm::CommError;
use deepspeed_offload::OffloadError;

/// An error of this crate.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZeroError {
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// State on a disk could not be read or written.
    #[error(transparent)]
    Offload(#[from] OffloadError),
}
