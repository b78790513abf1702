//! Saving and loading the whole state of a run: collective, atomic, and the same error on every rank.
//!
//! Each rank writes the slices it owns; rank 0 makes the result visible all at once. After every step in which a rank
//! can fail alone (a full disk, a read-only folder), all ranks exchange how it went, so that none goes on without the
//! others.

mod agree;
mod behind;
mod hosts;
mod load;
mod reading;
mod resume;
mod save;
mod state;

pub(crate) use behind::{Memory, Saving};
pub use load::{LoadOptions, read_cast};
pub use save::{Frozen, ParamSlice, SaveRequest, Saved, TagRule};
