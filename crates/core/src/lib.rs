//! Ids, dtypes, flat layout arithmetic, aligned buffers and borrowed spans. No I/O, no threads, no policy.
//!
//! ```text
//! params in registration order      p0      p1   p2          p3
//!                                   |       |    |           |
//! Layout groups them into units   [ unit 0: p0 p1 p2 pad ] [ unit 1: p3 pad ]
//! each unit is cut into shards    [ rank 0  |  rank 1    ] [ rank 0 | rank 1 ]
//! ```

mod blocks;
mod buffer;
mod dtype;
mod ids;
mod layout;
mod span;

pub use buffer::AlignedBuffer;
pub use dtype::{DType, ParseDTypeError};
pub use ids::{ParamId, Rank, UnitId};
pub use layout::{Fragment, Layout, LayoutError, ParamSlot, ParamSpec, SHARD_ALIGN, Unit};
pub use span::{Span, SpanMut};
