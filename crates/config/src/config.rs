//! The typed config: plain public fields for the engine, all of them resolved.

use std::fmt;

use deepspeed_core::DType;

use crate::{
    batch::{Batch, BatchRequest},
    diagnostic::{Code, ConfigError},
    document::Document,
    offload::{OffloadOptimizerConfig, OffloadParamConfig},
    table,
};

/// The dtype the model trains in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// No mixed precision.
    Fp32,
    /// bf16 weights, fp32 master weights.
    Bf16,
    /// fp16 weights, fp32 master weights, a loss scale.
    Fp16,
}

impl Precision {
    /// The dtype of the model's weights.
    pub fn dtype(self) -> DType {
        match self {
            Self::Fp32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::Fp16 => DType::F16,
        }
    }
}

/// How far the model state is sharded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ZeroStage {
    /// Nothing is sharded.
    Zero,
    /// Optimizer state.
    One,
    /// Gradients too.
    Two,
    /// Parameters too.
    Three,
}

impl ZeroStage {
    /// 0 to 3.
    pub fn number(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::One => 1,
            Self::Two => 2,
            Self::Three => 3,
        }
    }

    pub(crate) fn from_number(number: u64) -> Self {
        match number {
            0 => Self::Zero,
            1 => Self::One,
            2 => Self::Two,
            _ => Self::Three,
        }
    }
}

impl fmt::Display for ZeroStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number())
    }
}

/// What happens when ranks save under different tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TagValidation {
    /// Rank 0's tag is used, silently.
    Ignore,
    /// Rank 0's tag is used, and said once.
    Warn,
    /// An error on all ranks.
    Fail,
}

/// The block `fp16`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fp16Config {
    /// Train in fp16.
    pub enabled: bool,
    /// A fixed loss scale; 0 means dynamic.
    pub loss_scale: f64,
    /// The dynamic scale starts at 2 to this power.
    pub initial_scale_power: u32,
    /// Clean steps before the dynamic scale doubles.
    pub loss_scale_window: u64,
    /// Overflows before the dynamic scale halves.
    pub hysteresis: u64,
    /// Refill the hysteresis at every clean step.
    pub consecutive_hysteresis: bool,
    /// The dynamic scale never falls below this.
    pub min_loss_scale: f64,
    /// Cast floating-point inputs of the model.
    pub auto_cast: bool,
}

impl Fp16Config {
    /// Whether the loss scale adapts.
    pub fn dynamic(&self) -> bool {
        self.loss_scale == 0.0
    }
}

/// The block `bf16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bf16Config {
    /// Train in bf16.
    pub enabled: bool,
    /// Skip steps whose gradients are not finite.
    pub check_grad_overflow: bool,
}

/// The block `zero_optimization`, as far as it is built.
#[derive(Debug, Clone, PartialEq)]
pub struct ZeroConfig {
    /// How far the model state is sharded.
    pub stage: ZeroStage,
    /// Gradients are reduced in pieces of about this many elements, or fewer.
    pub reduce_bucket_size: usize,
    /// The most elements of a rank's part of a unit that stream between a disk and the update at a time.
    pub sub_group_size: usize,
    /// The greatest number of elements gathered in one piece; no effect, kept for the getters of the Python face.
    pub allgather_bucket_size: usize,
    /// As given; no effect, kept for the getters of the Python face.
    pub overlap_comm: Option<bool>,
    /// As given; no effect, kept for the getters of the Python face.
    pub contiguous_gradients: bool,
    /// As given; no effect, kept for the getters of the Python face.
    pub reduce_scatter: bool,
    /// Allow parameters that get no gradient; they contribute zeros.
    pub ignore_unused_parameters: bool,
    /// Gather whole 16-bit weights when the model is saved (stage 3).
    pub gather_16bit_weights_on_model_save: bool,
    /// What is whole at a time at stage 3, where ranks share no memory.
    pub gathering: GatheringConfig,
    /// The block `offload_optimizer`.
    pub offload_optimizer: OffloadOptimizerConfig,
    /// The block `offload_param`.
    pub offload_param: OffloadParamConfig,
}

/// The keys `stage3_*` of `zero_optimization`, in elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatheringConfig {
    /// Gathered ahead of its use.
    pub prefetch_bucket_size: usize,
    /// Parameters that are not larger stay whole until the next update.
    pub param_persistence_threshold: usize,
    /// As long as they are not more than this together.
    pub model_persistence_threshold: usize,
    /// Whole at one time.
    pub max_live_parameters: usize,
    /// What is used again within this much stays.
    pub max_reuse_distance: usize,
    /// Modules that are not larger gather everything below them at once.
    pub module_granularity_threshold: usize,
}

/// The block `aio`: how files of offloaded state are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AioConfig {
    /// Bytes in one request.
    pub block_size: usize,
    /// Requests in flight.
    pub queue_depth: usize,
    /// Rings of io_uring, or threads that share one request.
    pub threads: usize,
    /// Hand over requests one by one.
    pub single_submit: bool,
    /// Hand over and wait at the same time.
    pub overlap_events: bool,
}

/// The block `optimizer`.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerConfig {
    /// The name as it was written; upper and lower case mean the same for the engine's own optimizers.
    pub kind: String,
    /// Its parameters. For their positions see [`Config::error_at`] with `optimizer.params.<name>`.
    pub params: serde_json::Map<String, serde_json::Value>,
    /// As given; no effect.
    pub legacy_fusion: bool,
}

/// The block `scheduler`.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    /// The name as it was written.
    pub kind: String,
    /// Its parameters. For their positions see [`Config::error_at`] with `scheduler.params.<name>`.
    pub params: serde_json::Map<String, serde_json::Value>,
}

/// The block `checkpoint`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointConfig {
    /// What happens when ranks save under different tags.
    pub tag_validation: TagValidation,
    /// As given; no effect, kept for the getters of the Python face.
    pub load_universal: bool,
    /// `async`: copy everything, and write the copy behind training.
    pub behind: bool,
    /// How many complete checkpoints stay in the folder; `None` for all.
    pub keep_last: Option<usize>,
    /// `use_node_local_storage`: each host keeps the files of its own ranks.
    pub node_local: bool,
}

/// The block `data_types`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataTypes {
    /// The dtype of the weights, if given; it equals that of the precision.
    pub param_dtype: Option<DType>,
    /// The dtype of the model's buffers; they keep their own when it is `None`.
    pub buffer_dtype: Option<DType>,
}

/// A setting whose value is not its default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its full path.
    pub path: String,
    /// Its value, as it was written.
    pub value: String,
    /// Its default, as JSON.
    pub default: &'static str,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}", self.path, self.value)?;
        if self.default != "null" {
            write!(f, " (default {})", self.default)?;
        }
        Ok(())
    }
}

/// A whole config.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// What is given of the batch numbers; [`Config::resolve_batch`] derives the rest.
    pub batch: BatchRequest,
    /// The dtype the model trains in.
    pub precision: Precision,
    /// The block `fp16`.
    pub fp16: Fp16Config,
    /// The block `bf16`.
    pub bf16: Bf16Config,
    /// The block `zero_optimization`.
    pub zero: ZeroConfig,
    /// The optimizer, if the config names one.
    pub optimizer: Option<OptimizerConfig>,
    /// The schedule, if the config names one.
    pub scheduler: Option<SchedulerConfig>,
    /// The greatest L2 norm of all gradients together; 0 means no clipping.
    pub gradient_clipping: f64,
    /// Divide gradients before the sum over ranks instead of after.
    pub prescale_gradients: bool,
    /// Divide gradients by this before the sum over ranks, and make up for it after.
    pub gradient_predivide_factor: f64,
    /// The dtype gradients travel in; their own when `None`.
    pub communication_dtype: Option<DType>,
    /// The dtype gradients accumulate in; fp32 when `None`.
    pub grad_accum_dtype: Option<DType>,
    /// The block `data_types`, the accumulation dtype aside.
    pub data_types: DataTypes,
    /// Optimizer steps between two progress lines; `None` for no lines.
    pub steps_per_print: Option<u64>,
    /// Measure and report where the time of a step goes.
    pub wall_clock_breakdown: bool,
    /// Print the resolved config when the engine starts.
    pub dump_state: bool,
    /// Allow a client's optimizer that is not known to work on shards.
    pub zero_allow_untested_optimizer: bool,
    /// Drop the last batch of an epoch when it is not full.
    pub dataloader_drop_last: bool,
    /// Always false, as it is not built; kept for the getters of the Python face.
    pub memory_breakdown: bool,
    /// The block `checkpoint`.
    pub checkpoint: CheckpointConfig,
    /// The block `aio`.
    pub aio: AioConfig,
    pub(crate) document: Document,
    pub(crate) differences: Vec<Difference>,
}

impl Config {
    /// The document it was read from; `document().json()` is the raw config.
    pub fn document(&self) -> &Document {
        &self.document
    }

    /// The settings that differ from their defaults, in the order of the document.
    pub fn differences_from_default(&self) -> &[Difference] {
        &self.differences
    }

    /// The batch numbers for `world` data-parallel ranks; `world_origin` says where that number came from, as
    /// `2 hosts x 4 slots in the hostfile`.
    ///
    /// # Errors
    /// The numbers do not fit together; the error points at each of them.
    pub fn resolve_batch(&self, world: usize, world_origin: &str) -> Result<Batch, ConfigError> {
        self.batch.resolve(world, world_origin).map_err(|problem| {
            let keys = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"];
            let mut diagnostic =
                crate::diagnostic::Diagnostic::new(Code::Batch, self.document.origin(), problem.message);
            for key in keys {
                if let Some(member) = self.document.root().member(key)
                    && member.value.value != crate::json::Value::Null
                {
                    if diagnostic.path.is_empty() {
                        key.clone_into(&mut diagnostic.path);
                    }
                    diagnostic.labels.push(self.document.label(&member.value.span, ""));
                }
            }
            diagnostic.hints = problem.hints;
            diagnostic.into()
        })
    }

    /// The block at `path`, as `tensorboard` or `zero_optimization.offload_param`: every key with its value or its default.
    /// For what the engine itself does not read.
    pub fn block(&self, path: &str) -> serde_json::Map<String, serde_json::Value> {
        let raw = self.document.json();
        let given = path.split('.').try_fold(&raw, |block, key| block.get(key));
        let value = |setting: &table::Setting| {
            let keys = std::iter::once(setting.key()).chain(setting.aliases.iter().copied());
            let written =
                keys.filter_map(|key| given?.get(key)).find(|value| !value.is_null() && *value != "auto");
            let value =
                written.cloned().or_else(|| serde_json::from_str(setting.default).ok()).unwrap_or_default();
            match (setting.kind, value.as_f64()) {
                // May be written 5e8.
                (table::Kind::Int { .. }, Some(number)) => serde_json::Value::from(number as i64),
                _ => value,
            }
        };
        table::children(path).map(|setting| (setting.key().to_owned(), value(setting))).collect()
    }

    /// An error of the caller's about the setting at `path`, pointing at it where it is set: for what only the engine or
    /// an optimizer can judge.
    pub fn error_at(
        &self,
        code: Code,
        path: &str,
        message: impl Into<String>,
        hints: impl IntoIterator<Item = String>,
    ) -> ConfigError {
        let mut diagnostic = crate::diagnostic::Diagnostic::new(code, self.document.origin(), message);
        path.clone_into(&mut diagnostic.path);
        if let Some(member) = self.document.member(path) {
            diagnostic.labels.push(self.document.label(&member.value.span, ""));
        }
        diagnostic.hints.extend(hints);
        diagnostic.into()
    }
}
