//! Counters, timers, the memory plan and the lines a user reads while training.

mod counters;
pub mod memory;
mod progress;
mod step_line;
mod timers;

pub use counters::Counters;
pub use progress::{PROGRESS_VARIABLE, Progress, ProgressFile};
pub use step_line::StepLine;
pub use timers::{Phase, PhaseTimes, Stopwatch};
