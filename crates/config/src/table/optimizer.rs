//! The optimizers the engine brings, and their parameters.

use super::{AutoRule, Kind, Named, Setting, Status, TRAINER, built, no_effect, not_built};
use crate::table::Asks::NonDefault;

const LR: Setting = built("lr", Kind::NON_NEGATIVE, "0.001", "The learning rate.").auto(TRAINER);
const BETAS: Setting = built(
    "betas",
    Kind::Fractions(2),
    "[0.9, 0.999]",
    "The decay rates of the averages of gradients and of their squares.",
)
.auto(TRAINER);
const EPS: Setting =
    built("eps", Kind::NON_NEGATIVE, "1e-8", "Added to the denominator of the update.").auto(TRAINER);
const WEIGHT_DECAY: Setting =
    built("weight_decay", Kind::NON_NEGATIVE, "0.0", "The weight decay.").auto(TRAINER);
const BIAS_CORRECTION: Setting =
    built("bias_correction", Kind::Bool, "true", "Correct the averages for their start at zero.");
const MAX_GRAD_NORM: Setting = Setting {
    path: "max_grad_norm",
    kind: Kind::Anything,
    default: "null",
    auto: AutoRule::NotAllowed,
    status: Status::Removed {
        instead: "set gradient_clipping at the top of the config",
        asks: crate::table::Asks::Present,
    },
    aliases: &[],
    meaning: "Rejected, as by the original.",
};
const AMSGRAD: Setting =
    not_built("amsgrad", Kind::Bool, "false", "Use the AMSGrad variant.", "AMSGrad", NonDefault);
const STATE_DTYPE: Setting = not_built(
    "fp32_optimizer_states",
    Kind::Bool,
    "true",
    "Keep the state in fp32.",
    "optimizer state below fp32",
    NonDefault,
);
const SET_GRAD_NONE: Setting = not_built(
    "set_grad_none",
    Kind::Bool,
    "true",
    "Release gradients when they are cleared.",
    "keeping of cleared gradients",
    NonDefault,
);
const MAXIMIZE: Setting = not_built(
    "maximize",
    Kind::Bool,
    "false",
    "Climb instead of descend.",
    "maximizing (negate the loss)",
    NonDefault,
);
const FUSED: Setting =
    no_effect("fused", Kind::Bool, "null", "Use one kernel per update.", "every update is one pass");
const FOREACH: Setting =
    no_effect("foreach", Kind::Bool, "null", "Update many tensors at once.", "every update is one pass");
const CAPTURABLE: Setting = not_built(
    "capturable",
    Kind::Bool,
    "false",
    "Let a CUDA graph record the update.",
    "recording of the update",
    NonDefault,
);
const DIFFERENTIABLE: Setting = not_built(
    "differentiable",
    Kind::Bool,
    "false",
    "Let autograd record the update.",
    "recording of the update",
    NonDefault,
);

const ADAM: &[Setting] = &[
    LR,
    BETAS,
    EPS,
    WEIGHT_DECAY,
    BIAS_CORRECTION,
    built(
        "adam_w_mode",
        Kind::Bool,
        "true",
        "Decay weights apart from the gradient (AdamW); false adds the decay to the gradient.",
    )
    .alias(&["adamw_mode"]),
    built(
        "torch_adam",
        Kind::Bool,
        "false",
        "Do as torch's class does: the same formula, but AdamW with a weight decay of 0.01 where none is given.",
    ),
    AMSGRAD,
    STATE_DTYPE,
    SET_GRAD_NONE,
    MAXIMIZE,
    FUSED,
    FOREACH,
    CAPTURABLE,
    DIFFERENTIABLE,
    MAX_GRAD_NORM,
];

/// The optimizers of the engine.
pub const OPTIMIZERS: &[Named] = &[
    Named { name: "Adam", params: ADAM, meaning: "Adam; AdamW unless adam_w_mode is false." },
    Named { name: "AdamW", params: ADAM, meaning: "Adam with decoupled weight decay." },
    Named {
        name: "SGD",
        params: &[
            LR,
            built("momentum", Kind::NON_NEGATIVE, "0.0", "The momentum.").auto(TRAINER),
            built("dampening", Kind::NUMBER, "0.0", "The dampening of the momentum."),
            built("nesterov", Kind::Bool, "false", "Use Nesterov's momentum."),
            WEIGHT_DECAY,
            MAXIMIZE,
            FUSED,
            FOREACH,
            DIFFERENTIABLE,
            MAX_GRAD_NORM,
        ],
        meaning: "Stochastic gradient descent.",
    },
    Named {
        name: "Adagrad",
        params: &[
            Setting { default: "0.01", ..LR },
            Setting { default: "1e-10", ..EPS },
            WEIGHT_DECAY,
            built("lr_decay", Kind::NON_NEGATIVE, "0.0", "The decay of the learning rate."),
            not_built(
                "initial_accumulator_value",
                Kind::NON_NEGATIVE,
                "0.0",
                "Where the sums of squares start.",
                "sums of squares that start above zero",
                NonDefault,
            ),
            AMSGRAD,
            STATE_DTYPE,
            MAXIMIZE,
            FUSED,
            FOREACH,
            DIFFERENTIABLE,
            MAX_GRAD_NORM,
        ],
        meaning: "Adagrad.",
    },
    Named {
        name: "Lion",
        params: &[LR, BETAS, WEIGHT_DECAY, STATE_DTYPE, SET_GRAD_NONE, MAX_GRAD_NORM],
        meaning: "Lion: the sign of an interpolated momentum.",
    },
    Named {
        name: "Lamb",
        params: &[
            LR,
            BETAS,
            EPS,
            WEIGHT_DECAY,
            BIAS_CORRECTION,
            built("max_coeff", Kind::NON_NEGATIVE, "10.0", "The greatest trust ratio."),
            built("min_coeff", Kind::NON_NEGATIVE, "0.01", "The least trust ratio."),
            not_built(
                "eps_inside_sqrt",
                Kind::Bool,
                "false",
                "Add eps before the root is taken.",
                "eps inside the root",
                NonDefault,
            ),
            AMSGRAD,
            MAX_GRAD_NORM,
        ],
        meaning: "LAMB: Adam with a trust ratio per parameter.",
    },
];

/// Classes of torch.optim that are known by name; others are looked up too, with a warning.
pub const TORCH_OPTIMIZERS: &[&str] =
    &["Adadelta", "Adafactor", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam"];
