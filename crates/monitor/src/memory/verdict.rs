//! Whether a plan fits, and the smallest change that makes it fit.

use deepspeed_config::{OffloadDevice, OffloadOptimizerConfig, OffloadParamConfig};
use serde::{Serialize, Serializer};

use crate::memory::{Facts, Free, Kind, Limit, Plan, Tier, plan::UNITS_IN_USE};

/// What a tier lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shortage {
    /// Which tier.
    pub tier: Tier,
    /// Bytes that the plan needs: of one rank's accelerator, or of the host.
    pub needed: u64,
    /// What there is.
    pub free: Limit,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Verdict {
    /// Nothing is known about what is free.
    Unknown,
    /// It fits.
    Fits,
    /// It does not.
    TooLarge {
        /// What lacks, the first tier first.
        shortages: Vec<Shortage>,
        /// The smallest change that fits; `None` where none of those tried does.
        change: Option<Box<Change>>,
    },
}

/// What to change, compared with the facts it was made from; fields that stay are `None`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// Another ZeRO stage.
    pub stage: Option<u8>,
    /// Another `stage3_max_live_parameters`.
    pub live_parameters: Option<u64>,
    /// Another place for the optimizer's state.
    #[serde(serialize_with = "device")]
    pub offload_optimizer: Option<OffloadDevice>,
    /// Another place for the parameters.
    #[serde(serialize_with = "device")]
    pub offload_param: Option<OffloadDevice>,
    /// Another `offload_param.max_in_cpu`.
    pub max_in_cpu: Option<usize>,
    /// Whether checkpoints are written behind training.
    pub checkpoint_async: Option<bool>,
    /// Fewer ranks on each host.
    pub ranks_per_host: Option<u64>,
    /// More hosts.
    pub hosts: Option<u64>,
    /// What it needs then.
    pub plan: Plan,
}

fn device<S: Serializer>(device: &Option<OffloadDevice>, serializer: S) -> Result<S::Ok, S::Error> {
    match device {
        Some(device) => serializer.collect_str(device),
        None => serializer.serialize_none(),
    }
}

/// Whether the plan of `facts` fits into `free`.
pub fn judge(facts: &Facts, free: &Free) -> Verdict {
    let plan = Plan::new(facts);
    if free.host.is_none() && free.device.is_none() && free.nvme.is_none() {
        return Verdict::Unknown;
    }
    let shortages = shortages(&plan, free);
    if shortages.is_empty() {
        return Verdict::Fits;
    }
    Verdict::TooLarge { shortages, change: smallest_change(facts, free).map(Box::new) }
}

/// Bytes that a plan needs of a tier beyond what is held already: of one accelerator, or of the host.
pub(crate) fn needed(plan: &Plan, tier: Tier, free: &Free) -> u64 {
    let total = plan.total(tier);
    match tier {
        Tier::Device => total.per_rank,
        Tier::Nvme => total.per_host,
        // Weights that a change would no longer keep are given back: not more than the plan's own count.
        Tier::Host => total.per_host - free.weights_held.min(plan.at(Kind::Weights, Tier::Host).per_host),
    }
}

fn shortages(plan: &Plan, free: &Free) -> Vec<Shortage> {
    Tier::ALL
        .into_iter()
        .filter_map(|tier| {
            let limit = free.of(tier)?;
            let needed = needed(plan, tier, free);
            (needed > limit.bytes).then(|| Shortage { tier, needed, free: limit.clone() })
        })
        .collect()
}

impl Free {
    /// What is free in a tier.
    pub fn of(&self, tier: Tier) -> Option<&Limit> {
        match tier {
            Tier::Device => self.device.as_ref(),
            Tier::Host => self.host.as_ref(),
            Tier::Nvme => self.nvme.as_ref(),
        }
    }
}

/// What a step away from the facts costs the user: saves that training waits for least, a higher stage a little time, the host's memory more, a disk much
/// more; fewer ranks or more hosts change the run itself. Powers of two, so that the sum of all cheaper steps never
/// outweighs a dearer one, and no step is taken without need.
mod cost {
    pub(super) const SAVES_STAND_STILL: u32 = 1;
    pub(super) const STAGE: u32 = 2;
    pub(super) const NOTHING_KEPT: u32 = 4;
    pub(super) const LIVE_PARAMETERS: u32 = 8;
    pub(super) const OPTIMIZER_ON_CPU: u32 = 16;
    pub(super) const PARAM_ON_CPU: u32 = 32;
    pub(super) const OPTIMIZER_ON_NVME: u32 = 64;
    pub(super) const PARAM_ON_NVME: u32 = 128;
    /// For each halving.
    pub(super) const FEWER_RANKS: u32 = 256;
}

/// Of all combinations of steps the cheapest whose plan fits.
fn smallest_change(facts: &Facts, free: &Free) -> Option<Change> {
    let here = settings(facts);
    let on_these_hosts = rank_counts(facts).flat_map(|(step, ranks, hosts)| {
        here.iter().map(move |(price, it)| (price + cost::FEWER_RANKS * step, on(it, ranks, hosts)))
    });
    if let Some(found) = cheapest(facts, free, on_these_hosts) {
        return Some(found);
    }
    let hosts = facts.ranks().div_ceil(facts.local());
    // Every setting is tried on one number of hosts before the next.
    more_than(hosts).find_map(|hosts| {
        let tried = here.iter().map(|(price, it)| (*price, on(it, facts.local(), hosts)));
        cheapest(facts, free, tried)
    })
}

/// Numbers of hosts above `hosts`: a few more one by one, then doublings.
fn more_than(hosts: u64) -> impl Iterator<Item = u64> {
    const ONE_BY_ONE: u64 = 64;
    const MOST: u64 = 1 << 16;
    let doublings =
        std::iter::successors(Some(hosts.saturating_add(ONE_BY_ONE).saturating_mul(2)), |hosts| {
            hosts.checked_mul(2)
        });
    (hosts.saturating_add(1)..=hosts.saturating_add(ONE_BY_ONE))
        .chain(doublings)
        .take_while(|hosts| *hosts <= MOST)
}

fn cheapest(facts: &Facts, free: &Free, tried: impl Iterator<Item = (u32, Facts)>) -> Option<Change> {
    let mut tried: Vec<(u32, Facts)> = tried.collect();
    tried.sort_by_key(|(price, _)| *price);
    tried.into_iter().find_map(|(_, other)| {
        let plan = Plan::new(&other);
        shortages(&plan, free).is_empty().then(|| Change::between(facts, &other, plan))
    })
}

/// Fewer ranks on each host by halves: (number of halvings, ranks, hosts).
fn rank_counts(facts: &Facts) -> impl Iterator<Item = (u32, u64, u64)> {
    let (local, hosts) = (facts.local(), facts.ranks().div_ceil(facts.local()));
    (0..u64::BITS).map_while(move |step| {
        let ranks = local >> step;
        (ranks > 0).then_some((step, ranks, hosts))
    })
}

/// The same settings with other ranks.
fn on(facts: &Facts, ranks_per_host: u64, hosts: u64) -> Facts {
    let world = if hosts == facts.ranks().div_ceil(facts.local()) && ranks_per_host == facts.local() {
        facts.ranks()
    } else {
        ranks_per_host.saturating_mul(hosts)
    };
    Facts {
        world,
        ranks_per_host,
        shared_memory: facts.shared_memory && world == ranks_per_host,
        ..facts.clone()
    }
}

/// The facts under all settings that may save memory, with their price.
fn settings(facts: &Facts) -> Vec<(u32, Facts)> {
    let mut found = Vec::new();
    for stage in facts.stage..=3 {
        for (live_price, live) in live_options(facts, stage) {
            for (optimizer_price, optimizer) in optimizer_options(facts, stage) {
                for (param_price, param) in param_options(facts, stage) {
                    let price = cost::STAGE * u32::from(stage - facts.stage);
                    let other = Facts {
                        stage,
                        checkpoint_copy: false,
                        // A client's optimizer works on shards from stage 1 on.
                        whole_state: facts.whole_state && stage == 0,
                        live_parameters: live,
                        offload_optimizer: optimizer.clone(),
                        offload_param: param,
                        ..facts.clone()
                    };
                    let price = price + live_price + optimizer_price + param_price;
                    if facts.checkpoint_copy {
                        found.push((price, Facts { checkpoint_copy: true, ..other.clone() }));
                        found.push((price + cost::SAVES_STAND_STILL, other));
                    } else {
                        found.push((price, other));
                    }
                }
            }
        }
    }
    found
}

/// `stage3_max_live_parameters` as it is and, at stage 3, just enough for the unit in use and the next.
fn live_options(facts: &Facts, stage: u8) -> Vec<(u32, u64)> {
    let least = facts.params.largest_unit.saturating_mul(UNITS_IN_USE);
    let mut options = vec![(0, facts.live_parameters)];
    if stage == 3 && least < facts.live_parameters {
        options.push((cost::LIVE_PARAMETERS, least));
    }
    options
}

fn optimizer_options(facts: &Facts, stage: u8) -> Vec<(u32, OffloadOptimizerConfig)> {
    let here = &facts.offload_optimizer;
    let mut options = vec![(0, here.clone())];
    if stage > 0 {
        options.extend(further(here.device).map(|device| {
            let price = match device {
                OffloadDevice::Nvme => cost::OPTIMIZER_ON_NVME,
                _ => cost::OPTIMIZER_ON_CPU,
            };
            (price, OffloadOptimizerConfig { device, ..here.clone() })
        }));
    }
    options
}

fn param_options(facts: &Facts, stage: u8) -> Vec<(u32, OffloadParamConfig)> {
    let here = &facts.offload_param;
    let mut options = vec![(0, here.clone())];
    if stage < 3 {
        return options;
    }
    if here.device == OffloadDevice::Nvme && here.max_in_cpu > 0 {
        options.push((cost::NOTHING_KEPT, OffloadParamConfig { max_in_cpu: 0, ..here.clone() }));
    }
    options.extend(further(here.device).map(|device| {
        let price = match device {
            OffloadDevice::Nvme => cost::PARAM_ON_NVME,
            _ => cost::PARAM_ON_CPU,
        };
        let max_in_cpu = if device == OffloadDevice::Nvme { 0 } else { here.max_in_cpu };
        (price, OffloadParamConfig { device, max_in_cpu, ..here.clone() })
    }));
    options
}

/// The devices further away than `from`.
fn further(from: OffloadDevice) -> impl Iterator<Item = OffloadDevice> {
    [OffloadDevice::Cpu, OffloadDevice::Nvme].into_iter().filter(move |it| *it > from)
}

impl Change {
    fn between(old: &Facts, new: &Facts, plan: Plan) -> Self {
        let hosts = |facts: &Facts| facts.ranks().div_ceil(facts.local());
        Self {
            stage: changed(&old.stage, &new.stage),
            live_parameters: changed(&old.live_parameters, &new.live_parameters),
            offload_optimizer: changed(&old.offload_optimizer.device, &new.offload_optimizer.device),
            offload_param: changed(&old.offload_param.device, &new.offload_param.device),
            max_in_cpu: changed(&old.offload_param.max_in_cpu, &new.offload_param.max_in_cpu),
            checkpoint_async: changed(&old.checkpoint_copy, &new.checkpoint_copy),
            ranks_per_host: changed(&old.local(), &new.local()),
            hosts: changed(&hosts(old), &hosts(new)),
            plan,
        }
    }

    /// What to write: lines of the config, then options of the launcher. `nvme_path` is the folder where one is known.
    pub fn lines(&self, nvme_path: Option<&str>) -> Vec<String> {
        let folder = nvme_path.unwrap_or("<a folder on a local disk>");
        let device = |device: &OffloadDevice| match device {
            OffloadDevice::Nvme => {
                vec![("device", "\"nvme\"".to_owned()), ("nvme_path", format!("\"{folder}\""))]
            }
            device => vec![("device", format!("\"{device}\""))],
        };
        let optimizer = self.offload_optimizer.iter().flat_map(device).collect();
        let kept = self.max_in_cpu.map(|elements| ("max_in_cpu", elements.to_string()));
        let param = self.offload_param.iter().flat_map(device).chain(kept).collect();
        let settings = [
            self.stage.map(|stage| ("stage", stage.to_string())),
            self.live_parameters.map(|live| ("stage3_max_live_parameters", live.to_string())),
            block(optimizer).map(|text| ("offload_optimizer", text)),
            block(param).map(|text| ("offload_param", text)),
        ];
        let config = block(settings.into_iter().flatten().collect());
        let config = config.map(|text| format!("\"zero_optimization\": {text}"));
        let saves = self.checkpoint_async.map(|it| format!("\"checkpoint\": {{\"async\": {it}}}"));
        let ranks =
            self.ranks_per_host.map(|ranks| format!("deepspeed --num_gpus {ranks} ... (ranks on each host)"));
        let hosts = self.hosts.map(|hosts| format!("{hosts} hosts of this size, in the hostfile"));
        [saves, config, ranks, hosts].into_iter().flatten().collect()
    }
}

/// A block of the config, or nothing where nothing is in it.
fn block(settings: Vec<(&str, String)>) -> Option<String> {
    let settings: Vec<String> =
        settings.into_iter().map(|(key, value)| format!("\"{key}\": {value}")).collect();
    (!settings.is_empty()).then(|| format!("{{{}}}", settings.join(", ")))
}

fn changed<T: PartialEq + Copy>(old: &T, new: &T) -> Option<T> {
    (old != new).then_some(*new)
}
