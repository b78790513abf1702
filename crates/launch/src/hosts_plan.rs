//! The plan of a job on several hosts: each host's part, and the command line that reaches it.

use crate::args::LaunchArgs;
use crate::error::LaunchError;
use crate::host_part::HostPart;
use crate::plan::{Note, OWN_VARIABLES};
use crate::resources::note_unused;
use crate::runner::{self, Runner};
use crate::surroundings::Surroundings;
use crate::words;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

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
    /// The command line that reaches each host.
    #[serde(serialize_with = "lossy")]
    pub connections: Vec<Vec<OsString>>,
    /// The folder in which the ranks work.
    pub folder: PathBuf,
    /// What the user should know about the settings.
    pub notes: Vec<Note>,
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
    let runner = runner::choose(args.launcher.as_deref(), surroundings.has_ssh)?;
    note_unused(
        &[("--node_rank", args.node_rank >= 0), ("--no_ssh_check", args.no_ssh_check)],
        "by ssh, where every host must answer before a rank is started",
        &mut notes,
    );
    let connections =
        parts.iter().map(|part| ssh(args, surroundings, &part.host)).collect::<Result<Vec<_>, _>>()?;
    Ok(HostsPlan { runner, parts, connections, folder: surroundings.folder.clone(), notes })
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

/// The ssh command line for a host. What the user gives comes first: ssh takes the first value of an option.
fn ssh(args: &LaunchArgs, surroundings: &Surroundings, host: &str) -> Result<Vec<OsString>, LaunchError> {
    check_name(host)?;
    let mut line: Vec<OsString> = vec!["ssh".into()];
    line.extend(words::split(&args.launcher_args)?.into_iter().map(OsString::from));
    if let Some(port) = args.ssh_port {
        line.extend(["-p".into(), port.to_string().into()]);
    }
    line.push("-T".into());
    // No question can be answered, and a host that is gone is noticed.
    for option in [
        "BatchMode=yes",
        "ConnectTimeout=10",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=3",
        "ControlMaster=no",
        "ControlPath=none",
    ] {
        line.extend(["-o".into(), option.into()]);
    }
    line.extend(["--".into(), host.into(), remote_command(args, surroundings).into()]);
    Ok(line)
}

/// What the host's login shell, of whatever kind, is given: one line for a POSIX shell, in quotes that all shells understand.
fn remote_command(args: &LaunchArgs, surroundings: &Surroundings) -> String {
    let script = match &args.venv_script {
        // The environment that the script activates has its own deepspeed.
        Some(venv) => format!(". {} && exec deepspeed {AGENT_COMMAND}", dot_path(venv.as_os_str())),
        // The command lies where it lies here, or on the host's PATH.
        None => {
            let here = words::quote(surroundings.program.as_os_str());
            format!("p={here}; [ -x \"$p\" ] || p=deepspeed; exec \"$p\" {AGENT_COMMAND}")
        }
    };
    format!("exec /bin/sh -c {}", words::quote(OsStr::new(&script)))
}

/// A path for the shell's `.`, which would look for a plain name on `PATH`.
fn dot_path(path: &OsStr) -> String {
    let text = path.to_string_lossy();
    if text.contains('/') { words::quote(path) } else { words::quote(OsStr::new(&format!("./{text}"))) }
}

/// A name that neither ssh nor a shell behind its configuration (`ProxyCommand %h`) can take for something else.
fn check_name(host: &str) -> Result<(), LaunchError> {
    let allowed = |c: char| c.is_alphanumeric() || ".-_@:%[]".contains(c);
    if host.is_empty() || host.starts_with('-') || !host.chars().all(allowed) {
        return Err(LaunchError::HostName { host: host.to_owned() });
    }
    Ok(())
}

impl HostsPlan {
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
