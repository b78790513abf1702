//! Whether one value fits the kind of its setting.

use crate::{
    diagnostic::{Code, nearest},
    json::{Node, Number, Value},
    table::Kind,
};

/// Why a value does not fit its kind.
pub(crate) struct Misfit {
    pub(crate) code: Code,
    pub(crate) label: String,
    pub(crate) nearest: Option<String>,
    pub(crate) hint: Option<String>,
}

impl Misfit {
    fn wrong_type(node: &Node) -> Self {
        Self {
            code: Code::WrongType,
            label: format!("this is {}", node.kind_name()),
            nearest: None,
            hint: None,
        }
    }

    fn out_of_range(node: &Node, label: &str) -> Self {
        Self { code: Code::OutOfRange, label: label.to_owned(), ..Self::wrong_type(node) }
    }
}

/// Judges type and range.
pub(crate) fn judge(kind: Kind, node: &Node) -> Result<(), Misfit> {
    let wrong = || {
        let mut misfit = Misfit::wrong_type(node);
        misfit.hint = unquoted(kind, node);
        misfit
    };
    match (kind, &node.value) {
        (Kind::Anything, _)
        | (Kind::Bool, Value::Bool(_))
        | (Kind::Text, Value::Text(_))
        | (Kind::List, Value::List(_))
        | (Kind::Block | Kind::Open | Kind::BoolOrBlock, Value::Object(_))
        | (Kind::BoolOrBlock, Value::Bool(_)) => Ok(()),
        (Kind::Int { min, max }, Value::Number(number)) => match number.as_integer() {
            Some(n) if (i128::from(min)..=i128::from(max)).contains(&n) => Ok(()),
            Some(_) => Err(Misfit::out_of_range(node, "out of range")),
            None if number.as_f64().is_finite() => Err(Misfit::out_of_range(node, "not a whole number")),
            None => Err(Misfit::out_of_range(node, "not a finite number")),
        },
        (Kind::IntOrInfinity, Value::Number(number)) => match number.as_integer() {
            Some(n) if n >= 1 => Ok(()),
            None if number.as_f64() == f64::INFINITY => Ok(()),
            _ => Err(Misfit::out_of_range(node, "out of range")),
        },
        (Kind::Float { min, max, above }, Value::Number(number)) => {
            let x = number.as_f64();
            if !x.is_finite() {
                Err(Misfit::out_of_range(node, "not a finite number"))
            } else if x < min || x > max || (above && x == min) {
                Err(Misfit::out_of_range(node, "out of range"))
            } else {
                Ok(())
            }
        }
        (Kind::Fractions(count), Value::List(items)) => {
            let fits = |item: &Node| match item.value {
                Value::Number(number) => (0.0..1.0).contains(&number.as_f64()),
                _ => false,
            };
            if items.len() == count && items.iter().all(fits) {
                Ok(())
            } else {
                Err(Misfit::out_of_range(node, "not such a list"))
            }
        }
        (Kind::Numbers, Value::Number(_)) => judge(Kind::NUMBER, node),
        (Kind::Numbers, Value::List(items)) => items.iter().try_for_each(|item| judge(Kind::NUMBER, item)),
        (Kind::Rates, Value::Number(_)) => judge(Kind::NON_NEGATIVE, node),
        (Kind::Rates, Value::List(items)) => {
            items.iter().try_for_each(|item| judge(Kind::NON_NEGATIVE, item))
        }
        (Kind::Choice(words), Value::Text(text)) => {
            if words.iter().any(|word| word.eq_ignore_ascii_case(text)) {
                Ok(())
            } else {
                let mut misfit = Misfit::out_of_range(node, "not one of its words");
                misfit.nearest = nearest(text, words.iter().copied()).map(str::to_owned);
                Err(misfit)
            }
        }
        (Kind::DType, Value::Text(text)) => {
            if text.to_ascii_lowercase().parse::<deepspeed_core::DType>().is_ok() {
                Ok(())
            } else {
                let mut misfit = Misfit::out_of_range(node, "not a dtype that is known here");
                misfit.nearest = nearest(text, ["fp32", "fp16", "bf16"]).map(str::to_owned);
                Err(misfit)
            }
        }
        _ => Err(wrong()),
    }
}

/// What to write in place of a number or truth value that stands in quotes, or of a 1 for true.
fn unquoted(kind: Kind, node: &Node) -> Option<String> {
    match (&node.value, kind) {
        (Value::Text(text), Kind::Bool | Kind::BoolOrBlock) => {
            let lower = text.to_ascii_lowercase();
            ["true", "false"].contains(&&*lower).then(|| format!("write {lower} without quotes"))
        }
        (
            Value::Text(text),
            Kind::Int { .. } | Kind::Float { .. } | Kind::IntOrInfinity | Kind::Numbers | Kind::Rates,
        ) => text.trim().parse::<f64>().ok().map(|_| format!("write {} without quotes", text.trim())),
        (Value::Number(Number::Unsigned(n @ (0 | 1))), Kind::Bool | Kind::BoolOrBlock) => {
            Some(format!("write {}", *n == 1))
        }
        _ => None,
    }
}
