//! `deepspeed checkpoint convert`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use deepspeed_checkpoint::{Result, convert};

use super::{SourceArgs, progress::Bar};
use crate::output::print;

/// The arguments of `deepspeed checkpoint convert`.
#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The folder for the result
    #[arg(value_name = "DST")]
    out: PathBuf,
    /// The format to write
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Format,
    /// Replace what is there
    #[arg(long)]
    overwrite: bool,
}

/// The formats that can be written.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// This version's own (docs/checkpoint-format.md), which any world and stage reads
    Ours,
}

pub(super) fn run(args: &ConvertArgs) -> Result<ExitCode> {
    let source = args.source.open()?;
    let folder = {
        let bar = Bar::new();
        match args.to {
            Format::Ours => convert::to_ours(&*source, &args.out, source.tag(), args.overwrite, &bar)?,
        }
    };
    Ok(print(&format!("{}\n", folder.display())))
}
