//! The memory plan for Python: the original's estimators, and what this process takes.

use deepspeed_monitor::memory::{Zero2, Zero3, actual};
use pyo3::{exceptions::PyOSError, prelude::*, types::PyDict};

use crate::enter::enter;

/// Host and accelerator bytes of a run at stage 2, per host and per rank.
#[pyfunction]
fn estimate_zero2(
    params: u64,
    ranks_per_host: u64,
    hosts: u64,
    factor: f64,
    offload_optimizer: bool,
) -> (u64, u64) {
    let estimate = zero2(params, ranks_per_host, hosts, factor).estimate(offload_optimizer);
    (estimate.host, estimate.device)
}

/// All cases of stage 2 as a table.
#[pyfunction]
fn zero2_table(params: u64, ranks_per_host: u64, hosts: u64, factor: f64) -> String {
    zero2(params, ranks_per_host, hosts, factor).table()
}

/// Host and accelerator bytes of a run at stage 3, per host and per rank, and the bytes of its largest layer.
#[pyfunction]
fn estimate_zero3(
    params: u64,
    largest_layer: u64,
    ranks_per_host: u64,
    hosts: u64,
    factor: f64,
    offload_optimizer: bool,
    offload_param: bool,
    zero_init: bool,
) -> (u64, u64, u64) {
    let run = Zero3 { run: zero2(params, ranks_per_host, hosts, factor), largest_layer };
    let estimate = run.estimate(offload_optimizer, offload_param, zero_init);
    (estimate.host, estimate.device, run.largest_layer_bytes())
}

/// All cases of stage 3 as a table.
#[pyfunction]
fn zero3_table(params: u64, largest_layer: u64, ranks_per_host: u64, hosts: u64, factor: f64) -> String {
    Zero3 { run: zero2(params, ranks_per_host, hosts, factor), largest_layer }.table()
}

fn zero2(params: u64, ranks_per_host: u64, hosts: u64, additional_buffer_factor: f64) -> Zero2 {
    Zero2 { params, ranks_per_host, hosts, additional_buffer_factor }
}

/// The proportional set size of this process, bytes: total, anonymous, file, shared.
#[pyfunction]
fn memory_in_use(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = enter(py, || actual().map_err(|error| PyOSError::new_err(error.to_string())))?;
    let dict = PyDict::new(py);
    dict.set_item("total", found.total)?;
    dict.set_item("anonymous", found.anonymous)?;
    dict.set_item("file", found.file)?;
    dict.set_item("shared", found.shared)?;
    Ok(dict)
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(estimate_zero2, module)?)?;
    module.add_function(wrap_pyfunction!(zero2_table, module)?)?;
    module.add_function(wrap_pyfunction!(estimate_zero3, module)?)?;
    module.add_function(wrap_pyfunction!(zero3_table, module)?)?;
    module.add_function(wrap_pyfunction!(memory_in_use, module)?)
}
