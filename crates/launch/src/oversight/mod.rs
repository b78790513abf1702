//! What a job on one host and a job on several have in common: its output merged and written, the watch kept, the report composed.
//!
//! Nothing is sent from here. The signals that the ranks are to get are collected, and whoever holds the ranks takes and sends them.

pub(crate) mod fold;
pub(crate) mod merge;
pub(crate) mod report;
pub(crate) mod tail;
pub(crate) mod watch;

use crate::console::Console;
use crate::job::attempts::JobEnd;
use crate::oversight::merge::{Merger, Output, Stream};
use crate::oversight::report::RankFacts;
use crate::oversight::watch::{Action, Event, Outcome, Patience, Watch, is_victim};
use crate::ranks::signals::{self, Ending};
use signal_hook::consts::signal::{SIGKILL, SIGPIPE, SIGTERM};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// How long to wait for the end of processes that were killed; one that hangs in the kernel may never end.
const AFTER_KILL: Duration = Duration::from_secs(3);

/// How the ranks are spoken of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wording {
    /// `the ranks`
    pub(crate) ranks: &'static str,
    /// `no rank is left`
    pub(crate) none_left: &'static str,
}

/// The watch over a job and its output. Ranks are counted from 0; the first has the rank `first` in the job.
#[derive(Debug)]
pub(crate) struct Oversight<'a> {
    console: &'a Console,
    wording: Wording,
    began: Instant,
    first: usize,
    merger: Merger,
    watch: Watch,
    killed_at: Option<Duration>,
    signals: Vec<i32>,
}

impl<'a> Oversight<'a> {
    /// Begins with `world` running ranks.
    pub(crate) fn new(console: &'a Console, wording: Wording, first: usize, world: usize) -> Self {
        Self {
            console,
            wording,
            began: Instant::now(),
            first,
            merger: Merger::new(first, world, [io::stdout().is_terminal(), io::stderr().is_terminal()]),
            watch: Watch::new(world, Patience::default()),
            killed_at: None,
            signals: Vec::new(),
        }
    }

    /// The time since the start.
    pub(crate) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Whether every rank is over.
    pub(crate) fn is_over(&self) -> bool {
        self.watch.is_over()
    }

    /// Whether every rank is over and has done what it should.
    pub(crate) fn is_success(&self) -> bool {
        self.watch.outcome() == Some(Outcome::Success)
    }

    /// When to come back with [`Oversight::tick`] if nothing happens before.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let kill = self.killed_at.map(|at| at + AFTER_KILL + Duration::from_millis(1));
        [self.watch.deadline(), self.merger.deadline(), kill].into_iter().flatten().min()
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self) {
        self.on(Event::Tick);
        let held = self.merger.tick(self.now());
        self.write(held);
        if self.killed_at.is_some_and(|at| self.now() > at + AFTER_KILL) {
            self.watch.give_up();
        }
    }

    /// A rank has written something.
    pub(crate) fn output(&mut self, index: usize, stream: Stream, bytes: &[u8]) {
        let outputs = self.merger.push(self.now(), index, stream, bytes);
        self.write(outputs);
    }

    /// A rank is over; `last_words` are the last it has said.
    pub(crate) fn ended(&mut self, index: usize, ending: Ending, last_words: &str) {
        let rest = self.merger.finish(index);
        self.write(rest);
        self.on(Event::Ended { rank: index, ending, victim: is_victim(last_words) });
    }

    /// A host is gone, and with it `count` ranks from `first` on.
    pub(crate) fn host_lost(&mut self, first: usize, count: usize) {
        for index in first..first + count {
            let rest = self.merger.finish(index);
            self.write(rest);
        }
        self.on(Event::HostLost { first, count });
    }

    /// Lets the watch decide what follows from an event.
    pub(crate) fn on(&mut self, event: Event) {
        let now = self.now();
        match self.watch.on(now, event) {
            None => {}
            Some(Action::PassOn(SIGPIPE)) => {
                self.say(false, "nobody reads the output any more: ending the ranks");
                // A rank that ignores SIGPIPE, as Python does, would not notice.
                self.signals.push(SIGTERM);
            }
            Some(Action::PassOn(signal)) => {
                let name = signals::name(signal).unwrap_or("a signal");
                let patience = Patience::default().interrupt.as_secs();
                let ranks = self.wording.ranks;
                self.say(
                    false,
                    &format!(
                        "{name}: passed on to {ranks}, which have {patience} s to finish; once more ends them at once"
                    ),
                );
                self.signals.push(signal);
            }
            Some(Action::Terminate) => self.signals.push(SIGTERM),
            Some(Action::Kill) => {
                self.killed_at = Some(now);
                self.signals.push(SIGKILL);
            }
        }
    }

    /// The signals that every rank is to get now, in order.
    pub(crate) fn take_signals(&mut self) -> Vec<i32> {
        std::mem::take(&mut self.signals)
    }

    /// Says something on a fresh line.
    pub(crate) fn say(&mut self, warning: bool, text: &str) {
        let ends = self.merger.end_lines();
        self.write(ends);
        if warning { self.console.warn(text) } else { self.console.info(text) }
    }

    /// How it went, when every rank is over and nothing is left of them.
    pub(crate) fn end(&mut self, facts: impl Fn(usize) -> RankFacts) -> JobEnd {
        let outcome = self.watch.outcome().unwrap_or(Outcome::Success);
        let ends = self.merger.end_lines();
        self.write(ends);
        let report = match outcome {
            Outcome::Success => None,
            Outcome::Failed { cause, ending } => {
                Some(report::compose(&self.watch, self.first, (cause, ending), outcome.exit_code(), facts))
            }
            Outcome::Interrupted(signal) => {
                let name = signals::name(signal).unwrap_or("a signal");
                self.console.info(&format!("ended by {name}; {}", self.wording.none_left));
                None
            }
        };
        JobEnd { outcome, report }
    }

    /// Writes merged output; a reader that went away (`| head`) ends the job.
    fn write(&mut self, outputs: Vec<Output>) {
        for (stream, bytes) in outputs {
            let result = match stream {
                Stream::Stdout => write_all(&mut io::stdout().lock(), &bytes),
                Stream::Stderr => write_all(&mut io::stderr().lock(), &bytes),
            };
            if result.is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
                && self.killed_at.is_none()
            {
                self.on(Event::Interrupted(SIGPIPE));
            }
        }
    }
}

fn write_all(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
