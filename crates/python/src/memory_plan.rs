//! The memory plan of a run: judged before its memory is taken, and compared with what is taken.

use deepspeed_config::{Config, OffloadDevice};
use deepspeed_core::Rank;
use deepspeed_engine::{Engine, EngineError};
use deepspeed_monitor::memory::{
    Actual, Facts, Free, Limit, ParamCounts, Report, actual, planned_against_actual, start_block,
};

/// Set to `warn`, a plan that does not fit is a warning.
pub(crate) const VARIABLE: &str = "DEEPSPEED_MEMORY_CHECK";

/// What was planned, and what this process held before.
#[derive(Debug)]
pub(crate) struct MemoryPlan {
    report: Report,
    before: Option<Actual>,
}

/// What a rank knows of its surroundings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings {
    /// Ranks on this host.
    pub(crate) ranks_per_host: usize,
    /// Bytes of weights that this rank already holds, and the engine takes over or replaces.
    pub(crate) weights_held: usize,
    /// State tensors of the optimizer.
    pub(crate) state_tensors: usize,
    /// Bytes of this rank's accelerator that are free, or taken by parameters; none on the host.
    pub(crate) device_memory: Option<u64>,
}

impl MemoryPlan {
    /// Plans for `engine` and asks all ranks whether it fits where they are. Collective.
    ///
    /// # Errors
    /// [`EngineError::Memory`] on every rank, in the words of the first whose host is too small.
    pub(crate) fn agree(
        config: &Config,
        engine: &Engine,
        surroundings: Surroundings,
    ) -> Result<(Self, Option<String>), EngineError> {
        let Surroundings { ranks_per_host, weights_held, state_tensors, device_memory } = surroundings;
        let group = &**engine.group();
        let counts = ParamCounts::of_layouts(engine.layout(), engine.frozen_layout());
        let accumulation = engine.settings().accumulation_steps;
        let (world, local) = (group.world() as u64, ranks_per_host.clamp(1, group.world()) as u64);
        let mut facts = Facts::from_config(config, counts, world, local, accumulation);
        facts.shared_memory = group.shares_memory();
        facts.accelerator = device_memory.is_some();
        facts.state_tensors = state_tensors as u64;
        facts.whole_state = engine.client_sees_whole();
        if facts.offload_optimizer.device == OffloadDevice::Nvme && engine.offload_summary().is_none() {
            // Without an optimizer nothing is streamed.
            facts.offload_optimizer.device = OffloadDevice::None;
        }
        let nvme = config.zero.offload_optimizer.nvme_path.as_deref();
        let mut free = Free::of_this_host(nvme.or(config.zero.offload_param.nvme_path.as_deref()));
        free.device = device_memory.map(|bytes| Limit::given(bytes, "what torch says is free there"));
        free.weights_held = weights_held as u64 * local;
        let report = Report::new(&facts, &free);
        let before = actual().ok().map(|mut now| {
            now.total = now.total.saturating_sub(weights_held as u64);
            now.anonymous = now.anonymous.saturating_sub(weights_held as u64);
            now
        });
        let mine = report.refusal().unwrap_or_default();
        let all = group.all_gather_bytes("the memory plan", mine.as_bytes())?;
        let refused = all.iter().position(|text| !text.is_empty()).map(|rank| {
            let text = String::from_utf8_lossy(&all[rank]).into_owned();
            format!("rank {}: {text}", Rank::from_index(rank))
        });
        let lenient = std::env::var(VARIABLE).is_ok_and(|value| value.eq_ignore_ascii_case("warn"));
        match refused {
            Some(text) if !lenient => {
                Err(EngineError::Memory(format!("{text}\n({VARIABLE}=warn starts all the same)")))
            }
            warning => Ok((Self { report, before }, warning)),
        }
    }

    /// The plan, in a short block.
    pub(crate) fn block(&self) -> String {
        start_block(&self.report)
    }

    /// The plan beside what this process takes now; `None` where the system does not tell.
    pub(crate) fn against_actual(&self) -> Option<String> {
        let now = actual().ok()?;
        Some(planned_against_actual(&self.report.plan, self.before?, now))
    }
}

/// Gives memory that the first weights took, and nobody holds any more, back to the system.
pub(crate) fn give_back_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers; it releases free memory at the ends of glibc's heaps, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
