//! Where masters and sharded weights get their first values, and values that a program has changed.

use std::{ops::Range, sync::Arc};

use deepspeed_core::{ParamId, Span, Unit};
use deepspeed_zero::{Passage, StreamedUnit, fill_master, refresh_master};

use crate::{Engine, EngineError, engine::check_length};

impl Engine {
    /// Makes `params` (whole, by parameter id, any dtype) the fp32 masters of this rank's shards.
    ///
    /// # Errors
    /// [`EngineError::Count`] or [`EngineError::Length`].
    pub fn load_masters(&mut self, params: &[Span<'_>]) -> Result<(), EngineError> {
        self.check_count("weights", params.len(), self.layout.params.len())?;
        for (spec, span) in self.layout.params.iter().zip(params) {
            check_length("weights", spec, span.len())?;
        }
        let (layout, rank) = (Arc::clone(&self.layout), self.group.rank());
        for unit in &layout.units {
            self.shards[unit.id.index()].load_master(unit, rank, params);
        }
        self.change_offloaded_masters(|unit, range, master| fill_master(master, unit, range, params))
    }

    /// Makes the weights of `params`, whole and by parameter id in `weights`, the fp32 masters: a program has changed them.
    /// Masters that round to their weight already keep their precision.
    ///
    /// # Errors
    /// [`EngineError::Count`] or [`EngineError::Length`].
    pub fn reload_masters(&mut self, params: &[ParamId], weights: &[Span<'_>]) -> Result<(), EngineError> {
        self.check_count("weights", weights.len(), self.layout.params.len())?;
        for (spec, span) in self.layout.params.iter().zip(weights) {
            check_length("weights", spec, span.len())?;
        }
        let (layout, rank) = (Arc::clone(&self.layout), self.group.rank());
        for unit in &layout.units {
            self.shards[unit.id.index()].update_master(unit, rank, params, weights);
        }
        self.change_offloaded_masters(|unit, range, master| {
            refresh_master(master, unit, range, params, weights);
        })
    }

    /// At stage 3: fills this rank's shards of the weights from whole parameters of any dtype, trained and frozen, both
    /// by parameter id. When it returns, all ranks have done so. Collective.
    ///
    /// # Errors
    /// [`EngineError::Count`], [`EngineError::Length`], [`EngineError::Comm`]; [`EngineError::Usage`] below stage 3.
    pub fn fill_weights(&mut self, params: &[Span<'_>], frozen: &[Span<'_>]) -> Result<(), EngineError> {
        self.check_count("weights", params.len(), self.layout.params.len())?;
        let rank = self.group.rank();
        let Some(weights) = &mut self.weights else {
            return Err(EngineError::Usage("below stage 3 the weights are the framework's".to_owned()));
        };
        let expected = weights.frozen_layout.params.len();
        if frozen.len() != expected {
            return Err(EngineError::Count { what: "frozen weights", got: frozen.len(), expected });
        }
        let specs = self.layout.params.iter().chain(&weights.frozen_layout.params);
        for (spec, span) in specs.zip(params.iter().chain(frozen)) {
            check_length("weights", spec, span.len())?;
        }
        weights.trained.fill(&self.layout, rank, params);
        weights.frozen.fill(&weights.frozen_layout, rank, frozen);
        weights.give_back_all()?;
        Ok(self.group.barrier("the first weights")?)
    }

    /// At stage 3, after the weights were loaded into this rank's shards: the masters follow.
    ///
    /// # Errors
    /// [`EngineError`] where masters lie on a disk that fails.
    pub fn load_masters_from_shards(&mut self) -> Result<(), EngineError> {
        let Some(weights) = &mut self.weights else { return Ok(()) };
        let own = weights.trained.own_mut();
        for (shard, own) in self.shards.iter_mut().zip(&own) {
            shard.load_own_master(own.as_span());
        }
        if let Some(offloaded) = &mut self.offloaded {
            offloaded.update::<EngineError>(
                Passage::State,
                |StreamedUnit { unit, start, master, .. }| {
                    if let Some(master) = master {
                        deepspeed_kernels::cast(
                            own[unit].as_span().slice(start, master.len()),
                            master.into(),
                        );
                    }
                    Ok(())
                },
            )?;
        }
        Ok(())
    }

    /// Lets `change` rewrite the masters that lie on a disk: those of a range of elements of a unit.
    pub(crate) fn change_offloaded_masters(
        &mut self,
        mut change: impl FnMut(&Unit, Range<usize>, &mut [f32]),
    ) -> Result<(), EngineError> {
        let (layout, rank) = (Arc::clone(&self.layout), self.group.rank());
        if let Some(offloaded) = &mut self.offloaded {
            offloaded.update::<EngineError>(
                Passage::State,
                |StreamedUnit { unit, start, master, .. }| {
                    if let Some(master) = master {
                        let unit = &layout.units[unit];
                        let first = unit.shard(rank).start + start;
                        change(unit, first..first + master.len(), master);
                    }
                    Ok(())
                },
            )?;
        }
        Ok(())
    }
}
