//! Checkpoints for Python: tensors and bytes in, tensors and bytes out; the format is `deepspeed-checkpoint`'s.

use std::path::PathBuf;

use deepspeed_checkpoint::{ElementType, Retired, Source, TensorSource, kind};
use deepspeed_core::{ParamId, Rank, Span, SpanMut};
use deepspeed_engine::{Afterwards, Frozen, LoadOptions, ParamSlice, SaveRequest, Saved, TagRule, read_cast};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    intern,
    prelude::*,
    types::{PyBytes, PyDict, PyMapping},
};

use crate::{
    engine::{PyEngine, hypers},
    enter::enter,
    errors::CheckpointError,
    tensors::TensorArg,
};

/// A dense tensor of any dtype: its bytes stay where they are.
struct RawTensor {
    name: String,
    ptr: usize,
    bytes: usize,
    shape: Vec<usize>,
    dtype: ElementType,
}

impl RawTensor {
    fn read(name: String, tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = tensor.py();
        let torch_dtype = tensor.getattr(intern!(py, "dtype"))?.to_string();
        let dtype = torch_dtype
            .trim_start_matches("torch.")
            .parse()
            .map_err(|error| PyTypeError::new_err(format!("buffer `{name}`: {error}")))?;
        if !tensor.call_method0(intern!(py, "is_contiguous"))?.extract::<bool>()? {
            return Err(PyValueError::new_err(format!("buffer `{name}` is not contiguous")));
        }
        Ok(Self {
            ptr: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            bytes: tensor.getattr(intern!(py, "nbytes"))?.extract()?,
            shape: tensor.getattr(intern!(py, "shape"))?.extract()?,
            name,
            dtype,
        })
    }

    /// # Safety
    /// The tensor outlives `'a` and nobody writes to it meanwhile.
    unsafe fn source<'a>(&'a self) -> TensorSource<'a> {
        let bytes = if self.bytes == 0 {
            &[]
        } else {
            // SAFETY: a dense tensor of `bytes` bytes; lifetime and quiet are the caller's promise.
            unsafe { std::slice::from_raw_parts(self.ptr as *const u8, self.bytes) }
        };
        TensorSource { name: &self.name, dtype: self.dtype, shape: &self.shape, bytes }
    }
}

/// What a save did.
#[pyclass(frozen, name = "SavedCheckpoint", module = "deepspeed._native", get_all)]
struct PySavedCheckpoint {
    tags_differ: bool,
    folder: PathBuf,
    behind: bool,
    removed: Vec<String>,
    problems: Vec<String>,
}

/// Waits for every checkpoint of this process that is still being written. Returns the folders of those that failed
/// without anybody having been told, with the reason.
#[pyfunction]
fn wait_for_saves(py: Python<'_>) -> Vec<(PathBuf, String)> {
    let failed = py.detach(deepspeed_checkpoint::wait_for_all);
    failed.into_iter().map(|(folder, failure)| (folder, failure.to_string())).collect()
}

/// Saves the engine's state with what Python adds.
#[pyfunction]
#[pyo3(signature = (engine, *, save_dir, tag, fail_on_different_tags, save_latest, param_groups, slices,
                    frozen, exclude_frozen, tied, buffers, blobs, face))]
#[expect(clippy::too_many_arguments, reason = "named arguments of the one caller")]
fn save_checkpoint(
    py: Python<'_>,
    mut engine: PyRefMut<'_, PyEngine>,
    save_dir: PathBuf,
    tag: String,
    fail_on_different_tags: bool,
    save_latest: bool,
    param_groups: Vec<Bound<'_, PyMapping>>,
    slices: Vec<(usize, String, usize, Bound<'_, PyAny>)>,
    frozen: &Bound<'_, PyDict>,
    exclude_frozen: bool,
    tied: Vec<(String, String)>,
    buffers: &Bound<'_, PyDict>,
    blobs: Vec<(String, Vec<u8>)>,
    face: &str,
) -> PyResult<PySavedCheckpoint> {
    let hypers = hypers(engine.kind(), &param_groups)?;
    let weights = engine.weights(py)?;
    let slices = slice_arguments(&slices, engine.engine.layout().params.len())?;
    let frozen = frozen_arguments(frozen)?;
    let buffers = buffers
        .iter()
        .map(|(name, tensor)| RawTensor::read(name.extract()?, &tensor))
        .collect::<PyResult<Vec<_>>>()?;
    let face = serde_json::from_str(face).map_err(|error| PyValueError::new_err(error.to_string()))?;
    let engine = &mut engine.engine;
    enter(py, || {
        // SAFETY: Python holds all these tensors for the length of this call, and nobody writes to them.
        let span = |tensor: &TensorArg| unsafe { tensor.span() };
        let weights: Vec<Span<'_>> = weights.iter().map(span).collect();
        let slices: Vec<ParamSlice<'_>> = slices
            .iter()
            .map(|(param, kind, offset, tensor)| ParamSlice {
                param: *param,
                kind: kind.clone(),
                offset: *offset,
                data: span(tensor),
            })
            .collect();
        let frozen: Vec<Frozen<'_>> = frozen
            .iter()
            .map(|(name, shape, tensor)| Frozen {
                name: name.clone(),
                shape: shape.clone(),
                data: span(tensor),
            })
            .collect();
        // SAFETY: as above.
        let tensors: Vec<TensorSource<'_>> =
            buffers.iter().map(|tensor| unsafe { tensor.source() }).collect();
        let rule = if fail_on_different_tags { TagRule::Fail } else { TagRule::FirstRank };
        let request = SaveRequest {
            dir: &save_dir,
            tag: &tag,
            rule,
            save_latest,
            weights: &weights,
            hypers: &hypers,
            slices: &slices,
            frozen: &frozen,
            exclude_frozen,
            tied: &tied,
            tensors: &tensors,
            blobs: &blobs,
            face,
        };
        let saved = engine.on_host(None, Afterwards::Forget, |engine| engine.save_checkpoint(&request))?;
        let Saved { tags_differ, folder, behind, retired, .. } = saved;
        let Retired { removed, problems } = retired;
        Ok::<_, deepspeed_engine::EngineError>(PySavedCheckpoint {
            tags_differ,
            folder,
            behind,
            removed,
            problems,
        })
    })
}

/// A checkpoint of any format, open for reading.
#[pyclass(frozen, name = "LoadedCheckpoint", module = "deepspeed._native")]
struct PyLoadedCheckpoint {
    checkpoint: Box<dyn Source>,
    rank: Rank,
}

#[pymethods]
impl PyLoadedCheckpoint {
    /// The tag.
    #[getter]
    fn tag(&self) -> &str {
        self.checkpoint.tag()
    }

    /// The checkpoint's folder.
    #[getter]
    fn folder(&self) -> PathBuf {
        self.checkpoint.folder().to_owned()
    }

    /// The format in words.
    #[getter]
    fn format(&self) -> String {
        self.checkpoint.format()
    }

    /// Number of ranks that saved it.
    #[getter]
    fn world_size(&self) -> usize {
        self.checkpoint.world()
    }

    /// What Python saved as JSON.
    fn face(&self) -> String {
        self.checkpoint.state()["face"].to_string()
    }

    /// This rank's blob, or rank 0's where fewer ranks saved.
    fn blob<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let read = |rank| {
            self.checkpoint.blob(rank, name).map_err(|error| CheckpointError::new_err(error.to_string()))
        };
        let bytes = match read(self.rank)? {
            None if self.rank.index() >= self.checkpoint.world() => read(Rank(0))?,
            found => found,
        };
        Ok(bytes.map(|bytes| PyBytes::new(py, &bytes)))
    }

    /// The pickle in which this rank's client state lies among other things, and its keys there; None in a format that
    /// keeps it apart.
    fn trusted_file(&self) -> Option<(PathBuf, Vec<String>)> {
        let rank = if self.rank.index() < self.checkpoint.world() { self.rank } else { Rank(0) };
        self.checkpoint.trusted_file(rank).map(|file| (file.path, file.keys))
    }

    /// Name, shape and torch's dtype of every parameter whose weights are there.
    fn weights(&self) -> Vec<(String, Vec<usize>, &'static str)> {
        let params = self.checkpoint.params().iter();
        let known = params.filter(|param| self.checkpoint.dtype(&param.name, kind::WEIGHT).is_some());
        known.filter_map(|it| Some((it.name.clone(), it.shape.clone(), it.dtype.torch_name()?))).collect()
    }

    /// Other names of parameters: (other name, name).
    fn tied(&self) -> Vec<(String, String)> {
        self.checkpoint.tied().to_vec()
    }

    /// Reads the elements of a parameter's `kind` ("exp_avg", "master", ...) from `offset` on into `tensor`, cast to its
    /// dtype. False if that was not saved.
    fn read(
        &self,
        py: Python<'_>,
        name: &str,
        kind: &str,
        offset: usize,
        tensor: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        if self.checkpoint.dtype(name, kind).is_none() {
            return Ok(false);
        }
        let target = TensorArg::read(tensor, name)?;
        py.detach(|| {
            // SAFETY: the caller holds the tensor for the length of this call and leaves it alone.
            let mut span = unsafe { target.span_mut() };
            read_cast(&*self.checkpoint, name, kind, offset..offset + span.len(), &mut span)
        })
        .map_err(|error| CheckpointError::new_err(error.to_string()))?;
        Ok(true)
    }

    /// Name, shape and torch's dtype of every buffer.
    fn buffers(&self) -> Vec<(String, Vec<usize>, &'static str)> {
        let tensors = self.checkpoint.tensors().into_iter();
        tensors.filter_map(|it| Some((it.name, it.shape, it.dtype.torch_name()?))).collect()
    }

    /// The bytes of a buffer.
    fn buffer<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let bytes =
            self.checkpoint.tensor(name).map_err(|error| CheckpointError::new_err(error.to_string()))?;
        Ok(PyBytes::new(py, &bytes))
    }
}

/// Opens a checkpoint of any format; None if there is no `latest` that names one. Collective.
#[pyfunction]
#[pyo3(signature = (engine, *, load_dir, tag, universal))]
fn open_checkpoint(
    py: Python<'_>,
    mut engine: PyRefMut<'_, PyEngine>,
    load_dir: PathBuf,
    tag: Option<String>,
    universal: bool,
) -> PyResult<Option<PyLoadedCheckpoint>> {
    let engine = &mut engine.engine;
    let rank = engine.group().rank();
    let checkpoint = enter(py, || engine.open_checkpoint(&load_dir, tag.as_deref(), universal))?;
    Ok(checkpoint.map(|checkpoint| PyLoadedCheckpoint { checkpoint, rank }))
}

/// Loads a checkpoint into the engine, its parameters (with `weights`) and the `frozen` ones. Collective.
#[pyfunction]
#[pyo3(signature = (engine, checkpoint, *, weights, module_only, optimizer_states, strict, param_groups, frozen))]
fn load_checkpoint(
    py: Python<'_>,
    mut engine: PyRefMut<'_, PyEngine>,
    checkpoint: &PyLoadedCheckpoint,
    weights: bool,
    module_only: bool,
    optimizer_states: bool,
    strict: bool,
    param_groups: Vec<Bound<'_, PyMapping>>,
    frozen: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let hypers = hypers(engine.kind(), &param_groups)?;
    let options = LoadOptions { weights, module_only, optimizer_states, strict };
    let weights = engine.weights(py)?;
    let frozen = frozen_arguments(frozen)?;
    let engine = &mut engine.engine;
    enter(py, || {
        // SAFETY: Python holds all these tensors for the length of this call, torch leaves them alone meanwhile, and
        // no two of them share memory: tied parameters are in the list once.
        let span = |tensor: &TensorArg| unsafe { tensor.span_mut() };
        let mut weights: Vec<SpanMut<'_>> = weights.iter().map(span).collect();
        let mut frozen: Vec<(String, SpanMut<'_>)> =
            frozen.iter().map(|(name, _, tensor)| (name.clone(), span(tensor))).collect();
        engine.on_host(None, Afterwards::WriteBack, |engine| {
            engine.load_from(&*checkpoint.checkpoint, options, &hypers, &mut weights, &mut frozen)
        })
    })
}

/// Parameter, kind, offset and memory of each slice of a client's optimizer.
fn slice_arguments(
    slices: &[(usize, String, usize, Bound<'_, PyAny>)],
    params: usize,
) -> PyResult<Vec<(ParamId, String, usize, TensorArg)>> {
    slices
        .iter()
        .map(|(param, kind, offset, tensor)| {
            if *param >= params {
                return Err(PyValueError::new_err(format!("there is no parameter {param} of {params}")));
            }
            Ok((ParamId::from_index(*param), kind.clone(), *offset, TensorArg::read(tensor, kind)?))
        })
        .collect()
}

/// Name, shape and memory of each frozen parameter.
fn frozen_arguments(frozen: &Bound<'_, PyDict>) -> PyResult<Vec<(String, Vec<usize>, TensorArg)>> {
    frozen
        .iter()
        .map(|(name, tensor)| {
            let name: String = name.extract()?;
            let shape = tensor.getattr(intern!(tensor.py(), "shape"))?.extract()?;
            let argument = TensorArg::read(&tensor, &name)?;
            Ok((name, shape, argument))
        })
        .collect()
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PySavedCheckpoint>()?;
    module.add_class::<PyLoadedCheckpoint>()?;
    module.add_function(wrap_pyfunction!(wait_for_saves, module)?)?;
    module.add_function(wrap_pyfunction!(save_checkpoint, module)?)?;
    module.add_function(wrap_pyfunction!(open_checkpoint, module)?)?;
    module.add_function(wrap_pyfunction!(load_checkpoint, module)?)?;
    Ok(())
}
