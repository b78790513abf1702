//! Which program reaches the other hosts.

use crate::error::LaunchError;
use crate::nearest::nearest;
use serde::Serialize;
use std::fmt;

/// A way to start ranks on other hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Runner {
    /// One ssh connection for each host, with an agent at its other end.
    Ssh,
    /// The parallel shell; not built yet.
    Pdsh,
    /// Open MPI; not built yet.
    OpenMpi,
    /// MPICH; not built yet.
    Mpich,
    /// Intel MPI; not built yet.
    Impi,
    /// MVAPICH; not built yet.
    Mvapich,
    /// Slurm; not built yet.
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
}

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

/// The runner for several hosts.
///
/// # Errors
/// One that is not built, or whose program is not there.
pub(crate) fn choose(name: Option<&str>, has_ssh: bool) -> Result<Runner, LaunchError> {
    match parse(name)? {
        None | Some(Runner::Ssh) if has_ssh => Ok(Runner::Ssh),
        None | Some(Runner::Ssh) => Err(LaunchError::LauncherMissing {
            launcher: "ssh",
            program: "ssh",
            hint: "install OpenSSH's client, or start the command on each host with --no_ssh and --node_rank",
        }),
        Some(other) => Err(LaunchError::NotBuilt {
            setting: format!("--launcher={other}"),
            hint: "; leave it out, and each host is reached by ssh, which needs nothing else installed",
        }),
    }
}
