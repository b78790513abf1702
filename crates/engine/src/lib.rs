//! The training step as a state machine over config, zero, optim, comm and checkpoint.
//!
//! The engine knows no tensor framework. A face (Python, Rust) describes its parameters once, lends gradients at the
//! end of each backward pass and weights at each step, and the engine does everything between:
//!
//! ```text
//! face                         engine
//! ----                         ------
//! backward(loss * factor) -->  complete_unit(unit)       which units can be reduced now (stages 2 and 3)
//!                              reduce_units(gradients)   and reducing them while backward goes on
//!                              end_backward(gradients)   reduce the rest, or accumulate
//! step()                  -->  step(hypers, weights)     vote: norm and finite-ness over all ranks
//!                                                        apply: unscale, clip, update, all-gather
//!                                                        or skip, or fail before any weight has changed
//! ```

mod accumulation;
mod checkpoint;
mod client;
mod decision;
mod delivery;
mod device;
mod device_state;
mod engine;
mod error;
mod facts;
mod gathering;
mod gradients;
mod masters;
mod nonfinite;
mod param_state;
mod settings;
mod sharded_weights;
mod update;

pub use accumulation::Accumulation;
pub use checkpoint::{Frozen, LoadOptions, ParamSlice, SaveRequest, Saved, TagRule, read_cast};
pub use decision::{Decision, OnNonFinite, decide};
pub use device::{Device, DeviceError, DevicePlan, Part, ShardHome, Source};
pub use device_state::Afterwards;
pub use engine::{Engine, OptimizerChoice, Plan, StepReport};
pub use error::EngineError;
pub use facts::SharedAddresses;
pub use gathering::{GatheredUnit, OwnPart};
pub use gradients::Gradients;
pub use param_state::StateKind;
pub use settings::{OffloadSettings, SaveSettings, Settings, loss_scaler};
