//! Who this process is among its ranks, read from the environment that some launcher left.
//!
//! Order: the launcher's own variables, AzureML, SageMaker, Open MPI, PMI, Slurm. Reading is a pure function of a
//! map of variables; Python passes `os.environ` and acts on the answer.

use std::collections::HashMap;

use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
};

type Environment = HashMap<String, String>;

/// Ports that AzureML keeps open between its nodes, for one node and for several.
const AZUREML_PORT_ONE_NODE: u16 = 54965;
const AZUREML_PORT: u16 = 6105;

/// One process's place: its rank of how many, its number on its host, and where rank 0 listens.
#[pyclass(frozen, module = "deepspeed._native")]
struct Rendezvous {
    /// 0 to `world_size - 1`.
    #[pyo3(get)]
    rank: u32,
    #[pyo3(get)]
    world_size: u32,
    /// None where the environment does not say.
    #[pyo3(get)]
    local_rank: Option<u32>,
    /// Ranks on this host, where known.
    #[pyo3(get)]
    local_size: Option<u32>,
    /// Host name or address of rank 0; None for a world of one that needs none, and where it is unknown.
    #[pyo3(get)]
    master_addr: Option<String>,
    #[pyo3(get)]
    master_port: u16,
    /// Who said so, in words.
    #[pyo3(get)]
    source: &'static str,
    extra: Vec<(&'static str, &'static str)>,
}

#[pymethods]
impl Rendezvous {
    /// A world of one, met by nobody.
    #[staticmethod]
    fn alone() -> Self {
        Self {
            rank: 0,
            world_size: 1,
            local_rank: Some(0),
            local_size: Some(1),
            master_addr: None,
            master_port: 0,
            source: "no launcher: a world of one",
            extra: Vec::new(),
        }
    }

    /// From the host name of every rank, as MPI gives them, and an address of rank 0's host for the others.
    #[staticmethod]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python by value")]
    fn from_hosts(rank: usize, hosts: Vec<String>, master_addr: String, master_port: u16) -> PyResult<Self> {
        let Some(host) = hosts.get(rank) else {
            return Err(PyValueError::new_err(format!("rank {rank} is not among {} hosts", hosts.len())));
        };
        let one_host = hosts.iter().all(|other| other == host);
        let on_this_host = |hosts: &[String]| hosts.iter().filter(|other| *other == host).count() as u32;
        Ok(Self {
            rank: rank as u32,
            world_size: hosts.len() as u32,
            local_rank: Some(on_this_host(&hosts[..rank])),
            local_size: Some(on_this_host(&hosts)),
            master_addr: Some(if one_host { "127.0.0.1".to_owned() } else { master_addr }),
            master_port,
            source: "mpi4py",
            extra: Vec::new(),
        })
    }

    /// Whether several ranks must meet at an address that the environment does not give.
    #[getter]
    fn needs_master(&self) -> bool {
        self.world_size > 1 && self.master_addr.is_none()
    }

    /// Raises RuntimeError, with what to do, where `needs_master`.
    fn require_master(&self) -> PyResult<()> {
        if !self.needs_master() {
            return Ok(());
        }
        Err(PyRuntimeError::new_err(format!(
            "rank {} of {} (from {}) does not know where rank 0 is: set MASTER_ADDR to the host of rank 0 for every \
             rank, or install mpi4py, or start the job with the deepspeed command",
            self.rank, self.world_size, self.source
        )))
    }

    /// The variables by which every library finds its place: RANK, WORLD_SIZE and what else is known.
    fn environment(&self) -> Environment {
        let mut out = Environment::from([
            ("RANK".to_owned(), self.rank.to_string()),
            ("WORLD_SIZE".to_owned(), self.world_size.to_string()),
        ]);
        let optional = [
            ("LOCAL_RANK", self.local_rank.map(|n| n.to_string())),
            ("LOCAL_SIZE", self.local_size.map(|n| n.to_string())),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_addr.as_ref().map(|_| self.master_port.to_string())),
        ];
        out.extend(optional.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        out.extend(self.extra.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        out
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
    discover(&environment, port, all_sources).map_err(PyValueError::new_err)
}

fn discover(env: &Environment, port: u16, all_sources: bool) -> Result<Option<Rendezvous>, String> {
    let own = from_source(env, port, &LAUNCHER)?;
    if own.as_ref().is_some_and(|own| !own.needs_master()) {
        return Ok(own);
    }
    if all_sources {
        if env.contains_key("AZUREML_EXPERIMENT_ID") && !env.contains_key("DLTS_JOB_ID") {
            return from_azureml(env).map(Some);
        }
        if env.contains_key("SM_TRAINING_ENV") {
            return from_source(env, port, &Source { name: "SageMaker", ..OPEN_MPI });
        }
        // A batch script has Slurm's task variables too, without being one of its tasks.
        let slurm_step = env.contains_key("SLURM_STEP_ID");
        for source in [&OPEN_MPI, &PMI, &SLURM] {
            if source.name == SLURM.name && !slurm_step {
                continue;
            }
            if let Some(found) = from_source(env, port, source)? {
                return Ok(Some(found));
            }
        }
    }
    let missing: Vec<&str> =
        ["RANK", "WORLD_SIZE", "MASTER_ADDR"].into_iter().filter(|name| !env.contains_key(*name)).collect();
    match number(env, "WORLD_SIZE")? {
        Some(world) if world > 1 => Err(format!(
            "WORLD_SIZE is {world}, but {} not set: a launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and \
             MASTER_PORT for every rank (start the job with the deepspeed command), and a single process needs none \
             of them",
            match missing.as_slice() {
                [one] => format!("{one} is"),
                several => format!("{} are", several.join(" and ")),
            }
        )),
        _ => Ok(own),
    }
}

/// The variables of one launcher.
struct Source {
    name: &'static str,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static [&'static str],
    local_size: &'static [&'static str],
}

const LAUNCHER: Source = Source {
    name: "the launcher's variables",
    rank: "RANK",
    size: "WORLD_SIZE",
    local_rank: &[
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "PALS_LOCAL_RANKID",
        "MPI_LOCALRANKID",
        "SLURM_LOCALID",
    ],
    local_size: &["LOCAL_SIZE", "LOCAL_WORLD_SIZE"],
};
const OPEN_MPI: Source = Source {
    name: "Open MPI",
    rank: "OMPI_COMM_WORLD_RANK",
    size: "OMPI_COMM_WORLD_SIZE",
    local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
    local_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
};
const PMI: Source = Source {
    name: "PMI",
    rank: "PMI_RANK",
    size: "PMI_SIZE",
    local_rank: &["PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MPI_LOCALRANKID"],
    local_size: &["PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MPI_LOCALNRANKS"],
};
const SLURM: Source = Source {
    name: "Slurm",
    rank: "SLURM_PROCID",
    size: "SLURM_STEP_NUM_TASKS",
    local_rank: &["SLURM_LOCALID"],
    local_size: &[],
};

fn from_source(env: &Environment, port: u16, source: &Source) -> Result<Option<Rendezvous>, String> {
    let (Some(rank), Some(world_size)) = (number(env, source.rank)?, number(env, source.size)?) else {
        return Ok(None);
    };
    if rank >= world_size {
        return Err(format!(
            "{} is {rank} and {} is {world_size}: a rank is below the number of ranks",
            source.rank, source.size
        ));
    }
    let local_rank = first_number(env, source.local_rank)?;
    let local_size = first_number(env, source.local_size)?;
    let master_addr = env.get("MASTER_ADDR").cloned().or_else(|| {
        let one_host = local_size == Some(world_size);
        match source.name {
            _ if world_size == 1 => None,
            "Slurm" => {
                env.get("SLURM_STEP_NODELIST").or_else(|| env.get("SLURM_NODELIST")).map(|l| first_host(l))
            }
            _ => one_host.then(|| "127.0.0.1".to_owned()),
        }
    });
    Ok(Some(Rendezvous {
        rank,
        world_size,
        local_rank: local_rank.or((world_size == 1).then_some(0)),
        local_size,
        master_addr,
        master_port: port_of(env)?.unwrap_or(port),
        source: source.name,
        extra: Vec::new(),
    }))
}

fn from_azureml(env: &Environment) -> Result<Rendezvous, String> {
    let name = "AzureML";
    let Some(mut found) = from_source(env, AZUREML_PORT, &Source { name, ..OPEN_MPI })? else {
        return Err(
            "AZUREML_EXPERIMENT_ID is set, but OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE are not: start \
                    the job with AzureML's MPI distribution"
                .to_owned(),
        );
    };
    let one_node = found.local_size == Some(found.world_size);
    let master = if one_node { "AZ_BATCHAI_MPI_MASTER_NODE" } else { "AZ_BATCH_MASTER_NODE" };
    if let Some(value) = env.get(master) {
        let (host, port) =
            value.split_once(':').map_or((value.as_str(), None), |(host, port)| (host, Some(port)));
        found.master_addr = Some(host.to_owned());
        if let Some(port) = port.filter(|_| !env.contains_key("MASTER_PORT")) {
            found.master_port =
                port.parse().map_err(|_| format!("{master} is {value:?}, expected HOST:PORT"))?;
        }
    }
    if one_node && !env.contains_key("MASTER_PORT") {
        found.master_port = AZUREML_PORT_ONE_NODE;
    }
    if !env.contains_key("NCCL_SOCKET_IFNAME") {
        found.extra.push(("NCCL_SOCKET_IFNAME", "^docker0,lo"));
    }
    Ok(found)
}

fn number(env: &Environment, name: &str) -> Result<Option<u32>, String> {
    env.get(name)
        .map(|text| text.trim().parse().map_err(|_| format!("{name} is {text:?}, expected a whole number")))
        .transpose()
}

fn first_number(env: &Environment, names: &[&str]) -> Result<Option<u32>, String> {
    names.iter().find(|name| env.contains_key(**name)).map_or(Ok(None), |name| number(env, name))
}

fn port_of(env: &Environment) -> Result<Option<u16>, String> {
    env.get("MASTER_PORT")
        .map(|text| text.trim().parse().map_err(|_| format!("MASTER_PORT is {text:?}, expected 0 to 65535")))
        .transpose()
}

/// The first host of a Slurm node list such as `gpu[03-07,12],login1`.
fn first_host(list: &str) -> String {
    let Some((prefix, rest)) = list.split_once('[').filter(|(prefix, _)| !prefix.contains(',')) else {
        return list.split(',').next().unwrap_or(list).to_owned();
    };
    let number = rest.split([',', '-', ']']).next().unwrap_or_default();
    let suffix = rest.split_once(']').map_or("", |(_, after)| after).split(',').next().unwrap_or_default();
    format!("{prefix}{number}{suffix}")
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Rendezvous>()?;
    m.add_function(wrap_pyfunction!(discover_rendezvous, m)?)
}
