//! `deepspeed report`: what is installed here, what a job would use and why, and what is missing.

mod missing;
mod ops;
mod text;
mod torch;

use std::process::ExitCode;

use clap::Args;
use deepspeed_launch::facts::HostFacts;

use crate::output::print;

/// The arguments of `deepspeed report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Import torch, and say what it finds (seconds)
    #[arg(long)]
    torch: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Leave out the table of operations
    #[arg(long = "hide_operator_status", alias = "hide-operator-status")]
    hide_operator_status: bool,
    /// Leave out what is missing
    #[arg(long = "hide_errors_and_warnings", alias = "hide-errors-and-warnings")]
    hide_errors_and_warnings: bool,
}

/// Runs `deepspeed report`.
pub(crate) fn run(args: &ReportArgs) -> ExitCode {
    let facts = HostFacts::read();
    let imported = args.torch.then(|| torch::import(&facts));
    let missing = missing::missing(&facts);
    if args.json {
        let json = serde_json::json!({
            "facts": facts,
            "used": text::used(&facts).into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "missing": missing,
            "operations": ops::table(&facts),
            "torch": imported.as_ref().map(|imported| match imported {
                Ok(value) => value.clone(),
                Err(error) => serde_json::json!({ "error": error }),
            }),
        });
        return print(&format!("{json:#}\n"));
    }
    let mut report = text::facts(&facts);
    if let Some(imported) = &imported {
        report += &torch::text(imported);
    }
    if !args.hide_errors_and_warnings {
        report += &text::missing(&missing);
    }
    if !args.hide_operator_status {
        report += &text::operations(&facts);
    }
    report += &text::general(&facts);
    print(&report)
}
