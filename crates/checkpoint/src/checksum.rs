//! Checksums of files, chunk by chunk, so that a reader checks what it reads and not the whole file.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Bytes per chunk in the files this version writes.
pub(crate) const CHUNK_BYTES: u64 = 4 << 20;

/// An XXH3 checksum of 128 bits, written as 32 hexadecimal digits, as `xxhsum -H128` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Checksum(u128);

impl Checksum {
    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl From<Checksum> for String {
    fn from(checksum: Checksum) -> Self {
        checksum.to_string()
    }
}

impl FromStr for Checksum {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        digits
            .then(|| u128::from_str_radix(text, 16).ok().map(Self))
            .flatten()
            .ok_or_else(|| format!("`{text}` is not a checksum of 32 hexadecimal digits"))
    }
}

impl TryFrom<String> for Checksum {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Computes the checksums of consecutive chunks of a stream.
pub(crate) struct ChunkHasher {
    state: Box<Xxh3>,
    filled: u64,
    done: Vec<Checksum>,
}

impl ChunkHasher {
    pub(crate) fn new() -> Self {
        Self { state: Box::new(Xxh3::new()), filled: 0, done: Vec::new() }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(CHUNK_BYTES - self.filled).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.state.update(now);
            self.filled += now.len() as u64;
            if self.filled == CHUNK_BYTES {
                self.close();
            }
            bytes = later;
        }
    }

    fn close(&mut self) {
        self.done.push(Checksum(self.state.digest128()));
        self.state.reset();
        self.filled = 0;
    }

    /// One checksum for each chunk; the last chunk may be shorter.
    pub(crate) fn finish(mut self) -> Vec<Checksum> {
        if self.filled > 0 {
            self.close();
        }
        self.done
    }
}

/// Computes the checksum of one chunk from pieces.
pub(crate) struct PieceHasher(Box<Xxh3>);

impl PieceHasher {
    pub(crate) fn new() -> Self {
        Self(Box::new(Xxh3::new()))
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(&self) -> Checksum {
        Checksum(self.0.digest128())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_do_not_depend_on_how_bytes_arrive() {
        let bytes: Vec<u8> = (0..CHUNK_BYTES as usize + 77).map(|i| (i * 31 % 251) as u8).collect();
        let expected: Vec<_> = bytes.chunks(CHUNK_BYTES as usize).map(Checksum::of).collect();
        for step in [65_537, CHUNK_BYTES as usize + 1, bytes.len()] {
            let mut hasher = ChunkHasher::new();
            bytes.chunks(step).for_each(|part| hasher.update(part));
            assert_eq!(hasher.finish(), expected, "{step}");
        }
        assert!(ChunkHasher::new().finish().is_empty());
    }

    #[test]
    fn text_round_trips_and_agrees_with_xxhsum() {
        // `printf '' | xxhsum -H128`
        let empty = Checksum::of(b"");
        assert_eq!(empty.to_string(), "99aa06d3014798d86001c324468d497f");
        assert_eq!(empty.to_string().parse(), Ok(empty));
        assert!("99aa".parse::<Checksum>().is_err());
        assert!("+9aa06d3014798d86001c324468d497f".parse::<Checksum>().is_err());
    }
}
