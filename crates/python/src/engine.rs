//! The training engine for Python: reads tensors off torch at three moments of a step, and leaves the rest to Rust.

use deepspeed_core::{DType, ParamSpec, Span, SpanMut};
use deepspeed_engine::{Engine, EngineError, OptimizerChoice, Plan, Settings, StepReport, loss_scaler};
use deepspeed_monitor::Phase;
use deepspeed_optim::{Hyper, LossScaler, OptimizerKind};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    intern,
    prelude::*,
    types::{PyDict, PyMapping},
};

use crate::{
    config::PyConfig,
    enter::enter,
    errors::{DeepSpeedError, IntoPyErr},
    group::PyGroup,
    ops::hyper_of,
    tensors::{TensorArg, dtype_of},
};

/// The engine of one rank, and the torch parameters it trains.
#[pyclass(name = "Engine", module = "deepspeed._native")]
pub(crate) struct PyEngine {
    pub(crate) engine: Engine,
    names: Vec<String>,
    parameters: Vec<Py<PyAny>>,
    kind: Option<String>,
    plan: Plan,
}

/// What a call of `step` did.
#[pyclass(frozen, name = "StepReport", module = "deepspeed._native", get_all)]
pub(crate) struct PyStepReport {
    boundary: bool,
    applied: bool,
    skipped: Option<String>,
    unused: Vec<String>,
    line: Option<String>,
}

impl From<StepReport> for PyStepReport {
    fn from(report: StepReport) -> Self {
        let StepReport { boundary, applied, skipped, unused, line } = report;
        Self { boundary, applied, skipped, unused, line }
    }
}

#[pymethods]
impl PyEngine {
    /// An engine for `tensors` (torch parameters as they are before they are cast to `dtypes`), named `names`, in the
    /// optimizer's parameter groups `groups`. `optimizer` is the kind of an optimizer of ours, `client` the class of one
    /// that is not.
    #[new]
    #[pyo3(signature = (*, config, names, tensors, dtypes, groups, optimizer, client, param_groups, group,
                        threads))]
    #[expect(clippy::too_many_arguments, reason = "named arguments of the one caller")]
    fn new(
        py: Python<'_>,
        config: &PyConfig,
        names: Vec<String>,
        tensors: Vec<Bound<'_, PyAny>>,
        dtypes: Vec<Bound<'_, PyAny>>,
        groups: Vec<usize>,
        optimizer: Option<String>,
        client: Option<String>,
        param_groups: Vec<Bound<'_, PyMapping>>,
        group: &PyGroup,
        threads: usize,
    ) -> PyResult<Self> {
        let world = group.inner().world();
        let origin = format!("{world} rank{} in the process group", if world == 1 { "" } else { "s" });
        let settings =
            Settings::from_config(&config.config, world, &origin, threads).map_err(IntoPyErr::into_py_err)?;
        let scaler = loss_scaler(&config.config).map_err(IntoPyErr::into_py_err)?;
        let mut specs = Vec::with_capacity(names.len());
        let mut arguments = Vec::with_capacity(names.len());
        for (((name, tensor), dtype), group) in names.iter().zip(&tensors).zip(&dtypes).zip(groups) {
            let dtype = dtype_of(dtype)?.ok_or_else(|| {
                PyTypeError::new_err(format!(
                    "parameter `{name}` would be trained as {dtype}; the engine trains fp32, bf16 and fp16"
                ))
            })?;
            let shape = tensor.getattr(intern!(py, "shape"))?.extract::<Vec<usize>>()?;
            specs.push(ParamSpec { name: name.clone(), shape, dtype, group });
            arguments.push(TensorArg::read(tensor, name)?);
        }
        let choice = match (&optimizer, client) {
            (Some(kind), _) => OptimizerChoice::Native(kind_of(kind)?),
            (None, Some(class)) => OptimizerChoice::Client { class },
            (None, None) => OptimizerChoice::Absent,
        };
        let hypers = hypers(optimizer.as_deref(), &param_groups)?;
        let group = group.inner().clone();
        let engine = enter(py, move || {
            let mut engine = Engine::new(settings, specs, choice, &hypers, scaler, group)?;
            // SAFETY: the caller holds the tensors for the length of this call, and nobody writes to them.
            let spans: Vec<Span<'_>> = arguments.iter().map(|tensor| unsafe { tensor.span() }).collect();
            engine.load_masters(&spans)?;
            Ok::<_, EngineError>(engine)
        })?;
        let parameters = tensors.into_iter().map(Bound::unbind).collect();
        Ok(Self { engine, names, parameters, kind: optimizer, plan: Plan::Accumulate })
    }

    /// A phase of the step begins ("forward", "backward"), or ends (None).
    fn mark(&mut self, phase: Option<&str>) -> PyResult<()> {
        let phase = match phase {
            None => None,
            Some("forward") => Some(Phase::Forward),
            Some("backward") => Some(Phase::Backward),
            Some(other) => return Err(PyValueError::new_err(format!("unknown phase {other:?}"))),
        };
        self.engine.mark(phase);
        Ok(())
    }

    /// The factor for the loss before backward: the loss scale, divided by the accumulation steps if `average`.
    fn loss_factor(&self, average: bool) -> f32 {
        self.engine.loss_factor(average)
    }

    /// Whether the loss of this micro-batch will be shown.
    fn wants_loss(&self) -> bool {
        self.engine.wants_loss()
    }

    /// The loss to show.
    fn set_loss(&mut self, loss: f64) {
        self.engine.set_loss(loss);
    }

    /// Takes the gradients off the parameters. `scaled` and `averaged` say whether the loss was multiplied by the loss
    /// scale and divided by the accumulation steps.
    fn end_backward(&mut self, py: Python<'_>, scaled: bool, averaged: bool) -> PyResult<()> {
        self.collect(py, scaled, averaged)
    }

    /// Takes gradients that no `end_backward` has seen, as of a backward pass that did not go through the module's
    /// output.
    fn collect_leftovers(&mut self, py: Python<'_>) -> PyResult<()> {
        let attribute = intern!(py, "grad");
        let mut any = false;
        for parameter in &self.parameters {
            any |= !parameter.bind(py).getattr(attribute)?.is_none();
        }
        if any { self.collect(py, false, false) } else { Ok(()) }
    }

    /// One step of an optimizer of ours with the options in `param_groups`.
    fn step(&mut self, py: Python<'_>, param_groups: Vec<Bound<'_, PyMapping>>) -> PyResult<PyStepReport> {
        let hypers = hypers(self.kind.as_deref(), &param_groups)?;
        let weights = self.weights(py)?;
        let engine = &mut self.engine;
        let report = enter(py, || {
            // SAFETY: `self` holds the parameters, torch leaves them alone during this call, and tied ones are in the
            // list once, so no two spans overlap.
            let mut spans: Vec<SpanMut<'_>> =
                weights.iter().map(|tensor| unsafe { tensor.span_mut() }).collect();
            engine.step(&hypers, &mut spans)
        })?;
        Ok(report.into())
    }

    /// Ends a micro-batch of an engine without optimizer.
    fn step_without_optimizer(&mut self, py: Python<'_>) -> PyResult<PyStepReport> {
        let engine = &mut self.engine;
        let plan = enter(py, || engine.prepare())?;
        if let Plan::Apply { grad_scale } = plan {
            self.plan = Plan::Apply { grad_scale };
            self.gradients_to_parameters(py)?;
        }
        Ok(self.engine.finish(&plan, 0.0).into())
    }

    /// The first half of a step of a client's optimizer: true if it is to update.
    fn prepare(&mut self, py: Python<'_>) -> PyResult<bool> {
        let engine = &mut self.engine;
        self.plan = enter(py, || engine.prepare())?;
        Ok(matches!(self.plan, Plan::Apply { .. }))
    }

    /// The whole averaged gradients, unscaled and clipped, into `outputs` (fp32 tensors, one per parameter).
    fn gather_gradients(&mut self, py: Python<'_>, outputs: Vec<Bound<'_, PyAny>>) -> PyResult<()> {
        let arguments = read_all(&outputs, &self.names)?;
        let grad_scale = self.grad_scale()?;
        let engine = &mut self.engine;
        enter(py, || {
            // SAFETY: the caller holds the outputs for the length of this call; they are distinct new tensors.
            let mut spans: Vec<SpanMut<'_>> =
                arguments.iter().map(|tensor| unsafe { tensor.span_mut() }).collect();
            engine.gather_gradients(grad_scale, &mut spans)
        })
    }

    /// Unscales and clips the gradients of this rank's shards where they lie.
    fn scale_gradients(&mut self, py: Python<'_>) -> PyResult<()> {
        let grad_scale = self.grad_scale()?;
        let engine = &mut self.engine;
        py.detach(|| engine.scale_gradients(grad_scale));
        Ok(())
    }

    /// After the client's optimizer has updated the shards' masters: everybody's weights follow.
    fn publish_client(&mut self, py: Python<'_>) -> PyResult<()> {
        let weights = self.weights(py)?;
        let engine = &mut self.engine;
        enter(py, || {
            // SAFETY: as in `step`.
            let mut spans: Vec<SpanMut<'_>> =
                weights.iter().map(|tensor| unsafe { tensor.span_mut() }).collect();
            engine.publish_client(&mut spans)
        })
    }

    /// The second half of a step of a client's optimizer.
    fn finish(&mut self, param_groups: Vec<Bound<'_, PyMapping>>) -> PyResult<PyStepReport> {
        let rate = match param_groups.first() {
            Some(group) if group.contains("lr")? => group.get_item("lr")?.extract()?,
            _ => 0.0,
        };
        let plan = std::mem::replace(&mut self.plan, Plan::Accumulate);
        Ok(self.engine.finish(&plan, rate).into())
    }

    /// Whether a client's optimizer works on whole parameters.
    fn client_sees_whole(&self) -> bool {
        self.engine.client_sees_whole()
    }

    /// For a client's optimizer on shards: per fragment of a parameter, (index of the parameter, first element in it,
    /// number of elements, address of its fp32 gradients, address of its fp32 masters or None where the parameter's
    /// own memory is the master).
    fn client_shards(&mut self) -> Vec<(usize, usize, usize, usize, Option<usize>)> {
        let layout = self.engine.layout().clone();
        let rank = self.engine.group().rank();
        let mut out = Vec::new();
        for (unit, (mut gradient, mut master)) in layout.units.iter().zip(self.engine.shard_memory()) {
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

    /// Makes the model's weights, as they are now, the fp32 masters; or `masters`, one tensor per parameter.
    #[pyo3(signature = (masters=None))]
    fn load_masters(&mut self, py: Python<'_>, masters: Option<Vec<Bound<'_, PyAny>>>) -> PyResult<()> {
        let values = match &masters {
            Some(masters) => read_all(masters, &self.names)?,
            None => self.weights(py)?,
        };
        let engine = &mut self.engine;
        enter(py, || {
            // SAFETY: `self` or the caller holds the tensors and torch leaves them alone during this call.
            let spans: Vec<Span<'_>> = values.iter().map(|tensor| unsafe { tensor.span() }).collect();
            engine.load_masters(&spans)
        })
    }

    /// Forgets the gradients of the current accumulation.
    fn discard_gradients(&mut self) {
        self.engine.discard_gradients();
    }

    /// Whether the current micro-batch is the last before an update.
    fn is_boundary(&self) -> bool {
        self.engine.accumulation().is_boundary()
    }

    /// The caller decides about boundaries from here on.
    fn force_boundary(&mut self, boundary: Option<bool>) {
        self.engine.accumulation_mut().force(boundary);
    }

    /// Enters or leaves a stretch without communication.
    fn suspend(&mut self, suspended: bool) {
        self.engine.accumulation_mut().suspend(suspended);
    }

    /// micro_steps, global_steps, global_samples, skipped_steps, optimizer_steps.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = self.engine.counters();
        let dict = PyDict::new(py);
        dict.set_item("micro_steps", counters.micro_steps)?;
        dict.set_item("global_steps", counters.global_steps)?;
        dict.set_item("global_samples", counters.global_samples)?;
        dict.set_item("skipped_steps", counters.skipped_steps)?;
        dict.set_item("optimizer_steps", counters.optimizer_steps)?;
        Ok(dict)
    }

    /// The last boundary's global gradient norm.
    fn norm(&self) -> Option<f64> {
        self.engine.norm()
    }

    /// Whether the last boundary updated the weights.
    fn was_applied(&self) -> bool {
        self.engine.was_applied()
    }

    /// By what the loss is multiplied.
    fn loss_scale(&self) -> f64 {
        self.engine.scaler().scale()
    }

    /// Whether the loss scale adapts.
    fn dynamic_loss_scale(&self) -> bool {
        self.engine.scaler().is_dynamic()
    }

    /// Fixes the loss scale.
    fn override_loss_scale(&mut self, loss_scale: f64) -> PyResult<()> {
        if !(loss_scale > 0.0 && loss_scale.is_finite()) {
            return Err(PyValueError::new_err(format!(
                "a loss scale of {loss_scale}: it must be above 0 and finite"
            )));
        }
        *self.engine.scaler_mut() = LossScaler::fixed(loss_scale);
        Ok(())
    }

    /// (train_batch_size, micro batch size, accumulation steps).
    fn batch(&self) -> (u64, u64, u64) {
        let settings = self.engine.settings();
        (settings.train_batch_size, settings.micro_batch_size, settings.accumulation_steps)
    }

    /// Changes the samples per update; the accumulation steps follow.
    fn set_train_batch_size(&mut self, train_batch_size: u64) -> PyResult<()> {
        self.engine.set_train_batch_size(train_batch_size).map_err(IntoPyErr::into_py_err)
    }

    /// Changes the samples per rank and micro-batch; the samples per update follow.
    fn set_micro_batch_size(&mut self, micro_batch_size: u64) -> PyResult<()> {
        self.engine.set_micro_batch_size(micro_batch_size).map_err(IntoPyErr::into_py_err)
    }

    /// Counters and loss scale, as JSON.
    fn state_json(&self) -> String {
        self.engine.state().to_string()
    }

    /// Takes back what `state_json` gave.
    fn load_state_json(&mut self, state: &str) -> PyResult<()> {
        let state = serde_json::from_str(state).map_err(|error| PyValueError::new_err(error.to_string()))?;
        self.engine.load_state(&state).map_err(IntoPyErr::into_py_err)
    }

    /// What the engine is, in one line.
    fn summary(&self) -> String {
        self.engine.summary()
    }

    /// The ZeRO stage.
    fn stage(&self) -> u8 {
        self.engine.settings().stage.number()
    }
}

impl PyEngine {
    /// The kind of an optimizer of ours.
    pub(crate) fn kind(&self) -> Option<&str> {
        self.kind.as_deref()
    }

    fn grad_scale(&self) -> PyResult<f32> {
        match self.plan {
            Plan::Apply { grad_scale } => Ok(grad_scale),
            Plan::Accumulate | Plan::Skip { .. } => {
                Err(DeepSpeedError::new_err("there are no gradients to step on: call prepare() first"))
            }
        }
    }

    /// The parameters' memory, read afresh: a client may have replaced it.
    pub(crate) fn weights(&self, py: Python<'_>) -> PyResult<Vec<TensorArg>> {
        let parameters = self.parameters.iter().zip(&self.names);
        parameters.map(|(parameter, name)| TensorArg::read(parameter.bind(py), name)).collect()
    }

    fn collect(&mut self, py: Python<'_>, scaled: bool, averaged: bool) -> PyResult<()> {
        let attribute = intern!(py, "grad");
        let mut tensors = Vec::with_capacity(self.parameters.len());
        for (parameter, name) in self.parameters.iter().zip(&self.names) {
            let gradient = parameter.bind(py).getattr(attribute)?;
            tensors.push(if gradient.is_none() { None } else { Some(dense(gradient, name)?) });
        }
        let factor = self.engine.missing_factor(scaled, averaged);
        let engine = &mut self.engine;
        let arguments: Vec<Option<TensorArg>> =
            tensors.iter().map(|it| it.as_ref().map(|(_, arg)| *arg)).collect();
        enter(py, || {
            // SAFETY: `tensors` holds the gradients until this call is over, and nobody writes to them: the backward
            // pass that made them is over.
            let span = |tensor: &TensorArg| unsafe { tensor.span() };
            let spans: Vec<Option<Span<'_>>> =
                arguments.iter().map(|tensor| tensor.as_ref().map(span)).collect();
            engine.end_backward(&spans, factor)
        })?;
        for (parameter, tensor) in self.parameters.iter().zip(&tensors) {
            if tensor.is_some() {
                parameter.bind(py).setattr(attribute, py.None())?;
            }
        }
        Ok(())
    }

    /// Puts the averaged gradients where a client that steps by itself looks for them.
    fn gradients_to_parameters(&mut self, py: Python<'_>) -> PyResult<()> {
        let torch = py.import("torch")?;
        let options = PyDict::new(py);
        options.set_item("dtype", torch.getattr("float32")?)?;
        let parameters = self.parameters.iter().map(|parameter| parameter.bind(py));
        let outputs = parameters
            .map(|parameter| torch.call_method("empty_like", (parameter,), Some(&options)))
            .collect::<PyResult<Vec<_>>>()?;
        self.gather_gradients(py, outputs.clone())?;
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

fn read_all(tensors: &[Bound<'_, PyAny>], names: &[String]) -> PyResult<Vec<TensorArg>> {
    tensors.iter().zip(names).map(|(tensor, name)| TensorArg::read(tensor, name)).collect()
}

fn kind_of(name: &str) -> PyResult<OptimizerKind> {
    let known = OptimizerKind::from_name(name);
    known.map(|(kind, _)| kind).ok_or_else(|| PyValueError::new_err(format!("unknown optimizer {name:?}")))
}

/// The hyperparameters in torch's parameter groups; none for an optimizer that is not ours.
pub(crate) fn hypers(kind: Option<&str>, param_groups: &[Bound<'_, PyMapping>]) -> PyResult<Vec<Hyper>> {
    let Some(kind) = kind else { return Ok(Vec::new()) };
    param_groups.iter().map(|group| hyper_of(kind, group)).collect()
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyEngine>()?;
    module.add_class::<PyStepReport>()?;
    Ok(())
}
