//! Saving: every rank its slices, rank 0 the manifest.

use std::{
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
    sync::Arc,
};

use deepspeed_checkpoint::{
    CheckpointError, CommitParts, Draft, HostPart, ParamRecord, RankRecord, RankWriter, Retired, SliceSource,
    TensorSource, kind, retire,
};
use deepspeed_comm::Group;
use deepspeed_core::{DType, Layout, ParamId, ParamSpec, Rank, Span, SpanMut};
use deepspeed_optim::{Hyper, state_names};
use serde_json::Value;

use super::agree::agree;
use crate::{Engine, EngineError, sharded_weights::Shards};

/// What happens when ranks save under different tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagRule {
    /// Rank 0's tag is used.
    FirstRank,
    /// An error on all ranks.
    Fail,
}

/// A parameter that is not trained.
#[derive(Clone, Debug)]
pub struct Frozen<'a> {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub data: Span<'a>,
}

/// Elements of one parameter's state that only a face knows of, as that of a client's optimizer.
#[derive(Clone, Debug)]
pub struct ParamSlice<'a> {
    /// The parameter.
    pub param: ParamId,
    /// What it is: "exp_avg", say.
    pub kind: String,
    /// Where in the flattened parameter it begins.
    pub offset: usize,
    /// The elements.
    pub data: Span<'a>,
}

/// What a face has to save beside the engine's own state.
#[derive(Debug)]
pub struct SaveRequest<'a> {
    /// The folder of all checkpoints.
    pub dir: &'a Path,
    /// This rank's tag.
    pub tag: &'a str,
    /// What if another rank has another.
    pub rule: TagRule,
    /// Whether `latest` names this checkpoint afterwards.
    pub save_latest: bool,
    /// The weights, by parameter id; at stage 3 the engine has them.
    pub weights: &'a [Span<'a>],
    /// The optimizer's parameter groups, for the names of its state.
    pub hypers: &'a [Hyper],
    /// This rank's part of the state of a client's optimizer.
    pub slices: &'a [ParamSlice<'a>],
    /// Parameters that are not trained.
    pub frozen: &'a [Frozen<'a>],
    /// Whether to leave those out.
    pub exclude_frozen: bool,
    /// Other names of parameters and tensors: (other name, name).
    pub tied: &'a [(String, String)],
    /// Buffers and whatever else is whole on every rank.
    pub tensors: &'a [TensorSource<'a>],
    /// Bytes of this rank that only the face understands.
    pub blobs: &'a [(String, Vec<u8>)],
    /// Whatever the face wants to read back as JSON.
    pub face: Value,
}

/// What a save did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The tag that was used.
    pub tag: String,
    /// Whether ranks had different ones.
    pub tags_differ: bool,
    /// The checkpoint's folder; where it is written behind training, it is not there yet.
    pub folder: PathBuf,
    /// Whether it is written behind training.
    pub behind: bool,
    /// Older checkpoints that went, known to rank 0; of a save behind training, [`Engine::finish_save`] tells.
    pub retired: Retired,
}

impl Engine {
    /// Saves everything under `request.tag`. Collective.
    ///
    /// With [`crate::SaveSettings::behind`], returns as soon as everything has been copied; first it waits for the save
    /// before this one, and ends with its error if it had one.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] on every rank if anything failed on any; the checkpoints there were are untouched.
    /// [`EngineError::Usage`] for tags that differ under [`TagRule::Fail`].
    pub fn save_checkpoint(&mut self, request: &SaveRequest<'_>) -> Result<Saved, EngineError> {
        self.check_weights_lent(request.weights)?;
        self.finish_save()?;
        let group = self.group.clone();
        let group = &*group;
        group.set_activity("save_checkpoint");
        let (tag, tags_differ) = agree_on_tag(group, request.tag, request.rule)?;
        let hosts = self.hosts()?;
        let lead = hosts.lead(group.rank());
        let first = group.rank().index() == lead;

        let disk = Arc::clone(&self.settings.saving.disk);
        let draft = if first {
            Draft::begin_on(Arc::clone(&disk), request.dir, &tag, nonce()).map(Some)
        } else {
            Ok(None)
        };
        let (draft, messages) = agree(group, "checkpoint folder", draft, |draft| {
            let name = draft.as_ref().and_then(|draft| draft.folder().file_name());
            name.map_or_else(Vec::new, |name| name.as_encoded_bytes().to_vec())
        })?;
        let folder = request.dir.join(String::from_utf8_lossy(&messages[lead]).as_ref());
        let draft = draft.map(|mut draft| {
            if self.settings.saving.node_local {
                let save = String::from_utf8_lossy(&messages[0]).into_owned();
                draft.keep_part(HostPart { ranks: hosts.ranks_of(lead), save });
            }
            draft
        });

        let target = request.dir.join(&tag);
        if self.settings.saving.behind {
            self.save_behind(request, draft, &folder, &tag)?;
            group.set_activity("");
            return Ok(Saved { tag, tags_differ, folder: target, behind: true, retired: Retired::default() });
        }
        let record = self.writer(&folder, request).and_then(RankWriter::finish);
        let (_, records) = agree(group, "checkpoint files", record, RankRecord::to_bytes)?;

        let committed = draft.map(|draft| {
            let records: Result<Vec<_>, _> =
                records.iter().map(|bytes| RankRecord::from_bytes(bytes)).collect();
            draft.commit(&records?, self.commit_parts(request), request.save_latest)?;
            let keep = self.settings.saving.keep_last;
            Ok::<_, CheckpointError>(keep.map(|keep| retire(&*disk, request.dir, keep)).unwrap_or_default())
        });
        let (retired, _) = agree(group, "checkpoint commit", committed.transpose(), |_| Vec::new())?;
        group.set_activity("");
        Ok(Saved { tag, tags_differ, folder: target, behind: false, retired: retired.unwrap_or_default() })
    }

    fn check_weights_lent(&self, weights: &[Span<'_>]) -> Result<(), EngineError> {
        if self.weights.is_some() {
            return Ok(());
        }
        let expected = self.layout.params.len();
        if weights.len() != expected {
            return Err(EngineError::Count { what: "weights", got: weights.len(), expected });
        }
        Ok(())
    }

    /// Everything that this rank has to save.
    pub(super) fn writer<'a>(
        &'a self,
        folder: &Path,
        request: &'a SaveRequest<'_>,
    ) -> Result<RankWriter<'a>, CheckpointError> {
        let rank = self.group.rank();
        let disk = Arc::clone(&self.settings.saving.disk);
        let mut writer = RankWriter::on(disk, folder, rank, self.group.world());
        let names = request.hypers.first().map_or(&[] as &[&str], state_names);
        for unit in &self.layout.units {
            let shard = &self.shards[unit.id.index()];
            let range = unit.shard(rank);
            for fragment in unit.fragments(range.clone()) {
                let spec = self.layout.param(fragment.param);
                let start = fragment.unit_offset - range.start;
                let part = start..start + fragment.len;
                let source = |kind, data| SliceSource {
                    name: &spec.name,
                    kind,
                    shape: &spec.shape,
                    offset: fragment.param_offset,
                    data,
                };
                let weights = match &self.weights {
                    Some(weights) => weights.trained.own(unit).slice(start, fragment.len),
                    None => {
                        request.weights[fragment.param.index()].slice(fragment.param_offset, fragment.len)
                    }
                };
                writer.slice(source(kind::WEIGHT, weights))?;
                if let Some(master) = &shard.master {
                    writer.slice(source(kind::MASTER, Span::from(&master.as_f32()[part.clone()])))?;
                }
                for (name, tensor) in names.iter().zip(&shard.state) {
                    writer.slice(source(name, Span::from(&tensor.as_f32()[part.clone()])))?;
                }
                if let Some(offloaded) = self.offloaded.as_ref().filter(|it| it.holds(unit.id)) {
                    let master = offloaded.has_master(unit.id).then_some((kind::MASTER, None));
                    let states = names.iter().enumerate().map(|(index, name)| (*name, Some(index)));
                    for (kind, state) in master.into_iter().chain(states) {
                        let what = (spec.name.as_str(), kind, spec.shape.as_slice());
                        writer.slice_from(
                            what,
                            fragment.param_offset,
                            (fragment.len, DType::F32),
                            move |first, piece| {
                                let mut values = vec![0.0f32; piece.len() / DType::F32.size()];
                                offloaded
                                    .read(unit.id, state, start + first, SpanMut::from(&mut values[..]))
                                    .map_err(std::io::Error::other)?;
                                piece.copy_from_slice(Span::from(&values[..]).as_bytes());
                                Ok(())
                            },
                        )?;
                    }
                }
            }
        }
        for slice in request.slices {
            let spec = self.layout.param(slice.param);
            writer.slice(SliceSource {
                name: &spec.name,
                kind: &slice.kind,
                shape: &spec.shape,
                offset: slice.offset,
                data: slice.data,
            })?;
        }
        if let Some(weights) = &self.weights
            && !request.exclude_frozen
        {
            write_shards(&mut writer, &weights.frozen_layout, &weights.frozen, rank)?;
        }
        if rank == Rank(0) {
            for frozen in request.frozen.iter().filter(|_| !request.exclude_frozen) {
                writer.slice(SliceSource {
                    name: &frozen.name,
                    kind: kind::WEIGHT,
                    shape: &frozen.shape,
                    offset: 0,
                    data: frozen.data,
                })?;
            }
            for tensor in request.tensors {
                writer.tensor(*tensor)?;
            }
        }
        for (name, bytes) in request.blobs {
            writer.blob(name, bytes.as_slice());
        }
        Ok(writer)
    }

    pub(super) fn commit_parts(&self, request: &SaveRequest<'_>) -> CommitParts {
        let sharded = self.weights.as_ref().map_or(&[] as &[ParamSpec], |it| &it.frozen_layout.params);
        let sharded = sharded.iter().map(|spec| ParamRecord { group: None, ..ParamRecord::from(spec) });
        let frozen = request.frozen.iter().map(|frozen| ParamRecord {
            name: frozen.name.clone(),
            shape: frozen.shape.clone(),
            dtype: frozen.data.dtype().into(),
            group: None,
        });
        CommitParts {
            world: self.group.world(),
            stage: self.settings.stage.number(),
            dtype: self.settings.precision,
            params: self.layout.params.iter().map(ParamRecord::from).chain(sharded).chain(frozen).collect(),
            tied: request.tied.to_vec(),
            state: {
                let mut state = self.state();
                state["face"] = request.face.clone();
                state
            },
            frozen_excluded: request.exclude_frozen,
        }
    }
}

/// Writes this rank's shards of weights that have nothing else.
fn write_shards<'a>(
    writer: &mut RankWriter<'a>,
    layout: &'a Layout,
    shards: &'a Shards,
    rank: Rank,
) -> Result<(), CheckpointError> {
    for unit in &layout.units {
        let range = unit.shard(rank);
        for fragment in unit.fragments(range.clone()) {
            let spec = layout.param(fragment.param);
            writer.slice(SliceSource {
                name: &spec.name,
                kind: kind::WEIGHT,
                shape: &spec.shape,
                offset: fragment.param_offset,
                data: shards.own(unit).slice(fragment.unit_offset - range.start, fragment.len),
            })?;
        }
    }
    Ok(())
}

/// The tag that all ranks use: rank 0's.
fn agree_on_tag(group: &dyn Group, tag: &str, rule: TagRule) -> Result<(String, bool), EngineError> {
    let tags = group.all_gather_bytes("checkpoint tag", tag.as_bytes())?;
    let text = |rank: usize| String::from_utf8_lossy(&tags[rank]).into_owned();
    let other = tags.iter().position(|tag| *tag != tags[0]);
    match (other, rule) {
        (Some(rank), TagRule::Fail) => Err(EngineError::Usage(format!(
            "ranks save under different tags: rank 0 has `{}`, rank {rank} has `{}`; pass the same tag on all ranks, or \
             set checkpoint.tag_validation to \"WARN\" to use rank 0's",
            text(0),
            text(rank)
        ))),
        (other, _) => Ok((text(0), other.is_some())),
    }
}

/// A number that no other save into the same folder uses.
fn nonce() -> u64 {
    RandomState::new().hash_one(std::process::id())
}
