//! Torch tensors as spans: pointer, number of elements, dtype.

use deepspeed_core::{DType, Span, SpanMut};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    intern,
    prelude::*,
    sync::PyOnceLock,
};

/// What the engine needs to know of a dense CPU tensor. The tensor itself must outlive every span made from this;
/// callers hold the Python objects for the length of the call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorArg {
    ptr: usize,
    len: usize,
    dtype: DType,
}

struct TorchDTypes([(Py<PyAny>, DType); 3]);

/// `torch.float32` and friends, looked up once.
fn torch_dtypes(py: Python<'_>) -> PyResult<&TorchDTypes> {
    static DTYPES: PyOnceLock<TorchDTypes> = PyOnceLock::new();
    DTYPES.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let get = |name: &str| torch.getattr(name).map(Bound::unbind);
        Ok(TorchDTypes([
            (get("float32")?, DType::F32),
            (get("bfloat16")?, DType::BF16),
            (get("float16")?, DType::F16),
        ]))
    })
}

/// The engine's dtype for a `torch.dtype`, or `None` for one it does not train in.
pub(crate) fn dtype_of(torch_dtype: &Bound<'_, PyAny>) -> PyResult<Option<DType>> {
    let known = torch_dtypes(torch_dtype.py())?;
    Ok(known.0.iter().find(|(object, _)| object.is(torch_dtype)).map(|(_, dtype)| *dtype))
}

/// The `torch.dtype` for a dtype of the engine's.
pub(crate) fn torch_dtype<'py>(py: Python<'py>, dtype: DType) -> PyResult<Bound<'py, PyAny>> {
    let known = torch_dtypes(py)?;
    let found = known.0.iter().find(|(_, ours)| *ours == dtype);
    let (object, _) = found.expect("invariant: every dtype of the engine's is a torch dtype");
    Ok(object.bind(py).clone())
}

impl TensorArg {
    /// Reads a torch tensor; `name` is how errors call it.
    pub(crate) fn read(tensor: &Bound<'_, PyAny>, name: &str) -> PyResult<Self> {
        let py = tensor.py();
        let torch_dtype = tensor.getattr(intern!(py, "dtype"))?;
        let Some(dtype) = dtype_of(&torch_dtype)? else {
            return Err(PyTypeError::new_err(format!(
                "`{name}` is a tensor of {torch_dtype}, and the engine trains float32, bfloat16 and float16; \
                 cast it with .float() or exclude it from the trainable parameters"
            )));
        };
        if !tensor.call_method0(intern!(py, "is_contiguous"))?.extract::<bool>()? {
            return Err(PyValueError::new_err(format!(
                "`{name}` is not contiguous; the engine needs dense memory, call .contiguous() on it"
            )));
        }
        let device = tensor.getattr(intern!(py, "is_cpu"))?;
        if !device.extract::<bool>()? {
            return Err(PyValueError::new_err(format!(
                "`{name}` is on {}, and a tensor in the host's memory is needed here: call .cpu() on it",
                tensor.getattr(intern!(py, "device"))?
            )));
        }
        Ok(Self {
            ptr: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            len: tensor.call_method0(intern!(py, "numel"))?.extract()?,
            dtype,
        })
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The element type.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements, to read.
    ///
    /// # Safety
    /// The tensor outlives `'a` and nobody writes to it meanwhile.
    pub(crate) unsafe fn span<'a>(&self) -> Span<'a> {
        // SAFETY: torch aligns its storages to 64 bytes and tensors to their elements; the rest is the caller's.
        unsafe { Span::from_raw(self.ptr as *const u8, self.len, self.dtype) }
    }

    /// The elements, to write.
    ///
    /// # Safety
    /// The tensor outlives `'a`, nobody else touches it meanwhile, and no two spans overlap.
    pub(crate) unsafe fn span_mut<'a>(&self) -> SpanMut<'a> {
        // SAFETY: as in `span`.
        unsafe { SpanMut::from_raw(self.ptr as *mut u8, self.len, self.dtype) }
    }
}
