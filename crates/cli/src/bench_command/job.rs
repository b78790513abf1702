//! What is to be measured.

use clap::ValueEnum;
use deepspeed_core::DType;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub(super) enum Operation {
    /// The sum over ranks, on every rank
    AllReduce,
    /// Every rank's shard, on every rank
    AllGather,
    /// Each rank's shard of the sum
    ReduceScatter,
    /// Rank 0's elements, on every rank
    Broadcast,
    /// A shard from each rank to each rank
    AllToAll,
}

impl Operation {
    /// The name on the command line and in results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::AllToAll => "all_to_all",
        }
    }

    /// Whether our shared memory has it.
    pub(super) fn is_ours(self) -> bool {
        self != Self::AllToAll
    }

    /// busbw / algbw with `world` ranks.
    ///
    /// Source: doc/PERFORMANCE.md of NVIDIA's nccl-tests (github.com/NVIDIA/nccl-tests).
    pub(super) fn bus_factor(self, world: usize) -> f64 {
        let n = world as f64;
        match self {
            Self::AllReduce => 2.0 * (n - 1.0) / n,
            Self::AllGather | Self::ReduceScatter | Self::AllToAll => (n - 1.0) / n,
            Self::Broadcast => 1.0,
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cell {
    /// The collective.
    pub(super) op: Operation,
    /// The elements' type.
    #[serde(serialize_with = "write_dtype", deserialize_with = "read_dtype")]
    pub(super) dtype: DType,
    /// Bytes of the whole: of what each rank has before an all-reduce, a reduce-scatter, a broadcast or an all-to-all, and after an
    /// all-gather. As many elements as fit, and a multiple of the number of ranks.
    pub(super) bytes: u64,
}

/// All measurements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Job {
    /// `shm`, `gloo` or `nccl`.
    pub(super) backend: String,
    /// What to measure, in order.
    pub(super) cells: Vec<Cell>,
    /// Calls that are measured.
    pub(super) trials: u32,
    /// Calls before them.
    pub(super) warmups: u32,
}

fn write_dtype<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}

fn read_dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// Sizes from `min` to `max`, each `factor` times the one before; `max` is the last one.
pub(super) fn sizes(min: u64, max: u64, factor: u64) -> impl Iterator<Item = u64> {
    let next = move |bytes: &u64| (*bytes < max).then(|| bytes.saturating_mul(factor).min(max));
    std::iter::successors(Some(min), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_reach_the_largest() {
        assert_eq!(sizes(4, 64, 4).collect::<Vec<_>>(), [4, 16, 64]);
        assert_eq!(sizes(4, 50, 4).collect::<Vec<_>>(), [4, 16, 50]);
        assert_eq!(sizes(8, 8, 2).collect::<Vec<_>>(), [8]);
        assert_eq!(sizes(1 << 62, u64::MAX, 4).count(), 2);
    }

    #[test]
    fn factors_are_those_of_nccl_tests() {
        let factors = Operation::value_variants().iter().map(|op| op.bus_factor(4));
        assert_eq!(factors.collect::<Vec<_>>(), [1.5, 0.75, 0.75, 1.0, 0.75]);
    }
}
