//! Which program reaches the other hosts.

use crate::error::LaunchError;
use crate::nearest::nearest;
use crate::plan::surroundings::Surroundings;
use serde::Serialize;
use std::fmt;

/// A way to start ranks on other hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Runner {
    /// One ssh connection for each host, with an agent at its other end.
    Ssh,
    /// The parallel shell, over ssh. As with all that follow, each agent calls back.
    Pdsh,
    /// Open MPI's mpirun.
    OpenMpi,
    /// MPICH's mpirun.
    Mpich,
    /// Intel MPI's mpirun.
    Impi,
    /// MVAPICH's mpirun.
    Mvapich,
    /// Slurm's srun.
    Slurm,
}

const RUNNERS: [Runner; 7] =
    [Runner::Ssh, Runner::Pdsh, Runner::OpenMpi, Runner::Mpich, Runner::Impi, Runner::Mvapich, Runner::Slurm];

impl Runner {
    /// The name that `--launcher` takes.
    pub fn name(self) -> &'static str {
        match self {
            Runner::Ssh => "ssh",
            Runner::Pdsh => "pdsh",
            Runner::OpenMpi => "openmpi",
            Runner::Mpich => "mpich",
            Runner::Impi => "impi",
            Runner::Mvapich => "mvapich",
            Runner::Slurm => "slurm",
        }
    }

    /// The programs that can be it, best first: `mpirun` may be that of any MPI, a Debian name says which.
    fn tools(self) -> &'static [&'static str] {
        match self {
            Runner::Ssh => &["ssh"],
            Runner::Pdsh => &["pdsh"],
            Runner::OpenMpi => &["mpirun.openmpi", "mpirun"],
            Runner::Mpich => &["mpirun.mpich", "mpiexec.hydra", "mpirun"],
            Runner::Impi => &["mpirun"],
            Runner::Mvapich => &["mpirun"],
            Runner::Slurm => &["srun"],
        }
    }

    /// What to do where none of them is there.
    fn hint(self) -> &'static str {
        match self {
            Runner::Ssh => {
                "install OpenSSH's client, or start the command on each host with --no_ssh and --node_rank"
            }
            Runner::Pdsh => "install pdsh, or leave --launcher out, and each host is reached by ssh",
            _ => {
                "load its module or put its bin folder on PATH, or leave --launcher out, and each host is reached by ssh"
            }
        }
    }
}

/// The runners' programs, of which the surroundings say which are there.
pub(crate) const TOOLS: [&str; 7] =
    ["ssh", "pdsh", "mpirun", "mpirun.openmpi", "mpirun.mpich", "mpiexec.hydra", "srun"];

impl fmt::Display for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The runner that `--launcher` names, in any case; `None` where the flag is not given.
///
/// # Errors
/// A name that is none of them, with the nearest.
pub(crate) fn parse(name: Option<&str>) -> Result<Option<Runner>, LaunchError> {
    let Some(name) = name else { return Ok(None) };
    let word = name.to_lowercase();
    let known = RUNNERS.map(Runner::name);
    match RUNNERS.into_iter().find(|runner| runner.name() == word) {
        Some(runner) => Ok(Some(runner)),
        None => Err(LaunchError::UnknownValue {
            flag: "--launcher",
            value: name.to_owned(),
            known: known.join(", "),
            nearest: nearest(&word, known)
                .map_or_else(String::new, |near| format!("; did you mean '{near}'?")),
        }),
    }
}

/// The runner for several hosts, and its program.
///
/// # Errors
/// An unknown name, or one whose program is not there.
pub(crate) fn choose(
    name: Option<&str>,
    surroundings: &Surroundings,
) -> Result<(Runner, &'static str), LaunchError> {
    let runner = parse(name)?.unwrap_or(Runner::Ssh);
    let there = |tool: &&&'static str| surroundings.tools.contains(&(**tool).to_owned());
    match runner.tools().iter().find(there) {
        Some(tool) => Ok((runner, tool)),
        None => {
            let program = runner.tools().last().copied().unwrap_or_default();
            Err(LaunchError::LauncherMissing { launcher: runner.name(), program, hint: runner.hint() })
        }
    }
}
