//! Weights and masters: torch's parameters as memory, and masters that follow them.

use deepspeed_core::{ParamId, Span};
use deepspeed_engine::Afterwards;
use pyo3::{intern, prelude::*};

use super::PyEngine;
use crate::{enter::enter, gathering::is_released, tensors::TensorArg};

impl PyEngine {
    /// The parameters' memory, read afresh: a client may have replaced it. None where the engine keeps the weights.
    pub(crate) fn weights(&self, py: Python<'_>) -> PyResult<Vec<TensorArg>> {
        if self.engine.keeps_weights() { Ok(Vec::new()) } else { self.whole_weights(py) }
    }

    /// The parameters' memory, whoever keeps it.
    pub(super) fn whole_weights(&self, py: Python<'_>) -> PyResult<Vec<TensorArg>> {
        let parameters = self.parameters.iter().zip(&self.names);
        parameters.map(|(parameter, name)| TensorArg::read(parameter.bind(py), name)).collect()
    }

    /// Makes the model's weights, as they are now, the fp32 masters; or `masters`, one tensor per parameter.
    pub(super) fn set_masters(
        &mut self,
        py: Python<'_>,
        masters: Option<Vec<Bound<'_, PyAny>>>,
    ) -> PyResult<()> {
        if self.device.is_some() {
            let engine = &mut self.engine;
            let Some(masters) = masters else { return enter(py, || engine.masters_from_device()) };
            let copies = masters.iter().map(|it| on_host(it, true)).collect::<PyResult<Vec<_>>>()?;
            let values = read_all(&copies, &self.names)?;
            return enter(py, || {
                // SAFETY: `copies` holds the tensors during this call.
                let spans: Vec<Span<'_>> = values.iter().map(|tensor| unsafe { tensor.span() }).collect();
                engine.on_host(None, Afterwards::WriteBack, |engine| engine.load_masters(&spans))
            });
        }
        let values = match &masters {
            Some(masters) => read_all(masters, &self.names)?,
            None if self.engine.gathers_weights() => {
                let engine = &mut self.engine;
                return enter(py, || engine.load_masters_from_shards());
            }
            None => self.whole_weights(py)?,
        };
        let engine = &mut self.engine;
        enter(py, || {
            // SAFETY: `self` or the caller holds the tensors and torch leaves them alone during this call.
            let spans: Vec<Span<'_>> = values.iter().map(|tensor| unsafe { tensor.span() }).collect();
            engine.load_masters(&spans)
        })
    }

    /// Makes the weights of the parameters `indices`, as they are now, the fp32 masters. Collective at stage 3.
    pub(super) fn refresh_masters(&mut self, py: Python<'_>, indices: Vec<usize>) -> PyResult<()> {
        let params: Vec<ParamId> = indices.into_iter().map(ParamId::from_index).collect();
        let on_device = self.device.is_some();
        let tensors = self.parameters.iter().map(|it| on_host(it.bind(py), on_device));
        let tensors = tensors.collect::<PyResult<Vec<_>>>()?;
        let values = read_all(&tensors, &self.names)?;
        let engine = &mut self.engine;
        enter(py, || {
            // SAFETY: `tensors` holds the tensors, and torch leaves them alone during this call.
            let spans: Vec<Span<'_>> = values.iter().map(|tensor| unsafe { tensor.span() }).collect();
            engine.on_host(None, Afterwards::WriteBack, |engine| engine.reload_masters(&params, &spans))
        })
    }
}

/// The tensor, or a dense copy of it in the host's memory where it is on a device.
pub(crate) fn on_host<'py>(tensor: &Bound<'py, PyAny>, on_device: bool) -> PyResult<Bound<'py, PyAny>> {
    if !on_device || is_released(tensor)? {
        return Ok(tensor.clone());
    }
    let py = tensor.py();
    let detached = tensor.call_method0(intern!(py, "detach"))?;
    let here = detached.call_method0(intern!(py, "cpu"))?;
    here.call_method0(intern!(py, "contiguous"))
}

/// The memory of dense tensors in the host's memory, by parameter.
pub(super) fn read_all(tensors: &[Bound<'_, PyAny>], names: &[String]) -> PyResult<Vec<TensorArg>> {
    tensors.iter().zip(names).map(|(tensor, name)| TensorArg::read(tensor, name)).collect()
}
