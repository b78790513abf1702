//! The watchdog: who is alive, who is missing and where, and when waiting ends.
//!
//! What follows from the peers' state is decided by pure functions ([`departed`], [`missing`]); [`Watch`] gathers
//! that state each time a wait has slept for a while.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use deepspeed_core::Rank;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::{Pid, PidfdFlags},
};

use crate::{
    CommError, Options,
    error::{Absent, Departure, Place, list},
    fingerprint::Fingerprint,
    segment::{Membership, Segment},
    wait::reached,
};

/// One rank's view of its peers.
pub(crate) struct Watch {
    me: usize,
    options: Options,
    /// By rank; none where the peer has not joined yet, or is this process.
    processes: Vec<Option<Process>>,
    /// When the current wait began, and whether it was already reported.
    since: Option<Instant>,
    noticed: bool,
    looked: Option<Instant>,
}

/// What a wait needs from a peer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Need {
    /// That it has published this many chunks.
    Published(u32),
    /// That it has consumed this many chunks.
    Consumed(u32),
}

/// How a peer stands to the current call.
#[derive(Clone, Debug)]
struct Peer {
    rank: Rank,
    membership: Membership,
    /// How its process ended, if it did.
    ended: Option<Departure>,
    entered: u64,
    finished: u64,
    /// Whether it has done what the current wait needs.
    ready: bool,
}

impl Watch {
    pub(crate) fn new(me: usize, world: usize, options: Options) -> Self {
        Self {
            me,
            options,
            processes: (0..world).map(|_| None).collect(),
            since: None,
            noticed: false,
            looked: None,
        }
    }

    /// Begins a wait.
    pub(crate) fn start(&mut self) {
        self.since = None;
        self.noticed = false;
    }

    /// Looks after the peers while `call` waits for `need`.
    ///
    /// # Errors
    /// The group's error if there is one by now; else that of this wait.
    pub(crate) fn look(
        &mut self,
        segment: &Segment,
        call: &Fingerprint,
        need: Need,
    ) -> Result<(), CommError> {
        if let Some(error) = segment.poisoned() {
            return Err(error);
        }
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        // Peers may wake us often, and looking is a few system calls.
        if self.looked.is_some_and(|looked| now - looked < Duration::from_millis(20)) {
            return Ok(());
        }
        self.looked = Some(now);
        let (rank, operation, seq, what) =
            (Rank::from_index(self.me), call.operation, call.seq, call.what.clone());
        if self.options.interrupt.as_ref().is_some_and(|interrupted| interrupted()) {
            return Err(CommError::Interrupted { rank, operation, seq, what });
        }
        let peers = self.peers(segment, need);
        if let Some((rank, pid, how)) = departed(call.seq, &peers) {
            // A peer that failed says why before it goes.
            return Err(match segment.poisoned() {
                Some(error) => error,
                None => CommError::PeerGone { rank, pid, how, operation, seq, what },
            });
        }
        let waited = now - since;
        let late = waited >= self.options.deadline;
        if !late && (self.noticed || waited < self.options.notice_after) {
            return Ok(());
        }
        let missing: Vec<Absent> = missing(call.seq, &peers)
            .into_iter()
            .map(|peer| Absent { rank: peer.rank, place: place(segment, peer, call.seq) })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        if late {
            return Err(CommError::Deadline { missing, operation, seq, what, waited });
        }
        self.noticed = true;
        tracing::warn!(
            rank = self.me,
            "waiting for {:.0} s: {}; gives up after {:.0} s",
            waited.as_secs_f64(),
            list(&missing, operation, seq, &what),
            self.options.deadline.as_secs_f64(),
        );
        Ok(())
    }

    fn peers(&mut self, segment: &Segment, need: Need) -> Vec<Peer> {
        let mut peers = Vec::with_capacity(segment.world());
        for rank in (0..segment.world()).filter(|rank| *rank != self.me) {
            let control = segment.control(rank);
            let membership = control.member.0.get();
            let ended = match membership {
                Membership::Joined { pid, started } if pid != std::process::id() => {
                    self.processes[rank].get_or_insert_with(|| Process::observe(pid, started)).ended()
                }
                _ => None,
            };
            // Read after the peer's end was seen: what it did before, it had done by then (COMM-9).
            let ready = match need {
                Need::Published(count) => reached(control.published.0.load(), count),
                Need::Consumed(count) => reached(control.consumed.0.load(), count),
            };
            let load =
                |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Acquire);
            peers.push(Peer {
                rank: Rank::from_index(rank),
                membership,
                ended,
                entered: load(&control.member.0.entered),
                finished: load(&control.member.0.finished),
                ready,
            });
        }
        peers
    }
}

/// The first peer that is gone without having finished call `seq`: nobody can finish that call any more.
fn departed(seq: u64, peers: &[Peer]) -> Option<(Rank, u32, Departure)> {
    peers.iter().filter(|peer| peer.finished < seq).find_map(|peer| match (peer.membership, peer.ended) {
        (Membership::Left { pid }, _) => Some((peer.rank, pid, Departure::Left)),
        (Membership::Panicked { pid }, _) => Some((peer.rank, pid, Departure::Panicked)),
        (Membership::Joined { pid, .. }, Some(how)) => Some((peer.rank, pid, how)),
        (Membership::Joined { .. } | Membership::Absent, _) => None,
    })
}

/// The peers to name in a report: those that have not entered call `seq`, or else those whose part of it is missing.
///
/// A rank that waits for another inside the call is not to blame while a third has not come at all.
fn missing(seq: u64, peers: &[Peer]) -> Vec<&Peer> {
    let outside: Vec<&Peer> = peers.iter().filter(|peer| peer.entered < seq).collect();
    if outside.is_empty() { peers.iter().filter(|peer| !peer.ready).collect() } else { outside }
}

fn place(segment: &Segment, peer: &Peer, seq: u64) -> Place {
    let control = segment.control(peer.rank.index());
    if peer.membership == Membership::Absent {
        return Place::NotJoined;
    }
    if peer.entered >= seq {
        return Place::Here;
    }
    if peer.entered > peer.finished
        && let Some(call) = control.history.get(peer.entered)
    {
        return Place::In(call);
    }
    Place::Outside { activity: control.activity.get(), last: control.history.get(peer.finished) }
}

/// A peer's process, held so that its end is seen even if the pid is used again.
#[derive(Debug)]
pub(crate) enum Process {
    /// Watched through the kernel.
    Held { pidfd: OwnedFd, pid: u32, started: u64 },
    /// Watched through `/proc`: there are no pidfds, or a sandbox forbids them.
    Named { pid: u32, started: u64 },
    /// Over before it was first looked at.
    Gone,
}

impl Process {
    /// Looks after the process `pid` that started at `started`.
    pub(crate) fn observe(pid: u32, started: u64) -> Self {
        let pidfd = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .map(|pid| rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK));
        match (pidfd, Stat::read(pid)) {
            (Some(Err(Errno::SRCH)), _) => Self::Gone,
            // The pid was used again before we looked.
            (_, Some(stat)) if stat.started != started => Self::Gone,
            (Some(Ok(pidfd)), _) => Self::Held { pidfd, pid, started },
            _ => Self::Named { pid, started },
        }
    }

    /// How the process ended, if it did.
    pub(crate) fn ended(&self) -> Option<Departure> {
        match self {
            Self::Held { pidfd, pid, started } => {
                let mut poll = [PollFd::new(pidfd, PollFlags::IN)];
                match rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                    Ok(0) | Err(_) => None,
                    Ok(_) => Some(Self::status(*pid, *started).unwrap_or(Departure::Ended)),
                }
            }
            Self::Named { pid, started } => match Stat::read(*pid) {
                Some(stat) if stat.started == *started && !stat.ended => None,
                Some(_) => Some(Self::status(*pid, *started).unwrap_or(Departure::Ended)),
                // No entry means no process, unless there is no `/proc` at all.
                None => Stat::read(std::process::id()).map(|_| Departure::Ended),
            },
            Self::Gone => Some(Departure::Ended),
        }
    }

    /// How it ended, as far as a process that is not its parent can see: only until its parent reaps it.
    fn status(pid: u32, started: u64) -> Option<Departure> {
        let stat = Stat::read(pid)?;
        (stat.started == started && stat.ended).then(|| stat.departure())
    }
}

/// When this process started, in clock ticks since boot; 0 if the system does not say.
pub(crate) fn start_time() -> u64 {
    Stat::read(std::process::id()).map_or(0, |stat| stat.started)
}

/// The three fields of `/proc/<pid>/stat` that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    ended: bool,
    started: u64,
    /// As `wait` gives it.
    exit: i32,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Fields 3, 22 and 52 of the line, counted from 1 (`man 5 proc_pid_stat`). The second is the program's name
    /// in parentheses and may hold anything.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line[line.rfind(')')? + 1..].split_ascii_whitespace().collect();
        Some(Self {
            ended: matches!(*fields.first()?, "Z" | "X" | "x"),
            started: fields.get(19)?.parse().ok()?,
            exit: fields.get(49).and_then(|field| field.parse().ok()).unwrap_or(0),
        })
    }

    fn departure(self) -> Departure {
        match self.exit & 0x7f {
            0 => Departure::Exited { code: self.exit >> 8 & 0xff },
            signal => Departure::Killed { signal },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(rank: u32, entered: u64, finished: u64) -> Peer {
        Peer {
            rank: Rank(rank),
            membership: Membership::Joined { pid: 100 + rank, started: 0 },
            ended: None,
            entered,
            finished,
            ready: false,
        }
    }

    #[test]
    fn a_peer_that_left_after_the_call_is_not_missed() {
        let mut left = peer(1, 7, 7);
        left.membership = Membership::Left { pid: 101 };
        assert_eq!(departed(7, &[left.clone(), peer(2, 7, 6)]), None);
        assert_eq!(departed(8, &[left]), Some((Rank(1), 101, Departure::Left)));
    }

    #[test]
    fn a_dead_peer_is_named_with_its_end() {
        let mut dead = peer(2, 7, 6);
        dead.ended = Some(Departure::Killed { signal: 9 });
        assert_eq!(
            departed(7, &[peer(1, 7, 6), dead]),
            Some((Rank(2), 102, Departure::Killed { signal: 9 }))
        );
    }

    #[test]
    fn who_waits_inside_the_call_is_not_blamed_for_who_is_outside() {
        let ranks = |peers: Vec<&Peer>| peers.iter().map(|peer| peer.rank.0).collect::<Vec<_>>();
        assert_eq!(ranks(missing(7, &[peer(1, 7, 6), peer(2, 6, 6)])), [2]);
        let mut ready = peer(1, 7, 6);
        ready.ready = true;
        assert_eq!(ranks(missing(7, &[ready, peer(2, 7, 6)])), [2]);
    }

    #[test]
    fn reads_a_stat_line() {
        let tail = "S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 \
                    18 19 20 21 22 23 24 25 26 27 28 29 256";
        let stat = Stat::parse(&format!("42 (a) b (c) {tail}")).unwrap();
        assert_eq!(stat, Stat { ended: false, started: 98765, exit: 256 });
        assert_eq!(stat.departure(), Departure::Exited { code: 1 });
        assert_eq!(Stat { exit: 9, ..stat }.departure(), Departure::Killed { signal: 9 });
        assert!(Stat::parse("").is_none() && Stat::parse("1 (x)").is_none() && Stat::parse(")").is_none());
    }

    #[test]
    fn a_killed_child_is_seen_before_and_after_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let started = Stat::read(child.id()).unwrap().started;
        let process = Process::observe(child.id(), started);
        assert_eq!(process.ended(), None);
        assert_eq!(Process::observe(child.id(), started + 1).ended(), Some(Departure::Ended));
        child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while process.ended().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(process.ended(), Some(Departure::Killed { signal: 9 }));
        child.wait().unwrap();
        assert_eq!(process.ended(), Some(Departure::Ended));
    }
}
