//! What can go wrong in a process group, in sentences that name the rank, the call and the reason.

use std::{fmt, io, sync::Arc, time::Duration};

use deepspeed_core::Rank;

use crate::fingerprint::{CallName, Fingerprint, Operation};

/// Why a collective or the making of a group failed.
///
/// Of a group's errors the first is kept: the rank that found it returns it as it is, every other rank, and every
/// later call, returns the same sentence.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// A peer ended, or left the group, before it had done its part.
    #[error("rank {rank} (pid {pid}) {how} before it finished {}", CallName { operation: *operation, seq: *seq, what })]
    PeerGone {
        /// The peer.
        rank: Rank,
        /// Its process.
        pid: u32,
        /// How it ended.
        how: Departure,
        /// The call that waited for it.
        operation: Operation,
        /// Number of that call.
        seq: u64,
        /// What that call moves.
        what: String,
    },
    /// Two ranks called different things.
    #[error(
        "ranks disagree: rank {my_rank} called {mine}, but rank {rank} called {theirs}; every rank must make the same \
         calls in the same order"
    )]
    Mismatch {
        /// The rank that noticed.
        my_rank: Rank,
        /// What it called.
        mine: Box<Fingerprint>,
        /// The other rank.
        rank: Rank,
        /// What that one called under the same number.
        theirs: Box<Fingerprint>,
    },
    /// Ranks did not arrive in time.
    #[error("{}; waited {:.1} s", list(missing, *operation, *seq, what), waited.as_secs_f64())]
    Deadline {
        /// Who is missing, and where they are.
        missing: Vec<Absent>,
        /// The call that waited.
        operation: Operation,
        /// Number of that call.
        seq: u64,
        /// What that call moves.
        what: String,
        /// How long it waited.
        waited: Duration,
    },
    /// This rank's own code panicked inside a call.
    #[error("rank {rank} panicked in {}", CallName { operation: *operation, seq: *seq, what })]
    Panicked {
        /// The caller.
        rank: Rank,
        /// The call.
        operation: Operation,
        /// Number of the call.
        seq: u64,
        /// What the call moves.
        what: String,
    },
    /// The caller asked to stop waiting ([`Options::interrupt`](crate::Options::interrupt)).
    #[error("rank {rank} was interrupted in {}", CallName { operation: *operation, seq: *seq, what })]
    Interrupted {
        /// The caller.
        rank: Rank,
        /// The call.
        operation: Operation,
        /// Number of the call.
        seq: u64,
        /// What the call moves.
        what: String,
    },
    /// The arguments of a call do not fit together.
    #[error("rank {rank} called {operation} of {what} with arguments that do not fit: {problem}")]
    Arguments {
        /// The caller.
        rank: Rank,
        /// The call.
        operation: Operation,
        /// What the call moves.
        what: String,
        /// The arguments and what they should be.
        problem: String,
    },
    /// What carries the bytes failed: a connection broke, a peer is gone, or it gave up waiting.
    #[error("rank {rank} failed in {call}{} over {transport}: {problem}", doing(activity))]
    Transport {
        /// The caller.
        rank: Rank,
        /// The call.
        call: Box<Fingerprint>,
        /// What carries the bytes.
        transport: String,
        /// What the caller said it was doing; empty if nothing.
        activity: String,
        /// What the transport said.
        problem: String,
    },
    /// Another rank failed first; this is its error.
    #[error("{message}")]
    Poisoned {
        /// The rank that failed.
        rank: Rank,
        /// What kind of error it was.
        kind: ErrorKind,
        /// Its error, in full.
        message: String,
    },
    /// A segment could not be made, opened or joined.
    #[error("shared-memory group: {0}")]
    Segment(String),
    /// The system refused something.
    #[error("shared-memory group: {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
}

impl CommError {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { what: what.into(), source: Arc::new(source.into()) }
    }

    /// What kind of error it is; for [`CommError::Poisoned`] the kind of the error of the rank that failed.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::PeerGone { .. } => ErrorKind::PeerGone,
            Self::Mismatch { .. } => ErrorKind::Mismatch,
            Self::Deadline { .. } => ErrorKind::Deadline,
            Self::Panicked { .. } => ErrorKind::Panicked,
            Self::Interrupted { .. } => ErrorKind::Interrupted,
            Self::Arguments { .. } => ErrorKind::Arguments,
            Self::Transport { .. } => ErrorKind::Transport,
            Self::Poisoned { kind, .. } => *kind,
            Self::Segment(_) => ErrorKind::Segment,
            Self::Io { .. } => ErrorKind::Io,
        }
    }
}

/// The kinds of [`CommError`], for callers that map errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u32)]
pub enum ErrorKind {
    /// [`CommError::PeerGone`].
    PeerGone = 1,
    /// [`CommError::Mismatch`].
    Mismatch = 2,
    /// [`CommError::Deadline`].
    Deadline = 3,
    /// [`CommError::Panicked`].
    Panicked = 4,
    /// [`CommError::Interrupted`].
    Interrupted = 5,
    /// [`CommError::Arguments`].
    Arguments = 6,
    /// [`CommError::Segment`].
    Segment = 7,
    /// [`CommError::Io`].
    Io = 8,
    /// [`CommError::Transport`].
    Transport = 9,
}

impl ErrorKind {
    /// The kind a peer wrote as a number; [`ErrorKind::Io`] for a number that stands for none.
    pub(crate) fn from_code(code: u32) -> Self {
        [
            Self::PeerGone,
            Self::Mismatch,
            Self::Deadline,
            Self::Panicked,
            Self::Interrupted,
            Self::Arguments,
            Self::Segment,
            Self::Transport,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == code)
        .unwrap_or(Self::Io)
    }
}

/// How a peer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// It left the group: its [`SharedMemory`](crate::SharedMemory) was dropped.
    Left,
    /// As `Left`, while a panic unwound.
    Panicked,
    /// Its process exited.
    Exited {
        /// Exit code.
        code: i32,
    },
    /// Its process was killed.
    Killed {
        /// Number of the signal.
        signal: i32,
    },
    /// Its process is gone, and its parent has already taken the exit status.
    Ended,
    /// Its connection broke, and it has said nothing since: its process, or its host, is gone.
    Silent,
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("left the group"),
            Self::Panicked => f.write_str("panicked and left the group"),
            Self::Exited { code } => write!(f, "exited with code {code}"),
            Self::Killed { signal } => {
                let name = match signal {
                    2 => " (SIGINT)",
                    4 => " (SIGILL)",
                    6 => " (SIGABRT)",
                    7 => " (SIGBUS)",
                    8 => " (SIGFPE)",
                    9 => " (SIGKILL)",
                    11 => " (SIGSEGV)",
                    15 => " (SIGTERM)",
                    _ => "",
                };
                write!(f, "was killed by signal {signal}{name}")
            }
            Self::Ended => f.write_str("ended (exited or was killed)"),
            Self::Silent => f.write_str("has fallen silent (its process, or its host, is gone)"),
        }
    }
}

/// A rank that others wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// The rank.
    pub rank: Rank,
    /// Where it is instead.
    pub place: Place,
}

/// Where a rank is, as far as its peers can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It never joined the group.
    NotJoined,
    /// It has left no word where ranks do so.
    Unheard,
    /// Its process is gone.
    Gone(Departure),
    /// In another, earlier call.
    In(Fingerprint),
    /// In the same call, but its part does not come.
    Here,
    /// Between two calls.
    Outside {
        /// What it last said it does; empty if it said nothing.
        activity: String,
        /// The call it finished last.
        last: Option<Fingerprint>,
    },
}

impl Absent {
    /// `rank 3 has not reached reduce_scatter #412 of unit blocks.7; it is in save_checkpoint`.
    pub(crate) fn sentence(&self, call: &CallName<'_>) -> String {
        let rank = self.rank;
        match &self.place {
            Place::NotJoined => {
                format!("rank {rank} has not reached {call}; it has not joined the group yet")
            }
            Place::Unheard => format!("rank {rank} has not reached {call}; nothing has been heard of it"),
            Place::Gone(how) => format!("rank {rank} has not reached {call}; it {how}"),
            Place::In(other) => format!("rank {rank} has not reached {call}; it is in {}", other.name()),
            Place::Here => format!("rank {rank} has reached {call} but does not do its part"),
            Place::Outside { activity, .. } if !activity.is_empty() => {
                format!("rank {rank} has not reached {call}; it is in {activity}")
            }
            Place::Outside { last: Some(last), .. } => {
                format!("rank {rank} has not reached {call}; it last finished {}", last.name())
            }
            Place::Outside { last: None, .. } => {
                format!("rank {rank} has not reached {call}; it has made no call yet")
            }
        }
    }
}

/// ` during step`, or nothing.
fn doing(activity: &str) -> String {
    if activity.is_empty() { String::new() } else { format!(" during {activity}") }
}

/// One sentence for each missing rank.
pub(crate) fn list(missing: &[Absent], operation: Operation, seq: u64, what: &str) -> String {
    let call = CallName { operation, seq, what };
    let sentences: Vec<String> = missing.iter().map(|absent| absent.sentence(&call)).collect();
    sentences.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_who_is_missing_and_where() {
        let outside = |activity: &str| Place::Outside { activity: activity.into(), last: None };
        let error = CommError::Deadline {
            missing: vec![
                Absent { rank: Rank(3), place: outside("save_checkpoint") },
                Absent { rank: Rank(4), place: Place::NotJoined },
            ],
            operation: Operation::ReduceScatter,
            seq: 412,
            what: "unit blocks.7".into(),
            waited: Duration::from_millis(30_040),
        };
        assert_eq!(
            error.to_string(),
            "rank 3 has not reached reduce_scatter #412 of unit blocks.7; it is in save_checkpoint; rank 4 has not \
             reached reduce_scatter #412 of unit blocks.7; it has not joined the group yet; waited 30.0 s"
        );
    }

    #[test]
    fn says_how_a_peer_died() {
        let error = CommError::PeerGone {
            rank: Rank(1),
            pid: 77,
            how: Departure::Killed { signal: 9 },
            operation: Operation::Barrier,
            seq: 2,
            what: "start".into(),
        };
        assert_eq!(
            error.to_string(),
            "rank 1 (pid 77) was killed by signal 9 (SIGKILL) before it finished barrier #2 of start"
        );
    }

    #[test]
    fn kinds_survive_their_code() {
        for kind in [
            ErrorKind::PeerGone,
            ErrorKind::Deadline,
            ErrorKind::Segment,
            ErrorKind::Io,
            ErrorKind::Transport,
        ] {
            assert_eq!(ErrorKind::from_code(kind as u32), kind);
        }
    }
}
