//! `deepspeed checkpoint diff`.

use std::{fmt::Write as _, path::PathBuf, process::ExitCode};

use clap::Args;
use deepspeed_checkpoint::{
    Location, Result,
    diff::{Differences, diff},
};
use serde_json::json;

use super::progress::Bar;
use crate::output::{complain, print};

/// What diff(1) exits with when it cannot compare.
const TROUBLE: u8 = 2;

/// The arguments of `deepspeed checkpoint diff`.
#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// A checkpoint: DIR/TAG, or DIR for its latest
    a: PathBuf,
    /// Another one
    b: PathBuf,
    /// The tag in A
    #[arg(long, value_name = "TAG")]
    tag_a: Option<String>,
    /// The tag in B
    #[arg(long, value_name = "TAG")]
    tag_b: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &DiffArgs) -> ExitCode {
    match compared(args) {
        Ok((text, same)) => {
            let printed = print(&text);
            if same { printed } else { ExitCode::from(1) }
        }
        Err(error) => {
            complain(&format!("error: {error}\n"));
            ExitCode::from(TROUBLE)
        }
    }
}

fn compared(args: &DiffArgs) -> Result<(String, bool)> {
    let a = Location::find(&args.a, args.tag_a.as_deref())?.open()?;
    let b = Location::find(&args.b, args.tag_b.as_deref())?.open()?;
    let found = {
        let bar = Bar::new();
        diff(&*a, &*b, &bar)?
    };
    let same = found.is_empty();
    let text = if args.json {
        format!("{:#}\n", json!({ "a": a.folder(), "b": b.folder(), "same": same, "differences": found }))
    } else {
        let head = format!("a {}\nb {}\n", a.folder().display(), b.folder().display());
        head + &describe(&found)
    };
    Ok((text, same))
}

fn describe(found: &Differences) -> String {
    let mut text = String::new();
    for what in &found.only_in_a {
        let _ = writeln!(text, "only in a: {what}");
    }
    for what in &found.only_in_b {
        let _ = writeln!(text, "only in b: {what}");
    }
    for fact in &found.facts {
        let _ = writeln!(text, "{}: {} in a, {} in b", fact.what, fact.a, fact.b);
    }
    for state in &found.state {
        let _ = writeln!(text, "state {}: {} in a, {} in b", state.path, state.a, state.b);
    }
    let width = found.values.iter().map(|it| it.name.chars().count()).max().unwrap_or(0);
    for values in &found.values {
        let _ = write!(
            text,
            "{:<width$}  {:<12}  {} of {} differ, from element {}: at most {:.3e}, relative {:.3e}",
            values.name,
            values.kind,
            values.differing,
            values.elements,
            values.first.unwrap_or(0),
            values.max_abs,
            values.max_rel
        );
        if values.not_finite > 0 {
            let _ = write!(text, "; {} with NaN or infinity", values.not_finite);
        }
        text.push('\n');
    }
    let _ =
        writeln!(text, "{} tensors are identical bit by bit, {} differ", found.identical, found.values.len());
    text
}
