//! How the engine comes to be: from torch's parameters to the native engine with its memory filled.

use std::sync::Arc;

use deepspeed_core::{ParamSpec, Span};
use deepspeed_engine::{Device, Engine, EngineError, OptimizerChoice, Plan, Settings, loss_scaler};
use deepspeed_optim::OptimizerKind;
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    intern,
    prelude::*,
    types::PyMapping,
};

use super::{PyEngine, hypers, weights::on_host};
use crate::{
    config::PyConfig,
    device::{Pins, TorchDevice},
    enter::enter,
    errors::IntoPyErr,
    gathering::is_released,
    group::PyGroup,
    memory_plan::{MemoryPlan, Surroundings},
    tensors::{TensorArg, dtype_of},
};

/// What Python gives to make an engine of: see [`PyEngine::new`].
pub(super) struct Given<'a, 'py> {
    pub(super) config: &'a PyConfig,
    pub(super) names: Vec<String>,
    pub(super) tensors: Vec<Bound<'py, PyAny>>,
    pub(super) dtypes: Vec<Bound<'py, PyAny>>,
    pub(super) groups: Vec<usize>,
    pub(super) frozen: Vec<(String, Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    pub(super) optimizer: Option<String>,
    pub(super) client: Option<String>,
    pub(super) param_groups: Vec<Bound<'py, PyMapping>>,
    pub(super) group: &'a PyGroup,
    pub(super) threads: usize,
    pub(super) ranks_per_host: usize,
    pub(super) device: Option<&'a Bound<'py, PyAny>>,
    pub(super) direct: bool,
}

impl PyEngine {
    /// The engine of what is `given`. Collective.
    pub(super) fn construct(py: Python<'_>, given: Given<'_, '_>) -> PyResult<Self> {
        let Given {
            config,
            names,
            tensors,
            dtypes,
            groups,
            frozen,
            optimizer,
            client,
            param_groups,
            group,
            threads,
            ranks_per_host,
            device,
            direct,
        } = given;
        let world = group.inner().world();
        let origin = format!("{world} rank{} in the process group", if world == 1 { "" } else { "s" });
        let settings =
            Settings::from_config(&config.config, world, &origin, threads).map_err(IntoPyErr::into_py_err)?;
        // What the host's memory is to hold of values that are elsewhere.
        let wanted = device.is_none() || settings.state_on_host > 0.0;
        let scaler = loss_scaler(&config.config).map_err(IntoPyErr::into_py_err)?;
        let mut specs = Vec::with_capacity(names.len());
        let mut arguments = Vec::with_capacity(names.len());
        let mut copies = Vec::new();
        for (((name, tensor), dtype), group) in names.iter().zip(&tensors).zip(&dtypes).zip(groups) {
            specs.push(spec_of(name, tensor, dtype, group)?);
            copies.push(on_host(tensor, wanted && device.is_some())?);
            arguments.push(if wanted { present(&copies[copies.len() - 1], name)? } else { None });
        }
        let mut frozen_specs = Vec::with_capacity(frozen.len());
        let mut frozen_arguments = Vec::with_capacity(frozen.len());
        for (name, tensor, dtype) in &frozen {
            frozen_specs.push(spec_of(name, tensor, dtype, 0)?);
            copies.push(on_host(tensor, wanted && device.is_some())?);
            frozen_arguments.push(if wanted { present(&copies[copies.len() - 1], name)? } else { None });
        }
        let choice = match (&optimizer, client) {
            (Some(kind), _) => OptimizerChoice::Native(kind_of(kind)?),
            (None, Some(class)) => OptimizerChoice::Client { class },
            (None, None) => OptimizerChoice::Absent,
        };
        let hypers = hypers(optimizer.as_deref(), &param_groups)?;
        let group = group.inner().clone();
        let config = &config.config;
        let all: Vec<Bound<'_, PyAny>> =
            tensors.iter().cloned().chain(frozen.iter().map(|(_, tensor, _)| tensor.clone())).collect();
        let pins = Pins {
            gradients: config.zero.offload_optimizer.pin_memory,
            weights: config.zero.offload_param.pin_memory,
        };
        let device = device
            .map(|device| {
                let parameters = all.iter().map(|tensor| tensor.clone().unbind()).collect();
                TorchDevice::new(device, parameters, group.clone(), direct, pins).map(Arc::new)
            })
            .transpose()?;
        let device_memory = device.as_ref().map_or(Ok(None), |device| device.memory(py))?;
        let seam = device.clone().map(|device| device as Arc<dyn Device>);
        let (engine, memory, memory_warning) = enter(py, move || {
            let mut engine = Engine::on(seam, settings, specs, frozen_specs, choice, &hypers, scaler, group)?;
            // Large buffers cost nothing until they are written, so this is before the memory is taken.
            let given = arguments.iter().chain(&frozen_arguments).flatten();
            let surroundings = Surroundings {
                ranks_per_host,
                weights_held: given.map(|tensor| tensor.len() * tensor.dtype().size()).sum(),
                state_tensors: engine.state_tensors(),
                device_memory,
            };
            let (memory, warning) = MemoryPlan::agree(config, &engine, surroundings)?;
            engine.take_snapshot_memory();
            engine.lay_out_device()?;
            // SAFETY: the caller holds the tensors for the length of this call, and nobody writes to them.
            let span = |tensor: &TensorArg| unsafe { tensor.span() };
            if arguments.iter().chain(&frozen_arguments).any(Option::is_none) {
                for (number, tensor) in arguments.iter().chain(&frozen_arguments).enumerate() {
                    if let Some(tensor) = tensor {
                        engine.load_weight(number, span(tensor))?;
                    }
                }
                return Ok((engine, memory, warning));
            }
            let spans: Vec<Span<'_>> = arguments.iter().flatten().map(span).collect();
            engine.load_masters(&spans)?;
            if engine.keeps_weights() {
                let frozen: Vec<Span<'_>> = frozen_arguments.iter().flatten().map(span).collect();
                engine.fill_weights(&spans, &frozen)?;
            }
            Ok::<_, EngineError>((engine, memory, warning))
        })?;
        drop(copies);
        if let Some(device) = &device {
            for (number, tensor) in all.iter().enumerate() {
                if !is_released(tensor)? {
                    device.load_weight(py, number, tensor)?;
                }
            }
            engine.give_back_units().map_err(IntoPyErr::into_py_err)?;
        }
        let parameters = tensors.into_iter().map(Bound::unbind).collect();
        let units = engine.unit_params();
        let plan = Plan::Accumulate;
        Ok(Self { engine, device, names, parameters, units, kind: optimizer, plan, memory, memory_warning })
    }
}

/// What the engine knows of a parameter that is to be computed with in `dtype`.
fn spec_of(
    name: &str,
    tensor: &Bound<'_, PyAny>,
    dtype: &Bound<'_, PyAny>,
    group: usize,
) -> PyResult<ParamSpec> {
    let dtype = dtype_of(dtype)?.ok_or_else(|| {
        PyTypeError::new_err(format!(
            "parameter `{name}` would be trained as {dtype}; the engine trains fp32, bf16 and fp16"
        ))
    })?;
    let py = tensor.py();
    let shape = match tensor.getattr_opt(intern!(py, "ds_shape"))? {
        Some(shape) => shape,
        None => tensor.getattr(intern!(py, "shape"))?,
    };
    let shape = shape.extract::<Vec<usize>>()?;
    Ok(ParamSpec { name: name.to_owned(), shape, dtype, group })
}

/// A parameter's memory; none where it is elsewhere and will be loaded later.
fn present(tensor: &Bound<'_, PyAny>, name: &str) -> PyResult<Option<TensorArg>> {
    if is_released(tensor)? { Ok(None) } else { TensorArg::read(tensor, name).map(Some) }
}

fn kind_of(name: &str) -> PyResult<OptimizerKind> {
    let known = OptimizerKind::from_name(name);
    known.map(|(kind, _)| kind).ok_or_else(|| PyValueError::new_err(format!("unknown optimizer {name:?}")))
}
