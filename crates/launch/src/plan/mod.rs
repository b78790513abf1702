//! From arguments and surroundings to a [`Plan`]: which ranks run what, where, with which environment.
//!
//! ```text
//!   resolve(arguments, surroundings) --- one host ------> on_host(part, surroundings) = LaunchPlan
//!                                    \-- several hosts --> HostsPlan: a part for each host
//!                                                              each agent: on_host(part, its surroundings) = LaunchPlan
//! ```
//!
//! Pure functions: nothing is read, probed or started here, so a plan can be printed and tested as a value. What is left to
//! the start of the job: a free port where none is given, the job's secret, and the names of the log files.

pub(crate) mod cores;
pub(crate) mod display;
pub(crate) mod env_file;
pub(crate) mod host_part;
pub(crate) mod hosts_plan;
pub(crate) mod surroundings;

use crate::arguments::args::LaunchArgs;
use crate::error::LaunchError;
use crate::job::restart::Failure;
use crate::plan::host_part::{HostPart, Program};
use crate::plan::hosts_plan::HostsPlan;
use crate::plan::surroundings::Surroundings;
use crate::resources::filters::{HostSlots, Slot};
use crate::resources::{self, Device, Resources};
use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// What is going to be started, here or on several hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Plan {
    /// Ranks of this machine only, started by this process.
    Here(LaunchPlan),
    /// A part for each host, started by an agent there.
    Hosts(HostsPlan),
}

/// Variables that the launcher itself sets for each rank; an environment file cannot change them.
pub(crate) const OWN_VARIABLES: [&str; 15] = [
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    SECRET_VARIABLE,
    "DS_RESTART_COUNT",
    "DS_RESTART_REASON",
    "DS_RESTART_STEP",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
];

/// The port where none is given and none can be agreed on: that of the original.
const DEFAULT_PORT: u16 = 29500;

/// The variable that carries the job's secret: 32 random bytes in hexadecimal, new for each job, by which the ranks of a job know
/// each other. It travels by environment only and is in no plan and no command line.
pub const SECRET_VARIABLE: &str = "DS_JOB_SECRET";

/// What is going to be started on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LaunchPlan {
    /// The host, as the hostfile or the filters call it.
    pub host: String,
    /// What a slot is.
    pub device: Device,
    /// The slots in use; local rank `i` has `slots[i]`.
    pub slots: Vec<Slot>,
    /// The number of ranks in the job; more than are here where `--no_ssh` starts the others by hand.
    pub world: usize,
    /// Cores that this process may keep busy.
    pub cores: usize,
    /// Where rank 0 awaits the others.
    pub master_addr: String,
    /// The port for that; `None`: a free one is chosen when the job starts.
    pub master_port: Option<u16>,
    /// The user's script, module or program, as given.
    #[serde(serialize_with = "lossy")]
    pub script: OsString,
    /// How the script is run.
    pub interpreter: Interpreter,
    /// The ranks, by rank.
    pub ranks: Vec<RankPlan>,
    /// The folder for one log file per rank.
    pub rank_log_dir: Option<PathBuf>,
    /// What the user should know about the settings.
    pub notes: Vec<Note>,
}

/// How the user's script is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpreter {
    /// `python -u script`.
    Script,
    /// `python -u -m module`.
    Module,
    /// The program itself.
    None,
}

/// One rank of the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RankPlan {
    /// The rank in the whole job.
    pub rank: usize,
    /// The rank on this host.
    pub local_rank: usize,
    /// The program and its arguments.
    #[serde(serialize_with = "lossy_list")]
    pub command: Vec<OsString>,
    /// Variables that are set on top of the launcher's own environment.
    pub env: BTreeMap<String, String>,
    /// The cores that the rank is bound to, ascending; `None`: all.
    pub cores: Option<Vec<usize>>,
}

/// A remark about the settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Whether it is a doubtful setting rather than mere information.
    pub warning: bool,
    /// The remark, lower case, one line.
    pub text: String,
}

impl Note {
    /// Mere information.
    pub(crate) fn info(text: impl Into<String>) -> Self {
        Self { warning: false, text: text.into() }
    }

    /// A doubtful setting.
    pub(crate) fn warning(text: impl Into<String>) -> Self {
        Self { warning: true, text: text.into() }
    }
}

impl Plan {
    /// Tells the ranks that this is the attempt after `count` restarts of at most `most`, and what the one before it failed of. torchrun's
    /// names are there for scripts that know them.
    pub(crate) fn tell_restarts(&mut self, count: u32, most: u32, last: Option<&Failure>) {
        let mut variables = vec![
            ("DS_RESTART_COUNT", count.to_string()),
            ("TORCHELASTIC_RESTART_COUNT", count.to_string()),
            ("TORCHELASTIC_MAX_RESTARTS", most.to_string()),
        ];
        if let Some(failure) = last {
            variables.push(("DS_RESTART_REASON", failure.kind.to_string()));
            variables.extend(failure.step.map(|step| ("DS_RESTART_STEP", step.to_string())));
        }
        let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value));
        match self {
            Plan::Here(plan) => {
                plan.ranks.iter_mut().for_each(|rank| rank.env.extend(variables.clone()));
            }
            Plan::Hosts(plan) => plan.parts.iter_mut().for_each(|part| part.env.extend(variables.clone())),
        }
    }
}

fn lossy<S: Serializer>(word: &OsString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&word.to_string_lossy())
}

fn lossy_list<S: Serializer>(words: &[OsString], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(words.iter().map(|word| word.to_string_lossy()))
}

impl LaunchPlan {
    /// The first of its ranks.
    pub(crate) fn first_rank(&self) -> usize {
        self.ranks.first().map_or(0, |rank| rank.rank)
    }

    /// Fixes the port on which rank 0 awaits the others, where the user has given none.
    pub(crate) fn meet_at(&mut self, port: u16) {
        self.master_port = Some(port);
        for rank in &mut self.ranks {
            rank.env.insert("MASTER_PORT".to_owned(), port.to_string());
        }
    }
}

/// Resolves the arguments into a plan.
///
/// # Errors
/// Arguments that contradict each other or the machine, a bad hostfile, a setting that is not built.
pub fn resolve(args: &LaunchArgs, surroundings: &Surroundings) -> Result<Plan, LaunchError> {
    let mut notes = Vec::new();
    let interpreter = match (args.module, args.no_python) {
        (true, true) => return Err(LaunchError::ModuleWithoutPython),
        (true, false) => Interpreter::Module,
        (false, true) => Interpreter::None,
        (false, false) => Interpreter::Script,
    };
    check_autotuning(&args.autotuning)?;
    if let Some(text) = &args.bind_core_list {
        cores::parse_list(text)?;
        if !args.bind_cores_to_rank {
            notes.push(Note::info("--bind_core_list has no effect without --bind_cores_to_rank"));
        }
    }
    let resources = resources::resolve(args, surroundings, &mut notes)?;
    let program = Program {
        interpreter,
        script: args.script().clone(),
        args: args.script_args().to_vec(),
        local_rank: !args.no_local_rank,
    };
    let parts = |hosts: &[HostSlots], env: &BTreeMap<String, String>| -> Vec<HostPart> {
        let world = hosts.iter().map(|host| host.slots.len()).sum();
        let mut first_rank = 0;
        hosts
            .iter()
            .enumerate()
            .map(|(node_rank, host)| {
                let part = HostPart {
                    host: host.host.clone(),
                    node_rank,
                    nodes: hosts.len(),
                    first_rank,
                    world,
                    slots: host.slots.clone(),
                    master_addr: args.master_addr.trim().to_owned(),
                    master_port: args.master_port,
                    program: program.clone(),
                    env: env.clone(),
                    bind_cores: args.bind_cores_to_rank,
                    core_list: args.bind_core_list.clone(),
                    rank_log_dir: args.rank_log_dir().cloned(),
                };
                first_rank += part.slots.len();
                part
            })
            .collect()
    };
    if args.max_restarts == 0 && !args.restart_on.is_empty() {
        notes.push(Note::info("--restart_on has no effect without --max_restarts"));
    }
    let env = file_variables(surroundings, &mut notes);
    let mut plan = match resources {
        Resources::Here { hosts, at, device } => {
            let mut part = parts(&hosts, &env).swap_remove(at);
            if part.nodes > 1 && args.max_restarts > 0 {
                return Err(LaunchError::RestartByHand);
            }
            if part.master_addr.is_empty() {
                part.master_addr =
                    if part.nodes > 1 { hosts[0].host.clone() } else { "127.0.0.1".to_owned() };
            }
            if part.nodes > 1 && part.master_port.is_none() {
                part.master_port = Some(DEFAULT_PORT);
                notes.push(Note::info(format!(
                    "with --no_ssh every host must be told the same --master_port; it is {DEFAULT_PORT} as none is given"
                )));
            }
            Plan::Here(on_host(&part, surroundings, device, notes)?)
        }
        Resources::Hosts(hosts) => {
            let env = hosts_plan::environment(args, surroundings, env, &mut notes);
            Plan::Hosts(hosts_plan::resolve(args, surroundings, parts(&hosts, &env), notes)?)
        }
    };
    if args.max_restarts > 0 {
        plan.tell_restarts(0, args.max_restarts, None);
    }
    Ok(plan)
}

/// The plan of one host for its part of the job, in view of what the host has.
///
/// # Errors
/// Slots, cores or a python that the host does not have.
pub(crate) fn on_host(
    part: &HostPart,
    surroundings: &Surroundings,
    device: Device,
    mut notes: Vec<Note>,
) -> Result<LaunchPlan, LaunchError> {
    let local_size = part.slots.len();
    let bound = bind_cores(part, surroundings, &mut notes)?;
    let mut shared = part.env.clone();
    let mut set = |name: &str, value: String| shared.insert(name.to_owned(), value);
    set("WORLD_SIZE", part.world.to_string());
    set("LOCAL_SIZE", local_size.to_string());
    set("CROSS_RANK", part.node_rank.to_string());
    set("CROSS_SIZE", part.nodes.to_string());
    set("MASTER_ADDR", part.master_addr.clone());
    if let Some(port) = part.master_port {
        set("MASTER_PORT", port.to_string());
    }
    if device == Device::Gpu {
        let list: Vec<String> = part.slots.iter().map(Slot::to_string).collect();
        set("CUDA_VISIBLE_DEVICES", list.join(","));
    }
    if part.program.interpreter == Interpreter::None {
        set("PYTHONUNBUFFERED", "1".to_owned());
    }
    if let Some(bound) = &bound {
        set("OMP_NUM_THREADS", bound[0].len().to_string());
    } else if surroundings.omp_num_threads.is_none() {
        shared
            .entry("OMP_NUM_THREADS".to_owned())
            .or_insert_with(|| (surroundings.cores / local_size).max(1).to_string());
    }

    let ranks = (0..local_size)
        .map(|local_rank| {
            let rank = part.first_rank + local_rank;
            let mut env = shared.clone();
            env.insert("RANK".to_owned(), rank.to_string());
            env.insert("LOCAL_RANK".to_owned(), local_rank.to_string());
            Ok(RankPlan {
                rank,
                local_rank,
                command: command(&part.program, surroundings, local_rank)?,
                env,
                cores: bound.as_ref().map(|bound| bound[local_rank].clone()),
            })
        })
        .collect::<Result<Vec<RankPlan>, LaunchError>>()?;
    Ok(LaunchPlan {
        host: part.host.clone(),
        device,
        slots: part.slots.clone(),
        world: part.world,
        cores: surroundings.cores,
        master_addr: part.master_addr.clone(),
        master_port: part.master_port,
        script: part.program.script.clone(),
        interpreter: part.program.interpreter,
        ranks,
        rank_log_dir: part.rank_log_dir.clone(),
        notes,
    })
}

/// The words of one rank's command line.
fn command(
    program: &Program,
    surroundings: &Surroundings,
    local_rank: usize,
) -> Result<Vec<OsString>, LaunchError> {
    let mut words: Vec<OsString> = Vec::new();
    if program.interpreter != Interpreter::None {
        let python = surroundings.python.as_ref().ok_or_else(|| LaunchError::PythonMissing {
            virtual_env: surroundings.virtual_env.clone().unwrap_or_else(|| "not set".to_owned()),
        })?;
        words.push(python.clone().into_os_string());
    }
    words.extend(program.words(local_rank));
    Ok(words)
}

/// Autotuning would change what runs, so asking for it is an error until it exists.
fn check_autotuning(value: &str) -> Result<(), LaunchError> {
    match value {
        "" => Ok(()),
        "tune" | "run" => Err(LaunchError::NotBuilt {
            setting: format!("--autotuning={value}"),
            hint: "; leave it out to train",
        }),
        other => Err(LaunchError::UnknownValue {
            flag: "--autotuning",
            value: other.to_owned(),
            known: "tune, run".to_owned(),
            nearest: String::new(),
        }),
    }
}

/// The cores of each rank, where they are to be bound.
fn bind_cores(
    part: &HostPart,
    surroundings: &Surroundings,
    notes: &mut Vec<Note>,
) -> Result<Option<Vec<Vec<usize>>>, LaunchError> {
    if !part.bind_cores {
        return Ok(None);
    }
    let listed = match &part.core_list {
        None => None,
        Some(text) => Some((text, cores::parse_list(text)?)),
    };
    if let Some(value) = &surroundings.kmp_affinity {
        return Err(LaunchError::KmpAffinity { value: value.clone() });
    }
    let (which, pool) = match listed {
        None => ("the physical cores that this process may use", surroundings.physical_core_ids.clone()),
        Some((text, list)) => {
            if let Some(core) = list.iter().find(|core| !surroundings.core_ids.contains(core)) {
                return Err(LaunchError::CoreList {
                    text: text.clone(),
                    what: format!(
                        "core {core} is not among those that this process may use ({})",
                        cores::list_cores(&surroundings.core_ids)
                    ),
                });
            }
            ("of --bind_core_list", list)
        }
    };
    let shares = cores::share_out(&pool, part.slots.len()).ok_or(LaunchError::TooFewCores {
        cores: pool.len(),
        which,
        ranks: part.slots.len(),
    })?;
    let unused = pool.len() - shares.len() * shares[0].len();
    if unused > 0 {
        notes.push(Note::info(format!(
            "{unused} of {} cores stay unused: ranks get equal shares",
            pool.len()
        )));
    }
    Ok(Some(shares))
}

/// The variables of the environment files, and what is to be said about them.
fn file_variables(surroundings: &Surroundings, notes: &mut Vec<Note>) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for (path, text) in &surroundings.env_files {
        let file = env_file::parse(text);
        for (line, what) in file.problems {
            notes.push(Note::warning(format!("{}:{line}: {what}; the line is left out", path.display())));
        }
        let mut names: Vec<String> = Vec::new();
        for (name, value) in file.variables {
            if OWN_VARIABLES.contains(&name.as_str()) {
                notes.push(Note::warning(format!(
                    "{}: {name} is set by the launcher itself; the line is left out",
                    path.display()
                )));
                continue;
            }
            if !names.contains(&name) {
                names.push(name.clone());
            }
            variables.insert(name, value);
        }
        if !names.is_empty() {
            notes.push(Note::info(format!("{} sets for every rank: {}", path.display(), names.join(", "))));
        }
    }
    variables
}
