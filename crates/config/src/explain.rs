//! What a setting means, in words: for `deepspeed config explain`.

use std::fmt::Write as _;

use crate::{
    check::join,
    diagnostic::nearest,
    document::Document,
    json::{Node, Value},
    table::{self, AutoRule, Setting, Status},
};

/// The effect of a setting in words.
pub(crate) fn effect(setting: &Setting) -> String {
    match setting.status {
        Status::Built => "built".to_owned(),
        Status::NotBuilt { feature, .. } => format!("not built yet: {feature}"),
        Status::Removed { instead, .. } => format!("removed, rejected: {instead}"),
        Status::NoEffect { why } => format!("accepted without effect: {why}"),
    }
}

/// The setting at a path, parameters of the document's own optimizer and schedule included.
fn lookup(document: &Document, path: &str) -> Option<&'static Setting> {
    let (parent, key) = path.rsplit_once('.').unwrap_or(("", path));
    let entries = match parent {
        "optimizer.params" => table::OPTIMIZERS,
        "scheduler.params" => table::SCHEDULERS,
        _ => {
            let canonical = canonical(parent);
            return table::children(&canonical).find(|setting| setting.is_named(key));
        }
    };
    let block = parent.split('.').next().unwrap_or_default();
    let named = document
        .member(&join(block, "type"))
        .and_then(|member| table::find_named(entries, member.value.as_text().unwrap_or_default()));
    match named {
        Some(entry) => entry.param(key),
        None => entries.iter().find_map(|entry| entry.param(key)),
    }
}

/// The path with aliases of blocks replaced by their names.
fn canonical(path: &str) -> String {
    path.split('.').filter(|key| !key.is_empty()).fold(String::new(), |parent, key| {
        let name = table::children(&parent)
            .find(|setting| setting.aliases.contains(&key))
            .map_or(key, |setting| setting.key());
        join(&parent, name)
    })
}

/// Every key that a document sets, with its meaning, default and effect.
pub fn explain(document: &Document) -> String {
    let mut out = String::new();
    explain_block(document, document.root(), "", &mut out);
    if out.is_empty() {
        out.push_str("the config sets nothing\n");
    }
    out
}

fn explain_block(document: &Document, node: &Node, parent: &str, out: &mut String) {
    for member in node.as_object().unwrap_or_default() {
        let path = join(parent, &member.key);
        let setting = lookup(document, &path);
        let block = matches!(&member.value.value, Value::Object(members) if !members.is_empty());
        let place = document.line_words(member);
        if block {
            let _ = writeln!(out, "{path} ({place})");
        } else {
            let shown = &document.text()[member.value.span.clone()];
            let _ = writeln!(out, "{path} = {shown} ({place})");
        }
        match setting {
            Some(setting) => {
                let _ = writeln!(out, "    {}", setting.meaning);
                let mut facts = Vec::new();
                if !block && setting.default != "null" {
                    facts.push(format!("default {}", setting.default));
                }
                if setting.status != Status::Built {
                    facts.push(effect(setting));
                }
                if member.value.as_text() == Some("auto") {
                    facts.push(auto_words(setting));
                }
                if !facts.is_empty() {
                    let _ = writeln!(out, "    {}", facts.join("; "));
                }
            }
            None => out.push_str("    no setting of ours has this name\n"),
        }
        if block && !path.ends_with("leaf_module") {
            let open = setting.is_some_and(|setting| setting.kind == table::Kind::Open);
            if !open || path.ends_with(".params") {
                explain_block(document, &member.value, &path, out);
            }
        }
    }
}

fn auto_words(setting: &Setting) -> String {
    match setting.auto {
        AutoRule::NotAllowed => "\"auto\" is not understood here".to_owned(),
        AutoRule::Default => format!("\"auto\" means {}", setting.default),
        AutoRule::FilledBy(who) => format!("\"auto\" is filled in by {who}"),
    }
}

/// Everything about one setting, whether the document sets it or not. A last key alone will do where it is unambiguous.
///
/// # Errors
/// No setting has this name, or several do: the message says which are meant.
pub fn explain_key(document: &Document, key: &str) -> Result<String, String> {
    let (path, setting) = match lookup(document, key) {
        Some(setting) => (key.to_owned(), setting),
        None => {
            let same: Vec<&Setting> = table::settings().filter(|setting| setting.is_named(key)).collect();
            match same[..] {
                [one] => (one.path.to_owned(), one),
                [] => {
                    let names = table::settings().flat_map(|setting| [setting.path, setting.key()]);
                    let hint =
                        nearest(key, names).map_or(String::new(), |name| format!("; did you mean `{name}`?"));
                    return Err(format!("no setting is named `{key}`{hint}"));
                }
                _ => {
                    let paths: Vec<&str> = same.iter().map(|setting| setting.path).collect();
                    return Err(format!("`{key}` is several settings: {}", paths.join(", ")));
                }
            }
        }
    };
    let mut out = format!("{path}\n    {}\n", setting.meaning);
    let _ = writeln!(out, "    takes    {}", setting.kind.allowed());
    if setting.default != "null" {
        let _ = writeln!(out, "    default  {}", setting.default);
    }
    if setting.auto != AutoRule::NotAllowed {
        let _ = writeln!(out, "    auto     {}", auto_words(setting));
    }
    if !setting.aliases.is_empty() {
        let _ = writeln!(out, "    aliases  {}", setting.aliases.join(", "));
    }
    let _ = writeln!(out, "    effect   {}", effect(setting));
    match document.member(&path) {
        Some(member) => {
            let shown = &document.text()[member.value.span.clone()];
            let _ = writeln!(
                out,
                "    set to   {shown} ({}, {})",
                document.origin(),
                document.line_words(member)
            );
        }
        None => {
            let _ = writeln!(out, "    not set in {}", document.origin());
        }
    }
    Ok(out)
}
