//! The watchdog of groups over a byte transport: keeps the [`Vigil`] of a call that waits, with what the [`Board`] and
//! the processes of this host tell.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use deepspeed_core::Rank;

use crate::{
    CommError, Interrupt, Options,
    board::{Board, Farewell, Post},
    error::{Departure, list},
    fingerprint::Fingerprint,
    vigil::{Caller, Heard, Patience, Peer, Step, Vigil},
    watch::{Process, start_time},
};

/// A rank's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot, so that the same pid later is not taken for it; 0 where the system
    /// does not say.
    pub started: u64,
    /// Whether its end cannot be seen from here: it is on another host, or in another container.
    pub remote: bool,
}

impl Member {
    /// The calling process.
    pub fn current() -> Self {
        Self { pid: std::process::id(), started: start_time(), remote: false }
    }
}

/// How often a wait looks around once the transport has failed.
const NAP: Duration = Duration::from_millis(20);
/// How long rank 0 stays to let the others read the group's error: the board may end with its process.
const LINGER: Duration = Duration::from_millis(2500);

/// A rank's watch over the others.
pub(crate) struct Lookout {
    rank: Rank,
    post: Post,
    patience: Patience,
    interrupt: Option<Interrupt>,
    members: Vec<Member>,
    /// By rank; observed from the first time it matters.
    processes: Mutex<Vec<Option<Process>>>,
}

impl fmt::Debug for Lookout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookout")
            .field("post", &self.post)
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

impl Lookout {
    pub(crate) fn open(
        board: Box<dyn Board>,
        rank: Rank,
        members: Vec<Member>,
        options: &Options,
    ) -> Result<Self, CommError> {
        let world = members.len();
        let patience = Patience::new(options.notice_after, options.deadline, world);
        Ok(Self {
            rank,
            post: Post::open(board, rank.index(), world, patience.beat)?,
            patience,
            interrupt: options.interrupt.clone(),
            processes: Mutex::new((0..world).map(|_| None).collect()),
            members,
        })
    }

    pub(crate) fn enter(&self, call: &Fingerprint) {
        self.post.enter(call);
    }

    pub(crate) fn finish(&self) {
        self.post.finish();
    }

    pub(crate) fn set_activity(&self, activity: &str) {
        self.post.set_activity(activity);
    }

    pub(crate) fn error(&self) -> Option<CommError> {
        self.post.error()
    }

    pub(crate) fn farewell(&self) -> Farewell {
        self.post.farewell()
    }

    pub(crate) fn vigil<'c>(&self, caller: Caller, call: &'c Fingerprint) -> Vigil<'c> {
        Vigil::new(caller, call, self.patience, Instant::now())
    }

    /// Looks around once while a call waits.
    ///
    /// # Errors
    /// What ends the wait.
    pub(crate) fn keep(&self, vigil: &mut Vigil<'_>) -> Result<(), CommError> {
        let now = Instant::now();
        let heard = if vigil.is_watchful(now) { self.heard() } else { Heard::default() };
        match vigil.step(now, &Heard { error: self.post.error(), ..heard }) {
            Step::Wait => {}
            Step::Look { all } => self.post.look(all),
            Step::Fail(error) => return Err(error),
            Step::Warn(missing) => {
                let call = vigil.call();
                tracing::warn!(
                    rank = self.rank.0,
                    "waiting for {:.0} s: {}; gives up after {:.0} s",
                    vigil.waited(now).as_secs_f64(),
                    list(&missing, call.operation, call.seq, &call.what),
                    self.patience.deadline.as_secs_f64(),
                );
            }
        }
        Ok(())
    }

    /// The transport has failed: finds out which rank is to blame, which may take seconds.
    pub(crate) fn explain(&self, vigil: &mut Vigil<'_>, problem: String) -> CommError {
        vigil.transport_failed(Instant::now(), problem);
        loop {
            if let Err(error) = self.keep(vigil) {
                return error;
            }
            if self.interrupt.as_ref().is_some_and(|interrupted| interrupted()) {
                let Fingerprint { operation, seq, what, .. } = vigil.call().clone();
                return CommError::Interrupted { rank: self.rank, operation, seq, what };
            }
            std::thread::sleep(NAP);
        }
    }

    /// Makes `error` the group's unless another rank was first; returns the group's.
    pub(crate) fn settle(&self, error: CommError) -> CommError {
        let stopped = matches!(error, CommError::Interrupted { .. });
        let error = self.post.claim(error);
        if self.rank.0 == 0 && !stopped {
            self.linger();
        }
        error
    }

    /// Waits until the others, as far as they live, have read the error.
    fn linger(&self) {
        let until = Instant::now() + LINGER;
        while Instant::now() < until {
            self.post.look(true);
            self.post.wait(Duration::from_millis(200));
            let read = self.post.read();
            let ended = self.ended();
            let over = |rank: usize| {
                let left = read.words[rank].as_ref().is_some_and(|word| word.left);
                rank == self.rank.index() || read.told[rank] || left || ended[rank].is_some()
            };
            if read.unreachable.is_some() || (0..self.members.len()).all(over) {
                return;
            }
            std::thread::sleep(NAP);
        }
    }

    /// All that is known of the others.
    fn heard(&self) -> Heard {
        let read = self.post.read();
        let ended = self.ended();
        let peers = self.members.iter().zip(ended).zip(read.words).map(|((member, ended), said)| Peer {
            pid: member.pid,
            remote: member.remote,
            ended,
            said,
        });
        Heard { error: None, peers: peers.collect(), looked: read.looked, unreachable: read.unreachable }
    }

    /// By rank: how the processes that can be seen from here have ended.
    fn ended(&self) -> Vec<Option<Departure>> {
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        let members = self.members.iter().zip(processes.iter_mut());
        members
            .map(|(member, process)| {
                // Ranks that are threads of one process end with it.
                let seen = !member.remote && member.started != 0 && member.pid != std::process::id();
                seen.then(|| {
                    process.get_or_insert_with(|| Process::observe(member.pid, member.started)).ended()
                })?
            })
            .collect()
    }
}
