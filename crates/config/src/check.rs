//! The walk of a document against the table: every key and value judged, every problem collected.

use std::collections::HashMap;

use crate::{
    Options,
    config::Difference,
    diagnostic::{Code, Diagnostic, nearest},
    document::Document,
    json::{self, Member, Node, Value},
    judge::{Misfit, judge},
    table::{self, Asks, AutoRule, Kind, Setting, Status},
};

/// What every optimizer of torch refuses: a rate or an epsilon below 0, betas outside 0 to 1.
const FOREIGN_RANGES: &[(&str, Kind)] = &[
    ("lr", Kind::NON_NEGATIVE),
    ("weight_decay", Kind::NON_NEGATIVE),
    ("momentum", Kind::NON_NEGATIVE),
    ("eps", Kind::NON_NEGATIVE),
    ("betas", Kind::Fractions(2)),
];

/// What a walk found. Values that failed a check are absent, so that readers fall back on defaults.
pub(crate) struct Checked<'d> {
    pub(crate) document: &'d Document,
    pub(crate) options: Options,
    values: HashMap<&'static str, &'d Member>,
    pub(crate) errors: Vec<Diagnostic>,
    pub(crate) warnings: Vec<Diagnostic>,
    /// Each with the place of its value.
    pub(crate) differences: Vec<(usize, Difference)>,
}

/// Walks a document.
pub(crate) fn check(document: &Document, options: Options) -> Checked<'_> {
    let mut checked = Checked {
        document,
        options,
        values: HashMap::new(),
        errors: Vec::new(),
        warnings: Vec::new(),
        differences: Vec::new(),
    };
    checked.duplicates(document.root(), "");
    checked.block(document.root(), "");
    checked
}

/// A path with one more key.
pub(crate) fn join(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}

impl<'d> Checked<'d> {
    fn duplicates(&mut self, node: &'d Node, path: &str) {
        match &node.value {
            Value::Object(members) => {
                let mut first: HashMap<&str, &Member> = HashMap::new();
                for member in members {
                    let path = join(path, &member.key);
                    if let Some(earlier) = first.get(member.key.as_str()) {
                        let mut diagnostic = self.document.diagnostic(
                            Code::DuplicateKey,
                            &path,
                            &member.key_span,
                            format!("`{path}` is set twice"),
                            "set again here",
                        );
                        let label = self.document.label(&earlier.key_span, "first set here");
                        diagnostic.labels.push(label);
                        self.errors.push(diagnostic.hint("keep one of them"));
                    } else {
                        first.insert(&member.key, member);
                    }
                    self.duplicates(&member.value, &path);
                }
            }
            Value::List(items) => {
                for item in items {
                    self.duplicates(item, path);
                }
            }
            _ => {}
        }
    }

    fn block(&mut self, node: &'d Node, parent: &'static str) {
        for member in node.as_object().unwrap_or_default() {
            let found = table::children(parent).find(|setting| setting.is_named(&member.key));
            let Some(setting) = found else {
                self.unknown(member, parent, table::children(parent));
                continue;
            };
            if let Some(earlier) = self.values.get(setting.path).copied()
                && earlier.key != member.key
            {
                self.two_names(earlier, member, setting.path);
                continue;
            }
            if self.value(setting, member, setting.path) {
                self.values.insert(setting.path, member);
                if matches!(setting.kind, Kind::Block | Kind::BoolOrBlock) {
                    self.block(&member.value, setting.path);
                }
            }
        }
    }

    /// Judges the parameters of an optimizer or schedule of ours.
    pub(crate) fn params(&mut self, entry: &'static table::Named, node: &'d Node, parent: &str) {
        let mut seen: HashMap<&str, &Member> = HashMap::new();
        for member in node.as_object().unwrap_or_default() {
            let Some(setting) = entry.param(&member.key) else {
                self.unknown(member, parent, entry.params.iter());
                continue;
            };
            let path = join(parent, setting.path);
            match seen.insert(setting.path, member) {
                Some(earlier) if earlier.key != member.key => self.two_names(earlier, member, &path),
                _ => {
                    self.value(setting, member, &path);
                }
            }
        }
    }

    fn two_names(&mut self, earlier: &Member, member: &Member, path: &str) {
        let mut diagnostic = self.document.diagnostic(
            Code::Contradiction,
            path,
            &member.key_span,
            format!("`{}` and `{}` are two names of one setting", earlier.key, member.key),
            "set again here",
        );
        diagnostic.labels.push(self.document.label(&earlier.key_span, "first set here"));
        self.errors.push(diagnostic.hint("keep one of them"));
    }

    /// Judges parameters whose meaning only another library knows: those that all its optimizers judge alike, and "auto".
    pub(crate) fn foreign_params(&mut self, node: &'d Node, parent: &str) {
        for member in node.as_object().unwrap_or_default() {
            let path = join(parent, &member.key);
            let known =
                FOREIGN_RANGES.iter().find(|(key, _)| parent == "optimizer.params" && *key == member.key);
            if let (Some((_, kind)), Value::Number(_) | Value::List(_)) = (known, &member.value.value)
                && let Err(problem) = judge(*kind, &member.value)
                && problem.code == Code::OutOfRange
            {
                self.misfit(*kind, &member.value, &path, problem);
                continue;
            }
            if member.value.as_text() == Some("auto") {
                if let AutoRule::FilledBy(who) = table::TRAINER {
                    self.unfilled(member, &path, who);
                }
            } else {
                self.difference(&path, &member.value, "null");
            }
        }
    }

    fn difference(&mut self, path: &str, node: &Node, default: &'static str) {
        let value = excerpt(&self.document.text()[node.span.clone()]);
        self.differences.push((node.span.start, Difference { path: path.to_owned(), value, default }));
    }

    fn unknown(&mut self, member: &Member, parent: &str, siblings: impl Iterator<Item = &'static Setting>) {
        let path = join(parent, &member.key);
        let key = member.key.as_str();
        let foreign = parent.is_empty()
            && (table::FOREIGN_KEYS.contains(&key)
                || ["_", "hf_", "x_", "//"].iter().any(|prefix| key.starts_with(prefix)));
        if foreign {
            self.warnings.push(self.document.diagnostic(
                Code::Foreign,
                &path,
                &member.key_span,
                format!("`{path}` is left to the library that reads it"),
                "not a setting of ours",
            ));
            return;
        }
        let mut diagnostic = self.document.diagnostic(
            Code::UnknownKey,
            &path,
            &member.key_span,
            format!("unknown setting `{path}`"),
            "no setting has this name",
        );
        let names = siblings.flat_map(|setting| {
            let shown = !matches!(setting.status, Status::Removed { .. });
            std::iter::once(setting.key()).filter(move |_| shown).chain(setting.aliases.iter().copied())
        });
        let homes: Vec<&str> = table::settings()
            .filter(|setting| setting.key() == key && !matches!(setting.status, Status::Removed { .. }))
            .map(Setting::parent)
            .collect();
        diagnostic.nearest = nearest(key, names).map(|name| join(parent, name));
        if diagnostic.nearest.is_none()
            && let [home] = homes[..]
        {
            diagnostic.hints.push(if home.is_empty() {
                format!("`{key}` belongs at the top of the config")
            } else {
                format!("`{key}` belongs in the block `{home}`")
            });
        }
        if self.options.strict {
            if parent.is_empty() && diagnostic.nearest.is_none() && diagnostic.hints.is_empty() {
                diagnostic.hints.push(
                    "DS_CONFIG_STRICT=0 in the environment makes unknown settings a warning".to_owned(),
                );
            }
            self.errors.push(diagnostic);
        } else {
            self.warnings.push(diagnostic);
        }
    }

    fn unfilled(&mut self, member: &Member, path: &str, who: &str) {
        if self.options.allow_auto {
            return;
        }
        self.errors.push(
            self.document
                .diagnostic(
                    Code::UnfilledAuto,
                    path,
                    &member.value.span,
                    format!("`{path}` is still \"auto\""),
                    "nothing has filled this in",
                )
                .hint(format!("{who} fills it in before the engine starts; without it, write a value")),
        );
    }

    /// Judges one value under its full path; true when it is set and of the right type and range.
    fn value(&mut self, setting: &'static Setting, member: &'d Member, path: &str) -> bool {
        let node = &member.value;
        if let Status::Removed { instead, asks } = setting.status {
            if asks == Asks::Present || asks_for(asks, setting, node) {
                self.errors.push(
                    self.document
                        .diagnostic(
                            Code::Removed,
                            path,
                            &member.key_span,
                            format!("`{path}` is no longer a setting; DeepSpeed 0.19.8 rejects it too"),
                            "removed",
                        )
                        .hint(format!("delete it: {instead}")),
                );
            }
            return false;
        }
        if node.value == Value::Null {
            return false;
        }
        let block = matches!(setting.kind, Kind::Block | Kind::BoolOrBlock | Kind::Open);
        if node.as_text() == Some("auto") && !block {
            match setting.auto {
                AutoRule::Default => {
                    if matches!(path, "fp16.enabled" | "bf16.enabled") && !self.options.allow_auto {
                        self.warnings.push(
                            self.document
                                .diagnostic(
                                    Code::Doubtful,
                                    path,
                                    &node.span,
                                    format!("`{path}` is still \"auto\", which means false"),
                                    "taken as false",
                                )
                                .hint("the Hugging Face Trainer or accelerate fills it in; without it, write true or false"),
                        );
                    }
                    return false;
                }
                AutoRule::FilledBy(who) => {
                    self.unfilled(member, path, who);
                    return false;
                }
                AutoRule::NotAllowed => {}
            }
        }
        if let Err(problem) = judge(setting.kind, node) {
            self.misfit(setting.kind, node, path, problem);
            return false;
        }
        self.judge_status(setting, member, path);
        true
    }

    fn misfit(&mut self, kind: Kind, node: &Node, path: &str, problem: Misfit) {
        let message = match problem.code {
            Code::WrongType => format!("`{path}` cannot be {}", node.kind_name()),
            _ => format!("`{path}` cannot be {}", excerpt(&self.document.text()[node.span.clone()])),
        };
        let mut diagnostic = self.document.diagnostic(problem.code, path, &node.span, message, problem.label);
        diagnostic.allowed = Some(kind.allowed());
        diagnostic.nearest = problem.nearest;
        diagnostic.hints.extend(problem.hint);
        self.errors.push(diagnostic);
    }

    fn judge_status(&mut self, setting: &'static Setting, member: &'d Member, path: &str) {
        let node = &member.value;
        let leaf = !matches!(setting.kind, Kind::Block | Kind::BoolOrBlock);
        let differs = leaf && !is_default(setting, node);
        match setting.status {
            Status::NotBuilt { feature, asks } if asks_for(asks, setting, node) => {
                let span = if leaf { &node.span } else { &member.key_span };
                let mut diagnostic = self.document.diagnostic(
                    Code::NotBuilt,
                    path,
                    span,
                    format!("`{path}` asks for {feature}, which is not built yet"),
                    "not built yet",
                );
                diagnostic.hints.push(match asks {
                    Asks::Enabled => format!("set `{path}.enabled` to false, or delete the block"),
                    _ if setting.default == "null" => "delete it".to_owned(),
                    _ => format!("delete it, or set it to {}", setting.default),
                });
                self.errors.push(diagnostic);
            }
            Status::NoEffect { why } if differs => {
                self.warnings.push(self.document.diagnostic(
                    Code::NoEffect,
                    path,
                    &member.key_span,
                    format!("`{path}` has no effect: {why}"),
                    "",
                ));
            }
            _ => {}
        }
        if differs && setting.kind != Kind::Open {
            self.difference(path, node, setting.default);
        }
        if setting.kind == Kind::BoolOrBlock && node.value == Value::Bool(true) {
            // The one block with a short form: zero_optimization, whose true means stage 1.
            let stage = Difference { path: join(path, "stage"), value: "1".to_owned(), default: "0" };
            self.differences.push((node.span.start, stage));
        }
    }

    /// The member at a canonical path, set and valid.
    pub(crate) fn member(&self, path: &'static str) -> Option<&'d Member> {
        debug_assert!(table::find(path).is_some(), "{path} is not in the table");
        self.values.get(path).copied()
    }

    /// The value at a canonical path, or its default.
    fn effective(&self, path: &'static str) -> Value {
        match self.member(path) {
            Some(member) => member.value.value.clone(),
            None => default_value(table::find(path).map_or("null", |setting| setting.default)),
        }
    }

    pub(crate) fn flag(&self, path: &'static str) -> bool {
        self.effective(path) == Value::Bool(true)
    }

    pub(crate) fn number(&self, path: &'static str) -> Option<f64> {
        match self.effective(path) {
            Value::Number(number) => Some(number.as_f64()),
            _ => None,
        }
    }

    pub(crate) fn integer(&self, path: &'static str) -> Option<u64> {
        match self.effective(path) {
            Value::Number(number) => number.as_integer().and_then(|n| u64::try_from(n).ok()),
            _ => None,
        }
    }

    pub(crate) fn text(&self, path: &'static str) -> Option<String> {
        match self.effective(path) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn dtype(&self, path: &'static str) -> Option<deepspeed_core::DType> {
        self.text(path)?.to_ascii_lowercase().parse().ok()
    }
}

/// The text of a value on one line, cut where it is long.
fn excerpt(text: &str) -> String {
    const WIDTH: usize = 80;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// A default as a value.
pub(crate) fn default_value(default: &str) -> Value {
    json::parse(default).map_or(Value::Null, |node| node.value)
}

/// Whether a value is the default of its setting.
pub(crate) fn is_default(setting: &Setting, node: &Node) -> bool {
    if node.value == Value::Null {
        return true;
    }
    let default = default_value(setting.default);
    match (&node.value, &default) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Text(a), Value::Text(b)) if setting.kind == Kind::DType => {
            a.to_ascii_lowercase().parse::<deepspeed_core::DType>() == b.parse()
        }
        (Value::Text(a), Value::Text(b)) => a.eq_ignore_ascii_case(b),
        (Value::Bool(false), Value::Null) => true,
        (Value::Object(members), Value::Null) => members.is_empty(),
        (a @ Value::List(_), b @ Value::List(_)) => same_list(a, b),
        (a, b) => a == b,
    }
}

/// Positions aside.
fn same_list(a: &Value, b: &Value) -> bool {
    let json = |value: &Value| Node { span: 0..0, value: value.clone() }.to_json();
    json(a) == json(b)
}

fn asks_for(asks: Asks, setting: &Setting, node: &Node) -> bool {
    let enabled = |node: &Node| node.member("enabled").map(|member| member.value.value == Value::Bool(true));
    match asks {
        Asks::Present => true,
        Asks::Never => false,
        Asks::Enabled => enabled(node) == Some(true),
        // The keys of a block of the table speak for themselves.
        Asks::NonDefault if matches!(setting.kind, Kind::Block | Kind::BoolOrBlock) => false,
        Asks::NonDefault => enabled(node) != Some(false) && !is_default(setting, node),
    }
}
