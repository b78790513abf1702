//! The learning-rate schedules, for the classes of `deepspeed.runtime.lr_schedules`.

use deepspeed_optim::Schedule;
use pyo3::{prelude::*, types::PyMapping};

use crate::{errors::IntoPyErr, json};

/// A schedule with its settings: a pure function of the iteration.
#[pyclass(frozen, name = "Schedule", module = "deepspeed._native")]
struct PySchedule {
    schedule: Schedule,
}

/// Learning rate of each parameter group, and its betas where the schedule cycles momentum.
type Values = (Vec<f64>, Option<Vec<(f64, f64)>>);

#[pymethods]
impl PySchedule {
    /// `scheduler.type` and `scheduler.params` of a config.
    #[new]
    fn new(name: &str, params: &Bound<'_, PyMapping>) -> PyResult<Self> {
        let params = json::map_from_python(params)?;
        let schedule = Schedule::from_config(name, &params).map_err(IntoPyErr::into_py_err)?;
        Ok(Self { schedule })
    }

    /// The iteration before the first: -1 unless the settings give another.
    #[getter]
    fn start(&self) -> i64 {
        self.schedule.start()
    }

    /// What the optimizer holds at `iteration`, given the rates its groups came with.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python by value")]
    fn at(&self, iteration: i64, base_lrs: Vec<f64>) -> PyResult<Values> {
        self.schedule.check_groups(base_lrs.len()).map_err(IntoPyErr::into_py_err)?;
        let values = self.schedule.at(iteration, &base_lrs);
        Ok((values.lr, values.betas))
    }
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PySchedule>()?;
    m.add("SCHEDULES", Schedule::NAMES.to_vec())
}
