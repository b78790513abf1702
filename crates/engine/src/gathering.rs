//! Stage 3 where ranks share no memory: whole units of weights from everybody's shards, and back.
//!
//! Units are numbered through: those of the trained parameters first, then those of the others. So are parameters.

use std::sync::Arc;

use deepspeed_comm::PiecesMut;
use deepspeed_core::{DType, Fragment, Layout, ParamId, Rank, Span, SpanMut, Unit};
use deepspeed_zero::{UnitFacts, refresh_master, unit_name};

use crate::{Engine, EngineError, engine::check_length, sharded_weights::ShardedWeights};

/// One unit as whoever gathers it needs to know it.
#[derive(Clone, Debug)]
pub struct GatheredUnit {
    /// How messages call it.
    pub name: String,
    /// Its size, and whether it is trained.
    pub facts: UnitFacts,
    /// The dtype of all its parameters.
    pub dtype: DType,
    /// Its elements with padding: those of all ranks' shards.
    pub padded: usize,
    /// Parameter, its first element inside the unit, number of elements; in order, without gaps.
    pub slots: Vec<(usize, usize, usize)>,
}

/// This rank's part of a parameter: where it lies in the engine's memory, and number of elements; no address for none.
pub type OwnPart = (usize, usize);

impl Engine {
    /// Whether whoever computes gathers units first: stage 3 without shared memory.
    pub fn gathers_weights(&self) -> bool {
        let private = self.weights.as_ref().is_some_and(|weights| weights.trained.shared().is_none());
        private && !self.weights_are_whole()
    }

    /// The units, in their common numbering.
    pub fn gathered_units(&self) -> Vec<GatheredUnit> {
        let trained = self.layout.units.iter().map(|unit| gathered_unit(&self.layout, unit, 0, true));
        let first = self.layout.params.len();
        let frozen = self.weights.iter().flat_map(|weights| {
            let layout = &weights.frozen_layout;
            layout.units.iter().map(move |unit| gathered_unit(layout, unit, first, false))
        });
        trained.chain(frozen).collect()
    }

    /// Fills `target` (the unit's elements without padding, its dtype) with everybody's shards of unit number `unit`.
    /// Collective: ranks that gather different units get an error that names both.
    ///
    /// # Errors
    /// [`EngineError::Comm`]; [`EngineError::Usage`] where there is no such unit to gather.
    pub fn gather_unit(&self, number: usize, target: SpanMut<'_>) -> Result<(), EngineError> {
        let weights = self.sharded()?;
        let (layout, shards, unit) = match number.checked_sub(self.layout.units.len()) {
            None => (&*self.layout, &weights.trained, &self.layout.units[number]),
            Some(frozen) => {
                let layout = &weights.frozen_layout;
                let unit = layout.units.get(frozen).ok_or_else(|| no_such("unit", number))?;
                (layout, &weights.frozen, unit)
            }
        };
        let own = shards.own(unit);
        let mut produce = |range: std::ops::Range<usize>, slot: SpanMut<'_>| {
            deepspeed_kernels::cast(own.slice(range.start, range.len()), slot);
        };
        let mut output = PiecesMut { len: unit.len(), runs: vec![(0, target)] };
        let what = format!("weights of {}", unit_name(layout, unit));
        self.group.all_gather(&what, unit.dtype, &mut produce, &mut output)?;
        self.give_back_unit(number)
    }

    /// Takes this rank's part of the whole parameter number `param`, of any dtype: as weights and, if it is trained, as
    /// fp32 masters. Those on a disk follow in [`load_masters_from_shards`](Self::load_masters_from_shards).
    ///
    /// # Errors
    /// [`EngineError::Length`], [`EngineError::Usage`].
    pub fn load_weight(&mut self, param: usize, whole: Span<'_>) -> Result<(), EngineError> {
        self.store_own(param, whole)?;
        let shards = &mut self.shards;
        let rank = self.group.rank();
        let Some(unit) = unit_of(&self.layout, ParamId::from_index(param)) else { return Ok(()) };
        if let Some(master) = &mut shards[unit.id.index()].master {
            for (fragment, start) in own_fragments(unit, rank, ParamId::from_index(param)) {
                let source = whole.slice(fragment.param_offset, fragment.len);
                deepspeed_kernels::cast(source, master.span_mut().slice_mut(start, fragment.len));
            }
        }
        Ok(())
    }

    /// Takes this rank's parts of whole parameters (by number) that a program has written to. Masters that round to their
    /// weight already keep their precision.
    ///
    /// # Errors
    /// As [`Engine::load_weight`].
    pub fn store_weights(&mut self, params: &[(usize, Span<'_>)]) -> Result<(), EngineError> {
        for (param, whole) in params {
            self.store_own(*param, *whole)?;
        }
        let mut by_id = vec![Span::from(&[] as &[f32]); self.layout.params.len()];
        let mut trained = Vec::new();
        for (param, whole) in params {
            if let Some(span) = by_id.get_mut(*param) {
                *span = *whole;
                trained.push(ParamId::from_index(*param));
            }
        }
        let (layout, rank) = (Arc::clone(&self.layout), self.group.rank());
        for unit in &layout.units {
            self.shards[unit.id.index()].update_master(unit, rank, &trained, &by_id);
        }
        self.change_offloaded_masters(|unit, range, master| {
            refresh_master(master, unit, range, &trained, &by_id);
        })
    }

    /// Takes this rank's part of a whole parameter into its shard of the weights.
    fn store_own(&mut self, param: usize, whole: Span<'_>) -> Result<(), EngineError> {
        self.sharded()?;
        let rank = self.group.rank();
        let Some(weights) = &mut self.weights else { return Ok(()) };
        let (layout, shards, id) = match param.checked_sub(self.layout.params.len()) {
            None => (&*self.layout, &mut weights.trained, ParamId::from_index(param)),
            Some(frozen) => (&weights.frozen_layout, &mut weights.frozen, ParamId::from_index(frozen)),
        };
        let spec = layout.params.get(id.index()).ok_or_else(|| no_such("parameter", param))?;
        check_length("weights", spec, whole.len())?;
        let Some(unit) = unit_of(layout, id) else { return Ok(()) };
        let mut own = shards.own_mut();
        let own = &mut own[unit.id.index()];
        if own.is_empty() {
            return Ok(()); // a device has it
        }
        for (fragment, start) in own_fragments(unit, rank, id) {
            let source = whole.slice(fragment.param_offset, fragment.len);
            deepspeed_kernels::cast(source, own.slice_mut(start, fragment.len));
        }
        let number =
            if param < self.layout.params.len() { 0 } else { self.layout.units.len() } + unit.id.index();
        self.give_back_unit(number)
    }

    /// This rank's part of every parameter, by number.
    pub fn own_parts(&mut self) -> Vec<OwnPart> {
        let rank = self.group.rank();
        let mut parts = vec![(0, 0); self.layout.params.len()];
        if let Some(weights) = &mut self.weights {
            let frozen = parts.len();
            parts.resize(frozen + weights.frozen_layout.params.len(), (0, 0));
            for (layout, shards, first) in
                [(&*self.layout, &weights.trained, 0), (&weights.frozen_layout, &weights.frozen, frozen)]
            {
                for unit in layout.units.iter().filter(|_| self.device.is_none()) {
                    let start = shards.own(unit).as_bytes().as_ptr() as usize;
                    let shard = unit.shard(rank);
                    for fragment in unit.fragments(shard.clone()) {
                        let bytes = (fragment.unit_offset - shard.start) * unit.dtype.size();
                        parts[first + fragment.param.index()] = (start + bytes, fragment.len);
                    }
                }
            }
        }
        parts
    }

    fn sharded(&self) -> Result<&ShardedWeights, EngineError> {
        let weights = self.weights.as_ref().filter(|_| self.gathers_weights() || self.device.is_some());
        weights.ok_or_else(|| {
            EngineError::Usage(
                "weights are gathered only at stage 3 and where ranks share no memory".to_owned(),
            )
        })
    }
}

fn gathered_unit(layout: &Layout, unit: &Unit, first_param: usize, trained: bool) -> GatheredUnit {
    let slots = unit.slots.iter().map(|slot| (first_param + slot.param.index(), slot.offset, slot.len));
    let largest_param = unit.slots.iter().map(|slot| slot.len).max().unwrap_or(0);
    GatheredUnit {
        name: unit_name(layout, unit),
        facts: UnitFacts { elements: unit.filled, largest_param, trained },
        dtype: unit.dtype,
        padded: unit.len(),
        slots: slots.collect(),
    }
}

/// The parts of `param` in `rank`'s shard of `unit`, each with its first element inside the shard.
fn own_fragments(unit: &Unit, rank: Rank, param: ParamId) -> impl Iterator<Item = (Fragment, usize)> + '_ {
    let shard = unit.shard(rank);
    let start = shard.start;
    let mine = unit.fragments(shard).filter(move |fragment| fragment.param == param);
    mine.map(move |fragment| (fragment, fragment.unit_offset - start))
}

fn unit_of(layout: &Layout, param: ParamId) -> Option<&Unit> {
    layout.units.iter().find(|unit| unit.slots.iter().any(|slot| slot.param == param))
}

fn no_such(what: &str, number: usize) -> EngineError {
    EngineError::Usage(format!("there is no {what} number {number}"))
}
