//! Whose variables mean what.
//!
//! | source | rank of size | on its host | where rank 0 is, if `MASTER_ADDR` does not say |
//! |---|---|---|---|
//! | a launcher | `RANK` of `WORLD_SIZE` | `LOCAL_RANK` of `LOCAL_SIZE` | |
//! | AzureML | as Open MPI | as Open MPI | `AZ_BATCH_MASTER_NODE`, or `AZ_BATCHAI_MPI_MASTER_NODE` on one host |
//! | SageMaker | as Open MPI | as Open MPI | the first of `SM_HOSTS` |
//! | Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK`, `_LOCAL_SIZE` | here, if all ranks are here |
//! | MVAPICH | `MV2_COMM_WORLD_RANK`, `_SIZE` | `MV2_COMM_WORLD_LOCAL_RANK`, `_LOCAL_SIZE` | the same |
//! | PMI: MPICH, Intel MPI, Cray | `PMI_RANK` of `PMI_SIZE` | `MPI_LOCALRANKID`, `PALS_LOCAL_RANKID`, ... | the same |
//! | PMIx | `PMIX_RANK` of `PALS_SIZE` or the Slurm step's tasks | as PMI and Slurm | as Slurm |
//! | Slurm | `SLURM_PROCID` of `SLURM_STEP_NUM_TASKS` | `SLURM_LOCALID`, `SLURM_STEP_TASKS_PER_NODE` | the step's first host |

use crate::world::{Environment, World};
use crate::{DiscoveryError, nodelist};

/// Ports that AzureML keeps open between its nodes, for one node and for several.
const AZUREML_PORT_ONE_NODE: u16 = 54965;
const AZUREML_PORT: u16 = 6105;

const LOOPBACK: &str = "127.0.0.1";

/// The variables of one source; of several names the first that is set counts.
#[derive(Clone, Copy)]
struct Source {
    name: &'static str,
    rank: &'static [&'static str],
    size: &'static [&'static str],
    local_rank: &'static [&'static str],
    local_size: &'static [&'static str],
    how: &'static str,
}

const LAUNCHER: Source = Source {
    name: "the launcher's variables",
    rank: &["RANK"],
    size: &["WORLD_SIZE"],
    local_rank: &[
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "PALS_LOCAL_RANKID",
        "MPI_LOCALRANKID",
        "SLURM_LOCALID",
    ],
    local_size: &["LOCAL_SIZE", "LOCAL_WORLD_SIZE"],
    how: "",
};
const OPEN_MPI: Source = Source {
    name: "Open MPI",
    rank: &["OMPI_COMM_WORLD_RANK"],
    size: &["OMPI_COMM_WORLD_SIZE"],
    local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
    local_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
    how: " (mpirun -x MASTER_ADDR=HOST ...)",
};
const MVAPICH: Source = Source {
    name: "MVAPICH",
    rank: &["MV2_COMM_WORLD_RANK"],
    size: &["MV2_COMM_WORLD_SIZE"],
    local_rank: &["MV2_COMM_WORLD_LOCAL_RANK"],
    local_size: &["MV2_COMM_WORLD_LOCAL_SIZE"],
    how: " (mpirun -genv MASTER_ADDR HOST ...)",
};
const PMI: Source = Source {
    name: "PMI",
    rank: &["PMI_RANK"],
    size: &["PMI_SIZE"],
    local_rank: &["PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MPI_LOCALRANKID"],
    local_size: &["PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MPI_LOCALNRANKS"],
    how: " (mpirun -genv MASTER_ADDR HOST ...)",
};
const PMIX: Source = Source {
    name: "PMIx",
    rank: &["PMIX_RANK"],
    size: &["PALS_SIZE", "SLURM_STEP_NUM_TASKS"],
    local_rank: &["PALS_LOCAL_RANKID", "MPI_LOCALRANKID"],
    local_size: &["PALS_LOCAL_SIZE", "MPI_LOCALNRANKS"],
    how: "",
};
const SLURM: Source = Source {
    name: "Slurm",
    rank: &["SLURM_PROCID"],
    size: &["SLURM_STEP_NUM_TASKS"],
    local_rank: &["SLURM_LOCALID"],
    local_size: &[],
    how: " (srun --export=ALL,MASTER_ADDR=HOST ...)",
};

/// This process's place, or `None` where no launcher left a trace. `port` is used where nothing names one.
///
/// With `all_sources` false only a launcher's own variables are looked at.
///
/// # Errors
/// Variables that contradict each other or make no sense, by name.
pub fn discover(env: &Environment, port: u16, all_sources: bool) -> Result<Option<World>, DiscoveryError> {
    let own = read(env, port, &LAUNCHER)?;
    if own.as_ref().is_some_and(|own| !own.needs_master()) {
        return Ok(own);
    }
    if all_sources {
        // A cloud's job without its MPI distribution is a single process, as anywhere.
        if env.contains_key("AZUREML_EXPERIMENT_ID")
            && !env.contains_key("DLTS_JOB_ID")
            && let Some(found) = azureml(env)?
        {
            return Ok(Some(found));
        }
        if env.contains_key("SM_TRAINING_ENV")
            && let Some(found) = sagemaker(env, port)?
        {
            return Ok(Some(found));
        }
        for source in [&OPEN_MPI, &MVAPICH, &PMI, &PMIX, &SLURM] {
            // A batch script has Slurm's task variables too, without being one of a step's tasks.
            if source.name == SLURM.name && !env.contains_key("SLURM_STEP_ID") {
                continue;
            }
            if let Some(found) = read(env, port, source)? {
                return Ok(Some(found));
            }
        }
    }
    match number(env, "WORLD_SIZE")? {
        Some(world) if world > 1 => {
            let names = ["RANK", "WORLD_SIZE", "MASTER_ADDR"];
            let missing: Vec<&str> = names.into_iter().filter(|name| !env.contains_key(*name)).collect();
            let missing = match missing.as_slice() {
                [one] => format!("{one} is"),
                several => format!("{} are", several.join(" and ")),
            };
            Err(DiscoveryError::Incomplete { world, missing })
        }
        _ => Ok(own),
    }
}

/// What one source says; `None` where it says nothing.
fn read(env: &Environment, port: u16, source: &Source) -> Result<Option<World>, DiscoveryError> {
    let (Some((rank_name, rank)), Some((size_name, size))) =
        (first_number(env, source.rank)?, first_number(env, source.size)?)
    else {
        return Ok(None);
    };
    if rank >= size {
        return Err(DiscoveryError::Rank { rank_name, rank, size_name, size });
    }
    let mut local_rank = first_number(env, source.local_rank)?.map(|(_, number)| number);
    let mut local_size = first_number(env, source.local_size)?.map(|(_, number)| number);
    let step = slurm_step(env, rank, size)?;
    if let Some(step) = &step {
        local_size = local_size.or(step.local_size);
        local_rank = local_rank.or(step.local_rank);
    }
    let master_addr = match env.get("MASTER_ADDR").filter(|value| !value.is_empty()) {
        Some(address) => Some(address.clone()),
        None if size == 1 => None,
        None if local_size == Some(size) => Some(LOOPBACK.to_owned()),
        None => step.and_then(|step| step.first_host),
    };
    Ok(Some(World {
        rank,
        size,
        local_rank: local_rank.or((size == 1).then_some(0)),
        local_size,
        master_addr,
        master_port: master_port(env)?.unwrap_or(port),
        source: source.name,
        extra: Vec::new(),
        how: source.how,
    }))
}

/// The step of Slurm that this process is a task of.
struct Step {
    first_host: Option<String>,
    local_rank: Option<u32>,
    local_size: Option<u32>,
}

/// The step whose tasks the ranks are: not where `mpirun` has started them within a Slurm job, whose daemons are the tasks.
fn slurm_step(env: &Environment, rank: u32, size: u32) -> Result<Option<Step>, DiscoveryError> {
    let is_task = env.contains_key("SLURM_STEP_ID")
        && number(env, "SLURM_PROCID")? == Some(rank)
        && number(env, "SLURM_STEP_NUM_TASKS")? == Some(size);
    if !is_task {
        return Ok(None);
    }
    let list = env.get("SLURM_STEP_NODELIST").or_else(|| env.get("SLURM_NODELIST"));
    let first_host = match list {
        Some(list) => nodelist::hosts(list)?.into_iter().next(),
        None => None,
    };
    let tasks = match env.get("SLURM_STEP_TASKS_PER_NODE") {
        Some(list) => nodelist::counts(list)?,
        None => Vec::new(),
    };
    let node = number(env, "SLURM_NODEID")?.unwrap_or(0) as usize;
    let local_rank = number(env, "SLURM_LOCALID")?;
    Ok(Some(Step { first_host, local_rank, local_size: tasks.get(node).copied() }))
}

fn azureml(env: &Environment) -> Result<Option<World>, DiscoveryError> {
    let name = "AzureML";
    let Some(mut found) = read(env, AZUREML_PORT, &Source { name, ..OPEN_MPI })? else { return Ok(None) };
    let one_node = found.local_size == Some(found.size);
    let master = if one_node { "AZ_BATCHAI_MPI_MASTER_NODE" } else { "AZ_BATCH_MASTER_NODE" };
    if let Some(value) = env.get(master).filter(|_| !env.contains_key("MASTER_ADDR")) {
        let (host, port) =
            value.split_once(':').map_or((value.as_str(), None), |(host, port)| (host, Some(port)));
        found.master_addr = Some(host.to_owned());
        if let Some(port) = port.filter(|_| !env.contains_key("MASTER_PORT")) {
            let port = port.parse();
            found.master_port =
                port.map_err(|_| DiscoveryError::Address { name: master, value: value.clone() })?;
        }
    }
    if one_node && !env.contains_key("MASTER_PORT") {
        found.master_port = AZUREML_PORT_ONE_NODE;
    }
    if !env.contains_key("NCCL_SOCKET_IFNAME") {
        found.extra.push(("NCCL_SOCKET_IFNAME", "^docker0,lo"));
    }
    Ok(Some(found))
}

fn sagemaker(env: &Environment, port: u16) -> Result<Option<World>, DiscoveryError> {
    let name = "SageMaker";
    let Some(mut found) = read(env, port, &Source { name, ..OPEN_MPI })? else { return Ok(None) };
    if found.needs_master() {
        // A JSON list of host names, which need no escapes: the first is where SageMaker starts mpirun, and rank 0.
        found.master_addr = env.get("SM_HOSTS").and_then(|list| list.split('"').nth(1)).map(str::to_owned);
    }
    Ok(Some(found))
}

fn number(env: &Environment, name: &str) -> Result<Option<u32>, DiscoveryError> {
    env.get(name).map(|text| parse(name, text, "a whole number")).transpose()
}

fn first_number(env: &Environment, names: &[&str]) -> Result<Option<(String, u32)>, DiscoveryError> {
    let Some(name) = names.iter().find(|name| env.contains_key(**name)) else { return Ok(None) };
    Ok(number(env, name)?.map(|number| ((*name).to_owned(), number)))
}

fn master_port(env: &Environment) -> Result<Option<u16>, DiscoveryError> {
    env.get("MASTER_PORT").map(|text| parse("MASTER_PORT", text, "0 to 65535")).transpose()
}

fn parse<T: std::str::FromStr>(name: &str, value: &str, expected: &'static str) -> Result<T, DiscoveryError> {
    let wrong = |_| DiscoveryError::Number { name: name.to_owned(), value: value.to_owned(), expected };
    value.trim().parse().map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn env(text: &str) -> Environment {
        let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// What is found in the variables of one line, in one line.
    fn found(text: &str) -> String {
        match discover(&env(text), 29500, true) {
            Ok(None) => "nothing".to_owned(),
            Err(error) => format!("error: {error}"),
            Ok(Some(world)) => {
                let mut variables: Vec<String> =
                    world.environment().into_iter().map(|(name, value)| format!("{name}={value}")).collect();
                variables.sort();
                let lost =
                    world.require_master().err().map_or_else(String::new, |error| format!("; {error}"));
                format!("{}: {}{lost}", world.source, variables.join(" "))
            }
        }
    }

    #[test]
    fn every_source() {
        let mpi = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2";
        let one_host = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2";
        let hydra = "PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1";
        let slurm = "SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=8 SLURM_LOCALID=1";
        let step = format!("{slurm} SLURM_STEP_ID=0 SLURM_NODEID=1 SLURM_STEP_TASKS_PER_NODE=4(x2)");
        insta::assert_snapshot!([
            found(""),
            found("RANK=0 WORLD_SIZE=1"),
            found(&format!("RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=h MASTER_PORT=7 {mpi}")),
            found("RANK=1 WORLD_SIZE=2 LOCAL_SIZE=2"),
            found(mpi),
            found(&format!("{mpi} MASTER_ADDR=h MASTER_PORT=7")),
            found(one_host),
            found("MV2_COMM_WORLD_RANK=0 MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK=0 MV2_COMM_WORLD_LOCAL_SIZE=2"),
            found(&format!("{hydra} MPI_LOCALNRANKS=4")),
            found(&format!("{hydra} MPI_LOCALNRANKS=2")),
            found("PMI_RANK=1 PMI_SIZE=2 PALS_LOCAL_RANKID=0 PALS_LOCAL_SIZE=1"),
            found(slurm),
            found(&format!("{step} SLURM_STEP_NODELIST=gpu[08-09]")),
            found(&format!("{step} SLURM_STEP_NODELIST=gpu[08-09] MASTER_ADDR=10.0.0.1 MASTER_PORT=7")),
            found(&format!("{step} SLURM_STEP_NODELIST=gpu[08-09] PMI_RANK=5 PMI_SIZE=8")),
            found(&format!("{step} SLURM_STEP_NODELIST=gpu[08-09] PMIX_RANK=5")),
            found("SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=1 SLURM_STEP_ID=0 SLURM_NODEID=0 SLURM_STEP_TASKS_PER_NODE=2"),
            found(&format!("{mpi} SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NODELIST=n[2-3]")),
            found(&format!("{step} SLURM_STEP_NODELIST=gpu[")),
            found(&format!("{mpi} AZUREML_EXPERIMENT_ID=e AZ_BATCH_MASTER_NODE=m:6000")),
            found(&format!("{mpi} AZUREML_EXPERIMENT_ID=e AZ_BATCH_MASTER_NODE=m:x")),
            found(&format!("{one_host} AZUREML_EXPERIMENT_ID=e AZ_BATCHAI_MPI_MASTER_NODE=m NCCL_SOCKET_IFNAME=ib0")),
            found(&format!("{one_host} AZUREML_EXPERIMENT_ID=e DLTS_JOB_ID=x AZ_BATCHAI_MPI_MASTER_NODE=m")),
            found("AZUREML_EXPERIMENT_ID=e"),
            found(&format!("{mpi} SM_TRAINING_ENV={{}} SM_HOSTS=[\"algo-1\",\"algo-2\"]")),
            found("SM_TRAINING_ENV={}"),
            found("WORLD_SIZE=4"),
            found("RANK=2 WORLD_SIZE=2 MASTER_ADDR=h"),
            found("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=x"),
            found("OMPI_COMM_WORLD_RANK=one OMPI_COMM_WORLD_SIZE=2"),
        ].join("\n"), @r#"
        nothing
        the launcher's variables: LOCAL_RANK=0 RANK=0 WORLD_SIZE=1
        the launcher's variables: LOCAL_RANK=0 MASTER_ADDR=h MASTER_PORT=7 RANK=1 WORLD_SIZE=2
        the launcher's variables: LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 RANK=1 WORLD_SIZE=2
        Open MPI: LOCAL_RANK=1 LOCAL_SIZE=2 RANK=3 WORLD_SIZE=4; rank 3 of 4 (from Open MPI) does not know where rank 0 is: set MASTER_ADDR to the host of rank 0 for every rank (mpirun -x MASTER_ADDR=HOST ...), or install mpi4py, or start the job with the deepspeed command
        Open MPI: LOCAL_RANK=1 LOCAL_SIZE=2 MASTER_ADDR=h MASTER_PORT=7 RANK=3 WORLD_SIZE=4
        Open MPI: LOCAL_RANK=1 LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 RANK=1 WORLD_SIZE=2
        MVAPICH: LOCAL_RANK=0 LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 RANK=0 WORLD_SIZE=2
        PMI: LOCAL_RANK=1 LOCAL_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 RANK=1 WORLD_SIZE=4
        PMI: LOCAL_RANK=1 LOCAL_SIZE=2 RANK=1 WORLD_SIZE=4; rank 1 of 4 (from PMI) does not know where rank 0 is: set MASTER_ADDR to the host of rank 0 for every rank (mpirun -genv MASTER_ADDR HOST ...), or install mpi4py, or start the job with the deepspeed command
        PMI: LOCAL_RANK=0 LOCAL_SIZE=1 RANK=1 WORLD_SIZE=2; rank 1 of 2 (from PMI) does not know where rank 0 is: set MASTER_ADDR to the host of rank 0 for every rank (mpirun -genv MASTER_ADDR HOST ...), or install mpi4py, or start the job with the deepspeed command
        nothing
        Slurm: LOCAL_RANK=1 LOCAL_SIZE=4 MASTER_ADDR=gpu08 MASTER_PORT=29500 RANK=5 WORLD_SIZE=8
        Slurm: LOCAL_RANK=1 LOCAL_SIZE=4 MASTER_ADDR=10.0.0.1 MASTER_PORT=7 RANK=5 WORLD_SIZE=8
        PMI: LOCAL_RANK=1 LOCAL_SIZE=4 MASTER_ADDR=gpu08 MASTER_PORT=29500 RANK=5 WORLD_SIZE=8
        PMIx: LOCAL_RANK=1 LOCAL_SIZE=4 MASTER_ADDR=gpu08 MASTER_PORT=29500 RANK=5 WORLD_SIZE=8
        Slurm: LOCAL_RANK=1 LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 RANK=1 WORLD_SIZE=2
        Open MPI: LOCAL_RANK=1 LOCAL_SIZE=2 RANK=3 WORLD_SIZE=4; rank 3 of 4 (from Open MPI) does not know where rank 0 is: set MASTER_ADDR to the host of rank 0 for every rank (mpirun -x MASTER_ADDR=HOST ...), or install mpi4py, or start the job with the deepspeed command
        error: the Slurm list `gpu[` cannot be read: a bracket does not close
        AzureML: LOCAL_RANK=1 LOCAL_SIZE=2 MASTER_ADDR=m MASTER_PORT=6000 NCCL_SOCKET_IFNAME=^docker0,lo RANK=3 WORLD_SIZE=4
        error: AZ_BATCH_MASTER_NODE is "m:x", expected HOST:PORT
        AzureML: LOCAL_RANK=1 LOCAL_SIZE=2 MASTER_ADDR=m MASTER_PORT=54965 RANK=1 WORLD_SIZE=2
        Open MPI: LOCAL_RANK=1 LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 RANK=1 WORLD_SIZE=2
        nothing
        SageMaker: LOCAL_RANK=1 LOCAL_SIZE=2 MASTER_ADDR=algo-1 MASTER_PORT=29500 RANK=3 WORLD_SIZE=4
        nothing
        error: WORLD_SIZE is 4, but RANK and MASTER_ADDR are not set: a launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for every rank (start the job with the deepspeed command), and a single process needs none of them
        error: RANK is 2 and WORLD_SIZE is 2: a rank is below the number of ranks
        error: MASTER_PORT is "x", expected 0 to 65535
        error: OMPI_COMM_WORLD_RANK is "one", expected a whole number
        "#);
    }

    #[test]
    fn only_a_launchers_own_variables() {
        let env = env("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1");
        assert_eq!(discover(&env, 1, false), Ok(None));
        assert!(discover(&env, 1, true).unwrap().is_some());
    }

    proptest! {
        /// Whatever the variables hold, there is a world with a rank within it, or a typed error.
        #[test]
        fn any_environment_is_survived(pairs in prop::collection::vec((0usize..17, "[0-4a(),\\[\\]x-]{0,5}"), 0..12)) {
            const NAMES: [&str; 17] = [
                "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK",
                "PMI_SIZE", "PMIX_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_NODEID",
                "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV",
            ];
            let env: Environment = pairs.into_iter().map(|(name, value)| (NAMES[name].to_owned(), value)).collect();
            if let Ok(Some(world)) = discover(&env, 29500, true) {
                prop_assert!(world.rank < world.size);
                prop_assert!(env.get("MASTER_ADDR").filter(|value| !value.is_empty()).is_none_or(|given| world.master_addr.as_ref() == Some(given)));
            }
        }
    }
}
