//! Frames on the connection between the launcher and an agent: a kind, a length, and so many bytes.
//!
//! ```text
//!   +------+--------------------------+-----------------+
//!   | kind | length, 4 bytes, little  | payload         |
//!   +------+--------------------------+-----------------+
//! ```
//!
//! The agent begins with [`greeting`], for what comes before it may be the words of a login shell. Whatever the bytes are, decoding ends
//! with frames or an error and holds at most one payload.

use std::io;

/// The version of frames and messages. A launcher talks to agents of its own version only.
pub(crate) const PROTOCOL: u32 = 1;

/// Longer payloads are refused: the longest messages are environments and command lines.
pub(crate) const MAX_PAYLOAD: usize = 4 * 1024 * 1024;

/// So much may come before the greeting.
const MAX_NOISE: usize = 256 * 1024;

const HEADER: usize = 5;

/// What a greeting begins with: no login shell prints a zero byte.
const GREETING: &[u8] = b"\0deepspeed-agent ";

/// The longest version number, and the line's end.
const MAX_VERSION: usize = 11;

/// What a frame carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Which sort of payload.
    pub(crate) kind: u8,
    /// The payload.
    pub(crate) payload: Vec<u8>,
}

/// Bytes that are no frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// A length that no frame has.
    #[error("a frame of {length} bytes, which is more than the {MAX_PAYLOAD} that one may have")]
    TooLong {
        /// The length.
        length: usize,
    },
    /// No greeting within what may come before it.
    #[error("{MAX_NOISE} bytes, none of which begins the agent's greeting")]
    NoGreeting,
    /// A greeting with something else than a number.
    #[error("a greeting without a version")]
    BadGreeting,
}

/// What an agent says first.
pub(crate) fn greeting() -> Vec<u8> {
    [GREETING, format!("{PROTOCOL}\n").as_bytes()].concat()
}

/// A frame as bytes.
///
/// # Errors
/// A payload that is too long.
pub(crate) fn encode(kind: u8, payload: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= MAX_PAYLOAD);
    let length =
        length.ok_or_else(|| io::Error::other(FrameError::TooLong { length: payload.len() }.to_string()))?;
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.push(kind);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Takes bytes in any pieces and gives frames.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// Takes further bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// What came before a greeting, as text: for a message when none comes.
    pub(crate) fn noise(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..self.bytes.len().min(1000)]).trim().to_owned()
    }

    /// The agent's version, once its greeting is there; what came before is dropped.
    ///
    /// # Errors
    /// Too much before a greeting, or a greeting without a number.
    pub(crate) fn greeting(&mut self) -> Result<Option<u32>, FrameError> {
        let Some(start) = self.bytes.windows(GREETING.len()).position(|window| window == GREETING) else {
            return if self.bytes.len() > MAX_NOISE { Err(FrameError::NoGreeting) } else { Ok(None) };
        };
        let number = start + GREETING.len();
        let rest = &self.bytes[number..];
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
            return if rest.len() > MAX_VERSION { Err(FrameError::BadGreeting) } else { Ok(None) };
        };
        let version = std::str::from_utf8(&rest[..end]).ok().and_then(|text| text.parse().ok());
        let version = version.ok_or(FrameError::BadGreeting)?;
        self.bytes.drain(..number + end + 1);
        Ok(Some(version))
    }

    /// The next frame, if it is whole.
    ///
    /// # Errors
    /// A length that no frame has; nothing can be read after it.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(header) = self.bytes.first_chunk::<HEADER>() else { return Ok(None) };
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong { length });
        }
        if self.bytes.len() < HEADER + length {
            return Ok(None);
        }
        let kind = header[0];
        let payload = self.bytes[HEADER..HEADER + length].to_vec();
        self.bytes.drain(..HEADER + length);
        Ok(Some(Frame { kind, payload }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_greeting_after_a_talkative_shell() {
        let mut decoder = Decoder::default();
        decoder.push(b"Welcome to worker-1\n");
        assert_eq!(decoder.greeting(), Ok(None));
        assert_eq!(decoder.noise(), "Welcome to worker-1");
        let mut version = None;
        for byte in greeting() {
            assert_eq!(version, None);
            decoder.push(&[byte]);
            version = decoder.greeting().unwrap();
        }
        assert_eq!(version, Some(PROTOCOL));
        decoder.push(&encode(7, b"x").unwrap());
        assert_eq!(decoder.next().unwrap(), Some(Frame { kind: 7, payload: b"x".to_vec() }));
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        let mut decoder = Decoder::default();
        decoder.push(&[1, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(decoder.next(), Err(FrameError::TooLong { length: u32::MAX as usize }));
        let mut decoder = Decoder::default();
        decoder.push(&vec![b'x'; MAX_NOISE + 1]);
        assert_eq!(decoder.greeting(), Err(FrameError::NoGreeting));
        let mut decoder = Decoder::default();
        decoder.push(b"\0deepspeed-agent one\n");
        assert_eq!(decoder.greeting(), Err(FrameError::BadGreeting));
        assert!(encode(1, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }

    proptest! {
        /// Frames come out as they went in, whatever the pieces.
        #[test]
        fn frames_survive_any_cut(
            frames in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 0..8),
            cut in 1usize..50,
        ) {
            let bytes: Vec<u8> =
                frames.iter().flat_map(|(kind, payload)| encode(*kind, payload).unwrap()).collect();
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.next().unwrap() {
                    seen.push((frame.kind, frame.payload));
                }
            }
            prop_assert_eq!(seen, frames);
        }

        /// Hostile bytes give frames or an error, never a panic.
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            let _ = decoder.greeting();
            while let Ok(Some(_)) = decoder.next() {}
        }
    }
}
