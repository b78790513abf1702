//! Looking at, and changing, the fp32 state of one parameter: what training scripts do to debug or to surgically edit.

use std::sync::Arc;

use deepspeed_core::{DType, Fragment, Layout, ParamId, Rank, Span, SpanMut, Unit};
use deepspeed_zero::OffloadedState;

use crate::{Engine, EngineError, Part};

/// A piece of a parameter's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateKind {
    /// The fp32 master weights.
    Master,
    /// The averaged gradient of the current accumulation, unscaled.
    Gradient,
    /// State tensor number `n` of the optimizer.
    Optimizer(usize),
}

impl Engine {
    fn locate(&self, param: ParamId) -> Option<(&Unit, Option<Fragment>)> {
        locate(&self.layout, self.group.rank(), param)
    }

    /// Whether the unit has masters apart from its weights.
    fn has_master(&self, unit: &Unit) -> bool {
        self.shards[unit.id.index()].master.is_some()
            || (self.is_on_device(unit.id.index()) && (unit.dtype != DType::F32 || self.has_masters_apart()))
            || self.offloaded.as_ref().is_some_and(|offloaded| offloaded.has_master(unit.id))
    }

    /// The elements of `param` whose state this rank keeps: first, and how many.
    pub fn own_range(&self, param: ParamId) -> (usize, usize) {
        let fragment = self.locate(param).and_then(|(_, fragment)| fragment);
        fragment.map_or((0, 0), |fragment| (fragment.param_offset, fragment.len))
    }

    /// Whether there is such state: masters apart from the weights, gradients between backward and step.
    pub fn has_state(&self, kind: &StateKind) -> bool {
        match kind {
            StateKind::Master => self.layout.units.iter().any(|unit| self.has_master(unit)),
            StateKind::Gradient => self.reduced.iter().any(|reduced| *reduced),
            StateKind::Optimizer(index) => *index < self.states,
        }
    }

    /// This rank's part of `kind` of `param`: the elements of [`Engine::own_range`]. Masters of fp32 weights are the
    /// weights, which are not here below stage 3.
    ///
    /// # Errors
    /// [`EngineError::Usage`] where there is no such state.
    pub fn own_state(&self, param: ParamId, kind: &StateKind) -> Result<Vec<f32>, EngineError> {
        let Some((unit, Some(fragment))) = self.locate(param) else { return Ok(Vec::new()) };
        let shard = &self.shards[unit.id.index()];
        let start = fragment.unit_offset - unit.shard(self.group.rank()).start;
        let range = start..start + fragment.len;
        if let Some(part) = self.part_on_device(unit, kind) {
            let scale = if part == Part::Gradient { self.scaler.scale() as f32 } else { 1.0 };
            return Ok(self.read_device(unit, part)?[range].iter().map(|element| element / scale).collect());
        }
        let offloaded = self.offloaded.as_ref().filter(|offloaded| offloaded.holds(unit.id));
        let read = |offloaded: &OffloadedState, state| {
            let mut values = vec![0.0f32; fragment.len];
            offloaded.read(unit.id, state, start, SpanMut::from(&mut values[..]))?;
            Ok(values)
        };
        match (kind, offloaded) {
            (StateKind::Optimizer(index), Some(offloaded)) if *index < self.states => {
                return read(offloaded, Some(*index));
            }
            (StateKind::Master, Some(offloaded)) if offloaded.has_master(unit.id) => {
                return read(offloaded, None);
            }
            _ => {}
        }
        match kind {
            StateKind::Gradient => {
                let mut values = vec![0.0f32; fragment.len];
                match offloaded {
                    Some(_) if !self.reduced[unit.id.index()] => {}
                    Some(offloaded) => {
                        offloaded.read_gradient(unit.id, start, SpanMut::from(&mut values[..]))?;
                    }
                    None => values.copy_from_slice(&shard.gradient.as_f32()[range]),
                }
                let scale = self.scaler.scale() as f32;
                values.iter_mut().for_each(|element| *element /= scale);
                Ok(values)
            }
            StateKind::Optimizer(index) if *index < shard.state.len() => {
                Ok(shard.state[*index].as_f32()[range].to_vec())
            }
            StateKind::Optimizer(_) => Err(self.no_state(param, kind)),
            StateKind::Master => match (&shard.master, &self.weights) {
                (Some(master), _) => Ok(master.as_f32()[range].to_vec()),
                (None, Some(weights)) => {
                    let own = weights.trained.own(unit).slice(start, fragment.len);
                    own.as_f32().map(<[f32]>::to_vec).ok_or_else(|| self.no_state(param, kind))
                }
                (None, None) => Err(self.no_state(param, kind)),
            },
        }
    }

    /// The whole of `kind` of `param`, in fp32. Collective.
    ///
    /// # Errors
    /// As [`Engine::own_state`], and [`EngineError::Comm`].
    pub fn whole_state(&self, param: ParamId, kind: &StateKind) -> Result<Vec<f32>, EngineError> {
        let mine = self.own_state(param, kind)?;
        let bytes = Span::from(&mine[..]).as_bytes();
        let what = format!("{kind:?} of {}", self.layout.param(param).name);
        // Shards are cut in rank order, so the parts of a parameter come in order.
        let parts = self.group.all_gather_bytes(&what, bytes)?;
        Ok(parts
            .iter()
            .flat_map(|part| part.as_chunks::<4>().0)
            .map(|word| f32::from_le_bytes(*word))
            .collect())
    }

    /// Sets this rank's part of `kind` of `param` from its `values`: those of [`Engine::own_range`]. At stage 3 the weights
    /// follow their masters; below it they are the framework's to set.
    ///
    /// # Errors
    /// As [`Engine::own_state`]; [`EngineError::Length`].
    pub fn set_own_state(
        &mut self,
        param: ParamId,
        kind: &StateKind,
        values: &[f32],
    ) -> Result<(), EngineError> {
        let (_, expected) = self.own_range(param);
        if values.len() != expected {
            let (what, name) = ("part of the state", self.layout.param(param).name.clone());
            return Err(EngineError::Length { what, name, got: values.len(), expected });
        }
        let missing = self.no_state(param, kind);
        let rank = self.group.rank();
        let layout = Arc::clone(&self.layout);
        let Some((unit, Some(fragment))) = locate(&layout, rank, param) else { return Ok(()) };
        let (id, start) = (unit.id.index(), fragment.unit_offset - unit.shard(rank).start);
        let range = start..start + fragment.len;
        if let Some(part) = self.part_on_device(unit, kind) {
            return self.set_on_device(unit, part, start, values);
        }
        let offloaded = self.offloaded.as_ref().filter(|offloaded| offloaded.holds(unit.id));
        let shard = &mut self.shards[id];
        match kind {
            StateKind::Gradient => {
                let scale = self.scaler.scale() as f32;
                if let Some(offloaded) = offloaded {
                    offloaded.read_gradient(unit.id, 0, shard.gradient.span_mut())?;
                }
                for (target, value) in shard.gradient.as_f32_mut()[range].iter_mut().zip(values) {
                    *target = value * scale;
                }
                shard.square_sum = deepspeed_kernels::sum_squares(shard.gradient.span());
                if let Some(offloaded) = offloaded {
                    offloaded.park_gradient(unit.id, &mut shard.gradient)?;
                }
            }
            StateKind::Optimizer(index) => match &offloaded {
                Some(offloaded) if *index < self.states => {
                    offloaded.write(unit.id, Some(*index), start, Span::from(values))?;
                }
                _ => {
                    let state = shard.state.get_mut(*index).ok_or(missing)?;
                    state.as_f32_mut()[range].copy_from_slice(values);
                }
            },
            StateKind::Master => {
                let on_disk = offloaded.filter(|offloaded| offloaded.has_master(unit.id));
                if shard.master.is_none() && self.weights.is_none() && on_disk.is_none() {
                    return Err(missing);
                }
                if let Some(offloaded) = on_disk {
                    offloaded.write(unit.id, None, start, Span::from(values))?;
                }
                if let Some(master) = &mut shard.master {
                    master.as_f32_mut()[range.clone()].copy_from_slice(values);
                }
                if let Some(weights) = &mut self.weights {
                    let mut own: Vec<SpanMut<'_>> = weights.trained.own_mut();
                    deepspeed_kernels::cast(Span::from(values), own[id].slice_mut(start, values.len()));
                }
                return self.write_device(unit, Part::Weight, start, values);
            }
        }
        Ok(())
    }

    /// Which of the device's tensors holds `kind`, if one does.
    fn part_on_device(&self, unit: &Unit, kind: &StateKind) -> Option<Part> {
        self.device.as_ref()?;
        match kind {
            StateKind::Gradient => Some(Part::Gradient),
            StateKind::Optimizer(index) if *index < self.states => Some(Part::State(*index)),
            StateKind::Optimizer(_) => None,
            StateKind::Master if unit.dtype == DType::F32 && !self.has_masters_apart() => Some(Part::Weight),
            StateKind::Master => Some(Part::Master),
        }
        .filter(|part| *part == Part::Gradient || self.is_on_device(unit.id.index()))
    }

    fn set_on_device(
        &mut self,
        unit: &Unit,
        part: Part,
        start: usize,
        values: &[f32],
    ) -> Result<(), EngineError> {
        if part == Part::Gradient {
            let scale = self.scaler.scale() as f32;
            let scaled: Vec<f32> = values.iter().map(|value| value * scale).collect();
            return self.write_device(unit, part, start, &scaled);
        }
        self.write_device(unit, part, start, values)?;
        if part == Part::Master {
            self.write_device(unit, Part::Weight, start, values)?;
        }
        Ok(())
    }

    fn no_state(&self, param: ParamId, kind: &StateKind) -> EngineError {
        EngineError::Usage(format!("the engine keeps no {kind:?} of `{}`", self.layout.param(param).name))
    }
}

/// The unit that holds `param`, and the part of it in `rank`'s shard; `None` for a parameter without elements.
fn locate(layout: &Layout, rank: Rank, param: ParamId) -> Option<(&Unit, Option<Fragment>)> {
    let unit = layout.units.iter().find(|unit| unit.slots.iter().any(|slot| slot.param == param))?;
    Some((unit, unit.fragments(unit.shard(rank)).find(|fragment| fragment.param == param)))
}
