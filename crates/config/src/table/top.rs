//! The settings at the top of the document that are single values, and the names of the blocks that hold choices.

use super::{
    Asks::{Never, NonDefault, Present},
    AutoRule, Kind, Setting, TRAINER, built, no_effect, not_built, removed,
};

/// Top-level keys that other libraries write into the same file and read themselves.
pub(crate) const FOREIGN_KEYS: &[&str] = &["msamp", "$schema", "comment", "comments", "description"];

const SEQUENCE_PARALLEL: &str = "sequence parallelism";

pub(super) const SETTINGS: &[Setting] = &[
    built(
        "train_batch_size",
        Kind::POSITIVE,
        "null",
        "Samples per optimizer step over all ranks: train_micro_batch_size_per_gpu x gradient_accumulation_steps x \
         data-parallel ranks. Give it, or the micro-batch size; what is missing is derived.",
    )
    .auto(TRAINER),
    built(
        "train_micro_batch_size_per_gpu",
        Kind::POSITIVE,
        "null",
        "Samples one rank takes in one forward and backward pass.",
    )
    .auto(TRAINER),
    built(
        "gradient_accumulation_steps",
        Kind::POSITIVE,
        "null",
        "Forward and backward passes per optimizer step; 1 unless the two batch sizes say otherwise.",
    )
    .auto(TRAINER),
    built("optimizer", Kind::Block, "null", "The optimizer, unless the program brings its own."),
    built(
        "optimizer.type",
        Kind::Text,
        "null",
        "Adam (which means AdamW unless adam_w_mode is false), AdamW, SGD, Adagrad, Lion, Lamb, or the name of a class of \
         torch.optim.",
    )
    .auto(AutoRule::NotAllowed),
    built("optimizer.params", Kind::Open, "null", "The optimizer's parameters, such as lr and weight_decay."),
    no_effect(
        "optimizer.legacy_fusion",
        Kind::Bool,
        "false",
        "Chose an older way to fuse the fp16 optimizer.",
        "there is one optimizer path",
    ),
    built("scheduler", Kind::Block, "null", "The learning-rate schedule, unless the program brings its own."),
    built(
        "scheduler.type",
        Kind::Text,
        "null",
        "WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle, or the name of a class of \
         torch.optim.lr_scheduler.",
    )
    .auto(AutoRule::NotAllowed),
    built("scheduler.params", Kind::Open, "null", "The schedule's parameters, such as warmup_num_steps."),
    built(
        "gradient_clipping",
        Kind::NON_NEGATIVE,
        "1.0",
        "The greatest L2 norm of all gradients together; longer gradients are scaled down to it. 0 switches clipping off.",
    ),
    built(
        "steps_per_print",
        Kind::IntOrInfinity,
        "null",
        "Optimizer steps between two progress lines; none are printed when it is not set or Infinity.",
    ),
    built("wall_clock_breakdown", Kind::Bool, "false", "Measure and report where the time of a step goes."),
    built("dump_state", Kind::Bool, "false", "Print the resolved config when the engine starts."),
    built(
        "prescale_gradients",
        Kind::Bool,
        "false",
        "Divide gradients by the number of ranks before they are summed instead of after.",
    )
    .auto(AutoRule::NotAllowed),
    built(
        "gradient_predivide_factor",
        Kind::ABOVE_ZERO,
        "1.0",
        "Divide gradients by this before they are summed, and make up for it after.",
    )
    .auto(AutoRule::NotAllowed),
    built(
        "communication_data_type",
        Kind::DType,
        "null",
        "The dtype gradients travel in between ranks; their own when it is not set.",
    ),
    built(
        "zero_allow_untested_optimizer",
        Kind::Bool,
        "false",
        "Allow a client's optimizer that is not known to work on shards of parameters.",
    ),
    built(
        "dataloader_drop_last",
        Kind::Bool,
        "false",
        "Drop the last batch of an epoch when it is not a full one.",
    ),
    no_effect(
        "zero_force_ds_cpu_optimizer",
        Kind::Bool,
        "true",
        "Require DeepSpeed's own CPU optimizer when optimizer state is offloaded.",
        "offloading does not depend on the optimizer's class",
    ),
    no_effect(
        "disable_allgather",
        Kind::Bool,
        "false",
        "Chose broadcasts instead of all-gathers for updated parameters.",
        "the transport decides how updated parameters are shared",
    ),
    not_built(
        "memory_breakdown",
        Kind::Bool,
        "false",
        "Print memory use at several places of a step.",
        "the memory report",
        NonDefault,
    ),
    no_effect(
        "log_level",
        Kind::Text,
        "null",
        "The level of the logger.",
        "the program sets it: logging.getLogger(\"DeepSpeed\").setLevel(...)",
    ),
    no_effect(
        "vocabulary_size",
        Kind::COUNT,
        "null",
        "The size of the vocabulary, of which the original says when it is not a multiple of 8.",
        "it is read nowhere",
    ),
    not_built(
        "managed_gradient_accumulation",
        Kind::Bool,
        "true",
        "Let the engine count micro-batches; false leaves accumulation to the program.",
        "gradient accumulation that the program manages",
        NonDefault,
    ),
    not_built(
        "gradient_allreduce_op",
        Kind::Choice(&["mean", "sum"]),
        "\"mean\"",
        "Whether the gradients of the ranks are averaged or summed.",
        "summing of gradients without averaging",
        NonDefault,
    ),
    not_built(
        "disable_python_gc",
        Kind::Bool,
        "false",
        "Switch Python's garbage collector off while training.",
        "control of Python's garbage collector",
        NonDefault,
    ),
    not_built(
        "sequence_parallel_size",
        Kind::POSITIVE,
        "1",
        "Ranks that share one sequence.",
        SEQUENCE_PARALLEL,
        NonDefault,
    ),
    not_built(
        "seq_parallel_communication_data_type",
        Kind::DType,
        "\"fp32\"",
        "The dtype of the communication of sequence parallelism.",
        SEQUENCE_PARALLEL,
        Never,
    ),
    not_built(
        "data_parallel_size",
        Kind::POSITIVE,
        "null",
        "Ranks that hold replicas, when it is not all of them.",
        SEQUENCE_PARALLEL,
        NonDefault,
    ),
    not_built(
        "use_data_before_expert_parallelism",
        Kind::Bool,
        "false",
        "The order of ranks in expert parallelism.",
        "expert parallelism",
        NonDefault,
    ),
    removed("amp", Present, "use a bf16 or fp16 block"),
    removed("sparse_gradients", Present, "dense gradients are reduced for every parameter"),
    removed("compression_training", Present, "compress the model with a library made for it"),
    removed("quantize_training", Present, "quantize the model with a library made for it"),
    removed("curriculum_learning", Present, "order the data in the program's own data loader"),
    removed("progressive_layer_drop", Present, "drop layers in the model's own code"),
    removed("eigenvalue", Present, "it served quantize_training only"),
    removed("sparse_attention", Present, "choose an attention kernel in the model's own code"),
    removed("elasticity", Present, "checkpoints resume on any number of ranks; give batch sizes that divide"),
    removed("graph_harvesting", Present, "compile the model with torch.compile"),
    removed("nebula", Present, "checkpoints are written by the engine"),
];
