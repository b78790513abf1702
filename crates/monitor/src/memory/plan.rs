//! Bytes by kind and tier: the arithmetic of a plan.

use std::fmt;

use deepspeed_config::OffloadDevice;
use serde::Serialize;

use crate::memory::{Elements, Facts};

/// Where bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The memory of the rank's accelerator.
    Device,
    /// The host's memory.
    Host,
    /// Files on the host's disk.
    Nvme,
}

impl Tier {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Device, Self::Host, Self::Nvme];
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "accelerator memory",
            Self::Host => "host memory",
            Self::Nvme => "nvme",
        })
    }
}

/// What bytes are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The model's weights in its dtype: whole, or this rank's part of them at stage 3.
    Weights,
    /// Stage 3: weights that are whole for the moment, where they cannot be used where they lie.
    GatheredWeights,
    /// Gradients as the framework produces them, in the model's dtype, at the peak of the backward pass.
    Gradients,
    /// Whole gradients in fp32: micro-batches added up at stages 0 and 1, or what a client's optimizer sees at stage 0.
    WholeGradients,
    /// This rank's averaged gradients, fp32.
    GradientShards,
    /// This rank's fp32 masters of 16-bit weights.
    MasterWeights,
    /// This rank's optimizer state, fp32.
    OptimizerState,
    /// Buffers between a disk and the update, or the gathering, of what lies there.
    OffloadBuffers,
    /// Buffers through which ranks exchange.
    ExchangeBuffers,
    /// The copy of everything that a checkpoint written behind training is written from.
    CheckpointCopy,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Weights => "weights",
            Self::GatheredWeights => "gathered weights",
            Self::Gradients => "gradients",
            Self::WholeGradients => "whole fp32 gradients",
            Self::GradientShards => "fp32 gradient shards",
            Self::MasterWeights => "fp32 master weights",
            Self::OptimizerState => "optimizer state",
            Self::OffloadBuffers => "offload buffers",
            Self::ExchangeBuffers => "exchange buffers",
            Self::CheckpointCopy => "checkpoint copy",
        })
    }
}

/// Bytes of one rank and of all ranks of one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Of one rank. Of memory that the ranks of a host share, its proportional part, rounded up.
    pub per_rank: u64,
    /// Of all ranks of one host.
    pub per_host: u64,
}

/// One kind of bytes in one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What they are for.
    pub kind: Kind,
    /// Where they lie.
    pub tier: Tier,
    /// How many.
    #[serde(flatten)]
    pub amount: Amount,
}

/// What a run needs, by kind and tier, at the peak of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The rows, without empty ones, in the order of [`Kind`].
    pub rows: Vec<Row>,
    /// Ranks on one host.
    pub ranks_per_host: u64,
}

/// Bytes per rank of the shared-memory ring through which the ranks of a host exchange.
const RING_BYTES: u64 = 2 << 20;

/// Bytes of an fp32 element.
const FP32: u64 = 4;

/// Units that are in memory at one time: weights of the one that is computed with and of the next; gradients of the one
/// that is filled and of the one that is reduced.
pub(crate) const UNITS_IN_USE: u64 = 2;

impl Plan {
    /// The plan that follows from `facts`.
    pub fn new(facts: &Facts) -> Self {
        let mut table = Table { local: facts.local(), rows: Vec::new() };
        let compute = if facts.accelerator { Tier::Device } else { Tier::Host };
        table.weights(facts, compute);
        table.gradients(facts, compute);
        table.optimizer(facts, compute);
        table.exchange(facts, compute);
        table.checkpoint_copy(facts);
        table.rows.retain(|row| row.amount != Amount::default());
        table.rows.sort_by_key(|row| (row.kind, row.tier));
        Self { rows: table.rows, ranks_per_host: facts.local() }
    }

    /// The sum of all rows of a tier.
    pub fn total(&self, tier: Tier) -> Amount {
        sum(self.rows.iter().filter(|row| row.tier == tier))
    }

    /// The sum of all rows of a kind, whatever their tier.
    pub fn kind(&self, kind: Kind) -> Amount {
        sum(self.rows.iter().filter(|row| row.kind == kind))
    }

    /// The sum of the rows of a kind in a tier.
    pub fn at(&self, kind: Kind, tier: Tier) -> Amount {
        sum(self.rows.iter().filter(|row| row.kind == kind && row.tier == tier))
    }
}

fn sum<'a>(rows: impl Iterator<Item = &'a Row>) -> Amount {
    rows.fold(Amount::default(), |total, row| Amount {
        per_rank: total.per_rank.saturating_add(row.amount.per_rank),
        per_host: total.per_host.saturating_add(row.amount.per_host),
    })
}

/// A plan that is being made.
struct Table {
    local: u64,
    rows: Vec<Row>,
}

impl Table {
    /// `bytes` on every rank.
    fn own(&mut self, kind: Kind, tier: Tier, bytes: u64) {
        let amount = Amount { per_rank: bytes, per_host: bytes.saturating_mul(self.local) };
        self.rows.push(Row { kind, tier, amount });
    }

    /// `bytes` once for all ranks of the host.
    fn shared(&mut self, kind: Kind, tier: Tier, bytes: u64) {
        let amount = Amount { per_rank: bytes.div_ceil(self.local), per_host: bytes };
        self.rows.push(Row { kind, tier, amount });
    }

    /// `bytes` on every rank, or once where `one_copy`.
    fn held(&mut self, one_copy: bool, kind: Kind, tier: Tier, bytes: u64) {
        if one_copy { self.shared(kind, tier, bytes) } else { self.own(kind, tier, bytes) }
    }

    fn weights(&mut self, facts: &Facts, compute: Tier) {
        let whole = facts.params.trainable + facts.params.frozen;
        if facts.stage < 3 {
            self.own(Kind::Weights, compute, whole.bytes());
            return;
        }
        let one_copy = facts.one_copy();
        // What is kept once per holder: the host where its ranks share a copy, else each rank.
        let held = whole.part(if one_copy { 1 } else { facts.ranks() });
        let home = match facts.offload_param.device {
            OffloadDevice::None => compute,
            OffloadDevice::Cpu => Tier::Host,
            OffloadDevice::Nvme => Tier::Nvme,
        };
        let in_use = facts.params.largest_unit.saturating_mul(UNITS_IN_USE);
        let kept = to_u64(facts.offload_param.max_in_cpu);
        // A file that all ranks map is computed with where it lies; from a rank's own, units are gathered.
        let in_place = one_copy && compute == Tier::Host;
        if home == Tier::Nvme && !in_place {
            let here = in_use.div_ceil(facts.ranks()).saturating_add(kept);
            self.own(Kind::OffloadBuffers, Tier::Host, held.at_most(here).bytes());
        }
        self.held(one_copy, Kind::Weights, home, held.bytes());
        let live = match home {
            // The file is read, and its memory given back, unit by unit, but for what is to stay.
            Tier::Nvme if in_place => in_use.saturating_add(kept.saturating_mul(self.local)),
            _ if one_copy && home == compute => 0,
            _ => facts.live_parameters.max(facts.params.largest_unit),
        };
        self.held(one_copy, Kind::GatheredWeights, compute, whole.at_most(live).bytes());
    }

    fn gradients(&mut self, facts: &Facts, compute: Tier) {
        let trainable = facts.params.trainable;
        let waiting = match facts.stage {
            0 | 1 => trainable,
            _ => trainable.at_most(facts.params.largest_unit.saturating_mul(UNITS_IN_USE)),
        };
        self.own(Kind::Gradients, compute, waiting.bytes());
        let accumulated = u64::from(facts.stage < 2 && facts.accumulation > 1);
        let seen_by_client = u64::from(facts.whole_state);
        self.own(Kind::WholeGradients, compute, fp32(trainable.count(), accumulated + seen_by_client));
    }

    fn optimizer(&mut self, facts: &Facts, compute: Tier) {
        let trainable = facts.params.trainable;
        let shard = trainable.part(facts.ranks());
        let kept = if facts.whole_state { trainable } else { shard };
        let offload = &facts.offload_optimizer;
        let (state_tier, gradient_tier) = match offload.device {
            _ if facts.stage == 0 => (compute, compute),
            OffloadDevice::None => (compute, compute),
            OffloadDevice::Cpu => (Tier::Host, Tier::Host),
            OffloadDevice::Nvme => (Tier::Nvme, Tier::Nvme),
        };
        let ratio = offload.ratio.clamp(0.0, 1.0);
        let mut split = |kind, tier, bytes: u64| {
            // Rounded to whole elements; both parts together are exactly `bytes`.
            let away = ((bytes / FP32) as f64 * ratio).round() as u64 * FP32;
            let away = if ratio >= 1.0 { bytes } else { away.min(bytes) };
            self.own(kind, tier, away);
            self.own(kind, compute, bytes - away);
        };
        split(Kind::GradientShards, gradient_tier, fp32(shard.count(), 1));
        split(Kind::MasterWeights, state_tier, fp32(kept.narrow(), 1));
        split(Kind::OptimizerState, state_tier, fp32(kept.count(), facts.state_tensors));
        if state_tier == Tier::Nvme && ratio > 0.0 {
            // As deepspeed-offload's Depth::with_slots: one slot, or a pipeline of them.
            let sides = u64::from(offload.pipeline_read) + u64::from(offload.pipeline_write);
            let slots = match sides {
                0 => 1,
                sides => to_u64(offload.buffer_count).max(1 + sides),
            };
            let buffers = slots * (facts.state_tensors + 1 + u64::from(trainable.narrow() > 0));
            let unit = facts.params.largest_unit.min(trainable.count()).div_ceil(facts.ranks());
            let piece = if facts.stage == 3 { unit.min(facts.sub_group) } else { unit };
            // And one unit's gradients between their reduction and the disk.
            self.own(Kind::OffloadBuffers, Tier::Host, fp32(piece, buffers) + fp32(unit, 1));
        }
    }

    fn exchange(&mut self, facts: &Facts, compute: Tier) {
        if facts.ranks() == 1 {
            return;
        }
        if facts.shared_memory && !facts.accelerator {
            self.own(Kind::ExchangeBuffers, Tier::Host, RING_BYTES);
            return;
        }
        // A unit's gradients on their way out and on their way in.
        let unit = facts.params.trainable.at_most(facts.params.largest_unit);
        self.own(Kind::ExchangeBuffers, compute, unit.bytes().saturating_mul(2));
    }
}

impl Table {
    /// What a rank writes, but for state on a disk: that is written before training goes on.
    fn checkpoint_copy(&mut self, facts: &Facts) {
        if !facts.checkpoint_copy {
            return;
        }
        let own = facts.params.trainable.part(facts.ranks());
        // Below stage 3 one rank writes frozen weights; that it is on this host is the larger case.
        let frozen = facts.params.frozen;
        let away = match facts.offload_optimizer.device {
            OffloadDevice::Nvme if facts.stage > 0 => facts.offload_optimizer.ratio.clamp(0.0, 1.0),
            _ => 0.0,
        };
        let state = fp32(own.narrow(), 1).saturating_add(fp32(own.count(), facts.state_tensors));
        let state = (state as f64 * (1.0 - away)).ceil() as u64;
        let own = own.bytes().saturating_add(state);
        let amount = Amount {
            per_rank: own.saturating_add(frozen.bytes().div_ceil(self.local)),
            per_host: own.saturating_mul(self.local).saturating_add(frozen.bytes()),
        };
        self.rows.push(Row { kind: Kind::CheckpointCopy, tier: Tier::Host, amount });
    }
}

/// Bytes of `tensors` fp32 tensors of `count` elements.
fn fp32(count: u64, tensors: u64) -> u64 {
    count.saturating_mul(FP32).saturating_mul(tensors)
}

fn to_u64(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// The whole model in fp32 on every rank of a host: what it takes to build it before it is sharded.
pub(crate) fn built_whole(params: Elements, ranks: u64) -> u64 {
    fp32(params.count(), ranks)
}
