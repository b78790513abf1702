//! `deepspeed checkpoint`: look into checkpoints, check them, compare, convert and export them. Needs no Python and no torch.

mod convert;
mod diff;
mod export;
mod inspect;
mod progress;
mod verify;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use deepspeed_checkpoint::{Location, Result, Source};

use crate::output::fail;

/// The arguments of `deepspeed checkpoint`.
#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    #[command(subcommand)]
    command: CheckpointCommand,
}

#[derive(Debug, Subcommand)]
enum CheckpointCommand {
    /// Say which checkpoints are in a folder, and what is in one of them
    Inspect(inspect::InspectArgs),
    /// Check every byte against its checksum; exit with 1 and say where if anything is wrong
    Verify(verify::VerifyArgs),
    /// Compare two checkpoints of any format, world and stage; exit with 0 if they are the same, 1 if not, 2 on trouble
    ///
    /// Random states and the client's state are not compared.
    Diff(diff::DiffArgs),
    /// Write a checkpoint of any format in another one
    Convert(convert::ConvertArgs),
    /// Write the model into files that the Hugging Face libraries read
    Export(export::ExportArgs),
}

/// Which checkpoint.
#[derive(Debug, Args)]
struct SourceArgs {
    /// The folder given to save_checkpoint, or that of one checkpoint in it
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The checkpoint; without it the one that `latest` names
    #[arg(long, short, value_name = "TAG")]
    tag: Option<String>,
}

impl SourceArgs {
    fn open(&self) -> Result<Box<dyn Source>> {
        Location::find(&self.dir, self.tag.as_deref())?.open()
    }
}

/// Runs `deepspeed checkpoint`.
pub(crate) fn run(args: &CheckpointArgs) -> ExitCode {
    let done = match &args.command {
        CheckpointCommand::Inspect(args) => inspect::run(args),
        CheckpointCommand::Verify(args) => verify::run(args),
        CheckpointCommand::Diff(args) => return diff::run(args),
        CheckpointCommand::Convert(args) => convert::run(args),
        CheckpointCommand::Export(args) => export::run(args),
    };
    done.unwrap_or_else(|error| fail(&error.to_string()))
}
