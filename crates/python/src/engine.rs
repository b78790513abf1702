//! The training engine for Python: reads tensors off torch at three moments of a step, and leaves the rest to Rust.

use deepspeed_core::{DType, ParamId, ParamSpec, Span, SpanMut, UnitId};
use std::sync::Arc;

use deepspeed_engine::{
    Afterwards, Device, Engine, EngineError, Gradients, OptimizerChoice, Plan, Settings, SharedAddresses,
    StepReport, loss_scaler,
};
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
    device::{ClientTensors, TorchDevice},
    enter::enter,
    errors::{DeepSpeedError, IntoPyErr},
    gathering::is_released,
    group::PyGroup,
    memory_plan::{self, MemoryPlan, Surroundings},
    ops::hyper_of,
    shared_weights::PySharedWeights,
    tensors::{TensorArg, dtype_of},
};

/// The engine of one rank, and the torch parameters it trains.
#[pyclass(name = "Engine", module = "deepspeed._native", weakref)]
pub(crate) struct PyEngine {
    pub(crate) engine: Engine,
    /// Where parameters are, if not in the host's memory.
    pub(crate) device: Option<Arc<TorchDevice>>,
    names: Vec<String>,
    parameters: Vec<Py<PyAny>>,
    /// By unit, the indices of its parameters.
    units: Vec<Vec<usize>>,
    kind: Option<String>,
    plan: Plan,
    memory: MemoryPlan,
    /// What is worth a warning about the plan.
    memory_warning: Option<String>,
}

/// By parameter, an address in shared weights; none for one without elements.
type Addresses = Vec<Option<usize>>;

/// What a call of `step` did.
#[pyclass(frozen, name = "StepReport", module = "deepspeed._native", get_all)]
pub(crate) struct PyStepReport {
    boundary: bool,
    applied: bool,
    skipped: Option<String>,
    unused: Vec<String>,
    line: Option<String>,
    checkpoint: Option<String>,
}

impl From<StepReport> for PyStepReport {
    fn from(report: StepReport) -> Self {
        let StepReport { boundary, applied, skipped, unused, line, checkpoint } = report;
        Self { boundary, applied, skipped, unused, line, checkpoint }
    }
}

#[pymethods]
impl PyEngine {
    /// An engine for `tensors` (torch parameters as they are before they are cast to `dtypes`), named `names`, in the
    /// optimizer's parameter groups `groups`. `optimizer` is the kind of an optimizer of ours, `client` the class of one
    /// that is not. `frozen` are the parameters that are not trained, by name with their dtype, where the stage shards
    /// them. With `device`, a `torch.device`, parameters and the engine's memory are there; `direct` says that
    /// torch.distributed moves its memory itself. Collective.
    #[new]
    #[pyo3(signature = (*, config, names, tensors, dtypes, groups, frozen, optimizer, client, param_groups, group,
                        threads, ranks_per_host, device=None, direct=false))]
    #[expect(clippy::too_many_arguments, reason = "named arguments of the one caller")]
    fn new(
        py: Python<'_>,
        config: &PyConfig,
        names: Vec<String>,
        tensors: Vec<Bound<'_, PyAny>>,
        dtypes: Vec<Bound<'_, PyAny>>,
        groups: Vec<usize>,
        frozen: Vec<(String, Bound<'_, PyAny>, Bound<'_, PyAny>)>,
        optimizer: Option<String>,
        client: Option<String>,
        param_groups: Vec<Bound<'_, PyMapping>>,
        group: &PyGroup,
        threads: usize,
        ranks_per_host: usize,
        device: Option<&Bound<'_, PyAny>>,
        direct: bool,
    ) -> PyResult<Self> {
        let world = group.inner().world();
        let origin = format!("{world} rank{} in the process group", if world == 1 { "" } else { "s" });
        let settings =
            Settings::from_config(&config.config, world, &origin, threads).map_err(IntoPyErr::into_py_err)?;
        // What the host's memory is to hold of values that are elsewhere.
        let wanted = device.is_none() || settings.state_on_host;
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
        let device = device
            .map(|device| {
                let parameters = all.iter().map(|tensor| tensor.clone().unbind()).collect();
                TorchDevice::new(device, parameters, group.clone(), direct).map(Arc::new)
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
        }
        let parameters = tensors.into_iter().map(Bound::unbind).collect();
        let units = engine.unit_params();
        let plan = Plan::Accumulate;
        Ok(Self { engine, device, names, parameters, units, kind: optimizer, plan, memory, memory_warning })
    }

    /// On a device, below stage 3: makes the parameters views of the flat weights.
    fn adopt_parameters(&self, py: Python<'_>) -> PyResult<()> {
        self.device.as_ref().map_or(Ok(()), |device| device.adopt_parameters(py))
    }

    /// Moves state of these kinds off the device, until `reload_states`. False where there is no device.
    fn offload_states(&self, py: Python<'_>, kinds: Vec<String>) -> PyResult<bool> {
        let Some(device) = &self.device else { return Ok(false) };
        device.evict(py, &kinds).map(|()| true)
    }

    /// Takes `offload_states` back.
    fn reload_states(&self, py: Python<'_>) -> PyResult<()> {
        self.device.as_ref().map_or(Ok(()), |device| device.reload(py))
    }

    /// On a device that has the state: for a client's optimizer on shards, per fragment of a parameter, (index of the
    /// parameter, first element in it, number of elements, fp32 gradients, fp32 masters). None elsewhere.
    fn client_tensors(&self, py: Python<'_>) -> PyResult<Option<ClientTensors>> {
        let device = self.device.as_ref().filter(|_| self.engine.state_on_device());
        device.map(|device| device.client_tensors(py)).transpose()
    }

    /// On a device, at stage 3: by parameter, trained and frozen, this rank's part of its weights. None elsewhere.
    fn own_tensors(&self, py: Python<'_>) -> PyResult<Option<Vec<Py<PyAny>>>> {
        self.device.as_ref().map(|device| device.own_parts(py)).transpose()
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
        let all: Vec<usize> = (0..self.parameters.len()).collect();
        self.lend_gradients(py, &all, scaled, averaged, |engine, gradients, factor| {
            engine.end_backward(gradients, factor)
        })
    }

    /// By unit, the indices of its parameters.
    fn units(&self) -> Vec<Vec<usize>> {
        self.units.clone()
    }

    /// Called during backward when a gradient of `unit` has appeared. If those that are expected are all there, the unit
    /// is reduced, or will be when its turn comes; else the index of a parameter that still lacks one is returned.
    fn unit_complete(
        &mut self,
        py: Python<'_>,
        unit: usize,
        scaled: bool,
        averaged: bool,
    ) -> PyResult<Option<usize>> {
        if !self.engine.reduces_early() {
            return Ok(None);
        }
        let Some(members) = self.units.get(unit) else {
            return Err(PyValueError::new_err(format!("there is no unit {unit} of {}", self.units.len())));
        };
        let attribute = intern!(py, "grad");
        for index in members {
            let expected = self.engine.expects_gradient(ParamId::from_index(*index));
            if expected && self.parameters[*index].bind(py).getattr(attribute)?.is_none() {
                return Ok(Some(*index));
            }
        }
        let due = self.engine.complete_unit(UnitId::from_index(unit));
        if !due.is_empty() {
            let members: Vec<usize> =
                due.iter().flat_map(|unit| self.units[unit.index()].iter().copied()).collect();
            self.lend_gradients(py, &members, scaled, averaged, |engine, gradients, factor| {
                engine.reduce_units(&due, gradients, factor)
            })?;
        }
        Ok(None)
    }

    /// At stage 3 on one host: what keeps the shared weights alive, and the addresses of all parameters, trained and
    /// frozen, None for those without elements. None where the framework owns the weights.
    fn shared_weights(&self) -> Option<(PySharedWeights, Addresses, Addresses)> {
        let SharedAddresses { trained, frozen, regions } = self.engine.shared_weights()?;
        Some((PySharedWeights::new(regions.into()), trained, frozen))
    }

    /// Whether parameters are not this rank's own: stage 3.
    fn keeps_weights(&self) -> bool {
        !self.engine.weights_are_whole()
    }

    /// Whether fp32 parameters are the masters themselves, so that there is nothing else to write.
    fn masters_in_place(&self) -> bool {
        !self.engine.keeps_weights()
    }

    /// Whether torch's parameters are gathered from shards: stage 3 where ranks share no memory.
    fn gathers_weights(&self) -> bool {
        self.engine.gathers_weights()
    }

    /// Takes gradients that no `end_backward` has seen, as of a backward pass that did not go through the module's
    /// output.
    fn collect_leftovers(&mut self, py: Python<'_>) -> PyResult<()> {
        let attribute = intern!(py, "grad");
        let mut any = self.engine.pass_has_begun();
        for parameter in &self.parameters {
            any |= !parameter.bind(py).getattr(attribute)?.is_none();
        }
        if any { self.end_backward(py, false, false) } else { Ok(()) }
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

    /// The units of weights in a file that do not stay in memory between uses, each with its last parameter; frozen
    /// parameters are numbered after the trained ones.
    fn units_given_back(&self) -> Vec<(usize, usize)> {
        self.engine.units_given_back()
    }

    /// Gives the memory of such a unit back to the system until it is used again.
    fn give_back_unit(&self, unit: usize) -> PyResult<()> {
        self.engine.give_back_unit(unit).map_err(IntoPyErr::into_py_err)
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

    /// Unscales and clips the gradients of this rank's shards where they lie.
    fn scale_gradients(&mut self, py: Python<'_>) -> PyResult<()> {
        let grad_scale = self.grad_scale()?;
        let engine = &mut self.engine;
        enter(py, || engine.scale_gradients(grad_scale))
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
    fn reload_masters(&mut self, py: Python<'_>, indices: Vec<usize>) -> PyResult<()> {
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

    /// What lies where: the memory plan, and the disk if there is state on one.
    fn memory_block(&self) -> String {
        let mut block = self.memory.block();
        if let Some(disk) = self.engine.offload_summary() {
            block.push('\n');
            block.push_str(&disk);
        }
        block
    }

    /// Why the plan should have been refused, where it was not because of DEEPSPEED_MEMORY_CHECK=warn.
    fn memory_warning(&self) -> Option<String> {
        self.memory_warning.clone()
    }

    /// The memory plan beside what this process takes now.
    fn memory_line(&self, py: Python<'_>) -> Option<String> {
        py.detach(|| self.memory.against_actual())
    }

    /// Gives memory that the first weights took, and nobody holds any more, back to the system.
    #[staticmethod]
    fn give_back_freed(py: Python<'_>) {
        py.detach(memory_plan::give_back_freed);
    }

    /// Waits for a checkpoint that is being written behind training; what became of it, or None. Collective.
    fn finish_save(&mut self, py: Python<'_>) -> PyResult<Option<String>> {
        let engine = &mut self.engine;
        enter(py, || engine.finish_save())
    }

    /// Why the checkpoint that was loaded last without a tag was chosen, and whether that is reason for a warning.
    fn chosen(&self) -> Option<(String, bool)> {
        self.engine.chosen().map(|chosen| (chosen.why.clone(), chosen.unexpected))
    }

    /// As `finish_save`, without the other ranks.
    fn finish_save_alone(&mut self, py: Python<'_>) -> PyResult<()> {
        let engine = &mut self.engine;
        enter(py, || engine.finish_save_alone())
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

    /// The parameters' memory, read afresh: a client may have replaced it. None where the engine keeps the weights.
    pub(crate) fn weights(&self, py: Python<'_>) -> PyResult<Vec<TensorArg>> {
        if self.engine.keeps_weights() { Ok(Vec::new()) } else { self.whole_weights(py) }
    }

    /// The parameters' memory, whoever keeps it.
    fn whole_weights(&self, py: Python<'_>) -> PyResult<Vec<TensorArg>> {
        let parameters = self.parameters.iter().zip(&self.names);
        parameters.map(|(parameter, name)| TensorArg::read(parameter.bind(py), name)).collect()
    }

    /// Hands the gradients of the parameters `members` to `work`, by parameter id, and lets go of them.
    fn lend_gradients(
        &mut self,
        py: Python<'_>,
        members: &[usize],
        scaled: bool,
        averaged: bool,
        work: impl FnOnce(&mut Engine, Gradients<'_, '_>, f32) -> Result<(), EngineError> + Send,
    ) -> PyResult<()> {
        if self.device.is_some() {
            return self.point_at_gradients(py, members, scaled, averaged, work);
        }
        let attribute = intern!(py, "grad");
        let mut tensors = Vec::with_capacity(members.len());
        for index in members {
            let gradient = self.parameters[*index].bind(py).getattr(attribute)?;
            if !gradient.is_none() {
                tensors.push((*index, dense(gradient, &self.names[*index])?));
            }
        }
        let factor = self.engine.missing_factor(scaled, averaged);
        let count = self.parameters.len();
        let engine = &mut self.engine;
        let arguments: Vec<(usize, TensorArg)> =
            tensors.iter().map(|(index, (_, argument))| (*index, *argument)).collect();
        enter(py, || {
            let mut spans: Vec<Option<Span<'_>>> = vec![None; count];
            for (index, tensor) in &arguments {
                // SAFETY: `tensors` holds the gradients until this call is over, and nobody writes to them: they are
                // complete, and the thread that computes gradients is the one that called.
                spans[*index] = Some(unsafe { tensor.span() });
            }
            work(engine, Gradients::Spans(&spans), factor)
        })?;
        for (index, _) in &tensors {
            self.parameters[*index].bind(py).setattr(attribute, py.None())?;
        }
        Ok(())
    }

    /// The same where gradients are on a device, which finds them on the parameters.
    fn point_at_gradients(
        &mut self,
        py: Python<'_>,
        members: &[usize],
        scaled: bool,
        averaged: bool,
        work: impl FnOnce(&mut Engine, Gradients<'_, '_>, f32) -> Result<(), EngineError> + Send,
    ) -> PyResult<()> {
        let attribute = intern!(py, "grad");
        let mut present = vec![false; self.parameters.len()];
        for index in members {
            present[*index] = !self.parameters[*index].bind(py).getattr(attribute)?.is_none();
        }
        let factor = self.engine.missing_factor(scaled, averaged);
        let engine = &mut self.engine;
        enter(py, || work(engine, Gradients::OnDevice(&present), factor))?;
        for (index, _) in present.iter().enumerate().filter(|(_, present)| **present) {
            self.parameters[index].bind(py).setattr(attribute, py.None())?;
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
