//! The optimizer files: flat partitions at stages 1 and 2, flat runs of parameters' slices at stage 3.

use std::collections::BTreeSet;

use deepspeed_core::DType;

use super::{
    LAYOUT_VERSION,
    model::Facts,
    plan::{Piece, Plan, Storages},
};
use crate::{ParamRecord, Source, kind, original::pickle::Object};

/// Elements of a rank after which a run ends: the original's default of `sub_group_size`.
const SUB_GROUP: usize = 1_000_000_000;

/// A part of a parameter in a flat run, followed by padding.
pub(super) struct Part<'a> {
    pub(super) param: &'a ParamRecord,
    pub(super) range: std::ops::Range<usize>,
    pub(super) padding: usize,
}

/// The kinds of the optimizer's state that a group's parameters have.
pub(super) fn kinds(source: &dyn Source, group: &[(ParamRecord, usize)]) -> BTreeSet<String> {
    let kinds = group.iter().flat_map(|(param, _)| source.kinds(&param.name));
    kinds.filter(|kind| !matches!(*kind, kind::WEIGHT | kind::MASTER)).map(str::to_owned).collect()
}

/// Masters are fp32 weights where there are none.
pub(super) fn master(source: &dyn Source, part: &Part<'_>) -> Piece {
    let name = &part.param.name;
    let kind = if source.dtype(name, kind::MASTER).is_some() { kind::MASTER } else { kind::WEIGHT };
    Piece::elements(name, kind, part.range.clone())
}

pub(super) fn state(source: &dyn Source, part: &Part<'_>, kind: &str) -> Piece {
    let name = &part.param.name;
    if source.dtype(name, kind).is_none() {
        return Piece::Padding(part.range.len());
    }
    Piece::elements(name, kind, part.range.clone())
}

/// A flat fp32 tensor of the parts, `padded` elements longer.
pub(super) fn flat<'a>(
    storages: &mut Storages,
    parts: &[Part<'a>],
    padded: usize,
    mut piece: impl FnMut(&Part<'a>) -> Piece,
) -> Object {
    let len: usize = parts.iter().map(|part| part.range.len() + part.padding).sum();
    let mut pieces = Vec::new();
    for part in parts {
        pieces.push(piece(part));
        pieces.push(Piece::Padding(part.padding));
    }
    pieces.push(Piece::Padding(padded));
    storages.tensor(DType::F32.into(), &[len + padded], pieces)
}

/// The state dict entries of a run: the number of updates, and a tensor per kind.
pub(super) fn entry<'a>(
    storages: &mut Storages,
    source: &dyn Source,
    facts: &Facts,
    kinds: &BTreeSet<String>,
    parts: &[Part<'a>],
    padded: usize,
) -> Object {
    // A plain number: torch's optimizers make a tensor of it, the original's own need it as it is.
    let mut values = vec![(Object::from("step"), Object::Int(facts.updates))];
    for kind in kinds {
        let tensor = flat(storages, parts, padded, |part| state(source, part, kind));
        values.push((facts.name_of(kind).into(), tensor));
    }
    Object::Dict(values)
}

/// The optimizer's options of a group, with the numbers of its runs.
pub(super) fn options(facts: &Facts, group: usize, runs: Vec<Object>) -> Object {
    let mut options = facts.options[group].clone();
    options.push(("params".into(), Object::List(runs)));
    Object::Dict(options)
}

/// Stage 1 or 2: what `rank` keeps.
pub(super) fn partition_plan(source: &dyn Source, facts: &Facts, rank: usize) -> Plan {
    let mut storages = Storages::default();
    let (mut states, mut groups, mut masters) = (Vec::new(), Vec::new(), Vec::new());
    let (mut paddings, mut alignments, mut counts, mut mappings) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (number, group) in facts.groups.iter().enumerate() {
        let total: usize = group.iter().map(|(_, numel)| numel).sum();
        // Partitions are equal, and the whole is padded to a multiple of twice their number.
        let partition = 2 * total.div_ceil(2 * facts.world);
        let (first, end) = (rank * partition, (rank + 1) * partition);
        let (mut at, mut parts, mut mapping) = (0, Vec::new(), Vec::new());
        for (param, numel) in group {
            let (from, to) = (at.max(first), (at + numel).min(end));
            if from < to {
                let address = [("numel", to - from), ("start", from - first)];
                let address = address.map(|(name, value)| (Object::from(name), Object::from(value))).to_vec();
                let address = Object::New("deepspeed.utils.tensor_fragment", "fragment_address", address);
                mapping.push((Object::from(param.name.as_str()), address));
                parts.push(Part { param, range: from - at..to - at, padding: 0 });
            }
            at += numel;
        }
        let len: usize = parts.iter().map(|part| part.range.len()).sum();
        let padding = partition - len;
        masters.push(flat(&mut storages, &parts, 0, |part| master(source, part)));
        let kinds = kinds(source, group);
        if !kinds.is_empty() || facts.updates > 0 {
            let entry = entry(&mut storages, source, facts, &kinds, &parts, padding);
            states.push((Object::from(number), entry));
        }
        groups.push(options(facts, number, vec![number.into()]));
        paddings.push(padding.into());
        alignments.push(Object::List(vec![Object::Int(0); group.len()]));
        counts.push(facts.world.into());
        mappings.push(Object::OrderedDict(mapping));
    }
    let (scaler, dynamic) = facts.loss_scaler();
    let stage = Object::Int(facts.stage.into());
    let state = Object::dict([
        ("loss_scaler", scaler),
        ("dynamic_loss_scale", Object::Bool(dynamic)),
        ("overflow", Object::Bool(false)),
        ("clip_grad", Object::Float(facts.clip)),
        (
            "base_optimizer_state",
            Object::dict([("state", Object::Dict(states)), ("param_groups", Object::List(groups))]),
        ),
        ("single_partition_of_fp32_groups", Object::List(masters)),
        ("zero_stage", Object::Call("deepspeed.runtime.zero.config", "ZeroStageEnum", vec![stage])),
        ("group_paddings", Object::List(paddings)),
        ("param_alignment_paddings", Object::List(alignments)),
        ("partition_count", Object::List(counts)),
        ("ds_version", LAYOUT_VERSION.into()),
        ("param_slice_mappings", Object::List(mappings)),
    ]);
    file(facts, rank, state, storages)
}

/// Stage 3: what `rank` keeps.
pub(super) fn shard_plan(source: &dyn Source, facts: &Facts, rank: usize) -> Plan {
    let mut storages = Storages::default();
    let (mut states, mut groups, mut masters) = (Vec::new(), Vec::new(), Vec::new());
    for (number, group) in facts.groups.iter().enumerate() {
        let kinds = kinds(source, group);
        let mut runs = Vec::new();
        let mut parts = Vec::new();
        let mut len = 0;
        let mut end_run = |parts: &mut Vec<Part<'_>>| {
            let run = masters.len();
            masters.push(flat(&mut storages, parts, 0, |part| master(source, part)));
            if !kinds.is_empty() || facts.updates > 0 {
                let entry = entry(&mut storages, source, facts, &kinds, parts, 0);
                states.push((Object::from(run), entry));
            }
            runs.push(Object::from(run));
            parts.clear();
        };
        for (param, numel) in group {
            let slice = numel.div_ceil(facts.world);
            let range = (rank * slice).min(*numel)..((rank + 1) * slice).min(*numel);
            let padding = slice - range.len();
            parts.push(Part { param, range, padding });
            len += slice;
            if len >= SUB_GROUP {
                end_run(&mut parts);
                len = 0;
            }
        }
        if !parts.is_empty() {
            end_run(&mut parts);
        }
        groups.push(options(facts, number, runs));
    }
    let (scaler, dynamic) = facts.loss_scaler();
    let stage = Object::Int(facts.stage.into());
    let state = Object::dict([
        ("zero_stage", Object::Call("deepspeed.runtime.zero.config", "ZeroStageEnum", vec![stage])),
        ("loss_scaler", scaler),
        ("dynamic_loss_scale", Object::Bool(dynamic)),
        ("overflow", Object::Bool(false)),
        ("partition_count", facts.world.into()),
        (
            "optimizer_state_dict",
            Object::dict([("state", Object::Dict(states)), ("param_groups", Object::List(groups))]),
        ),
        ("fp32_flat_groups", Object::List(masters)),
    ]);
    file(facts, rank, state, storages)
}

fn file(facts: &Facts, rank: usize, state: Object, storages: Storages) -> Plan {
    let object = Object::dict([
        ("optimizer_state_dict", state),
        ("ds_config", facts.config()),
        ("ds_version", LAYOUT_VERSION.into()),
    ]);
    Plan {
        name: format!("{}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", facts.prefix()),
        object,
        storages,
    }
}
