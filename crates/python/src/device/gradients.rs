//! Gradients on a device: from where autograd left them to this rank's shard of their average.

use deepspeed_comm::{Into, Pieces};
use deepspeed_core::{DType, Layout, Span, SpanMut, Unit};
use deepspeed_engine::Source;
use deepspeed_zero::Exchange;
use pyo3::{exceptions::PyRuntimeError, intern, prelude::*, types::PyDict};

use super::{
    Exchanged, TorchDevice, lock,
    ops::{Flat, Side, Tensor},
};
use crate::enter::enter;

impl TorchDevice {
    /// The unit's gradients, flat and padded, in the unit's dtype, or in fp32 where there is a factor.
    fn flat_gradients<'py>(
        &self,
        py: Python<'py>,
        unit: &Unit,
        present: &[bool],
        factor: f32,
    ) -> PyResult<Tensor<'py>> {
        let mut parts = Vec::with_capacity(unit.slots.len() + 1);
        for slot in &unit.slots {
            let index = slot.param.index();
            let gradient = self.parameters[index].bind(py).getattr(intern!(py, "grad"))?;
            if !present[index] || gradient.is_none() {
                parts.push(self.ops.zeros(py, slot.len, unit.dtype)?.into_bound(py));
            } else if gradient.getattr(intern!(py, "is_sparse"))?.extract()? {
                parts.push(gradient.call_method0(intern!(py, "to_dense"))?.flatten()?);
            } else {
                parts.push(gradient.flatten()?);
            }
        }
        let padding = unit.len() - unit.filled;
        if padding > 0 {
            parts.push(self.ops.zeros(py, padding, unit.dtype)?.into_bound(py));
        }
        let flat = self.ops.torch(py).call_method1(intern!(py, "cat"), (parts,))?;
        if factor == 1.0 {
            return flat.to_dtype(unit.dtype);
        }
        flat.to_dtype(DType::F32)?.times(f64::from(factor))
    }

    pub(super) fn add_gradients(
        &self,
        py: Python<'_>,
        layout: &Layout,
        present: &[bool],
        factor: f32,
        first: bool,
    ) -> PyResult<()> {
        if first {
            // The last sum may still be on its way to the other ranks.
            self.ops.join(py, Side::Reduce)?;
        }
        let mut sums = lock(&self.sums);
        if sums.is_empty() {
            let zeros = |unit: &Unit| self.ops.zeros(py, unit.len(), DType::F32);
            *sums = layout.units.iter().map(zeros).collect::<PyResult<_>>()?;
        }
        for (unit, sum) in layout.units.iter().zip(sums.iter()) {
            let flat = self.flat_gradients(py, unit, present, factor)?;
            if first { sum.bind(py).copy_(&flat)? } else { sum.bind(py).add_(&flat)? }
        }
        Ok(())
    }

    pub(super) fn reduce_unit(
        &self,
        py: Python<'_>,
        unit: &Unit,
        what: &str,
        source: Source<'_>,
        exchange: &Exchange,
        into: Into,
    ) -> PyResult<()> {
        let flat = match source {
            Source::Given { present, factor } => self.flat_gradients(py, unit, present, factor)?,
            Source::Accumulated => {
                let sums = lock(&self.sums);
                let none = || PyRuntimeError::new_err("no gradients were accumulated");
                sums.get(unit.id.index()).ok_or_else(none)?.bind(py).clone()
            }
        };
        let flat = match exchange.wire {
            None => flat,
            Some(wire) => flat.to_dtype(DType::F32)?.times(f64::from(exchange.before))?.to_dtype(wire)?,
        };
        self.note_exchange(Exchanged::Gradients, unit.id.index());
        self.ops.used_beside(&flat, Side::Reduce)?;
        self.ops.beside(py, Side::Reduce, || self.reduce_flat(py, unit, what, &flat, exchange, into))
    }

    fn reduce_flat(
        &self,
        py: Python<'_>,
        unit: &Unit,
        what: &str,
        flat: &Tensor<'_>,
        exchange: &Exchange,
        into: Into,
    ) -> PyResult<()> {
        let number = unit.id.index();
        let gradient = self.tensor(py, number, deepspeed_engine::Part::Gradient)?;
        let on_host = self.is_on_host(&gradient)?;
        // In place where the shard is on the device and holds nothing yet.
        let in_place = into == Into::Store && !on_host;
        let total =
            if in_place { gradient.clone() } else { self.ops.empty(py, unit.shard_len, DType::F32)? };
        self.sum_over_ranks(py, unit, what, flat, exchange.after, &total)?;
        if into == Into::Add {
            total.add_(&self.ops.here(&gradient)?)?;
        }
        if exchange.accumulate != DType::F32 {
            total.copy_(&total.to_dtype(exchange.accumulate)?)?;
        }
        if !in_place {
            gradient.copy_later_(&total)?;
        }
        self.note_norm(number, &total)
    }

    /// `total` becomes this rank's shard of the sum over ranks, in rank order and in fp32, times `scale`.
    fn sum_over_ranks(
        &self,
        py: Python<'_>,
        unit: &Unit,
        what: &str,
        flat: &Tensor<'_>,
        scale: f32,
        total: &Tensor<'_>,
    ) -> PyResult<()> {
        let (world, len) = (self.group.world(), unit.shard_len);
        if world > 1 && self.direct.is_none() {
            return self.sum_on_host(py, what, flat, scale, total);
        }
        let received = match &self.direct {
            Some(distributed) if world > 1 => {
                let received = self.ops.torch(py).call_method1(intern!(py, "empty_like"), (flat,))?;
                distributed.call_method1(py, intern!(py, "all_to_all_single"), (&received, flat))?;
                received
            }
            _ => flat.clone(),
        };
        total.copy_(&received.part(0, len)?)?;
        for rank in 1..world {
            total.add_(&received.part(rank * len, len)?)?;
        }
        if scale != 1.0 { total.mul_(f64::from(scale)) } else { Ok(()) }
    }

    /// The same by way of the host's memory and the engine's own group.
    fn sum_on_host(
        &self,
        py: Python<'_>,
        what: &str,
        flat: &Tensor<'_>,
        scale: f32,
        total: &Tensor<'_>,
    ) -> PyResult<()> {
        let dtype = crate::tensors::dtype_of(&flat.getattr(intern!(py, "dtype"))?)?.unwrap_or(DType::F32);
        let (len, part): (usize, usize) = (flat.len()?, total.len()?);
        let source = self.ops.staging(py, len, dtype)?;
        source.copy_(flat)?;
        let mut shard = deepspeed_core::AlignedBuffer::zeroed(part, DType::F32);
        let (address, group) = (source.address()?, &self.group);
        enter(py, || {
            // SAFETY: the staging memory is this device's, dense, of `len` elements, and untouched until this returns.
            let span = unsafe { Span::from_raw(address as *const u8, len, dtype) };
            let input = Pieces { len, runs: vec![(0, span)] };
            group.reduce_scatter(what, &input, shard.as_f32_mut(), scale, Into::Store)
        })?;
        super::copy_in(total, shard.span())
    }

    /// Queues the norm of a shard's gradients.
    pub(super) fn note_norm(&self, number: usize, gradient: &Tensor<'_>) -> PyResult<()> {
        let py = gradient.py();
        let torch = self.ops.torch(py);
        let options = PyDict::new(py);
        options.set_item("dtype", torch.getattr(intern!(py, "float64"))?)?;
        let norm = torch.getattr(intern!(py, "linalg"))?.call_method(
            intern!(py, "vector_norm"),
            (gradient,),
            Some(&options),
        )?;
        lock(&self.norms)[number] = Some(norm.unbind());
        Ok(())
    }

    /// Waits until what was copied to the host is there.
    pub(super) fn wait(&self, py: Python<'_>) -> PyResult<()> {
        if !self.ops.is_accelerator() {
            return Ok(());
        }
        self.ops.synchronize(py)
    }

    /// The one wait of a step.
    pub(super) fn norms_squared(&self, py: Python<'_>) -> PyResult<Vec<f64>> {
        self.ops.join(py, Side::Reduce)?;
        let norms: Vec<Py<PyAny>> =
            lock(&self.norms).iter().flatten().map(|norm| norm.clone_ref(py)).collect();
        if norms.is_empty() {
            return Ok(Vec::new());
        }
        let all = self.ops.torch(py).call_method1(intern!(py, "stack"), (norms,))?;
        let values: Vec<f64> = all.call_method0(intern!(py, "tolist"))?.extract()?;
        Ok(values.into_iter().map(|norm| norm * norm).collect())
    }

    /// The whole averaged gradients times `scale` into `outputs`, fp32 tensors by parameter id. Collective.
    pub(crate) fn gather_gradients(
        &self,
        py: Python<'_>,
        scale: f32,
        outputs: &[Bound<'_, PyAny>],
    ) -> PyResult<()> {
        self.ops.join(py, Side::Reduce)?;
        for tensors in self.trained() {
            let unit = &tensors.unit;
            let gradient = self.tensor(py, unit.id.index(), deepspeed_engine::Part::Gradient)?;
            let own = self.ops.here(&gradient)?.times(f64::from(scale))?;
            let whole = self.ops.empty(py, unit.len(), DType::F32)?;
            self.gather_shards(py, unit, "gradients", &own, &whole)?;
            for slot in &unit.slots {
                outputs[slot.param.index()].flatten_view()?.copy_(&whole.part(slot.offset, slot.len)?)?;
            }
        }
        Ok(())
    }
}

/// A flat view of a dense tensor.
pub(super) trait FlatView<'py> {
    fn flatten_view(&self) -> PyResult<Tensor<'py>>;
}

impl<'py> FlatView<'py> for Bound<'py, PyAny> {
    fn flatten_view(&self) -> PyResult<Tensor<'py>> {
        self.call_method1(intern!(self.py(), "view"), (-1,))
    }
}

/// Host memory of a tensor of this device's, to write.
///
/// # Safety
/// As [`SpanMut::from_raw`].
pub(super) unsafe fn span_of<'a>(address: usize, len: usize, dtype: DType) -> SpanMut<'a> {
    // SAFETY: the caller's promise.
    unsafe { SpanMut::from_raw(address as *mut u8, len, dtype) }
}
