//! The hyperparameters of a parameter group.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{OptimError, OptimizerKind, error::nearest};

/// The hyperparameters of one parameter group. Fields that its optimizer does not use keep their defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hyper {
    kind: OptimizerKind,
    /// Learning rate. Default 1e-3, Adagrad 1e-2.
    pub lr: f64,
    /// Decay rates of the two moments (Adam, Lion, Lamb). Default 0.9, 0.999.
    pub betas: (f64, f64),
    /// Added to the root of the second moment. Default 1e-8, Adagrad 1e-10.
    pub eps: f64,
    /// Weight decay. Default 0.
    pub weight_decay: f64,
    /// SGD's momentum. Default 0: none, and no state.
    pub momentum: f64,
    /// SGD's dampening of the gradient in the momentum. Default 0.
    pub dampening: f64,
    /// SGD's look-ahead. Default off.
    pub nesterov: bool,
    /// Whether Adam and Lamb correct the moments for their start at zero. Default on.
    pub bias_correction: bool,
    /// Whether Adam's weight decay is decoupled (AdamW) or L2 regularisation. Default on, in both `Adam` and
    /// `AdamW`.
    pub adam_w_mode: bool,
    /// Upper limit of Lamb's trust ratio. Default 10.
    pub max_coeff: f64,
    /// Lower limit of Lamb's trust ratio. Default 0.01.
    pub min_coeff: f64,
    /// Adagrad's decay of the learning rate by step. Default 0.
    pub lr_decay: f64,
}

/// Weight decay that `torch.optim.AdamW` has where none is given.
const TORCH_ADAMW_WEIGHT_DECAY: f64 = 0.01;

/// Keys of Adam and AdamW.
const ADAM_KEYS: &[&str] = &[
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "bias_correction",
    "adam_w_mode",
    "torch_adam",
    "fp32_optimizer_states",
    "amsgrad",
    "set_grad_none",
    "maximize",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
];
const SGD_KEYS: &[&str] = &[
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "foreach",
    "fused",
    "differentiable",
];
const ADAGRAD_KEYS: &[&str] = &[
    "lr",
    "lr_decay",
    "weight_decay",
    "initial_accumulator_value",
    "eps",
    "fp32_optimizer_states",
    "amsgrad",
    "maximize",
    "foreach",
    "fused",
    "differentiable",
];
const LION_KEYS: &[&str] = &["lr", "betas", "weight_decay", "fp32_optimizer_states", "set_grad_none"];
const LAMB_KEYS: &[&str] = &[
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "bias_correction",
    "max_coeff",
    "min_coeff",
    "eps_inside_sqrt",
    "amsgrad",
];

impl Hyper {
    /// The defaults of an optimizer, as in DeepSpeed (and in `torch.optim` for SGD).
    pub fn defaults(kind: OptimizerKind) -> Self {
        let adagrad = kind == OptimizerKind::Adagrad;
        Self {
            kind,
            lr: if adagrad { 1e-2 } else { 1e-3 },
            betas: (0.9, 0.999),
            eps: if adagrad { 1e-10 } else { 1e-8 },
            weight_decay: 0.0,
            momentum: 0.0,
            dampening: 0.0,
            nesterov: false,
            bias_correction: true,
            adam_w_mode: matches!(kind, OptimizerKind::Adam | OptimizerKind::AdamW),
            max_coeff: 10.0,
            min_coeff: 0.01,
            lr_decay: 0.0,
        }
    }

    /// What `optimizer.type` and `optimizer.params` of a config mean together.
    ///
    /// `torch_adam` asks for torch's implementation: the same formula, but AdamW with a weight decay of 0.01 where
    /// none is given.
    ///
    /// # Errors
    /// [`OptimError`] for an unknown name, an unknown key, and values that are wrong or contradict each other.
    pub fn from_config(name: &str, params: &Map<String, Value>) -> Result<Self, OptimError> {
        let Some((kind, _)) = OptimizerKind::from_name(name) else {
            return Err(OptimError::UnknownOptimizer { name: name.to_owned(), known: OptimizerKind::NAMES });
        };
        let mut hyper = Self::defaults(kind);
        for (key, value) in params {
            hyper.set(key, value)?;
        }
        let torch_adam = params.get("torch_adam") == Some(&Value::Bool(true));
        if torch_adam && hyper.adam_w_mode && !params.contains_key("weight_decay") {
            hyper.weight_decay = TORCH_ADAMW_WEIGHT_DECAY;
        }
        hyper.validate()?;
        Ok(hyper)
    }

    /// The optimizer these belong to.
    pub fn kind(&self) -> OptimizerKind {
        self.kind
    }

    /// The keys that [`Hyper::set`] accepts.
    pub fn accepted_keys(kind: OptimizerKind) -> &'static [&'static str] {
        match kind {
            OptimizerKind::Adam | OptimizerKind::AdamW => ADAM_KEYS,
            OptimizerKind::Sgd => SGD_KEYS,
            OptimizerKind::Adagrad => ADAGRAD_KEYS,
            OptimizerKind::Lion => LION_KEYS,
            OptimizerKind::Lamb => LAMB_KEYS,
        }
    }

    /// Sets one hyperparameter by the name it has in configs and in `param_groups`.
    ///
    /// Keys that only choose between torch's implementations (`foreach`, `fused`, `torch_adam`) are accepted and
    /// change nothing.
    ///
    /// # Errors
    /// [`OptimError`] for an unknown key, a wrong type, a value out of range or one that is not supported.
    pub fn set(&mut self, key: &str, value: &Value) -> Result<(), OptimError> {
        let owner = self.kind.name();
        if key == "max_grad_norm" {
            return Err(OptimError::MaxGradNorm { owner, value: value.to_string() });
        }
        let accepted = Self::accepted_keys(self.kind);
        if !accepted.contains(&key) {
            return Err(OptimError::UnknownKey {
                owner,
                key: key.to_owned(),
                nearest: nearest(key, accepted),
                accepted,
            });
        }
        let given = Given { owner, key, value };
        match key {
            "lr" => self.lr = given.at_least_zero()?,
            "betas" => self.betas = given.betas()?,
            "eps" => self.eps = given.at_least_zero()?,
            "weight_decay" => self.weight_decay = given.at_least_zero()?,
            "momentum" => self.momentum = given.at_least_zero()?,
            "dampening" => self.dampening = given.number()?,
            "nesterov" => self.nesterov = given.boolean()?,
            "bias_correction" => self.bias_correction = given.boolean()?,
            "adam_w_mode" => self.adam_w_mode = given.boolean()?,
            "max_coeff" => self.max_coeff = given.at_least_zero()?,
            "min_coeff" => self.min_coeff = given.at_least_zero()?,
            "lr_decay" => self.lr_decay = given.at_least_zero()?,
            "torch_adam" => drop(given.boolean()?),
            "foreach" | "fused" => drop(value.is_null() || given.boolean()?),
            "fp32_optimizer_states" => given.only(true, "optimizer states are kept in fp32")?,
            "set_grad_none" => given.only(true, "gradients are released after every step")?,
            "amsgrad" => {
                given.only(false, "the AMSGrad variant is not built in; use a torch.optim optimizer")?;
            }
            "maximize" => given.only(false, "negate the loss instead")?,
            "capturable" | "differentiable" => given.only(false, "the update is not recorded by torch")?,
            "eps_inside_sqrt" => given.only(false, "`eps` is added outside the square root")?,
            "initial_accumulator_value" => {
                if given.at_least_zero()? != 0.0 {
                    return Err(given.unsupported("the sum of squares starts at zero"));
                }
            }
            _ => unreachable!("invariant: every accepted key is handled: {key}"),
        }
        Ok(())
    }

    /// One hyperparameter by name, as [`Hyper::set`] takes it; `None` for keys that are not stored.
    pub fn get(&self, key: &str) -> Option<Value> {
        if !Self::accepted_keys(self.kind).contains(&key) {
            return None;
        }
        Some(match key {
            "lr" => json!(self.lr),
            "betas" => json!([self.betas.0, self.betas.1]),
            "eps" => json!(self.eps),
            "weight_decay" => json!(self.weight_decay),
            "momentum" => json!(self.momentum),
            "dampening" => json!(self.dampening),
            "nesterov" => json!(self.nesterov),
            "bias_correction" => json!(self.bias_correction),
            "adam_w_mode" => json!(self.adam_w_mode),
            "max_coeff" => json!(self.max_coeff),
            "min_coeff" => json!(self.min_coeff),
            "lr_decay" => json!(self.lr_decay),
            _ => return None,
        })
    }

    /// All stored hyperparameters that the optimizer uses, by name: the entries of a torch `param_groups` element.
    pub fn to_map(&self) -> Map<String, Value> {
        Self::accepted_keys(self.kind)
            .iter()
            .filter_map(|key| Some(((*key).to_owned(), self.get(key)?)))
            .collect()
    }

    /// Checks what single keys cannot show.
    ///
    /// # Errors
    /// [`OptimError::Contradiction`].
    pub fn validate(&self) -> Result<(), OptimError> {
        let contradiction = |reason: &str| {
            Err(OptimError::Contradiction { owner: self.kind.name(), reason: reason.to_owned() })
        };
        if self.nesterov && (self.momentum <= 0.0 || self.dampening != 0.0) {
            return contradiction("`nesterov` needs a `momentum` above 0 and a `dampening` of 0");
        }
        if self.kind == OptimizerKind::AdamW && !self.adam_w_mode {
            return contradiction(
                "`adam_w_mode: false` contradicts the name; use the type `Adam` for L2 regularisation",
            );
        }
        if self.min_coeff > self.max_coeff {
            return contradiction("`min_coeff` is larger than `max_coeff`");
        }
        Ok(())
    }
}

/// A value on its way into a field.
struct Given<'a> {
    owner: &'static str,
    key: &'a str,
    value: &'a Value,
}

impl Given<'_> {
    fn bad(&self, expected: &'static str) -> OptimError {
        OptimError::BadValue {
            owner: self.owner,
            key: self.key.to_owned(),
            expected,
            value: self.value.to_string(),
        }
    }

    fn unsupported(&self, reason: &'static str) -> OptimError {
        OptimError::Unsupported {
            owner: self.owner,
            key: self.key.to_owned(),
            value: self.value.to_string(),
            reason,
        }
    }

    fn number(&self) -> Result<f64, OptimError> {
        self.value.as_f64().ok_or_else(|| self.bad("a number"))
    }

    fn at_least_zero(&self) -> Result<f64, OptimError> {
        let expected = "a number of at least 0";
        self.value.as_f64().filter(|number| *number >= 0.0).ok_or_else(|| self.bad(expected))
    }

    fn boolean(&self) -> Result<bool, OptimError> {
        self.value.as_bool().ok_or_else(|| self.bad("true or false"))
    }

    fn only(&self, supported: bool, reason: &'static str) -> Result<(), OptimError> {
        if self.boolean()? == supported { Ok(()) } else { Err(self.unsupported(reason)) }
    }

    fn betas(&self) -> Result<(f64, f64), OptimError> {
        let beta = |value: &Value| value.as_f64().filter(|beta| (0.0..1.0).contains(beta));
        match self.value.as_array().map(Vec::as_slice) {
            Some([first, second]) => beta(first).zip(beta(second)),
            _ => None,
        }
        .ok_or_else(|| self.bad("a list of two numbers, each at least 0 and below 1"))
    }
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "`json!` makes values")]
mod tests {
    use super::*;

    fn params(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn error(name: &str, value: Value) -> String {
        Hyper::from_config(name, &params(value)).unwrap_err().to_string()
    }

    #[test]
    fn the_sample_config_of_getting_started() {
        let given = json!({"lr": 0.00015, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7});
        let hyper = Hyper::from_config("Adam", &params(given)).unwrap();
        assert_eq!((hyper.lr, hyper.betas, hyper.weight_decay), (0.00015, (0.8, 0.999), 3e-7));
        assert!(hyper.adam_w_mode, "Adam means AdamW");
    }

    #[test]
    fn every_accepted_key_is_handled_and_round_trips() {
        for name in OptimizerKind::NAMES {
            let (kind, _) = OptimizerKind::from_name(name).unwrap();
            let mut hyper = Hyper::defaults(kind);
            for key in Hyper::accepted_keys(kind) {
                // The default is a legal value, or the key stores nothing and takes a boolean or zero.
                let legal = hyper.get(key).unwrap_or_else(|| match *key {
                    "initial_accumulator_value" => json!(0),
                    "fp32_optimizer_states" | "set_grad_none" => json!(true),
                    _ => json!(false),
                });
                hyper.set(key, &legal).unwrap();
            }
            assert_eq!(hyper, Hyper::defaults(kind));
            assert_eq!(Hyper::from_config(name, &hyper.to_map()).unwrap(), hyper);
            let stored = serde_json::to_string(&hyper).unwrap();
            assert_eq!(serde_json::from_str::<Hyper>(&stored).unwrap(), hyper);
        }
    }

    #[test]
    fn torch_adam_brings_the_weight_decay_of_torch() {
        let decay = |value| Hyper::from_config("Adam", &params(value)).unwrap().weight_decay;
        assert_eq!(decay(json!({"torch_adam": true})), 0.01);
        assert_eq!(decay(json!({"torch_adam": true, "weight_decay": 0.0})), 0.0);
        assert_eq!(decay(json!({"torch_adam": true, "adam_w_mode": false})), 0.0);
        assert_eq!(decay(json!({"torch_adam": false})), 0.0);
    }

    #[test]
    fn wrong_settings_say_what_to_do() {
        assert_eq!(
            error("Lion", json!({"weight_decai": 0.1})),
            "Lion has no parameter `weight_decai`, did you mean `weight_decay`?; it accepts: lr, betas, weight_decay, \
             fp32_optimizer_states, set_grad_none"
        );
        assert_eq!(
            error("adam", json!({"max_grad_norm": 1.0})),
            "Adam: `max_grad_norm` is not a parameter of an optimizer; set the top-level key `gradient_clipping` to 1.0 \
             instead"
        );
        assert_eq!(
            error("sgd", json!({"lr": "fast"})),
            "SGD: `lr` must be a number of at least 0, got \"fast\""
        );
        assert_eq!(error("sgd", json!({"lr": -1})), "SGD: `lr` must be a number of at least 0, got -1");
        assert_eq!(
            error("lamb", json!({"betas": [0.9, 1.0]})),
            "Lamb: `betas` must be a list of two numbers, each at least 0 and below 1, got [0.9,1.0]"
        );
        assert!(error("adam", json!({"amsgrad": true})).contains("`amsgrad: true` is not supported"));
        assert!(error("adam", json!({"fp32_optimizer_states": false})).contains("kept in fp32"));
        assert!(error("adamw", json!({"adam_w_mode": false})).contains("use the type `Adam`"));
        assert!(error("sgd", json!({"nesterov": true})).contains("`momentum` above 0"));
        assert!(error("lamb", json!({"min_coeff": 11})).contains("larger than `max_coeff`"));
        assert!(error("Muon", json!({})).contains("unknown optimizer `Muon`"));
    }
}
