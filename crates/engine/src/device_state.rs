//! What lies on a device, brought to the host's memory and back: for checkpoints, for programs that look at single
//! parameters, and for updates on the host.

use std::sync::Arc;

use deepspeed_core::{AlignedBuffer, DType, Span, SpanMut, Unit};
use deepspeed_zero::UnitShard;

use crate::{Device, DevicePlan, Engine, EngineError, Part, ShardHome};

/// Whether what was done in the host's memory goes back to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It was only read.
    Forget,
    /// It was written: weights are published, too.
    WriteBack,
}

impl Engine {
    /// Takes the device's memory, before anything else is asked of it.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn lay_out_device(&self) -> Result<(), EngineError> {
        let (Some(device), Some(weights)) = (&self.device, &self.weights) else { return Ok(()) };
        Ok(device.lay_out(&DevicePlan {
            trained: &self.layout,
            frozen: &weights.frozen_layout,
            rank: self.group.rank(),
            states: self.states,
            host_units: self.host_units,
            whole_weights: self.weights_are_whole(),
            weights: match (weights.trained.on_disk(), weights.frozen.on_disk()) {
                (Some(trained), Some(frozen)) => ShardHome::Files([trained, frozen]),
                _ if self.settings.weights_on_host => ShardHome::Host,
                _ => ShardHome::Device,
            },
        })?)
    }

    /// Lets `work` see the state of the units of these numbers (of all, with `None`) in the host's memory, where it is
    /// without a device. Collective with [`Afterwards::WriteBack`].
    ///
    /// # Errors
    /// [`EngineError::Device`], and what `work` says.
    pub fn on_host<T>(
        &mut self,
        units: Option<&[usize]>,
        afterwards: Afterwards,
        work: impl FnOnce(&mut Self) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let Some(device) = self.device.clone() else { return work(self) };
        let chosen = |number: usize| units.is_none_or(|units| units.contains(&number));
        let done =
            self.fetch(&*device, chosen).and_then(|()| work(self)).and_then(|value| match afterwards {
                Afterwards::Forget => Ok(value),
                Afterwards::WriteBack => self.store(&*device, chosen).map(|()| value),
            });
        self.leave_host();
        let value = done?;
        if afterwards == Afterwards::WriteBack {
            device.publish()?;
        }
        self.give_back_units()?;
        Ok(value)
    }

    /// The number of the unit that holds parameter number `param`, if it has elements.
    pub fn unit_number(&self, param: usize) -> Option<usize> {
        let holds = |unit: &Unit, param: usize| unit.slots.iter().any(|slot| slot.param.index() == param);
        match param.checked_sub(self.layout.params.len()) {
            None => self.layout.units.iter().position(|unit| holds(unit, param)),
            Some(param) => {
                let frozen = &self.weights.as_ref()?.frozen_layout;
                let found = frozen.units.iter().position(|unit| holds(unit, param))?;
                Some(self.layout.units.len() + found)
            }
        }
    }

    fn fetch(&mut self, device: &dyn Device, chosen: impl Fn(usize) -> bool) -> Result<(), EngineError> {
        let layout = Arc::clone(&self.layout);
        for (number, unit) in layout.units.iter().enumerate().filter(|(number, _)| chosen(*number)) {
            let on_device = self.is_on_device(number);
            let shard = &mut self.shards[number];
            if on_device {
                let square_sum = shard.square_sum;
                *shard = UnitShard { square_sum, ..UnitShard::new(unit, self.states) };
                if let Some(master) = &mut shard.master {
                    device.read(number, Part::Master, master.span_mut())?;
                }
                for (index, state) in shard.state.iter_mut().enumerate() {
                    device.read(number, Part::State(index), state.span_mut())?;
                }
            }
            if self.reduced[number] {
                device.read(number, Part::Gradient, shard.gradient.span_mut())?;
            }
        }
        self.each_weight(chosen, |number, unit, buffer| {
            if buffer.is_empty() {
                *buffer = AlignedBuffer::zeroed(unit.shard_len, unit.dtype);
            }
            device.read(number, Part::Weight, buffer.span_mut())
        })
    }

    fn store(&mut self, device: &dyn Device, chosen: impl Fn(usize) -> bool) -> Result<(), EngineError> {
        for (number, shard) in self.shards.iter().enumerate().filter(|(number, _)| chosen(*number)) {
            if self.is_on_device(number) {
                match (&shard.master, &self.weights) {
                    (Some(master), _) => device.write(number, Part::Master, master.span())?,
                    (None, Some(weights)) if self.has_masters_apart() => {
                        device.write(
                            number,
                            Part::Master,
                            weights.trained.own(&self.layout.units[number]),
                        )?;
                    }
                    (None, _) => {}
                }
                for (index, state) in shard.state.iter().enumerate() {
                    device.write(number, Part::State(index), state.span())?;
                }
            }
            if self.reduced[number] {
                device.write(number, Part::Gradient, shard.gradient.span())?;
            }
        }
        self.each_weight(chosen, |number, _, buffer| device.write(number, Part::Weight, buffer.span()))
    }

    /// Lets go of what is here only for a while.
    pub(crate) fn leave_host(&mut self) {
        if self.device.is_none() {
            return;
        }
        let kept = self.host_units;
        for shard in &mut self.shards[kept..] {
            let square_sum = shard.square_sum;
            *shard = UnitShard { square_sum, ..UnitShard::elsewhere() };
        }
        let gone = self.each_weight(
            |number| number >= kept,
            |_, unit, buffer| {
                *buffer = AlignedBuffer::zeroed(0, unit.dtype);
                Ok::<_, crate::DeviceError>(())
            },
        );
        gone.expect("invariant: freeing memory does not fail");
    }

    /// The buffers of the weights, with the unit's number.
    fn each_weight(
        &mut self,
        chosen: impl Fn(usize) -> bool,
        mut work: impl FnMut(usize, &Unit, &mut AlignedBuffer) -> Result<(), crate::DeviceError>,
    ) -> Result<(), EngineError> {
        let Some(weights) = &mut self.weights else { return Ok(()) };
        let trained = self.layout.units.len();
        let frozen_layout = &weights.frozen_layout;
        for (layout, shards, first) in
            [(&*self.layout, &mut weights.trained, 0), (frozen_layout, &mut weights.frozen, trained)]
        {
            for (index, unit) in layout.units.iter().enumerate() {
                if chosen(first + index)
                    && let Some(buffer) = shards.buffer_mut(unit)
                {
                    work(first + index, unit, buffer)?;
                }
            }
        }
        Ok(())
    }

    /// Brings the gradients of shards with an element that is not finite here, for whoever looks for it.
    pub(crate) fn fetch_non_finite(&mut self) -> Result<(), EngineError> {
        let Some(device) = &self.device else { return Ok(()) };
        for (number, unit) in self.layout.units.iter().enumerate() {
            let shard = &mut self.shards[number];
            if !shard.square_sum.is_finite() {
                if shard.gradient.is_empty() {
                    shard.gradient = AlignedBuffer::zeroed(unit.shard_len, DType::F32);
                }
                device.read(number, Part::Gradient, shard.gradient.span_mut())?;
            }
        }
        Ok(())
    }

    /// Brings the gradients here whose masters are updated here.
    pub(crate) fn fetch_gradients(&mut self) -> Result<(), EngineError> {
        let Some(device) = &self.device else { return Ok(()) };
        for (unit, shard) in self.layout.units.iter().zip(&mut self.shards[..self.host_units]) {
            device.read(unit.id.index(), Part::Gradient, shard.gradient.span_mut())?;
            if let Some(offloaded) = self.offloaded.as_ref().filter(|offloaded| offloaded.holds(unit.id)) {
                offloaded.park_gradient(unit.id, &mut shard.gradient)?;
            }
        }
        Ok(())
    }

    /// This rank's shards of the weights that were updated here go to the device, and from there, with those that it has
    /// updated itself, to all ranks.
    pub(crate) fn weights_to_device(&mut self) -> Result<(), EngineError> {
        let Some(device) = self.device.clone() else { return Ok(()) };
        let updated = self.host_units;
        self.each_weight(
            |number| number < updated,
            |number, _, buffer| device.write(number, Part::Weight, buffer.span()),
        )?;
        device.publish()?;
        self.give_back_units()
    }

    /// The weights that lie on the device become the masters. Collective.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn masters_from_device(&mut self) -> Result<(), EngineError> {
        self.on_host(None, Afterwards::WriteBack, Self::load_masters_from_shards)
    }

    /// One of a device's tensors of this rank's shard of `unit`, cast to fp32.
    pub(crate) fn read_device(&self, unit: &Unit, part: Part) -> Result<Vec<f32>, EngineError> {
        let Some(device) = &self.device else { return Ok(Vec::new()) };
        let dtype = if part == Part::Weight { unit.dtype } else { DType::F32 };
        let mut buffer = AlignedBuffer::zeroed(unit.shard_len, dtype);
        device.read(unit.id.index(), part, buffer.span_mut())?;
        let mut values = vec![0.0f32; unit.shard_len];
        deepspeed_kernels::cast(buffer.span(), SpanMut::from(&mut values[..]));
        Ok(values)
    }

    /// Sets a part of one of a device's fp32 tensors of this rank's shard of `unit`.
    pub(crate) fn write_device(
        &self,
        unit: &Unit,
        part: Part,
        start: usize,
        values: &[f32],
    ) -> Result<(), EngineError> {
        let Some(device) = &self.device else { return Ok(()) };
        let mut whole = self.read_device(unit, part)?;
        whole[start..start + values.len()].copy_from_slice(values);
        let mut buffer =
            AlignedBuffer::zeroed(unit.shard_len, if part == Part::Weight { unit.dtype } else { DType::F32 });
        deepspeed_kernels::cast(Span::from(&whole[..]), buffer.span_mut());
        Ok(device.write(unit.id.index(), part, buffer.span())?)
    }
}
