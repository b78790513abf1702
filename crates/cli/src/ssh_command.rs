//! `deepspeed ssh`: a command on every host.

use std::{ffi::OsString, process::ExitCode};

use clap::Args;
use deepspeed_launch::{HostArgs, on_every_host};

use crate::output::usage;

/// The arguments of `deepspeed ssh`.
#[derive(Debug, Args)]
#[command(
    after_help = "One word is a command line for each host's shell; several words are a command and its arguments, \
                        and arrive as they are:\n\n  \
                        deepspeed ssh -f hosts 'nvidia-smi -L | wc -l'\n  \
                        deepspeed ssh -f hosts touch 'a file'"
)]
pub(crate) struct SshArgs {
    #[command(flatten)]
    hosts: HostArgs,
    /// The command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs `deepspeed ssh`.
pub(crate) fn run(args: &SshArgs) -> ExitCode {
    if !args.hosts.hostfile.exists() {
        let path = args.hosts.hostfile.display();
        return usage(&format!("hostfile {path} does not exist; name one with -f FILE"));
    }
    match on_every_host(&args.hosts, &args.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => usage(&error.to_string()),
    }
}
