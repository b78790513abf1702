//! The launcher: which ranks a job has on this host, what each runs, and the watch over them until the last has ended.
//!
//! ```text
//!   command line        this machine
//!        |                   |
//!    LaunchArgs         Surroundings        hostfile, GPUs, cores, environment files
//!        |                   |
//!        +---- plan::resolve +              pure: counts, filters, variables, cores, command lines
//!                 |
//!               Plan    --- --dry_run ---> printed
//!              /     \
//!       LaunchPlan   HostsPlan              this machine | a part for each host
//!           |            |
//!            \          /
//!             attempts                      once, or again after a failure (--max_restarts): restart decides
//!            /          \
//!       preflight      hosts                the script is there, the port is free | connect, say hello, start
//!           |            |   \
//!       supervise        |   ssh ... agent  ranks on another host, tied to the connection; through pdsh, mpirun or
//!        |    \          |            |      srun (`crossing`) the agent calls back
//!        |   ranks       |          ranks   one process group for each rank
//!        |               |
//!    Oversight: Merger, Watch, Tail         pure: output line by line; when to end the job and whose fault it was
//!                 |
//!           FailureReport                   one report, the exit code of the first failure
//! ```
//!
//! A job on one host takes the left way only: no agent, no connection, no further process. Each folder's `mod.rs` says what it holds;
//! crates/README.md lists them.
//!
//! What a rank finds in its environment, on top of the launcher's own:
//!
//! | variable | value |
//! |---|---|
//! | `RANK`, `LOCAL_RANK` | its number in the job and on this host |
//! | `WORLD_SIZE`, `LOCAL_SIZE` | the number of ranks, in the job and on this host |
//! | `CROSS_RANK`, `CROSS_SIZE` | this host's number, and the number of hosts |
//! | `MASTER_ADDR`, `MASTER_PORT` | where rank 0 awaits the others |
//! | `CUDA_VISIBLE_DEVICES` | the GPUs of all local ranks (only where there are GPUs) |
//! | `OMP_NUM_THREADS` | its share of the cores, at least 1, unless it is set already |
//! | `DS_JOB_SECRET` | a random value by which the ranks of one job know each other |
//! | `DS_PROGRESS_FILE` | where the engine leaves word of the step it is in |
//! | `DS_RESTART_COUNT`, `_REASON`, `_STEP` | with `--max_restarts`: which attempt this is, and what the last one failed of |
//! | names of `.deepspeed_env` | as that file says |
//! | `NCCL*`, `PYTHON*`, ... | on several hosts: those of the launcher ([`HostsPlan`]) |
//!
//! Differences from the original launcher, each on purpose: a port that is not given is a free one; `--num_gpus` counts within
//! `CUDA_VISIBLE_DEVICES` instead of setting it aside; `.deepspeed_env` holds on one host too; a per-rank log is written beside the
//! console's output, not in its place; the signal that the launcher receives is the one that the ranks receive.

#![deny(unsafe_code)]

mod agent;
mod arguments;
mod columns;
mod console;
pub mod doctor;
mod error;
pub mod facts;
mod hosts;
mod job;
mod nearest;
mod oversight;
mod plan;
mod port;
mod ranks;
mod reach;
mod resources;
mod secret;
mod wire;

pub use arguments::args::{DEFAULT_HOSTFILE, LaunchArgs, LogLevel};
pub use arguments::host_args::HostArgs;
pub use columns::Columns;
pub use error::LaunchError;
pub use hosts::everywhere::on_every_host;
pub use job::restart::{FailureKind, RestartOn};
pub use plan::host_part::{HostPart, Program};
pub use plan::hosts_plan::{AGENT_COMMAND, HostsPlan};
pub use plan::surroundings::Surroundings;
pub use plan::{Interpreter, LaunchPlan, Note, Plan, RankPlan, SECRET_VARIABLE, resolve};
pub use ranks::guard::GUARD_COMMAND;
pub use reach::runner::Runner;
pub use resources::Device;
pub use resources::filters::{Direction, HostFilter, HostSlots, Slot};

use clap::{CommandFactory, Parser};
use console::Console;
use job::restart::Policy;
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

/// The exit code for arguments that make no sense, as Python's argparse has it.
const USAGE: u8 = 2;

/// The whole launcher: `args` is the command line with the program's name first. Returns when the job is over.
///
/// Must be called on the main thread: the ranks' lives are tied to the thread that starts them.
pub fn main_from_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match LaunchArgs::try_parse_from(args) {
        Ok(args) => main_from_parsed(&args),
        Err(error) => {
            // Nothing can be said where neither stdout nor stderr works.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE))
        }
    }
}

/// The `--help` text without the flags' details, for a command line that is empty.
pub fn print_help() -> io::Result<()> {
    LaunchArgs::command().print_help()
}

fn main_from_parsed(args: &LaunchArgs) -> ExitCode {
    let console = Console::new(args.level());
    match launch(args, &console) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            console.error(&error.to_string());
            match error {
                LaunchError::Interrupted { code, .. } => ExitCode::from(code),
                // Not the command line's fault.
                LaunchError::Hosts { .. } | LaunchError::Listen { .. } => ExitCode::FAILURE,
                _ => ExitCode::from(USAGE),
            }
        }
    }
}

/// The hidden command [`AGENT_COMMAND`]: the launcher's hands on another host. Without further words input and output are the
/// connection; with words it calls the launcher back, as they say.
///
/// Must be called on the main thread, as [`main_from_args`].
pub fn agent_main(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut words = words.into_iter().peekable();
    let done = if words.peek().is_none() { agent::run() } else { agent::front::run(words) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            Console::new(LogLevel::Error).error(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// The hidden command [`GUARD_COMMAND`]: ends what is left of a job when the process that holds its ranks is gone.
pub fn guard_main() -> ExitCode {
    ranks::guard::run();
    ExitCode::SUCCESS
}

fn launch(args: &LaunchArgs, console: &Console) -> Result<u8, LaunchError> {
    let plan = resolve(args, &Surroundings::read(args)?)?;
    if args.dry_run {
        let text = plan.to_string();
        return match io::stdout().lock().write_all(text.as_bytes()) {
            Ok(()) => Ok(0),
            Err(source) => Err(LaunchError::File { what: "the plan cannot be printed", source }),
        };
    }
    let notes = match &plan {
        Plan::Here(plan) => &plan.notes,
        Plan::Hosts(plan) => &plan.notes,
    };
    for note in notes {
        if note.warning {
            console.warn(&note.text);
        } else {
            console.info(&note.text);
        }
    }
    let _pid_file = args.save_pid.then(job::pid_file::PidFile::write).transpose()?;
    let on = if args.restart_on.is_empty() { vec![RestartOn::Any] } else { args.restart_on.clone() };
    job::attempts::run(&plan, Policy { most: args.max_restarts, on }, console)
}
