//! Parameters of an optimizer or schedule that are right one by one and wrong together.
//!
//! The optimizer crate, which cannot be asked from here, refuses the same things in the same words when the engine starts.

use crate::{
    check::{Checked, join},
    diagnostic::{Code, Diagnostic},
    json::{Member, Node, Value},
    table::Named,
};

/// The parameters of one optimizer or schedule of ours.
struct Params<'d> {
    entry: &'static Named,
    node: &'d Node,
    path: &'static str,
}

impl<'d> Params<'d> {
    /// The member that sets a parameter, under any of its names; null sets nothing.
    fn member(&self, key: &str) -> Option<&'d Member> {
        let named =
            |member: &&Member| self.entry.param(&member.key).is_some_and(|setting| setting.key() == key);
        let members = self.node.as_object().unwrap_or_default();
        members.iter().rev().find(named).filter(|member| member.value.value != Value::Null)
    }

    /// Its number, or `default` where it is not set; nothing where it is "auto" or wrong.
    fn number(&self, key: &str, default: f64) -> Option<f64> {
        match self.member(key).map(|member| &member.value.value) {
            None => Some(default),
            Some(Value::Number(number)) => Some(number.as_f64()),
            Some(_) => None,
        }
    }

    /// Its numbers, one for each parameter group or one for all; none where it is not set.
    fn numbers(&self, key: &str) -> Vec<f64> {
        let number = |value: &Value| match value {
            Value::Number(number) => Some(number.as_f64()),
            _ => None,
        };
        match self.member(key).map(|member| &member.value.value) {
            Some(Value::List(items)) => items.iter().filter_map(|item| number(&item.value)).collect(),
            Some(value) => number(value).into_iter().collect(),
            None => Vec::new(),
        }
    }

    fn flag(&self, key: &str) -> Option<bool> {
        match self.member(key)?.value.value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        }
    }

    /// A report on parameter `key`, whose second label is on parameter `other` where that is set.
    fn diagnostic(
        &self,
        checked: &Checked<'_>,
        code: Code,
        (key, label): (&str, &str),
        (other, other_label): (&str, &str),
        reason: &str,
    ) -> Option<Diagnostic> {
        let (path, message) = (join(self.path, key), format!("{}: {reason}", self.entry.name));
        let span = &self.member(key)?.value.span;
        let mut diagnostic = checked.document.diagnostic(code, &path, span, message, label);
        if let Some(other) = self.member(other) {
            diagnostic.labels.push(checked.document.label(&other.value.span, other_label));
        }
        Some(diagnostic)
    }
}

/// Judges the parameters of an optimizer of ours together.
pub(crate) fn optimizer(checked: &mut Checked<'_>, entry: &'static Named, node: &Node) {
    let params = Params { entry, node, path: "optimizer.params" };
    let mut found = Vec::new();
    if params.flag("nesterov") == Some(true) {
        let reason = "`nesterov` needs a `momentum` above 0 and a `dampening` of 0";
        let on = ("nesterov", "on here");
        if params.number("momentum", 0.0).is_some_and(|momentum| momentum <= 0.0) {
            let place = ("momentum", "no momentum");
            found.extend(params.diagnostic(checked, Code::Contradiction, on, place, reason));
        } else if params.number("dampening", 0.0).is_some_and(|dampening| dampening != 0.0) {
            let place = ("dampening", "dampened here");
            found.extend(params.diagnostic(checked, Code::Contradiction, on, place, reason));
        }
    }
    if entry.name == "AdamW" && params.flag("adam_w_mode") == Some(false) {
        let reason = "`adam_w_mode: false` contradicts the name; use the type `Adam` for L2 regularisation";
        let place = ("adam_w_mode", "not AdamW");
        found.extend(params.diagnostic(checked, Code::Contradiction, place, ("", ""), reason));
    }
    if entry.param("min_coeff").is_some()
        && let (Some(min), Some(max)) = (params.number("min_coeff", 0.01), params.number("max_coeff", 10.0))
        && min > max
    {
        let (low, high) = (("min_coeff", "the least"), ("max_coeff", "the greatest"));
        let (first, second) = if params.member("min_coeff").is_some() { (low, high) } else { (high, low) };
        let reason = "`min_coeff` is larger than `max_coeff`";
        found.extend(params.diagnostic(checked, Code::Contradiction, first, second, reason));
    }
    checked.errors.append(&mut found);
}

/// Judges the parameters of a schedule of ours together.
pub(crate) fn scheduler(checked: &mut Checked<'_>, entry: &'static Named, node: &Node) {
    let params = Params { entry, node, path: "scheduler.params" };
    if let Some(total) = params.member("total_num_steps").and_then(|_| params.number("total_num_steps", 0.0))
        && let Some(warmup) = params.number("warmup_num_steps", 1000.0)
        && total <= warmup
    {
        let reason = format!(
            "the training of {total} steps (`total_num_steps`) is over before its warm-up of {warmup} steps \
             (`warmup_num_steps`{}) is",
            if params.member("warmup_num_steps").is_some() { "" } else { ", by default" }
        );
        let (total, warmup) = (("total_num_steps", "all steps"), ("warmup_num_steps", "the warm-up"));
        // The schedule is defined all the same, and configs of short trial runs look like this.
        let diagnostic = params.diagnostic(checked, Code::Doubtful, total, warmup, &reason);
        let hint = "set `warmup_num_steps` below `total_num_steps`";
        checked.warnings.extend(diagnostic.map(|diagnostic| diagnostic.hint(hint)));
    }
    for (low, high) in [
        ("warmup_min_lr", "warmup_max_lr"),
        ("cycle_min_lr", "cycle_max_lr"),
        ("cycle_min_mom", "cycle_max_mom"),
    ] {
        let (mins, maxs) = (params.numbers(low), params.numbers(high));
        let longest = mins.len().max(maxs.len());
        let at = |numbers: &[f64], group: usize| numbers.get(group).or(numbers.first()).copied();
        let crossed = (0..longest)
            .any(|group| matches!((at(&mins, group), at(&maxs, group)), (Some(a), Some(b)) if a > b));
        if crossed {
            let reason = format!("`{low}` is larger than `{high}`");
            let (low, high) = ((low, "the lower end"), (high, "the upper end"));
            let diagnostic = params.diagnostic(checked, Code::Doubtful, low, high, &reason);
            checked.warnings.extend(diagnostic);
        }
        let counts = (mins.len(), maxs.len());
        let lists =
            |key| params.member(key).is_some_and(|member| matches!(member.value.value, Value::List(_)));
        if lists(low) && lists(high) && counts.0 != counts.1 {
            let reason = format!(
                "`{low}` lists {} values and `{high}` {}; both have one for each parameter group",
                counts.0, counts.1
            );
            let (low, high) = ((low, "a list"), (high, "a list of another length"));
            let diagnostic = params.diagnostic(checked, Code::Contradiction, low, high, &reason);
            checked.errors.extend(diagnostic);
        }
    }
}
