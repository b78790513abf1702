//! The learning-rate schedules the engine brings, and their parameters.

use super::{Kind, Named, Setting, TRAINER, built};

const WARMUP_STEPS: Setting =
    built("warmup_num_steps", Kind::POSITIVE, "1000", "Steps until the rate is reached.").auto(TRAINER);
const WARMUP_TYPE: Setting =
    built("warmup_type", Kind::Choice(&["log", "linear"]), "\"log\"", "The shape of the warm-up.");
const MIN_LR: Setting =
    built("warmup_min_lr", Kind::Rates, "0.0", "The rate the warm-up starts from; one, or one per group.")
        .auto(TRAINER);
const MAX_LR: Setting = built(
    "warmup_max_lr",
    Kind::Rates,
    "null",
    "The rate the warm-up ends at; one, or one per group; the optimizer's own when it is not set.",
)
.auto(TRAINER);
const TOTAL: Setting = built(
    "total_num_steps",
    Kind::NON_NEGATIVE,
    "null",
    "Optimizer steps of the whole training; must be given.",
)
.auto(TRAINER);
const LAST_ITERATION: Setting =
    built("last_batch_iteration", Kind::Int { min: -1, max: i64::MAX }, "-1", "The step to continue from.");

/// The schedules of the engine.
pub const SCHEDULERS: &[Named] = &[
    Named {
        name: "WarmupLR",
        params: &[MIN_LR, MAX_LR, WARMUP_STEPS, WARMUP_TYPE, LAST_ITERATION],
        meaning: "Warm up, then stay.",
    },
    Named {
        name: "WarmupDecayLR",
        params: &[
            TOTAL,
            MIN_LR,
            Setting { default: "0.001", ..MAX_LR },
            WARMUP_STEPS,
            WARMUP_TYPE,
            LAST_ITERATION,
        ],
        meaning: "Warm up, then fall linearly to zero.",
    },
    Named {
        name: "WarmupCosineLR",
        params: &[
            TOTAL,
            built("warmup_min_ratio", Kind::NON_NEGATIVE, "0.0", "Where the warm-up starts, over the rate.")
                .auto(TRAINER),
            WARMUP_STEPS,
            built("cos_min_ratio", Kind::NON_NEGATIVE, "0.0001", "Where the cosine ends, over the rate.")
                .auto(TRAINER),
            WARMUP_TYPE,
            LAST_ITERATION,
        ],
        meaning: "Warm up, then fall along half a cosine.",
    },
    Named {
        name: "LRRangeTest",
        params: &[
            built("lr_range_test_min_lr", Kind::Rates, "0.001", "The rate to start from."),
            built("lr_range_test_step_size", Kind::POSITIVE, "2000", "Steps in one stretch."),
            built("lr_range_test_step_rate", Kind::NUMBER, "1.0", "How much the rate grows in one stretch."),
            built("lr_range_test_staircase", Kind::Bool, "false", "Grow in stairs."),
            LAST_ITERATION,
        ],
        meaning: "Raise the rate steadily, to find the range that works.",
    },
    Named {
        name: "OneCycle",
        params: &[
            built("cycle_min_lr", Kind::Rates, "null", "The rate at both ends of the cycle; must be given."),
            built("cycle_max_lr", Kind::Rates, "null", "The rate at its top; must be given."),
            built("decay_lr_rate", Kind::NON_NEGATIVE, "0.0", "The decay of the rate after the cycle."),
            built("cycle_first_step_size", Kind::ABOVE_ZERO, "2000", "Steps up."),
            built(
                "cycle_second_step_size",
                Kind::NON_NEGATIVE,
                "null",
                "Steps down; as many as up when not set.",
            ),
            built("cycle_first_stair_count", Kind::NON_NEGATIVE, "0", "Stairs up; 0 for a ramp."),
            built(
                "cycle_second_stair_count",
                Kind::NON_NEGATIVE,
                "null",
                "Stairs down; as many as up when not set.",
            ),
            built("decay_step_size", Kind::NON_NEGATIVE, "0", "Steps in one stretch of decay; 0 for none."),
            built("cycle_momentum", Kind::Bool, "true", "Cycle the momentum against the rate."),
            built("cycle_min_mom", Kind::Rates, "0.8", "The momentum at the top."),
            built("cycle_max_mom", Kind::Rates, "0.9", "The momentum at both ends."),
            built("decay_mom_rate", Kind::NUMBER, "0.0", "The decay of the momentum after the cycle."),
            LAST_ITERATION,
        ],
        meaning: "One cycle of the rate up and down, then a decay.",
    },
];

/// Classes of torch.optim.lr_scheduler that are known by name; others are looked up too, with a warning.
pub const TORCH_SCHEDULERS: &[&str] = &[
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "StepLR",
];
