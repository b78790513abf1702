//! Facts that a config states.

use deepspeed_config::{Config, GatheringConfig, OptimizerConfig};
use deepspeed_optim::{Hyper, OptimizerKind, state_names};

use crate::memory::{Facts, ParamCounts};

/// State tensors where nothing says how many: Adam's.
const ASSUMED_STATE_TENSORS: u64 = 2;

impl Facts {
    /// The facts of a run of `world` ranks, `ranks_per_host` of them on each host, whose model has `params`.
    ///
    /// `accumulation` is the micro-batches per update that [`Config::resolve_batch`] gives.
    pub fn from_config(
        config: &Config,
        params: ParamCounts,
        world: u64,
        ranks_per_host: u64,
        accumulation: u64,
    ) -> Self {
        let zero = &config.zero;
        Self {
            params,
            stage: zero.stage.number(),
            world,
            ranks_per_host,
            accelerator: false,
            shared_memory: world == ranks_per_host,
            state_tensors: Self::state_tensors_of(config).unwrap_or(ASSUMED_STATE_TENSORS),
            whole_state: zero.stage.number() == 0 && Self::is_client_optimizer(config),
            accumulation,
            live_parameters: live_parameters(&zero.gathering, &params),
            offload_optimizer: zero.offload_optimizer.clone(),
            offload_param: zero.offload_param.clone(),
            checkpoint_copy: config.checkpoint.behind,
            sub_group: zero.sub_group_size as u64,
        }
    }

    /// fp32 tensors of state of the optimizer that the config names; `None` where it names none, or one of torch's.
    pub fn state_tensors_of(config: &Config) -> Option<u64> {
        let OptimizerConfig { kind, params, .. } = config.optimizer.as_ref()?;
        Hyper::from_config(kind, params).ok().map(|hyper| state_names(&hyper).len() as u64)
    }

    /// Whether the config names an optimizer that is not ours.
    fn is_client_optimizer(config: &Config) -> bool {
        config.optimizer.as_ref().is_some_and(|optimizer| OptimizerKind::from_name(&optimizer.kind).is_none())
    }

    /// Elements of the largest unit where only the number of parameters is known: the engine's unit, or a layer of a
    /// transformer with 32 of them, whichever is larger.
    pub fn assumed_largest_unit(params: u64) -> u64 {
        const ENGINE_UNIT: u64 = 1 << 22;
        const LAYERS: u64 = 32;
        params.div_ceil(LAYERS).max(ENGINE_UNIT).min(params)
    }
}

/// Elements that are whole at one time at stage 3: what is computed with, what comes early and what stays because it is
/// used again soon, at most `stage3_max_live_parameters`.
fn live_parameters(gathering: &GatheringConfig, params: &ParamCounts) -> u64 {
    let GatheringConfig { max_live_parameters, prefetch_bucket_size, max_reuse_distance, .. } = *gathering;
    let early_and_again = (prefetch_bucket_size as u64).saturating_add(max_reuse_distance as u64);
    params.largest_unit.saturating_add(early_and_again).min(max_live_parameters as u64)
}

#[cfg(test)]
mod tests {
    use deepspeed_config::{OffloadDevice, Options, Origin};

    use super::*;

    fn facts(text: &str, world: u64, ranks_per_host: u64) -> Facts {
        let config = Config::from_text(text, Origin::Dict, &Options::default()).unwrap().config;
        Facts::from_config(&config, ParamCounts::default(), world, ranks_per_host, 1)
    }

    #[test]
    fn settings_become_facts() {
        let text = r#"{"train_batch_size": 8, "optimizer": {"type": "Lion", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": 2,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/disk", "ratio": 0.5}}}"#;
        let found = facts(text, 8, 4);
        assert_eq!((found.stage, found.state_tensors), (2, 1));
        assert!(!found.shared_memory, "two hosts");
        assert_eq!(found.offload_optimizer.device, OffloadDevice::Nvme);
        assert_eq!(found.offload_optimizer.ratio, 0.5);
        assert!(facts("{}", 4, 4).shared_memory);
    }

    #[test]
    fn what_is_live() {
        let live = |text: &str| {
            let text = format!("{{\"zero_optimization\": {{{text}}}}}");
            facts(&text, 4, 4).live_parameters
        };
        assert_eq!(live(""), 1_000_000_000);
        assert_eq!(live("\"max_live_parameters\": 5e6"), 5_000_000);
        assert_eq!(live("\"stage3_max_reuse_distance\": 7, \"stage3_prefetch_bucket_size\": 30"), 37);
    }

    #[test]
    fn state_tensors_by_optimizer() {
        for (optimizer, expected) in [
            (r#"{"type": "AdamW"}"#, Some(2)),
            (r#"{"type": "SGD", "params": {"lr": 0.1}}"#, Some(0)),
            (r#"{"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}"#, Some(1)),
            (r#"{"type": "RMSprop"}"#, None),
        ] {
            let text = format!("{{\"optimizer\": {optimizer}}}");
            let config = Config::from_text(&text, Origin::Dict, &Options::default()).unwrap().config;
            assert_eq!(Facts::state_tensors_of(&config), expected, "{optimizer}");
        }
        assert_eq!(facts("{}", 1, 1).state_tensors, 2);
        assert!(facts(r#"{"optimizer": {"type": "RMSprop"}}"#, 1, 1).whole_state);
        assert!(!facts(r#"{"optimizer": {"type": "adam"}}"#, 1, 1).whole_state);
    }
}
