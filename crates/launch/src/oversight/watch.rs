//! When to end the job, and whose fault it was: a state machine over the ends of ranks, signals and the clock.
//!
//! ```text
//!              a rank fails                       settled                grace over
//!   Running ----------------> Settling(until) ------------> Terminating ----------> Killing
//!      |                                                        ^                      ^
//!      | Ctrl-C, SIGTERM                             grace over |                      | once more
//!      +---------------------------------------------> Interrupted --------------------+
//! ```
//!
//! *Settling* leaves a moment for the real cause to show itself: when a rank dies, its peers notice within milliseconds, and a peer
//! that complains of it may well be gone before the one that is to blame has finished its own last words.

use crate::ranks::signals::Ending;
use std::time::Duration;

/// How long each phase may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// From a failure to the end of the others, in case a better cause turns up.
    pub(crate) settle: Duration,
    /// The same where the first to fail only complained about a peer.
    pub(crate) settle_victim: Duration,
    /// From SIGTERM to SIGKILL after a failure.
    pub(crate) terminate: Duration,
    /// A further signal within this time of the first is the same one, come by another way: a terminal signals a wrapper
    /// and the launcher, and the wrapper passes it on.
    pub(crate) echo: Duration,
    /// From the user's signal to SIGTERM, or to SIGKILL if the signal was SIGTERM.
    pub(crate) interrupt: Duration,
    /// How long a rank may stay stopped while others run.
    pub(crate) stopped: Duration,
}

impl Default for Patience {
    /// A failed job is over in at most 2.1 seconds, whatever its ranks do; an interrupted one has seven seconds to save its work, so that
    /// it is over within ten.
    fn default() -> Self {
        Self {
            settle: Duration::from_millis(100),
            settle_victim: Duration::from_millis(1000),
            terminate: Duration::from_millis(1100),
            echo: Duration::from_millis(300),
            interrupt: Duration::from_secs(7),
            stopped: Duration::from_secs(5),
        }
    }
}

/// What happens to the job. Times are measured from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A rank's process is over.
    Ended {
        /// The rank.
        rank: usize,
        /// How.
        ending: Ending,
        /// Whether its last words say that it is a victim: it lost a peer.
        victim: bool,
    },
    /// The connection to a host is gone, and with it `count` ranks from `first` on, as far as they still ran.
    HostLost {
        /// The first rank of the host.
        first: usize,
        /// How many it has.
        count: usize,
    },
    /// A rank's process was stopped by this signal, which is not an end.
    Stopped {
        /// The rank.
        rank: usize,
        /// The signal's number.
        signal: i32,
    },
    /// A rank that was stopped goes on.
    Continued {
        /// The rank.
        rank: usize,
    },
    /// The launcher itself was told to stop, by this signal's number.
    Interrupted(i32),
    /// Time has passed.
    Tick,
}

/// What is to be done: send this signal to every rank that still runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Pass on the signal that the launcher received.
    PassOn(i32),
    /// Ask to end.
    Terminate,
    /// End by force.
    Kill,
}

/// Where one rank stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RankState {
    /// It runs.
    Running,
    /// It ended by itself.
    Ended {
        /// How.
        ending: Ending,
        /// When.
        at: Duration,
        /// Its place in the order of ends.
        order: usize,
        /// Whether it only lost a peer.
        victim: bool,
    },
    /// It ended after the launcher told it to.
    TornDown {
        /// How.
        ending: Ending,
    },
}

/// How the job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Every rank exited with 0.
    Success,
    /// A rank failed.
    Failed {
        /// The rank that is to blame.
        cause: usize,
        /// How it ended.
        ending: Ending,
    },
    /// The launcher was told to stop.
    Interrupted(i32),
}

impl Outcome {
    /// The launcher's exit code: that of the failure, never 0 after one.
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Outcome::Success => 0,
            Outcome::Failed { ending, .. } => ending.shell_code().max(1),
            Outcome::Interrupted(signal) => Ending::Signal(signal).shell_code(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Settling { until: Duration },
    Interrupted { until: Duration, signal: i32 },
    Terminating { until: Duration },
    Killing,
}

/// The watch over the ranks of one job.
#[derive(Debug)]
pub(crate) struct Watch {
    patience: Patience,
    phase: Phase,
    ranks: Vec<RankState>,
    ended: usize,
    interrupted: Option<(i32, Duration)>,
    /// Ranks that are stopped, by which signal and since when.
    stopped: Vec<Option<(i32, Duration)>>,
    /// The rank that was stopped for too long, by which signal, and when that was.
    held_up: Option<(usize, i32, Duration)>,
}

const SIGTERM: i32 = 15;

impl Watch {
    /// Begins with `world` running ranks.
    pub(crate) fn new(world: usize, patience: Patience) -> Self {
        Self {
            patience,
            phase: Phase::Running,
            ranks: vec![RankState::Running; world],
            ended: 0,
            interrupted: None,
            stopped: vec![None; world],
            held_up: None,
        }
    }

    /// Takes in what happened at `now` and says what to do.
    pub(crate) fn on(&mut self, now: Duration, event: Event) -> Option<Action> {
        match event {
            Event::Ended { rank, ending, victim } => self.on_ended(now, rank, ending, victim),
            Event::HostLost { first, count } => self.on_host_lost(now, first, count),
            Event::Stopped { rank, signal } => {
                *self.stopped.get_mut(rank)? = Some((signal, now));
                None
            }
            Event::Continued { rank } => {
                *self.stopped.get_mut(rank)? = None;
                None
            }
            Event::Interrupted(signal) => self.on_interrupted(now, signal),
            Event::Tick => self.on_tick(now),
        }
    }

    /// Whether the ranks were told to end.
    fn told(&self) -> bool {
        !matches!(self.phase, Phase::Running | Phase::Settling { .. })
    }

    fn on_host_lost(&mut self, now: Duration, first: usize, count: usize) -> Option<Action> {
        let (told, ending) = (self.told(), Ending::HostLost);
        let order = self.ended;
        for state in
            self.ranks.iter_mut().skip(first).take(count).filter(|state| **state == RankState::Running)
        {
            *state = if told {
                RankState::TornDown { ending }
            } else {
                RankState::Ended { ending, at: now, order, victim: false }
            };
            self.ended += 1;
        }
        if told || self.ended == order {
            return None;
        }
        self.phase = Phase::Settling { until: now };
        self.on_tick(now)
    }

    fn on_ended(&mut self, now: Duration, rank: usize, ending: Ending, victim: bool) -> Option<Action> {
        let told = self.told();
        let state = self.ranks.get_mut(rank).filter(|state| **state == RankState::Running)?;
        *state = if told {
            RankState::TornDown { ending }
        } else {
            RankState::Ended { ending, at: now, order: self.ended, victim }
        };
        self.ended += 1;
        if told || ending.is_success() {
            return None;
        }
        let patience = match blame(ending, victim) {
            Blame::Crash => Duration::ZERO,
            Blame::Failure => self.patience.settle,
            Blame::Victim => self.patience.settle_victim,
        };
        let until = match self.phase {
            Phase::Settling { until } => until.min(now + patience),
            _ => now + patience,
        };
        self.phase = Phase::Settling { until };
        self.on_tick(now)
    }

    fn on_interrupted(&mut self, now: Duration, signal: i32) -> Option<Action> {
        match self.interrupted {
            None if self.phase == Phase::Running => {
                self.interrupted = Some((signal, now));
                self.phase = Phase::Interrupted { until: now + self.patience.interrupt, signal };
                Some(Action::PassOn(signal))
            }
            Some((_, first)) if now < first + self.patience.echo => None,
            _ => {
                self.phase = Phase::Killing;
                Some(Action::Kill)
            }
        }
    }

    fn on_tick(&mut self, now: Duration) -> Option<Action> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        if self.phase == Phase::Running {
            self.held_up = self.longest_stopped().map(|(rank, signal, _)| (rank, signal, now));
        }
        let (phase, action) = match self.phase {
            Phase::Running | Phase::Settling { .. } => {
                (Phase::Terminating { until: now + self.patience.terminate }, Action::Terminate)
            }
            Phase::Interrupted { signal, .. } if signal != SIGTERM => {
                (Phase::Terminating { until: now + self.patience.terminate }, Action::Terminate)
            }
            _ => (Phase::Killing, Action::Kill),
        };
        self.phase = phase;
        Some(action)
    }

    /// When to come back with [`Event::Tick`] if nothing happens before.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        match self.phase {
            Phase::Running => self.longest_stopped().map(|(.., since)| since + self.patience.stopped),
            Phase::Killing => None,
            Phase::Settling { until } | Phase::Interrupted { until, .. } | Phase::Terminating { until } => {
                Some(until)
            }
        }
    }

    /// The rank that has been stopped for longest while others run. Where all are, someone pauses the whole job, which is no failure.
    fn longest_stopped(&self) -> Option<(usize, i32, Duration)> {
        let running = |rank: usize| self.ranks[rank] == RankState::Running;
        let is_paused =
            (0..self.ranks.len()).filter(|rank| running(*rank)).all(|rank| self.stopped[rank].is_some());
        if is_paused {
            return None;
        }
        let stopped = self.stopped.iter().enumerate().filter(|(rank, _)| running(*rank));
        stopped
            .filter_map(|(rank, stopped)| stopped.map(|(signal, since)| (rank, signal, since)))
            .min_by_key(|(.., since)| *since)
    }

    /// When a rank's failure was known.
    pub(crate) fn failed_at(&self, rank: usize) -> Duration {
        match (self.held_up, self.ranks.get(rank)) {
            (Some((held_up, _, at)), _) if held_up == rank => at,
            (_, Some(RankState::Ended { at, .. })) => *at,
            _ => Duration::ZERO,
        }
    }

    /// Whether every rank is over.
    pub(crate) fn is_over(&self) -> bool {
        self.ended == self.ranks.len()
    }

    /// The state of each rank, by rank.
    pub(crate) fn ranks(&self) -> &[RankState] {
        &self.ranks
    }

    /// Counts every rank that still runs as torn down: they cannot be ended.
    pub(crate) fn give_up(&mut self) {
        for state in self.ranks.iter_mut().filter(|state| **state == RankState::Running) {
            *state = RankState::TornDown { ending: Ending::Signal(9) };
            self.ended += 1;
        }
    }

    /// The outcome, once every rank is over.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        if !self.is_over() {
            return None;
        }
        if let Some((signal, _)) = self.interrupted {
            return Some(Outcome::Interrupted(signal));
        }
        if let Some((cause, signal, _)) = self.held_up {
            return Some(Outcome::Failed { cause, ending: Ending::Stopped(signal) });
        }
        // Those that the launcher ended are not to blame, and a crash explains more than a complaint.
        let cause = self.ranks.iter().enumerate().filter_map(|(rank, state)| match *state {
            RankState::Ended { ending, order, victim, .. } if !ending.is_success() => {
                Some(((blame(ending, victim), order), rank, ending))
            }
            _ => None,
        });
        Some(
            cause
                .min_by_key(|(key, ..)| *key)
                .map_or(Outcome::Success, |(_, cause, ending)| Outcome::Failed { cause, ending }),
        )
    }
}

/// How likely a failed rank is the cause rather than a consequence; less is likelier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Blame {
    /// It was killed or crashed: no peer's doing.
    Crash,
    /// It failed, and not for want of a peer.
    Failure,
    /// It lost a peer.
    Victim,
}

fn blame(ending: Ending, victim: bool) -> Blame {
    match ending {
        // SIGILL, SIGBUS, SIGFPE, SIGKILL, SIGSEGV, SIGSYS. SIGABRT is how native code ends on an error it reports, which may
        // be that a peer is gone.
        Ending::Signal(4 | 7 | 8 | 9 | 11 | 31) | Ending::HostLost => Blame::Crash,
        _ if victim => Blame::Victim,
        _ => Blame::Failure,
    }
}

/// Whether a rank's last words say that it failed because a peer was lost: an exception of ours or of torch's communication, or a
/// connection that the peer closed.
pub(crate) fn is_victim(last_words: &str) -> bool {
    const SIGNS: [&str; 11] = [
        "CommError",
        "CommTimeout",
        "PeerGone",
        "DistBackendError",
        "DistNetworkError",
        "DistStoreError",
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "ncclRemoteError",
        "ncclSystemError",
    ];
    SIGNS.iter().any(|sign| last_words.contains(sign))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    fn ended(rank: usize, ending: Ending) -> Event {
        Event::Ended { rank, ending, victim: false }
    }

    fn lost_peer(rank: usize) -> Event {
        Event::Ended { rank, ending: Ending::Code(1), victim: true }
    }

    #[test]
    fn all_well() {
        let mut watch = Watch::new(2, Patience::default());
        assert_eq!(watch.on(ms(1), ended(1, Ending::Code(0))), None);
        assert_eq!((watch.deadline(), watch.outcome()), (None, None));
        assert_eq!(watch.on(ms(9), ended(0, Ending::Code(0))), None);
        assert_eq!(watch.outcome(), Some(Outcome::Success));
    }

    #[test]
    fn a_killed_rank_ends_the_others_at_once() {
        let mut watch = Watch::new(3, Patience::default());
        assert_eq!(watch.on(ms(10), ended(1, Ending::Signal(9))), Some(Action::Terminate));
        assert_eq!(watch.on(ms(20), ended(0, Ending::Signal(15))), None);
        assert_eq!(watch.on(ms(1109), Event::Tick), None);
        assert_eq!(watch.on(ms(1110), Event::Tick), Some(Action::Kill));
        watch.on(ms(1111), ended(2, Ending::Signal(9)));
        let outcome = watch.outcome().unwrap();
        assert_eq!(outcome, Outcome::Failed { cause: 1, ending: Ending::Signal(9) });
        assert_eq!(outcome.exit_code(), 137);
        assert_eq!(watch.ranks()[2], RankState::TornDown { ending: Ending::Signal(9) });
    }

    #[test]
    fn the_victim_that_leaves_first_is_not_the_cause() {
        let mut watch = Watch::new(3, Patience::default());
        assert_eq!(watch.on(ms(10), lost_peer(0)), None);
        assert_eq!(watch.on(ms(20), lost_peer(2)), None);
        assert_eq!(watch.on(ms(400), ended(1, Ending::Code(3))), None);
        assert_eq!(watch.outcome(), Some(Outcome::Failed { cause: 1, ending: Ending::Code(3) }));
    }

    #[test]
    fn a_crash_within_the_moment_explains_an_exception() {
        let mut watch = Watch::new(3, Patience::default());
        assert_eq!(watch.on(ms(10), ended(0, Ending::Code(1))), None);
        assert_eq!(watch.on(ms(50), ended(2, Ending::Signal(11))), Some(Action::Terminate));
        watch.on(ms(60), ended(1, Ending::Signal(15)));
        assert_eq!(watch.outcome(), Some(Outcome::Failed { cause: 2, ending: Ending::Signal(11) }));
    }

    #[test]
    fn a_lost_host_takes_its_ranks_with_it() {
        let mut watch = Watch::new(4, Patience::default());
        watch.on(ms(5), ended(3, Ending::Code(0)));
        assert_eq!(watch.on(ms(10), Event::HostLost { first: 2, count: 2 }), Some(Action::Terminate));
        watch.on(ms(20), ended(0, Ending::Signal(15)));
        watch.on(ms(20), ended(1, Ending::Signal(15)));
        assert_eq!(watch.outcome(), Some(Outcome::Failed { cause: 2, ending: Ending::HostLost }));
        let mut watch = Watch::new(2, Patience::default());
        assert_eq!(watch.on(ms(5), ended(0, Ending::Code(1))), None);
        assert_eq!(watch.on(ms(200), Event::Tick), Some(Action::Terminate));
        assert_eq!(watch.on(ms(210), Event::HostLost { first: 1, count: 1 }), None);
        assert_eq!(watch.outcome(), Some(Outcome::Failed { cause: 0, ending: Ending::Code(1) }));
    }

    #[test]
    fn a_stopped_rank_fails_the_job_unless_all_are() {
        let mut watch = Watch::new(2, Patience::default());
        assert_eq!(watch.on(ms(10), Event::Stopped { rank: 1, signal: 19 }), None);
        assert_eq!(watch.deadline(), Some(ms(5010)));
        watch.on(ms(1000), Event::Stopped { rank: 0, signal: 19 });
        assert_eq!((watch.deadline(), watch.on(ms(9000), Event::Tick)), (None, None));
        watch.on(ms(9000), Event::Continued { rank: 0 });
        watch.on(ms(9000), Event::Continued { rank: 1 });
        watch.on(ms(9100), Event::Stopped { rank: 1, signal: 19 });
        assert_eq!(watch.on(ms(14_099), Event::Tick), None);
        assert_eq!(watch.on(ms(14_100), Event::Tick), Some(Action::Terminate));
        watch.on(ms(14_101), ended(0, Ending::Signal(15)));
        watch.on(ms(15_300), ended(1, Ending::Signal(9)));
        let outcome = watch.outcome().unwrap();
        assert_eq!(outcome, Outcome::Failed { cause: 1, ending: Ending::Stopped(19) });
        assert_eq!((outcome.exit_code(), watch.failed_at(1)), (147, ms(14_100)));
    }

    #[test]
    fn only_victims_means_the_first_of_them() {
        let mut watch = Watch::new(2, Patience::default());
        watch.on(ms(10), lost_peer(1));
        assert_eq!(watch.on(ms(1010), Event::Tick), Some(Action::Terminate));
        watch.on(ms(1011), ended(0, Ending::Signal(15)));
        assert_eq!(watch.outcome(), Some(Outcome::Failed { cause: 1, ending: Ending::Code(1) }));
    }

    #[test]
    fn interrupt_then_patience_then_force() {
        let mut watch = Watch::new(1, Patience::default());
        assert_eq!(watch.on(ms(0), Event::Interrupted(2)), Some(Action::PassOn(2)));
        assert_eq!(watch.on(ms(7000), Event::Tick), Some(Action::Terminate));
        assert_eq!(watch.on(ms(8100), Event::Tick), Some(Action::Kill));
        watch.on(ms(11_101), ended(0, Ending::Signal(9)));
        assert_eq!(watch.outcome().unwrap().exit_code(), 130);
    }

    #[test]
    fn a_second_interrupt_kills() {
        let mut watch = Watch::new(1, Patience::default());
        watch.on(ms(0), Event::Interrupted(2));
        assert_eq!(watch.on(ms(5), Event::Interrupted(2)), None);
        assert_eq!(watch.on(ms(305), Event::Interrupted(2)), Some(Action::Kill));
        let mut watch = Watch::new(1, Patience::default());
        assert_eq!(watch.on(ms(0), Event::Interrupted(15)), Some(Action::PassOn(15)));
        assert_eq!(watch.on(ms(7000), Event::Tick), Some(Action::Kill));
        watch.on(ms(11_101), ended(0, Ending::Code(0)));
        assert_eq!(watch.outcome().unwrap().exit_code(), 143);
    }

    #[test]
    fn victims_are_known_by_their_last_words() {
        assert!(is_victim("deepspeed.comm.CommError: rank 1 is gone"));
        assert!(is_victim("RuntimeError: [pair.cc:547] Connection closed by peer [127.0.0.1]:1"));
        assert!(!is_victim("ValueError: no"));
        assert!(!is_victim(""));
    }

    fn event(world: usize) -> impl Strategy<Value = Event> {
        prop_oneof![
            (
                0..world,
                prop_oneof![(0..4).prop_map(Ending::Code), (1..16).prop_map(Ending::Signal)],
                any::<bool>()
            )
                .prop_map(|(rank, ending, victim)| Event::Ended { rank, ending, victim }),
            (0..world, 0..world).prop_map(|(first, count)| Event::HostLost { first, count }),
            Just(Event::Interrupted(2)),
            Just(Event::Tick),
        ]
    }

    proptest! {
        /// Whatever happens, after a failure or an interrupt the job is told to die within its patience, and its exit code is not 0.
        #[test]
        fn a_failure_always_ends_the_job(events in prop::collection::vec((event(4), 0u64..300), 0..30)) {
            let mut watch = Watch::new(4, Patience::default());
            let (mut now, mut failed_at) = (0, None);
            for (event, wait) in events {
                now += wait;
                let failure = match event {
                    Event::Ended { rank, ending, .. } => {
                        watch.ranks()[rank] == RankState::Running && !ending.is_success()
                    }
                    Event::Interrupted(_) => true,
                    Event::HostLost { first, count } => {
                        watch.ranks().iter().skip(first).take(count).any(|state| *state == RankState::Running)
                    }
                    Event::Tick | Event::Stopped { .. } | Event::Continued { .. } => false,
                };
                if failure {
                    failed_at.get_or_insert(now);
                }
                watch.on(ms(now), event);
            }
            let mut killed = watch.phase == Phase::Killing;
            for _ in 0..4 {
                if let Some(deadline) = watch.deadline() {
                    prop_assert!(deadline <= ms(now) + ms(8100));
                    killed |= watch.on(deadline, Event::Tick) == Some(Action::Kill);
                }
            }
            prop_assert_eq!(killed, failed_at.is_some());
            for rank in 0..4 {
                watch.on(ms(now + 20_000), Event::Ended { rank, ending: Ending::Code(0), victim: false });
            }
            prop_assert_eq!(watch.outcome().unwrap().exit_code() != 0, failed_at.is_some());
        }
    }
}
