//! Stage 0: the optimizer's state, which lies in the model file.
//!
//! ```text
//! fp32                       {state, param_groups}, as torch numbers them: a tensor per parameter and kind
//! 16 bits, per parameter     {loss scale, optimizer_state_dict: the same, fp32_groups: [[master, ...], ...]}
//! 16 bits, flat              {optimizer_state_dict: a tensor per group and kind, fp32_groups_flat: [masters, ...], clip_grad}
//! ```

use deepspeed_core::DType;

use super::{
    WholeState,
    model::Facts,
    plan::{Piece, Storages},
    shards::{Part, entry, flat, kinds, master, options, state},
};
use crate::{Source, original::pickle::Object};

/// The value of the model file's `optimizer`.
pub(super) fn whole_optimizer(source: &dyn Source, facts: &Facts, storages: &mut Storages) -> Object {
    if facts.dtype == DType::F32 {
        return per_parameter(source, facts, storages);
    }
    match facts.state {
        WholeState::PerParameter => {
            let mut entries = facts.loss_scale_entries();
            entries.push(("optimizer_state_dict", per_parameter(source, facts, storages)));
            let group = |params: Vec<Part<'_>>, storages: &mut Storages| {
                Object::List(params.iter().map(|part| shaped(storages, part, master(source, part))).collect())
            };
            let masters =
                (0..facts.groups.len()).map(|number| group(parts(facts, number), storages)).collect();
            entries.push(("fp32_groups", Object::List(masters)));
            Object::dict(entries)
        }
        WholeState::Flat => {
            let (mut states, mut groups, mut masters) = (Vec::new(), Vec::new(), Vec::new());
            for number in 0..facts.groups.len() {
                let parts = parts(facts, number);
                let kinds = kinds(source, &facts.groups[number]);
                if !kinds.is_empty() || facts.updates > 0 {
                    let entry = entry(storages, source, facts, &kinds, &parts, 0);
                    states.push((Object::from(number), entry));
                }
                groups.push(options(facts, number, vec![number.into()]));
                masters.push(flat(storages, &parts, 0, |part| master(source, part)));
            }
            let mut entries = if facts.dtype == DType::F16 { facts.loss_scale_entries() } else { Vec::new() };
            let inner = [("state", Object::Dict(states)), ("param_groups", Object::List(groups))];
            entries.push(("optimizer_state_dict", Object::dict(inner)));
            entries.push(("fp32_groups_flat", Object::List(masters)));
            entries.push(("clip_grad", Object::Float(facts.clip)));
            Object::dict(entries)
        }
    }
}

/// The state dict of an optimizer of torch's.
fn per_parameter(source: &dyn Source, facts: &Facts, storages: &mut Storages) -> Object {
    let (mut states, mut groups) = (Vec::new(), Vec::new());
    for group in 0..facts.groups.len() {
        let mut numbers = Vec::new();
        let kinds = kinds(source, &facts.groups[group]);
        for part in parts(facts, group) {
            let number = Object::from(states.len());
            let mut values = vec![(Object::from("step"), Object::Int(facts.updates))];
            for kind in &kinds {
                let tensor = shaped(storages, &part, state(source, &part, kind));
                values.push((facts.name_of(kind).into(), tensor));
            }
            states.push((number.clone(), Object::Dict(values)));
            numbers.push(number);
        }
        groups.push(options(facts, group, numbers));
    }
    // Before the first update there is none.
    let none =
        facts.updates == 0 && (0..facts.groups.len()).all(|it| kinds(source, &facts.groups[it]).is_empty());
    let states = if none { Vec::new() } else { states };
    Object::dict([("state", Object::Dict(states)), ("param_groups", Object::List(groups))])
}

/// The parameters of a group, whole.
fn parts(facts: &Facts, group: usize) -> Vec<Part<'_>> {
    facts.groups[group].iter().map(|(param, numel)| Part { param, range: 0..*numel, padding: 0 }).collect()
}

fn shaped(storages: &mut Storages, part: &Part<'_>, piece: Piece) -> Object {
    storages.tensor(DType::F32.into(), &part.param.shape, vec![piece])
}
