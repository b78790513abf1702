//! What the launcher says about itself, on stderr, by level.

use crate::arguments::args::LogLevel;
use std::io::{self, Write};

/// The launcher's own voice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Console {
    level: LogLevel,
}

impl Console {
    pub(crate) fn new(level: LogLevel) -> Self {
        Self { level }
    }

    /// A text of several lines.
    pub(crate) fn debug(&self, text: &str) {
        if self.level == LogLevel::Debug {
            say(text);
        }
    }

    pub(crate) fn info(&self, text: &str) {
        if self.level <= LogLevel::Info {
            say(&format!("deepspeed: {text}\n"));
        }
    }

    pub(crate) fn warn(&self, text: &str) {
        if self.level <= LogLevel::Warning {
            say(&format!("deepspeed: warning: {text}\n"));
        }
    }

    /// Errors and reports are never suppressed.
    pub(crate) fn error(&self, text: &str) {
        say(&format!("deepspeed: error: {text}\n"));
    }

    /// A text that brings its own form.
    pub(crate) fn report(&self, text: &str) {
        say(&format!("{}\n", text.trim_end()));
    }
}

/// Nobody can be told that stderr is gone.
fn say(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}
