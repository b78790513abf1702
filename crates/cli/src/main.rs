//! The `deepspeed` command: launches a training program, or runs one of its own commands.
//!
//! A word such as `config` is a command only as the first argument, and only where no file of that name lies in the current folder: a
//! script may have any name. Behind [`RUN`] it is a command wherever it is.

mod bench_command;
mod checkpoint_command;
mod commands;
mod completions_command;
mod config_command;
mod doctor_command;
mod man_command;
mod memory_command;
mod output;
mod report_command;
mod ssh_command;

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

/// A hidden first word: the next one is a command, whatever files lie here. The original's other commands (`ds_report`, ...) use it.
const RUN: &str = "__run";

fn main() -> ExitCode {
    let mut args: Vec<OsString> = env::args_os().collect();
    // What the launcher starts on another host; never a script.
    if args.get(1).is_some_and(|word| word == deepspeed_launch::AGENT_COMMAND) {
        return deepspeed_launch::agent_main(args.into_iter().skip(2));
    }
    if args.len() == 2 && args[1] == deepspeed_launch::GUARD_COMMAND {
        return deepspeed_launch::guard_main();
    }
    if args.len() >= 2 && args[1] == bench_command::RANK_COMMAND {
        return bench_command::rank_main(&args[2..]);
    }
    let is_command = args.len() > 2 && args[1] == RUN;
    if is_command {
        args.remove(1);
    }
    let word = args.get(1).and_then(|word| word.to_str());
    match word.filter(|word| is_command || !Path::new(word).exists()).and_then(commands::find) {
        Some(command) => (command.run)(args.split_off(1)),
        None if is_command => output::fail(&format!("there is no command `{}`", args[1].to_string_lossy())),
        None if args.len() < 2 => match deepspeed_launch::print_help() {
            Ok(()) => ExitCode::from(2),
            Err(_) => ExitCode::FAILURE,
        },
        None => deepspeed_launch::main_from_args(args),
    }
}
