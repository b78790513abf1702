//! From the gradients of a backward pass to the rank's shards of their average.
//!
//! A face either hands over everything when the pass is over ([`Engine::end_backward`]), or tells during the pass which
//! units are complete ([`Engine::complete_unit`]) and hands those over ([`Engine::reduce_units`]), so that no more than a
//! few units' gradients exist at a time; `end_backward` then takes the rest.

use std::sync::Arc;

use deepspeed_comm::{Into, Pieces};
use deepspeed_core::{AlignedBuffer, DType, Layout, ParamId, Span, Unit, UnitId};
use deepspeed_monitor::Phase;
use deepspeed_zero::{ReduceAt, reduce_unit, unit_name};

use crate::{Engine, EngineError, Source, engine::check_length};

/// The gradients of a backward pass, by parameter id.
#[derive(Clone, Copy, Debug)]
pub enum Gradients<'g, 'a> {
    /// In the host's memory.
    Spans(&'g [Option<Span<'a>>]),
    /// On the engine's device, which knows where: whether there is one.
    OnDevice(&'g [bool]),
}

impl<'g, 'a> From<&'g [Option<Span<'a>>]> for Gradients<'g, 'a> {
    fn from(spans: &'g [Option<Span<'a>>]) -> Self {
        Self::Spans(spans)
    }
}

impl<'g, 'a> From<&'g Vec<Option<Span<'a>>>> for Gradients<'g, 'a> {
    fn from(spans: &'g Vec<Option<Span<'a>>>) -> Self {
        Self::Spans(spans)
    }
}

impl Gradients<'_, '_> {
    fn len(&self) -> usize {
        match self {
            Self::Spans(spans) => spans.len(),
            Self::OnDevice(present) => present.len(),
        }
    }

    fn has(&self, param: ParamId) -> bool {
        match self {
            Self::Spans(spans) => spans[param.index()].is_some(),
            Self::OnDevice(present) => present[param.index()],
        }
    }
}

impl Engine {
    /// Whether this pass reduces units as they become complete. If not, there is nothing to tell before its end.
    pub fn reduces_early(&self) -> bool {
        self.policy.reduce == ReduceAt::MicroBatch && !self.accumulation.is_suspended()
    }

    /// Whether to wait for a gradient of `param` before its unit is complete: it had one in the last pass. One that comes
    /// after its unit was reduced is reduced at the end of the pass.
    pub fn expects_gradient(&self, param: ParamId) -> bool {
        self.delivery.expects(param)
    }

    /// All gradients of `unit` are there: the units to hand to [`Engine::reduce_units`] now, in order.
    pub fn complete_unit(&mut self, unit: UnitId) -> Vec<UnitId> {
        if self.reduces_early() { self.order.complete(unit) } else { Vec::new() }
    }

    /// Whether units of the current pass were reduced before its end.
    pub fn pass_has_begun(&self) -> bool {
        self.order.has_begun()
    }

    /// Reduces `units`, which [`Engine::complete_unit`] gave. Of `gradients` (by parameter id) only theirs are read, and
    /// their memory is free again afterwards. `factor` is as for [`Engine::end_backward`]. Collective.
    ///
    /// # Errors
    /// As [`Engine::end_backward`].
    pub fn reduce_units<'g, 'a: 'g>(
        &mut self,
        units: &[UnitId],
        gradients: impl std::convert::Into<Gradients<'g, 'a>>,
        factor: f32,
    ) -> Result<(), EngineError> {
        let gradients = gradients.into();
        self.check_gradients(gradients)?;
        self.mark(Some(Phase::Reduce));
        self.delivery.record(gradients);
        self.reduce(units, gradients, factor)?;
        self.mark(Some(Phase::Backward));
        Ok(())
    }

    /// Takes the gradients of one backward pass, by parameter id; the memory is free again afterwards. Collective.
    ///
    /// `factor` is what the loss lacks of [`loss_factor`](Self::loss_factor): 1 where it was multiplied by that, else
    /// the gradients are multiplied here, which is the same but for what fp16 has lost by then.
    ///
    /// # Errors
    /// [`EngineError::Comm`], or a gradient that does not fit its parameter.
    pub fn end_backward<'g, 'a: 'g>(
        &mut self,
        gradients: impl std::convert::Into<Gradients<'g, 'a>>,
        factor: f32,
    ) -> Result<(), EngineError> {
        let gradients = gradients.into();
        self.check_gradients(gradients)?;
        self.mark(Some(Phase::Reduce));
        self.delivery.record(gradients);
        self.delivery.end_pass();
        let boundary = self.accumulation.is_boundary();
        if self.reduces_early() {
            self.end_early_reduction(gradients, factor)?;
        } else if boundary && !self.accumulator.is_filled() {
            let units = self.order.finish();
            self.reduce(&units, gradients, factor)?;
        } else {
            self.accumulate(gradients, factor)?;
            if boundary {
                self.reduce_accumulated()?;
            }
        }
        self.mark(None);
        Ok(())
    }

    /// The units that are left, and then those which got gradients after they were reduced: of a parameter that several
    /// backward passes of one step reach (reentrant activation checkpointing of a tied weight), say.
    fn end_early_reduction(&mut self, gradients: Gradients<'_, '_>, factor: f32) -> Result<(), EngineError> {
        let layout = Arc::clone(&self.layout);
        let has_gradient = |unit: &Unit| unit.slots.iter().any(|slot| gradients.has(slot.param));
        let begun = self.order.has_begun();
        let late: Vec<u8> = layout
            .units
            .iter()
            .map(|unit| u8::from(self.order.is_handed_out(unit.id) && has_gradient(unit)))
            .collect();
        let rest = self.order.finish();
        self.reduce(&rest, gradients, factor)?;
        // A rank whose hooks never fired has nothing late, but must answer those whose hooks did.
        let mine = if begun { late } else { Vec::new() };
        let all = self.group.all_gather_bytes("units with late gradients", &mine)?;
        let units: Vec<UnitId> = layout
            .units
            .iter()
            .rev()
            .map(|unit| unit.id)
            .filter(|unit| all.iter().any(|rank| rank.get(unit.index()) == Some(&1)))
            .collect();
        if units.is_empty() {
            return Ok(());
        }
        // What this rank has just reduced with the rest must not count twice.
        let mut is_late = vec![false; gradients.len()];
        let own = units.iter().filter(|unit| mine.get(unit.index()) == Some(&1));
        for slot in own.flat_map(|unit| &layout.units[unit.index()].slots) {
            is_late[slot.param.index()] = gradients.has(slot.param);
        }
        match gradients {
            Gradients::OnDevice(_) => self.reduce(&units, Gradients::OnDevice(&is_late), factor),
            Gradients::Spans(spans) => {
                let only_late: Vec<Option<Span<'_>>> =
                    spans.iter().zip(&is_late).map(|(span, late)| span.filter(|_| *late)).collect();
                self.reduce(&units, Gradients::Spans(&only_late), factor)
            }
        }
    }

    fn check_gradients(&self, gradients: Gradients<'_, '_>) -> Result<(), EngineError> {
        self.check_count("gradients", gradients.len(), self.layout.params.len())?;
        if let Gradients::Spans(spans) = gradients {
            for (spec, gradient) in self.layout.params.iter().zip(spans) {
                if let Some(gradient) = gradient {
                    check_length("gradient", spec, gradient.len())?;
                }
            }
        }
        if matches!(gradients, Gradients::OnDevice(_)) == self.device.is_some() {
            return Ok(());
        }
        Err(EngineError::Usage("gradients are not where this engine computes".to_owned()))
    }

    /// Adds gradients to this rank's own sum.
    fn accumulate(&mut self, gradients: Gradients<'_, '_>, factor: f32) -> Result<(), EngineError> {
        match (gradients, &self.device) {
            (Gradients::OnDevice(present), Some(device)) => {
                device.accumulate(&self.layout, present, factor, !self.accumulator.is_filled())?;
                self.accumulator.mark_filled();
            }
            (Gradients::Spans(spans), _) => {
                let scaled = Scaled::new(&self.layout, None, spans, factor);
                self.accumulator.add(&self.layout, &scaled.spans(spans));
            }
            (Gradients::OnDevice(_), None) => {}
        }
        Ok(())
    }

    /// Reduces this rank's own sum.
    fn reduce_accumulated(&mut self) -> Result<(), EngineError> {
        let units = self.order.finish();
        let reduced = if self.device.is_some() {
            self.reduce_on_device(&units, Source::Accumulated)
        } else {
            let accumulator = std::mem::take(&mut self.accumulator);
            let reduced = self.reduce_pieces(&units, |layout, unit| accumulator.pieces(layout, unit.id));
            self.accumulator = accumulator;
            reduced
        };
        self.accumulator.clear();
        reduced
    }

    fn reduce(
        &mut self,
        units: &[UnitId],
        gradients: Gradients<'_, '_>,
        factor: f32,
    ) -> Result<(), EngineError> {
        match gradients {
            Gradients::OnDevice(present) => self.reduce_on_device(units, Source::Given { present, factor }),
            Gradients::Spans(gradients) => {
                let scaled = Scaled::new(&self.layout, Some(units), gradients, factor);
                let spans = scaled.spans(gradients);
                self.reduce_pieces(units, |_, unit| pieces(unit, &spans, factor != 1.0))
            }
        }
    }

    fn reduce_on_device(&mut self, units: &[UnitId], source: Source<'_>) -> Result<(), EngineError> {
        let Some(device) = &self.device else { return Ok(()) };
        for id in units {
            let unit = &self.layout.units[id.index()];
            let into = if self.reduced[id.index()] { Into::Add } else { Into::Store };
            device.reduce(unit, &unit_name(&self.layout, unit), source, &self.exchange, into)?;
            self.reduced[id.index()] = true;
        }
        Ok(())
    }

    fn reduce_pieces<'a>(
        &mut self,
        units: &[UnitId],
        pieces: impl Fn(&Layout, &Unit) -> Pieces<'a>,
    ) -> Result<(), EngineError> {
        let layout = Arc::clone(&self.layout);
        for id in units {
            let unit = &layout.units[id.index()];
            let into = if self.reduced[id.index()] { Into::Add } else { Into::Store };
            let shard = &mut self.shards[id.index()];
            let parked = self.offloaded.as_ref().filter(|offloaded| offloaded.holds(*id));
            if let (Some(offloaded), Into::Add) = (parked, into) {
                offloaded.read_gradient(*id, 0, shard.gradient.span_mut())?;
            }
            let what = unit_name(&layout, unit);
            reduce_unit(&*self.group, &what, unit, &pieces(&layout, unit), &self.exchange, shard, into)?;
            if let Some(offloaded) = parked {
                offloaded.park_gradient(*id, &mut shard.gradient)?;
            }
            self.reduced[id.index()] = true;
            // Backward is done with it.
            self.give_back_unit(id.index())?;
        }
        Ok(())
    }
}

/// fp32 copies of gradients, multiplied by what their loss lacked; none where it lacked nothing.
struct Scaled(Vec<Option<AlignedBuffer>>);

impl Scaled {
    /// Copies the gradients of `units` (of all, with `None`).
    fn new(layout: &Layout, units: Option<&[UnitId]>, gradients: &[Option<Span<'_>>], factor: f32) -> Self {
        if factor == 1.0 {
            return Self(Vec::new());
        }
        let mut copies: Vec<Option<AlignedBuffer>> = gradients.iter().map(|_| None).collect();
        let chosen = |unit: &&Unit| units.is_none_or(|units| units.contains(&unit.id));
        for slot in layout.units.iter().filter(chosen).flat_map(|unit| &unit.slots) {
            let index = slot.param.index();
            copies[index] = gradients[index].map(|span| {
                let mut copy = AlignedBuffer::zeroed(span.len(), DType::F32);
                deepspeed_kernels::cast(span, copy.span_mut());
                deepspeed_kernels::scale_in_place(copy.as_f32_mut(), factor);
                copy
            });
        }
        Self(copies)
    }

    /// The copies, or the originals where there are none.
    fn spans<'a>(&'a self, originals: &[Option<Span<'a>>]) -> Vec<Option<Span<'a>>> {
        if self.0.is_empty() {
            return originals.to_vec();
        }
        self.0.iter().map(|copy| copy.as_ref().map(AlignedBuffer::span)).collect()
    }
}

/// The gradients of `unit` where the framework left them. Where there is none, an empty run still says in which dtype
/// they would have been, so that ranks agree on it.
fn pieces<'a>(unit: &Unit, gradients: &[Option<Span<'a>>], in_fp32: bool) -> Pieces<'a> {
    let given =
        unit.slots.iter().filter_map(|slot| gradients[slot.param.index()].map(|span| (slot.offset, span)));
    let mut runs: Vec<_> = given.collect();
    if runs.is_empty() {
        runs.push((0, empty(if in_fp32 { DType::F32 } else { unit.dtype })));
    }
    Pieces { len: unit.len(), runs }
}

/// No elements of `dtype`.
fn empty(dtype: DType) -> Span<'static> {
    match dtype {
        DType::F32 => Span::from(&[] as &[f32]),
        DType::F16 => Span::from(&[] as &[half::f16]),
        DType::BF16 => Span::from(&[] as &[half::bf16]),
    }
}
