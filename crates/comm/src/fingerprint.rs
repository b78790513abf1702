//! What a call is, in a form that ranks can compare: operation, number, dtype, length and the name of what it moves.

use std::{
    fmt,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use deepspeed_core::{DType, Rank};

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// [`Group::barrier`](crate::Group::barrier).
    Barrier,
    /// [`Group::all_gather_bytes`](crate::Group::all_gather_bytes).
    AllGatherBytes,
    /// [`Group::all_reduce`](crate::Group::all_reduce).
    AllReduce,
    /// [`Group::broadcast`](crate::Group::broadcast).
    Broadcast,
    /// [`Group::reduce_scatter`](crate::Group::reduce_scatter).
    ReduceScatter,
    /// [`Group::all_gather`](crate::Group::all_gather).
    AllGather,
}

impl Operation {
    const ALL: [Self; 6] = [
        Self::Barrier,
        Self::AllGatherBytes,
        Self::AllReduce,
        Self::Broadcast,
        Self::ReduceScatter,
        Self::AllGather,
    ];

    /// The name of the method: `reduce_scatter`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Barrier => "barrier",
            Self::AllGatherBytes => "all_gather_bytes",
            Self::AllReduce => "all_reduce",
            Self::Broadcast => "broadcast",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What one rank calls: ranks that agree have equal fingerprints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// Which collective.
    pub operation: Operation,
    /// Number of the call in its group, counted from 1.
    pub seq: u64,
    /// The dtype that all ranks must agree on, where there is one.
    pub dtype: Option<DType>,
    /// Number of elements of the whole; 0 where lengths may differ between ranks.
    pub len: u64,
    /// The rank whose elements are sent, for a broadcast.
    pub root: Option<Rank>,
    /// The name of what is moved, cut to [`WHAT_BYTES`].
    pub what: String,
    /// A hash of the whole name, so that names that differ only behind the cut are told apart.
    hash: u64,
}

/// Bytes of [`Fingerprint::what`] that peers can read.
pub const WHAT_BYTES: usize = 96;

impl Fingerprint {
    pub(crate) fn new(operation: Operation, seq: u64, what: &str) -> Self {
        let cut = what.floor_char_boundary(WHAT_BYTES);
        Self {
            operation,
            seq,
            dtype: None,
            len: 0,
            root: None,
            what: what[..cut].to_owned(),
            hash: fnv1a(what.as_bytes()),
        }
    }

    pub(crate) fn elements(mut self, len: usize) -> Self {
        self.len = len as u64;
        self
    }

    pub(crate) fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    pub(crate) fn root(mut self, root: Rank) -> Self {
        self.root = Some(root);
        self
    }

    /// `reduce_scatter #412 of unit blocks.7`.
    pub(crate) fn name(&self) -> CallName<'_> {
        CallName { operation: self.operation, seq: self.seq, what: &self.what }
    }

    /// Bytes of an encoded fingerprint.
    pub(crate) const BYTES: usize = RECORD_WORDS * 8;

    /// For a message.
    pub(crate) fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        for (target, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.encode()) {
            *target = word.to_le_bytes();
        }
        bytes
    }

    /// What [`to_bytes`](Self::to_bytes) gave, or nothing where the bytes are none.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut words = [0; RECORD_WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Self::decode(&words)
    }

    fn encode(&self) -> [u64; RECORD_WORDS] {
        let mut words = [0; RECORD_WORDS];
        words[0] = self.seq;
        words[1] = self.operation as u64 | encode_dtype(self.dtype) << 8 | (self.what.len() as u64) << 16;
        words[2] = self.len;
        words[3] = self.root.map_or(0, |root| u64::from(root.0) + 1);
        words[4] = self.hash;
        put_bytes(&mut words[5..], self.what.as_bytes());
        words
    }

    /// The fingerprint a peer wrote, or nothing where the words are none.
    fn decode(words: &[u64; RECORD_WORDS]) -> Option<Self> {
        let operation = *Operation::ALL.get((words[1] & 0xff) as usize)?;
        let what = get_bytes(&words[5..], (words[1] >> 16) as usize)?;
        Some(Self {
            operation,
            seq: words[0],
            dtype: decode_dtype(words[1] >> 8 & 0xff)?,
            len: words[2],
            root: words[3].checked_sub(1).map(|root| Rank(root as u32)),
            what: String::from_utf8_lossy(&what).into_owned(),
            hash: words[4],
        })
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)?;
        let mut details = Vec::new();
        if let Some(dtype) = self.dtype {
            details.push(dtype.to_string());
        }
        if !matches!(self.operation, Operation::Barrier | Operation::AllGatherBytes) {
            details.push(format!("{} elements", self.len));
        }
        if let Some(root) = self.root {
            details.push(format!("from rank {root}"));
        }
        if details.is_empty() { Ok(()) } else { write!(f, " ({})", details.join(", ")) }
    }
}

/// `reduce_scatter #412 of unit blocks.7`.
pub(crate) struct CallName<'a> {
    pub(crate) operation: Operation,
    pub(crate) seq: u64,
    pub(crate) what: &'a str,
}

impl fmt::Display for CallName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{}", self.operation, self.seq)?;
        if self.what.is_empty() { Ok(()) } else { write!(f, " of {}", self.what) }
    }
}

const RECORD_WORDS: usize = 5 + WHAT_BYTES / 8;

/// The calls that a rank entered last, in the segment (COMM-7).
#[repr(C)]
pub(crate) struct History {
    calls: [SeqLock<RECORD_WORDS>; HISTORY],
}

/// Calls whose fingerprints are kept: more than the slots of a ring, which bound how far ranks can be apart.
const HISTORY: usize = 20;

impl History {
    /// Adds a call; only the owning rank calls this, one call at a time.
    pub(crate) fn push(&self, fingerprint: &Fingerprint) {
        self.calls[fingerprint.seq as usize % HISTORY].write(&fingerprint.encode());
    }

    /// The call with this number, if it is still (or already) there.
    pub(crate) fn get(&self, seq: u64) -> Option<Fingerprint> {
        let words = self.calls[seq as usize % HISTORY].read()?;
        Fingerprint::decode(&words).filter(|fingerprint| fingerprint.seq == seq && seq != 0)
    }
}

/// Bytes of an activity that peers can read.
const ACTIVITY_BYTES: usize = 128;

/// What a rank's program is doing, in the segment.
#[repr(C)]
pub(crate) struct Activity {
    text: SeqLock<{ 1 + ACTIVITY_BYTES / 8 }>,
}

impl Activity {
    /// Replaces the text; only the owning rank calls this, one call at a time.
    pub(crate) fn set(&self, text: &str) {
        let text = &text[..text.floor_char_boundary(ACTIVITY_BYTES)];
        let mut words = [0; 1 + ACTIVITY_BYTES / 8];
        words[0] = text.len() as u64;
        put_bytes(&mut words[1..], text.as_bytes());
        self.text.write(&words);
    }

    /// The text; empty if none was set.
    pub(crate) fn get(&self) -> String {
        let bytes = self.text.read().and_then(|words| get_bytes(&words[1..], words[0] as usize));
        bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

/// A few words that one rank writes and others read whole: a sequence lock over atomics.
#[repr(C)]
struct SeqLock<const WORDS: usize> {
    /// Odd while the words are being written.
    version: AtomicU32,
    words: [AtomicU64; WORDS],
}

impl<const WORDS: usize> SeqLock<WORDS> {
    fn write(&self, words: &[u64; WORDS]) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        for (cell, word) in self.words.iter().zip(words) {
            cell.store(*word, Ordering::Relaxed);
        }
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// The words, or nothing if their writer is at work (or died at it).
    fn read(&self) -> Option<[u64; WORDS]> {
        for _ in 0..1000 {
            let before = self.version.load(Ordering::Acquire);
            if before.is_multiple_of(2) {
                let words = std::array::from_fn(|i| self.words[i].load(Ordering::Relaxed));
                fence(Ordering::Acquire);
                if self.version.load(Ordering::Relaxed) == before {
                    return Some(words);
                }
            }
            std::hint::spin_loop();
        }
        None
    }
}

fn put_bytes(words: &mut [u64], bytes: &[u8]) {
    for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
        let mut eight = [0; 8];
        eight[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_le_bytes(eight);
    }
}

fn get_bytes(words: &[u64], len: usize) -> Option<Vec<u8>> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    (len <= bytes.len()).then(|| {
        bytes.truncate(len);
        bytes
    })
}

/// A dtype, or none, as a small number: what a rank says of the elements in its slot.
pub(crate) fn encode_dtype(dtype: Option<DType>) -> u64 {
    match dtype {
        None => 0,
        Some(DType::F32) => 1,
        Some(DType::F16) => 2,
        Some(DType::BF16) => 3,
    }
}

/// The inverse of [`encode_dtype`]; nothing for a number that stands for no dtype.
pub(crate) fn decode_dtype(code: u64) -> Option<Option<DType>> {
    match code {
        0 => Some(None),
        1 => Some(Some(DType::F32)),
        2 => Some(Some(DType::F16)),
        3 => Some(Some(DType::BF16)),
        _ => None,
    }
}

/// FNV-1a, 64 bits: <http://www.isthe.com/chongo/tech/comp/fnv/>.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> Box<History> {
        // SAFETY: all-zero bytes are valid for atomics, and that is how a history starts in a fresh segment.
        unsafe { Box::<History>::new_zeroed().assume_init() }
    }

    #[test]
    fn a_call_is_read_back_until_many_more_came() {
        let history = history();
        assert_eq!(history.get(0), None);
        for seq in 1..=HISTORY as u64 + 4 {
            let call = Fingerprint::new(Operation::Broadcast, seq, "initial weights")
                .elements(100)
                .dtype(DType::BF16)
                .root(Rank(2));
            history.push(&call);
            assert_eq!(history.get(seq), Some(call));
        }
        assert_eq!(history.get(4), None);
        assert!(history.get(5).is_some());
    }

    #[test]
    fn long_names_are_cut_but_still_told_apart() {
        let name = "é".repeat(60);
        let a = Fingerprint::new(Operation::Barrier, 1, &format!("{name}a"));
        let b = Fingerprint::new(Operation::Barrier, 1, &format!("{name}b"));
        assert_eq!(a.what.len(), WHAT_BYTES);
        assert_eq!(a.what, b.what);
        assert_ne!(a, b);
    }

    #[test]
    fn words_that_are_no_fingerprint_are_none() {
        let mut words = Fingerprint::new(Operation::AllGather, 1, "x").encode();
        words[1] = 6;
        assert_eq!(Fingerprint::decode(&words), None);
        words[1] = 97 << 16;
        assert_eq!(Fingerprint::decode(&words), None);
    }

    #[test]
    fn reads_like_a_sentence() {
        let call = Fingerprint::new(Operation::ReduceScatter, 412, "unit blocks.7").elements(64);
        assert_eq!(call.to_string(), "reduce_scatter #412 of unit blocks.7 (64 elements)");
        assert_eq!(Fingerprint::new(Operation::Barrier, 3, "").to_string(), "barrier #3");
    }
}
