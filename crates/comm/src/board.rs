//! Word that ranks leave for each other beside a byte transport: where they are, and the group's first error.
//!
//! A collective that waits cannot ask anybody anything over its own connections. A [`Board`] is a small key-value store
//! that all ranks reach in another way (torch.distributed's store, say). One thread of each rank visits it, every
//! second beat of the clock and when a call waits; calls that do not wait never do. If the store hangs, that thread
//! hangs, and nobody else.
//!
//! | key | value |
//! |---|---|
//! | `rank{r}` | the [`Position`] of rank r |
//! | `error` | the first error: rank (4 bytes), kind (4 bytes), text. Written once |
//! | `told{r}` | rank r has read the error |

use std::{
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use deepspeed_core::Rank;

use crate::{CommError, ErrorKind, fingerprint::Fingerprint, position::Position};

/// A key-value store that all ranks of one group share and nobody else writes to. No method waits for a key to appear.
pub trait Board: Send + Sync + fmt::Debug {
    /// Sets a key.
    ///
    /// # Errors
    /// Why the store cannot be reached, in words. The same for all methods.
    fn put(&self, key: &str, value: &[u8]) -> Result<(), String>;

    /// The values of keys, where they were set.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    fn get(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, String>;

    /// Sets a key unless it was set before; what it holds then.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    fn claim(&self, key: &str, value: &[u8]) -> Result<Vec<u8>, String>;
}

/// How long a failing call waits to learn whether another rank has failed first.
const ANSWER: Duration = Duration::from_secs(2);

/// This rank's side of a [`Board`]: what it has to say, what it has read, and the thread that carries both.
///
/// Dropping it says that the rank has left the group.
pub(crate) struct Post {
    shared: Arc<Shared>,
}

/// Ends a rank's visits to its board, from outside the group: before the store's own runtime goes away.
#[derive(Clone, Debug)]
pub struct Farewell {
    shared: Weak<Shared>,
}

struct Shared {
    board: Box<dyn Board>,
    me: usize,
    world: usize,
    beat: Duration,
    /// A fork of this process has no thread that visits the board.
    pid: u32,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    mine: Position,
    /// Visits that were asked for, and how many of them are done.
    asked: u64,
    answered: u64,
    /// Whether the next one reads the words of all ranks.
    read_all: bool,
    claim: Option<Vec<u8>>,
    error: Option<Vec<u8>>,
    /// By rank, as last read.
    words: Vec<Option<Position>>,
    /// By rank: who has read the error, as last read.
    told: Vec<bool>,
    looked: Option<Instant>,
    unreachable: Option<String>,
    leaving: bool,
    over: bool,
}

/// What the thread does at one visit.
struct Errand {
    word: Vec<u8>,
    claim: Option<Vec<u8>>,
    /// Number of the newest visit that was asked for.
    asked: u64,
    read_all: bool,
    /// The group's error, if it is known.
    error: Option<Vec<u8>>,
    leaving: bool,
}

/// What a visit has found.
#[derive(Default)]
struct Found {
    error: Option<Vec<u8>>,
    words: Vec<Option<Position>>,
    told: Vec<bool>,
}

/// A copy of what was read.
pub(crate) struct Reading {
    pub(crate) words: Vec<Option<Position>>,
    pub(crate) told: Vec<bool>,
    pub(crate) looked: Option<Instant>,
    pub(crate) unreachable: Option<String>,
}

impl Post {
    /// Begins to leave word as rank `me` of `world`, every `beat`.
    ///
    /// # Errors
    /// [`CommError::Io`] where no thread can be started.
    pub(crate) fn open(
        board: Box<dyn Board>,
        me: usize,
        world: usize,
        beat: Duration,
    ) -> Result<Self, CommError> {
        let state = State {
            mine: Position::default(),
            asked: 0,
            answered: 0,
            read_all: false,
            claim: None,
            error: None,
            words: vec![None; world],
            told: vec![false; world],
            looked: None,
            unreachable: None,
            leaving: false,
            over: false,
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let shared = Arc::new(Shared { board, me, world, beat, pid: std::process::id(), state, changed });
        let visitor = Arc::clone(&shared);
        thread::Builder::new().name("board".to_owned()).spawn(move || visitor.visit()).map_err(|error| {
            CommError::io("cannot start the thread that tells others where this rank is", error)
        })?;
        Ok(Self { shared })
    }

    /// This rank enters `call`.
    pub(crate) fn enter(&self, call: &Fingerprint) {
        let mut state = self.shared.lock();
        state.mine.call = Some(call.clone());
        state.mine.inside = true;
    }

    /// This rank has finished the call it was in.
    pub(crate) fn finish(&self) {
        self.shared.lock().mine.inside = false;
    }

    /// What this rank's program does from now on.
    pub(crate) fn set_activity(&self, activity: &str) {
        activity.clone_into(&mut self.shared.lock().mine.activity);
    }

    /// Has the board visited now: to leave word, to read the group's error, and with `all` to read the words of the
    /// others, too.
    pub(crate) fn look(&self, all: bool) {
        let mut state = self.shared.lock();
        state.asked += 1;
        state.read_all |= all;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Waits until everything that was asked for is done, `at_most` this long.
    pub(crate) fn wait(&self, at_most: Duration) {
        let state = self.shared.lock();
        let idle = |state: &mut State| state.answered < state.asked && !state.over;
        drop(self.shared.changed.wait_timeout_while(state, at_most, idle));
    }

    /// The group's error, if this rank knows of one.
    pub(crate) fn error(&self) -> Option<CommError> {
        self.shared.lock().error.as_deref().map(decode)
    }

    /// What was read last.
    pub(crate) fn read(&self) -> Reading {
        let state = self.shared.lock();
        Reading {
            words: state.words.clone(),
            told: state.told.clone(),
            looked: state.looked,
            unreachable: state.unreachable.clone(),
        }
    }

    /// Makes `error` the group's, unless another rank was first; returns the group's.
    pub(crate) fn claim(&self, error: CommError) -> CommError {
        let mine = encode(self.shared.me, &error);
        let mut state = self.shared.lock();
        if state.error.is_none() {
            state.claim = Some(mine.clone());
            self.shared.changed.notify_all();
            let waiting = |state: &mut State| state.claim.is_some() && !state.over;
            state = match self.shared.changed.wait_timeout_while(state, ANSWER, waiting) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        match &state.error {
            Some(first) if *first != mine => decode(first),
            _ => error,
        }
    }

    /// A way to end the visits that does not keep them alive.
    pub(crate) fn farewell(&self) -> Farewell {
        Farewell { shared: Arc::downgrade(&self.shared) }
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        self.shared.lock().leaving = true;
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for Post {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Post").field("board", &self.shared.board).finish_non_exhaustive()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("board", &self.board).finish_non_exhaustive()
    }
}

impl Farewell {
    /// Says that the rank leaves the group, and waits `at_most` this long until the board is not visited any more.
    pub fn leave(&self, at_most: Duration) {
        let Some(shared) = self.shared.upgrade() else { return };
        if shared.pid != std::process::id() {
            return;
        }
        let mut state = shared.lock();
        state.leaving = true;
        shared.changed.notify_all();
        drop(shared.changed.wait_timeout_while(state, at_most, |state| !state.over));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of the thread.
    fn visit(&self) {
        let mut next_beat = Instant::now();
        loop {
            let errand = self.next_errand(next_beat);
            next_beat = Instant::now() + self.beat;
            let outcome = self.run(&errand);
            let mut state = self.lock();
            if errand.claim.is_some() {
                state.claim = None;
            }
            state.answered = errand.asked;
            if errand.read_all {
                state.looked = Some(Instant::now());
            }
            match outcome {
                Ok(found) => {
                    state.unreachable = None;
                    state.error = state.error.take().or(found.error);
                    if errand.read_all {
                        state.words = found.words;
                        state.told = found.told;
                    }
                }
                Err(problem) => state.unreachable = Some(problem),
            }
            state.over = errand.leaving;
            self.changed.notify_all();
            if errand.leaving {
                return;
            }
        }
    }

    /// Waits until there is something to do.
    fn next_errand(&self, beat: Instant) -> Errand {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            if state.asked > state.answered || state.claim.is_some() || state.leaving || now >= beat {
                state.mine.beat += 1;
                state.mine.left = state.leaving;
                return Errand {
                    word: state.mine.to_bytes(),
                    claim: state.claim.clone(),
                    asked: state.asked,
                    read_all: std::mem::take(&mut state.read_all),
                    error: state.error.clone(),
                    leaving: state.leaving,
                };
            }
            state = match self.changed.wait_timeout(state, beat - now) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    fn run(&self, errand: &Errand) -> Result<Found, String> {
        let board = &self.board;
        board.put(&format!("rank{}", self.me), &errand.word)?;
        let mut found = Found::default();
        if let Some(mine) = &errand.claim {
            found.error = Some(board.claim("error", mine)?);
        } else if errand.error.is_none() && !errand.leaving {
            found.error = board.get(&["error".to_owned()])?.pop().flatten();
        }
        if found.error.is_some() {
            board.put(&format!("told{}", self.me), &[1])?;
        }
        if errand.read_all {
            let keys =
                |name: &str| -> Vec<String> { (0..self.world).map(|rank| format!("{name}{rank}")).collect() };
            let words = board.get(&keys("rank"))?;
            found.words = words.iter().map(|word| Position::from_bytes(word.as_deref()?)).collect();
            found.told = vec![false; self.world];
            if errand.error.is_some() || found.error.is_some() {
                found.told = board.get(&keys("told"))?.iter().map(Option::is_some).collect();
            }
        }
        Ok(found)
    }
}

fn encode(rank: usize, error: &CommError) -> Vec<u8> {
    let rank = match error {
        CommError::Poisoned { rank, .. } => rank.0,
        _ => Rank::from_index(rank).0,
    };
    let mut bytes = rank.to_le_bytes().to_vec();
    bytes.extend_from_slice(&(error.kind() as u32).to_le_bytes());
    bytes.extend_from_slice(error.to_string().as_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> CommError {
    let word = |at: usize| {
        bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()).map_or(0, |word| u32::from_le_bytes(*word))
    };
    CommError::Poisoned {
        rank: Rank(word(0)),
        kind: ErrorKind::from_code(word(4)),
        message: String::from_utf8_lossy(bytes.get(8..).unwrap_or_default()).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_told_in_its_own_words() {
        let error = CommError::Segment("no room".to_owned());
        let told = decode(&encode(3, &error));
        assert_eq!((told.to_string(), told.kind()), (error.to_string(), error.kind()));
        assert!(matches!(&told, CommError::Poisoned { rank: Rank(3), .. }));
        // Passed on, it is still that of the rank that failed.
        assert_eq!(encode(1, &told), encode(3, &error));
        assert_eq!(decode(&[1, 2]).to_string(), "");
    }
}
