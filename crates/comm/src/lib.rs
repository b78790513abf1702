//! Process groups and collectives: world of one, threads, shared memory; the watchdog.
//!
//! [`Group`] is what the engine sees. [`Solo`] is the group of one rank; [`SharedMemory`] joins ranks of one host,
//! be they processes or threads, through a [`Segment`]; [`OverBytes`] runs over anything that moves bytes, and watches over
//! its peers through a [`Board`]. Whatever the transport and however it cuts its chunks, the
//! same inputs give the same bits: sums are taken in fp32 and in rank order, squares in blocks of [`BLOCK`] elements.
//!
//! # How bytes move
//!
//! Each rank owns a ring of sixteen slots in the segment. A collective is cut into chunks that fit in a slot; every
//! rank writes the same number of chunks. The ring is small enough to stay in the caches, so that an exchanged byte is
//! written to and read from a cache, once each.
//!
//! ```text
//! ring of rank 0      n-16 -> n+0   n-15   n-14  ...  n-2   n-1         published = n     consumed = n-8
//!                            \_ claimed once every rank's `consumed` is past n-16
//! ```
//!
//! # The protocol
//!
//! What `unsafe` code and tests of this crate rely on, by number:
//!
//! - **COMM-1** Each rank has two counters, `published` and `consumed`, that only it advances, by one chunk at a time
//!   and from call to call without a gap. Chunk `n` is in slot `n % 16` of every ring. Counters are 32 bits and wrap;
//!   they are compared by their distance, which never exceeds the length of a ring.
//! - **COMM-2** A rank writes chunk `n` into its slot only when every other rank has consumed chunk `n - 16` and
//!   before it publishes `n`. It consumes its own chunks like those of others.
//! - **COMM-3** A rank reads slots of chunk `n` only after their owners have published it and before it has itself
//!   consumed it. The counters are stored with release and loaded with acquire order, so COMM-2 and COMM-3 together
//!   exclude that anybody reads a slot while it is written.
//! - **COMM-4** A rank that goes to sleep on a counter announces itself before it looks at the counter a last time; a
//!   rank that advances a counter looks for sleepers afterwards; both in one total order. No wake-up is lost, and if it
//!   were, a sleep lasts 50 ms at most.
//! - **COMM-5** No cycle of waiting: the rank that has consumed least waits only for chunks whose owners have room to
//!   publish them. Every rank makes the same sequence of chunks of a call, which it derives from the fingerprint alone
//!   (for [`Group::all_gather_bytes`] from what the first chunk says).
//! - **COMM-6** Lengths and codes read from the segment are checked before they are used to address memory: a wrong
//!   one gives an error or wrong numbers, not an access outside the mapping.
//! - **COMM-7** A rank writes its fingerprint of call `s` before it publishes the call's first chunk. A peer compares
//!   it after that chunk has arrived and before it uses it. Twenty fingerprints are kept; as each call has a
//!   chunk, ranks are at most sixteen calls apart.
//! - **COMM-8** The first error of a group is written into the segment by one rank, once. Every other rank finds it at
//!   the next call or the next time it looks around in a wait, and fails with the same sentence.
//! - **COMM-9** A rank marks a call as finished after it has consumed the call's last chunk. A peer that is gone is an
//!   error only to a call that it had not finished; its end is looked at before its progress is.
//!
//! - **COMM-10** Of a [`MappedUnits`] a rank writes only its own shards, and only while no rank computes with them:
//!   between a collective that all reach after their last use and one that all reach before their next.
//!
//! The processes that open a segment belong to one user and one program: the protocol protects from their death, not
//! from their malice.

mod board;
mod byte_transport;
mod chunks;
mod error;
mod fingerprint;
mod group;
mod lookout;
mod mapped_units;
mod over_bytes;
mod pieces;
mod position;
mod region;
mod ring;
mod segment;
mod shared;
mod solo;
mod vigil;
mod wait;
mod watch;
mod write_guard;

pub use board::{Board, Farewell};
pub use byte_transport::{ByteTransport, Progress};
pub use error::{Absent, CommError, Departure, ErrorKind, Place};
pub use fingerprint::{Fingerprint, Operation, WHAT_BYTES};
pub use group::{Group, Into, Pieces, PiecesMut, Produce};
pub use lookout::Member;
pub use mapped_units::{MappedUnits, UnitPages};
pub use over_bytes::OverBytes;
pub use pieces::BLOCK;
pub use region::{Access, Region};
pub use segment::{MAX_WORLD, Segment};
pub use shared::{Interrupt, Options, SharedMemory, threads};
pub use solo::Solo;
