//! Counters, timers, the memory plan, the lines a user reads while training, and metrics for other programs.

mod comms_log;
mod counters;
pub mod memory;
pub mod metrics;
mod module_profile;
mod progress;
mod step_line;
mod timer;
mod timers;

pub use comms_log::CommsLog;
pub use counters::Counters;
pub use module_profile::{ModuleProfile, ReportOptions, shown, shown_seconds};
pub use progress::{PROGRESS_VARIABLE, Progress, ProgressFile};
pub use step_line::StepLine;
pub use timer::Timer;
pub use timers::{Phase, PhaseTimes, Stopwatch};
