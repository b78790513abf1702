//! The last part of a rank's stderr, kept for the report.

use crate::oversight::merge::last_state;

/// How many bytes are kept.
const KEPT: usize = 32 * 1024;

/// At most this many lines of it are shown.
const SHOWN: usize = 40;

/// So many lines are shown where there is no traceback to begin at.
const SHOWN_PLAIN: usize = 20;

/// The last bytes of an output.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    /// Takes further bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        // Cutting at twice the size spares a move for each push.
        if self.bytes.len() > 2 * KEPT {
            self.bytes.drain(..self.bytes.len() - KEPT);
        }
    }

    /// The lines as far as they are kept: progress bars in their last state, without the rank that torch puts before each line
    /// of a traceback, without the empty ones at the end.
    fn lines(&self) -> Vec<String> {
        let kept = &self.bytes[self.bytes.len().saturating_sub(KEPT)..];
        let mut lines: Vec<String> = kept
            .split(|byte| *byte == b'\n')
            .map(|line| {
                let line = String::from_utf8_lossy(last_state(line)).trim_end().to_owned();
                without_rank(&line).to_owned()
            })
            .collect();
        let end = lines.iter().rposition(|line| !line.is_empty()).map_or(0, |last| last + 1);
        lines.truncate(end);
        lines
    }

    /// The lines worth showing: from the last Python traceback on if there is one, else the last few.
    pub(crate) fn last_lines(&self) -> Vec<String> {
        let lines = self.lines();
        let start = match lines.iter().rposition(|line| is_traceback(line)) {
            // A long traceback: its head says little, its end says what happened.
            Some(start) => start.max(lines.len().saturating_sub(SHOWN)),
            None => lines.len().saturating_sub(SHOWN_PLAIN),
        };
        lines[start..].to_vec()
    }

    /// What the process says that it died of: the exception of the last Python traceback, else its last few lines.
    pub(crate) fn last_words(&self) -> String {
        let lines = self.lines();
        let is_word = |line: &&String| !line.is_empty() && !line.starts_with(char::is_whitespace);
        match lines.iter().rposition(|line| is_traceback(line)) {
            // Its body is indented; the exception's message may go on for a line.
            Some(start) => {
                lines[start + 1..].iter().filter(is_word).take(2).cloned().collect::<Vec<_>>().join("\n")
            }
            None => lines.iter().rev().filter(is_word).take(3).cloned().collect::<Vec<_>>().join("\n"),
        }
    }
}

fn is_traceback(line: &str) -> bool {
    line.starts_with("Traceback (most recent call last)")
}

/// A line without a leading `[rank3]: `.
fn without_rank(line: &str) -> &str {
    let rest = line.strip_prefix("[rank").map(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit()));
    rest.and_then(|rest| rest.strip_prefix("]: ").or(rest.strip_prefix("]:"))).unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_the_traceback_on() {
        let mut tail = Tail::default();
        tail.push(b"warning\n 1%\r 2%\nTraceback (most recent call last):\n  File \"x\", line 1\n");
        tail.push(b"ValueError: no\n\n");
        assert_eq!(
            tail.last_lines(),
            ["Traceback (most recent call last):", "  File \"x\", line 1", "ValueError: no"]
        );
        assert_eq!(tail.last_words(), "ValueError: no");
        let mut tail = Tail::default();
        tail.push(b"[rank1]: Traceback (most recent call last):\n[rank1]:   File \"x\"\n[rank1]: E: [rank 0] gone\n");
        tail.push(b"[rank1]: more\n[rank1]: frame #0\n");
        assert_eq!(tail.last_lines()[..2], ["Traceback (most recent call last):", "  File \"x\""]);
        assert_eq!(tail.last_words(), "E: [rank 0] gone\nmore");
        let mut tail = Tail::default();
        tail.push(b"a\n10%\r20%\r");
        assert_eq!(tail.last_lines(), ["a", "20%"]);
        assert!(Tail::default().last_lines().is_empty());
    }

    #[test]
    fn memory_stays_bounded_and_bytes_need_not_be_text() {
        let mut tail = Tail::default();
        for n in 0..20_000 {
            tail.push(format!("line {n} \u{fffd}\n").as_bytes());
            tail.push(&[0xff, b'\n']);
        }
        assert!(tail.bytes.len() <= 2 * KEPT + 64);
        assert_eq!(tail.last_lines().len(), SHOWN_PLAIN);
        assert_eq!(tail.last_lines()[SHOWN_PLAIN - 2], "line 19999 \u{fffd}");
    }
}
