//! The few operations of torch that a device is made of, by name.

use std::{ffi::c_void, sync::Mutex};

use deepspeed_core::{DType, Span, SpanMut};
use pyo3::{intern, prelude::*, types::PyDict};

use crate::tensors::torch_dtype;

/// A torch tensor, under the GIL.
pub(crate) type Tensor<'py> = Bound<'py, PyAny>;

/// Operations on flat tensors; those whose name ends in `_` write to the tensor.
pub(crate) trait Flat<'py>: Sized {
    fn part(&self, start: usize, len: usize) -> PyResult<Tensor<'py>>;
    fn copy_(&self, source: &Tensor<'py>) -> PyResult<()>;
    /// Without waiting, where one of the two is pinned host memory.
    fn copy_later_(&self, source: &Tensor<'py>) -> PyResult<()>;
    fn add_(&self, other: &Tensor<'py>) -> PyResult<()>;
    /// Adds `factor * other`.
    fn add_scaled_(&self, other: &Tensor<'py>, factor: f64) -> PyResult<()>;
    fn mul_(&self, factor: f64) -> PyResult<()>;
    fn to_dtype(&self, dtype: DType) -> PyResult<Tensor<'py>>;
    fn times(&self, factor: f64) -> PyResult<Tensor<'py>>;
    fn flatten(&self) -> PyResult<Tensor<'py>>;
    fn address(&self) -> PyResult<usize>;
}

impl<'py> Flat<'py> for Tensor<'py> {
    fn part(&self, start: usize, len: usize) -> PyResult<Tensor<'py>> {
        self.call_method1(intern!(self.py(), "narrow"), (0, start, len))
    }

    fn copy_(&self, source: &Tensor<'py>) -> PyResult<()> {
        self.call_method1(intern!(self.py(), "copy_"), (source,)).map(drop)
    }

    fn copy_later_(&self, source: &Tensor<'py>) -> PyResult<()> {
        self.call_method1(intern!(self.py(), "copy_"), (source, true)).map(drop)
    }

    fn add_(&self, other: &Tensor<'py>) -> PyResult<()> {
        self.call_method1(intern!(self.py(), "add_"), (other,)).map(drop)
    }

    fn add_scaled_(&self, other: &Tensor<'py>, factor: f64) -> PyResult<()> {
        let options = PyDict::new(self.py());
        options.set_item("alpha", factor)?;
        self.call_method(intern!(self.py(), "add_"), (other,), Some(&options)).map(drop)
    }

    fn mul_(&self, factor: f64) -> PyResult<()> {
        self.call_method1(intern!(self.py(), "mul_"), (factor,)).map(drop)
    }

    fn to_dtype(&self, dtype: DType) -> PyResult<Tensor<'py>> {
        self.call_method1(intern!(self.py(), "to"), (torch_dtype(self.py(), dtype)?,))
    }

    fn times(&self, factor: f64) -> PyResult<Tensor<'py>> {
        self.call_method1(intern!(self.py(), "mul"), (factor,))
    }

    fn flatten(&self) -> PyResult<Tensor<'py>> {
        self.call_method1(intern!(self.py(), "reshape"), (-1,))
    }

    fn address(&self) -> PyResult<usize> {
        self.call_method0(intern!(self.py(), "data_ptr"))?.extract()
    }
}

/// What work is queued on beside the program's own stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Gradients.
    Reduce,
    /// Weights.
    Gather,
}

/// torch on one device.
pub(crate) struct Ops {
    torch: Py<PyModule>,
    device: Py<PyAny>,
    /// `torch.cuda` and the like, and a stream for each [`Side`]; none on a CPU, where work is done when a call returns.
    streams: Option<(Py<PyAny>, [Py<PyAny>; 2])>,
    /// Host memory through which a transport moves a device's, by dtype; grows.
    staging: Mutex<Vec<(DType, usize, Py<PyAny>)>>,
}

impl Ops {
    pub(crate) fn new(device: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = device.py();
        let torch = py.import("torch")?;
        let kind: String = device.getattr("type")?.extract()?;
        let streams = if kind == "cpu" {
            None
        } else {
            let module = torch.call_method1("get_device_module", (device,))?;
            let options = PyDict::new(py);
            options.set_item("device", device)?;
            let stream = || module.call_method("Stream", (), Some(&options)).map(Bound::unbind);
            let sides = [stream()?, stream()?];
            Some((module.unbind(), sides))
        };
        let device = device.clone().unbind();
        Ok(Self { torch: torch.unbind(), device, streams, staging: Mutex::default() })
    }

    pub(crate) fn torch<'py>(&self, py: Python<'py>) -> &Bound<'py, PyModule> {
        self.torch.bind(py)
    }

    pub(crate) fn device<'py>(&self, py: Python<'py>) -> &Bound<'py, PyAny> {
        self.device.bind(py)
    }

    /// Whether there are streams, and host memory worth pinning.
    pub(crate) fn is_accelerator(&self) -> bool {
        self.streams.is_some()
    }

    /// `len` zeros on the device.
    pub(crate) fn zeros(&self, py: Python<'_>, len: usize, dtype: DType) -> PyResult<Py<PyAny>> {
        let options = PyDict::new(py);
        options.set_item("dtype", torch_dtype(py, dtype)?)?;
        options.set_item("device", &self.device)?;
        self.torch(py).call_method("zeros", (len,), Some(&options)).map(Bound::unbind)
    }

    /// `len` elements on the device that will be written.
    pub(crate) fn empty<'py>(&self, py: Python<'py>, len: usize, dtype: DType) -> PyResult<Tensor<'py>> {
        let options = PyDict::new(py);
        options.set_item("dtype", torch_dtype(py, dtype)?)?;
        options.set_item("device", &self.device)?;
        self.torch(py).call_method("empty", (len,), Some(&options))
    }

    /// `len` zeros in the host's memory; with `pin`, pinned where that is of use.
    pub(crate) fn host_zeros(
        &self,
        py: Python<'_>,
        len: usize,
        dtype: DType,
        pin: bool,
    ) -> PyResult<Py<PyAny>> {
        let options = PyDict::new(py);
        options.set_item("dtype", torch_dtype(py, dtype)?)?;
        options.set_item("pin_memory", pin && self.is_accelerator())?;
        self.torch(py).call_method("zeros", (len,), Some(&options)).map(Bound::unbind)
    }

    /// The tensor on the device: itself, if it is there.
    pub(crate) fn here<'py>(&self, tensor: &Tensor<'py>) -> PyResult<Tensor<'py>> {
        let py = tensor.py();
        let options = PyDict::new(py);
        options.set_item("non_blocking", true)?;
        tensor.call_method(intern!(py, "to"), (&self.device,), Some(&options))
    }

    /// Host memory of at least `len` elements, the same at every call.
    pub(crate) fn staging<'py>(&self, py: Python<'py>, len: usize, dtype: DType) -> PyResult<Tensor<'py>> {
        let mut staging = self.staging.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, _, found)) = staging.iter().find(|(known, size, _)| *known == dtype && *size >= len) {
            return found.bind(py).part(0, len);
        }
        staging.retain(|(known, _, _)| *known != dtype);
        let tensor = self.host_zeros(py, len, dtype, true)?;
        let part = tensor.bind(py).part(0, len)?;
        staging.push((dtype, len, tensor));
        Ok(part)
    }

    /// Runs `work` with its operations queued on a stream beside the program's, behind what is queued on that.
    pub(crate) fn beside<T>(
        &self,
        py: Python<'_>,
        side: Side,
        work: impl FnOnce() -> PyResult<T>,
    ) -> PyResult<T> {
        let Some((module, streams)) = &self.streams else { return work() };
        let stream = streams[side as usize].bind(py);
        let current = module.call_method1(py, intern!(py, "current_stream"), (&self.device,))?;
        stream.call_method1(intern!(py, "wait_stream"), (current,))?;
        let context = module.call_method1(py, intern!(py, "stream"), (stream,))?;
        context.call_method0(py, intern!(py, "__enter__"))?;
        let done = work();
        context.call_method1(py, intern!(py, "__exit__"), (py.None(), py.None(), py.None()))?;
        done
    }

    /// What the program queues from here on comes after what was queued beside it.
    pub(crate) fn join(&self, py: Python<'_>, side: Side) -> PyResult<()> {
        let Some((module, streams)) = &self.streams else { return Ok(()) };
        let current = module.call_method1(py, intern!(py, "current_stream"), (&self.device,))?;
        current.call_method1(py, intern!(py, "wait_stream"), (&streams[side as usize],)).map(drop)
    }

    /// An event after what was queued beside the program's work; none where that is over when a call returns.
    pub(crate) fn record(&self, py: Python<'_>, side: Side) -> PyResult<Option<Py<PyAny>>> {
        let Some((_, streams)) = &self.streams else { return Ok(None) };
        streams[side as usize].call_method0(py, intern!(py, "record_event")).map(Some)
    }

    /// What the program queues from here on comes after `event`.
    pub(crate) fn wait_event(&self, py: Python<'_>, event: &Py<PyAny>) -> PyResult<()> {
        let Some((module, _)) = &self.streams else { return Ok(()) };
        let current = module.call_method1(py, intern!(py, "current_stream"), (&self.device,))?;
        current.call_method1(py, intern!(py, "wait_event"), (event,)).map(drop)
    }

    /// Bytes that are free on an accelerator, where torch can tell.
    pub(crate) fn free_memory(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let Some((module, _)) = &self.streams else { return Ok(None) };
        let Some(asks) = module.bind(py).getattr_opt(intern!(py, "mem_get_info"))? else { return Ok(None) };
        let (free, _total): (u64, u64) = asks.call1((&self.device,))?.extract()?;
        Ok(Some(free))
    }

    /// Waits until everything that was queued is over.
    pub(crate) fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        let Some((module, _)) = &self.streams else { return Ok(()) };
        module.call_method1(py, intern!(py, "synchronize"), (&self.device,)).map(drop)
    }

    /// The allocator does not reuse the tensor's memory before what is queued on `side` is over.
    pub(crate) fn used_beside(&self, tensor: &Tensor<'_>, side: Side) -> PyResult<()> {
        let Some((_, streams)) = &self.streams else { return Ok(()) };
        tensor.call_method1(intern!(tensor.py(), "record_stream"), (&streams[side as usize],)).map(drop)
    }
}

/// A tensor over memory of the host's; it holds `keeper`.
///
/// # Safety
/// The memory lives as long as the tensor or its keeper, and while the tensor is in use nobody else writes to it (or reads it,
/// if the tensor is written to).
pub(crate) unsafe fn over<'py>(
    py: Python<'py>,
    address: *const c_void,
    len: usize,
    dtype: DType,
    keeper: Option<&Py<PyAny>>,
) -> PyResult<Tensor<'py>> {
    let bytes = len * dtype.size();
    let array = py.import("ctypes")?.getattr("c_uint8")?.mul(bytes)?;
    let memory = array.call_method1(intern!(py, "from_address"), (address as usize,))?;
    memory.setattr(intern!(py, "keeper"), keeper)?;
    let options = PyDict::new(py);
    options.set_item("dtype", torch_dtype(py, dtype)?)?;
    py.import("torch")?.call_method("frombuffer", (memory,), Some(&options))
}

/// Copies a device's tensor into a span, which has its dtype; waits for it.
pub(crate) fn copy_out(source: &Tensor<'_>, mut target: SpanMut<'_>) -> PyResult<()> {
    let (len, dtype) = (target.len(), target.dtype());
    let address = target.as_bytes_mut().as_mut_ptr();
    // SAFETY: the span is borrowed for the length of this call, and the copy is over when it returns.
    unsafe { over(source.py(), address.cast(), len, dtype, None)? }.copy_(source)
}

/// Copies a span into a device's tensor of its dtype; waits for it.
pub(crate) fn copy_in(target: &Tensor<'_>, source: Span<'_>) -> PyResult<()> {
    let address = source.as_bytes().as_ptr();
    // SAFETY: as in `copy_out`; the tensor is only read.
    let tensor = unsafe { over(target.py(), address.cast(), source.len(), source.dtype(), None)? };
    target.copy_(&tensor)
}
