//! What the engine takes from the config, resolved.

use std::{path::PathBuf, sync::Arc};

use deepspeed_checkpoint::disk::{Disk, RealDisk};
use deepspeed_config::{Code, Config, ConfigError, OffloadDevice, Precision, ZeroStage};
use deepspeed_core::DType;
use deepspeed_offload::{Depth, Options};
use deepspeed_optim::{DynamicLossScale, LossScaler, OptimError};
use deepspeed_zero::{GatherLimits, OffloadPlan, Stage};

use crate::OnNonFinite;

/// The engine's settings; plain values, so that tests and the Rust face can make them without a file.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The ZeRO stage.
    pub stage: Stage,
    /// The dtype the model computes in.
    pub precision: DType,
    /// Micro-batches per update.
    pub accumulation_steps: u64,
    /// Samples of all ranks per update.
    pub train_batch_size: u64,
    /// Samples of one rank per micro-batch.
    pub micro_batch_size: u64,
    /// The global gradient norm that is not exceeded; 0 turns clipping off.
    pub gradient_clipping: f64,
    /// The dtype gradients travel in; `None` for their own.
    pub communication_dtype: Option<DType>,
    /// The dtype gradients are accumulated in; `None` for fp32.
    pub accumulation_dtype: Option<DType>,
    /// Divide before the sum over ranks.
    pub prescale_gradients: bool,
    /// Part of the division that happens before the sum.
    pub gradient_predivide_factor: f64,
    /// What a non-finite gradient means.
    pub on_non_finite: OnNonFinite,
    /// Whether parameters that never get a gradient are tolerated.
    pub ignore_unused_parameters: bool,
    /// Boundaries between two step lines; `None` for silence.
    pub steps_per_print: Option<u64>,
    /// Whether the step line tells milliseconds per step instead of shares.
    pub wall_clock_breakdown: bool,
    /// Whether any client optimizer may be sharded.
    pub allow_untested_optimizer: bool,
    /// Threads of this rank that update weights.
    pub threads: usize,
    /// Greatest number of elements of a unit of several parameters.
    pub unit_len: usize,
    /// At stage 3: the folder of the file that holds the weights; `None` for host memory.
    pub weights_folder: Option<PathBuf>,
    /// Of weights in such a file: elements of each rank's part that stay in memory between uses.
    pub weights_in_memory: usize,
    /// Where masters and optimizer state lie, if not in memory.
    pub offload: Option<OffloadSettings>,
    /// With a device: the part of masters and optimizer state, 0 to 1, that lies on the host and is updated there.
    pub state_on_host: f64,
    /// With a device, at stage 3: whether shards of the weights lie in the host's memory.
    pub weights_on_host: bool,
    /// At stage 3 where ranks share no memory: how much is whole at a time.
    pub gathering: GatherLimits,
    /// How checkpoints are saved.
    pub saving: SaveSettings,
}

/// How checkpoints are saved.
#[derive(Clone, Debug)]
pub struct SaveSettings {
    /// Copy everything, and write the copy behind training.
    pub behind: bool,
    /// How many complete checkpoints stay in the folder; `None` for all.
    pub keep_last: Option<usize>,
    /// Whether each host keeps the files of its own ranks, on storage that the others do not see.
    pub node_local: bool,
    /// What tells this host from others; `None` for its name.
    pub host: Option<String>,
    /// What does the writing: the file system, or what a test puts in its place.
    pub disk: Arc<dyn Disk>,
}

impl Default for SaveSettings {
    fn default() -> Self {
        Self { behind: false, keep_last: None, node_local: false, host: None, disk: Arc::new(RealDisk) }
    }
}

impl SaveSettings {
    /// Names this host where several of them have one name, and in tests.
    pub const HOST_VARIABLE: &str = "DEEPSPEED_HOST_IDENTITY";
}

impl Settings {
    /// Boundaries between two step lines where only `wall_clock_breakdown` asks for them.
    const BREAKDOWN_INTERVAL: u64 = 10;

    /// Elements of a unit unless said otherwise: 16 MiB of fp32 gradients, large enough that a collective's fixed
    /// cost does not show, small enough that units of one model differ little in size.
    pub const UNIT_LEN: usize = 1 << 22;
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stage: Stage::Zero,
            precision: DType::F32,
            accumulation_steps: 1,
            train_batch_size: 1,
            micro_batch_size: 1,
            gradient_clipping: 1.0,
            communication_dtype: None,
            accumulation_dtype: None,
            prescale_gradients: false,
            gradient_predivide_factor: 1.0,
            on_non_finite: OnNonFinite::Fail,
            ignore_unused_parameters: true,
            steps_per_print: None,
            wall_clock_breakdown: false,
            allow_untested_optimizer: false,
            threads: 1,
            unit_len: Self::UNIT_LEN,
            weights_folder: None,
            weights_in_memory: 0,
            offload: None,
            state_on_host: 0.0,
            weights_on_host: false,
            gathering: GatherLimits::default(),
            saving: SaveSettings::default(),
        }
    }
}

impl Settings {
    /// The settings of `config` for `world` ranks of `threads` threads; `world_origin` says where the number of ranks
    /// came from.
    ///
    /// # Errors
    /// [`ConfigError`] where the batch numbers do not fit together or a stage is not built.
    pub fn from_config(
        config: &Config,
        world: usize,
        world_origin: &str,
        threads: usize,
    ) -> Result<Self, ConfigError> {
        let batch = config.resolve_batch(world, world_origin)?;
        if config.checkpoint.node_local && config.checkpoint.behind {
            return Err(config.error_at(
                Code::Contradiction,
                "checkpoint.async",
                "a checkpoint that is spread over the storage of several hosts cannot be written behind training: the \
                 threads of the ranks meet in one folder",
                ["set checkpoint.async to false, or use_node_local_storage where all hosts share the folder".to_owned()],
            ));
        }
        Ok(Self {
            stage: match config.zero.stage {
                ZeroStage::Zero => Stage::Zero,
                ZeroStage::One => Stage::One,
                ZeroStage::Two => Stage::Two,
                ZeroStage::Three => Stage::Three,
            },
            precision: config.precision.dtype(),
            accumulation_steps: batch.accumulation as u64,
            train_batch_size: batch.train as u64,
            micro_batch_size: batch.micro as u64,
            gradient_clipping: config.gradient_clipping,
            communication_dtype: config.communication_dtype,
            accumulation_dtype: config.grad_accum_dtype,
            prescale_gradients: config.prescale_gradients,
            gradient_predivide_factor: config.gradient_predivide_factor,
            on_non_finite: match config.precision {
                Precision::Fp32 => OnNonFinite::Fail,
                Precision::Bf16 if !config.bf16.check_grad_overflow => OnNonFinite::Apply,
                Precision::Bf16 | Precision::Fp16 => OnNonFinite::Skip,
            },
            ignore_unused_parameters: config.zero.ignore_unused_parameters,
            steps_per_print: config
                .steps_per_print
                .or(config.wall_clock_breakdown.then_some(Self::BREAKDOWN_INTERVAL)),
            wall_clock_breakdown: config.wall_clock_breakdown,
            allow_untested_optimizer: config.zero_allow_untested_optimizer,
            threads,
            unit_len: Self::UNIT_LEN.min(config.zero.reduce_bucket_size.max(1)),
            weights_folder: match config.zero.offload_param.device {
                OffloadDevice::Nvme => config.zero.offload_param.nvme_path.clone(),
                OffloadDevice::None | OffloadDevice::Cpu => None,
            },
            weights_in_memory: config.zero.offload_param.max_in_cpu,
            offload: OffloadSettings::from_config(config),
            state_on_host: match config.zero.offload_optimizer.device {
                OffloadDevice::None => 0.0,
                OffloadDevice::Cpu | OffloadDevice::Nvme => config.zero.offload_optimizer.ratio,
            },
            weights_on_host: config.zero.stage == ZeroStage::Three
                && config.zero.offload_param.device != OffloadDevice::None,
            gathering: GatherLimits {
                prefetch_bucket_size: config.zero.gathering.prefetch_bucket_size,
                max_live_parameters: config.zero.gathering.max_live_parameters,
                max_reuse_distance: config.zero.gathering.max_reuse_distance,
                param_persistence_threshold: config.zero.gathering.param_persistence_threshold,
                model_persistence_threshold: config.zero.gathering.model_persistence_threshold,
                module_granularity_threshold: config.zero.gathering.module_granularity_threshold,
            },
            saving: SaveSettings {
                behind: config.checkpoint.behind,
                keep_last: config.checkpoint.keep_last,
                node_local: config.checkpoint.node_local,
                host: std::env::var(SaveSettings::HOST_VARIABLE).ok(),
                ..SaveSettings::default()
            },
        })
    }
}

/// Masters and optimizer state in a file.
#[derive(Clone, Debug)]
pub struct OffloadSettings {
    /// The folder of the file.
    pub folder: PathBuf,
    /// The part of the state, 0 to 1, that lies there.
    pub ratio: f64,
    /// The most elements of a rank's part of a unit that stream through memory at a time, where the update of a unit can be
    /// cut.
    pub sub_group_len: usize,
    /// How the file is read and written.
    pub options: Options,
    /// How far reading and writing run apart from the update.
    pub depth: Depth,
}

impl OffloadSettings {
    /// What `offload_optimizer` and `aio` ask for; `None` for state in the memory of the host, where it is on a CPU.
    fn from_config(config: &Config) -> Option<Self> {
        let offload = &config.zero.offload_optimizer;
        let folder = offload.nvme_path.clone().filter(|_| offload.device == OffloadDevice::Nvme)?;
        let aio = &config.aio;
        Some(Self {
            folder,
            ratio: offload.ratio,
            sub_group_len: config.zero.sub_group_size,
            options: Options {
                block_size: aio.block_size,
                queue_depth: aio.queue_depth,
                threads: aio.threads,
                single_submit: aio.single_submit,
                overlap_events: aio.overlap_events,
                ..Options::default()
            },
            depth: Depth::with_slots(offload.buffer_count, offload.pipeline_read, offload.pipeline_write),
        })
    }

    /// What to keep how; `in_pieces` says that the update of a unit can be cut.
    pub(crate) fn plan(&self, in_pieces: bool) -> OffloadPlan<'_> {
        let Self { folder, ratio, sub_group_len, options, depth } = self;
        let piece_len = in_pieces.then_some(*sub_group_len);
        OffloadPlan { folder, ratio: *ratio, piece_len, options: options.clone(), depth: *depth }
    }
}

/// The loss scaler that `config` asks for: dynamic or fixed in fp16, 1 otherwise.
///
/// # Errors
/// [`OptimError`] where the `fp16` block contradicts itself.
pub fn loss_scaler(config: &Config) -> Result<LossScaler, OptimError> {
    let fp16 = &config.fp16;
    match config.precision {
        Precision::Fp16 if fp16.dynamic() => LossScaler::dynamic(DynamicLossScale {
            initial_scale_power: fp16.initial_scale_power,
            loss_scale_window: fp16.loss_scale_window,
            hysteresis: u32::try_from(fp16.hysteresis).unwrap_or(u32::MAX),
            consecutive_hysteresis: fp16.consecutive_hysteresis,
            min_loss_scale: fp16.min_loss_scale,
        }),
        Precision::Fp16 => Ok(LossScaler::fixed(fp16.loss_scale)),
        Precision::Bf16 | Precision::Fp32 => Ok(LossScaler::fixed(1.0)),
    }
}
