//! What the original's estimators answer: the model state of a mixed-precision run with Adam on accelerators, from a few
//! numbers.
//!
//! The figures are those of this engine's plan, not of the original's formulas; its arguments and results keep their
//! meaning.

use std::fmt::Write as _;

use deepspeed_config::{OffloadDevice, OffloadOptimizerConfig, OffloadParamConfig};
use deepspeed_core::DType;

use crate::memory::{Bytes, Count, Elements, Facts, ParamCounts, Plan, Tier, plan::built_whole};

/// Bytes that a run needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Of host memory, all ranks of a host together; with the room that the buffer factor adds.
    pub host: u64,
    /// Of one accelerator's memory.
    pub device: u64,
}

/// A run at stage 2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Zero2 {
    /// Elements of all parameters.
    pub params: u64,
    /// Ranks on one host.
    pub ranks_per_host: u64,
    /// Hosts.
    pub hosts: u64,
    /// Host memory is multiplied by this, as room for copies and buffers of others.
    pub additional_buffer_factor: f64,
}

/// A run at stage 3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Zero3 {
    /// As at stage 2.
    pub run: Zero2,
    /// Elements of the largest module's own parameters.
    pub largest_layer: u64,
}

impl Zero2 {
    /// What it needs with the optimizer's state on the accelerators or in host memory.
    pub fn estimate(&self, offload_optimizer: bool) -> Estimate {
        let facts =
            Facts { stage: 2, ..self.facts(Facts::assumed_largest_unit(self.params), offload_optimizer) };
        // Every rank builds the model in fp32 in host memory before the engine takes it over.
        self.result(&facts, built_whole(Elements::of(DType::F32, self.params), self.ranks_per_host))
    }

    /// All cases, for people to read.
    pub fn table(&self) -> String {
        let mut out = self.header(None);
        for offload in [true, false] {
            let device = if offload { "cpu" } else { "none" };
            self.row(&mut out, self.estimate(offload), &format!("offload_optimizer={device}"));
        }
        out
    }

    fn facts(&self, largest_unit: u64, offload_optimizer: bool) -> Facts {
        let world = self.ranks_per_host.max(1).saturating_mul(self.hosts.max(1));
        let device = if offload_optimizer { OffloadDevice::Cpu } else { OffloadDevice::None };
        Facts {
            params: ParamCounts {
                trainable: Elements::of(DType::BF16, self.params),
                frozen: Elements::default(),
                largest_unit,
            },
            stage: 3,
            world,
            ranks_per_host: self.ranks_per_host.max(1),
            accelerator: true,
            shared_memory: false,
            state_tensors: 2,
            whole_state: false,
            accumulation: 1,
            live_parameters: largest_unit.saturating_mul(2),
            offload_optimizer: OffloadOptimizerConfig { device, ..OffloadOptimizerConfig::default() },
            offload_param: OffloadParamConfig::default(),
            checkpoint_copy: false,
            sub_group: u64::MAX,
        }
    }

    fn result(&self, facts: &Facts, to_build: u64) -> Estimate {
        let plan = Plan::new(facts);
        let host = plan.total(Tier::Host).per_host.max(to_build);
        Estimate {
            host: (host as f64 * self.additional_buffer_factor) as u64,
            device: plan.total(Tier::Device).per_rank,
        }
    }

    fn header(&self, largest_layer: Option<u64>) -> String {
        let mut out = format!(
            "Memory for weights, gradients and optimizer state (16-bit weights, Adam); activations come on top.\n\
             {} parameters{}, {} x {} rank(s), host memory times {}\n",
            Count(self.params),
            largest_layer.map_or(String::new(), |layer| format!(", {} in the largest layer", Count(layer))),
            self.hosts.max(1),
            self.ranks_per_host.max(1),
            self.additional_buffer_factor,
        );
        let _ = writeln!(out, "  {:>12} | {:>15} | settings", "per host", "per accelerator");
        out
    }

    fn row(&self, out: &mut String, estimate: Estimate, settings: &str) {
        let (host, device) = (Bytes(estimate.host), Bytes(estimate.device));
        let _ = writeln!(out, "  {host:>12} | {device:>15} | {settings}");
    }
}

impl Zero3 {
    /// Bytes of the largest layer while it is computed with: its weights and gradients, 16 bits each.
    pub fn largest_layer_bytes(&self) -> u64 {
        self.largest_layer.saturating_mul(4)
    }

    /// What it needs with optimizer state and parameters on the accelerators or in host memory. `zero_init` says that the
    /// model is built sharded, under `deepspeed.zero.Init`.
    pub fn estimate(&self, offload_optimizer: bool, offload_param: bool, zero_init: bool) -> Estimate {
        let mut facts = self.run.facts(self.largest_layer, offload_optimizer);
        if offload_param {
            facts.offload_param.device = OffloadDevice::Cpu;
        }
        let to_build = if zero_init { self.largest_layer } else { self.run.params };
        self.run.result(&facts, built_whole(Elements::of(DType::F32, to_build), self.run.ranks_per_host))
    }

    /// All cases, for people to read.
    pub fn table(&self) -> String {
        let mut out = self.run.header(Some(self.largest_layer));
        for (optimizer, param) in [(true, true), (true, false), (false, false)] {
            for zero_init in [true, false] {
                let name = |offload| if offload { "cpu" } else { "none" };
                let settings = format!(
                    "offload_optimizer={}, offload_param={}, zero_init={}",
                    name(optimizer),
                    name(param),
                    u8::from(zero_init)
                );
                self.run.row(&mut out, self.estimate(optimizer, param, zero_init), &settings);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: Zero2 =
        Zero2 { params: 7_000_000_000, ranks_per_host: 8, hosts: 2, additional_buffer_factor: 1.0 };

    #[test]
    fn stage_2() {
        let unit = Facts::assumed_largest_unit(RUN.params);
        // Weights; two units of gradients; what passes between ranks; fp32 gradients, masters and two moments by 16.
        let buffers = 2 * unit * 2 + 2 * unit * 2;
        let estimate = RUN.estimate(false);
        assert_eq!(estimate.device, 2 * RUN.params + buffers + 16 * RUN.params / 16);
        assert_eq!(estimate.host, 4 * RUN.params * 8, "eight ranks build the model");
        let estimate = RUN.estimate(true);
        assert_eq!(estimate.device, 2 * RUN.params + buffers);
        assert_eq!(estimate.host, 4 * RUN.params * 8, "building takes more than the state");
        let alone = Zero2 { ranks_per_host: 1, hosts: 1, additional_buffer_factor: 1.5, ..RUN };
        assert_eq!(alone.estimate(true).host, 16 * RUN.params * 3 / 2);
    }

    #[test]
    fn stage_3() {
        let zero3 = Zero3 { run: RUN, largest_layer: 200_000_000 };
        let live = 2 * 200_000_000 * 2;
        let buffers = 2 * live;
        let estimate = zero3.estimate(true, true, true);
        assert_eq!(estimate.device, live + buffers);
        assert_eq!(estimate.host, 18 * RUN.params / 2, "state and weights of half the ranks");
        assert_eq!(zero3.estimate(true, true, false).host, 4 * RUN.params * 8);
        assert_eq!(zero3.estimate(false, false, true).device, 18 * RUN.params / 16 + live + buffers);
        assert_eq!(zero3.estimate(false, false, true).host, 4 * 200_000_000 * 8);
        assert_eq!(zero3.largest_layer_bytes(), 800_000_000);
    }

    #[test]
    fn tables() {
        let table = Zero3 { run: RUN, largest_layer: 200_000_000 }.table();
        assert!(table.contains("7.00 B parameters, 200.00 M in the largest layer, 2 x 8 rank(s)"), "{table}");
        assert_eq!(table.lines().count(), 3 + 6, "{table}");
        assert!(RUN.table().ends_with("| offload_optimizer=none\n"), "{}", RUN.table());
        let columns: Vec<usize> = RUN.table().lines().skip(2).filter_map(|line| line.find('|')).collect();
        assert!(columns.windows(2).all(|pair| pair[0] == pair[1]), "{}", RUN.table());
    }
}
