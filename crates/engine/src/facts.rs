//! What the engine tells about itself, and the few settings that may change while it runs.

use std::sync::Arc;

use deepspeed_comm::Group;
use deepspeed_core::{AlignedBuffer, DType, Layout, SpanMut};
use deepspeed_monitor::Counters;
use deepspeed_optim::LossScaler;
use deepspeed_zero::{Residency, UnitShard};

use crate::{Accumulation, Engine, EngineError, Settings};

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
             {} ranks, {:.1} MiB of gradients, masters and optimizer state per rank",
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
        )
    }

    /// The last boundary's global L2 norm of averaged, unscaled gradients before clipping; infinite where the step
    /// was skipped; `None` before the first.
    pub fn norm(&self) -> Option<f64> {
        self.norm
    }

    /// Whether the last boundary updated the weights.
    pub fn was_applied(&self) -> bool {
        self.applied
    }

    /// Whether a client's optimizer works on whole parameters rather than shards.
    pub fn client_sees_whole(&self) -> bool {
        self.policy.state == Residency::Whole
    }

    /// For a client's optimizer on shards, per unit: the addresses of gradient and master (`None` where the weights
    /// are the masters) and the elements of a shard.
    pub fn shard_memory(&mut self) -> Vec<(SpanMut<'_>, Option<SpanMut<'_>>)> {
        self.shards
            .iter_mut()
            .map(|shard| (shard.gradient.span_mut(), shard.master.as_mut().map(|master| master.span_mut())))
            .collect()
    }

    /// Bytes this rank keeps between steps beside the model's weights: gradient shards, masters, optimizer state.
    pub fn resident_bytes(&self) -> usize {
        let numel = |buffers: &UnitShard| {
            let state: usize = buffers.state.iter().map(AlignedBuffer::len).sum();
            buffers.gradient.len() + buffers.master.as_ref().map_or(0, AlignedBuffer::len) + state
        };
        self.shards.iter().map(numel).sum::<usize>() * DType::F32.size()
    }
}
