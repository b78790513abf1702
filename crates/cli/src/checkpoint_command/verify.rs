//! `deepspeed checkpoint verify`.

use std::{process::ExitCode, thread};

use clap::Args;
use deepspeed_checkpoint::{CheckpointError, Result, inspect::inspect, verify};
use deepspeed_monitor::memory::Bytes;
use serde_json::json;

use super::{SourceArgs, progress::Bar};
use crate::output::{complain, print};

/// The arguments of `deepspeed checkpoint verify`.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Threads that read; one for each core unless given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let source = args.source.open()?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.map_or(cores, |threads| threads as usize);
    let problems = {
        let bar = Bar::new();
        verify(&*source, threads, &bar)
    };
    let bytes = inspect(&*source).bytes;
    let words: Vec<String> = problems.iter().map(describe).collect();
    let ok = words.is_empty();
    let printed = if args.json {
        let report = json!({ "folder": source.folder(), "bytes": bytes, "ok": ok, "problems": words });
        print(&format!("{report:#}\n"))
    } else if ok {
        print(&format!("{}: all {} are as they were written\n", source.folder().display(), Bytes(bytes)))
    } else {
        for problem in &words {
            complain(&format!("{problem}\n"));
        }
        complain(&format!(
            "error: {} is damaged in {} place(s); resume from another checkpoint (`deepspeed checkpoint inspect` lists \
             them) or restore the files\n",
            source.folder().display(),
            words.len()
        ));
        ExitCode::SUCCESS
    };
    Ok(if ok { printed } else { ExitCode::FAILURE })
}

/// File and place; what else there is to resume from is said once, at the end.
fn describe(problem: &CheckpointError) -> String {
    match problem {
        CheckpointError::Damaged { file, problem, .. } => format!("{file}: {problem}"),
        other => other.to_string(),
    }
}
