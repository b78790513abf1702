//! Checkpoints of the original DeepSpeed: reading them where they lie, and writing them.
//!
//! ```text
//! DIR/latest                                                 the tag
//! DIR/TAG/mp_rank_00_model_states.pt                         stages 0-2: weights, buffers, counters, client state
//!         [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1-3: rank R's masters and optimizer state, flat
//!         zero_pp_rank_R_mp_rank_00_model_states.pt          stage 3: shapes, buffers, counters, client state
//!         zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt             universal: a file per parameter and kind
//! ```
//!
//! The files are Python pickles, which can hold programs. None is executed: [`pickle`] turns a file into values, knows
//! the few classes that stand for plain things, and refuses every other where a value is needed. Elements are read from
//! where they lie when they are asked for, so that a rank of any world reads its own part and nothing else.

mod blob;
mod damage;
mod files;
mod index;
mod model;
mod optimizer;
pub(crate) mod pickle;
mod source;
pub(crate) mod torch;
mod universal;
mod whole;
mod writing;

pub(crate) use files::is_original;
pub use source::OriginalCheckpoint;
pub use writing::{OriginalOptions, WholeState, write_original, write_universal};
