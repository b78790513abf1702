//! `deepspeed config`: check a config, explain it, or describe what a config can hold. Needs no Python and no device.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use deepspeed_config::{
    Config, ConfigError, Diagnostic, Document, Options, Precision, Resolved, explain, json_schema, load,
    reference,
};

use crate::output::{complain, fail, print};

/// The arguments of `deepspeed config`.
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check a config and print what it means for a run; exit with 1 if anything is wrong with it
    Check {
        /// The config: a file, or base64 of JSON
        file: String,
        /// The number of data-parallel ranks, to resolve the batch numbers
        #[arg(long, alias = "world_size", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        world_size: Option<u32>,
        /// Allow "auto" where the Hugging Face Trainer or accelerate fills it in
        #[arg(long)]
        allow_auto: bool,
    },
    /// Say what each setting of a config means, or one setting
    Explain {
        /// The config: a file, or base64 of JSON
        file: String,
        /// A setting, as zero_optimization.stage
        key: Option<String>,
    },
    /// Print a JSON Schema of configs, for editors
    Schema,
    /// Print the reference of all settings as Markdown
    Reference,
}

/// Runs `deepspeed config`.
pub(crate) fn run(args: &ConfigArgs) -> ExitCode {
    match &args.command {
        ConfigCommand::Check { file, world_size, allow_auto } => check(file, *world_size, *allow_auto),
        ConfigCommand::Explain { file, key } => match load(file) {
            Ok(document) => explain_document(&document, key.as_deref()),
            Err(error) => fail(&error.to_string()),
        },
        ConfigCommand::Schema => print(&format!("{:#}\n", json_schema())),
        ConfigCommand::Reference => print(&reference::markdown()),
    }
}

fn check(file: &str, world_size: Option<u32>, allow_auto: bool) -> ExitCode {
    let strict = std::env::var("DS_CONFIG_STRICT").ok();
    let options = Options { allow_auto, ..Options::from_strict_variable(strict.as_deref()) };
    match checked(file, world_size, &options) {
        Ok((report, warnings)) => {
            for warning in &warnings {
                complain(&format!("warning: {warning}\n"));
            }
            print(&report)
        }
        Err(error) => fail(&error.to_string()),
    }
}

/// The report on a valid config, and the warnings.
fn checked(
    file: &str,
    world_size: Option<u32>,
    options: &Options,
) -> Result<(String, Vec<Diagnostic>), ConfigError> {
    let Resolved { config, warnings, .. } = Config::load(file, options)?;
    let batch = match world_size {
        Some(world) => config.resolve_batch(world as usize, "--world-size")?.explanation,
        None if config.batch.is_decidable() && config.batch.fits_some_world() => {
            "depends on the world size; give --world-size N".to_owned()
        }
        None if options.allow_auto => "filled in by the Hugging Face Trainer or accelerate".to_owned(),
        // Wrong whatever the world size is: a world of one shows how.
        None => config.resolve_batch(1, "no world size fits; the sum is for 1 rank")?.explanation,
    };
    let precision = match config.precision {
        Precision::Fp32 => "fp32".to_owned(),
        Precision::Bf16 => "bf16".to_owned(),
        Precision::Fp16 if config.fp16.dynamic() => {
            format!("fp16, dynamic loss scale from 2^{}", config.fp16.initial_scale_power)
        }
        Precision::Fp16 => format!("fp16, loss scale {}", config.fp16.loss_scale),
    };
    let mut lines = vec![
        format!("{} is valid", config.document().origin()),
        format!("  batch       {batch}"),
        format!("  precision   {precision}"),
        format!("  ZeRO stage  {}", config.zero.stage),
        format!("  optimizer   {}", config.optimizer.as_ref().map_or("the program's own", |o| &o.kind)),
        format!("  schedule    {}", config.scheduler.as_ref().map_or("none in the config", |s| &s.kind)),
        match config.gradient_clipping {
            0.0 => "  clipping    off".to_owned(),
            norm => format!("  clipping    gradient norm {norm}"),
        },
    ];
    if !config.differences_from_default().is_empty() {
        lines.push("  set apart from the defaults:".to_owned());
        lines.extend(config.differences_from_default().iter().map(|difference| format!("    {difference}")));
    }
    Ok((lines.join("\n") + "\n", warnings))
}

fn explain_document(document: &Document, key: Option<&str>) -> ExitCode {
    match key {
        None => print(&explain::explain(document)),
        Some(key) => match explain::explain_key(document, key) {
            Ok(text) => print(&text),
            Err(message) => fail(&message),
        },
    }
}
