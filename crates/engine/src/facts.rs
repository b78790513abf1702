//! What the engine tells about itself, and the few settings that may change while it runs.

use std::sync::Arc;

use deepspeed_comm::{Group, Region};
use deepspeed_core::{AlignedBuffer, DType, Layout, SpanMut, Unit};
use deepspeed_monitor::{Counters, metrics::StepMetrics};
use deepspeed_optim::LossScaler;
use deepspeed_zero::{OffloadedState, Residency, UnitShard};

use crate::{
    Accumulation, Device, Engine, EngineError, Settings,
    sharded_weights::{ShardedWeights, Shards, give_back},
};

/// Where each parameter lies in the framework's view of the shared weights; no address for one without elements.
#[derive(Clone, Debug)]
pub struct SharedAddresses {
    /// Of the trained parameters, by parameter id.
    pub trained: Vec<Option<usize>>,
    /// Of the others, in the order in which they were given.
    pub frozen: Vec<Option<usize>>,
    /// The memory behind the addresses, which live as long as it.
    pub regions: [Arc<Region>; 2],
}

/// Facts about the engine.
impl Engine {
    /// The settings it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The layout of its parameters.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Its process group.
    pub fn group(&self) -> &Arc<dyn Group> {
        &self.group
    }

    /// Its counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The loss scaler.
    pub fn scaler(&self) -> &LossScaler {
        &self.scaler
    }

    /// The loss scaler, to override its scale.
    pub fn scaler_mut(&mut self) -> &mut LossScaler {
        &mut self.scaler
    }

    /// Boundaries: counted, forced or suspended.
    pub fn accumulation_mut(&mut self) -> &mut Accumulation {
        &mut self.accumulation
    }

    /// Boundaries, read-only.
    pub fn accumulation(&self) -> &Accumulation {
        &self.accumulation
    }

    /// Changes the samples per update by changing the accumulation steps.
    ///
    /// # Errors
    /// [`EngineError::Usage`] where they are not a multiple of what one micro-batch of all ranks holds.
    pub fn set_train_batch_size(&mut self, train_batch_size: u64) -> Result<(), EngineError> {
        let micro = self.settings.micro_batch_size;
        let world = self.group.world() as u64;
        if train_batch_size == 0 || !train_batch_size.is_multiple_of(micro * world) {
            return Err(EngineError::Usage(format!(
                "a train_batch_size of {train_batch_size} is not a multiple of {} = {micro} samples per micro-batch x \
                 {world} ranks",
                micro * world
            )));
        }
        self.settings.train_batch_size = train_batch_size;
        self.settings.accumulation_steps = train_batch_size / (micro * world);
        self.accumulation.set_steps(self.settings.accumulation_steps);
        Ok(())
    }

    /// Changes the samples per rank and micro-batch; the accumulation steps stay and the samples per update follow.
    ///
    /// # Errors
    /// [`EngineError::Usage`] for 0.
    pub fn set_micro_batch_size(&mut self, micro_batch_size: u64) -> Result<(), EngineError> {
        if micro_batch_size == 0 {
            return Err(EngineError::Usage("a micro-batch holds at least 1 sample, got 0".to_owned()));
        }
        self.settings.micro_batch_size = micro_batch_size;
        self.settings.train_batch_size =
            micro_batch_size * self.settings.accumulation_steps * self.group.world() as u64;
        Ok(())
    }

    /// What the engine is, in one line for the start of a run.
    pub fn summary(&self) -> String {
        let settings = &self.settings;
        format!(
            "{:.2} M parameters in {} units, {}, ZeRO stage {}, {} rank(s) over {}, batch {} = {} x {} micro-batches x \
             {} ranks, {:.1} MiB of {}gradients, masters and optimizer state per rank",
            self.layout.numel() as f64 / 1e6,
            self.layout.units.len(),
            settings.precision,
            settings.stage.number(),
            self.group.world(),
            self.group.transport(),
            settings.train_batch_size,
            settings.micro_batch_size,
            settings.accumulation_steps,
            self.group.world(),
            self.resident_bytes() as f64 / f64::from(1 << 20),
            if self.weights.is_some() { "weights, " } else { "" },
        ) + &self.device.as_ref().map_or_else(String::new, |device| format!(", on {}", device.name()))
    }

    /// Where state lies that is on a disk, and how it moves, in one line.
    pub fn offload_summary(&self) -> Option<String> {
        self.offloaded.as_ref().map(|state| format!("masters and optimizer state: {}", state.describe()))
    }

    /// The last boundary's global L2 norm of averaged, unscaled gradients before clipping; infinite where the step
    /// was skipped; `None` before the first.
    pub fn norm(&self) -> Option<f64> {
        self.norm
    }

    /// What is known of the last boundary, for monitors. Times are there once per step line, where `wall_clock_breakdown`
    /// asks for them.
    pub fn step_metrics(&mut self, learning_rate: f64, loss: Option<f64>) -> StepMetrics {
        StepMetrics {
            samples: self.counters.global_samples,
            loss,
            learning_rate,
            loss_scale: (self.settings.precision == DType::F16).then(|| self.scaler.scale()),
            norm: self.norm,
            times: self.told.take().filter(|_| self.settings.wall_clock_breakdown),
        }
    }

    /// Whether the last boundary updated the weights.
    pub fn was_applied(&self) -> bool {
        self.applied
    }

    /// Whether a client's optimizer works on whole parameters rather than shards.
    pub fn client_sees_whole(&self) -> bool {
        self.policy.state == Residency::Whole
    }

    /// The units of weights in a file that do not stay in memory between uses, trained ones first, each with its last
    /// parameter: when that was used, the unit can be given back. Frozen parameters are numbered after the trained ones.
    pub fn units_given_back(&self) -> Vec<(usize, usize)> {
        let Some(weights) = &self.weights else { return Vec::new() };
        let trained = self.layout.units.iter().map(|unit| (0, unit));
        let frozen = weights.frozen_layout.units.iter().map(|unit| (self.layout.params.len(), unit));
        let last = |(first, unit): (usize, &Unit)| Some(first + unit.slots.last()?.param.index());
        let units = trained.chain(frozen).enumerate().zip(&weights.pages);
        let leaving = units.filter(|(_, pages)| pages.is_some());
        leaving.filter_map(|((number, unit), _)| Some((number, last(unit)?))).collect()
    }

    /// Gives the memory of a unit that [`Engine::units_given_back`] names back to the system until it is used again; of
    /// another unit, nothing.
    ///
    /// # Errors
    /// [`EngineError::Comm`] where the system refuses.
    pub fn give_back_unit(&self, unit: usize) -> Result<(), EngineError> {
        Ok(self.weights.as_ref().map_or(Ok(()), |weights| give_back(&weights.pages, unit))?)
    }

    /// The same of all such units.
    ///
    /// # Errors
    /// As [`Engine::give_back_unit`].
    pub fn give_back_units(&self) -> Result<(), EngineError> {
        Ok(self.weights.as_ref().map_or(Ok(()), ShardedWeights::give_back_all)?)
    }

    /// For a client's optimizer on shards, per unit: gradient and master of this rank's shard, without elements where a device
    /// has them; no master where the framework's weights are the masters.
    pub fn shard_memory(&mut self) -> Vec<(SpanMut<'_>, Option<SpanMut<'_>>)> {
        let own = self.weights.as_mut().map(|weights| weights.trained.own_mut()).unwrap_or_default();
        let mut own = own.into_iter();
        self.shards
            .iter_mut()
            .map(|shard| {
                let in_place = own.next();
                let master = shard.master.as_mut().map(|master| master.span_mut()).or(in_place);
                (shard.gradient.span_mut(), master)
            })
            .collect()
    }

    /// At stage 3, where all ranks of the host share the weights: where they are.
    pub fn shared_weights(&self) -> Option<SharedAddresses> {
        let weights = self.weights.as_ref()?;
        let addresses = |layout: &Layout, shards: &Shards| {
            let mut addresses = vec![None; layout.params.len()];
            let units = shards.shared()?;
            for unit in &layout.units {
                let start = units.address(unit);
                for slot in &unit.slots {
                    addresses[slot.param.index()] = Some(start + slot.offset * unit.dtype.size());
                }
            }
            Some((addresses, Arc::clone(units.region())))
        };
        let (trained, region) = addresses(&self.layout, &weights.trained)?;
        let (frozen, frozen_region) = addresses(&weights.frozen_layout, &weights.frozen)?;
        Some(SharedAddresses { trained, frozen, regions: [region, frozen_region] })
    }

    /// The layout of the parameters that are not trained, where the stage shards them.
    pub fn frozen_layout(&self) -> Option<&Layout> {
        self.weights.as_ref().map(|weights| &weights.frozen_layout)
    }

    /// State tensors of the optimizer.
    pub fn state_tensors(&self) -> usize {
        self.states
    }

    /// Whether the engine, not the framework, keeps the weights: stage 3, and wherever there is a device.
    pub fn keeps_weights(&self) -> bool {
        self.weights.is_some()
    }

    /// Whether parameters are whole at all times: below stage 3.
    pub fn weights_are_whole(&self) -> bool {
        self.policy.weights == Residency::Whole
    }

    /// What computes, where that is not the host.
    pub fn device(&self) -> Option<&Arc<dyn Device>> {
        self.device.as_ref()
    }

    /// Whether masters and optimizer state, or some of them, lie on the device.
    pub fn state_on_device(&self) -> bool {
        self.host_units < self.layout.units.len()
    }

    /// Whether masters and optimizer state, or some of them, lie on the host.
    pub fn state_on_host(&self) -> bool {
        self.host_units > 0
    }

    /// Whether the device, if there is one, has masters and optimizer state of the unit of this number.
    pub fn is_on_device(&self, unit: usize) -> bool {
        (self.host_units..self.layout.units.len()).contains(&unit)
    }

    /// Whether the device has fp32 masters of fp32 weights, too: these lie on the host.
    pub(crate) fn has_masters_apart(&self) -> bool {
        self.device.is_some() && self.settings.weights_on_host
    }

    /// For each unit, its parameters.
    pub fn unit_params(&self) -> Vec<Vec<usize>> {
        let params = |unit: &Unit| unit.slots.iter().map(|slot| slot.param.index()).collect();
        self.layout.units.iter().map(params).collect()
    }

    /// Bytes of memory this rank keeps between steps: gradient shards, masters, optimizer state, what streams them where they
    /// lie on a disk, and at stage 3 its shards of the weights, which below it are the framework's.
    pub fn resident_bytes(&self) -> usize {
        let weights = self.weights.as_ref().map_or(0, |weights| {
            weights.trained.bytes(&self.layout) + weights.frozen.bytes(&weights.frozen_layout)
        });
        let masters = |unit: &Unit| usize::from(unit.dtype != DType::F32 || self.has_masters_apart());
        let numel = |(unit, buffers): (&Unit, &UnitShard)| {
            if self.is_on_device(unit.id.index()) {
                return unit.shard_len * (1 + masters(unit) + self.states);
            }
            let parked = self.offloaded.as_ref().is_some_and(|offloaded| offloaded.holds(unit.id));
            let gradient = if parked { 0 } else { buffers.gradient.len() };
            let state: usize = buffers.state.iter().map(AlignedBuffer::len).sum();
            gradient + buffers.master.as_ref().map_or(0, AlignedBuffer::len) + state
        };
        let buffers = self.offloaded.as_ref().map_or(0, OffloadedState::buffer_bytes);
        self.layout.units.iter().zip(&self.shards).map(numel).sum::<usize>() * DType::F32.size()
            + weights
            + buffers
    }
}
