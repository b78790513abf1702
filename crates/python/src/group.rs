//! Process groups: which transport carries the engine's collectives, and the door to it.

use std::{sync::Arc, time::Duration};

use deepspeed_comm::{Group, Member, Options, Segment, SharedMemory, Solo};
use deepspeed_core::{DType, Rank, SpanMut};
use pyo3::{
    exceptions::PyValueError,
    intern,
    prelude::*,
    types::{PyBytes, PyDict},
};

use crate::{
    enter::{enter, interrupted},
    metrics::PyCommsLog,
    recorded_group::RecordedGroup,
    tensors::dtype_of,
    torch_transport,
};

/// A process group of the engine's.
#[pyclass(name = "Group", module = "deepspeed._native", frozen)]
pub(crate) struct PyGroup {
    inner: Arc<dyn Group>,
    // Keeps the memory file of the rank that made it, so that slow peers can still open it.
    _segment: Option<Segment>,
}

impl PyGroup {
    pub(crate) fn inner(&self) -> &Arc<dyn Group> {
        &self.inner
    }
}

fn options(deadline_seconds: f64) -> PyResult<Options> {
    let deadline = Duration::try_from_secs_f64(deadline_seconds)
        .map_err(|error| PyValueError::new_err(format!("a deadline of {deadline_seconds} s: {error}")))?;
    Ok(Options { deadline, interrupt: Some(Arc::new(interrupted)), ..Options::default() })
}

#[pymethods]
impl PyGroup {
    /// The world of one.
    #[staticmethod]
    fn alone() -> Self {
        Self { inner: Arc::new(Solo::new()), _segment: None }
    }

    /// Makes the shared memory of `world` ranks of this host and joins it as rank 0. The others get `handle()`.
    #[staticmethod]
    fn create_shared(py: Python<'_>, world: usize, deadline_seconds: f64) -> PyResult<Self> {
        let options = options(deadline_seconds)?;
        enter(py, || {
            let segment = Segment::create(world, &options)?;
            let group = SharedMemory::join(&segment, Rank(0), &options)?;
            Ok::<_, deepspeed_comm::CommError>(Self { inner: Arc::new(group), _segment: Some(segment) })
        })
    }

    /// Joins the shared memory behind `handle` as `rank`.
    #[staticmethod]
    fn join_shared(py: Python<'_>, handle: &str, rank: u32, deadline_seconds: f64) -> PyResult<Self> {
        let options = options(deadline_seconds)?;
        enter(py, || {
            let segment = Segment::open(handle)?;
            let group = SharedMemory::join(&segment, Rank(rank), &options)?;
            Ok::<_, deepspeed_comm::CommError>(Self { inner: Arc::new(group), _segment: Some(segment) })
        })
    }

    /// The engine's collectives over a transport and a board of `deepspeed.runtime.torch_transport`, as `rank`.
    /// `identities` are what `host_identity()` and `process_identity()` give on each rank.
    #[staticmethod]
    fn over_torch(
        transport: Bound<'_, PyAny>,
        board: Bound<'_, PyAny>,
        rank: usize,
        identities: Vec<(String, (u32, u64))>,
        name: String,
        deadline_seconds: f64,
    ) -> PyResult<Self> {
        let options = options(deadline_seconds)?;
        let here = host_identity()?;
        let members = identities
            .into_iter()
            .map(|(host, (pid, started))| Member { pid, started, remote: host != here })
            .collect();
        let (py, transport, board) = (transport.py(), transport.unbind(), board.unbind());
        let inner =
            torch_transport::group(py, transport, board, Rank::from_index(rank), members, name, &options)?;
        Ok(Self { inner, _segment: None })
    }

    /// The same group, whose collectives are counted in `log`.
    fn recorded(&self, log: &PyCommsLog) -> Self {
        let inner = Arc::new(RecordedGroup::new(self.inner.clone(), log.shared()));
        Self { inner, _segment: None }
    }

    /// What the other ranks need to join, where this rank made the shared memory.
    fn handle(&self) -> Option<String> {
        self._segment.as_ref().and_then(|segment| segment.handle().map(str::to_owned))
    }

    /// What carries the bytes.
    #[getter]
    fn transport(&self) -> String {
        self.inner.transport().to_owned()
    }

    /// This process's rank.
    #[getter]
    fn rank(&self) -> u32 {
        self.inner.rank().0
    }

    /// Number of ranks.
    #[getter]
    fn world_size(&self) -> usize {
        self.inner.world()
    }

    /// Whether all ranks can map the same memory.
    fn shares_memory(&self) -> bool {
        self.inner.shares_memory()
    }

    /// Says what the program is doing, for the report of a rank that waits for it.
    fn set_activity(&self, activity: &str) {
        self.inner.set_activity(activity);
    }

    /// Waits until every rank has called.
    fn barrier(&self, py: Python<'_>, what: &str) -> PyResult<()> {
        enter(py, || self.inner.barrier(what))
    }

    /// Every rank's bytes, in rank order.
    fn all_gather_bytes<'py>(
        &self,
        py: Python<'py>,
        what: &str,
        mine: &[u8],
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let all = enter(py, || self.inner.all_gather_bytes(what, mine))?;
        Ok(all.iter().map(|bytes| PyBytes::new(py, bytes)).collect())
    }

    /// Rank `root`'s values in every rank's tensors (name -> tensor of any dtype).
    fn broadcast(&self, py: Python<'_>, tensors: &Bound<'_, PyDict>, root: u32) -> PyResult<()> {
        for (name, tensor) in tensors {
            let name: String = name.extract()?;
            let here: bool = tensor.getattr(intern!(py, "is_cpu"))?.extract()?;
            if !here || !tensor.call_method0(intern!(py, "is_contiguous"))?.extract::<bool>()? {
                let dense =
                    tensor.call_method0(intern!(py, "cpu"))?.call_method0(intern!(py, "contiguous"))?;
                self.broadcast_tensor(py, &name, &dense, root)?;
                tensor.call_method1(intern!(py, "copy_"), (dense,))?;
            } else {
                self.broadcast_tensor(py, &name, &tensor, root)?;
            }
        }
        Ok(())
    }
}

impl PyGroup {
    fn broadcast_tensor(
        &self,
        py: Python<'_>,
        name: &str,
        tensor: &Bound<'_, PyAny>,
        root: u32,
    ) -> PyResult<()> {
        let ptr: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let bytes: usize = tensor.getattr(intern!(py, "nbytes"))?.extract()?;
        let what = format!("the first value of {name}");
        // fp32 goes as what it is, so that reports of ranks that disagree speak of its elements.
        if dtype_of(&tensor.getattr(intern!(py, "dtype"))?)? == Some(DType::F32) {
            // SAFETY: the tensor is dense, holds `bytes` bytes of fp32, and lives as long as the caller's reference.
            let span = unsafe { SpanMut::from_raw(ptr as *mut u8, bytes / DType::F32.size(), DType::F32) };
            return enter(py, || self.inner.broadcast(&what, Rank(root), span));
        }
        // 16-bit words carry any other dtype; an odd number of bytes goes through a copy that is one longer.
        if bytes.is_multiple_of(2) && ptr.is_multiple_of(2) {
            // SAFETY: the tensor is dense, holds `bytes` bytes, and lives as long as the caller's reference.
            let span = unsafe { SpanMut::from_raw(ptr as *mut u8, bytes / 2, DType::BF16) };
            return enter(py, || self.inner.broadcast(&what, Rank(root), span));
        }
        // SAFETY: as above.
        let memory = unsafe { std::slice::from_raw_parts_mut(ptr as *mut u8, bytes) };
        enter(py, || {
            let mut words = vec![half::bf16::ZERO; bytes.div_ceil(2)];
            SpanMut::from(&mut words[..]).as_bytes_mut()[..bytes].copy_from_slice(memory);
            self.inner.broadcast(&what, Rank(root), SpanMut::from(&mut words[..]))?;
            memory.copy_from_slice(&SpanMut::from(&mut words[..]).as_bytes_mut()[..bytes]);
            Ok::<_, deepspeed_comm::CommError>(())
        })
    }
}

/// What tells whether two processes can share memory: the machine's boot, and the namespaces that decide whether one
/// can open the other's files under /proc.
#[pyfunction]
fn host_identity() -> PyResult<String> {
    let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned());
    let link = |path: &str| std::fs::read_link(path).map(|target| target.display().to_string());
    let parts =
        [read("/proc/sys/kernel/random/boot_id"), link("/proc/self/ns/pid"), link("/proc/self/ns/user")];
    Ok(parts.into_iter().collect::<Result<Vec<_>, _>>()?.join(" "))
}

/// Process id of this process, and when it started in clock ticks since boot.
#[pyfunction]
fn process_identity() -> (u32, u64) {
    let Member { pid, started, .. } = Member::current();
    (pid, started)
}

/// Whether the engine's collectives run over shared memory: every rank on one host, and no other transport asked for
/// (`dist_backend` of `init_distributed`).
#[pyfunction]
#[pyo3(signature = (identities, backend))]
#[expect(clippy::needless_pass_by_value, reason = "PyO3 hands over owned values")]
fn shares_memory(identities: Vec<String>, backend: Option<String>) -> bool {
    backend.is_none() && identities.windows(2).all(|pair| pair[0] == pair[1])
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyGroup>()?;
    module.add_function(wrap_pyfunction!(host_identity, module)?)?;
    module.add_function(wrap_pyfunction!(process_identity, module)?)?;
    module.add_function(wrap_pyfunction!(shares_memory, module)?)?;
    Ok(())
}
