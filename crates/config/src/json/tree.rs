//! The value tree a scan produces.

/// A range of bytes of the text.
pub type Span = std::ops::Range<usize>;

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The bytes of the value, quotes and brackets included.
    pub span: Span,
    /// The value.
    pub value: Value,
}

/// A JSON value. Members of an object keep the order of the text, duplicates included.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(Number),
    /// A string, with its escapes resolved.
    Text(String),
    /// `[...]`.
    List(Vec<Node>),
    /// `{...}`.
    Object(Vec<Member>),
}

/// One `"key": value` of an object.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// The key, with its escapes resolved.
    pub key: String,
    /// The bytes of the key, quotes included.
    pub key_span: Span,
    /// The value.
    pub value: Node,
}

/// A number, as exactly as the text gives it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// An integer of 0 or more.
    Unsigned(u64),
    /// An integer below 0.
    Signed(i64),
    /// Everything else, infinities and NaN included.
    Float(f64),
}

impl Number {
    /// The number as a float; integers above 2^53 are rounded.
    pub fn as_f64(self) -> f64 {
        match self {
            Self::Unsigned(n) => n as f64,
            Self::Signed(n) => n as f64,
            Self::Float(x) => x,
        }
    }

    /// The number as an integer where its value is one: `5e8` and `2.0` are.
    pub fn as_integer(self) -> Option<i128> {
        match self {
            Self::Unsigned(n) => Some(n.into()),
            Self::Signed(n) => Some(n.into()),
            Self::Float(x) => (x.fract() == 0.0 && x.abs() < 1e30).then_some(x as i128),
        }
    }
}

impl Node {
    /// The members, of an object.
    pub fn as_object(&self) -> Option<&[Member]> {
        match &self.value {
            Value::Object(members) => Some(members),
            _ => None,
        }
    }

    /// The text, of a string.
    pub fn as_text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The last member with this key, of an object.
    pub fn member(&self, key: &str) -> Option<&Member> {
        self.as_object()?.iter().rev().find(|member| member.key == key)
    }

    /// The same value without positions. The last of duplicates wins; JSON has no infinities and no NaN, so they become the
    /// strings `"Infinity"`, `"-Infinity"` and `"NaN"`.
    pub fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Number(Number::Unsigned(n)) => Json::from(*n),
            Value::Number(Number::Signed(n)) => Json::from(*n),
            Value::Number(Number::Float(x)) => match serde_json::Number::from_f64(*x) {
                Some(number) => Json::Number(number),
                None if x.is_nan() => Json::from("NaN"),
                None if *x > 0.0 => Json::from("Infinity"),
                None => Json::from("-Infinity"),
            },
            Value::Text(text) => Json::from(text.as_str()),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Object(members) => Json::Object(
                members.iter().map(|member| (member.key.clone(), member.value.to_json())).collect(),
            ),
        }
    }

    /// What kind of value it is, in words for a message.
    pub fn kind_name(&self) -> &'static str {
        match self.value {
            Value::Null => "null",
            Value::Bool(_) => "true or false",
            Value::Number(_) => "a number",
            Value::Text(_) => "text",
            Value::List(_) => "a list",
            Value::Object(_) => "a block",
        }
    }
}
