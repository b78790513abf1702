//! The training engine for Python: reads tensors off torch at three moments of a step, and leaves the rest to Rust.
//!
//! The methods that Python calls are all here, as PyO3 wants them; those that do more than pass on are in the modules below.

mod client;
mod construction;
mod gradients;
mod report;
mod weights;

use std::sync::Arc;

use deepspeed_core::SpanMut;
use deepspeed_engine::{Engine, Plan, SharedAddresses};
use deepspeed_monitor::Phase;
use deepspeed_optim::{Hyper, LossScaler};
use pyo3::{
    exceptions::PyValueError,
    prelude::*,
    types::{PyDict, PyMapping},
};

pub(crate) use self::weights::on_host;
use self::{client::ClientShard, construction::Given, report::PyStepReport};
use crate::{
    config::PyConfig,
    device::{ClientTensors, TorchDevice},
    enter::enter,
    errors::IntoPyErr,
    group::PyGroup,
    memory_plan::{self, MemoryPlan},
    ops::hyper_of,
    shared_weights::PySharedWeights,
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
        let given = Given {
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
        };
        Self::construct(py, given)
    }

    /// On a device, below stage 3: makes the parameters views of the flat weights.
    fn adopt_parameters(&self, py: Python<'_>) -> PyResult<()> {
        self.device.as_ref().map_or(Ok(()), |device| device.adopt_parameters(py))
    }

    /// Moves state of these kinds off the device, to memory that is pinned if `pin`, until `reload_states`. False where there
    /// is no device.
    fn offload_states(&self, py: Python<'_>, kinds: Vec<String>, pin: bool) -> PyResult<bool> {
        let Some(device) = &self.device else { return Ok(false) };
        device.evict(py, &kinds, pin).map(|()| true)
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
        self.take_gradients(py, scaled, averaged)
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
        self.take_complete(py, unit, scaled, averaged)
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
        self.take_leftovers(py)
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
        self.whole_gradients(py, outputs)
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
    fn client_shards(&mut self) -> Vec<ClientShard> {
        self.shards_for_client()
    }

    /// Makes the model's weights, as they are now, the fp32 masters; or `masters`, one tensor per parameter.
    #[pyo3(signature = (masters=None))]
    fn load_masters(&mut self, py: Python<'_>, masters: Option<Vec<Bound<'_, PyAny>>>) -> PyResult<()> {
        self.set_masters(py, masters)
    }

    /// Makes the weights of the parameters `indices`, as they are now, the fp32 masters. Collective at stage 3.
    fn reload_masters(&mut self, py: Python<'_>, indices: Vec<usize>) -> PyResult<()> {
        self.refresh_masters(py, indices)
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
