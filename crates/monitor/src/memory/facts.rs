//! What a plan follows from.

use std::ops::Add;

use deepspeed_config::{OffloadOptimizerConfig, OffloadParamConfig};
use deepspeed_core::{DType, Layout};
use serde::Serialize;

/// A number of elements by dtype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Elements {
    /// Elements of 4 bytes.
    pub fp32: u64,
    /// Elements of bfloat16, 2 bytes.
    pub bf16: u64,
    /// Elements of IEEE 16-bit floating point, 2 bytes.
    pub fp16: u64,
}

impl Elements {
    /// `count` elements of one dtype.
    pub fn of(dtype: DType, count: u64) -> Self {
        let none = Self::default();
        match dtype {
            DType::F32 => Self { fp32: count, ..none },
            DType::BF16 => Self { bf16: count, ..none },
            DType::F16 => Self { fp16: count, ..none },
        }
    }

    /// How many there are.
    pub fn count(self) -> u64 {
        self.fp32.saturating_add(self.narrow())
    }

    /// How many have 16 bits: those that need an fp32 master beside them.
    pub fn narrow(self) -> u64 {
        self.bf16.saturating_add(self.fp16)
    }

    /// Bytes of all of them.
    pub fn bytes(self) -> u64 {
        self.fp32.saturating_mul(4).saturating_add(self.narrow().saturating_mul(2))
    }

    /// One of `parts` equal parts, rounded up. The padding of shards to 64 elements is left out: it is below 256 bytes
    /// a unit.
    pub(crate) fn part(self, parts: u64) -> Self {
        self.map(|count| count.div_ceil(parts))
    }

    /// The `limit` elements of them that take the most bytes.
    pub(crate) fn at_most(self, limit: u64) -> Self {
        let fp32 = self.fp32.min(limit);
        let bf16 = self.bf16.min(limit - fp32);
        Self { fp32, bf16, fp16: self.fp16.min(limit - fp32 - bf16) }
    }

    fn map(self, change: impl Fn(u64) -> u64) -> Self {
        Self { fp32: change(self.fp32), bf16: change(self.bf16), fp16: change(self.fp16) }
    }
}

impl Add for Elements {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            fp32: self.fp32.saturating_add(other.fp32),
            bf16: self.bf16.saturating_add(other.bf16),
            fp16: self.fp16.saturating_add(other.fp16),
        }
    }
}

/// The parameters of a model, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamCounts {
    /// Parameters that are trained.
    pub trainable: Elements,
    /// Parameters that are not.
    pub frozen: Elements,
    /// Elements of the largest unit: what is gathered, reduced and updated in one piece.
    pub largest_unit: u64,
}

impl ParamCounts {
    /// The parameters of the engine's layouts: those that are trained, and the others.
    pub fn of_layouts(trained: &Layout, frozen: Option<&Layout>) -> Self {
        let sum = |layout: &Layout| {
            let units = layout.units.iter().map(|unit| Elements::of(unit.dtype, unit.filled as u64));
            units.fold(Elements::default(), Elements::add)
        };
        let units = trained.units.iter().chain(frozen.into_iter().flat_map(|layout| &layout.units));
        Self {
            trainable: sum(trained),
            frozen: frozen.map(sum).unwrap_or_default(),
            largest_unit: units.map(|unit| unit.filled as u64).max().unwrap_or(0),
        }
    }
}

/// Everything that decides how much memory the engine takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// The model.
    pub params: ParamCounts,
    /// The ZeRO stage, 0 to 3.
    pub stage: u8,
    /// Data-parallel ranks.
    pub world: u64,
    /// Of these, ranks on one host.
    pub ranks_per_host: u64,
    /// Whether the ranks compute on accelerators with memory of their own.
    pub accelerator: bool,
    /// Whether all ranks are on one host and share its memory: they exchange through it, and at stage 3 there is one
    /// physical copy of the weights.
    pub shared_memory: bool,
    /// fp32 tensors of optimizer state per trained parameter: 2 for Adam, 1 for Lion.
    pub state_tensors: u64,
    /// Whether every rank keeps whole masters and state: a client's optimizer at stage 0.
    pub whole_state: bool,
    /// Micro-batches per update.
    pub accumulation: u64,
    /// Stage 3: elements that may be whole at one time (`stage3_max_live_parameters`, or less where little comes early and
    /// little stays).
    pub live_parameters: u64,
    /// Where the optimizer's state lies.
    pub offload_optimizer: OffloadOptimizerConfig,
    /// Where the parameters lie at stage 3.
    pub offload_param: OffloadParamConfig,
    /// Whether checkpoints are written behind training, from a copy.
    pub checkpoint_copy: bool,
    /// Stage 3: elements of a rank's part of a unit that stream between a disk and the update at a time
    /// (`sub_group_size`).
    pub sub_group: u64,
}

impl Facts {
    /// Ranks on a host, at least one and at most all.
    pub(crate) fn local(&self) -> u64 {
        self.ranks_per_host.clamp(1, self.ranks())
    }

    /// Ranks, at least one.
    pub(crate) fn ranks(&self) -> u64 {
        self.world.max(1)
    }

    /// Whether there is one copy of the weights on the host at stage 3: shared memory, or only one rank.
    pub(crate) fn one_copy(&self) -> bool {
        self.ranks() == 1 || (self.shared_memory && !self.accelerator && self.local() == self.ranks())
    }
}

#[cfg(test)]
mod tests {
    use deepspeed_core::ParamSpec;

    use super::*;

    #[test]
    fn a_layout_is_counted() {
        let spec =
            |name: &str, len, dtype| ParamSpec { name: name.to_owned(), shape: vec![len], dtype, group: 0 };
        let trained = vec![
            spec("a", 10, DType::BF16),
            spec("b", 300, DType::BF16),
            spec("c", 7, DType::F32),
            spec("d", 0, DType::F32),
        ];
        let trained = Layout::new(trained, 2, 100).unwrap();
        let frozen = Layout::new(vec![spec("e", 400, DType::F16)], 2, 100).unwrap();
        let counts = ParamCounts::of_layouts(&trained, Some(&frozen));
        assert_eq!(counts.trainable, Elements { fp32: 7, bf16: 310, fp16: 0 });
        assert_eq!(counts.frozen, Elements { fp32: 0, bf16: 0, fp16: 400 });
        assert_eq!(counts.largest_unit, 400);
        assert_eq!(ParamCounts::of_layouts(&trained, None).largest_unit, 300);
    }

    #[test]
    fn the_widest_come_first() {
        let all = Elements { fp32: 10, bf16: 10, fp16: 10 };
        assert_eq!(all.at_most(15), Elements { fp32: 10, bf16: 5, fp16: 0 });
        assert_eq!(all.at_most(100), all);
        assert_eq!((all.count(), all.narrow(), all.bytes()), (30, 20, 80));
        assert_eq!(all.part(3), Elements { fp32: 4, bf16: 4, fp16: 4 });
    }
}
