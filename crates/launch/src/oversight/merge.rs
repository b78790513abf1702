//! The output of all ranks as one readable stream.
//!
//! - Rank 0 speaks for the job: its bytes pass unprefixed, so that progress bars and colours work. A line that it has begun is held for
//!   a moment and then shown as it is, for a prompt or a bar has no line end.
//! - The others' lines come whole, as `[rank 1] ...`. Of a line that was overwritten with carriage returns (a progress bar), the last
//!   state is shown.
//! - A line of another rank never lands inside one of rank 0: on a terminal the begun line is wiped, and drawn again below; elsewhere
//!   it is ended first.
//! - A traceback is held until it is whole, or for a moment. Where another rank has written the same, its exception is shown alone.
//! - With a world of one, every byte passes as it comes.
//!
//! The clock is passed in and nothing is written here: the result is a list of bytes for stdout and stderr.

use crate::oversight::fold::{Shown, Traceback};
use std::time::Duration;

/// How long a begun line of rank 0 is held, in case its end is about to come (an unbuffered Python writes it by itself).
const HOLD: Duration = Duration::from_millis(40);

/// How long the end of a traceback is waited for: Python writes it piece by piece.
const HOLD_TRACEBACK: Duration = Duration::from_millis(250);

/// A line without an end is cut here.
const MAX_LINE: usize = 64 * 1024;

/// One of the two outputs of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Bytes for one of the launcher's own outputs.
pub(crate) type Output = (Stream, Vec<u8>);

/// Merges the outputs of the ranks.
#[derive(Debug)]
pub(crate) struct Merger {
    /// The rank of the first one, who speaks for the job here.
    first: usize,
    world: usize,
    terminal: [bool; 2],
    /// What each rank has begun and not ended, for stdout and stderr.
    pending: Vec<[Vec<u8>; 2]>,
    /// When rank 0's begun line is due.
    due: [Option<Duration>; 2],
    /// When what each rank holds back of a traceback is due.
    tracebacks_due: Vec<Option<Duration>>,
    shown: Shown,
    /// Rank 0's begun line as it stands on the screen, for each screen.
    open: [Vec<u8>; 2],
}

impl Merger {
    /// Begins with `world` ranks from `first` on, which are counted from 0 here; `terminal` says for stdout and stderr whether they are
    /// one.
    pub(crate) fn new(first: usize, world: usize, terminal: [bool; 2]) -> Self {
        Self {
            first,
            world,
            terminal,
            pending: vec![Default::default(); world],
            due: [None; 2],
            tracebacks_due: vec![None; world],
            shown: Shown::default(),
            open: Default::default(),
        }
    }

    /// Where the cursor of a stream is: two terminals are the same one.
    fn screen(&self, stream: Stream) -> usize {
        if self.terminal == [true, true] { 0 } else { stream as usize }
    }

    /// Takes bytes of a rank and returns what is to be written.
    pub(crate) fn push(&mut self, now: Duration, rank: usize, stream: Stream, bytes: &[u8]) -> Vec<Output> {
        if self.world == 1 {
            return vec![(stream, bytes.to_vec())];
        }
        self.pending[rank][stream as usize].extend_from_slice(bytes);
        let mut outputs = if stream == Stream::Stderr { self.tracebacks(now, rank) } else { Vec::new() };
        let is_held = stream == Stream::Stderr && self.tracebacks_due[rank].is_some();
        if !is_held {
            outputs.extend(self.begun(now, rank, stream));
        }
        outputs
    }

    /// Takes in all that is not a traceback, but for a begun line.
    fn begun(&mut self, now: Duration, rank: usize, stream: Stream) -> Vec<Output> {
        if rank != 0 {
            return self.whole_lines(rank, stream);
        }
        let pending = &mut self.pending[rank][stream as usize];
        let is_bar = pending.contains(&b'\r') || pending.len() > MAX_LINE;
        let ready = match pending.iter().rposition(|byte| *byte == b'\n') {
            _ if is_bar => pending.len(),
            Some(end) => end + 1,
            None => 0,
        };
        let text: Vec<u8> = pending.drain(..ready).collect();
        self.due[stream as usize] = if pending.is_empty() { None } else { Some(now + HOLD) };
        self.show(stream, text)
    }

    /// Takes in what a rank's stderr holds up to the end of the last whole traceback; what is begun of one is held.
    fn tracebacks(&mut self, now: Duration, rank: usize) -> Vec<Output> {
        let mut outputs = Vec::new();
        loop {
            let pending = &mut self.pending[rank][Stream::Stderr as usize];
            let Some(found) = Traceback::find(pending).filter(|_| pending.len() <= MAX_LINE) else {
                self.tracebacks_due[rank] = None;
                return outputs;
            };
            let before: Vec<u8> = pending.drain(..found.start).collect();
            outputs.extend(self.as_they_are(rank, Stream::Stderr, before));
            let Some(end) = found.end else {
                self.tracebacks_due[rank].get_or_insert(now + HOLD_TRACEBACK);
                if rank == 0 {
                    self.due[Stream::Stderr as usize] = None;
                }
                return outputs;
            };
            self.tracebacks_due[rank] = None;
            let pending = &mut self.pending[rank][Stream::Stderr as usize];
            let text: Vec<u8> = pending.drain(..end - found.start).collect();
            outputs.extend(match self.shown.is_again(rank, &text) {
                None => self.as_they_are(rank, Stream::Stderr, text),
                Some((exception, first)) => {
                    let line = format!("{exception} (the traceback is that of rank {})", self.first + first);
                    self.prefixed(rank, Stream::Stderr, line.as_bytes())
                }
            });
        }
    }

    /// Lines of a rank, the last of which need not have an end.
    fn as_they_are(&mut self, rank: usize, stream: Stream, text: Vec<u8>) -> Vec<Output> {
        if rank == 0 {
            return self.show(stream, text);
        }
        let lines = text.split_inclusive(|byte| *byte == b'\n');
        lines.flat_map(|line| self.prefixed(rank, stream, line)).collect()
    }

    /// Returns what has been held long enough.
    pub(crate) fn tick(&mut self, now: Duration) -> Vec<Output> {
        let mut outputs = Vec::new();
        for rank in 0..self.world {
            if self.tracebacks_due[rank].is_some_and(|due| due <= now) {
                self.tracebacks_due[rank] = None;
                outputs.extend(self.begun(now, rank, Stream::Stderr));
            }
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            if self.due[stream as usize].is_some_and(|due| due <= now) {
                self.due[stream as usize] = None;
                let text = std::mem::take(&mut self.pending[0][stream as usize]);
                outputs.extend(self.show(stream, text));
            }
        }
        outputs
    }

    /// When to come back with [`Merger::tick`].
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.due.iter().chain(&self.tracebacks_due).flatten().min().copied()
    }

    /// Returns what a rank that is over has begun and not ended.
    pub(crate) fn finish(&mut self, rank: usize) -> Vec<Output> {
        let mut outputs = Vec::new();
        self.tracebacks_due[rank] = None;
        for stream in [Stream::Stdout, Stream::Stderr] {
            let text = std::mem::take(&mut self.pending[rank][stream as usize]);
            if rank == 0 {
                self.due[stream as usize] = None;
            }
            outputs.extend(self.as_they_are(rank, stream, text));
        }
        outputs
    }

    /// Returns a line end for each screen on which a line is begun, so that the launcher's own words start on a fresh one.
    pub(crate) fn end_lines(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let screen = self.screen(stream);
            if !std::mem::take(&mut self.open[screen]).is_empty() {
                outputs.push((stream, b"\n".to_vec()));
            }
        }
        outputs
    }

    /// Rank 0's bytes as they are, noting the line that they leave begun.
    fn show(&mut self, stream: Stream, text: Vec<u8>) -> Vec<Output> {
        if text.is_empty() {
            return Vec::new();
        }
        let screen = self.screen(stream);
        let open = &mut self.open[screen];
        let line_start = match text.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => {
                open.clear();
                end + 1
            }
            None => 0,
        };
        open.extend_from_slice(&text[line_start..]);
        // What stands before a carriage return followed by text is overwritten.
        let visible = open.iter().rposition(|byte| *byte != b'\r').map_or(0, |last| last + 1);
        if let Some(restart) = open[..visible].iter().rposition(|byte| *byte == b'\r') {
            open.drain(..restart);
        }
        if open.len() > MAX_LINE {
            open.clear();
        }
        vec![(stream, text)]
    }

    /// The ended lines of another rank.
    fn whole_lines(&mut self, rank: usize, stream: Stream) -> Vec<Output> {
        let mut outputs = Vec::new();
        loop {
            let pending = &mut self.pending[rank][stream as usize];
            let end = match pending.iter().position(|byte| *byte == b'\n') {
                Some(end) => end + 1,
                None if pending.len() > MAX_LINE => pending.len(),
                None => return outputs,
            };
            let line: Vec<u8> = pending.drain(..end).collect();
            outputs.extend(self.prefixed(rank, stream, &line));
        }
    }

    /// One line of another rank, placed so that it does not land inside a line of rank 0.
    fn prefixed(&mut self, rank: usize, stream: Stream, line: &[u8]) -> Vec<Output> {
        let line = last_state(line);
        let rank = self.first + rank;
        // torch begins each line of a traceback with `[rank1]: `; once is enough.
        let line = line.strip_prefix(format!("[rank{rank}]: ").as_bytes()).unwrap_or(line);
        let screen = self.screen(stream);
        let mut text = Vec::with_capacity(line.len() + 16);
        let begun = !self.open[screen].is_empty();
        if begun && self.terminal[stream as usize] {
            text.extend_from_slice(b"\r\x1b[K");
        } else if begun {
            text.push(b'\n');
            self.open[screen].clear();
        }
        text.extend_from_slice(format!("[rank {rank}] ").as_bytes());
        text.extend_from_slice(line);
        text.push(b'\n');
        text.extend_from_slice(&self.open[screen]);
        vec![(stream, text)]
    }
}

/// What a terminal would show of a line in the end: the text after the last carriage return, line end removed.
pub(crate) fn last_state(line: &[u8]) -> &[u8] {
    let end = line.iter().rposition(|byte| !matches!(byte, b'\n' | b'\r')).map_or(0, |last| last + 1);
    let line = &line[..end];
    line.iter().rposition(|byte| *byte == b'\r').map_or(line, |restart| &line[restart + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use Stream::{Stderr, Stdout};
    use proptest::prelude::*;

    const T0: Duration = Duration::ZERO;

    fn text(outputs: Vec<Output>) -> String {
        outputs.into_iter().map(|(_, bytes)| String::from_utf8(bytes).unwrap()).collect()
    }

    #[test]
    fn a_world_of_one_passes_every_byte() {
        let mut merger = Merger::new(0, 1, [true, true]);
        assert_eq!(text(merger.push(T0, 0, Stdout, b"a")), "a");
        assert_eq!(text(merger.push(T0, 0, Stderr, b"\rb")), "\rb");
    }

    #[test]
    fn others_come_in_whole_lines_with_a_prefix() {
        let mut merger = Merger::new(0, 2, [false, false]);
        assert_eq!(text(merger.push(T0, 1, Stdout, b"lo")), "");
        assert_eq!(text(merger.push(T0, 1, Stdout, b"ss 1\nnext\nth")), "[rank 1] loss 1\n[rank 1] next\n");
        assert_eq!(text(merger.push(T0, 0, Stdout, b"mine\n")), "mine\n");
        assert_eq!(text(merger.finish(1)), "[rank 1] th\n");
        assert_eq!(text(merger.push(T0, 1, Stderr, b"10%\r20%\r30%\r\n")), "[rank 1] 30%\n");
        assert_eq!(
            text(merger.push(T0, 1, Stderr, b"[rank1]: E\n[rank2]: E\n")),
            "[rank 1] E\n[rank 1] [rank2]: E\n"
        );
    }

    #[test]
    fn the_line_end_that_comes_by_itself_is_waited_for() {
        let mut merger = Merger::new(0, 2, [false, false]);
        assert_eq!(text(merger.push(T0, 0, Stdout, b"hello")), "");
        assert_eq!(merger.deadline(), Some(HOLD));
        assert_eq!(text(merger.push(T0, 1, Stdout, b"x\n")), "[rank 1] x\n");
        assert_eq!(text(merger.push(T0, 0, Stdout, b"\n")), "hello\n");
        assert_eq!(merger.deadline(), None);
    }

    #[test]
    fn a_prompt_is_shown_after_a_moment() {
        let mut merger = Merger::new(0, 2, [false, false]);
        merger.push(T0, 0, Stdout, b"name? ");
        assert_eq!(text(merger.tick(HOLD / 2)), "");
        assert_eq!(text(merger.tick(HOLD)), "name? ");
        assert_eq!(text(merger.push(HOLD, 1, Stdout, b"x\n")), "\n[rank 1] x\n");
        assert_eq!(text(merger.end_lines()), "");
    }

    #[test]
    fn a_bar_on_a_terminal_is_drawn_again_below() {
        let mut merger = Merger::new(0, 2, [true, true]);
        assert_eq!(text(merger.push(T0, 0, Stderr, b"\r10%")), "\r10%");
        assert_eq!(text(merger.push(T0, 0, Stderr, b"\r20%")), "\r20%");
        assert_eq!(text(merger.push(T0, 1, Stdout, b"x\n")), "\r\x1b[K[rank 1] x\n\r20%");
        assert_eq!(text(merger.end_lines()), "\n");
    }

    #[test]
    fn a_bar_elsewhere_is_ended_first() {
        let mut merger = Merger::new(0, 2, [false, false]);
        merger.push(T0, 0, Stderr, b"\r10%");
        assert_eq!(text(merger.push(T0, 1, Stdout, b"x\n")), "[rank 1] x\n");
        assert_eq!(text(merger.push(T0, 1, Stderr, b"y\n")), "\n[rank 1] y\n");
    }

    const TRACEBACK: &[u8] = b"Traceback (most recent call last):\n  File\n";

    #[test]
    fn the_same_traceback_comes_once() {
        let mut merger = Merger::new(4, 3, [false, false]);
        assert_eq!(text(merger.push(T0, 1, Stderr, TRACEBACK)), "");
        assert_eq!(
            text(merger.push(T0, 1, Stderr, b"E: rank 5\nmore\n")),
            "[rank 5] Traceback (most recent call last):\n[rank 5]   File\n[rank 5] E: rank 5\n[rank 5] more\n"
        );
        assert_eq!(text(merger.push(T0, 2, Stderr, b"before\n")), "[rank 6] before\n");
        merger.push(T0, 2, Stderr, TRACEBACK);
        assert_eq!(
            text(merger.push(T0, 2, Stderr, b"E: rank 6\nmore\n")),
            "[rank 6] E: rank 6 (the traceback is that of rank 5)\n[rank 6] more\n"
        );
        assert_eq!(text(merger.push(T0, 0, Stderr, &[b"mine\n", TRACEBACK].concat())), "mine\n");
        assert_eq!(
            text(merger.push(T0, 0, Stderr, b"E: rank 4\n")),
            "[rank 4] E: rank 4 (the traceback is that of rank 5)\n"
        );
        assert_eq!(merger.deadline(), None);
    }

    #[test]
    fn a_traceback_that_does_not_end_is_shown_after_a_moment() {
        let mut merger = Merger::new(0, 2, [false, false]);
        for (rank, prefix) in [(0, ""), (1, "[rank 1] ")] {
            let shown = format!("{prefix}Traceback (most recent call last):\n{prefix}  File\n");
            assert_eq!(text(merger.push(T0, rank, Stderr, TRACEBACK)), "");
            assert_eq!(merger.deadline(), Some(HOLD_TRACEBACK));
            assert_eq!(text(merger.tick(HOLD_TRACEBACK)), shown);
            assert_eq!(merger.deadline(), None);
            assert_eq!(text(merger.push(T0, rank, Stderr, TRACEBACK)), "");
            assert_eq!(text(merger.finish(rank)), shown);
        }
    }

    proptest! {
        /// No byte of any rank is lost or invented, whatever the pieces in which they come.
        #[test]
        fn nothing_is_lost(pieces in prop::collection::vec((0usize..3, "[ab\n]{0,6}", 0u64..60), 0..30)) {
            let mut merger = Merger::new(0, 3, [false, false]);
            let mut sent = vec![String::new(); 3];
            let mut seen = String::new();
            let mut now = T0;
            for (rank, piece, wait) in pieces {
                now += Duration::from_millis(wait);
                seen += &text(merger.tick(now));
                seen += &text(merger.push(now, rank, Stdout, piece.as_bytes()));
                sent[rank] += &piece;
            }
            for rank in 0..3 {
                seen += &text(merger.finish(rank));
            }
            for rank in [1, 2] {
                let prefix = format!("[rank {rank}] ");
                let lines: Vec<&str> = seen.lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
                prop_assert_eq!(lines, sent[rank].lines().collect::<Vec<_>>());
            }
            let letters = |text: &str| text.chars().filter(|c| "ab".contains(*c)).collect::<String>();
            let rest: String = seen.lines().filter(|line| !line.starts_with("[rank")).collect();
            prop_assert_eq!(letters(&rest), letters(&sent[0]));
        }
    }
}
