//! Optimizer state (and gradient and weight shards) of one rank in a file on NVMe, streamed through memory.
//!
//! ```text
//!            Store: one private file                       Stream: a few buffers
//!   +-----------+-----------+------------+
//!   | region    | region    | region     |   read ahead    +--------+
//!   | master    | exp_avg   | exp_avg_sq | --------------> | slot 2 |   item k+1, on its way in
//!   +-----------+-----------+------------+                 +--------+
//!                                                          | slot 1 |   item k, in the caller's hands
//!                                          write behind    +--------+
//!                                        <---------------- | slot 0 |   item k-1, on its way out
//!                                                          +--------+
//! ```
//!
//! A [`Store`] is a file without a name, its space reserved when it is made. [`Region`]s of it are handed out once. A
//! [`Stream`] owns a fixed number of buffers; a [`Pass`] moves a sequence of [`Item`]s (one region per lane, say
//! master, `exp_avg` and `exp_avg_sq` of a piece of a shard) through them:
//!
//! ```
//! # use deepspeed_core::DType;
//! # use deepspeed_offload::{Access, Depth, Item, Lane, Options, Store, Stream};
//! # fn main() -> Result<(), deepspeed_offload::OffloadError> {
//! # let folder = std::env::temp_dir();
//! let len = 10_000;
//! let store = Store::create(&folder, 3 * Store::bytes_of(len, DType::F32), &Options::default())?;
//! let [master, exp_avg, exp_avg_sq] =
//!     [store.allocate(len, DType::F32)?, store.allocate(len, DType::F32)?, store.allocate(len, DType::F32)?];
//! let items: Vec<Item> = Item::cut(0, &[master, exp_avg, exp_avg_sq], 4096).collect();
//!
//! let mut stream = Stream::new(&store, &[Lane::f32(4096); 3], Depth { read_ahead: 1, write_behind: 1 });
//! let mut pass = stream.pass(&items, &[Access::Update; 3])?;
//! while let Some(mut item) = pass.load_next()? {
//!     let [master, exp_avg, exp_avg_sq] = item.f32_lanes();
//!     // The update.
//! #   let _ = (master, exp_avg, exp_avg_sq);
//!     item.write_back()?;
//! }
//! pass.finish()?;
//! # Ok(())
//! # }
//! ```
//!
//! # Why it holds together
//!
//! - **Memory the kernel works on belongs to the request.** A buffer moves into the I/O engine with its request and
//!   comes back with the completion. Nothing a caller does, dropping included, can free memory under the kernel.
//! - **Regions are whole pages.** Offsets and sizes on disk are multiples of 4096 bytes, as direct I/O asks; the
//!   caller sees exactly the elements it asked for.
//! - **Every wait has a deadline** ([`Options::stall`]): a device that stops answering is an error, not a hang.
//! - **Nothing is left behind.** The file has no name, so the space is free when the process ends, however it ends.

mod engine;
mod error;
mod file;
mod item;
mod options;
mod pass;
mod region;
mod request;
mod span_io;
mod store;
mod stream;

pub use engine::probe_io_uring;
pub use error::OffloadError;
pub use item::Item;
pub use options::{ENGINE_VARIABLE, EngineChoice, Options};
pub use pass::{Loaded, Pass};
pub use region::{PAGE, Region};
pub use request::Direction;
pub use store::{Description, EngineKind, Store};
pub use stream::{Access, Depth, Lane, Stream, Traffic};

/// A result of this crate.
pub type Result<T, E = OffloadError> = std::result::Result<T, E>;
