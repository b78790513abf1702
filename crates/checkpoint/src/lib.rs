//! The on-disk format: named slices, manifest, atomic commit. Whole or absent, and readable by any world.
//!
//! ```text
//! DIR/
//!   latest                                    the tag to resume from, replaced by rename
//!   TAG/
//!     manifest.json                           what is where: parameters, slices, checksums, counters; written last
//!     manifest.xxh3                           the manifest's own checksum
//!     weights-rank-00000-of-00002.safetensors    this rank's slices of the weights; rank 0: also buffers
//!     optimizer-rank-00000-of-00002.safetensors  this rank's slices of master weights and optimizer state
//!     extra-rank-00000-of-00002.safetensors      this rank's blobs: random states, client state
//!   .tmp-TAG-NONCE/                           the same while it is being written; never read
//! ```
//!
//! Every slice says which elements of which parameter it holds, so that a checkpoint of any number of ranks and any
//! ZeRO stage is read by any other without conversion, each rank reading just what it needs.
//!
//! The caller moves bytes between ranks; this crate only touches files:
//!
//! ```
//! use deepspeed_checkpoint::{Checkpoint, CommitParts, Draft, ParamRecord, RankWriter, SliceSource, kind};
//! use deepspeed_core::{DType, ParamSpec, Rank, Span, SpanMut};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let temp = tempfile::tempdir()?;
//! # let dir = temp.path();
//! let spec = ParamSpec { name: "w".into(), shape: vec![2, 3], dtype: DType::F32, group: 0 };
//! let weight = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
//!
//! // Rank 0 begins; the others learn the folder by `draft_folder` with the same nonce.
//! let draft = Draft::begin(dir, "global_step1", 7)?;
//!
//! // Every rank writes the slices it owns and sends its record to rank 0.
//! let mut writer = RankWriter::new(draft.folder(), Rank(0), 1);
//! let data = Span::from(&weight[..]);
//! writer.slice(SliceSource { name: &spec.name, kind: kind::WEIGHT, shape: &spec.shape, offset: 0, data })?;
//! writer.blob("rng", vec![1, 2, 3]);
//! let record = writer.finish()?;
//!
//! // Rank 0 makes it visible, all at once.
//! let parts = CommitParts {
//!     world: 1,
//!     stage: 0,
//!     dtype: DType::F32,
//!     params: vec![ParamRecord::from(&spec)],
//!     tied: vec![],
//!     state: serde_json::json!({ "global_steps": 1 }),
//!     frozen_excluded: false,
//! };
//! draft.commit(&[record], parts, true)?;
//!
//! // Any rank of any world reads what it needs.
//! let checkpoint = Checkpoint::open(dir, None)?.expect("`latest` exists");
//! let mut half = [0.0f32; 3];
//! checkpoint.read("w", kind::WEIGHT, 3..6, SpanMut::from(&mut half[..]))?;
//! assert_eq!(half, [4.0, 5.0, 6.0]);
//! # Ok(())
//! # }
//! ```
//!
//! Files are read with positioned reads, not mapped: a bad sector or a file cut short under our feet is then an error
//! and not a signal that ends the process.

mod background;
mod checksum;
pub mod convert;
mod coverage;
pub mod diff;
pub mod disk;
mod draft;
mod element;
mod error;
pub mod export;
mod file_writer;
mod header;
mod index;
pub mod inspect;
mod latest;
mod locate;
mod lock;
mod manifest;
mod open;
mod original;
mod output;
mod progress;
mod reader;
mod record;
mod resume;
mod retention;
mod snapshot;
mod source;
mod tag;
mod verify;
mod writer;

pub use background::{BackgroundSave, Commit, Failure, Outcome, Presence, Role, wait_for_all};
pub use checksum::Checksum;
pub use draft::{Draft, draft_folder, peers_folder};
pub use element::{ElementType, UnknownElementType};
pub use error::{CheckpointError, Result};
pub use latest::{CompleteTag, complete_tags};
pub use locate::Location;
pub use manifest::{CommitParts, FORMAT_VERSION, HostPart, Manifest};
pub use open::{open_any, open_universal};
pub use original::{OriginalCheckpoint, OriginalOptions, WholeState, write_original, write_universal};
pub use progress::{Progress, Silent};
pub use reader::Checkpoint;
pub use record::{BlobRecord, FileRecord, ParamRecord, RankRecord, SliceRecord, TensorRecord};
pub use resume::{Chosen, choose};
pub use retention::{Retired, retire};
pub use snapshot::{CopyPair, Snapshot, SnapshotMemory};
pub use source::{Source, TensorFacts, TrustedFile};
pub use tag::validate_tag;
pub use verify::verify;
pub use writer::{RankWriter, SliceSource, TensorSource};

/// Names of what a slice can hold. Other kinds are legal: any text without `/`.
pub mod kind {
    /// The weights in the dtype the model computes with.
    pub const WEIGHT: &str = "weight";
    /// The fp32 master weights. Absent where the weights themselves are the master.
    pub const MASTER: &str = "master";
    /// Adam's running mean of gradients.
    pub const EXP_AVG: &str = "exp_avg";
    /// Adam's running mean of squared gradients.
    pub const EXP_AVG_SQ: &str = "exp_avg_sq";
}
