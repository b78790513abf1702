//! `deepspeed checkpoint convert`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use deepspeed_checkpoint::{OriginalOptions, Result, Source, convert, write_original};
use deepspeed_core::DType;

use super::{SourceArgs, progress::Bar};
use crate::output::print;

/// The arguments of `deepspeed checkpoint convert`.
#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The folder for the result: of checkpoints
    #[arg(value_name = "DST")]
    out: PathBuf,
    /// The format to write
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Format,
    /// deepspeed-0.19: the ZeRO stage of the engine that will load it; that of the source unless given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=3))]
    stage: Option<u8>,
    /// deepspeed-0.19: the number of ranks that will load it; those of the source unless given
    #[arg(long, alias = "world_size", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    world: Option<u32>,
    /// deepspeed-0.19: what the model computes in, if not as in the source
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<DType>,
    /// Replace what is there (ours)
    #[arg(long)]
    overwrite: bool,
}

/// The formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// This version's own (docs/checkpoint-format.md), which any world and stage reads
    Ours,
    /// The original's, for one stage and one number of ranks
    #[value(name = "deepspeed-0.19")]
    DeepSpeed019,
}

pub(super) fn run(args: &ConvertArgs) -> Result<ExitCode> {
    let source = args.source.open()?;
    let folder = {
        let bar = Bar::new();
        match args.to {
            Format::Ours => convert::to_ours(&*source, &args.out, source.tag(), args.overwrite, &bar)?,
            Format::DeepSpeed019 => {
                write_original(&*source, &args.out, source.tag(), original_options(args, &*source))?
            }
        }
    };
    Ok(print(&format!("{}\n", folder.display())))
}

fn original_options(args: &ConvertArgs, source: &dyn Source) -> OriginalOptions {
    OriginalOptions {
        // The layout has no optimizer shards at stage 0: stage 1 is next to it.
        stage: args.stage.or(source.stage()).unwrap_or(1).max(1),
        world: args.world.map_or(source.world(), |world| world as usize),
        dtype: args.dtype,
    }
}
