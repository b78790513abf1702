//! A config as it was handed over: text, where the text came from, and the tree of its values with positions.

use std::{
    fmt,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{
    Engine as _,
    alphabet::{STANDARD, URL_SAFE},
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use crate::{
    diagnostic::{Code, ConfigError, Diagnostic, Label, nearest},
    json::{self, Member, Node, Span},
};

/// Where the text of a config came from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Origin {
    /// A file.
    File(PathBuf),
    /// A dict of the caller, turned into JSON by us: its lines mean nothing to the user.
    Dict,
    /// Base64 on the command line: its lines mean nothing either.
    Base64,
    /// Other text, named for messages.
    Text(String),
}

impl Origin {
    /// Whether a line number helps the reader to find the place.
    pub fn has_lines(&self) -> bool {
        matches!(self, Self::File(_) | Self::Text(_))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Dict => f.write_str("the config dict"),
            Self::Base64 => f.write_str("the base64 config"),
            Self::Text(name) => f.write_str(name),
        }
    }
}

/// A parsed config, not yet judged. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Document {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    origin: Origin,
    text: String,
    root: Node,
}

/// Parses the text of a config: one object, as JSON with comments.
///
/// # Errors
/// The first place where the text is not JSON, or that it is something other than an object.
pub fn parse(text: &str, origin: Origin) -> Result<Document, ConfigError> {
    let root = json::parse(text).map_err(|error| {
        let mut diagnostic = Diagnostic::new(Code::Syntax, &origin, error.message);
        diagnostic.labels.push(Label::new(text, error.span, error.label));
        if let Some((span, words)) = error.related {
            diagnostic.labels.push(Label::new(text, span, words));
        }
        diagnostic.hints.extend(error.hint);
        diagnostic
    })?;
    if root.as_object().is_none() {
        let mut diagnostic = Diagnostic::new(
            Code::WrongType,
            &origin,
            format!("a config is a block, not {}", root.kind_name()),
        );
        diagnostic.labels.push(Label::new(text, root.span, "expected `{`"));
        return Err(diagnostic.into());
    }
    Ok(Document { inner: Arc::new(Inner { origin, text: text.to_owned(), root }) })
}

/// Loads what the user named: the path of an existing file, else base64 (standard or URL-safe) of JSON.
///
/// # Errors
/// A file that cannot be read, a name that is neither, or text that [`parse`] refuses.
pub fn load(spec: &str) -> Result<Document, ConfigError> {
    let path = PathBuf::from(spec);
    let origin = Origin::File(path.clone());
    let unreadable = |message: String| Diagnostic::new(Code::Unreadable, &origin, message);
    match fs_err::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => {
            Err(unreadable(format!("the config `{spec}` is a directory, not a file")).into())
        }
        Ok(_) => {
            let bytes = read_bounded(&path)
                .map_err(|error| unreadable(format!("cannot read the config: {error}")))?;
            if bytes.len() as u64 > MAX_BYTES {
                return Err(
                    unreadable(format!("{spec} has more than {MAX_BYTES} bytes; it is no config")).into()
                );
            }
            match std::str::from_utf8(&bytes) {
                Ok(text) => parse(text, origin),
                Err(error) => {
                    let line = bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
                    Err(unreadable(format!("{spec}:{line}: the config is not UTF-8 text"))
                        .hint("save the file in the encoding UTF-8")
                        .into())
                }
            }
        }
        Err(error) => match decode_base64(spec) {
            Some(text) => parse(&text, Origin::Base64),
            None => {
                let shown: String = spec.chars().take(120).collect();
                let dots = if shown.len() < spec.len() { "…" } else { "" };
                let mut diagnostic = match error.kind() {
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidFilename => unreadable(
                        format!("the config `{shown}{dots}` is neither an existing file nor base64 of JSON"),
                    ),
                    _ => unreadable(format!("cannot read the config: {error}")),
                };
                diagnostic.nearest = similar_file(&path);
                if spec.trim_start().starts_with('{') {
                    diagnostic
                        .hints
                        .push("to give JSON itself, encode it as base64, or pass a dict".to_owned());
                } else if path.is_relative()
                    && let Ok(directory) = std::env::current_dir()
                {
                    diagnostic.hints.push(format!("the working directory is {}", directory.display()));
                }
                Err(diagnostic.into())
            }
        },
    }
}

/// No config is larger; the bound ends the reading of a device or of the wrong file.
const MAX_BYTES: u64 = 16 << 20;

/// The bytes of a file, at most one more than [`MAX_BYTES`].
fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs_err::File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text behind `spec`, if that is base64 of something that looks like an object.
fn decode_base64(spec: &str) -> Option<String> {
    let lenient = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    [URL_SAFE, STANDARD].iter().find_map(|alphabet| {
        let bytes = GeneralPurpose::new(alphabet, lenient).decode(spec.trim()).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        text.trim_start().starts_with('{').then_some(text)
    })
}

/// A file beside the one named whose name is nearly the same.
fn similar_file(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let entries = fs_err::read_dir(directory.unwrap_or(Path::new("."))).ok()?;
    let names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let found = nearest(name, names.iter().map(String::as_str))?;
    Some(path.with_file_name(found).display().to_string())
}

impl Document {
    /// An empty config.
    pub fn empty() -> Self {
        let root = Node { span: 0..2, value: json::Value::Object(Vec::new()) };
        Self { inner: Arc::new(Inner { origin: Origin::Dict, text: "{}".to_owned(), root }) }
    }

    /// Where the text came from.
    pub fn origin(&self) -> &Origin {
        &self.inner.origin
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.inner.text
    }

    /// The tree with positions; an object.
    pub fn root(&self) -> &Node {
        &self.inner.root
    }

    /// The document as plain JSON; see [`Node::to_json`] for infinities and duplicates.
    pub fn json(&self) -> serde_json::Value {
        self.inner.root.to_json()
    }

    /// The member at a path of keys joined by points, as `zero_optimization.stage`.
    pub fn member(&self, path: &str) -> Option<&Member> {
        let mut keys = path.split('.');
        let mut member = self.inner.root.member(keys.next()?)?;
        for key in keys {
            member = member.value.member(key)?;
        }
        Some(member)
    }

    /// The line of a member, as `line 4`, or its origin where lines mean nothing.
    pub(crate) fn line_words(&self, member: &Member) -> String {
        if self.origin().has_lines() {
            format!("line {}", self.text()[..member.key_span.start].matches('\n').count() + 1)
        } else {
            self.origin().to_string()
        }
    }

    /// A diagnostic that points at a place of this document.
    pub(crate) fn diagnostic(
        &self,
        code: Code,
        path: &str,
        span: &Span,
        message: impl Into<String>,
        label: impl Into<String>,
    ) -> Diagnostic {
        let mut diagnostic = Diagnostic::new(code, self.origin(), message);
        diagnostic.path = path.to_owned();
        diagnostic.labels.push(self.label(span, label));
        diagnostic
    }

    pub(crate) fn label(&self, span: &Span, text: impl Into<String>) -> Label {
        Label::new(self.text(), span.clone(), text)
    }
}
