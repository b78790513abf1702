//! Checkpoints without an engine, for Python: whole weights out of any of them, models into files, conversions.

use std::{
    path::PathBuf,
    str::FromStr,
    sync::{Mutex, PoisonError},
};

use deepspeed_checkpoint::{
    CheckpointError, ElementType, Location, OriginalOptions, Silent, Source, TensorFacts,
    export::{ExportFormat, ExportOptions, ExportPlan, ExportTensor, ModelFile, export, read_tensor},
};
use deepspeed_core::{DType, Rank};
use deepspeed_monitor::memory::parse_bytes;
use pyo3::{
    exceptions::{PyKeyError, PyTypeError, PyValueError},
    intern,
    prelude::*,
    types::PyBytes,
};

use crate::{
    enter::enter,
    errors::{self, IntoPyErr},
};

impl IntoPyErr for CheckpointError {
    fn into_py_err(self) -> PyErr {
        errors::CheckpointError::new_err(self.to_string())
    }
}

/// The memory of a dense CPU tensor of any dtype.
struct Memory {
    ptr: usize,
    bytes: usize,
}

impl Memory {
    fn of(tensor: &Bound<'_, PyAny>, name: &str) -> PyResult<Self> {
        let py = tensor.py();
        let dense = tensor.call_method0(intern!(py, "is_contiguous"))?.extract::<bool>()?;
        if !dense || !tensor.getattr(intern!(py, "is_cpu"))?.extract::<bool>()? {
            return Err(PyValueError::new_err(format!("`{name}` is not a contiguous tensor on the CPU")));
        }
        Ok(Self {
            ptr: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            bytes: tensor.getattr(intern!(py, "nbytes"))?.extract()?,
        })
    }

    /// # Safety
    /// The tensor outlives `'a` and nobody writes to it meanwhile.
    unsafe fn bytes<'a>(&self) -> &'a [u8] {
        if self.bytes == 0 {
            return &[];
        }
        // SAFETY: a dense tensor of `bytes` bytes; lifetime and quiet are the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr as *const u8, self.bytes) }
    }

    /// # Safety
    /// The tensor outlives `'a` and nobody else touches it meanwhile.
    unsafe fn bytes_mut<'a>(&self) -> &'a mut [u8] {
        if self.bytes == 0 {
            return &mut [];
        }
        // SAFETY: as above, and nobody else touches the memory.
        unsafe { std::slice::from_raw_parts_mut(self.ptr as *mut u8, self.bytes) }
    }
}

/// A checkpoint of any format, and the model in it.
#[pyclass(frozen, name = "SavedModel", module = "deepspeed._native")]
struct PySavedModel {
    source: Box<dyn Source>,
    plan: ExportPlan,
}

#[pymethods]
impl PySavedModel {
    /// Opens the checkpoint `tag` of `path`, the latest, or the one whose own folder `path` is.
    #[staticmethod]
    #[pyo3(signature = (path, tag, dtype, exclude_frozen))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        tag: Option<&str>,
        dtype: &str,
        exclude_frozen: bool,
    ) -> PyResult<Self> {
        let dtype = parse_dtype(dtype)?;
        let source = enter(py, || Location::find(&path, tag)?.open())?;
        let plan = ExportPlan::new(&*source, dtype, exclude_frozen);
        Ok(Self { source, plan })
    }

    /// The checkpoint's folder.
    #[getter]
    fn folder(&self) -> PathBuf {
        self.source.folder().to_owned()
    }

    /// The ZeRO stage of the run that saved it; 0 where that is not known.
    #[getter]
    fn stage(&self) -> u8 {
        self.source.stage().unwrap_or_default()
    }

    /// Rank 0's client state as torch.save wrote it; None where there is none.
    fn client_state<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let found = enter(py, || self.source.blob(Rank(0), "client_state"))?;
        Ok(found.map(|bytes| PyBytes::new(py, &bytes)))
    }

    /// Name, shape and dtype of each tensor.
    fn tensors(&self) -> PyResult<Vec<(String, Vec<usize>, &'static str)>> {
        let facts = |it: &ExportTensor| {
            let dtype = it.dtype.torch_name().ok_or_else(|| {
                PyTypeError::new_err(format!(
                    "`{}` is of type {}, which torch does not have",
                    it.name, it.dtype
                ))
            })?;
            Ok((it.name.clone(), it.shape.clone(), dtype))
        };
        self.plan.tensors.iter().map(facts).collect()
    }

    /// Other names of tensors.
    #[getter]
    fn tied(&self) -> Vec<(String, String)> {
        self.plan.tied.clone()
    }

    /// Frozen parameters that were left out when the checkpoint was saved.
    #[getter]
    fn absent(&self) -> Vec<String> {
        self.plan.absent.clone()
    }

    /// Reads a tensor.
    fn read(&self, py: Python<'_>, name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        let found = self.plan.tensors.iter().find(|it| it.name == name);
        let wanted = found.ok_or_else(|| PyKeyError::new_err(name.to_owned()))?;
        let memory = Memory::of(tensor, name)?;
        if memory.bytes as u64 != wanted.bytes() {
            return Err(PyValueError::new_err(format!(
                "`{name}` has {} bytes, the tensor for it {}",
                wanted.bytes(),
                memory.bytes
            )));
        }
        enter(py, || {
            // SAFETY: the caller holds the tensor for the length of this call and leaves it alone.
            let target = unsafe { memory.bytes_mut() };
            let mut filled = 0;
            read_tensor(&*self.source, wanted, |bytes| {
                // No more than was announced: a source that gives more is damaged.
                let end = (filled + bytes.len()).min(target.len());
                target[filled..end].copy_from_slice(&bytes[..end - filled]);
                filled = end;
                Ok(())
            })
        })
    }
}

/// Writes the model of a checkpoint into a folder. Returns the files and the parameters that are not in them.
#[pyfunction]
#[pyo3(signature = (path, tag, out, *, dtype, max_shard_size, safetensors, exclude_frozen, overwrite))]
fn export_model(
    py: Python<'_>,
    path: PathBuf,
    tag: Option<&str>,
    out: PathBuf,
    dtype: &str,
    max_shard_size: Option<&str>,
    safetensors: bool,
    exclude_frozen: bool,
    overwrite: bool,
) -> PyResult<(Vec<PathBuf>, Vec<String>)> {
    let max_shard_bytes = match max_shard_size {
        Some(text) => parse_bytes(text).map_err(|error| PyValueError::new_err(error.to_string()))?,
        None => u64::MAX,
    };
    let format = if safetensors { ExportFormat::Safetensors } else { ExportFormat::Torch };
    let dtype = parse_dtype(dtype)?;
    let options = ExportOptions { format, dtype, max_shard_bytes, exclude_frozen, overwrite };
    let exported = enter(py, || {
        let source = Location::find(&path, tag)?.open()?;
        export(&*source, &out, options, &Silent)
    })?;
    Ok((exported.files, exported.absent))
}

/// Writes a checkpoint of any format as one of the original's universal format.
#[pyfunction]
#[pyo3(signature = (path, out, *, overwrite))]
fn write_universal(py: Python<'_>, path: PathBuf, out: PathBuf, overwrite: bool) -> PyResult<()> {
    enter(py, || {
        let source = Location::find(&path, None)?.open()?;
        let mut options = OriginalOptions::of(&*source);
        options.stage = options.stage.max(1);
        deepspeed_checkpoint::write_universal(&*source, &out, options, overwrite, &Silent)
    })
}

/// A file of weights that is written tensor by tensor and appears when it is complete.
#[pyclass(frozen, name = "ModelFile", module = "deepspeed._native")]
struct PyModelFile(Mutex<Option<ModelFile>>);

#[pymethods]
impl PyModelFile {
    /// Begins `folder/name` with these tensors (name, shape, dtype), in the order in which they will be written.
    #[new]
    fn new(
        py: Python<'_>,
        folder: PathBuf,
        name: &str,
        tensors: Vec<(String, Vec<usize>, String)>,
        tied: Vec<(String, String)>,
    ) -> PyResult<Self> {
        let facts = |(name, shape, dtype): (String, Vec<usize>, String)| {
            let dtype = ElementType::from_str(&dtype)
                .map_err(|error| PyTypeError::new_err(format!("`{name}`: {error}")))?;
            Ok(TensorFacts { name, dtype, shape })
        };
        let tensors = tensors.into_iter().map(facts).collect::<PyResult<Vec<_>>>()?;
        let format = ExportFormat::of_name(name);
        enter(py, || ModelFile::create(&folder, name, format, tensors, &tied))
            .map(|file| Self(Mutex::new(Some(file))))
    }

    /// Writes the next tensor.
    fn write(&self, py: Python<'_>, name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        let memory = Memory::of(tensor, name)?;
        enter(py, || {
            let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the caller holds the tensor for the length of this call and leaves it alone.
            let bytes = unsafe { memory.bytes() };
            file.as_mut().map_or_else(
                || Err(finished()),
                |file| file.write(name, bytes).map_err(IntoPyErr::into_py_err),
            )
        })
    }

    /// Gives the file its name.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(finished)?;
        enter(py, || file.finish())
    }
}

fn finished() -> PyErr {
    PyValueError::new_err("the file is finished")
}

fn parse_dtype(text: &str) -> PyResult<DType> {
    text.parse().map_err(|error: deepspeed_core::ParseDTypeError| PyValueError::new_err(error.to_string()))
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySavedModel>()?;
    module.add_class::<PyModelFile>()?;
    module.add_function(wrap_pyfunction!(export_model, module)?)?;
    module.add_function(wrap_pyfunction!(write_universal, module)?)?;
    Ok(())
}
