//! Saving and loading the whole state of a run: collective, atomic, and the same error on every rank.
//!
//! Each rank writes the slices it owns; rank 0 makes the result visible all at once. After every step in which a rank
//! can fail alone (a full disk, a read-only folder), all ranks exchange how it went, so that none goes on without the
//! others.

use std::{
    fmt::Display,
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
};

use deepspeed_checkpoint::{
    Checkpoint, CheckpointError, CommitParts, Draft, ParamRecord, RankRecord, RankWriter, SliceSource,
    TensorSource, kind,
};
use deepspeed_comm::Group;
use deepspeed_core::{DType, Layout, ParamId, ParamSpec, Rank, Span, SpanMut};
use deepspeed_monitor::Counters;
use deepspeed_optim::{Hyper, LossScaler, state_names};
use serde_json::{Value, json};

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
    /// The checkpoint's folder.
    pub folder: PathBuf,
}

/// What to load of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Only weights: no optimizer state, no counters.
    pub module_only: bool,
    /// The optimizer's state; without it, masters are made from the weights.
    pub optimizer_states: bool,
    /// Whether every parameter of the model must be in the checkpoint and the other way round.
    pub strict: bool,
}

/// Tells all ranks how a step went on this one; an error on any is an error on all, with that rank's words.
fn agree<T>(
    group: &dyn Group,
    what: &str,
    mine: Result<T, impl Display>,
    to_bytes: impl Fn(&T) -> Vec<u8>,
) -> Result<(T, Vec<Vec<u8>>), EngineError> {
    let message = match &mine {
        Ok(value) => [vec![1], to_bytes(value)].concat(),
        Err(error) => [vec![0], error.to_string().into_bytes()].concat(),
    };
    let all = group.all_gather_bytes(what, &message)?;
    let failed = all.iter().position(|message| message.first() != Some(&1));
    match (failed, mine) {
        (None, Ok(value)) => Ok((value, all.iter().map(|message| message[1..].to_vec()).collect())),
        (Some(rank), _) => {
            let problem = String::from_utf8_lossy(all[rank].get(1..).unwrap_or_default()).into_owned();
            Err(EngineError::Checkpoint { rank: Rank::from_index(rank), problem })
        }
        (None, Err(error)) => Err(EngineError::Checkpoint { rank: group.rank(), problem: error.to_string() }),
    }
}

impl Engine {
    /// Saves everything under `request.tag`. Collective.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] on every rank if anything failed on any; the checkpoints there were are untouched.
    /// [`EngineError::Usage`] for tags that differ under [`TagRule::Fail`].
    pub fn save_checkpoint(&mut self, request: &SaveRequest<'_>) -> Result<Saved, EngineError> {
        self.check_weights_lent(request.weights)?;
        let group = self.group.clone();
        let group = &*group;
        group.set_activity("save_checkpoint");
        let (tag, tags_differ) = agree_on_tag(group, request.tag, request.rule)?;
        let first = group.rank() == Rank(0);

        let draft = if first { Draft::begin(request.dir, &tag, nonce()).map(Some) } else { Ok(None) };
        let (draft, messages) = agree(group, "checkpoint folder", draft, |draft| {
            let name = draft.as_ref().and_then(|draft| draft.folder().file_name());
            name.map_or_else(Vec::new, |name| name.as_encoded_bytes().to_vec())
        })?;
        let folder = request.dir.join(String::from_utf8_lossy(&messages[0]).as_ref());

        let record = self.write_files(&folder, request);
        let (_, records) = agree(group, "checkpoint files", record, RankRecord::to_bytes)?;

        let committed = draft.map(|draft| {
            let records: Result<Vec<_>, _> =
                records.iter().map(|bytes| RankRecord::from_bytes(bytes)).collect();
            draft.commit(&records?, self.commit_parts(request), request.save_latest)
        });
        agree(group, "checkpoint commit", committed.transpose(), |_| Vec::new())?;
        group.set_activity("");
        Ok(Saved { folder: request.dir.join(&tag), tag, tags_differ })
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

    /// Writes this rank's files.
    fn write_files(&self, folder: &Path, request: &SaveRequest<'_>) -> Result<RankRecord, CheckpointError> {
        let rank = self.group.rank();
        let mut writer = RankWriter::new(folder, rank, self.group.world());
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
                            move || {
                                let mut values = vec![0.0f32; fragment.len];
                                offloaded
                                    .read(unit.id, state, start, SpanMut::from(&mut values[..]))
                                    .map_err(std::io::Error::other)?;
                                Ok(Span::from(&values[..]).as_bytes().to_vec())
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
        writer.finish()
    }

    fn commit_parts(&self, request: &SaveRequest<'_>) -> CommitParts {
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
            state: {
                let mut state = self.state();
                state["face"] = request.face.clone();
                state
            },
            frozen_excluded: request.exclude_frozen,
        }
    }

    /// Loads what `options` ask for from the checkpoint `tag` of `dir` (or the latest) into the engine, into `weights`
    /// (by parameter id) and into `frozen` ones (by name). `None` if there is no `latest`. Collective.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] on every rank if anything failed on any.
    pub fn load_checkpoint(
        &mut self,
        dir: &Path,
        tag: Option<&str>,
        options: LoadOptions,
        hypers: &[Hyper],
        weights: &mut [SpanMut<'_>],
        frozen: &mut [(String, SpanMut<'_>)],
    ) -> Result<Option<Checkpoint>, EngineError> {
        let group = self.group.clone();
        let group = &*group;
        group.set_activity("load_checkpoint");
        let opened = Checkpoint::open(dir, tag);
        let (checkpoint, tags) = agree(group, "checkpoint to load", opened, |checkpoint| {
            checkpoint.as_ref().map_or_else(Vec::new, |it| it.tag().as_bytes().to_vec())
        })?;
        if let Some(other) = tags.iter().position(|tag| *tag != tags[0]) {
            let name = |rank: usize| match String::from_utf8_lossy(&tags[rank]).into_owned() {
                empty if empty.is_empty() => "no checkpoint".to_owned(),
                tag => format!("`{tag}`"),
            };
            return Err(EngineError::Usage(format!(
                "ranks would load different checkpoints from {}: rank 0 finds {}, rank {other} finds {}; is the folder \
                 shared by all ranks, and do they pass the same tag?",
                dir.display(),
                name(0),
                name(other)
            )));
        }
        let Some(checkpoint) = checkpoint else {
            group.set_activity("");
            return Ok(None);
        };
        let checked = checkpoint.verify_share(group.rank(), group.world());
        agree(group, "checksums of the checkpoint", checked, |()| Vec::new())?;
        self.check_parameters(&checkpoint, options, frozen)?;
        let read = self.read(&checkpoint, options, hypers, weights, frozen);
        agree(group, "contents of the checkpoint", read, |()| Vec::new())?;
        if !options.module_only {
            self.load_state(checkpoint.state())?;
        }
        self.discard_gradients();
        group.set_activity("");
        Ok(Some(checkpoint))
    }

    /// Compares the model's parameters with the checkpoint's; the same on every rank.
    fn check_parameters(
        &self,
        checkpoint: &Checkpoint,
        options: LoadOptions,
        frozen: &[(String, SpanMut<'_>)],
    ) -> Result<(), EngineError> {
        let mut problems = Vec::new();
        for spec in &self.layout.params {
            match checkpoint.param(&spec.name) {
                Some(stored) if stored.shape != spec.shape => problems.push(format!(
                    "`{}` has shape {:?} in the checkpoint and {:?} in the model",
                    spec.name, stored.shape, spec.shape
                )),
                None if options.strict => {
                    problems.push(format!("the checkpoint has no parameter `{}`", spec.name));
                }
                Some(_) | None => {}
            }
        }
        let sharded = self.weights.as_ref().map_or(&[] as &[ParamSpec], |it| &it.frozen_layout.params);
        let ours = |name: &str| {
            self.layout.params.iter().chain(sharded).any(|spec| spec.name == name)
                || frozen.iter().any(|(it, _)| it == name)
        };
        if options.strict {
            let extra = checkpoint.manifest().params.iter().filter(|param| !ours(&param.name));
            problems.extend(extra.map(|param| format!("the model has no parameter `{}`", param.name)));
        }
        if problems.is_empty() {
            return Ok(());
        }
        let count = problems.len();
        problems.truncate(5);
        Err(EngineError::Usage(format!(
            "checkpoint {} does not fit the model ({count} difference{}): {}{}",
            checkpoint.folder().display(),
            if count == 1 { "" } else { "s" },
            problems.join("; "),
            if options.strict { "; load_module_strict=False loads what fits" } else { "" }
        )))
    }

    fn read(
        &mut self,
        checkpoint: &Checkpoint,
        options: LoadOptions,
        hypers: &[Hyper],
        weights: &mut [SpanMut<'_>],
        frozen: &mut [(String, SpanMut<'_>)],
    ) -> Result<(), EngineError> {
        let rank = self.group.rank();
        if let Some(sharded) = &mut self.weights {
            read_shards(checkpoint, &self.layout, &mut sharded.trained, rank)?;
            read_shards(checkpoint, &sharded.frozen_layout, &mut sharded.frozen, rank)?;
            self.load_masters_from_shards()?;
        } else {
            for (spec, weights) in self.layout.params.iter().zip(weights.iter_mut()) {
                if checkpoint.param(&spec.name).is_some() {
                    let kind = weight_kind(checkpoint, spec);
                    read_cast(checkpoint, &spec.name, kind, 0..spec.numel(), weights)?;
                }
            }
            let spans: Vec<Span<'_>> = weights.iter().map(SpanMut::as_span).collect();
            self.load_masters(&spans)?;
        }
        for (name, weights) in frozen.iter_mut() {
            if checkpoint.dtype(name, kind::WEIGHT).is_some() {
                read_cast(checkpoint, name, kind::WEIGHT, 0..weights.len(), weights)?;
            }
        }
        let names = hypers.first().map_or(&[] as &[&str], state_names);
        if options.module_only || !options.optimizer_states {
            return Ok(());
        }
        for unit in &self.layout.units {
            let shard = &mut self.shards[unit.id.index()];
            let range = unit.shard(rank);
            for fragment in unit.fragments(range.clone()) {
                let name = &self.layout.param(fragment.param).name;
                if checkpoint.param(name).is_none() {
                    continue;
                }
                let start = fragment.unit_offset - range.start;
                let part = start..start + fragment.len;
                let stored = fragment.param_offset..fragment.param_offset + fragment.len;
                if let Some(master) = &mut shard.master
                    && checkpoint.dtype(name, kind::MASTER).is_some()
                {
                    let mut target = SpanMut::from(&mut master.as_f32_mut()[part.clone()]);
                    read_cast(checkpoint, name, kind::MASTER, stored.clone(), &mut target)?;
                }
                for (state, tensor) in names.iter().zip(&mut shard.state) {
                    let mut target = SpanMut::from(&mut tensor.as_f32_mut()[part.clone()]);
                    read_cast(checkpoint, name, state, stored.clone(), &mut target)?;
                }
                if let Some(offloaded) = self.offloaded.as_ref().filter(|it| it.holds(unit.id)) {
                    let master = offloaded.has_master(unit.id).then_some((kind::MASTER, None));
                    let master = master.filter(|(kind, _)| checkpoint.dtype(name, kind).is_some());
                    let states = names.iter().enumerate().map(|(index, name)| (*name, Some(index)));
                    let mut values = vec![0.0f32; fragment.len];
                    for (kind, state) in master.into_iter().chain(states) {
                        let mut target = SpanMut::from(&mut values[..]);
                        read_cast(checkpoint, name, kind, stored.clone(), &mut target)?;
                        offloaded.write(unit.id, state, start, Span::from(&values[..]))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Counters and loss scale, as checkpoints hold them.
    pub fn state(&self) -> Value {
        json!({
            "counters": self.counters,
            "loss_scaler": self.scaler,
            "train_batch_size": self.settings.train_batch_size,
            "accumulation_steps": self.settings.accumulation_steps,
        })
    }

    /// Takes back what [`Engine::state`] gave.
    ///
    /// # Errors
    /// [`EngineError::Usage`] for anything else.
    pub fn load_state(&mut self, state: &Value) -> Result<(), EngineError> {
        let damaged = |what: &str, error: serde_json::Error| {
            EngineError::Usage(format!("the saved {what} cannot be read: {error}"))
        };
        self.counters = serde_json::from_value::<Counters>(state["counters"].clone())
            .map_err(|error| damaged("counters", error))?;
        let scaler = serde_json::from_value::<LossScaler>(state["loss_scaler"].clone())
            .map_err(|error| damaged("loss scale", error))?;
        // A run that goes on in another precision keeps the scaler its config asks for.
        if scaler.is_dynamic() == self.scaler.is_dynamic() {
            self.scaler = scaler;
        }
        self.accumulation.set_micro_steps(self.counters.micro_steps);
        self.restart_window();
        Ok(())
    }
}

/// Where the weights of a parameter are read from: fp32 weights are masters, so they come from the masters of a checkpoint
/// that was trained in 16 bits.
fn weight_kind(checkpoint: &Checkpoint, spec: &ParamSpec) -> &'static str {
    let masters = spec.dtype == DType::F32 && checkpoint.dtype(&spec.name, kind::MASTER).is_some();
    if masters { kind::MASTER } else { kind::WEIGHT }
}

/// Reads this rank's shards of the weights.
fn read_shards(
    checkpoint: &Checkpoint,
    layout: &Layout,
    shards: &mut Shards,
    rank: Rank,
) -> Result<(), CheckpointError> {
    for (unit, mut own) in layout.units.iter().zip(shards.own_mut()) {
        let range = unit.shard(rank);
        for fragment in unit.fragments(range.clone()) {
            let spec = layout.param(fragment.param);
            if checkpoint.dtype(&spec.name, kind::WEIGHT).is_none() {
                continue;
            }
            let stored = fragment.param_offset..fragment.param_offset + fragment.len;
            let mut target = own.slice_mut(fragment.unit_offset - range.start, fragment.len);
            read_cast(checkpoint, &spec.name, weight_kind(checkpoint, spec), stored, &mut target)?;
        }
    }
    Ok(())
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

/// Reads `range` of a parameter's `kind` into `target`, cast to its dtype.
///
/// # Errors
/// [`CheckpointError`] if it is not stored, or damaged.
pub fn read_cast(
    checkpoint: &Checkpoint,
    name: &str,
    kind: &str,
    range: std::ops::Range<usize>,
    target: &mut SpanMut<'_>,
) -> Result<(), CheckpointError> {
    if checkpoint.dtype(name, kind) == Some(target.dtype()) {
        let len = target.len();
        return checkpoint.read(name, kind, range, target.slice_mut(0, len));
    }
    let start = range.start;
    checkpoint.visit(name, kind, range, |at, elements| {
        deepspeed_kernels::cast(elements, target.slice_mut(at - start, elements.len()));
    })
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
