//! Stage 0: the optimizer's state as torch numbers it, in the model file.
//!
//! torch numbers parameters in the order of the parameter groups and keeps no names. Which parameter a number is,
//! follows from the shapes: each group lists its parameters in registration order, so that the module's list is the
//! groups' lists shuffled into each other, with frozen parameters in between. Where there is more than one way to do that,
//! the state is not read rather than given to the wrong parameter; fp32 masters, where there are any, must round to the
//! weights, which leaves one way in practice.

use std::collections::HashMap;

use super::{
    index::{Index, Run},
    model::ModelStates,
    optimizer::{Entry, Facts},
    pickle::{Item, TensorRef},
    torch::TorchFile,
};
use crate::{Result, kind};

/// More partial ways than this are not followed.
const MAX_WAYS: usize = 20_000;
/// Elements of a master that are compared with the weights.
const SAMPLE: usize = 64;

/// The contents of one parameter group.
enum Group {
    /// The parameters one by one: shape and master, as far as they are known, and state.
    Single(Vec<Single>),
    /// All of them in one flat run: elements, master, state.
    Flat(usize, TensorRef, usize),
}

#[derive(Default)]
struct Single {
    shape: Option<Vec<usize>>,
    master: Option<TensorRef>,
    /// Its number in the state.
    number: i64,
}

impl Group {
    fn len(&self) -> usize {
        match self {
            Self::Single(params) => params.len(),
            Self::Flat(len, ..) => *len,
        }
    }
}

/// Reads the state; gives back why it could not be told which parameter is which. `trained` are the parameters that whoever
/// reads trains, with their groups, which settles it.
///
/// # Errors
/// [`crate::CheckpointError::Damaged`], [`crate::CheckpointError::Io`].
pub(super) fn read_whole(
    index: &mut Index,
    facts: &mut Facts,
    files: &[TorchFile],
    model: &ModelStates<'_>,
    trained: Option<&[(&str, usize)]>,
) -> Result<Option<String>> {
    let file = &files[0];
    let Some(optimizer) = model.root.some("optimizer") else { return Ok(None) };
    let base = optimizer.some("optimizer_state_dict").unwrap_or(optimizer);
    let (Some(state), Some(listed)) = (base.get("state"), base.get("param_groups")) else {
        return Err(file.damaged("its `optimizer` is no state dict of an optimizer"));
    };
    let listed_groups = listed.items().unwrap_or_default();
    facts.note_groups(file, Some(listed))?;
    facts.note_scaler(optimizer, model.root.some("ds_config"));
    let groups = match (optimizer.some("fp32_groups_flat"), optimizer.some("fp32_groups")) {
        (Some(flat), _) => flat_groups(file, flat)?,
        (None, masters) => single_groups(state, &listed_groups, masters),
    };
    let groups =
        groups.ok_or_else(|| file.damaged("the parameter groups of its `optimizer` cannot be read"))?;
    let places = match trained {
        None => assign(index, files, &groups)?,
        Some(trained) => assign_as(index, files, &groups, trained)?,
    };
    let Some(places) = places else {
        return Ok(Some(
            "at stage 0 the original numbers the optimizer's state without names, and here the shapes of the parameters \
             leave more than one way, or none, to tell which is whose: train the same parameters in the same groups, save \
             with ZeRO stage 1 in the original, or load with load_optimizer_states=False"
                .to_owned(),
        ));
    };
    for (param, place) in places.iter().enumerate() {
        let Some((group, position)) = *place else {
            index.params[param].group = None;
            continue;
        };
        index.params[param].group = Some(group);
        let name = index.params[param].name.clone();
        let numel = index.numel(param);
        let shape = index.params[param].shape.clone();
        let (master, number, range) = match &groups[group] {
            Group::Single(params) => (params[position].master.clone(), params[position].number, 0..numel),
            Group::Flat(_, master, number) => {
                (Some(master.clone()), *number as i64, position..position + numel)
            }
        };
        let flat = matches!(groups[group], Group::Flat(..));
        let mut tensors: Vec<(&str, TensorRef)> =
            master.into_iter().map(|master| (kind::MASTER, master)).collect();
        if let Some(item) = state.at(number) {
            let entry = Entry::read(item, |found| if flat { found.len() == 1 } else { found == shape });
            let entry =
                entry.ok_or_else(|| file.damaged(format!("the state of parameter {number} is no dict")))?;
            facts.note(file, &entry, &[&name])?;
            tensors.extend(entry.tensors);
        }
        for (kind, tensor) in tensors {
            let run = Run::new(0, &file.view(&tensor)?, range.clone(), 0);
            let run = run.ok_or_else(|| file.damaged(format!("`{kind}` of `{name}` cannot be read")))?;
            index.add(param, kind, run);
        }
    }
    Ok(None)
}

/// The groups of an optimizer that keeps each group's masters in one flat tensor.
fn flat_groups(file: &TorchFile, flat: Item<'_>) -> Result<Option<Vec<Group>>> {
    let Some(masters) = flat.items() else { return Ok(None) };
    let mut groups = Vec::new();
    for (number, master) in masters.into_iter().enumerate() {
        let Some(master) = master.tensor() else { return Ok(None) };
        groups.push(Group::Flat(file.view(&master)?.numel, master, number));
    }
    Ok(Some(groups))
}

/// The groups of an optimizer that knows its parameters one by one.
fn single_groups(state: Item<'_>, listed: &[Item<'_>], masters: Option<Item<'_>>) -> Option<Vec<Group>> {
    let mut groups = Vec::new();
    for (group, item) in listed.iter().enumerate() {
        let numbers = item.get("params")?.items()?;
        let masters = masters.and_then(Item::items).and_then(|groups| groups.get(group)?.items());
        let mut params = Vec::new();
        for (position, number) in numbers.into_iter().enumerate() {
            let number = number.int()?;
            let master = masters.as_ref().and_then(|masters| masters.get(position)?.tensor());
            // Any state of the parameter's size has its shape.
            let of_state = || {
                let tensors = state.at(number)?.named()?.into_iter().filter(|(name, _)| *name != "step");
                tensors
                    .filter_map(|(_, value)| Some(value.tensor()?.shape))
                    .max_by_key(|shape| shape.iter().max().copied())
            };
            let shape = master.as_ref().map(|master| master.shape.clone()).or_else(of_state);
            params.push(Single { shape, master, number });
        }
        groups.push(Group::Single(params));
    }
    Some(groups)
}

/// A partial way: how much of each group has been given away.
type Progress = Vec<usize>;

/// For each parameter its (group, position within the group), or none for a frozen one.
type Places = Vec<Option<(usize, usize)>>;

/// The places if the parameters of each group are those of `trained`, in registration order; none if they do not fit.
fn assign_as(
    index: &Index,
    files: &[TorchFile],
    groups: &[Group],
    trained: &[(&str, usize)],
) -> Result<Option<Places>> {
    let group_of: HashMap<usize, usize> =
        trained.iter().filter_map(|(name, group)| Some((index.position(name)?, *group))).collect();
    let mut progress = vec![0; groups.len()];
    let mut places = vec![None; index.params.len()];
    for (param, place) in places.iter_mut().enumerate() {
        let Some(group) = group_of.get(&param).copied() else { continue };
        let Some(contents) = groups.get(group) else { return Ok(None) };
        let fits = fits(index, files, param, contents, progress[group])?;
        let empty = matches!(contents, Group::Flat(..)) && index.numel(param) == 0;
        let Some(advance) = fits.or(empty.then_some(0)) else { return Ok(None) };
        *place = Some((group, progress[group]));
        progress[group] += advance;
    }
    let all = groups.iter().zip(&progress).all(|(group, done)| group.len() == *done);
    Ok(all.then_some(places))
}

/// The places if there is exactly one way.
fn assign(index: &Index, files: &[TorchFile], groups: &[Group]) -> Result<Option<Places>> {
    let params = index.params.len();
    let total: usize = groups.iter().map(Group::len).sum();
    let single = groups.iter().all(|group| matches!(group, Group::Single(_)));
    let own = |param: usize| if single { 1 } else { index.numel(param) };
    let all: usize = (0..params).map(own).sum();
    let Some(frozen) = all.checked_sub(total) else { return Ok(None) };
    // For each parameter, the ways to get so far: how many there are (2 stands for more), and the step before.
    let mut layers: Vec<HashMap<Progress, (u8, Option<usize>)>> =
        vec![HashMap::from([(vec![0; groups.len()], (1, None))])];
    let mut seen = 0;
    for param in 0..params {
        let mut next: HashMap<Progress, (u8, Option<usize>)> = HashMap::new();
        for (progress, (ways, _)) in &layers[param] {
            let mut step = |to: Progress, group: Option<usize>| {
                let entry = next.entry(to).or_insert((0, group));
                entry.0 = entry.0.saturating_add(*ways).min(2);
            };
            for group in 0..groups.len() {
                if let Some(advance) = fits(index, files, param, &groups[group], progress[group])? {
                    let mut to = progress.clone();
                    to[group] += advance;
                    step(to, Some(group));
                }
            }
            let given: usize = progress.iter().sum();
            if seen - given + own(param) <= frozen {
                step(progress.clone(), None);
            }
        }
        seen += own(param);
        if next.is_empty() || next.len() > MAX_WAYS {
            return Ok(None);
        }
        layers.push(next);
    }
    let mut at: Progress = groups.iter().map(Group::len).collect();
    if layers[params].get(&at).is_none_or(|(ways, _)| *ways != 1) {
        return Ok(None);
    }
    // One way leads here, so one step leads to each of its stations.
    let mut places = vec![None; params];
    for param in (0..params).rev() {
        let Some((_, Some(group))) = layers[param + 1].get(&at) else { continue };
        at[*group] -= match &groups[*group] {
            Group::Single(_) => 1,
            Group::Flat(..) => index.numel(param),
        };
        places[param] = Some((*group, at[*group]));
    }
    Ok(Some(places))
}

/// How far a group is used up if the parameter is what lies at `position`; none if it cannot be.
fn fits(
    index: &Index,
    files: &[TorchFile],
    param: usize,
    group: &Group,
    position: usize,
) -> Result<Option<usize>> {
    let numel = index.numel(param);
    match group {
        Group::Single(params) => {
            let Some(single) = params.get(position) else { return Ok(None) };
            let same = single.shape.as_ref().is_none_or(|shape| *shape == index.params[param].shape);
            if !same {
                return Ok(None);
            }
            let matches = match &single.master {
                Some(master) => rounds_to_weight(index, files, param, master, 0)?,
                None => true,
            };
            Ok(matches.then_some(1))
        }
        // A flat run leaves parameters without elements out.
        Group::Flat(len, master, _) => {
            let there = numel > 0 && position.checked_add(numel).is_some_and(|end| end <= *len);
            Ok((there && rounds_to_weight(index, files, param, master, position)?).then_some(numel))
        }
    }
}

/// Whether the first elements of a master, from `position` on, round to the parameter's weights.
fn rounds_to_weight(
    index: &Index,
    files: &[TorchFile],
    param: usize,
    master: &TensorRef,
    position: usize,
) -> Result<bool> {
    let sample = index.numel(param).min(SAMPLE);
    let Some(weight) = index.stored(param, kind::WEIGHT) else { return Ok(true) };
    let view = files[0].view(master)?;
    let Some(run) = Run::new(0, &view, position..position + sample, 0) else { return Ok(true) };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    weight.visit(files, &(0..sample), &mut |_, span| ours.extend_from_slice(span.as_bytes()))?;
    let rounded = super::index::Stored::rounded_to(weight.dtype, run);
    rounded.visit(files, &(0..sample), &mut |_, span| theirs.extend_from_slice(span.as_bytes()))?;
    Ok(ours == theirs)
}
