//! torch.distributed as a transport of bytes.

use std::{fmt, sync::Arc};

use deepspeed_comm::{ByteTransport, Group, OverBytes};
use deepspeed_core::Rank;
use pyo3::prelude::*;

/// Calls `deepspeed.runtime.torch_transport.TorchTransport` with addresses of the engine's memory, on the thread that
/// called the engine.
struct TorchTransport(Py<PyAny>);

impl fmt::Debug for TorchTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TorchTransport")
    }
}

impl TorchTransport {
    fn call(&self, method: &str, args: (usize, usize, usize)) -> Result<(), String> {
        Python::attach(|py| match self.0.call_method1(py, method, args) {
            Ok(_) => Ok(()),
            Err(error) => {
                let text = error.to_string();
                // An interrupt keeps its own exception, which the waiting call raises.
                if error.is_instance_of::<pyo3::exceptions::PyKeyboardInterrupt>(py) {
                    error.restore(py);
                }
                Err(text)
            }
        })
    }
}

impl ByteTransport for TorchTransport {
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<(), String> {
        self.call("all_to_all", (send.as_ptr() as usize, receive.as_mut_ptr() as usize, send.len()))
    }

    fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<(), String> {
        self.call("all_gather", (mine.as_ptr() as usize, all.as_mut_ptr() as usize, mine.len()))
    }

    fn broadcast(&self, data: &mut [u8], root: Rank) -> Result<(), String> {
        self.call("broadcast", (data.as_mut_ptr() as usize, data.len(), root.index()))
    }
}

/// The group of `world` ranks over `transport`.
pub(crate) fn group(transport: Py<PyAny>, rank: Rank, world: usize, name: String) -> Arc<dyn Group> {
    Arc::new(OverBytes::new(TorchTransport(transport), rank, world, name))
}
