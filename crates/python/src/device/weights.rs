//! Weights on a device: parameters as views of flat tensors, and everybody's shards of them.

use deepspeed_comm::PiecesMut;
use deepspeed_core::{DType, Fragment, SpanMut, Unit};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    intern,
    prelude::*,
};

use super::{
    Exchanged, TorchDevice, UnitTensors,
    gradients::span_of,
    lock,
    ops::{Flat, Side, Tensor},
};
use crate::{enter::enter, tensors::torch_dtype};

/// Index of a parameter, first element, number of elements, gradients, masters.
pub(crate) type ClientTensors = Vec<(usize, usize, usize, Py<PyAny>, Py<PyAny>)>;

impl TorchDevice {
    /// The parameters of a unit, with where they lie in it.
    fn members<'a>(
        &'a self,
        tensors: &'a UnitTensors,
    ) -> impl Iterator<Item = (&'a Py<PyAny>, usize, usize)> {
        let slots = tensors.unit.slots.iter();
        slots.map(|slot| (&self.parameters[tensors.first_param + slot.param.index()], slot.offset, slot.len))
    }

    /// Takes the whole parameter `number`, of any dtype, wherever it is: this rank's part of it as weights and as masters, and
    /// all of it where weights are whole.
    pub(crate) fn load_weight(&self, py: Python<'_>, number: usize, tensor: &Tensor<'_>) -> PyResult<()> {
        let flat = self.ops.here(&tensor.call_method0(intern!(py, "detach"))?)?.flatten()?;
        for tensors in self.units() {
            let unit = &tensors.unit;
            let Some(slot) =
                unit.slots.iter().find(|slot| tensors.first_param + slot.param.index() == number)
            else {
                continue;
            };
            if flat.len()? != slot.len {
                let got = flat.len()?;
                return Err(PyValueError::new_err(format!(
                    "parameter number {number} has {got} elements, the engine was made for {}",
                    slot.len
                )));
            }
            if let Some(whole) = &tensors.whole {
                whole.bind(py).part(slot.offset, slot.len)?.copy_(&flat)?;
            }
            let shard = unit.shard(self.rank());
            let own = unit.fragments(shard.clone()).filter(|fragment| fragment.param == slot.param);
            for Fragment { param_offset, unit_offset, len, .. } in own {
                let source = flat.part(param_offset, len)?;
                let start = unit_offset - shard.start;
                if let Some(master) = &tensors.master {
                    master.bind(py).part(start, len)?.copy_(&source)?;
                }
                if tensors.whole.is_none() {
                    tensors.weight.bind(py).part(start, len)?.copy_(&source)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the parameters views of the flat weights, where these are whole.
    pub(crate) fn adopt_parameters(&self, py: Python<'_>) -> PyResult<()> {
        for tensors in self.units() {
            let Some(whole) = &tensors.whole else { continue };
            for (parameter, offset, len) in self.members(tensors) {
                point(parameter.bind(py), &whole.bind(py).part(offset, len)?)?;
            }
        }
        Ok(())
    }

    /// Takes the values of parameters to which a program has given other memory, and makes them views again.
    pub(super) fn take_replaced<'a>(
        &'a self,
        py: Python<'_>,
        units: impl Iterator<Item = &'a UnitTensors>,
    ) -> PyResult<()> {
        for tensors in units {
            let Some(whole) = &tensors.whole else { continue };
            let whole = whole.bind(py);
            let start = whole.address()?;
            for (parameter, offset, len) in self.members(tensors) {
                let parameter = parameter.bind(py);
                if parameter.address()? == start + offset * tensors.unit.dtype.size() {
                    continue;
                }
                let dtype = parameter.getattr(intern!(py, "dtype"))?;
                if !dtype.is(&torch_dtype(py, tensors.unit.dtype)?) {
                    return Err(PyTypeError::new_err(format!(
                        "a parameter's weights are {dtype}, but they were {} when the engine was made; do not cast the \
                         module after deepspeed.initialize",
                        tensors.unit.dtype
                    )));
                }
                let data = parameter.getattr(intern!(py, "data"))?;
                let view = whole.part(offset, len)?;
                view.copy_(&self.ops.here(&data)?.flatten()?)?;
                point(parameter, &view)?;
            }
        }
        Ok(())
    }

    pub(super) fn publish_weights(&self, py: Python<'_>) -> PyResult<()> {
        for tensors in self.trained() {
            let weight = tensors.weight.bind(py);
            if let Some(master) = &tensors.master {
                weight.copy_later_(master.bind(py))?;
            }
            if let Some(whole) = &tensors.whole {
                self.gather_shards(py, &tensors.unit, "weights", weight, whole.bind(py))?;
            }
        }
        Ok(())
    }

    /// Queues, beside the program's own work, that `whole` (the unit's elements with padding) is filled with everybody's
    /// shards of unit `number`; [`wait_for_gathered`](Self::wait_for_gathered) comes before its first use. Collective.
    pub(crate) fn gather_unit(&self, py: Python<'_>, number: usize, whole: &Tensor<'_>) -> PyResult<()> {
        let tensors = self.unit(number)?;
        self.note_exchange(Exchanged::Weights, number);
        self.ops.beside(py, Side::Gather, || {
            let own = self.ops.here(tensors.weight.bind(py))?;
            self.gather_shards(py, &tensors.unit, "weights", &own, whole)
        })?;
        if let Some(event) = self.ops.record(py, Side::Gather)? {
            lock(&self.gathered).insert(number, event);
        }
        Ok(())
    }

    /// What the program queues from here on sees unit `number` whole.
    pub(crate) fn wait_for_gathered(&self, py: Python<'_>, number: usize) -> PyResult<()> {
        match lock(&self.gathered).remove(&number) {
            Some(event) => self.ops.wait_event(py, &event),
            None => Ok(()),
        }
    }

    /// Fills `whole` with the equally long shards of all ranks; `own`, this rank's, may be a part of it.
    pub(super) fn gather_shards(
        &self,
        py: Python<'_>,
        unit: &Unit,
        what: &str,
        own: &Tensor<'_>,
        whole: &Tensor<'_>,
    ) -> PyResult<()> {
        let mine = whole.part(unit.shard(self.rank()).start, unit.shard_len)?;
        if own.address()? != mine.address()? {
            mine.copy_(own)?;
        }
        match &self.direct {
            _ if self.group.world() == 1 => Ok(()),
            Some(distributed) => {
                // Where the parts are taken apart again, as by Gloo, one of them must not be where the whole is.
                let apart = if self.ops.is_accelerator() { mine } else { mine.call_method0("clone")? };
                distributed.call_method1(py, intern!(py, "all_gather_into_tensor"), (whole, apart)).map(drop)
            }
            None => self.gather_on_host(py, unit, what, &mine, whole),
        }
    }

    fn gather_on_host(
        &self,
        py: Python<'_>,
        unit: &Unit,
        what: &str,
        mine: &Tensor<'_>,
        whole: &Tensor<'_>,
    ) -> PyResult<()> {
        let dtype = crate::tensors::dtype_of(&whole.getattr(intern!(py, "dtype"))?)?.unwrap_or(DType::F32);
        let (len, part) = (unit.len(), unit.shard_len);
        let staging = self.ops.staging(py, len + part, dtype)?;
        let (all, own) = (staging.part(0, len)?, staging.part(len, part)?);
        own.copy_(mine)?;
        let (all_at, own_at) = (all.address()?, own.address()?);
        let name = format!("{what} of unit {}", unit.id);
        let group = &self.group;
        enter(py, || {
            // SAFETY: both are parts of the device's staging memory, apart and dense, which nobody else touches until this
            // returns.
            let (own, all) = unsafe { (span_of(own_at, part, dtype), span_of(all_at, len, dtype)) };
            let mut produce = |range: std::ops::Range<usize>, mut slot: SpanMut<'_>| {
                let source = own.as_span().slice(range.start, range.len());
                slot.as_bytes_mut().copy_from_slice(source.as_bytes());
            };
            group.all_gather(&name, dtype, &mut produce, &mut PiecesMut { len, runs: vec![(0, all)] })
        })?;
        whole.copy_(&all)
    }

    /// For a client's optimizer on shards: per fragment of a parameter, its index, first element and length, and the
    /// tensors of its fp32 gradients and masters.
    pub(crate) fn client_tensors(&self, py: Python<'_>) -> PyResult<ClientTensors> {
        let mut out = Vec::new();
        for tensors in self.resident() {
            let shard = tensors.unit.shard(self.rank());
            let gradient = self.tensor(py, tensors.unit.id.index(), deepspeed_engine::Part::Gradient)?;
            let master = tensors.master.as_ref().unwrap_or(&tensors.weight).bind(py);
            for Fragment { param, param_offset, unit_offset, len } in tensors.unit.fragments(shard.clone()) {
                let start = unit_offset - shard.start;
                let (gradient, master) = (gradient.part(start, len)?, master.part(start, len)?);
                out.push((param.index(), param_offset, len, gradient.unbind(), master.unbind()));
            }
        }
        Ok(out)
    }

    /// At stage 3: by parameter number, this rank's part of its weights, flat.
    pub(crate) fn own_parts(&self, py: Python<'_>) -> PyResult<Vec<Py<PyAny>>> {
        let nothing = self.ops.zeros(py, 0, DType::F32)?;
        let mut parts: Vec<Py<PyAny>> = self.parameters.iter().map(|_| nothing.clone_ref(py)).collect();
        for tensors in self.units() {
            let shard = tensors.unit.shard(self.rank());
            for Fragment { param, unit_offset, len, .. } in tensors.unit.fragments(shard.clone()) {
                let part = tensors.weight.bind(py).part(unit_offset - shard.start, len)?;
                parts[tensors.first_param + param.index()] = part.unbind();
            }
        }
        Ok(parts)
    }
}

/// Makes a parameter a view of flat memory, in its shape.
fn point(parameter: &Tensor<'_>, flat: &Tensor<'_>) -> PyResult<()> {
    let py = parameter.py();
    let view = flat.call_method1(intern!(py, "view"), (parameter.getattr(intern!(py, "shape"))?,))?;
    parameter.setattr(intern!(py, "data"), view)
}
