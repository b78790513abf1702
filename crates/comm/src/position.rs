//! Where a rank is in its calls, as it leaves word for the others on a [`Board`](crate::Board).

use crate::{error::Place, fingerprint::Fingerprint};

/// What one rank last said of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// Goes up with every word left: a process that lives.
    pub(crate) beat: u64,
    /// The call it is in, or the last one that it was in.
    pub(crate) call: Option<Fingerprint>,
    /// Whether it is in that call; otherwise it has finished it.
    pub(crate) inside: bool,
    /// Whether it has left the group; this is its last word then.
    pub(crate) left: bool,
    /// What its program does; empty if it did not say.
    pub(crate) activity: String,
}

/// Bit of the second field: inside the call.
const INSIDE: u8 = 1;
/// Left the group.
const LEFT: u8 = 2;
/// A call follows.
const CALL: u8 = 4;

impl Position {
    /// Number of the last call it has entered; 0 before the first.
    pub(crate) fn entered(&self) -> u64 {
        self.call.as_ref().map_or(0, |call| call.seq)
    }

    /// Number of the last call it has finished; 0 before the first.
    pub(crate) fn finished(&self) -> u64 {
        self.entered() - u64::from(self.inside)
    }

    /// Where it is for somebody who waits in call `seq`.
    pub(crate) fn place(&self, seq: u64) -> Place {
        match &self.call {
            _ if self.entered() >= seq => Place::Here,
            Some(call) if self.inside => Place::In(call.clone()),
            last => Place::Outside { activity: self.activity.clone(), last: last.clone() },
        }
    }

    /// Beat (8 bytes), flags (1), the call's fingerprint where there is one, the activity as UTF-8.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let flag = |bit, on| if on { bit } else { 0 };
        let flags = flag(INSIDE, self.inside) | flag(LEFT, self.left) | flag(CALL, self.call.is_some());
        let mut bytes = self.beat.to_le_bytes().to_vec();
        bytes.push(flags);
        if let Some(call) = &self.call {
            bytes.extend_from_slice(&call.to_bytes());
        }
        bytes.extend_from_slice(self.activity.as_bytes());
        bytes
    }

    /// What [`to_bytes`](Self::to_bytes) gave, or nothing where the bytes are none.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (beat, rest) = bytes.split_first_chunk::<8>()?;
        let (flags, mut rest) = rest.split_first()?;
        let mut call = None;
        if flags & CALL != 0 {
            let (encoded, tail) = rest.split_at_checked(Fingerprint::BYTES)?;
            call = Some(Fingerprint::from_bytes(encoded).filter(|call| call.seq > 0)?);
            rest = tail;
        }
        Some(Self {
            beat: u64::from_le_bytes(*beat),
            inside: flags & INSIDE != 0 && call.is_some(),
            left: flags & LEFT != 0,
            call,
            activity: String::from_utf8_lossy(rest).into_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Operation;

    #[test]
    fn a_word_is_read_back() {
        let call = Fingerprint::new(Operation::ReduceScatter, 412, "unit blocks.7").elements(64);
        for call in [None, Some(call)] {
            for (inside, left) in [(false, false), (true, false), (false, true)] {
                let inside = inside && call.is_some();
                let word =
                    Position { beat: 7, call: call.clone(), inside, left, activity: "forward é".to_owned() };
                assert_eq!(Position::from_bytes(&word.to_bytes()), Some(word));
            }
        }
    }

    #[test]
    fn words_that_are_none_are_nothing() {
        let call = Fingerprint::new(Operation::Barrier, 1, "x");
        let word = Position { call: Some(call), inside: true, ..Position::default() }.to_bytes();
        for cut in [0, 5, 8, 9, 20, 9 + Fingerprint::BYTES - 1] {
            let whole = Position::from_bytes(&word[..cut]);
            assert!(whole.is_none(), "{cut}");
        }
        let mut foreign = word.clone();
        foreign[17] = 0xff; // an operation that does not exist
        assert_eq!(Position::from_bytes(&foreign), None);
    }

    #[test]
    fn places_are_those_of_somebody_who_waits() {
        let call = |seq| Some(Fingerprint::new(Operation::Barrier, seq, "x"));
        let at = |seq, inside| Position { call: call(seq), inside, ..Position::default() };
        assert_eq!(at(5, true).place(5), Place::Here);
        assert_eq!(at(5, false).place(5), Place::Here);
        assert!(matches!(at(4, true).place(5), Place::In(call) if call.seq == 4));
        assert!(matches!(at(4, false).place(5), Place::Outside { last: Some(call), .. } if call.seq == 4));
        assert_eq!(Position::default().place(1), Place::Outside { activity: String::new(), last: None });
        assert_eq!(
            (at(4, true).finished(), at(4, false).finished(), Position::default().finished()),
            (3, 4, 0)
        );
    }
}
