//! The plan of a job on several hosts: each host's part, and the command line that reaches it.

use crate::arguments::args::LaunchArgs;
use crate::error::LaunchError;
use crate::plan::host_part::HostPart;
use crate::plan::surroundings::Surroundings;
use crate::plan::{Note, OWN_VARIABLES};
use crate::reach::runner::{self, Runner};
use crate::reach::{self, CallBack, Reach};
use crate::resources::note_unused;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The hidden command that runs at the other end of a connection.
pub const AGENT_COMMAND: &str = "__agent";

/// Variables of the launcher's environment that every host gets, by how their names begin: those of the original (NCCL, Python, UCX,
/// MVAPICH, MLflow), and our own settings.
const HANDED_ON: [&str; 6] = ["NCCL", "PYTHON", "MV2", "UCX", "MLFLOW", "DEEPSPEED_"];

/// And by their whole names.
const HANDED_ON_NAMES: [&str; 2] = ["DS_ACCELERATOR", "OMP_NUM_THREADS"];

/// Left out on machines of the AISC service, which set them for each host.
const AISC_OWN: [&str; 2] = ["NCCL_IB_HCA", "UCX_NET_DEVICES"];

/// What is going to be started on several hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostsPlan {
    /// How the hosts are reached.
    pub runner: Runner,
    /// The part of each host, in the order of their ranks.
    pub parts: Vec<HostPart>,
    /// The command line that reaches each host by ssh, or the one for all by another runner; where agents call back, and by what they
    /// know the launcher, is only known when the job starts.
    #[serde(serialize_with = "lossy")]
    pub connections: Vec<Vec<OsString>>,
    /// The folder in which the ranks work.
    pub folder: PathBuf,
    /// What the user should know about the settings.
    pub notes: Vec<Note>,
    /// What the command lines are made of.
    #[serde(skip)]
    pub(crate) reach: Reach,
}

fn lossy<S: Serializer>(lines: &[Vec<OsString>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(
        lines.iter().map(|line| line.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>()),
    )
}

/// The plan for these parts.
///
/// # Errors
/// A runner that is not there, a host's name that ssh could misread, `--launcher_args` that cannot be split.
pub(crate) fn resolve(
    args: &LaunchArgs,
    surroundings: &Surroundings,
    parts: Vec<HostPart>,
    mut notes: Vec<Note>,
) -> Result<HostsPlan, LaunchError> {
    let (runner, tool) = runner::choose(args.launcher.as_deref(), surroundings)?;
    note_unused(
        &[
            ("--node_rank", args.node_rank >= 0),
            ("--no_ssh_check", args.no_ssh_check),
            ("--ssh_port", args.ssh_port.is_some() && runner == Runner::Slurm),
            ("--launcher_addr", !args.launcher_addr.is_empty() && runner == Runner::Ssh),
        ],
        &format!("by {runner}, where every host must answer before a rank is started"),
        &mut notes,
    );
    parts.iter().try_for_each(|part| reach::check_name(runner, &part.host))?;
    let reach = Reach::new(args, surroundings, (runner, tool))?;
    let connections = reach.lines(&parts, &CallBack::to_be());
    Ok(HostsPlan { runner, parts, connections, folder: surroundings.folder.clone(), notes, reach })
}

/// The variables that every host gets: from the launcher's environment, then from the environment files.
pub(crate) fn environment(
    args: &LaunchArgs,
    surroundings: &Surroundings,
    files: BTreeMap<String, String>,
    notes: &mut Vec<Note>,
) -> BTreeMap<String, String> {
    let aisc = surroundings.environment.contains_key("AISC_JOB_NAME");
    let is_handed_on = |name: &str| {
        let known =
            HANDED_ON.iter().any(|prefix| name.starts_with(prefix)) || HANDED_ON_NAMES.contains(&name);
        known && !(aisc && AISC_OWN.contains(&name)) && !OWN_VARIABLES.contains(&name)
    };
    for name in surroundings.not_text.iter().filter(|name| is_handed_on(name)) {
        notes.push(Note::warning(format!("{name} is not handed on: its value is not valid UTF-8")));
    }
    let mut env: BTreeMap<String, String> = surroundings
        .environment
        .iter()
        .filter(|(name, _)| is_handed_on(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !env.is_empty() {
        let names: Vec<&str> = env.keys().map(String::as_str).collect();
        notes.push(Note::info(format!("handed on to every host: {}", names.join(", "))));
    }
    if !args.no_python {
        // What lies beside the script, or where the job is started, is found on every host as it is here.
        let folder = surroundings.folder.to_string_lossy();
        let path = match env.get("PYTHONPATH") {
            Some(old) if !old.is_empty() => format!("{folder}:{old}"),
            _ => folder.into_owned(),
        };
        env.insert("PYTHONPATH".to_owned(), path);
    }
    env.extend(files);
    env
}

/// How long Slurm may take to find nodes for a job.
const QUEUE: Duration = Duration::from_secs(7 * 24 * 3600);

impl HostsPlan {
    /// How long the hosts may take to answer; `None`: as long as hosts that are there do.
    pub(crate) fn answer(&self) -> Option<Duration> {
        (self.runner == Runner::Slurm && !self.reach.in_slurm_job).then_some(QUEUE)
    }

    /// The number of ranks in the job.
    pub(crate) fn world(&self) -> usize {
        self.parts.iter().map(|part| part.slots.len()).sum()
    }

    /// The host of each rank, by its place among the hosts.
    pub(crate) fn host_of(&self, rank: usize) -> Option<usize> {
        self.parts
            .iter()
            .position(|part| (part.first_rank..part.first_rank + part.slots.len()).contains(&rank))
    }
}
