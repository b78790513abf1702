//! `deepspeed doctor`: the hosts of a job, examined before it starts.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use deepspeed_launch::doctor::{DoctorArgs, Level, examine};

use crate::output::{complain, print, usage};

/// Runs `deepspeed doctor`.
pub(crate) fn run(args: &DoctorArgs) -> ExitCode {
    let shown = io::stderr().is_terminal();
    let mut progress = |what: &str| {
        if shown {
            complain(&format!("deepspeed doctor: {what}\n"));
        }
    };
    let examination = match examine(args, &mut progress) {
        Ok(examination) => examination,
        Err(error) => return usage(&error.to_string()),
    };
    let findings = examination.findings();
    let printed = if args.json {
        let json = serde_json::json!({ "findings": findings, "examination": examination });
        print(&format!("{json:#}\n"))
    } else {
        print(&examination.render())
    };
    if findings.iter().any(|finding| finding.level == Level::Failure) { ExitCode::FAILURE } else { printed }
}
