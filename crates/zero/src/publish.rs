//! An updated shard becomes weights on every rank: update and all-gather in one pass.

use std::ops::Range;

use deepspeed_comm::{CommError, Group, PiecesMut};
use deepspeed_core::{AlignedBuffer, DType, Layout, ParamId, Rank, SpanMut, Unit, UnitId};
use deepspeed_kernels::parallel::Workers;

use crate::{OffloadedState, Passage, StreamedUnit, UnitShard, ZeroError};

/// Consecutive elements of a shard that share an optimizer parameter group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The unit they are in.
    pub unit: UnitId,
    /// The first parameter they belong to; the only one unless the update merges parameters.
    pub param: ParamId,
    /// The optimizer's parameter group.
    pub group: usize,
    /// First element inside the shard.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

/// The memory of one run, or of a part of one; all slices are equally long.
#[derive(Debug)]
pub struct RunMemory<'a> {
    /// fp32 masters, to be updated.
    pub master: &'a mut [f32],
    /// Averaged gradients, still multiplied by the loss scale. Writable, so that an update in two phases can keep
    /// its direction there.
    pub gradient: &'a mut [f32],
    /// The optimizer's state tensors.
    pub state: Vec<&'a mut [f32]>,
    /// Where the new weights go in the model's dtype. `None` where the masters are the weights.
    pub out: Option<SpanMut<'a>>,
}

/// The optimizer as sharding sees it: something that updates runs, on any thread.
pub trait ShardUpdate: Sync {
    /// Whether neighbouring parameters of one group may be updated as one run. False for an optimizer that needs to
    /// know where parameters begin.
    fn merges_params(&self) -> bool;

    /// What it needs of units whose masters and state lie on a disk: [`Passage::Steps`] for the second half of an update in
    /// two, which gets no state then.
    fn passage(&self) -> Passage {
        Passage::Update
    }

    /// Updates `memory.master` and writes the result to `memory.out` too.
    fn update(&self, run: Run, memory: RunMemory<'_>);
}

/// The runs of `rank`'s shard of `unit`, in order.
fn runs(layout: &Layout, unit: &Unit, rank: Rank, merge: bool) -> Vec<Run> {
    let shard = unit.shard(rank);
    let mut runs: Vec<Run> = Vec::new();
    for fragment in unit.fragments(shard.clone()) {
        let group = layout.param(fragment.param).group;
        let start = fragment.unit_offset - shard.start;
        match runs.last_mut() {
            Some(last) if merge && last.group == group && last.start + last.len == start => {
                last.len += fragment.len;
            }
            _ => runs.push(Run { unit: unit.id, param: fragment.param, group, start, len: fragment.len }),
        }
    }
    runs
}

/// The model's weights while they are updated.
#[derive(Debug)]
pub enum Weights<'w, 's> {
    /// This rank's copy of every parameter, by parameter id: it is filled with what other ranks update, too.
    Whole(&'w mut [SpanMut<'s>]),
    /// This rank's shard of every unit, by unit id: whoever computes with the others' finds them elsewhere.
    Shards(&'w mut [SpanMut<'s>]),
}

impl Weights<'_, '_> {
    /// What the caller owns of `unit`: fragment by fragment, with its first element inside the shard.
    pub fn own(&mut self, unit: &Unit, rank: Rank) -> Vec<(usize, SpanMut<'_>)> {
        UnitWeights::of(unit, &unit.shard(rank), self).own
    }
}

/// The weights of one unit, apart: what this rank owns and what the others own.
struct UnitWeights<'a> {
    /// The caller's shard, by fragment, offsets inside the shard.
    own: Vec<(usize, SpanMut<'a>)>,
    /// Everything else, offsets inside the unit.
    others: Vec<(usize, SpanMut<'a>)>,
}

impl<'a> UnitWeights<'a> {
    fn of(unit: &Unit, shard: &Range<usize>, weights: &'a mut Weights<'_, '_>) -> Self {
        match weights {
            Weights::Whole(weights) => Self::split(unit, shard, weights),
            Weights::Shards(shards) => Self::cut(unit, shard, &mut shards[unit.id.index()]),
        }
    }

    /// Cuts the caller's shard where parameters end; the padding is left out.
    fn cut(unit: &Unit, shard: &Range<usize>, span: &'a mut SpanMut<'_>) -> Self {
        let len = span.len();
        let mut rest = span.slice_mut(0, len);
        let mut own = Vec::new();
        for fragment in unit.fragments(shard.clone()) {
            let (part, tail) = rest.split_at(fragment.len);
            own.push((fragment.unit_offset - shard.start, part));
            rest = tail;
        }
        Self { own, others: Vec::new() }
    }

    /// Borrows the unit's weights out of `weights`, which is indexed by parameter id.
    fn split(unit: &Unit, shard: &Range<usize>, weights: &'a mut [SpanMut<'_>]) -> Self {
        let mut parts = Self { own: Vec::new(), others: Vec::new() };
        let first = unit.slots.first().map_or(0, |slot| slot.param.index());
        let mut spans = weights.iter_mut().enumerate().skip(first);
        for slot in &unit.slots {
            let (_, span) = spans
                .find(|(index, _)| *index == slot.param.index())
                .expect("invariant: a span per parameter");
            let (start, end) = (slot.offset, slot.offset + slot.len);
            let own_start = shard.start.clamp(start, end);
            let own_end = shard.end.clamp(start, end);
            let (head, tail) = span.slice_mut(0, slot.len).split_at(own_start - start);
            let (own, tail) = tail.split_at(own_end - own_start);
            if !head.is_empty() {
                parts.others.push((start, head));
            }
            if !own.is_empty() {
                parts.own.push((own_start - shard.start, own));
            }
            if !tail.is_empty() {
                parts.others.push((own_end, tail));
            }
        }
        parts
    }
}

/// A shard, or a piece of it, in memory while it is updated, wherever it lies between steps.
struct ShardView<'a> {
    /// The first element inside the shard.
    start: usize,
    gradient: &'a mut [f32],
    /// `None` where the weights are the masters.
    master: Option<&'a mut [f32]>,
    state: Vec<&'a mut [f32]>,
}

/// What an update of all units works with.
pub struct Publication<'a> {
    /// The ranks that update together.
    pub group: &'a dyn Group,
    /// The units.
    pub layout: &'a Layout,
    /// The optimizer.
    pub update: &'a dyn ShardUpdate,
    /// The threads of this rank.
    pub workers: &'a Workers,
    /// How many units, the first ones, are updated here; a device has the others.
    pub count: usize,
    /// Hears of each unit that is done.
    pub updated: &'a dyn Fn(UnitId) -> Result<(), CommError>,
}

impl Publication<'_> {
    /// Updates the caller's shard of every unit that is updated here, and with it the `weights` of every rank that has whole ones. `offloaded` has
    /// the masters and state of the first units, if any lie on a disk.
    ///
    /// With one worker, update and exchange are one pass over memory. With more, and in a world of one, the workers update
    /// the shard first, and what is exchanged is its cast.
    ///
    /// # Errors
    /// [`CommError`], as [`Group::all_gather`]; what the disk says.
    pub fn publish(
        &self,
        shards: &mut [UnitShard],
        offloaded: Option<&mut OffloadedState>,
        weights: &mut Weights<'_, '_>,
    ) -> Result<(), ZeroError> {
        let mut next = 0;
        if let Some(offloaded) = offloaded {
            offloaded.update(self.update.passage(), |memory| {
                let StreamedUnit { unit, start, master, state, gradient } = memory;
                next = unit + 1;
                self.unit(
                    &self.layout.units[unit],
                    &mut ShardView { start, gradient, master, state },
                    weights,
                )
            })?;
        }
        for unit in self.layout.units.iter().take(self.count).skip(next) {
            let UnitShard { gradient, master, state, .. } = &mut shards[unit.id.index()];
            let mut view = ShardView {
                start: 0,
                gradient: gradient.as_f32_mut(),
                master: master.as_mut().map(AlignedBuffer::as_f32_mut),
                state: state.iter_mut().map(AlignedBuffer::as_f32_mut).collect(),
            };
            self.unit(unit, &mut view, weights)?;
        }
        Ok(())
    }

    fn unit(
        &self,
        unit: &Unit,
        shard: &mut ShardView<'_>,
        weights: &mut Weights<'_, '_>,
    ) -> Result<(), ZeroError> {
        let Self { group, layout, update, workers, updated, .. } = *self;
        let alone = group.world() == 1 || matches!(weights, Weights::Shards(_));
        let own_range = unit.shard(group.rank());
        let mut parts = UnitWeights::of(unit, &own_range, weights);
        let in_place = shard.master.is_none();
        let runs = runs(layout, unit, group.rank(), !in_place && update.merges_params());
        if alone || workers.threads() > 1 {
            for (run, own) in by_param(&runs, &mut parts.own) {
                update_run(run, shard, own, update, workers);
            }
        }
        if alone {
            let whole = shard.start + shard.gradient.len() == unit.shard_len;
            return if whole { Ok(updated(unit.id)?) } else { Ok(()) };
        }
        let already = workers.threads() > 1;
        let mut output = PiecesMut { len: unit.len(), runs: parts.others };
        let mut own = parts.own;
        if !in_place {
            let start = own_range.start;
            output.runs.extend(own.drain(..).map(|(offset, span)| (start + offset, span)));
            output.runs.sort_by_key(|(offset, _)| *offset);
        }
        let mut produce = |range: Range<usize>, mut slot: SpanMut<'_>| {
            let first = runs.partition_point(|run| run.start + run.len <= range.start);
            for (index, run) in runs.iter().enumerate().skip(first) {
                let part = run.start.max(range.start)..(run.start + run.len).min(range.end);
                if part.is_empty() {
                    break;
                }
                let out = slot.slice_mut(part.start - range.start, part.len());
                let own = own.get_mut(index).map(|(_, span)| span);
                update_part(*run, part, shard, own, out, if already { &AlreadyUpdated } else { update });
            }
        };
        let what = unit_name(layout, unit);
        group.all_gather(&what, unit.dtype, &mut produce, &mut output)?;
        Ok(updated(unit.id)?)
    }
}

/// One run per stretch of the caller's own weights: a run of several parameters is cut where they end.
fn by_param<'r, 'a>(
    runs: &'r [Run],
    own: &'r mut [(usize, SpanMut<'a>)],
) -> impl Iterator<Item = (Run, &'r mut SpanMut<'a>)> {
    own.iter_mut().map(move |(start, span)| {
        let at = runs.partition_point(|run| run.start + run.len <= *start);
        (Run { start: *start, len: span.len(), ..runs[at] }, span)
    })
}

/// Updates what `shard` has of one run on all workers; `own` is the memory of the run's weights.
fn update_run(
    run: Run,
    shard: &mut ShardView<'_>,
    own: &mut SpanMut<'_>,
    update: &dyn ShardUpdate,
    workers: &Workers,
) {
    let here = shard.start..shard.start + shard.gradient.len();
    let (first, end) = (run.start.max(here.start), (run.start + run.len).min(here.end));
    if first >= end {
        return;
    }
    let mut own = own.slice_mut(first - run.start, end - first);
    let run = Run { start: first, len: end - first, ..run };
    let part = first - here.start..end - here.start;
    let gradient = &mut shard.gradient[part.clone()];
    let state: Vec<&mut [f32]> = shard.state.iter_mut().map(|tensor| &mut tensor[part.clone()]).collect();
    let (master, out) = match &mut shard.master {
        Some(master) => (&mut master[part], Some(own)),
        None => (own.as_f32_mut().expect("invariant: masters in place are fp32"), None),
    };
    workers.map_chunks((master, gradient, state, out), |(master, gradient, state, out)| {
        update.update(run, RunMemory { master, gradient, state, out });
    });
}

/// Updates the elements `part` of a shard and writes the new weights to `out`. `own` is the memory of the run's
/// weights where those are the masters.
fn update_part(
    run: Run,
    part: Range<usize>,
    shard: &mut ShardView<'_>,
    own: Option<&mut SpanMut<'_>>,
    out: SpanMut<'_>,
    update: &dyn ShardUpdate,
) {
    let gradient = &mut shard.gradient[part.clone()];
    let state = shard.state.iter_mut().map(|tensor| &mut tensor[part.clone()]).collect();
    let out = Some(out);
    match &mut shard.master {
        Some(master) => {
            let master = &mut master[part];
            update.update(run, RunMemory { master, gradient, state, out });
        }
        None => {
            let weights = own.expect("invariant: weights that serve as masters are at hand");
            let mut weights = weights.slice_mut(part.start - run.start, part.len());
            let master = weights.as_f32_mut().expect("invariant: masters in place are fp32");
            update.update(run, RunMemory { master, gradient, state, out });
        }
    }
}

/// The masters are up to date already, as after a client's optimizer: what is left is to write the model's dtype.
#[derive(Clone, Copy, Debug)]
pub struct AlreadyUpdated;

impl ShardUpdate for AlreadyUpdated {
    fn merges_params(&self) -> bool {
        true
    }

    fn update(&self, _run: Run, memory: RunMemory<'_>) {
        if let Some(out) = memory.out {
            deepspeed_kernels::cast((&*memory.master).into(), out);
        }
    }
}

/// Gives every rank the whole averaged gradient times `scale`, in `outputs` (by parameter id, fp32): what a
/// client's optimizer at stage 0 steps on.
///
/// # Errors
/// [`CommError`], as [`Group::all_gather`].
pub fn gather_gradients(
    group: &dyn Group,
    layout: &Layout,
    shards: &mut [UnitShard],
    outputs: &mut [SpanMut<'_>],
    scale: f32,
) -> Result<(), CommError> {
    for unit in &layout.units {
        let shard = &mut shards[unit.id.index()];
        let own_range = unit.shard(group.rank());
        if scale != 1.0 {
            deepspeed_kernels::scale_in_place(shard.gradient.as_f32_mut(), scale);
        }
        let parts = UnitWeights::split(unit, &own_range, outputs);
        let start = own_range.start;
        let mut runs = parts.others;
        runs.extend(parts.own.into_iter().map(|(offset, span)| (start + offset, span)));
        runs.sort_by_key(|(offset, _)| *offset);
        let mut output = PiecesMut { len: unit.len(), runs };
        let mut produce = |range: Range<usize>, slot: SpanMut<'_>| {
            deepspeed_kernels::cast((&shard.gradient.as_f32()[range]).into(), slot);
        };
        group.all_gather(&unit_name(layout, unit), DType::F32, &mut produce, &mut output)?;
    }
    Ok(())
}

/// How messages name a unit: by its first parameter.
pub fn unit_name(layout: &Layout, unit: &Unit) -> String {
    let first = unit.slots.first().map_or("", |slot| layout.param(slot.param).name.as_str());
    format!("unit {} ({first})", unit.id)
}
