//! Weights that the ranks of a host share, as Python holds them: what keeps them alive, who may write when.

use std::{path::PathBuf, sync::Arc};

use deepspeed_comm::{Access, CommError, Region};
use deepspeed_core::{DType, Rank};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    intern,
    prelude::*,
};

use crate::{
    enter::enter,
    errors::IntoPyErr,
    group::PyGroup,
    tensors::{TensorArg, dtype_of},
};

/// Tensors of a draft begin at whole pages, so that one can be forgotten without its neighbours.
const PAGE: usize = 4096;

/// Memory that tensors alias; it lives as long as this.
#[pyclass(frozen, name = "SharedWeights", module = "deepspeed._native")]
pub(crate) struct PySharedWeights {
    regions: Vec<Arc<Region>>,
}

impl PySharedWeights {
    pub(crate) fn new(regions: Vec<Arc<Region>>) -> Self {
        Self { regions }
    }

    /// The region in which `bytes` bytes at `address` lie, and where in it.
    fn find(&self, address: usize, bytes: usize) -> PyResult<(&Region, usize)> {
        let found = self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.address())?;
            (offset.checked_add(bytes)? <= region.len()).then_some((&**region, offset))
        });
        found.ok_or_else(|| {
            PyValueError::new_err(format!(
                "the {bytes} bytes at {address:#x} are not of these shared weights"
            ))
        })
    }
}

#[pymethods]
impl PySharedWeights {
    /// Lets the program of this rank write the weights, or no longer. A draft can be written all the time.
    fn set_writable(&self, writable: bool) -> PyResult<()> {
        for region in self.regions.iter().filter(|region| region.is_guarded()) {
            region.set_writable(writable).map_err(IntoPyErr::into_py_err)?;
        }
        Ok(())
    }

    /// Shows all ranks what this rank has written to a tensor of a draft.
    fn publish(&self, address: usize, bytes: usize) -> PyResult<()> {
        let (region, offset) = self.find(address, bytes)?;
        region.publish(offset, bytes);
        Ok(())
    }

    /// Forgets what this rank alone has written to a tensor of a draft.
    fn refresh(&self, address: usize, bytes: usize) -> PyResult<()> {
        let (region, offset) = self.find(address, bytes)?;
        region.refresh(offset, bytes).map_err(IntoPyErr::into_py_err)
    }
}

/// Moves tensors (name, dense CPU tensor, dtype to keep it in) of a model that is being built into memory that all ranks
/// share, with rank 0's values; with a `folder`, into a file there. Returns what keeps the memory alive and each tensor's address. Collective.
#[pyfunction]
#[pyo3(signature = (group, tensors, folder = None))]
fn share_draft(
    py: Python<'_>,
    group: &PyGroup,
    tensors: Vec<(String, Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    folder: Option<PathBuf>,
) -> PyResult<(PySharedWeights, Vec<usize>)> {
    let mut sources = Vec::with_capacity(tensors.len());
    let mut bytes = 0;
    for (name, tensor, dtype) in &tensors {
        let wanted = dtype_of(dtype)?.ok_or_else(|| {
            PyTypeError::new_err(format!(
                "`{name}` would be kept as {dtype}: fp32, bf16 and fp16 are possible"
            ))
        })?;
        let dense = tensor.call_method0(intern!(py, "contiguous"))?;
        let source = TensorArg::read(&dense, name)?;
        sources.push((dense, source, wanted, bytes));
        bytes = (bytes + source.len() * wanted.size()).next_multiple_of(PAGE);
    }
    let what = format!("zero.Init of {}", tensors.first().map_or("nothing", |(name, _, _)| name));
    let plan: Vec<(TensorArg, DType, usize)> =
        sources.iter().map(|(_, source, wanted, offset)| (*source, *wanted, *offset)).collect();
    let group = group.inner().clone();
    let region = enter(py, || {
        let region = Region::share(&*group, &what, bytes, folder.as_deref(), Access::Draft)?;
        if group.rank() == Rank(0) {
            for (source, wanted, offset) in plan {
                // SAFETY: nobody else writes the region before the barrier below, and the caller holds the tensors.
                let (target, source) =
                    unsafe { (region.span_mut(offset, source.len(), wanted), source.span()) };
                deepspeed_kernels::cast(source, target);
            }
        }
        group.barrier(&what)?;
        // Nobody has written to a private view yet, so that nothing is lost.
        region.drop_pages(0, region.len())?;
        Ok::<_, CommError>(region)
    })?;
    let addresses = sources.iter().map(|(_, _, _, offset)| region.address() + offset).collect();
    Ok((PySharedWeights::new(vec![region]), addresses))
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySharedWeights>()?;
    module.add_function(wrap_pyfunction!(share_draft, module)?)?;
    Ok(())
}
