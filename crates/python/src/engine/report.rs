//! What a call of `step` did, for Python.

use deepspeed_engine::StepReport;
use pyo3::prelude::*;

/// What a call of `step` did.
#[pyclass(frozen, name = "StepReport", module = "deepspeed._native", get_all)]
pub(crate) struct PyStepReport {
    boundary: bool,
    applied: bool,
    skipped: Option<String>,
    unused: Vec<String>,
    line: Option<String>,
    checkpoint: Option<String>,
}

impl From<StepReport> for PyStepReport {
    fn from(report: StepReport) -> Self {
        let StepReport { boundary, applied, skipped, unused, line, checkpoint } = report;
        Self { boundary, applied, skipped, unused, line, checkpoint }
    }
}
