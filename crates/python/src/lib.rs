//! The extension module `deepspeed._native`: how Python reaches the engine.
//!
//! Python is glue around this module. Tensors cross as (pointer, length, dtype) read off torch tensors whose Python
//! objects the caller keeps alive for the call; all work happens in [`enter::enter`], without the GIL.

#![allow(clippy::needless_pass_by_value, reason = "PyO3 extracts arguments by value")]

use pyo3::prelude::*;

mod checkpoint;
mod config;
mod engine;
mod enter;
mod errors;
mod group;
mod json;
mod launcher;
mod log;
mod ops;
mod schedules;
mod tensors;
mod torch_transport;

/// The native half of the `deepspeed` package.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    log::install();
    errors::register(module)?;
    config::register(module)?;
    launcher::register(module)?;
    ops::register(module)?;
    schedules::register(module)?;
    group::register(module)?;
    engine::register(module)?;
    checkpoint::register(module)?;
    Ok(())
}
