//! The commands besides the launch itself: one table for what runs them, completes them and describes them.

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory, Parser};
use deepspeed_launch::LaunchArgs;

use crate::{
    bench_command, checkpoint_command, completions_command, config_command, doctor_command, man_command,
    memory_command, report_command, ssh_command,
};

/// One command.
pub(crate) struct Command {
    /// Its word.
    pub(crate) name: &'static str,
    /// The name of its manual page.
    pub(crate) page: &'static str,
    /// Its arguments.
    pub(crate) describe: fn() -> clap::Command,
    /// Runs it; the arguments begin with its word.
    pub(crate) run: fn(Vec<OsString>) -> ExitCode,
}

/// The command lines of all commands, one type each, so that each has a help of its own.
macro_rules! commands {
    ($($(#[doc = $about:literal])+ $name:literal $type:ident($args:ty) $run:path;)+) => {
        $(
            $(#[doc = $about])+
            #[derive(Debug, Parser)]
            #[command(name = concat!("deepspeed ", $name), bin_name = concat!("deepspeed ", $name), version)]
            struct $type {
                #[command(flatten)]
                args: $args,
            }
        )+

        /// All of them, in the order of the help.
        pub(crate) const COMMANDS: &[Command] = &[
            $(Command {
                name: $name,
                page: concat!("deepspeed-", $name),
                describe: $type::command,
                run: |words| $run(&$type::parse_from(words).args),
            },)+
        ];
    };
}

commands! {
    /// Checks, explains and describes ds_config.json files, without torch.
    "config" Config(config_command::ConfigArgs) config_command::run;

    /// Plans the memory of a run: bytes by kind, per rank and per host, against what this host has free. Exits with 1 where it
    /// does not fit, and says what to change.
    "memory" Memory(memory_command::MemoryArgs) memory_command::run;

    /// Looks into checkpoints, checks them, compares, converts and exports them, without torch.
    "checkpoint" Checkpoint(checkpoint_command::CheckpointArgs) checkpoint_command::run;

    /// Says what is installed here, what a job would use and why, and what is missing. Imports nothing unless asked to.
    "report" Report(report_command::ReportArgs) report_command::run;

    /// Examines the hosts of a job before it starts: can they be reached, do they have the same versions and the same time, do
    /// they reach each other, is the port free, is the shared folder shared. Exits with 1 if a job would not start.
    "doctor" Doctor(deepspeed_launch::doctor::DoctorArgs) doctor_command::run;

    /// Runs a command on every host of a hostfile at once; each line of output comes behind the host's name. Exits with the
    /// greatest exit code of all hosts, 255 where one cannot be reached.
    "ssh" Ssh(ssh_command::SshArgs) ssh_command::run;

    /// Measures collectives between ranks.
    "bench" Bench(bench_command::BenchArgs) bench_command::run;

    /// Prints the completions of a shell: `source <(deepspeed completions bash)`.
    "completions" Completions(completions_command::CompletionsArgs) completions_command::run;

    /// Prints the manual page of the command or of one of its commands, or writes all of them into a folder.
    "man" Man(man_command::ManArgs) man_command::run;
}

/// The command of that word.
pub(crate) fn find(word: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == word)
}

/// The launch with all commands below it.
pub(crate) fn tree() -> clap::Command {
    let commands = COMMANDS.iter().map(|command| (command.describe)().name(command.name));
    LaunchArgs::command().subcommands(commands)
}
