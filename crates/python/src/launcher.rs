//! Who this process is among its ranks: `deepspeed_discovery` for Python, which passes `os.environ` and acts on the answer.

use deepspeed_discovery::{DiscoveryError, Environment, World, discover};
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
};

/// One process's place: its rank of how many, its number on its host, and where rank 0 listens.
#[pyclass(frozen, module = "deepspeed._native")]
struct Rendezvous(World);

fn value_error(error: DiscoveryError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pymethods]
impl Rendezvous {
    /// A world of one, met by nobody.
    #[staticmethod]
    fn alone() -> Self {
        Self(World::alone())
    }

    /// From the host name of every rank, as MPI gives them, and an address of rank 0's host for the others.
    #[staticmethod]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python by value")]
    fn from_hosts(rank: usize, hosts: Vec<String>, master_addr: String, master_port: u16) -> PyResult<Self> {
        World::from_hosts(rank, &hosts, master_addr, master_port).map(Self).map_err(value_error)
    }

    /// 0 to `world_size - 1`.
    #[getter]
    fn rank(&self) -> u32 {
        self.0.rank
    }

    #[getter]
    fn world_size(&self) -> u32 {
        self.0.size
    }

    /// None where the environment does not say.
    #[getter]
    fn local_rank(&self) -> Option<u32> {
        self.0.local_rank
    }

    /// Ranks on this host, where known.
    #[getter]
    fn local_size(&self) -> Option<u32> {
        self.0.local_size
    }

    /// Host name or address of rank 0; None for a world of one that needs none, and where it is unknown.
    #[getter]
    fn master_addr(&self) -> Option<&str> {
        self.0.master_addr.as_deref()
    }

    #[getter]
    fn master_port(&self) -> u16 {
        self.0.master_port
    }

    /// Who said so, in words.
    #[getter]
    fn source(&self) -> &'static str {
        self.0.source
    }

    /// Whether several ranks must meet at an address that the environment does not give.
    #[getter]
    fn needs_master(&self) -> bool {
        self.0.needs_master()
    }

    /// Raises RuntimeError, with what to do, where `needs_master`.
    fn require_master(&self) -> PyResult<()> {
        self.0.require_master().map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }

    /// The variables by which every library finds its place: RANK, WORLD_SIZE and what else is known.
    fn environment(&self) -> Environment {
        self.0.environment()
    }
}

/// This process's place, or None where no launcher left a trace. `port` is used where nothing names one.
///
/// With `all_sources` false only RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are looked at.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "extracted from Python by value")]
fn discover_rendezvous(
    environment: Environment,
    port: u16,
    all_sources: bool,
) -> PyResult<Option<Rendezvous>> {
    Ok(discover(&environment, port, all_sources).map_err(value_error)?.map(Rendezvous))
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Rendezvous>()?;
    m.add_function(wrap_pyfunction!(discover_rendezvous, m)?)
}
