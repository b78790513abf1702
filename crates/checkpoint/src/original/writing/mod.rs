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
mod universal;
mod whole;

use std::{
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
};

use deepspeed_core::DType;

pub use self::universal::write_universal;

use self::{
    model::{Facts, model_plans},
    plan::Plan,
    shards::{partition_plan, shard_plan},
};
use crate::{CheckpointError, Draft, Progress, Result, Source};

/// The version of the original whose layout is written.
const LAYOUT_VERSION: &str = "0.19.8";

/// In what form to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginalOptions {
    /// The ZeRO stage.
    pub stage: u8,
    /// Number of ranks that will load it: the original loads at the number that wrote.
    pub world: usize,
    /// What the model computes in; none for what the source's trained parameters are.
    pub dtype: Option<DType>,
    /// How optimizer state of 16-bit models is kept at stage 0, and what Adagrad's sum is called; none for what the options of
    /// the source's parameter groups tell: those of torch's optimizers, or others.
    pub state: Option<WholeState>,
}

/// How the original keeps the optimizer state of 16-bit models at stage 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WholeState {
    /// All of a parameter group in one tensor: with its own fused optimizers, such as Adam without `torch_adam`.
    Flat,
    /// A tensor per parameter: with torch's optimizers.
    PerParameter,
}

impl OriginalOptions {
    /// For `world` ranks at `stage`, and everything else as in the source.
    pub fn new(stage: u8, world: usize) -> Self {
        Self { stage, world, dtype: None, state: None }
    }

    /// For as many ranks, and at the stage, that wrote `source`.
    pub fn of(source: &dyn Source) -> Self {
        Self::new(source.stage().unwrap_or(0), source.world().max(1))
    }
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
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let unsupported = |reason: String| CheckpointError::Unsupported { folder: dir.join(tag), reason };
    if options.stage > 3 || options.world == 0 {
        return Err(unsupported(format!(
            "the original's layout is written for ZeRO stages 0 to 3 and at least one rank, not for stage {} and {} ranks",
            options.stage, options.world
        )));
    }
    let facts = Facts::read(source, options).map_err(unsupported)?;
    let mut plans: Vec<Plan> = model_plans(source, &facts)?;
    let shards = if options.stage == 0 { 0 } else { options.world };
    for rank in 0..shards {
        plans.push(if options.stage == 3 {
            shard_plan(source, &facts, rank)
        } else {
            partition_plan(source, &facts, rank)
        });
    }
    let draft = Draft::begin(dir, tag, RandomState::new().hash_one(std::process::id()))?;
    progress.begin("converting", plans.iter().map(Plan::bytes).sum());
    for plan in &plans {
        plan.write(source, draft.folder(), progress)?;
    }
    draft.commit_files()
}
