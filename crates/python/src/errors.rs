//! One Python exception for each kind of native error.

use deepspeed_comm::CommError;
use deepspeed_engine::EngineError;
use deepspeed_optim::OptimError;
use pyo3::{
    create_exception,
    exceptions::{PyArithmeticError, PyMemoryError, PyOSError, PyRuntimeError, PyTypeError, PyValueError},
    prelude::*,
};

create_exception!(
    deepspeed,
    DeepSpeedError,
    PyRuntimeError,
    "What the engine raises, unless a more precise class below fits."
);
create_exception!(
    deepspeed,
    CheckpointError,
    PyOSError,
    "A checkpoint could not be written or read. What was there before is untouched."
);
mod comm {
    pyo3::create_exception!(
        deepspeed,
        CommError,
        super::DeepSpeedError,
        "A collective failed: a peer is gone, disagrees, or did not arrive."
    );
}
create_exception!(
    deepspeed,
    NonFiniteGradientError,
    PyArithmeticError,
    "A gradient is NaN or infinite where none may be (fp32). No weight has been changed."
);

/// A native error that knows its Python exception.
pub(crate) trait IntoPyErr {
    fn into_py_err(self) -> PyErr;
}

impl IntoPyErr for CommError {
    fn into_py_err(self) -> PyErr {
        // A signal handler that raised while the collective waited has its exception pending: that one counts.
        Python::attach(PyErr::take).unwrap_or_else(|| comm::CommError::new_err(self.to_string()))
    }
}

impl IntoPyErr for OptimError {
    fn into_py_err(self) -> PyErr {
        PyValueError::new_err(self.to_string())
    }
}

impl IntoPyErr for EngineError {
    fn into_py_err(self) -> PyErr {
        match self {
            Self::Comm(error) => error.into_py_err(),
            Self::Checkpoint { .. } | Self::DamagedCheckpoint { .. } => {
                CheckpointError::new_err(self.to_string())
            }
            Self::NonFinite { .. } => NonFiniteGradientError::new_err(self.to_string()),
            Self::Length { .. } | Self::Count { .. } | Self::Layout(_) => {
                PyValueError::new_err(self.to_string())
            }
            Self::Device(error) => {
                let text = error.to_string();
                // What torch raised, unless it came from elsewhere.
                error.source.downcast::<PyErr>().map_or_else(|_| DeepSpeedError::new_err(text), |it| *it)
            }
            Self::Memory(_) => PyMemoryError::new_err(self.to_string()),
            Self::WeightDType { .. } => PyTypeError::new_err(self.to_string()),
            _ => DeepSpeedError::new_err(self.to_string()),
        }
    }
}

impl IntoPyErr for PyErr {
    fn into_py_err(self) -> PyErr {
        self
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("DeepSpeedError", py.get_type::<DeepSpeedError>())?;
    module.add("CommError", py.get_type::<comm::CommError>())?;
    module.add("CheckpointError", py.get_type::<CheckpointError>())?;
    module.add("NonFiniteGradientError", py.get_type::<NonFiniteGradientError>())?;
    Ok(())
}
