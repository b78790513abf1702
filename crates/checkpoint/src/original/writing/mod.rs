//! Writing a checkpoint in the original's layout, which the original loads and goes on from.
//!
//! ```text
//! Source -> Plan (per file: one value to pickle, and its storages as lists of pieces) -> torch files, piece by piece
//! ```
//!
//! Nothing larger than a piece is in memory at a time. The folder appears whole or not at all, as our own do.

mod model;
mod plan;
mod shards;

use std::{
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
};

use deepspeed_core::DType;

use self::{
    model::{Facts, model_plans},
    plan::Plan,
    shards::{partition_plan, shard_plan},
};
use crate::{CheckpointError, Draft, Result, Source};

/// The version of the original whose layout is written.
const LAYOUT_VERSION: &str = "0.19.8";

/// In what form to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginalOptions {
    /// The ZeRO stage: 1, 2 or 3.
    pub stage: u8,
    /// Number of ranks that will load it: the original loads at the number that wrote.
    pub world: usize,
    /// What the model computes in; none for what the source's trained parameters are.
    pub dtype: Option<DType>,
}

/// Writes `source` as the checkpoint `tag` of `dir` in the original's layout, and makes `latest` name it. Returns the
/// folder.
///
/// Counters, loss scale, schedule, parameter groups, buffers and the client state of rank 0 (at stage 3, of each rank that
/// the source has) go along; random states and data positions, which the original does not keep, do not.
///
/// # Errors
/// [`CheckpointError::Unsupported`] for options or contents that the layout has no place for;
/// [`CheckpointError::Occupied`] if there is something called `tag`; errors of reading and of [`Draft::begin`].
pub fn write_original(
    source: &dyn Source,
    dir: &Path,
    tag: &str,
    options: OriginalOptions,
) -> Result<PathBuf> {
    let unsupported = |reason: String| CheckpointError::Unsupported { folder: dir.join(tag), reason };
    if !(1..=3).contains(&options.stage) || options.world == 0 {
        return Err(unsupported(format!(
            "the original's layout is written for ZeRO stages 1 to 3 and at least one rank, not for stage {} and {} ranks",
            options.stage, options.world
        )));
    }
    let facts = Facts::read(source, options).map_err(unsupported)?;
    let mut plans: Vec<Plan> = model_plans(source, &facts)?;
    for rank in 0..options.world {
        plans.push(if options.stage == 3 {
            shard_plan(source, &facts, rank)
        } else {
            partition_plan(source, &facts, rank)
        });
    }
    let draft = Draft::begin(dir, tag, RandomState::new().hash_one(std::process::id()))?;
    for plan in &plans {
        plan.write(source, draft.folder())?;
    }
    draft.commit_files()
}
