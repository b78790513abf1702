//! `deepspeed checkpoint convert`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use deepspeed_checkpoint::{
    OriginalOptions, Result, Source, WholeState, convert, write_original, write_universal,
};
use deepspeed_core::DType;

use super::{SourceArgs, progress::Bar};
use crate::output::print;

/// The arguments of `deepspeed checkpoint convert`.
#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The folder for the result: of checkpoints; universal: of this checkpoint
    #[arg(value_name = "DST")]
    out: PathBuf,
    /// The format to write
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Format,
    /// deepspeed-0.19, universal: the ZeRO stage of the engine that will load it; that of the source unless given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=3))]
    stage: Option<u8>,
    /// deepspeed-0.19, universal: the number of ranks that will load it; those of the source unless given
    #[arg(long, alias = "world_size", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    world: Option<u32>,
    /// deepspeed-0.19, universal: what the model computes in, if not as in the source
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<DType>,
    /// deepspeed-0.19 with stage 0 in 16 bits, and Adagrad: the engine that will load it has an optimizer of torch's (`torch_adam`, or one
    /// that the script builds), or one of the original's own; told by the source's parameter groups unless given
    #[arg(long, value_enum, value_name = "WHOSE")]
    optimizer: Option<Optimizer>,
    /// Replace what is there (ours, universal)
    #[arg(long)]
    overwrite: bool,
}

/// Whose optimizer will load it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Optimizer {
    /// torch's
    Torch,
    /// The original's, such as its Adam without `torch_adam`
    Deepspeed,
}

/// The formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// This version's own (docs/checkpoint-format.md), which any world and stage reads
    Ours,
    /// The original's, for one stage and one number of ranks
    #[value(name = "deepspeed-0.19")]
    DeepSpeed019,
    /// The original's universal format, which it loads at any number of ranks
    Universal,
}

pub(super) fn run(args: &ConvertArgs) -> Result<ExitCode> {
    let source = args.source.open()?;
    let folder = {
        let bar = Bar::new();
        match args.to {
            Format::Ours => convert::to_ours(&*source, &args.out, source.tag(), args.overwrite, &bar)?,
            Format::Universal => {
                // It has no stage 0; what stage 1 writes, stage 2 loads as well.
                let mut options = original_options(args, &*source);
                options.stage = options.stage.max(1);
                write_universal(&*source, &args.out, options, args.overwrite, &bar)?;
                args.out.clone()
            }
            Format::DeepSpeed019 => {
                let options = original_options(args, &*source);
                write_original(&*source, &args.out, source.tag(), options, &bar)?
            }
        }
    };
    Ok(print(&format!("{}\n", folder.display())))
}

fn original_options(args: &ConvertArgs, source: &dyn Source) -> OriginalOptions {
    let own = OriginalOptions::of(source);
    OriginalOptions {
        stage: args.stage.unwrap_or(own.stage),
        world: args.world.map_or(own.world, |world| world as usize),
        dtype: args.dtype,
        state: args.optimizer.map(|optimizer| match optimizer {
            Optimizer::Torch => WholeState::PerParameter,
            Optimizer::Deepspeed => WholeState::Flat,
        }),
    }
}
