//! The one door between Python and long native work.

use pyo3::{marker::Ungil, prelude::*};

use crate::errors::IntoPyErr;

/// Runs `work` without the GIL and turns its error into a Python exception.
///
/// Every call that may wait or take longer than microseconds goes through here.
pub(crate) fn enter<T, E, F>(py: Python<'_>, work: F) -> PyResult<T>
where
    F: FnOnce() -> Result<T, E> + Ungil + Send,
    T: Ungil + Send,
    E: IntoPyErr + Ungil + Send,
{
    py.detach(work).map_err(IntoPyErr::into_py_err)
}

/// Lets Python's signal handlers run; true if one of them raised, so that a wait should end.
pub(crate) fn interrupted() -> bool {
    Python::attach(|py| match py.check_signals() {
        Ok(()) => false,
        Err(error) => {
            // Kept for the thread that waits: it raises what the handler raised.
            error.restore(py);
            true
        }
    })
}
