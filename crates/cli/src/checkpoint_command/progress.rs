//! A progress bar for what takes longer than two seconds; none where standard error is no terminal.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use deepspeed_checkpoint::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is done sooner needs no bar.
const PATIENCE: Duration = Duration::from_secs(2);

/// Shows how far an operation has come.
pub(super) struct Bar {
    bar: ProgressBar,
    /// When the bar is to be shown; `None` once it is.
    hidden_until: Mutex<Option<Instant>>,
}

impl Bar {
    pub(super) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let template = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
        // The template is a constant; were it wrong, the plain bar would do.
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Self { bar, hidden_until: Mutex::new(Some(Instant::now() + PATIENCE)) }
    }
}

impl Progress for Bar {
    fn begin(&self, what: &str, bytes: u64) {
        self.bar.set_position(0);
        self.bar.set_length(bytes);
        self.bar.set_message(what.to_owned());
    }

    fn advance(&self, bytes: u64) {
        let mut hidden_until = self.hidden_until.lock().unwrap_or_else(PoisonError::into_inner);
        if hidden_until.is_some_and(|until| Instant::now() >= until) {
            *hidden_until = None;
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
