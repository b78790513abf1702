//! The extension module `deepspeed._native`: how Python reaches the engine.
//!
//! Python is glue around this module. Tensors cross as (pointer, length, dtype) read off torch tensors whose Python
//! objects the caller keeps alive for the call; all work happens in [`enter::enter`], without the GIL.

#![allow(clippy::needless_pass_by_value, reason = "PyO3 extracts arguments by value")]

use pyo3::prelude::*;

mod checkpoint;
mod checkpoint_tools;
mod config;
mod device;
mod engine;
mod enter;
mod errors;
mod gathering;
mod group;
mod json;
mod launcher;
mod log;
mod memory;
mod memory_plan;
mod metrics;
mod ops;
mod param_state;
mod recorded_group;
mod schedules;
mod shared_weights;
mod tensors;
mod torch_transport;

/// The native half of the `deepspeed` package.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    log::install();
    errors::register(module)?;
    config::register(module)?;
    launcher::register(module)?;
    memory::register(module)?;
    metrics::register(module)?;
    ops::register(module)?;
    schedules::register(module)?;
    shared_weights::register(module)?;
    group::register(module)?;
    engine::register(module)?;
    param_state::register(module)?;
    gathering::register(module)?;
    checkpoint::register(module)?;
    checkpoint_tools::register(module)?;
    Ok(())
}
