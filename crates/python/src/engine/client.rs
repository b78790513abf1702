//! What a client's own optimizer works on: whole gradients, or this rank's shards of gradients and masters.

use deepspeed_core::{DType, SpanMut};
use deepspeed_engine::Plan;
use pyo3::prelude::*;

use super::{PyEngine, weights::read_all};
use crate::{enter::enter, errors::DeepSpeedError};

/// Index of a parameter, first element in it, number of elements, address of its gradients, address of its masters.
pub(super) type ClientShard = (usize, usize, usize, usize, Option<usize>);

impl PyEngine {
    /// The whole averaged gradients, unscaled and clipped, into `outputs`, fp32 by parameter. Collective.
    pub(super) fn whole_gradients(&mut self, py: Python<'_>, outputs: Vec<Bound<'_, PyAny>>) -> PyResult<()> {
        let grad_scale = self.grad_scale()?;
        if let Some(device) = &self.device {
            return device.gather_gradients(py, grad_scale, &outputs);
        }
        let arguments = read_all(&outputs, &self.names)?;
        let engine = &mut self.engine;
        enter(py, || {
            // SAFETY: the caller holds the outputs for the length of this call; they are distinct new tensors.
            let mut spans: Vec<SpanMut<'_>> =
                arguments.iter().map(|tensor| unsafe { tensor.span_mut() }).collect();
            engine.gather_gradients(grad_scale, &mut spans)
        })
    }

    /// The fragments of parameters in this rank's shards, where they lie in the host's memory.
    pub(super) fn shards_for_client(&mut self) -> Vec<ClientShard> {
        let layout = self.engine.layout().clone();
        let rank = self.engine.group().rank();
        let on_device: Vec<bool> =
            (0..layout.units.len()).map(|unit| self.engine.is_on_device(unit)).collect();
        let mut out = Vec::new();
        for (unit, (mut gradient, mut master)) in layout.units.iter().zip(self.engine.shard_memory()) {
            if on_device[unit.id.index()] {
                continue;
            }
            let shard = unit.shard(rank);
            let gradient = gradient.as_bytes_mut().as_mut_ptr() as usize;
            let master = master.as_mut().map(|span| span.as_bytes_mut().as_mut_ptr() as usize);
            for fragment in unit.fragments(shard.clone()) {
                let bytes = (fragment.unit_offset - shard.start) * DType::F32.size();
                let (gradient, master) = (gradient + bytes, master.map(|address| address + bytes));
                out.push((fragment.param.index(), fragment.param_offset, fragment.len, gradient, master));
            }
        }
        out
    }

    /// What undoes the loss scale and clips, between `prepare` and `finish`.
    pub(super) fn grad_scale(&self) -> PyResult<f32> {
        match self.plan {
            Plan::Apply { grad_scale } => Ok(grad_scale),
            Plan::Accumulate | Plan::Skip { .. } => {
                Err(DeepSpeedError::new_err("there are no gradients to step on: call prepare() first"))
            }
        }
    }
}
