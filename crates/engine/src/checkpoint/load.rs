//! Loading: every rank the elements it needs, whatever world and stage wrote them.

use std::{path::Path, sync::Arc};

use deepspeed_checkpoint::{CheckpointError, Source, kind};
use deepspeed_core::{DType, Layout, ParamSpec, Rank, Span, SpanMut};
use deepspeed_optim::{Hyper, state_names};

use super::{
    agree::agree,
    reading::{Wanted, cut, read_all, verify},
};
use crate::{Engine, EngineError, sharded_weights::Shards};

/// What to load of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// The weights. Without them, they stay as they are; masters and optimizer state come by name where shapes agree.
    pub weights: bool,
    /// Only weights: no optimizer state, no counters.
    pub module_only: bool,
    /// The optimizer's state; without it, masters are made from the weights.
    pub optimizer_states: bool,
    /// Whether every parameter of the model must be in the checkpoint and the other way round.
    pub strict: bool,
}

impl Engine {
    /// Opens one checkpoint and checks its files: `opened` is what this rank found. Collective.
    ///
    /// # Errors
    /// [`EngineError::DamagedCheckpoint`] if a checksum is wrong; as [`Engine::open_checkpoint`].
    pub(super) fn agree_on_opened(
        &self,
        dir: &Path,
        opened: Result<Option<Box<dyn Source>>, CheckpointError>,
    ) -> Result<Option<Box<dyn Source>>, EngineError> {
        let group = &*self.group;
        group.set_activity("load_checkpoint");
        let trained: Vec<(&str, usize)> =
            self.layout.params.iter().map(|spec| (spec.name.as_str(), spec.group)).collect();
        let opened = opened.and_then(|mut checkpoint| {
            if let Some(checkpoint) = &mut checkpoint {
                checkpoint.resolve(&trained)?;
            }
            Ok(checkpoint)
        });
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
        if let Some(checkpoint) = &checkpoint {
            // Nothing is changed before every byte has been found right, each by one rank. Where each host has files of its
            // own, and has got others over the group, by one rank of the host.
            let hosts = self.hosts()?;
            let neighbours = hosts.ranks_of(hosts.lead(group.rank()));
            let index = neighbours.iter().position(|rank| *rank == group.rank().index()).unwrap_or(0);
            let checked = verify(&**checkpoint, (index, neighbours.len()), self.settings.threads);
            agree(group, "checksums of the checkpoint", checked, |()| Vec::new())
                .map_err(EngineError::damaged)?;
            checkpoint.trust();
        }
        group.set_activity("");
        Ok(checkpoint)
    }

    /// Loads what `options` ask for into the engine, into `weights` (by parameter id) and into `frozen` ones (by name).
    /// Collective.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] on every rank if anything failed on any; [`EngineError::Usage`] for a model that does
    /// not fit.
    pub fn load_from(
        &mut self,
        checkpoint: &dyn Source,
        options: LoadOptions,
        hypers: &[Hyper],
        weights: &mut [SpanMut<'_>],
        frozen: &mut [(String, SpanMut<'_>)],
    ) -> Result<(), EngineError> {
        let group = self.group.clone();
        let group = &*group;
        group.set_activity("load_checkpoint");
        if options.weights {
            self.check_parameters(checkpoint, options, frozen)?;
        }
        let read = self.read(checkpoint, options, hypers, weights, frozen);
        agree(group, "contents of the checkpoint", read, |()| Vec::new())?;
        if !options.module_only {
            self.load_state(checkpoint.state())?;
        }
        self.discard_gradients();
        group.set_activity("");
        Ok(())
    }

    /// Compares the model's parameters with the checkpoint's; the same on every rank.
    fn check_parameters(
        &self,
        checkpoint: &dyn Source,
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
            let known = |name: &str| {
                ours(name) || checkpoint.tied().iter().any(|(other, tied)| tied == name && ours(other))
            };
            let extra = checkpoint.params().iter().filter(|param| !known(&param.name));
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
        checkpoint: &dyn Source,
        options: LoadOptions,
        hypers: &[Hyper],
        weights: &mut [SpanMut<'_>],
        frozen: &mut [(String, SpanMut<'_>)],
    ) -> Result<(), EngineError> {
        let rank = self.group.rank();
        let layout = Arc::clone(&self.layout);
        if let Some(sharded) = self.weights.as_mut().filter(|_| options.weights) {
            let mut wanted = wanted_shards(checkpoint, &layout, &mut sharded.trained, rank);
            wanted.extend(wanted_shards(checkpoint, &sharded.frozen_layout, &mut sharded.frozen, rank));
            read_all(checkpoint, &self.workers, wanted)?;
            self.load_masters_from_shards()?;
        } else if options.weights {
            let stored = layout.params.iter().zip(weights.iter_mut());
            let stored = stored.filter(|(spec, _)| checkpoint.param(&spec.name).is_some());
            let wanted = stored.map(|(spec, weights)| {
                let len = weights.len();
                let (name, kind) = (spec.name.as_str(), weight_kind(checkpoint, spec));
                Wanted { name, kind, start: 0, target: weights.slice_mut(0, len) }
            });
            read_all(checkpoint, &self.workers, wanted.collect())?;
            let spans: Vec<Span<'_>> = weights.iter().map(SpanMut::as_span).collect();
            self.load_masters(&spans)?;
        }
        let stored = frozen.iter_mut().filter(|_| options.weights);
        let stored = stored.filter(|(name, _)| checkpoint.dtype(name, kind::WEIGHT).is_some());
        let wanted = stored.map(|(name, weights)| {
            let len = weights.len();
            Wanted { name, kind: kind::WEIGHT, start: 0, target: weights.slice_mut(0, len) }
        });
        read_all(checkpoint, &self.workers, wanted.collect())?;
        if options.module_only || !options.optimizer_states {
            return Ok(());
        }
        let names = hypers.first().map_or(&[] as &[&str], state_names);
        self.read_state(checkpoint, names)
    }

    /// This rank's shards of masters and optimizer state.
    fn read_state(&mut self, checkpoint: &dyn Source, names: &[&str]) -> Result<(), EngineError> {
        let (layout, rank) = (Arc::clone(&self.layout), self.group.rank());
        let fits =
            |spec: &ParamSpec| checkpoint.param(&spec.name).is_some_and(|stored| stored.shape == spec.shape);
        let mut wanted = Vec::new();
        for (unit, shard) in layout.units.iter().zip(&mut self.shards) {
            let masters = shard.master.as_mut().map(|master| (None, master.span_mut()));
            let states = names.iter().zip(&mut shard.state);
            let states = states.map(|(name, state)| (Some(*name), state.span_mut()));
            for (state, memory) in masters.into_iter().chain(states) {
                for (fragment, target) in cut(unit, rank, memory) {
                    let spec = layout.param(fragment.param);
                    let kind = state.or_else(|| master_kind(checkpoint, &spec.name));
                    if let Some(kind) = kind.filter(|_| fits(spec)) {
                        let start = fragment.param_offset;
                        wanted.push(Wanted { name: &spec.name, kind, start, target });
                    }
                }
            }
        }
        read_all(checkpoint, &self.workers, wanted)?;
        let Some(offloaded) = &self.offloaded else { return Ok(()) };
        for unit in layout.units.iter().filter(|unit| offloaded.holds(unit.id)) {
            let range = unit.shard(rank);
            for fragment in unit.fragments(range.clone()) {
                let spec = layout.param(fragment.param);
                if !fits(spec) {
                    continue;
                }
                let master = master_kind(checkpoint, &spec.name).filter(|_| offloaded.has_master(unit.id));
                let states = names.iter().enumerate().map(|(index, name)| (*name, Some(index)));
                let mut values = vec![0.0f32; fragment.len];
                let start = fragment.param_offset;
                for (kind, state) in master.map(|kind| (kind, None)).into_iter().chain(states) {
                    let target = SpanMut::from(&mut values[..]);
                    let wanted = vec![Wanted { name: &spec.name, kind, start, target }];
                    read_all(checkpoint, &self.workers, wanted)?;
                    let at = fragment.unit_offset - range.start;
                    offloaded.write(unit.id, state, at, Span::from(&values[..]))?;
                }
            }
        }
        Ok(())
    }
}

/// Where the weights of a parameter are read from: fp32 weights are masters, so they come from the masters of a checkpoint
/// that was trained in 16 bits.
fn weight_kind(checkpoint: &dyn Source, spec: &ParamSpec) -> &'static str {
    let masters = spec.dtype == DType::F32 && checkpoint.dtype(&spec.name, kind::MASTER).is_some();
    if masters { kind::MASTER } else { kind::WEIGHT }
}

/// Where the fp32 master of a parameter is read from: weights that were saved in fp32 are masters.
fn master_kind(checkpoint: &dyn Source, name: &str) -> Option<&'static str> {
    let fp32 = |kind| checkpoint.dtype(name, kind) == Some(DType::F32);
    [kind::MASTER, kind::WEIGHT].into_iter().find(|kind| fp32(kind))
}

/// This rank's shards of the weights.
fn wanted_shards<'a>(
    checkpoint: &dyn Source,
    layout: &'a Layout,
    shards: &'a mut Shards,
    rank: Rank,
) -> Vec<Wanted<'a>> {
    let mut wanted = Vec::new();
    for (unit, own) in layout.units.iter().zip(shards.own_mut()) {
        for (fragment, target) in cut(unit, rank, own) {
            let spec = layout.param(fragment.param);
            if checkpoint.dtype(&spec.name, kind::WEIGHT).is_some() {
                let kind = weight_kind(checkpoint, spec);
                wanted.push(Wanted { name: &spec.name, kind, start: fragment.param_offset, target });
            }
        }
    }
    wanted
}

/// Reads `range` of a parameter's `kind` into `target`, cast to its dtype.
///
/// # Errors
/// [`CheckpointError`] if it is not stored, or damaged.
pub fn read_cast(
    checkpoint: &dyn Source,
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
    checkpoint.visit(name, kind, range, &mut |at, elements| {
        deepspeed_kernels::cast(elements, target.slice_mut(at - start, elements.len()));
    })
}
