//! `deepspeed checkpoint inspect`.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;
use deepspeed_checkpoint::{
    Location, Result,
    inspect::{CheckpointFacts, DirFacts, TagFacts, inspect, inspect_dir},
};
use deepspeed_monitor::memory::{Bytes, Count};
use serde_json::{Value, json};

use super::SourceArgs;
use crate::output::print;

/// The arguments of `deepspeed checkpoint inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &InspectArgs) -> Result<ExitCode> {
    let location = Location::find(&args.source.dir, args.source.tag.as_deref())?;
    let dir = location.tag.is_none().then(|| inspect_dir(&location.dir)).transpose()?;
    // Of a folder without `latest` the list is all there is to say, as long as there is one.
    let only_list = dir.as_ref().is_some_and(|dir| dir.latest.is_none() && !dir.tags.is_empty());
    let opened = if only_list { None } else { Some(location.open()) };
    // A damaged checkpoint is an error, which comes after the list of the others.
    let (facts, problem) = match opened {
        None => (None, None),
        Some(Ok(source)) => (Some(inspect(&*source)), None),
        Some(Err(error)) if dir.is_some() => (None, Some(error)),
        Some(Err(error)) => return Err(error),
    };
    let text = if args.json {
        let (facts, problem) = (json!(facts), json!(problem.as_ref().map(ToString::to_string)));
        format!("{:#}\n", json!({ "folder": dir, "checkpoint": facts, "problem": problem }))
    } else {
        let list = dir.as_ref().map(list).unwrap_or_default();
        let gap = if list.is_empty() || facts.is_none() { "" } else { "\n" };
        list + gap + &facts.as_ref().map(describe).unwrap_or_default()
    };
    let printed = print(&text);
    problem.map_or(Ok(printed), Err)
}

/// The checkpoints of a folder.
fn list(dir: &DirFacts) -> String {
    let mut text = format!("{}\n", dir.dir.display());
    let width = dir.tags.iter().map(|tag| tag.tag.chars().count()).max().unwrap_or(0);
    for tag in &dir.tags {
        let TagFacts { tag: name, latest, problem, format, world, stage, bytes, changed_at_ms } = tag;
        let state = match problem {
            None => {
                let stage = stage.map_or(String::new(), |stage| format!(", ZeRO stage {stage}"));
                let format = format.as_deref().unwrap_or("");
                let ranks = world.map_or(String::new(), |world| format!(", {world} rank(s)"));
                format!("complete: {format}{ranks}{stage}")
            }
            Some(problem) => format!("not usable: {problem}"),
        };
        let mark = if *latest { "  <- latest" } else { "" };
        let when = changed_at_ms.map_or(String::new(), utc);
        let _ = writeln!(text, "  {name:<width$}  {when}  {:>10}  {state}{mark}", Bytes(*bytes));
    }
    match &dir.latest {
        None if dir.tags.is_empty() => text += "  no checkpoints\n",
        None => text += "  no file `latest`: load_checkpoint needs a tag here\n",
        Some(_) => {}
    }
    text
}

/// What is in a checkpoint.
fn describe(facts: &CheckpointFacts) -> String {
    let mut text = format!("{}\n", facts.folder.display());
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<11} {value}");
    };
    line("format", &facts.format);
    line("written by", &format!("{} rank(s)", facts.world));
    if let Some(stage) = facts.stage {
        line("ZeRO stage", &stage.to_string());
    }
    line("parameters", &format!("{} in {} tensors", Count(facts.elements), facts.params.len()));
    line("files", &Bytes(facts.bytes).to_string());
    text += "  by kind\n";
    for (kind, amount) in &facts.kinds {
        let _ = writeln!(text, "    {kind:<18} {:>10}  {} tensors", Bytes(amount.bytes), amount.tensors);
    }
    text += "  state\n";
    write_state(&mut text, "", &facts.state);
    text += "  parameters\n";
    let shapes: Vec<String> = facts.params.iter().map(|param| shape(&param.shape)).collect();
    let width = facts.params.iter().map(|param| param.name.chars().count()).max().unwrap_or(0);
    let shape_width = shapes.iter().map(String::len).max().unwrap_or(0);
    for (param, shape) in facts.params.iter().zip(&shapes) {
        let kinds: Vec<String> = param.kinds.iter().map(|it| format!("{} {}", it.kind, it.dtype)).collect();
        let frozen = if param.group.is_none() { "frozen  " } else { "" };
        let kinds = if kinds.is_empty() { "nothing stored".to_owned() } else { kinds.join(", ") };
        let _ = writeln!(text, "    {:<width$}  {shape:<shape_width$}  {frozen}{kinds}", param.name);
    }
    if !facts.buffers.is_empty() {
        text += "  buffers\n";
        for buffer in &facts.buffers {
            let _ = writeln!(text, "    {}  {}  {}", buffer.name, shape(&buffer.shape), buffer.dtype);
        }
    }
    if !facts.tied.is_empty() {
        text += "  other names\n";
        for (other, name) in &facts.tied {
            let _ = writeln!(text, "    {other} is {name}");
        }
    }
    text
}

fn shape(shape: &[usize]) -> String {
    let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
    format!("[{}]", dims.join(", "))
}

/// Each field of the state on a line, with the path to it.
fn write_state(text: &mut String, path: &str, value: &Value) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                write_state(text, &below(key), value);
            }
        }
        value => {
            let _ = writeln!(text, "    {path} = {value}");
        }
    }
}

/// A moment as `2026-11-22 16:51:05 UTC`.
fn utc(ms: u64) -> String {
    let seconds = ms / 1000;
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in eras of 400 years: Howard Hinnant's `civil_from_days`.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let day_of_month = day_of_year - (153 * shifted + 2) / 5 + 1;
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day_of_month:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_in_words() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_795_366_265, "2026-11-22 16:51:05 UTC"),
        ] {
            assert_eq!(utc(seconds * 1000), expected);
        }
    }
}
