//! `deepspeed memory`: what a config needs for a model of a given size, against what this host has. Needs no Python, no
//! device and no model.

use std::process::ExitCode;

use clap::Args;
use deepspeed_config::{Config, ConfigError, Diagnostic, Options, Resolved};
use deepspeed_monitor::memory::{
    Elements, Facts, Free, Limit, ParamCounts, Report, parse_bytes, parse_count,
};

use crate::output::{complain, fail, print};

/// The arguments of `deepspeed memory`.
#[derive(Debug, Args)]
pub(crate) struct MemoryArgs {
    /// The config: a file, or base64 of JSON
    config: String,
    /// Parameters that are trained: 7e9, 7b, 350M
    #[arg(long, value_name = "N", value_parser = parse_count)]
    params: u64,
    /// Parameters that are not trained, besides
    #[arg(long, value_name = "N", value_parser = parse_count, default_value = "0")]
    frozen: u64,
    /// Data-parallel ranks
    #[arg(long, alias = "world_size", value_name = "N", value_parser = clap::value_parser!(u64).range(1..), default_value_t = 1)]
    world: u64,
    /// Ranks on one host; all of them unless given
    #[arg(long, alias = "ranks_per_host", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    ranks_per_host: Option<u64>,
    /// Parameters of the largest unit: the largest single parameter, or block of them that is gathered as one
    #[arg(long, alias = "largest_unit", value_name = "N", value_parser = parse_count)]
    largest_unit: Option<u64>,
    /// fp32 tensors of optimizer state per parameter, where the config names no optimizer of ours (Adam has 2)
    #[arg(long, alias = "state_tensors", value_name = "N", value_parser = clap::value_parser!(u64).range(0..=16))]
    state_tensors: Option<u64>,
    /// Host memory for the ranks of one host, in place of what this host has free: 64GiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    available: Option<u64>,
    /// The ranks compute on accelerators with this much memory each: 80GiB
    #[arg(long, alias = "device_memory", value_name = "BYTES", value_parser = parse_bytes)]
    device_memory: Option<u64>,
    /// Allow "auto" where the Hugging Face Trainer or accelerate fills it in
    #[arg(long)]
    allow_auto: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs `deepspeed memory`.
pub(crate) fn run(args: &MemoryArgs) -> ExitCode {
    let strict = std::env::var("DS_CONFIG_STRICT").ok();
    let options = Options { allow_auto: args.allow_auto, ..Options::from_strict_variable(strict.as_deref()) };
    match planned(args, &options) {
        Ok(planned) => {
            for warning in &planned.warnings {
                complain(&format!("warning: {warning}\n"));
            }
            let printed = print(&planned.text);
            if planned.fits { printed } else { ExitCode::FAILURE }
        }
        Err(error) => fail(&error.to_string()),
    }
}

struct Planned {
    text: String,
    fits: bool,
    warnings: Vec<Diagnostic>,
}

fn planned(args: &MemoryArgs, options: &Options) -> Result<Planned, ConfigError> {
    let Resolved { config, warnings, .. } = Config::load(&args.config, options)?;
    let accumulation =
        match config.resolve_batch(usize::try_from(args.world).unwrap_or(usize::MAX), "--world") {
            Ok(batch) => batch.accumulation as u64,
            // A template: whoever fills it in says how many micro-batches there are.
            Err(_) if args.allow_auto => 1,
            Err(error) => return Err(error),
        };
    let dtype = config.precision.dtype();
    let total = args.params.saturating_add(args.frozen);
    let largest_unit = args.largest_unit.unwrap_or_else(|| Facts::assumed_largest_unit(total));
    let params = ParamCounts {
        trainable: Elements::of(dtype, args.params),
        frozen: Elements::of(dtype, args.frozen),
        largest_unit,
    };
    let ranks_per_host = args.ranks_per_host.unwrap_or(args.world).min(args.world);
    let mut facts = Facts::from_config(&config, params, args.world, ranks_per_host, accumulation);
    facts.accelerator = args.device_memory.is_some();
    let known_state = Facts::state_tensors_of(&config);
    facts.state_tensors = args.state_tensors.or(known_state).unwrap_or(facts.state_tensors);

    let zero = &config.zero;
    let folder = zero.offload_optimizer.nvme_path.as_deref().or(zero.offload_param.nvme_path.as_deref());
    let mut free = Free::of_this_host(folder);
    if let Some(bytes) = args.available {
        free.host = Some(Limit::given(bytes, "--available"));
    }
    free.device = args.device_memory.map(|bytes| Limit::given(bytes, "--device-memory"));

    let report = Report::new(&facts, &free);
    let fits = report.refusal().is_none();
    let text = if args.json {
        format!("{:#}\n", serde_json::json!(report))
    } else {
        let mut text = format!("{}, {dtype}: {report}\n", config.document().origin());
        if args.largest_unit.is_none() {
            text += "assumed: units as in a transformer of 32 layers; --largest-unit says better\n";
        }
        if args.state_tensors.is_none() && known_state.is_none() {
            text += "assumed: the state of Adam; the config names no optimizer of ours, --state-tensors says better\n";
        }
        text
    };
    Ok(Planned { text, fits, warnings })
}
