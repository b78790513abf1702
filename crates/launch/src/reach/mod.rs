//! The command lines that start an agent on each host.
//!
//! ```text
//!   ssh                     one line for each host; the connection is the agent's input and output
//!   pdsh, mpirun, srun      one line for all; each agent calls back
//! ```
//!
//! Pure functions. No shell is given a word that is not quoted, and where a script is needed on the host (`--venv_script`, or to find the
//! command), what follows it are arguments of that script, not part of its text.

pub(crate) mod runner;
pub(crate) mod runner_error;
pub(crate) mod ssh_error;
pub(crate) mod words;

use crate::arguments::args::LaunchArgs;
use crate::error::LaunchError;
use crate::plan::host_part::HostPart;
use crate::plan::hosts_plan::AGENT_COMMAND;
use crate::plan::surroundings::Surroundings;
use crate::reach::runner::Runner;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// All that the command lines depend on, but for the hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reach {
    pub(crate) runner: Runner,
    /// The runner's own program.
    pub(crate) tool: &'static str,
    /// `--launcher_args`.
    args: Vec<OsString>,
    ssh_port: Option<u16>,
    venv: Option<PathBuf>,
    /// This command, which lies on the hosts where it lies here, or on their `PATH`.
    program: PathBuf,
    /// What the user's environment says about the variables that lines set, by name.
    given: Vec<(&'static str, String)>,
    /// Whether this is a Slurm job already.
    pub(crate) in_slurm_job: bool,
    /// GPUs that Slurm is asked for on each host.
    gpus: Option<i64>,
    /// `--launcher_addr`: where agents call back.
    pub(crate) launcher_addr: String,
}

/// Where agents call back, and how they know the launcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CallBack {
    /// `ADDRESS:PORT`, several with commas between them.
    pub(crate) addresses: String,
    /// The fingerprint of the launcher's key.
    pub(crate) fingerprint: String,
}

impl CallBack {
    /// Stands in for what is only known when the job starts.
    pub(crate) fn to_be() -> Self {
        Self { addresses: "ADDRESS:PORT".to_owned(), fingerprint: "FINGERPRINT".to_owned() }
    }
}

/// Variables that a line sets and that the user may have set already.
const EXTENDED: [&str; 3] =
    ["PDSH_SSH_ARGS_APPEND", "HYDRA_LAUNCHER_EXTRA_ARGS", "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS"];

impl Reach {
    /// # Errors
    /// `--launcher_args` that cannot be split.
    pub(crate) fn new(
        args: &LaunchArgs,
        surroundings: &Surroundings,
        (runner, tool): (Runner, &'static str),
    ) -> Result<Self, LaunchError> {
        let environment = &surroundings.environment;
        Ok(Self {
            runner,
            tool,
            args: words::split(&args.launcher_args)?.into_iter().map(OsString::from).collect(),
            ssh_port: args.ssh_port,
            venv: args.venv_script.clone(),
            program: surroundings.program.clone(),
            given: EXTENDED
                .iter()
                .filter_map(|name| Some((*name, environment.get(*name)?.clone())))
                .collect(),
            in_slurm_job: environment.contains_key("SLURM_JOB_ID"),
            gpus: (args.num_gpus > 0
                && surroundings.accelerator.as_deref() != Some("cpu")
                && surroundings.gpus > 0)
                .then_some(args.num_gpus),
            launcher_addr: args.launcher_addr.trim().to_owned(),
        })
    }

    /// The command lines: one for each host by ssh, else one for all. Hosts have been checked with [`check_name`].
    pub(crate) fn lines(&self, parts: &[HostPart], call_back: &CallBack) -> Vec<Vec<OsString>> {
        let hosts: Vec<&str> = parts.iter().map(|part| part.host.as_str()).collect();
        let list = hosts.join(",");
        let count = hosts.len().to_string();
        let slots = parts.iter().map(|part| part.slots.len()).max().unwrap_or(1);
        let line = match self.runner {
            Runner::Ssh => {
                return hosts.iter().map(|host| self.ssh(host, &self.remote_command())).collect();
            }
            Runner::Pdsh => {
                let mut line =
                    self.environment("PDSH_SSH_ARGS_APPEND", &["PDSH_RCMD_TYPE=ssh"], "-oBatchMode=yes");
                line.extend(words(&[self.tool, "-S", "-f", &count]));
                line.extend(self.args.iter().cloned());
                line.extend(words(&["-w", &list]));
                // pdsh replaces %n and its like wherever they stand, and makes % of %%.
                let script = words::join(&self.agent(call_back, &[]));
                line.push(format!("exec {} --place %n", script.replace('%', "%%")).into());
                line
            }
            Runner::OpenMpi => {
                let mut line = self.environment("", &[], "");
                line.extend(words(&[self.tool, "--bind-to", "none"]));
                if let Some(port) = self.ssh_port {
                    line.extend(words(&["--mca", "plm_rsh_args", &format!("-p {port}")]));
                }
                line.extend(self.args.iter().cloned());
                // A part of the line for each host: mapped as a whole, mpirun would put its own host first.
                for (at, host) in hosts.iter().enumerate() {
                    if at > 0 {
                        line.push(":".into());
                    }
                    line.extend(words(&["--host", &format!("{host}:1"), "-n", "1"]));
                    line.extend(self.agent(call_back, &["--place", &at.to_string()]));
                }
                line
            }
            Runner::Mpich | Runner::Mvapich => {
                let mut line = self.environment("HYDRA_LAUNCHER_EXTRA_ARGS", &[], "");
                line.extend(words(&[self.tool, "-hosts", &list, "-ppn", "1", "-n", &count]));
                line.extend(self.args.iter().cloned());
                line.extend(self.agent(call_back, &["--place-from", "PMI_RANK"]));
                line
            }
            Runner::Impi => {
                // Under a job scheduler -ppn has no effect otherwise.
                let respect = ["I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=0"];
                let mut line = self.environment("I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS", &respect, "");
                line.extend(words(&[self.tool, "-hosts", &list, "-ppn", "1", "-n", &count]));
                // The agent's ranks use all cores of the host.
                line.extend(words(&["-genv", "I_MPI_PIN", "0"]));
                line.extend(self.args.iter().cloned());
                line.extend(self.agent(call_back, &["--place-from", "PMI_RANK"]));
                line
            }
            Runner::Slurm => {
                let mut line = words(&[self.tool]);
                for (name, value) in [
                    ("nodes", count.as_str()),
                    ("ntasks", &count),
                    ("ntasks-per-node", "1"),
                    ("nodelist", &list),
                ] {
                    line.push(format!("--{name}={value}").into());
                }
                // One task for each host, which has all of the host's share of the job and is not ended by the end of another.
                line.extend(words(&[
                    "--mpi=none",
                    "--cpu-bind=none",
                    "--input=none",
                    "--kill-on-bad-exit=0",
                    "--wait=0",
                ]));
                if self.in_slurm_job {
                    // Steps may share what the job has: the shell that this command runs in may be one.
                    line.push("--overlap".into());
                } else {
                    line.push(format!("--cpus-per-task={slots}").into());
                    line.extend(self.gpus.map(|gpus| format!("--gpus-per-node={gpus}").into()));
                }
                line.extend(self.args.iter().cloned());
                line.extend(self.agent(call_back, &["--place-from", "SLURMD_NODENAME"]));
                line
            }
        };
        vec![line]
    }

    /// The agent's words where no shell reads them: a shell of our own finds the command, and gets the rest as its arguments.
    fn agent(&self, call_back: &CallBack, place: &[&str]) -> Vec<OsString> {
        let script = match &self.venv {
            Some(venv) => format!(". {} && exec deepspeed \"$@\"", dot_path(venv.as_os_str())),
            None => find_program(self.program.as_os_str(), "\"$@\""),
        };
        let mut line = words(&["/bin/sh", "-c", &script, "deepspeed", AGENT_COMMAND]);
        line.extend(words(&["--connect", &call_back.addresses, "--fingerprint", &call_back.fingerprint]));
        line.extend(words(place));
        line
    }

    /// `env` with what makes ssh, wherever it is called, ask no questions; with `--ssh_port` and `more` in the variable that holds
    /// arguments for ssh, after what the user has put there; and with `others`.
    fn environment(&self, variable: &'static str, others: &[&str], more: &str) -> Vec<OsString> {
        let mut line = words(&["env", "SSH_ASKPASS=/bin/false", "SSH_ASKPASS_REQUIRE=force"]);
        line.extend(words(others));
        let given =
            self.given.iter().find(|(name, _)| *name == variable).map(|(_, value)| value.trim().to_owned());
        let port = self.ssh_port.map(|port| format!("-p {port}"));
        let more = (!more.is_empty()).then(|| more.to_owned());
        let value: Vec<String> =
            given.into_iter().chain(port).chain(more).filter(|word| !word.is_empty()).collect();
        if !variable.is_empty() && !value.is_empty() {
            line.push(format!("{variable}={}", value.join(" ")).into());
        }
        line
    }

    /// The ssh command line that gives `command` to a host's login shell. What the user gives comes first: ssh takes the first value of
    /// an option. The host has been checked with [`check_name`].
    pub(crate) fn ssh(&self, host: &str, command: &str) -> Vec<OsString> {
        let mut line = words(&[self.tool]);
        line.extend(self.args.iter().cloned());
        if let Some(port) = self.ssh_port {
            line.extend(words(&["-p", &port.to_string()]));
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
            line.extend(words(&["-o", option]));
        }
        line.extend(words(&["--", host, command]));
        line
    }

    /// What the host's login shell, of whatever kind, is given: one line for a POSIX shell, in quotes that all shells understand.
    fn remote_command(&self) -> String {
        let script = match &self.venv {
            // The environment that the script activates has its own deepspeed.
            Some(venv) => format!(". {} && exec deepspeed {AGENT_COMMAND}", dot_path(venv.as_os_str())),
            None => find_program(self.program.as_os_str(), AGENT_COMMAND),
        };
        format!("exec /bin/sh -c {}", words::quote(OsStr::new(&script)))
    }
}

fn words(list: &[&str]) -> Vec<OsString> {
    list.iter().map(OsString::from).collect()
}

/// A script that runs the command where it lies here, or that on the host's PATH.
fn find_program(program: &OsStr, words: &str) -> String {
    format!("p={}; [ -x \"$p\" ] || p=deepspeed; exec \"$p\" {words}", words::quote(program))
}

/// A path for the shell's `.`, which would look for a plain name on `PATH`.
fn dot_path(path: &OsStr) -> String {
    let text = path.to_string_lossy();
    if text.contains('/') { words::quote(path) } else { words::quote(OsStr::new(&format!("./{text}"))) }
}

/// A name that neither the runner, nor ssh, nor a shell behind its configuration (`ProxyCommand %h`) can take for something else.
///
/// # Errors
/// Another one.
pub(crate) fn check_name(runner: Runner, host: &str) -> Result<(), LaunchError> {
    // pdsh, MPI and Slurm have a grammar of their own for lists of hosts.
    let signs = match runner {
        Runner::Ssh => ".-_@:%[]",
        Runner::Pdsh => ".-_@",
        _ => ".-_",
    };
    let allowed = |c: char| c.is_alphanumeric() || signs.contains(c);
    if host.is_empty() || host.starts_with('-') || !host.chars().all(allowed) {
        let signs = signs.chars().map(String::from).collect::<Vec<String>>().join(" ");
        return Err(LaunchError::HostName { host: host.to_owned(), runner: runner.name(), signs });
    }
    Ok(())
}
