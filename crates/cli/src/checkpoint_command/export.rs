//! `deepspeed checkpoint export`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use deepspeed_checkpoint::{
    Result,
    export::{ExportFormat, ExportOptions, MAX_SHARD_BYTES, export},
};
use deepspeed_core::DType;
use deepspeed_monitor::memory::{Bytes, parse_bytes};

use super::{SourceArgs, progress::Bar};
use crate::output::{complain, print};

/// Names listed in a warning.
const SHOWN: usize = 5;

/// The arguments of `deepspeed checkpoint export`.
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The folder for the model; what else is in it stays
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// The dtype of the weights: fp32 (the masters), bf16 or fp16
    #[arg(long, value_name = "DTYPE", default_value = "fp32")]
    dtype: DType,
    /// The format of the files
    #[arg(long, value_enum, default_value_t = Format::Safetensors)]
    format: Format,
    /// No file is larger, unless a single tensor is: 5GB, 500MiB
    #[arg(long, alias = "max_shard_size", value_name = "SIZE", value_parser = parse_bytes, default_value_t = MAX_SHARD_BYTES, hide_default_value = true)]
    max_shard_size: u64,
    /// Leave out parameters that were not trained
    #[arg(long, alias = "exclude_frozen_parameters")]
    exclude_frozen: bool,
    /// Replace the weights that are in OUT
    #[arg(long)]
    overwrite: bool,
}

/// The formats of files.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// model.safetensors
    Safetensors,
    /// pytorch_model.bin, as torch.save writes it
    Torch,
}

impl From<Format> for ExportFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Safetensors => Self::Safetensors,
            Format::Torch => Self::Torch,
        }
    }
}

pub(super) fn run(args: &ExportArgs) -> Result<ExitCode> {
    let source = args.source.open()?;
    let options = ExportOptions {
        format: args.format.into(),
        dtype: args.dtype,
        max_shard_bytes: args.max_shard_size,
        exclude_frozen: args.exclude_frozen,
        overwrite: args.overwrite,
    };
    let exported = {
        let bar = Bar::new();
        export(&*source, &args.out, options, &bar)?
    };
    if let [first, ..] = &exported.absent[..] {
        let more = exported.absent.len().saturating_sub(1).min(SHOWN);
        let names = exported.absent[1..=more]
            .iter()
            .fold(format!("`{first}`"), |text, name| text + &format!(", `{name}`"));
        complain(&format!(
            "warning: the checkpoint was saved without {} frozen parameter(s), and so is the model: {names}{}\n",
            exported.absent.len(),
            if exported.absent.len() > 1 + SHOWN { ", ..." } else { "" }
        ));
    }
    let files: Vec<String> = exported.files.iter().map(|file| format!("{}\n", file.display())).collect();
    let total = format!("{} tensors, {} in {}\n", exported.tensors, Bytes(exported.bytes), args.dtype);
    Ok(print(&(files.concat() + &total)))
}
