//! Moving the engine's memory off a device for a while, and back: `offload_states` and `reload_states`.

use deepspeed_core::DType;
use pyo3::{intern, prelude::*};

use super::{
    TorchDevice, lock,
    ops::{Flat, Side, Tensor},
};

/// What may be moved, by the names of `OffloadStateTypeEnum`.
const KINDS: [&str; 5] = ["optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer"];

impl TorchDevice {
    /// Moves tensors of these kinds to the host's memory, which is pinned if `pin`. Their memory on the device is free afterwards; what shares it, as
    /// parameters below stage 3 do, has no values until `reload`.
    pub(crate) fn evict(&self, py: Python<'_>, kinds: &[String], pin: bool) -> PyResult<()> {
        self.ops.join(py, Side::Reduce)?;
        self.ops.join(py, Side::Gather)?;
        let asked = |kind: &str| kinds.iter().any(|it| it == kind);
        let mut moving: Vec<&Py<PyAny>> = Vec::new();
        for tensors in self.units() {
            if asked(KINDS[0]) {
                moving.extend(&tensors.state);
            }
            if asked(KINDS[1]) {
                moving.extend(&tensors.master);
            }
            if asked(KINDS[2]) {
                moving.push(tensors.whole.as_ref().unwrap_or(&tensors.weight));
            }
            if asked(KINDS[3]) {
                moving.extend(&tensors.gradient);
            }
        }
        let sums = lock(&self.sums);
        if asked(KINDS[4]) {
            moving.extend(sums.iter());
        }
        let mut evicted = lock(&self.evicted);
        for tensor in moving {
            let bound = tensor.bind(py);
            // Somebody else holds on to memory that cannot be resized.
            let stays = self.is_on_host(bound)? || !can_be_resized(bound)?;
            if stays || bytes_of(bound)? == 0 {
                continue;
            }
            let dtype = crate::tensors::dtype_of(&bound.getattr(intern!(py, "dtype"))?)?;
            let copy = self.ops.host_zeros(py, bound.len()?, dtype.unwrap_or(DType::F32), pin)?;
            copy.bind(py).copy_(bound)?;
            resize(bound, 0)?;
            evicted.push((tensor.clone_ref(py), copy));
        }
        Ok(())
    }

    /// Takes `evict` back.
    pub(crate) fn reload(&self, py: Python<'_>) -> PyResult<()> {
        for (tensor, copy) in lock(&self.evicted).drain(..) {
            let (tensor, copy) = (tensor.bind(py), copy.bind(py));
            resize(tensor, copy.getattr(intern!(py, "nbytes"))?.extract()?)?;
            tensor.copy_later_(copy)?;
        }
        // The copies are let go of.
        self.ops.synchronize(py)
    }

    /// Whether a tensor of an accelerator's unit lies in the host's memory anyway.
    pub(super) fn is_on_host(&self, tensor: &Tensor<'_>) -> PyResult<bool> {
        Ok(self.ops.is_accelerator() && tensor.getattr(intern!(tensor.py(), "is_cpu"))?.extract::<bool>()?)
    }
}

fn storage<'py>(tensor: &Tensor<'py>) -> PyResult<Tensor<'py>> {
    tensor.call_method0(intern!(tensor.py(), "untyped_storage"))
}

fn bytes_of(tensor: &Tensor<'_>) -> PyResult<usize> {
    storage(tensor)?.call_method0(intern!(tensor.py(), "nbytes"))?.extract()
}

fn can_be_resized(tensor: &Tensor<'_>) -> PyResult<bool> {
    storage(tensor)?.call_method0(intern!(tensor.py(), "resizable"))?.extract()
}

fn resize(tensor: &Tensor<'_>, bytes: usize) -> PyResult<()> {
    storage(tensor)?.call_method1(intern!(tensor.py(), "resize_"), (bytes,)).map(drop)
}
