//! torch.distributed as a transport of bytes, and its store as the board on which ranks leave word for each other.

use std::{fmt, sync::Arc, time::Duration};

use deepspeed_comm::{Board, ByteTransport, Farewell, Group, Member, Options, OverBytes, Progress};
use deepspeed_core::Rank;
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    intern,
    prelude::*,
    types::{PyBytes, PyCFunction},
};

use crate::errors::IntoPyErr;

/// How long the end of the program waits for the thread that visits the store.
const FAREWELL: Duration = Duration::from_secs(1);

/// Calls `deepspeed.runtime.torch_transport.TorchTransport` with addresses of the engine's memory, on the thread that
/// called the engine.
struct TorchTransport(Py<PyAny>);

impl fmt::Debug for TorchTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TorchTransport")
    }
}

impl TorchTransport {
    fn call(&self, call: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<Progress>) -> Result<Progress, String> {
        Python::attach(|py| match call(self.0.bind(py)) {
            Ok(progress) => Ok(progress),
            // What torch.distributed raises; anything else comes from a signal's handler.
            Err(error)
                if error.is_instance_of::<PyRuntimeError>(py) || error.is_instance_of::<PyValueError>(py) =>
            {
                Err(error.value(py).to_string())
            }
            Err(error) => {
                // It keeps its own exception, which the waiting call raises.
                error.restore(py);
                Ok(Progress::Interrupted)
            }
        })
    }

    fn begin(&self, method: &str, args: (usize, usize, usize)) -> Result<Progress, String> {
        self.call(|transport| transport.call_method1(method, args).map(|_| Progress::Pending))
    }
}

impl ByteTransport for TorchTransport {
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<Progress, String> {
        self.begin("all_to_all", (send.as_ptr() as usize, receive.as_mut_ptr() as usize, send.len()))
    }

    fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<Progress, String> {
        self.begin("all_gather", (mine.as_ptr() as usize, all.as_mut_ptr() as usize, mine.len()))
    }

    fn broadcast(&self, data: &mut [u8], root: Rank) -> Result<Progress, String> {
        self.begin("broadcast", (data.as_mut_ptr() as usize, data.len(), root.index()))
    }

    fn wait(&self, at_most: Duration) -> Result<Progress, String> {
        self.call(|transport| {
            let py = transport.py();
            let over = transport.call_method1(intern!(py, "wait"), (at_most.as_secs_f64(),))?;
            Ok(if over.extract()? { Progress::Done } else { Progress::Pending })
        })
    }

    fn abandon(&self) {
        Python::attach(|py| {
            // An interrupt that is on its way to the caller stays there.
            let pending = PyErr::take(py);
            if let Err(error) = self.0.call_method0(py, intern!(py, "abandon")) {
                error.write_unraisable(py, None);
            }
            if let Some(pending) = pending {
                pending.restore(py);
            }
        });
    }
}

/// `deepspeed.runtime.torch_transport.StoreBoard`, visited by a thread of the group's.
struct StoreBoard(Py<PyAny>);

impl fmt::Debug for StoreBoard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreBoard")
    }
}

impl StoreBoard {
    fn visit<T>(&self, visit: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> Result<T, String> {
        Python::attach(|py| visit(self.0.bind(py)).map_err(|error| error.value(py).to_string()))
    }
}

impl Board for StoreBoard {
    fn put(&self, key: &str, value: &[u8]) -> Result<(), String> {
        self.visit(|board| {
            let py = board.py();
            board.call_method1(intern!(py, "put"), (key, PyBytes::new(py, value))).map(drop)
        })
    }

    fn get(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, String> {
        self.visit(|board| board.call_method1(intern!(board.py(), "get"), (keys,))?.extract())
    }

    fn claim(&self, key: &str, value: &[u8]) -> Result<Vec<u8>, String> {
        self.visit(|board| {
            let py = board.py();
            board.call_method1(intern!(py, "claim"), (key, PyBytes::new(py, value)))?.extract()
        })
    }
}

/// The group of the ranks whose processes are `members`, over `transport`, with `board` for their words.
pub(crate) fn group(
    py: Python<'_>,
    transport: Py<PyAny>,
    board: Py<PyAny>,
    rank: Rank,
    members: Vec<Member>,
    name: String,
    options: &Options,
) -> PyResult<Arc<dyn Group>> {
    let group = OverBytes::new(TorchTransport(transport), rank, members.len(), name)
        .watched(Box::new(StoreBoard(board)), members, options)
        .map_err(IntoPyErr::into_py_err)?;
    if let Some(farewell) = group.farewell() {
        leave_at_exit(py, farewell)?;
    }
    Ok(Arc::new(group))
}

/// Has the thread that visits the store end before the interpreter does, which it calls.
fn leave_at_exit(py: Python<'_>, farewell: Farewell) -> PyResult<()> {
    let leave = PyCFunction::new_closure(py, None, None, move |args, _| {
        args.py().detach(|| farewell.leave(FAREWELL));
    })?;
    py.import("atexit")?.call_method1("register", (leave,)).map(drop)
}
