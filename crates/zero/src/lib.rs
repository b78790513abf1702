//! ZeRO: which rank keeps what, how a unit's gradients become a shard, and how an updated shard becomes weights.
//!
//! One mechanism serves all stages; a stage is a [`Policy`].
//!
//! ```text
//! backward      gradients of a unit, where the framework left them
//!                 |  reduce        (reduce-scatter: averaged over ranks, in rank order, in fp32)
//!                 v
//!               UnitShard.gradient           one per rank, fp32
//!                 |  publish       (update the shard and all-gather it, in one pass)
//!                 v
//! forward       the unit's weights, whole, in the model's dtype
//! ```
//!
//! Invariants, cited by the tests:
//! - ZERO-1: every gradient element is reduced exactly once per micro-batch (or once per boundary).
//! - ZERO-2: units are published in the order of the layout and reduced in the opposite one, on every rank, whatever
//!   the hooks did.
//! - ZERO-3: the reduced gradients, and so the norm, do not depend on the stage.

mod accumulator;
mod error;
mod module_units;
mod offloaded;
mod policy;
mod publish;
mod reduce;
mod reduction_order;
mod residency;
mod unit_shard;
mod use_order;

pub use accumulator::LocalAccumulator;
pub use error::ZeroError;
pub use module_units::{Gathers, ModuleFacts, gathering_modules};
pub use offloaded::{OffloadPlan, OffloadedState, Passage, StreamedUnit, units_within};
pub use policy::{Policy, ReduceAt, Residency, Stage};
pub use publish::{
    AlreadyUpdated, Publication, Run, RunMemory, ShardUpdate, Weights, gather_gradients, unit_name,
};
pub use reduce::{Exchange, reduce_unit};
pub use reduction_order::ReductionOrder;
pub use residency::{Action, BackwardCall, Circumstances, GatherLimits, ResidentUnits, UnitFacts};
pub use unit_shard::{UnitShard, fill_master, refresh_master};
