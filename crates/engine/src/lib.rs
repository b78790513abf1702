//! The training step as a state machine over config, zero, optim, comm and checkpoint.
//!
//! The engine knows no tensor framework. A face (Python, Rust) describes its parameters once, lends gradients at the
//! end of each backward pass and weights at each step, and the engine does everything between:
//!
//! ```text
//! face                         engine
//! ----                         ------
//! backward(loss * factor) -->  end_backward(gradients)   reduce or accumulate
//! step()                  -->  step(hypers, weights)     vote: norm and finite-ness over all ranks
//!                                                        apply: unscale, clip, update, all-gather
//!                                                        or skip, or fail before any weight has changed
//! ```

mod accumulation;
mod checkpoint;
mod client;
mod decision;
mod delivery;
mod engine;
mod error;
mod facts;
mod nonfinite;
mod settings;
mod update;

pub use accumulation::Accumulation;
pub use checkpoint::{Frozen, LoadOptions, ParamSlice, SaveRequest, Saved, TagRule, read_cast};
pub use decision::{Decision, OnNonFinite, decide};
pub use engine::{Engine, OptimizerChoice, Plan, StepReport};
pub use error::EngineError;
pub use settings::{Settings, loss_scaler};
