//! A store and its streams through their public doors, with both engines, on real filesystems.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says what it skips"
)]

mod faults;
mod passes;
mod spans;
mod support;
