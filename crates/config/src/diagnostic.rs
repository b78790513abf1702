//! What is wrong with a config, where, and what to do: values that print as plain text with the source line and a caret.

use std::{fmt, ops::Range};

use crate::document::Origin;

/// The kind of a diagnostic, stable for programs; `as_str` is the name shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// The file or text could not be read at all.
    Unreadable,
    /// Not JSON.
    Syntax,
    /// The same key twice in one block.
    DuplicateKey,
    /// No setting has this name.
    UnknownKey,
    /// A value of the wrong type.
    WrongType,
    /// A number outside its range, or a word that is not among those allowed.
    OutOfRange,
    /// Two settings that cannot both hold.
    Contradiction,
    /// A setting that this one needs is absent.
    Missing,
    /// The setting asks for a feature that is not built yet.
    NotBuilt,
    /// The original removed the setting, and rejects it too.
    Removed,
    /// `"auto"` where nobody filled in a value.
    UnfilledAuto,
    /// The batch numbers do not fit together.
    Batch,
    /// Warning: an old name or form of a setting.
    Deprecated,
    /// Warning: accepted, and changes nothing here.
    NoEffect,
    /// Warning: a key that another library reads.
    Foreign,
    /// Warning: probably not what was meant.
    Doubtful,
}

impl Code {
    /// The name in brackets behind a message.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "config::unreadable",
            Self::Syntax => "config::syntax",
            Self::DuplicateKey => "config::duplicate_key",
            Self::UnknownKey => "config::unknown_key",
            Self::WrongType => "config::wrong_type",
            Self::OutOfRange => "config::out_of_range",
            Self::Contradiction => "config::contradiction",
            Self::Missing => "config::missing",
            Self::NotBuilt => "config::not_built",
            Self::Removed => "config::removed",
            Self::UnfilledAuto => "config::unfilled_auto",
            Self::Batch => "config::batch",
            Self::Deprecated => "config::deprecated",
            Self::NoEffect => "config::no_effect",
            Self::Foreign => "config::foreign_key",
            Self::Doubtful => "config::doubtful",
        }
    }
}

/// A place in the text with a few words about it, holding the line it shows so that it outlives the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// The bytes meant.
    pub span: Range<usize>,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What stands under the caret.
    pub text: String,
    excerpt: String,
    caret: Range<usize>,
}

/// The longest piece of a source line that is shown.
const EXCERPT_WIDTH: usize = 100;

impl Label {
    pub(crate) fn new(source: &str, span: Range<usize>, text: impl Into<String>) -> Self {
        let start = span.start.min(source.len());
        let line_start = source[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = source[start..].find('\n').map_or(source.len(), |length| start + length);
        let column = source[line_start..start].chars().count();
        let width = source[start..span.end.clamp(start, line_end)].trim_end().chars().count().max(1);
        // A long line (a minified file, a dict) is cut to a window around the place.
        let characters: Vec<char> = source[line_start..line_end].trim_end().chars().collect();
        let shown_from = if characters.len() <= EXCERPT_WIDTH { 0 } else { column.saturating_sub(30) };
        let shown_to = characters.len().min(shown_from + EXCERPT_WIDTH);
        let mut excerpt = String::new();
        if shown_from > 0 {
            excerpt.push('…');
        }
        let caret_start = excerpt.chars().count() + column.saturating_sub(shown_from);
        excerpt.extend(
            characters[shown_from.min(shown_to)..shown_to].iter().map(
                |c| {
                    if c.is_control() { ' ' } else { *c }
                },
            ),
        );
        if shown_to < characters.len() {
            excerpt.push('…');
        }
        let caret_end = (caret_start + width).min(excerpt.chars().count().max(caret_start + 1));
        Self {
            line: source[..start].matches('\n').count() + 1,
            column: column + 1,
            span,
            text: text.into(),
            excerpt,
            caret: caret_start..caret_end,
        }
    }
}

/// One problem, or one warning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// The kind.
    pub code: Code,
    /// What is wrong, with the values; lower case, without hints.
    pub message: String,
    /// Where the config came from.
    pub origin: Origin,
    /// The full path of the setting meant, as `zero_optimization.stage`; empty where none is.
    pub path: String,
    /// The places meant, the first being the one to mend.
    pub labels: Vec<Label>,
    /// What is allowed, in words, where a value is not.
    pub allowed: Option<String>,
    /// The nearest name or word that exists.
    pub nearest: Option<String>,
    /// What to do about it.
    pub hints: Vec<String>,
}

impl Diagnostic {
    pub(crate) fn new(code: Code, origin: &Origin, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            origin: origin.clone(),
            path: String::new(),
            labels: Vec::new(),
            allowed: None,
            nearest: None,
            hints: Vec::new(),
        }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The line of the first label.
    pub fn line(&self) -> Option<usize> {
        self.labels.first().map(|label| label.line)
    }

    /// The column of the first label, in characters.
    pub fn column(&self) -> Option<usize> {
        self.labels.first().map(|label| label.column)
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code.as_str())?;
        let lined = self.origin.has_lines();
        let gutter = if lined {
            self.labels.iter().map(|label| label.line.to_string().len()).max().unwrap_or(1)
        } else {
            1
        };
        if let Some(label) = self.labels.first() {
            write!(f, "\n{:gutter$}--> {}", "", self.origin)?;
            if lined {
                write!(f, ":{}:{}", label.line, label.column)?;
            }
            if !self.path.is_empty() {
                write!(f, " ({})", self.path)?;
            }
        } else if !matches!(self.code, Code::Unreadable) {
            write!(f, "\n{:gutter$}--> {}", "", self.origin)?;
            if !self.path.is_empty() {
                write!(f, " ({})", self.path)?;
            }
        }
        for label in &self.labels {
            let number = if lined { label.line.to_string() } else { String::new() };
            write!(f, "\n{:gutter$} |\n{number:>gutter$} | {}", "", label.excerpt)?;
            let indent = label.caret.start;
            let carets = "^".repeat(label.caret.len().max(1));
            write!(f, "\n{:gutter$} | {:indent$}{carets}", "", "")?;
            if !label.text.is_empty() {
                write!(f, " {}", label.text)?;
            }
        }
        if let Some(allowed) = &self.allowed {
            write!(f, "\n{:gutter$} = allowed: {allowed}", "")?;
        }
        if let Some(nearest) = &self.nearest {
            write!(f, "\n{:gutter$} = hint: did you mean `{nearest}`?", "")?;
        }
        for hint in &self.hints {
            write!(f, "\n{:gutter$} = hint: {hint}", "")?;
        }
        Ok(())
    }
}

/// Everything that is wrong with a config. `Display` is the whole report: plain text, several lines, no colour.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.report())]
pub struct ConfigError {
    diagnostics: Vec<Diagnostic>,
}

impl ConfigError {
    /// Callers give at least one diagnostic.
    pub(crate) fn new(diagnostics: Vec<Diagnostic>) -> Self {
        debug_assert!(!diagnostics.is_empty(), "an error has a reason");
        Self { diagnostics }
    }

    /// The problems, in the order of the text; at least one.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }

    fn report(&self) -> String {
        let mut out = match &self.diagnostics[..] {
            [only] => return only.to_string(),
            all => format!("{} has {} problems", all[0].origin, all.len()),
        };
        for diagnostic in &self.diagnostics {
            out.push_str("\n\n");
            out.push_str(&diagnostic.to_string());
        }
        out
    }
}

impl From<Diagnostic> for ConfigError {
    fn from(diagnostic: Diagnostic) -> Self {
        Self::new(vec![diagnostic])
    }
}

/// The candidate most like `word`, if any is like enough to have been meant.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    candidates
        .into_iter()
        .map(|candidate| {
            let lower = candidate.to_ascii_lowercase();
            let edits = strsim::damerau_levenshtein(&word, &lower);
            let similarity = strsim::normalized_damerau_levenshtein(&word, &lower)
                .max(strsim::jaro_winkler(&word, &lower) - 0.15);
            (candidate, edits, similarity)
        })
        // Two slips at most, fewer in a short word; or much alike as a whole.
        .filter(|(candidate, edits, similarity)| {
            (*edits <= 2 && *edits * 3 <= candidate.len() + 2) || *similarity > 0.7
        })
        .max_by(|a, b| a.2.total_cmp(&b.2))
        .map(|(candidate, ..)| candidate)
}
