//! Gradients on their way from torch's parameters to the engine, and back for a client that steps by itself.

use deepspeed_core::{ParamId, Span, UnitId};
use deepspeed_engine::{Engine, EngineError, Gradients};
use pyo3::{exceptions::PyValueError, intern, prelude::*, types::PyDict};

use super::PyEngine;
use crate::{enter::enter, tensors::TensorArg};

impl PyEngine {
    /// Takes the gradients of all parameters: a backward pass is over.
    pub(super) fn take_gradients(&mut self, py: Python<'_>, scaled: bool, averaged: bool) -> PyResult<()> {
        let all: Vec<usize> = (0..self.parameters.len()).collect();
        self.lend_gradients(py, &all, scaled, averaged, |engine, gradients, factor| {
            engine.end_backward(gradients, factor)
        })
    }

    /// As [`take_gradients`](Self::take_gradients), if there are any.
    pub(super) fn take_leftovers(&mut self, py: Python<'_>) -> PyResult<()> {
        let attribute = intern!(py, "grad");
        let mut any = self.engine.pass_has_begun();
        for parameter in &self.parameters {
            any |= !parameter.bind(py).getattr(attribute)?.is_none();
        }
        if any { self.take_gradients(py, false, false) } else { Ok(()) }
    }

    /// Takes the gradients of the units that are due now that `unit` may be complete; else the index of a parameter of
    /// `unit` that still lacks one.
    pub(super) fn take_complete(
        &mut self,
        py: Python<'_>,
        unit: usize,
        scaled: bool,
        averaged: bool,
    ) -> PyResult<Option<usize>> {
        if !self.engine.reduces_early() {
            return Ok(None);
        }
        let Some(members) = self.units.get(unit) else {
            return Err(PyValueError::new_err(format!("there is no unit {unit} of {}", self.units.len())));
        };
        let attribute = intern!(py, "grad");
        for index in members {
            let expected = self.engine.expects_gradient(ParamId::from_index(*index));
            if expected && self.parameters[*index].bind(py).getattr(attribute)?.is_none() {
                return Ok(Some(*index));
            }
        }
        let due = self.engine.complete_unit(UnitId::from_index(unit));
        if !due.is_empty() {
            let members: Vec<usize> =
                due.iter().flat_map(|unit| self.units[unit.index()].iter().copied()).collect();
            self.lend_gradients(py, &members, scaled, averaged, |engine, gradients, factor| {
                engine.reduce_units(&due, gradients, factor)
            })?;
        }
        Ok(None)
    }

    /// Hands the gradients of the parameters `members` to `work`, by parameter id, and lets go of them.
    fn lend_gradients(
        &mut self,
        py: Python<'_>,
        members: &[usize],
        scaled: bool,
        averaged: bool,
        work: impl FnOnce(&mut Engine, Gradients<'_, '_>, f32) -> Result<(), EngineError> + Send,
    ) -> PyResult<()> {
        if self.device.is_some() {
            return self.point_at_gradients(py, members, scaled, averaged, work);
        }
        let attribute = intern!(py, "grad");
        let mut tensors = Vec::with_capacity(members.len());
        for index in members {
            let gradient = self.parameters[*index].bind(py).getattr(attribute)?;
            if !gradient.is_none() {
                tensors.push((*index, dense(gradient, &self.names[*index])?));
            }
        }
        let factor = self.engine.missing_factor(scaled, averaged);
        let count = self.parameters.len();
        let engine = &mut self.engine;
        let arguments: Vec<(usize, TensorArg)> =
            tensors.iter().map(|(index, (_, argument))| (*index, *argument)).collect();
        enter(py, || {
            let mut spans: Vec<Option<Span<'_>>> = vec![None; count];
            for (index, tensor) in &arguments {
                // SAFETY: `tensors` holds the gradients until this call is over, and nobody writes to them: they are
                // complete, and the thread that computes gradients is the one that called.
                spans[*index] = Some(unsafe { tensor.span() });
            }
            work(engine, Gradients::Spans(&spans), factor)
        })?;
        for (index, _) in &tensors {
            self.parameters[*index].bind(py).setattr(attribute, py.None())?;
        }
        Ok(())
    }

    /// The same where gradients are on a device, which finds them on the parameters.
    fn point_at_gradients(
        &mut self,
        py: Python<'_>,
        members: &[usize],
        scaled: bool,
        averaged: bool,
        work: impl FnOnce(&mut Engine, Gradients<'_, '_>, f32) -> Result<(), EngineError> + Send,
    ) -> PyResult<()> {
        let attribute = intern!(py, "grad");
        let mut present = vec![false; self.parameters.len()];
        for index in members {
            present[*index] = !self.parameters[*index].bind(py).getattr(attribute)?.is_none();
        }
        let factor = self.engine.missing_factor(scaled, averaged);
        let engine = &mut self.engine;
        enter(py, || work(engine, Gradients::OnDevice(&present), factor))?;
        for (index, _) in present.iter().enumerate().filter(|(_, present)| **present) {
            self.parameters[index].bind(py).setattr(attribute, py.None())?;
        }
        Ok(())
    }

    /// Puts the averaged gradients where a client that steps by itself looks for them.
    pub(super) fn gradients_to_parameters(&mut self, py: Python<'_>) -> PyResult<()> {
        let torch = py.import("torch")?;
        let options = PyDict::new(py);
        options.set_item("dtype", torch.getattr("float32")?)?;
        let parameters = self.parameters.iter().map(|parameter| parameter.bind(py));
        let outputs = parameters
            .map(|parameter| torch.call_method("empty_like", (parameter,), Some(&options)))
            .collect::<PyResult<Vec<_>>>()?;
        self.whole_gradients(py, outputs.clone())?;
        for (parameter, output) in self.parameters.iter().zip(outputs) {
            let parameter = parameter.bind(py);
            let gradient = output.call_method1("to", (parameter.getattr("dtype")?,))?;
            parameter.setattr("grad", gradient)?;
        }
        Ok(())
    }
}

/// A gradient with dense, contiguous memory, and that memory.
fn dense<'py>(gradient: Bound<'py, PyAny>, name: &str) -> PyResult<(Bound<'py, PyAny>, TensorArg)> {
    let py = gradient.py();
    let gradient = if gradient.getattr(intern!(py, "is_sparse"))?.extract::<bool>()? {
        gradient.call_method0(intern!(py, "to_dense"))?
    } else {
        gradient
    };
    let gradient = gradient.call_method0(intern!(py, "contiguous"))?;
    let argument = TensorArg::read(&gradient, name)?;
    Ok((gradient, argument))
}
