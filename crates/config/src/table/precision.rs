//! Mixed precision: fp16, bf16 and the data types around them.

use super::{
    Asks::{Enabled, NonDefault},
    Kind, Setting, built, no_effect, not_built,
};

const HALF_MASTERS: &str = "master weights, gradients or optimizer state below fp32";

pub(super) const SETTINGS: &[Setting] = &[
    built("fp16", Kind::Block, "{}", "Training in fp16 with a loss scale."),
    built("fp16.enabled", Kind::Bool, "false", "Train in fp16. Not together with bf16."),
    built(
        "fp16.loss_scale",
        Kind::NON_NEGATIVE,
        "0.0",
        "A fixed loss scale; 0 means a dynamic one, which halves on overflow and doubles after a quiet time.",
    ),
    built(
        "fp16.initial_scale_power",
        Kind::Int { min: 0, max: 126 },
        "16",
        "The dynamic loss scale starts at 2 to this power.",
    ),
    built(
        "fp16.loss_scale_window",
        Kind::POSITIVE,
        "1000",
        "Steps without overflow before the dynamic loss scale doubles.",
    ),
    built(
        "fp16.hysteresis",
        Kind::POSITIVE,
        "2",
        "Overflows that are tolerated before the dynamic loss scale halves, the last one included.",
    ),
    built(
        "fp16.consecutive_hysteresis",
        Kind::Bool,
        "false",
        "Refill the hysteresis at every step without overflow, not only when the scale doubles.",
    ),
    built("fp16.min_loss_scale", Kind::ABOVE_ZERO, "1.0", "The dynamic loss scale never falls below this."),
    built("fp16.auto_cast", Kind::Bool, "false", "Cast floating-point inputs of the model to fp16."),
    not_built(
        "fp16.fp16_master_weights_and_grads",
        Kind::Bool,
        "false",
        "Keep master weights and gradients in fp16.",
        HALF_MASTERS,
        NonDefault,
    ),
    built("bf16", Kind::Block, "{}", "Training in bf16; it needs no loss scale.").alias(&["bfloat16"]),
    built("bf16.enabled", Kind::Bool, "false", "Train in bf16. Not together with fp16."),
    built(
        "bf16.check_grad_overflow",
        Kind::Bool,
        "true",
        "Skip a step whose gradients hold infinities or NaN instead of applying it.",
    ),
    no_effect(
        "bf16.immediate_grad_update",
        Kind::Bool,
        "false",
        "Add a gradient to its fp32 accumulator as soon as it is there.",
        "it is always so",
    ),
    not_built(
        "bf16.bf16_master_weights_and_grads",
        Kind::Bool,
        "false",
        "Keep master weights and gradients in bf16.",
        HALF_MASTERS,
        NonDefault,
    ),
    not_built(
        "bf16.bf16_optimizer_states",
        Kind::Bool,
        "false",
        "Keep the optimizer's state in bf16.",
        HALF_MASTERS,
        NonDefault,
    ),
    built("data_types", Kind::Block, "{}", "The dtypes of what is not the model's weights."),
    built(
        "data_types.grad_accum_dtype",
        Kind::DType,
        "null",
        "The dtype gradients are accumulated in; fp32 when it is not set, whatever the model's.",
    ),
    built(
        "data_types.param_dtype",
        Kind::DType,
        "null",
        "The dtype of the model's weights; when it is set it must be that of the fp16 or bf16 block.",
    ),
    built(
        "data_types.buffer_dtype",
        Kind::DType,
        "null",
        "The dtype of the model's buffers; they keep their own when it is not set.",
    ),
    no_effect(
        "data_types.keep_in_fp32_modules",
        Kind::Anything,
        "\"auto\"",
        "Modules whose weights stay in fp32.",
        "the master weights of all modules are fp32",
    ),
    not_built(
        "torch_autocast",
        Kind::Block,
        "{}",
        "Mixed precision by torch.autocast.",
        "torch.autocast run by the engine",
        Enabled,
    ),
    built("torch_autocast.enabled", Kind::Bool, "false", "Use torch.autocast."),
    built("torch_autocast.dtype", Kind::DType, "null", "The dtype to cast to."),
    built(
        "torch_autocast.lower_precision_safe_modules",
        Kind::List,
        "null",
        "The modules whose communication may be in the lower precision.",
    ),
];
