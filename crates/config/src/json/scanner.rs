//! The scanner: text to tree, or the first place where the text is not JSON and why.

use super::{Member, Node, Number, Span, Value};

/// How deep lists and objects may nest. The same limit as serde_json's; a config needs about five.
pub const MAX_DEPTH: usize = 127;

/// Where and why a text is not JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntaxError {
    /// The offending bytes; empty at the end of the text.
    pub span: Span,
    /// What is wrong.
    pub message: String,
    /// A few words to stand under the offending bytes.
    pub label: String,
    /// An earlier place that explains it (the bracket that was never closed), with a few words.
    pub related: Option<(Span, String)>,
    /// What its author can do.
    pub hint: Option<String>,
}

/// Parses one document.
pub fn parse(text: &str) -> Result<Node, Box<SyntaxError>> {
    let mut scanner = Scanner { text, at: 0, depth: 0 };
    if text.starts_with('\u{feff}') {
        scanner.at = '\u{feff}'.len_utf8();
    }
    scanner.skip_blanks()?;
    if scanner.at == text.len() {
        return Err(scanner.error(scanner.here(), "the document is empty", "expected `{`"));
    }
    let node = scanner.value()?;
    scanner.skip_blanks()?;
    if scanner.at < text.len() {
        return Err(scanner.error(
            scanner.here(),
            "there is more text after the end of the document",
            "the document ended before this",
        ));
    }
    Ok(node)
}

struct Scanner<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl Scanner<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    /// The character at the current position, or the empty range at the end.
    fn here(&self) -> Span {
        self.at..self.at + self.peek().map_or(0, char::len_utf8)
    }

    fn error(&self, span: Span, message: &str, label: &str) -> Box<SyntaxError> {
        Box::new(SyntaxError {
            span,
            message: message.to_owned(),
            label: label.to_owned(),
            related: None,
            hint: None,
        })
    }

    fn unexpected(&self, expected: &str, after: Option<(Span, String)>) -> Box<SyntaxError> {
        let found = match self.peek() {
            None => "the document ends too early".to_owned(),
            Some(c) => format!("unexpected `{}`", c.escape_debug()),
        };
        Box::new(SyntaxError {
            span: self.here(),
            message: format!("{found}, expected {expected}"),
            label: format!("expected {expected}"),
            related: after,
            hint: None,
        })
    }

    fn skip_blanks(&mut self) -> Result<(), Box<SyntaxError>> {
        loop {
            match self.peek() {
                Some(' ' | '\t' | '\r' | '\n') => self.at += 1,
                Some('#') => self.skip_line(),
                Some('/') if self.rest().starts_with("//") => self.skip_line(),
                Some('/') if self.rest().starts_with("/*") => match self.rest().find("*/") {
                    Some(length) => self.at += length + 2,
                    None => {
                        let span = self.at..self.at + 2;
                        return Err(self.error(
                            span,
                            "a comment is never closed",
                            "opened here, without a `*/`",
                        ));
                    }
                },
                _ => return Ok(()),
            }
        }
    }

    fn skip_line(&mut self) {
        self.at += self.rest().find('\n').unwrap_or(self.rest().len());
    }

    fn value(&mut self) -> Result<Node, Box<SyntaxError>> {
        let start = self.at;
        let value = match self.peek() {
            Some('{') => self.object()?,
            Some('[') => self.list()?,
            Some('"') => Value::Text(self.string()?),
            Some('-' | '+' | '.' | '0'..='9') => Value::Number(self.number()?),
            Some(c) if c.is_alphabetic() || c == '_' || c == '$' => self.word()?,
            Some('\'') => return Err(self.single_quote()),
            _ => return Err(self.unexpected("a value", None)),
        };
        Ok(Node { span: start..self.at, value })
    }

    fn enter(&mut self) -> Result<Span, Box<SyntaxError>> {
        let opened = self.here();
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error(
                opened,
                &format!("blocks and lists nest more than {MAX_DEPTH} deep"),
                "one level too many",
            ));
        }
        self.at += 1;
        Ok(opened)
    }

    fn object(&mut self) -> Result<Value, Box<SyntaxError>> {
        let opened = self.enter()?;
        let mut members: Vec<Member> = Vec::new();
        loop {
            self.skip_blanks()?;
            if self.peek() == Some('}') {
                break;
            }
            if self.peek() != Some('"') {
                return Err(self.not_a_key(&opened));
            }
            let key_start = self.at;
            let key = self.string()?;
            let key_span = key_start..self.at;
            self.skip_blanks()?;
            if self.peek() != Some(':') {
                return Err(self.unexpected("`:` and a value", Some((key_span, "after this key".to_owned()))));
            }
            self.at += 1;
            self.skip_blanks()?;
            if matches!(self.peek(), Some(',' | '}')) {
                return Err(self.unexpected("a value", Some((key_span, "for this key".to_owned()))));
            }
            let value = self.value()?;
            let end = value.span.end;
            members.push(Member { key, key_span, value });
            if !self.comma_or('}', &opened, end)? {
                break;
            }
        }
        self.at += 1;
        self.depth -= 1;
        Ok(Value::Object(members))
    }

    fn list(&mut self) -> Result<Value, Box<SyntaxError>> {
        let opened = self.enter()?;
        let mut items = Vec::new();
        loop {
            self.skip_blanks()?;
            if self.peek() == Some(']') {
                break;
            }
            if self.peek().is_none() {
                return Err(self.never_closed(']', &opened));
            }
            let item = self.value()?;
            let end = item.span.end;
            items.push(item);
            if !self.comma_or(']', &opened, end)? {
                break;
            }
        }
        self.at += 1;
        self.depth -= 1;
        Ok(Value::List(items))
    }

    /// After a value that ended at `end`: passes a comma (true), or stands at `close` (false).
    fn comma_or(&mut self, close: char, opened: &Span, end: usize) -> Result<bool, Box<SyntaxError>> {
        self.skip_blanks()?;
        match self.peek() {
            Some(',') => {
                self.at += 1;
                Ok(true)
            }
            Some(c) if c == close => Ok(false),
            None => Err(self.never_closed(close, opened)),
            // The place to mend is behind the value that ended, maybe some lines up.
            Some('"' | '{' | '[' | '-' | '0'..='9') => {
                let mut error = self.error(end..end, "a comma is missing between two values", "expected `,`");
                error.related = Some((self.here(), "before this".to_owned()));
                Err(error)
            }
            Some(_) => Err(self.unexpected(
                &format!("`,` or `{close}`"),
                Some((opened.clone(), "in what was opened here".to_owned())),
            )),
        }
    }

    fn never_closed(&self, close: char, opened: &Span) -> Box<SyntaxError> {
        let mut error = self.error(
            opened.clone(),
            &format!("the document ends and this bracket has no `{close}`"),
            "opened here, never closed",
        );
        error.related = Some((self.here(), format!("expected `{close}`")));
        error
    }

    fn not_a_key(&self, opened: &Span) -> Box<SyntaxError> {
        match self.peek() {
            None => self.never_closed('}', opened),
            Some('\'') => self.single_quote(),
            Some(c) if c.is_alphanumeric() || c == '_' => {
                let length =
                    self.rest().find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(self.rest().len());
                let span = self.at..self.at + length;
                let word = &self.text[span.clone()];
                let mut error = self.error(
                    span.clone(),
                    &format!("the key `{word}` has no quotes"),
                    "needs double quotes",
                );
                error.hint = Some(format!("write \"{word}\""));
                error
            }
            Some(_) => {
                self.unexpected("a key in double quotes", Some((opened.clone(), "in this block".to_owned())))
            }
        }
    }

    fn single_quote(&self) -> Box<SyntaxError> {
        let mut error =
            self.error(self.here(), "text stands in single quotes", "JSON has only double quotes");
        error.hint = Some("a Python dict printed as it is is not JSON; write it with json.dump".to_owned());
        error
    }

    fn word(&mut self) -> Result<Value, Box<SyntaxError>> {
        let length = self
            .rest()
            .find(|c: char| !c.is_alphanumeric() && c != '_' && c != '.')
            .unwrap_or(self.rest().len());
        let span = self.at..self.at + length.max(1);
        let word = &self.text[span.clone()];
        let value = match word {
            "null" => Value::Null,
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            "Infinity" => Value::Number(Number::Float(f64::INFINITY)),
            "NaN" => Value::Number(Number::Float(f64::NAN)),
            _ => {
                let meant = match word.to_ascii_lowercase().as_str() {
                    "true" | "yes" | "on" => "true".to_owned(),
                    "false" | "no" | "off" => "false".to_owned(),
                    "none" | "null" | "nil" | "undefined" => "null".to_owned(),
                    "inf" | "infinity" => "Infinity".to_owned(),
                    "nan" => "NaN".to_owned(),
                    _ => format!("\"{word}\""),
                };
                let mut error =
                    self.error(span, &format!("`{word}` is not a JSON value"), "not a value without quotes");
                error.hint = Some(format!("write {meant}"));
                return Err(error);
            }
        };
        self.at = span.end;
        Ok(value)
    }

    fn number(&mut self) -> Result<Number, Box<SyntaxError>> {
        let start = self.at;
        if self.rest().starts_with("-Infinity") {
            self.at += "-Infinity".len();
            return Ok(Number::Float(f64::NEG_INFINITY));
        }
        let length = self
            .rest()
            .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_')))
            .unwrap_or(self.rest().len());
        let span = start..start + length;
        let lexeme = &self.text[span.clone()];
        let Some(integral) = number_form(lexeme) else {
            let mut error = self.error(
                span,
                &format!("`{lexeme}` is not a JSON number"),
                "not a number as JSON writes them",
            );
            let mended = lexeme.replace('_', "");
            let mended = mended.trim_start_matches('+');
            error.hint = Some(match mended {
                _ if mended != lexeme && number_form(mended).is_some() => format!("write {mended}"),
                _ if mended.starts_with('.') => format!("write 0{mended}"),
                _ if mended.ends_with('.') => format!("write {mended}0"),
                _ => "digits with at most one point and one exponent: 3, 0.5, 5e8".to_owned(),
            });
            return Err(error);
        };
        self.at = span.end;
        if integral && lexeme != "-0" {
            if let Ok(n) = lexeme.parse::<u64>() {
                return Ok(Number::Unsigned(n));
            }
            if let Ok(n) = lexeme.parse::<i64>() {
                return Ok(Number::Signed(n));
            }
        }
        match lexeme.parse::<f64>() {
            Ok(x) if x.is_finite() => Ok(Number::Float(x)),
            _ => Err(self.error(span, &format!("the number {lexeme} is too large"), "beyond 1.8e308")),
        }
    }

    /// A string, the opening quote still ahead.
    fn string(&mut self) -> Result<String, Box<SyntaxError>> {
        let start = self.at;
        self.at += 1;
        let mut out = String::new();
        loop {
            let chunk =
                self.rest().find(|c: char| c == '"' || c == '\\' || c < ' ').unwrap_or(self.rest().len());
            out.push_str(&self.text[self.at..self.at + chunk]);
            self.at += chunk;
            match self.peek() {
                Some('"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some('\\') => out.push(self.escape()?),
                Some('\n' | '\r') | None => {
                    return Err(self.error(
                        start..self.at,
                        "this text has no closing quote",
                        "expected `\"`",
                    ));
                }
                Some(c) => {
                    let mut error = self.error(
                        self.here(),
                        &format!("the control character {} stands in text", c.escape_debug()),
                        "must be escaped",
                    );
                    error.hint = Some(format!("write \\u{:04x}", u32::from(c)));
                    return Err(error);
                }
            }
        }
    }

    fn escape(&mut self) -> Result<char, Box<SyntaxError>> {
        let start = self.at;
        self.at += 1;
        let kind = self.peek();
        self.at += kind.map_or(0, char::len_utf8);
        let plain = match kind {
            Some(c @ ('"' | '\\' | '/')) => c,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u') => return self.unicode_escape(start),
            _ => {
                let mut error =
                    self.error(start..self.at, "this escape is not one of JSON's", "unknown escape");
                error.hint = Some(r"a backslash in text is written \\".to_owned());
                return Err(error);
            }
        };
        Ok(plain)
    }

    fn unicode_escape(&mut self, start: usize) -> Result<char, Box<SyntaxError>> {
        let high = self.hex4(start)?;
        let code = match high {
            0xD800..=0xDBFF if self.rest().starts_with("\\u") => {
                self.at += 2;
                let low = self.hex4(start)?;
                if (0xDC00..=0xDFFF).contains(&low) {
                    0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00)
                } else {
                    high
                }
            }
            _ => high,
        };
        char::from_u32(code).ok_or_else(|| {
            self.error(start..self.at, "half of a surrogate pair stands alone", "not a character")
        })
    }

    fn hex4(&mut self, start: usize) -> Result<u32, Box<SyntaxError>> {
        let digits: String = self.rest().chars().take(4).take_while(char::is_ascii_hexdigit).collect();
        self.at += digits.len();
        match u32::from_str_radix(&digits, 16) {
            Ok(code) if digits.len() == 4 => Ok(code),
            _ => Err(self.error(start..self.at, r"\u needs four hexadecimal digits", "too few digits")),
        }
    }
}

/// Whether a lexeme is a number of the JSON grammar, and if so whether it is written as an integer.
fn number_form(lexeme: &str) -> Option<bool> {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let unsigned = lexeme.strip_prefix('-').unwrap_or(lexeme);
    let whole = digits(unsigned);
    if whole == 0 || (whole > 1 && unsigned.starts_with('0')) {
        return None;
    }
    let mut rest = &unsigned[whole..];
    if rest.is_empty() {
        return Some(true);
    }
    if let Some(fraction) = rest.strip_prefix('.') {
        let length = digits(fraction);
        if length == 0 {
            return None;
        }
        rest = &fraction[length..];
    }
    if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        let length = digits(exponent);
        if length == 0 {
            return None;
        }
        rest = &exponent[length..];
    }
    rest.is_empty().then_some(false)
}
