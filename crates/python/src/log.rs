//! What the libraries have to say goes to Python's `DeepSpeed` logger.

use std::fmt::{self, Write};

use pyo3::prelude::*;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};

/// Hands warnings and errors over; what is finer is for native log tools.
struct PythonLogger;

/// An event as one line: its message, then its other fields.
#[derive(Default)]
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            write!(self.0, "{value:?}")
        } else {
            write!(self.0, " {}={value:?}", field.name())
        };
    }
}

impl Subscriber for PythonLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN && metadata.target().starts_with("deepspeed")
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let method = if *event.metadata().level() == Level::ERROR { "error" } else { "warning" };
        Python::attach(|py| {
            let logged = py
                .import("deepspeed.utils.logging")
                .and_then(|module| module.getattr("logger"))
                .and_then(|logger| logger.call_method1(method, ("%s", line.0)));
            if let Err(error) = logged {
                // A logger that fails must not end training; Python shows it as it shows errors in finalizers.
                error.write_unraisable(py, None);
            }
        });
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// Connects the libraries of this module, and of it alone, to Python's logging.
pub(crate) fn install() {
    // A second import of the module finds the first one's logger in place, which does the same.
    let _ = tracing::subscriber::set_global_default(PythonLogger);
}
