//! The engine: one training step after another.

use std::{sync::Arc, time::Instant};

use deepspeed_checkpoint::Chosen;
use deepspeed_comm::Group;
use deepspeed_core::{Layout, ParamSpec, Rank, SpanMut, UnitId};
use deepspeed_kernels::parallel::Workers;
use deepspeed_monitor::{Counters, Phase, PhaseTimes, Progress, StepLine, Stopwatch};
use deepspeed_optim::{Hyper, LossScaler, OptimizerKind, state_names};
use deepspeed_zero::{
    AlreadyUpdated, Exchange, LocalAccumulator, OffloadedState, Policy, Publication, ReductionOrder,
    Residency, ShardUpdate, UnitShard, Weights, gather_gradients, units_within,
};

use crate::{
    Accumulation, Decision, Device, EngineError, Settings,
    checkpoint::{Memory, Saving},
    client::{check_client, has_state_for_a_disk},
    decide,
    delivery::Delivery,
    nonfinite,
    sharded_weights::{Home, ShardedWeights, give_back},
    update::{ElementWise, Lamb, LambInput},
};

/// Who updates the masters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptimizerChoice {
    /// An optimizer of ours.
    Native(OptimizerKind),
    /// The client's own, run by the face between [`Engine::prepare`] and [`Engine::publish_client`].
    Client {
        /// The optimizer's class, as `torch.optim.adamw.AdamW`.
        class: String,
    },
    /// None: the engine only averages gradients (a client that steps by itself) or runs inference.
    Absent,
}

/// What [`Engine::prepare`] found.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Not a boundary: the micro-batch is over, nothing else happens.
    Accumulate,
    /// Gradients are not finite: no update.
    Skip {
        /// Which gradient, in words.
        found: String,
    },
    /// Update with gradients times `grad_scale`.
    Apply {
        /// Undoes the loss scale and clips.
        grad_scale: f32,
    },
}

/// What a call of `step` did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Whether the micro-batch was an accumulation boundary.
    pub boundary: bool,
    /// Whether the optimizer has updated the weights.
    pub applied: bool,
    /// Why not, at a boundary.
    pub skipped: Option<String>,
    /// Parameters that no rank has a gradient for, at the first boundary.
    pub unused: Vec<String>,
    /// The line to show, when one is due.
    pub line: Option<String>,
    /// What became of a checkpoint that is being written behind training, when there is news.
    pub checkpoint: Option<String>,
}

/// The training engine of one rank.
///
/// Every method that communicates is collective: all ranks of the group call it, in the same order.
#[derive(Debug)]
pub struct Engine {
    pub(crate) settings: Settings,
    pub(crate) layout: Arc<Layout>,
    pub(crate) group: Arc<dyn Group>,
    pub(crate) policy: Policy,
    pub(crate) optimizer: OptimizerChoice,
    pub(crate) shards: Vec<UnitShard>,
    /// State tensors of the optimizer.
    pub(crate) states: usize,
    /// Masters and optimizer state of the first units, where they lie on a disk.
    pub(crate) offloaded: Option<OffloadedState>,
    /// The weights, at stage 3, and this rank's shards of them wherever there is a device.
    pub(crate) weights: Option<ShardedWeights>,
    /// What computes, where that is not the host.
    pub(crate) device: Option<Arc<dyn Device>>,
    /// How many units, the first ones, have masters and optimizer state in the host's memory or on its disk; the device has
    /// those of the others, if there is one.
    pub(crate) host_units: usize,
    pub(crate) scaler: LossScaler,
    pub(crate) counters: Counters,
    pub(crate) accumulation: Accumulation,
    pub(crate) exchange: Exchange,
    pub(crate) accumulator: LocalAccumulator,
    pub(crate) delivery: Delivery,
    unused: Vec<String>,
    pub(crate) order: ReductionOrder,
    /// By unit id: whether the shard holds gradients of the current accumulation.
    pub(crate) reduced: Vec<bool>,
    pub(crate) norm: Option<f64>,
    pub(crate) applied: bool,
    loss: Option<f64>,
    pub(crate) workers: Workers,
    /// A save that goes on behind training.
    pub(crate) saving: Option<Saving>,
    /// What snapshots are copied into.
    pub(crate) snapshots: Memory,
    news: Option<String>,
    /// What was loaded without being asked for by name.
    pub(crate) chosen: Option<Chosen>,
    watch: Stopwatch,
    /// What the last step line said of the time, and of how many steps.
    pub(crate) told: Option<(PhaseTimes, u64)>,
    window: Window,
    /// Tells the launcher which step this is, where one asks.
    progress: Option<Progress>,
}

/// What an update that needs a pass of its own before it works on.
struct UpdateParts<'a> {
    layout: &'a Layout,
    count: usize,
    shards: &'a mut [UnitShard],
    offloaded: Option<&'a mut OffloadedState>,
    group: &'a dyn Group,
}

/// Where the last step line ended.
#[derive(Debug)]
struct Window {
    since: Instant,
    samples: u64,
    steps: u64,
}

impl Engine {
    /// An engine for `params` (the trainable ones, in registration order, the same on every rank) and, at stage 3,
    /// `frozen` (the others). Collective at stage 3.
    ///
    /// `hypers` are the optimizer's parameter groups, which decide how many state tensors there are.
    ///
    /// # Errors
    /// [`EngineError::Layout`]; [`EngineError::Comm`] where memory for the weights is refused.
    pub fn new(
        settings: Settings,
        params: Vec<ParamSpec>,
        frozen: Vec<ParamSpec>,
        optimizer: OptimizerChoice,
        hypers: &[Hyper],
        scaler: LossScaler,
        group: Arc<dyn Group>,
    ) -> Result<Self, EngineError> {
        Self::on(None, settings, params, frozen, optimizer, hypers, scaler, group)
    }

    /// An engine whose gradients, weights and, unless the settings keep them on the host, masters and optimizer state lie
    /// on `device`, if there is one; else as [`Engine::new`]. [`Engine::lay_out_device`] takes the device's memory.
    ///
    /// # Errors
    /// As [`Engine::new`]; [`EngineError::Device`].
    pub fn on(
        device: Option<Arc<dyn Device>>,
        settings: Settings,
        params: Vec<ParamSpec>,
        frozen: Vec<ParamSpec>,
        optimizer: OptimizerChoice,
        hypers: &[Hyper],
        scaler: LossScaler,
        group: Arc<dyn Group>,
    ) -> Result<Self, EngineError> {
        let layout = Layout::new(params, group.world(), settings.unit_len)?;
        let native = matches!(optimizer, OptimizerChoice::Native(_));
        let states = match &optimizer {
            OptimizerChoice::Native(_) => {
                hypers.iter().map(|hyper| state_names(hyper).len()).max().unwrap_or(0)
            }
            OptimizerChoice::Client { .. } | OptimizerChoice::Absent => 0,
        };
        let policy = Policy::new(settings.stage, native);
        if let OptimizerChoice::Client { class } = &optimizer {
            check_client(class, policy.state, settings.allow_untested_optimizer)?;
        }
        let exchange = Exchange::new(
            group.world(),
            settings.communication_dtype,
            settings.accumulation_dtype,
            settings.prescale_gradients,
            settings.gradient_predivide_factor,
        );
        let on_device = device.is_some();
        let sharded = policy.weights == Residency::Shard;
        // Whoever looks at whole parameters, or shares whole units while it updates, takes a unit as one piece.
        let elementwise = matches!(optimizer, OptimizerChoice::Native(kind) if kind.is_elementwise());
        let in_pieces = elementwise && (sharded || on_device || group.world() == 1);
        let offloaded = match &settings.offload {
            Some(offload) if has_state_for_a_disk(&optimizer)? => {
                Some(OffloadedState::create(&offload.plan(in_pieces), &layout, states)?)
            }
            _ => None,
        };
        let host_units =
            if on_device { units_within(&layout, settings.state_on_host) } else { layout.units.len() };
        let weights = if sharded || on_device {
            let folder = settings.weights_folder.as_deref().filter(|_| sharded);
            let home = match folder {
                Some(folder) if on_device || !group.shares_memory() => Home::Disk(folder),
                _ if on_device => Home::Memory(Some(host_units)),
                folder if group.shares_memory() => Home::Shared(folder),
                _ => Home::Memory(None),
            };
            let frozen_layout = Layout::new(frozen, group.world(), settings.unit_len)?;
            Some(ShardedWeights::new(&*group, &layout, frozen_layout, home, settings.weights_in_memory)?)
        } else {
            None
        };
        let engine = Self {
            policy,
            optimizer,
            weights,
            device,
            host_units,
            order: ReductionOrder::new(layout.units.len()),
            reduced: vec![false; layout.units.len()],
            shards: layout
                .units
                .iter()
                .map(|unit| match &offloaded {
                    _ if unit.id.index() >= host_units => UnitShard::elsewhere(),
                    Some(offloaded) if offloaded.holds(unit.id) => UnitShard::of_gradients(unit),
                    _ => UnitShard::new(unit, states),
                })
                .collect(),
            states,
            offloaded,
            scaler,
            counters: Counters::default(),
            accumulation: Accumulation::new(settings.accumulation_steps),
            exchange,
            accumulator: LocalAccumulator::default(),
            delivery: Delivery::new(layout.params.len()),
            unused: Vec::new(),
            norm: None,
            applied: false,
            loss: None,
            workers: Workers::new(settings.threads)
                .map_err(|error| EngineError::Threads(error.to_string()))?,
            saving: None,
            snapshots: Memory::default(),
            news: None,
            chosen: None,
            watch: Stopwatch::default(),
            told: None,
            window: Window { since: Instant::now(), samples: 0, steps: 0 },
            progress: Progress::from_environment(),
            layout: Arc::new(layout),
            settings,
            group,
        };
        engine.tell_progress();
        Ok(engine)
    }

    /// The factor for the loss (or for the gradient of the model's output) before backward: the loss scale, divided
    /// by the accumulation steps if `average` says that the caller has not done so.
    pub fn loss_factor(&self, average: bool) -> f32 {
        let steps = if average { self.accumulation.steps() as f64 } else { 1.0 };
        (self.scaler.scale() / steps) as f32
    }

    /// What the loss of a backward pass lacks of its factor, if it was (`scaled`) or was not multiplied by the loss
    /// scale and was (`averaged`) or was not divided by the accumulation steps.
    pub fn missing_factor(&self, scaled: bool, averaged: bool) -> f32 {
        let scale = if scaled { 1.0 } else { self.scaler.scale() };
        let steps = if averaged { 1.0 } else { self.accumulation.steps() as f64 };
        (scale / steps) as f32
    }

    /// A phase of the step begins (or, with `None`, ends); the face tells of forward and backward.
    pub fn mark(&mut self, phase: Option<Phase>) {
        self.watch.mark(phase, Instant::now());
        if let Some(phase) = phase {
            self.group.set_activity(match phase {
                Phase::Forward => "forward",
                Phase::Backward | Phase::Reduce => "backward",
                Phase::Update => "step",
            });
        }
    }

    /// This rank's loss, for the step line.
    pub fn set_loss(&mut self, loss: f64) {
        self.loss = Some(loss);
    }

    /// Whether a step line is due at the end of the current micro-batch, so that its loss is worth reading.
    pub fn wants_loss(&self) -> bool {
        self.accumulation.is_boundary() && self.line_due(self.counters.global_steps + 1)
    }

    fn line_due(&self, step: u64) -> bool {
        self.settings.steps_per_print.is_some_and(|every| every > 0 && step.is_multiple_of(every))
    }

    /// The first half of a step: at a boundary, all ranks vote on what to do.
    ///
    /// # Errors
    /// [`EngineError::NoGradient`], [`EngineError::NonFinite`], [`EngineError::Unused`], [`EngineError::Comm`]. No
    /// weight has changed when an error is raised.
    pub fn prepare(&mut self) -> Result<Plan, EngineError> {
        if !self.accumulation.is_boundary() {
            self.accumulation.advance();
            self.counters.micro_step();
            return Ok(Plan::Accumulate);
        }
        if self.reduced.contains(&false) {
            return Err(EngineError::NoGradient);
        }
        self.mark(Some(Phase::Update));
        if let Some(names) = self.delivery.check(&self.layout, &*self.group)? {
            let total = self.layout.params.len();
            if names.len() == total && total > 0 {
                return Err(EngineError::NoGradient);
            }
            if !names.is_empty() && !self.settings.ignore_unused_parameters {
                return Err(EngineError::Unused { names, total });
            }
            self.unused = names;
        }
        let square_sum = self.vote()?;
        let scale = self.scaler.scale();
        match decide(square_sum, scale, self.settings.gradient_clipping, self.settings.on_non_finite) {
            Decision::Apply { norm, grad_scale } => {
                self.norm = Some(norm);
                self.scaler.update(false)?;
                Ok(Plan::Apply { grad_scale })
            }
            Decision::Skip => {
                self.norm = Some(f64::INFINITY);
                let found = self.describe_non_finite()?;
                self.scaler.update(true)?;
                let now = self.scaler.scale();
                let change =
                    if now == scale { String::new() } else { format!("; loss scale {scale} -> {now}") };
                Ok(Plan::Skip { found: format!("{found}{change}") })
            }
            Decision::Fail => {
                let found = self.describe_non_finite()?;
                self.discard_gradients();
                let hint = "";
                Err(EngineError::NonFinite { step: self.counters.global_steps + 1, found, hint })
            }
        }
    }

    /// The sum over ranks, in rank order, of the squared gradients of their shards.
    fn vote(&mut self) -> Result<f64, EngineError> {
        if let Some(device) = &self.device {
            for (shard, square_sum) in self.shards.iter_mut().zip(device.square_sums()?) {
                shard.square_sum = square_sum;
            }
        }
        let mine: f64 = self.shards.iter().map(|shard| shard.square_sum).sum();
        let mut message = mine.to_le_bytes().to_vec();
        // The ranks learn here, and all at once, that a save behind training is over.
        message.push(self.saving.as_ref().map_or(Saving::OVER, Saving::status));
        message.extend(self.device.as_ref().map_or(0, |device| device.exchanges()).to_le_bytes());
        let all = self.group.all_gather_bytes("gradient norm", &message)?;
        let exchanges = |bytes: &[u8]| bytes.get(9..).map(<[u8]>::to_vec);
        if let Some(rank) = all.iter().position(|bytes| exchanges(bytes) != exchanges(&all[0])) {
            return Err(EngineError::Exchanges { rank: Rank::from_index(rank) });
        }
        let mut total = 0.0;
        let mut over = true;
        for bytes in &all {
            let mut word = [0; 8];
            let len = bytes.len().min(8);
            word[..len].copy_from_slice(&bytes[..len]);
            total += f64::from_le_bytes(word);
            over &= bytes.get(8).copied() != Some(Saving::GOES_ON);
        }
        if over {
            self.news = self.finish_save()?;
        } else if let Some(saving) = &mut self.saving {
            self.news = saving.progress_line();
        }
        Ok(total)
    }

    fn describe_non_finite(&mut self) -> Result<String, EngineError> {
        self.fetch_non_finite()?;
        // Gradients that a device has computed wait there, not on the disk.
        let offloaded = self.offloaded.as_ref().filter(|_| self.device.is_none());
        let found = nonfinite::find(&self.layout, &self.shards, offloaded, &*self.group);
        self.leave_host();
        let found = found?;
        Ok(found.map_or_else(|| "the sum of squared gradients is not finite".to_owned(), |it| it.to_string()))
    }

    /// The second half of a step with an optimizer of ours: updates masters and everybody's `weights` (by parameter
    /// id) with one set of hyperparameters per parameter group.
    ///
    /// # Errors
    /// [`EngineError::Comm`], or weights or groups that are not the registered ones.
    pub fn apply_native(
        &mut self,
        grad_scale: f32,
        hypers: &[Hyper],
        weights: &mut [SpanMut<'_>],
    ) -> Result<(), EngineError> {
        let OptimizerChoice::Native(kind) = self.optimizer else {
            return Err(EngineError::Usage("this engine has no optimizer of its own".to_owned()));
        };
        let groups = self.layout.params.iter().map(|spec| spec.group + 1).max().unwrap_or(0);
        if hypers.len() < groups {
            return Err(EngineError::Count { what: "parameter groups", got: hypers.len(), expected: groups });
        }
        let step = self.counters.optimizer_steps + 1;
        self.fetch_gradients()?;
        if let Some(device) = self.device.as_ref().filter(|_| self.state_on_device()) {
            // It works on what it has while the host updates the rest.
            device.update(&self.layout, hypers, step, grad_scale)?;
        }
        if kind.is_elementwise() {
            return self.publish(weights, |_, _| Ok(ElementWise { hypers, step, grad_scale }));
        }
        self.publish(weights, |parts, weights| {
            let UpdateParts { layout, count, shards, offloaded, group } = parts;
            let input = LambInput { layout, count, shards, offloaded, weights, group };
            Lamb::prepare(input, hypers, step, grad_scale)
        })
    }

    /// Updates the shards whose state is on the host, and the weights where this stage keeps them; `weights` are the
    /// framework's, below stage 3. Then everybody sees all weights.
    fn publish<U: ShardUpdate>(
        &mut self,
        weights: &mut [SpanMut<'_>],
        update: impl FnOnce(UpdateParts<'_>, &mut Weights<'_, '_>) -> Result<U, EngineError>,
    ) -> Result<(), EngineError> {
        if self.weights.is_none() {
            self.check_weights(weights)?;
        }
        if self.host_units > 0 || self.device.is_none() {
            self.update_on_host(weights, update)?;
        }
        if self.device.is_some() {
            return self.weights_to_device();
        }
        if self.weights.is_some() {
            self.group.barrier("the updated weights")?;
        }
        Ok(())
    }

    fn update_on_host<U: ShardUpdate>(
        &mut self,
        weights: &mut [SpanMut<'_>],
        update: impl FnOnce(UpdateParts<'_>, &mut Weights<'_, '_>) -> Result<U, EngineError>,
    ) -> Result<(), EngineError> {
        let (group, layout, count) = (&*self.group, &*self.layout, self.host_units);
        let keeps_weights = self.weights.is_some();
        let (mut spans, pages): (Vec<SpanMut<'_>>, &[_]) = match &mut self.weights {
            Some(ShardedWeights { trained, pages, .. }) => (trained.own_mut(), pages),
            None => (weights.iter_mut().map(SpanMut::reborrow).collect(), &[]),
        };
        let mut target = if keeps_weights { Weights::Shards(&mut spans) } else { Weights::Whole(&mut spans) };
        let offloaded = self.offloaded.as_mut();
        let parts = UpdateParts { layout, count, shards: &mut self.shards, offloaded, group };
        let update = update(parts, &mut target)?;
        let updated = |unit: UnitId| give_back(pages, unit.index());
        let workers = &self.workers;
        Publication { group, layout, update: &update, workers, count, updated: &updated }.publish(
            &mut self.shards,
            self.offloaded.as_mut(),
            &mut target,
        )?;
        Ok(())
    }

    /// For a client's optimizer at stage 0: the whole averaged, unscaled, clipped gradients into `outputs`, fp32, by
    /// parameter id.
    ///
    /// # Errors
    /// As [`Engine::apply_native`].
    pub fn gather_gradients(
        &mut self,
        grad_scale: f32,
        outputs: &mut [SpanMut<'_>],
    ) -> Result<(), EngineError> {
        self.check_count("gradients", outputs.len(), self.layout.params.len())?;
        Ok(gather_gradients(&*self.group, &self.layout, &mut self.shards, outputs, grad_scale)?)
    }

    /// For a client's optimizer at stages 1 and 2: unscales and clips the shards' gradients where they lie.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn scale_gradients(&mut self, grad_scale: f32) -> Result<(), EngineError> {
        if let Some(device) = self.device.as_ref().filter(|_| self.state_on_device()) {
            device.scale_gradients(grad_scale)?;
        }
        self.fetch_gradients()?;
        if grad_scale != 1.0 {
            for shard in &mut self.shards[..self.host_units] {
                deepspeed_kernels::scale_in_place(shard.gradient.as_f32_mut(), grad_scale);
            }
        }
        Ok(())
    }

    /// After a client's optimizer has updated the masters of the shards: everybody's `weights` follow.
    ///
    /// # Errors
    /// As [`Engine::apply_native`].
    pub fn publish_client(&mut self, weights: &mut [SpanMut<'_>]) -> Result<(), EngineError> {
        self.publish(weights, |_, _| Ok(AlreadyUpdated))
    }

    /// Ends a step that [`Engine::prepare`] began.
    pub fn finish(&mut self, plan: &Plan, learning_rate: f64) -> StepReport {
        let applied = matches!(plan, Plan::Apply { .. });
        if matches!(plan, Plan::Accumulate) {
            return StepReport::default();
        }
        self.discard_gradients();
        self.accumulation.advance();
        self.counters.boundary(self.settings.train_batch_size, applied);
        self.tell_progress();
        self.applied = applied;
        self.mark(None);
        StepReport {
            boundary: true,
            applied,
            skipped: match plan {
                Plan::Skip { found } => Some(found.clone()),
                Plan::Accumulate | Plan::Apply { .. } => None,
            },
            unused: std::mem::take(&mut self.unused),
            line: self.line_due(self.counters.global_steps).then(|| self.step_line(learning_rate)),
            checkpoint: self.news.take(),
        }
    }

    fn step_line(&mut self, learning_rate: f64) -> String {
        let now = Instant::now();
        let line = StepLine {
            global_steps: self.counters.global_steps,
            skipped_steps: self.counters.skipped_steps,
            loss: self.loss,
            norm: self.norm,
            learning_rate,
            loss_scale: self.scaler.scale(),
            samples: self.counters.global_samples - self.window.samples,
            elapsed: now.saturating_duration_since(self.window.since),
            times: self.watch.take(),
            breakdown: self.settings.wall_clock_breakdown,
            steps: self.counters.global_steps - self.window.steps,
        };
        self.told = Some((line.times, line.steps));
        self.restart_window();
        line.to_string()
    }

    /// Tells the launcher which step is next.
    pub(crate) fn tell_progress(&self) {
        if let Some(progress) = &self.progress {
            progress.tell(self.counters.global_steps);
        }
    }

    /// The next step line speaks of what comes from here on.
    pub(crate) fn restart_window(&mut self) {
        let Counters { global_samples: samples, global_steps: steps, .. } = self.counters;
        self.window = Window { since: Instant::now(), samples, steps };
    }

    /// One whole step with an optimizer of ours.
    ///
    /// # Errors
    /// As [`Engine::prepare`] and [`Engine::apply_native`].
    pub fn step(&mut self, hypers: &[Hyper], weights: &mut [SpanMut<'_>]) -> Result<StepReport, EngineError> {
        let plan = self.prepare()?;
        if let Plan::Apply { grad_scale } = plan {
            self.apply_native(grad_scale, hypers, weights)?;
        }
        Ok(self.finish(&plan, hypers.first().map_or(0.0, |hyper| hyper.lr)))
    }

    /// Forgets the gradients of the current accumulation.
    pub fn discard_gradients(&mut self) {
        self.reduced.fill(false);
        self.order.reset();
        self.accumulator.clear();
    }

    pub(crate) fn check_count(
        &self,
        what: &'static str,
        got: usize,
        expected: usize,
    ) -> Result<(), EngineError> {
        if got == expected { Ok(()) } else { Err(EngineError::Count { what, got, expected }) }
    }

    fn check_weights(&self, weights: &[SpanMut<'_>]) -> Result<(), EngineError> {
        self.check_count("weights", weights.len(), self.layout.params.len())?;
        for (spec, span) in self.layout.params.iter().zip(weights) {
            check_length("weights", spec, span.len())?;
            if span.dtype() != spec.dtype {
                let name = spec.name.clone();
                return Err(EngineError::WeightDType { name, got: span.dtype(), expected: spec.dtype });
            }
        }
        Ok(())
    }
}

pub(crate) fn check_length(what: &'static str, spec: &ParamSpec, got: usize) -> Result<(), EngineError> {
    let expected = spec.numel();
    if got == expected {
        return Ok(());
    }
    Err(EngineError::Length { what, name: spec.name.clone(), got, expected })
}
