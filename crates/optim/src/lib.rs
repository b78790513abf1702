//! Optimizers, learning-rate schedules and loss scaling: policy over kernels.
//!
//! What a step needs to decide, as pure functions and small state machines: nothing here reads a file, waits, or
//! knows about ranks. The engine calls them in this order:
//!
//! ```text
//! norm of the gradients -> LossScaler::update -> clip::grad_scale -> update(...) per shard -> Schedule::at
//! ```

pub mod clip;
mod error;
mod hyper;
mod kind;
pub mod loss_scale;
pub mod schedule;
mod update;

pub use error::OptimError;
pub use hyper::Hyper;
pub use kind::OptimizerKind;
pub use loss_scale::{DynamicLossScale, LossScaler, ScaleChange};
pub use schedule::{Schedule, Values};
pub use update::{LambSums, Shard, lamb_apply, lamb_direction, lamb_step_size, state_names, update};
