//! The last part of a rank's stderr, kept for the report.

use crate::merge::last_state;

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

    /// The text, as far as it is kept.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes[self.bytes.len().saturating_sub(KEPT)..]).into_owned()
    }

    /// The lines worth showing: from the last Python traceback on if there is one, else the last few; progress bars in their
    /// last state.
    pub(crate) fn last_lines(&self) -> Vec<String> {
        let text = self.text();
        let lines: Vec<String> = text
            .split('\n')
            .map(|line| String::from_utf8_lossy(last_state(line.as_bytes())).trim_end().to_owned())
            .collect();
        let end = lines.iter().rposition(|line| !line.is_empty()).map_or(0, |last| last + 1);
        let lines = &lines[..end];
        let traceback = lines.iter().rposition(|line| line.starts_with("Traceback (most recent call last)"));
        match traceback {
            Some(start) if end - start <= SHOWN => lines[start..].to_vec(),
            // A long traceback: its head says little, its end says what happened.
            Some(_) => lines[end - SHOWN..].to_vec(),
            None => lines[end.saturating_sub(SHOWN_PLAIN)..].to_vec(),
        }
    }
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
