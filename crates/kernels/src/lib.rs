//! Loops over slices with SIMD chosen at run time: casts, sums, norms, optimizer updates.
//!
//! Every loop is written once, as plain Rust, and compiled three times: for the baseline of the target, for AVX2
//! and for AVX-512 (the `kernel!` macro). The compiler vectorises the copies; it never fuses a multiplication with
//! an addition, and every sum has a fixed order, so the three give the same bits. The one exception is a NaN that
//! arithmetic produces: it is a NaN everywhere, but its sign and payload in fp32 are not specified. Casts to
//! 16 bits give one canonical NaN.
//!
//! ```text
//! memory    | block | block | block | ...      one pass: a block of each array is brought to the first-level
//!              |                               cache, worked on by several small loops there, and written back
//!              +-> widen grad -> update -> cast to the model's dtype
//! ```
//!
//! Nothing here starts threads but [`parallel`], and nothing decides a policy.

mod cast;
mod copy;
mod element;
mod isa;
pub mod parallel;
mod reduce;
pub mod update;

pub use cast::{cast, cast_on};
pub use copy::copy_past_cache;
pub use isa::{Isa, UnknownIsa};
pub use reduce::{
    add_assign, add_assign_on, reduce_ranks, reduce_ranks_on, scale_in_place, scale_in_place_on, sum_squares,
    sum_squares_on,
};

/// Elements worked on at a time: six fp32 arrays of it fill less than half of a first-level cache of 32 KiB, which
/// leaves room for what the processor fetches ahead.
///
/// A multiple of the number of summation lanes, so that blocks do not show in the order of a sum.
const BLOCK: usize = 512;
