//! Memory and arithmetic of an accelerator, as the engine needs them: the seam below which a tensor framework may do the
//! work.
//!
//! A device keeps one set of flat tensors for each unit and computes on them in the order in which it is asked, without
//! being waited for; only [`Device::square_sums`], [`Device::read`] and [`Device::write`] wait. What is reduced when, what
//! a step does, and what lies where stays the engine's matter.
//!
//! ```text
//! gradients of a unit ---reduce---> gradient shard ---update---> master ---publish---> weights, whole or gathered later
//!                                        |                          ^
//!                                        +--- read, host update, write (offload_optimizer)
//! ```

use std::{error::Error, fmt};

use deepspeed_comm::{Into, MappedUnits};
use deepspeed_core::{Layout, Rank, Span, SpanMut, Unit};
use deepspeed_optim::Hyper;
use deepspeed_zero::Exchange;

/// One of the flat tensors that a device keeps for a unit, of `shard_len` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The averaged gradients, fp32, still multiplied by the loss scale.
    Gradient,
    /// The fp32 masters; none where fp32 weights are their own.
    Master,
    /// A state tensor of the optimizer, fp32.
    State(usize),
    /// The rank's shard of the weights, in the model's dtype.
    Weight,
}

/// What a device is to make room for. Units are numbered through: those of the trained parameters, then the others.
#[derive(Clone, Copy, Debug)]
pub struct DevicePlan<'a> {
    /// The trained parameters.
    pub trained: &'a Layout,
    /// Parameters that are sharded but not trained.
    pub frozen: &'a Layout,
    /// This rank.
    pub rank: Rank,
    /// State tensors of the optimizer.
    pub states: usize,
    /// How many of the trained units, the first ones, have masters and state on the host: their gradients come there. The
    /// device has those of the others.
    pub host_units: usize,
    /// Whether the device has the whole weights at all times; else its shard, and units are gathered when they are used.
    pub whole_weights: bool,
    /// Where shards of the weights lie while they are not gathered.
    pub weights: ShardHome<'a>,
}

/// Where a device's shards of the weights lie at stage 3.
#[derive(Clone, Copy, Debug)]
pub enum ShardHome<'a> {
    /// On the device.
    Device,
    /// In the host's memory. fp32 weights that the device updates have masters on it.
    Host,
    /// In files that the engine has mapped, of the trained and of the other units; the device reads and writes them there,
    /// and only while it is asked to. Masters are as with [`ShardHome::Host`].
    Files([&'a MappedUnits; 2]),
}

/// Where the gradients of a unit come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// The framework's, of those parameters (by id) that are marked, times a factor.
    Given {
        /// By parameter id.
        present: &'a [bool],
        /// What their loss lacked.
        factor: f32,
    },
    /// The sum that [`Device::accumulate`] has made.
    Accumulated,
}

/// A place that computes. Every method is called by one thread at a time.
///
/// `unit` is a number as in [`DevicePlan`].
pub trait Device: fmt::Debug + Send + Sync {
    /// What it is, for the start summary: `cuda:0`.
    fn name(&self) -> String;

    /// Takes memory for `plan`, zeroed. Called once.
    ///
    /// # Errors
    /// [`DeviceError`], as for every method: the framework failed, out of memory for example.
    fn lay_out(&self, plan: &DevicePlan<'_>) -> Result<(), DeviceError>;

    /// Adds gradients of parameters that are marked in `present`, times `factor`, to the unreduced sum in fp32; `first`
    /// starts the sum.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn accumulate(
        &self,
        layout: &Layout,
        present: &[bool],
        factor: f32,
        first: bool,
    ) -> Result<(), DeviceError>;

    /// Averages a unit's gradients over ranks, in fp32 and in rank order, and stores or adds this rank's shard of them to
    /// [`Part::Gradient`]. Collective.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn reduce(
        &self,
        unit: &Unit,
        what: &str,
        source: Source<'_>,
        exchange: &Exchange,
        into: Into,
    ) -> Result<(), DeviceError>;

    /// For each trained unit, the sum of squares of its gradient shard; not finite exactly if an element is not.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn square_sums(&self) -> Result<Vec<f64>, DeviceError>;

    /// A fingerprint of what the device has exchanged with those of other ranks by itself since it was last asked, without
    /// the group, which would have noticed that ranks disagree: equal on ranks that have made the same exchanges.
    fn exchanges(&self) -> u64;

    /// Multiplies the gradient shards of units that are updated here.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn scale_gradients(&self, factor: f32) -> Result<(), DeviceError>;

    /// One update of the masters that lie here with the hyperparameters of each parameter group; `step` counts from 1.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn update(
        &self,
        layout: &Layout,
        hypers: &[Hyper],
        step: u64,
        grad_scale: f32,
    ) -> Result<(), DeviceError>;

    /// Casts the masters that lie here to weights, and gives all ranks' weights to all where they are whole. Collective.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn publish(&self) -> Result<(), DeviceError>;

    /// Copies a tensor to the host's memory, which has its dtype.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn read(&self, unit: usize, part: Part, target: SpanMut<'_>) -> Result<(), DeviceError>;

    /// Copies a tensor from the host's memory, which has its dtype.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn write(&self, unit: usize, part: Part, source: Span<'_>) -> Result<(), DeviceError>;
}

/// The framework failed while it worked for a device.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {source}")]
pub struct DeviceError {
    /// The device.
    pub device: String,
    /// What it said.
    pub source: Box<dyn Error + Send + Sync>,
}
