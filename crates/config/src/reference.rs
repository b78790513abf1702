//! The table as a page of Markdown: docs/config-reference.md.

use std::fmt::Write as _;

use crate::{
    explain::effect,
    table::{self, AutoRule, Kind, Named, Setting, Status},
};

/// The command that writes the page.
pub const REGENERATE: &str = "cargo run -p deepspeed-cli -- config reference > docs/config-reference.md";

/// The whole page.
pub fn markdown() -> String {
    let mut out = format!(
        "# ds_config.json: every setting\n\n\
         Generated from the types in `crates/config` by `{REGENERATE}`; do not edit.\n\n\
         `deepspeed config check FILE` checks a file, `deepspeed config explain FILE [KEY]` explains it, and \
         `deepspeed config schema` prints a JSON Schema for editors. The file is JSON; `//`, `#` and `/* */` comments and a \
         comma before a closing bracket are allowed, whole numbers may be written `5e8`, and `null` means \"not set\". \
         `\"auto\"` means the default, unless the column says who fills it in.\n\n\
         An unknown setting is an error; `DS_CONFIG_STRICT=0` in the environment makes it a warning. \
         A setting of a feature that is not built yet is an error only where it asks for the feature.\n"
    );
    out.push_str("\n## At the top\n");
    settings_table(&mut out, table::children("").filter(|setting| !is_block(setting)));
    for block in table::settings().filter(|setting| is_block(setting)) {
        let _ = write!(out, "\n## `{}`\n\n{}", block.path, block.meaning);
        if !block.aliases.is_empty() {
            let _ = write!(out, " Also named `{}`.", block.aliases.join("`, `"));
        }
        out.push('\n');
        settings_table(&mut out, table::children(block.path).filter(|setting| !is_block(setting)));
        match block.path {
            "optimizer" => named(&mut out, "optimizer.params", table::OPTIMIZERS),
            "scheduler" => named(&mut out, "scheduler.params", table::SCHEDULERS),
            _ => {}
        }
    }
    out
}

fn is_block(setting: &Setting) -> bool {
    matches!(setting.kind, Kind::Block | Kind::BoolOrBlock)
}

fn named(out: &mut String, path: &str, entries: &'static [Named]) {
    for entry in entries {
        let _ = write!(out, "\n### `{path}` of {}\n\n{}\n", entry.name, entry.meaning);
        settings_table(out, entry.params.iter());
    }
}

fn settings_table<'a>(out: &mut String, settings: impl Iterator<Item = &'a Setting>) {
    out.push_str("\n| setting | takes | default | effect | meaning |\n|---|---|---|---|---|\n");
    for setting in settings {
        let mut name = format!("`{}`", setting.key());
        if !setting.aliases.is_empty() {
            let _ = write!(name, " (also `{}`)", setting.aliases.join("`, `"));
        }
        let default = match (setting.status, setting.default) {
            (Status::Removed { .. }, _) | (_, "null") => String::new(),
            (_, default) => format!("`{default}`"),
        };
        let takes = match setting.status {
            Status::Removed { .. } => String::new(),
            _ => setting.kind.allowed(),
        };
        let mut meaning = setting.meaning.to_owned();
        if let AutoRule::FilledBy(who) = setting.auto {
            let _ = write!(meaning, " `\"auto\"` is filled in by {who}.");
        }
        let _ = writeln!(out, "| {name} | {takes} | {default} | {} | {meaning} |", effect(setting));
    }
}
