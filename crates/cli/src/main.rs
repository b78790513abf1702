//! The `deepspeed` command: launches a training program, or runs one of its own commands.
//!
//! A word such as `config` is a command only as the first argument, and only where no file of that name lies in the current folder: a
//! script may have any name.

mod checkpoint_command;
mod config_command;
mod memory_command;
mod output;

use checkpoint_command::CheckpointArgs;
use clap::Parser;
use config_command::ConfigArgs;
use memory_command::MemoryArgs;
use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

/// Commands that have a name but no content yet.
const PLANNED: [&str; 2] = ["bench", "doctor"];

/// Checks, explains and describes ds_config.json files, without torch.
#[derive(Debug, Parser)]
#[command(name = "deepspeed config", bin_name = "deepspeed config", version)]
struct ConfigCommand {
    #[command(flatten)]
    args: ConfigArgs,
}

/// Looks into checkpoints, checks them, compares, converts and exports them, without torch.
#[derive(Debug, Parser)]
#[command(name = "deepspeed checkpoint", bin_name = "deepspeed checkpoint", version)]
struct CheckpointCommand {
    #[command(flatten)]
    args: CheckpointArgs,
}

/// Plans the memory of a run: bytes by kind, per rank and per host, against what this host has free. Exits with 1 where it
/// does not fit, and says what to change.
#[derive(Debug, Parser)]
#[command(name = "deepspeed memory", bin_name = "deepspeed memory", version)]
struct MemoryCommand {
    #[command(flatten)]
    args: MemoryArgs,
}

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().collect();
    // What the launcher starts on another host; never a script.
    if args.len() == 2 && args[1] == deepspeed_launch::AGENT_COMMAND {
        return deepspeed_launch::agent_main();
    }
    if args.len() == 2 && args[1] == deepspeed_launch::GUARD_COMMAND {
        return deepspeed_launch::guard_main();
    }
    let word = args.get(1).and_then(|word| word.to_str()).filter(|word| !Path::new(word).exists());
    match word {
        Some("config") => {
            let command = ConfigCommand::parse_from(args.into_iter().skip(1));
            config_command::run(command.args)
        }
        Some("memory") => {
            let command = MemoryCommand::parse_from(args.into_iter().skip(1));
            memory_command::run(&command.args)
        }
        Some("checkpoint") => {
            let command = CheckpointCommand::parse_from(args.into_iter().skip(1));
            checkpoint_command::run(&command.args)
        }
        Some(word) if PLANNED.contains(&word) => {
            fail(&format!("the command `{word}` is not built yet (and there is no script of that name here)"))
        }
        Some(_) => deepspeed_launch::main_from_args(args),
        None if args.len() < 2 => match deepspeed_launch::print_help() {
            Ok(()) => ExitCode::from(2),
            Err(_) => ExitCode::FAILURE,
        },
        None => deepspeed_launch::main_from_args(args),
    }
}

fn fail(text: &str) -> ExitCode {
    // Nobody can be told that stderr is gone.
    let _ = writeln!(io::stderr(), "deepspeed: error: {text}");
    ExitCode::from(2)
}
