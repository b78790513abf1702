//! Tracebacks that several ranks write: the first is shown as it comes, and of every further one like it the exception alone.
//!
//! ```text
//!   Traceback (most recent call last):      <- where it begins
//!     File "train.py", line 3, in <module>     indented: its body
//!   ValueError: no such file                <- the first line that is not: the exception, where it ends
//! ```

use crate::oversight::report::shape;
use std::ops::Range;

/// How every Python traceback begins.
const HEAD: &str = "Traceback (most recent call last):";

/// So many different tracebacks are remembered; what comes after them is shown in full.
const REMEMBERED: usize = 32;

/// A traceback among the bytes that a rank has written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Traceback {
    /// Where it begins.
    pub(crate) start: usize,
    /// Where it ends, behind the exception's line; `None` while more of it is to come.
    pub(crate) end: Option<usize>,
}

impl Traceback {
    /// The first one in `text`, which begins at the start of a line.
    pub(crate) fn find(text: &[u8]) -> Option<Self> {
        let mut lines = lines(text);
        let start = lines.by_ref().find(|at| at.ended && line(text, at) == HEAD.as_bytes())?.bytes.start;
        let end = lines.find(|at| at.ended && !line(text, at).starts_with(b" ")).map(|at| at.bytes.end);
        Some(Self { start, end })
    }
}

struct Line {
    bytes: Range<usize>,
    ended: bool,
}

fn lines(text: &[u8]) -> impl Iterator<Item = Line> {
    let mut at = 0;
    text.split_inclusive(|byte| *byte == b'\n').map(move |line| {
        let start = at;
        at += line.len();
        Line { bytes: start..at, ended: line.ends_with(b"\n") }
    })
}

/// A line without its end, and without the rank that torch puts before it.
fn line<'a>(text: &'a [u8], at: &Line) -> &'a [u8] {
    let line = text[at.bytes.clone()].trim_ascii_end();
    let Some(rest) = line.strip_prefix(b"[rank") else { return line };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    rest[digits..].strip_prefix(b"]: ").or(rest[digits..].strip_prefix(b"]:")).unwrap_or(line)
}

/// The tracebacks that have been shown.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    /// What each says but for numbers, and which rank has said it first.
    tracebacks: Vec<(String, usize)>,
}

impl Shown {
    /// Takes a whole traceback of a rank. Where another rank has written the same, returns its exception and that rank: this is enough of
    /// it. One that its own rank repeats is shown.
    pub(crate) fn is_again(&mut self, rank: usize, traceback: &[u8]) -> Option<(String, usize)> {
        let lines: Vec<String> =
            lines(traceback).map(|at| String::from_utf8_lossy(line(traceback, &at)).into_owned()).collect();
        let shape = shape(&lines);
        match self.tracebacks.iter().find(|(known, _)| *known == shape) {
            Some((_, first)) if *first != rank => Some((lines.last().cloned().unwrap_or_default(), *first)),
            Some(_) => None,
            None => {
                if self.tracebacks.len() < REMEMBERED {
                    self.tracebacks.push((shape, rank));
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "warning\nTraceback (most recent call last):\n  File \"a\", line 1\n    f()\nE: no\nmore\n";

    #[test]
    fn from_its_head_to_the_exception() {
        let found = |text: &str| Traceback::find(text.as_bytes());
        assert_eq!(found(TEXT), Some(Traceback { start: 8, end: Some(TEXT.len() - "more\n".len()) }));
        // However much of it has come.
        for length in 0..TEXT.len() {
            let found = found(&TEXT[..length]);
            let (begun, whole) = (length >= 43, length >= TEXT.len() - "more\n".len());
            assert_eq!(found.is_some(), begun, "{length}");
            assert_eq!(found.is_some_and(|found| found.end.is_some()), whole, "{length}");
        }
        let torch = "[rank1]: Traceback (most recent call last):\r\n[rank1]:   File\r\n[rank1]: E\r\n";
        assert_eq!(found(torch), Some(Traceback { start: 0, end: Some(torch.len()) }));
        assert_eq!(found("a Traceback (most recent call last):\nb\n"), None);
    }

    #[test]
    fn the_same_but_for_numbers_of_another_rank() {
        let mut shown = Shown::default();
        let text = |rank: usize, line: usize| format!("{HEAD}\n  File \"a\", line {line}\nE: rank {rank}\n");
        assert_eq!(shown.is_again(2, text(2, 7).as_bytes()), None);
        assert_eq!(shown.is_again(10, text(10, 7).as_bytes()), Some(("E: rank 10".to_owned(), 2)));
        assert_eq!(shown.is_again(2, text(2, 7).as_bytes()), None, "its own again");
        let prefixed = text(1, 7).replace('\n', "\n[rank1]: ");
        let prefixed = format!("[rank1]: {}", prefixed.trim_end_matches("[rank1]: "));
        assert_eq!(shown.is_again(1, prefixed.as_bytes()), Some(("E: rank 1".to_owned(), 2)));
        assert_eq!(shown.is_again(0, format!("{HEAD}\nValueError: other\n").as_bytes()), None);
    }

    #[test]
    fn memory_stays_bounded() {
        let mut shown = Shown::default();
        for name in 0..1000 {
            let name: String = format!("{name}").bytes().map(|digit| char::from(digit + 17)).collect();
            shown.is_again(0, format!("{HEAD}\n{name}\n").as_bytes());
        }
        assert_eq!(shown.tracebacks.len(), REMEMBERED);
    }
}
