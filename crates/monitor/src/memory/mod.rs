//! Memory before it is allocated: what a run needs, what the host has, and what to change where it does not fit.
//!
//! ```text
//! config + parameters -> Facts -> Plan   bytes by kind and tier, per rank and per host      pure
//!                                  |
//! /proc, control groups -> Free ---+--> Verdict   fits, or the smallest change that does    pure
//!                                  |
//! /proc/self/smaps_rollup -> Actual --> planned against actual, for the log
//! ```
//!
//! The plan counts what the engine keeps: weights, gradients, optimizer state and its own buffers. Activations and what
//! the program itself allocates come on top.

mod actual;
mod estimate;
mod facts;
mod free;
mod from_config;
mod plan;
mod quantity;
mod render;
mod verdict;

pub use actual::{Actual, actual, parse_smaps_rollup, planned_against_actual};
pub use estimate::{Estimate, Zero2, Zero3};
pub use facts::{Elements, Facts, ParamCounts};
pub use free::{Free, Limit, LimitOrigin, Sources};
pub use plan::{Amount, Kind, Plan, Row, Tier};
pub use quantity::{Bytes, Count, QuantityError, parse_bytes, parse_count};
pub use render::{Report, start_block};
pub use verdict::{Change, Shortage, Verdict, judge};
