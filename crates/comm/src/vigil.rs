//! What a rank concludes while a call over a byte transport makes it wait, or after the transport has failed.
//!
//! All of it is decided here from what is known of the others and the time that has passed; who leaves word, looks
//! and waits is [`crate::over_bytes`].
//!
//! ```text
//! waiting   1 s: look at the board, again every second     notice: warn who is missing     deadline: fail
//! broken    look: who has died or left is named            others have fallen silent       the transport's own words
//! ```

use std::time::{Duration, Instant};

use deepspeed_core::Rank;

use crate::{
    CommError,
    error::{Absent, Departure, Place},
    fingerprint::Fingerprint,
    position::Position,
};

/// How often a rank leaves word that it lives, in a group of up to 128 ranks.
pub(crate) const BEAT: Duration = Duration::from_secs(2);
/// How often a rank that waits looks at the board.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it reads where all others are, in a group of up to 128 ranks.
const READ_EVERY: Duration = Duration::from_secs(5);
/// How often it looks once the transport has failed.
const LOOK_HARD: Duration = Duration::from_millis(200);
/// How long the board may take to say whether another rank has failed first.
const ANSWER: Duration = Duration::from_millis(500);
/// How long after the transport's failure it looks for who ended on this host: a connection closes before its process
/// is seen to be gone.
const GRACE: Duration = Duration::from_millis(1500);

/// How long a rank waits before what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Until it looks where the others are.
    pub(crate) look_after: Duration,
    /// Until it warns who is missing.
    pub(crate) notice_after: Duration,
    /// Until all fail.
    pub(crate) deadline: Duration,
    /// How often ranks leave word that they live.
    pub(crate) beat: Duration,
    /// How often a rank that waits reads where all others are.
    read_every: Duration,
}

impl Patience {
    /// Half of a short deadline is early enough for a warning.
    pub(crate) fn new(notice_after: Duration, deadline: Duration, world: usize) -> Self {
        let notice_after = notice_after.min(deadline / 2);
        let crowd = u32::try_from(world / 128).unwrap_or(u32::MAX).max(1);
        let look_after = LOOK_EVERY.min(notice_after / 2);
        Self { look_after, notice_after, deadline, beat: BEAT * crowd, read_every: READ_EVERY * crowd }
    }

    /// After what time the transport's own time-out is ours: both count from about the same moment.
    fn nearly_all(&self) -> Duration {
        self.deadline - (self.deadline / 10).min(Duration::from_secs(1))
    }

    /// How long a rank may say nothing after a failure before it counts as gone.
    fn silence(&self) -> Duration {
        self.beat * 2 + Duration::from_secs(1)
    }
}

/// What is known of another rank.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    /// Its process id.
    pub(crate) pid: u32,
    /// Whether it is on another host, where its end cannot be seen.
    pub(crate) remote: bool,
    /// How its process ended, if that was seen.
    pub(crate) ended: Option<Departure>,
    /// What it last said; nothing if it was not heard of.
    pub(crate) said: Option<Position>,
}

/// What is known of the group.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard {
    /// The group's error, if somebody has failed.
    pub(crate) error: Option<CommError>,
    /// By rank; this rank's own entry means nothing.
    pub(crate) peers: Vec<Peer>,
    /// When the board was last read, or tried to be.
    pub(crate) looked: Option<Instant>,
    /// Why the board cannot be read, if the last try failed.
    pub(crate) unreachable: Option<String>,
}

/// What to do next.
#[derive(Debug)]
pub(crate) enum Step {
    /// Wait on.
    Wait,
    /// Leave word and read the board, then wait on.
    Look {
        /// Whether to read where the others are, too; the group's error is read at any rate.
        all: bool,
    },
    /// Say who is missing, then wait on.
    Warn(Vec<Absent>),
    /// End the call with this error.
    Fail(CommError),
}

/// Who waits, as errors name it.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) rank: Rank,
    /// What carries the bytes.
    pub(crate) transport: String,
    /// What the program does; empty if it did not say.
    pub(crate) activity: String,
}

/// One wait in one call.
#[derive(Debug)]
pub(crate) struct Vigil<'c> {
    caller: Caller,
    me: usize,
    call: &'c Fingerprint,
    patience: Patience,
    began: Instant,
    looked: Option<Instant>,
    read: Option<Instant>,
    noticed: bool,
    broken: Option<Broken>,
}

/// The transport has failed.
#[derive(Debug)]
struct Broken {
    since: Instant,
    problem: String,
    /// The beats of the others, by rank, when the board was first read since.
    beats: Option<Vec<Option<u64>>>,
}

impl<'c> Vigil<'c> {
    pub(crate) fn new(caller: Caller, call: &'c Fingerprint, patience: Patience, now: Instant) -> Self {
        let me = caller.rank.index();
        Self {
            caller,
            me,
            call,
            patience,
            began: now,
            looked: None,
            read: None,
            noticed: false,
            broken: None,
        }
    }

    /// The call that waits.
    pub(crate) fn call(&self) -> &Fingerprint {
        self.call
    }

    /// How long it has waited.
    pub(crate) fn waited(&self, now: Instant) -> Duration {
        now - self.began
    }

    /// The transport says that the call has failed.
    pub(crate) fn transport_failed(&mut self, now: Instant, problem: String) {
        // A time-out of the transport's own, as long as ours, is no reason to look for the dead.
        if now - self.began < self.patience.nearly_all() {
            self.broken = Some(Broken { since: now, problem, beats: None });
        } else {
            self.patience.deadline = Duration::ZERO;
        }
    }

    /// Whether what is known of the others matters by now.
    pub(crate) fn is_watchful(&self, now: Instant) -> bool {
        self.broken.is_some() || now - self.began >= self.patience.look_after
    }

    /// What to do now, given what is known.
    pub(crate) fn step(&mut self, now: Instant, heard: &Heard) -> Step {
        if let Some(error) = &heard.error {
            return Step::Fail(error.clone());
        }
        if !self.is_watchful(now) {
            return Step::Wait;
        }
        if let Some(error) = self.mismatch(heard) {
            return Step::Fail(error);
        }
        if let Some(error) = self.departed(heard) {
            return Step::Fail(error);
        }
        if self.broken.is_some() {
            return self.step_broken(now, heard);
        }
        let waited = now - self.began;
        if waited >= self.patience.deadline {
            return Step::Fail(self.too_late(waited, heard));
        }
        let every = LOOK_EVERY.min(self.patience.look_after);
        let ripe = !self.noticed && waited >= self.patience.notice_after;
        if self.looked.is_none_or(|looked| now - looked >= every) {
            // Fresh words for what is about to be said.
            let soon = ripe || waited + every * 2 >= self.patience.deadline;
            let all = soon || self.read.is_none_or(|read| now - read >= self.patience.read_every);
            self.looked = Some(now);
            self.read = if all { Some(now) } else { self.read };
            return Step::Look { all };
        }
        if ripe && heard.looked.is_some() {
            let missing = self.missing(heard);
            if !missing.is_empty() {
                self.noticed = true;
                return Step::Warn(missing);
            }
        }
        Step::Wait
    }

    /// The transport has failed: looks for who is to blame, for a while.
    fn step_broken(&mut self, now: Instant, heard: &Heard) -> Step {
        let Some(broken) = &mut self.broken else { return Step::Wait };
        let beats =
            |heard: &Heard| heard.peers.iter().map(|it| it.said.as_ref().map(|said| said.beat)).collect();
        let since = now - broken.since;
        let fresh = heard.looked.is_some_and(|looked| looked >= broken.since) && heard.unreachable.is_none();
        if fresh && broken.beats.is_none() {
            broken.beats = Some(beats(heard));
        }
        let broken_beats = broken.beats.clone();
        let asked = self.looked.is_some_and(|looked| looked >= broken.since);
        // Another rank may know better: its error comes first.
        if asked
            && (fresh || since >= ANSWER || heard.unreachable.is_some())
            && let Some((rank, how)) = self.likeliest(heard)
        {
            return Step::Fail(self.gone(rank, how, heard));
        }
        let far = self.others(heard).any(|(_, peer)| peer.remote);
        let patient = if far && heard.unreachable.is_none() { self.patience.silence() } else { GRACE };
        if since < patient {
            if !asked || self.looked.is_none_or(|looked| now - looked >= LOOK_HARD) {
                self.looked = Some(now);
                return Step::Look { all: true };
            }
            return Step::Wait;
        }
        let silent = self.others(heard).find(|(rank, peer)| {
            let beat = peer.said.as_ref().map(|said| said.beat);
            let before = broken_beats.as_ref().and_then(|beats| *beats.get(*rank)?);
            peer.remote && before.is_some() && beat == before
        });
        match silent {
            Some((rank, _)) => Step::Fail(self.gone(rank, Departure::Silent, heard)),
            None => Step::Fail(self.unexplained(heard)),
        }
    }

    fn others<'h>(&self, heard: &'h Heard) -> impl Iterator<Item = (usize, &'h Peer)> + use<'h> {
        let me = self.me;
        heard.peers.iter().enumerate().filter(move |(rank, _)| *rank != me)
    }

    /// A peer that is in the call of the same number, which is another call.
    fn mismatch(&self, heard: &Heard) -> Option<CommError> {
        let calls =
            self.others(heard).filter_map(|(rank, peer)| Some((rank, peer.said.as_ref()?.call.as_ref()?)));
        let mut other = calls.filter(|(_, theirs)| theirs.seq == self.call.seq && *theirs != self.call);
        other.next().map(|(rank, theirs)| CommError::Mismatch {
            my_rank: self.caller.rank,
            mine: Box::new(self.call.clone()),
            rank: Rank::from_index(rank),
            theirs: Box::new(theirs.clone()),
        })
    }

    /// A peer that has said that it leaves without having finished the call.
    fn departed(&self, heard: &Heard) -> Option<CommError> {
        let mut left = self.others(heard).filter(|(_, peer)| {
            peer.said.as_ref().is_some_and(|said| said.left && said.finished() < self.call.seq)
        });
        left.next().map(|(rank, peer)| self.gone(rank, peer.ended.unwrap_or(Departure::Left), heard))
    }

    fn gone(&self, rank: usize, how: Departure, heard: &Heard) -> CommError {
        CommError::PeerGone {
            rank: Rank::from_index(rank),
            pid: heard.peers[rank].pid,
            how,
            operation: self.call.operation,
            seq: self.call.seq,
            what: self.call.what.clone(),
        }
    }

    /// The peers that have not reached the call, as far as is known.
    fn missing(&self, heard: &Heard) -> Vec<Absent> {
        self.others(heard)
            .map(|(rank, peer)| {
                let said = peer.said.as_ref().map_or(Place::Unheard, |said| said.place(self.call.seq));
                let place = match (said, peer.ended) {
                    (Place::Here, _) => Place::Here,
                    (_, Some(how)) => Place::Gone(how),
                    (said, None) => said,
                };
                Absent { rank: Rank::from_index(rank), place }
            })
            .filter(|absent| absent.place != Place::Here)
            .collect()
    }

    fn too_late(&self, waited: Duration, heard: &Heard) -> CommError {
        let missing = self.missing(heard);
        let (operation, seq, what) = (self.call.operation, self.call.seq, self.call.what.clone());
        if missing.is_empty() {
            let waited = waited.as_secs_f64();
            return self.transport(format!(
                "every rank has reached it, but no bytes come; waited {waited:.1} s; is the network between the ranks \
                 broken?"
            ));
        }
        CommError::Deadline { missing, operation, seq, what, waited }
    }

    /// Nobody was found who has ended: the transport's words, and where the others were last seen.
    fn unexplained(&self, heard: &Heard) -> CommError {
        let mut problem = self.broken.as_ref().map_or_else(String::new, |broken| broken.problem.clone());
        if heard.unreachable.is_some() && self.me != 0 {
            problem.push_str(
                "; the store through which ranks tell where they are, at rank 0, cannot be reached either",
            );
        }
        for absent in self.missing(heard).iter().filter(|absent| absent.place != Place::Unheard) {
            problem.push_str("; ");
            problem.push_str(&absent.sentence(&self.call.name()));
        }
        self.transport(problem)
    }

    fn transport(&self, problem: String) -> CommError {
        let Caller { rank, transport, activity } = self.caller.clone();
        CommError::Transport { rank, call: Box::new(self.call.clone()), transport, activity, problem }
    }

    /// Of the peers whose processes have ended before they finished the call, the one most likely to have ended first:
    /// one that was killed rather than one that exited, which ranks do after another has failed.
    fn likeliest(&self, heard: &Heard) -> Option<(usize, Departure)> {
        let weight = |how: Departure| match how {
            Departure::Killed { .. } => 0,
            Departure::Exited { code } if code != 0 => 1,
            Departure::Panicked | Departure::Ended | Departure::Silent => 2,
            Departure::Exited { .. } | Departure::Left => 3,
        };
        let finished = |peer: &Peer| peer.said.as_ref().is_some_and(|said| said.finished() >= self.call.seq);
        self.others(heard)
            .filter(|(_, peer)| !finished(peer))
            .filter_map(|(rank, peer)| Some((rank, peer.ended?)))
            .min_by_key(|(_, how)| weight(*how))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Operation;

    const CLOSED: &str = "connection closed";

    fn call() -> Fingerprint {
        Fingerprint::new(Operation::ReduceScatter, 412, "unit blocks.7").elements(64)
    }

    fn patience() -> Patience {
        Patience::new(Duration::from_secs(5), Duration::from_secs(60), 4)
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Rank 0 of four, in call 412 since `now`.
    fn vigil(call: &Fingerprint, now: Instant) -> Vigil<'_> {
        let caller = Caller { rank: Rank(0), transport: "a wire".to_owned(), activity: String::new() };
        Vigil::new(caller, call, patience(), now)
    }

    /// Everybody in call 412; the board was read at `looked`.
    fn all_here(looked: Instant) -> Heard {
        let said = Position { call: Some(call()), inside: true, beat: 3, ..Position::default() };
        let peer = Peer { pid: 100, said: Some(said), ..Peer::default() };
        Heard { peers: vec![peer; 4], looked: Some(looked), ..Heard::default() }
    }

    /// As `all_here`, but rank 3 saves a checkpoint after call 411.
    fn third_is_saving(looked: Instant) -> Heard {
        let mut heard = all_here(looked);
        let last = Fingerprint::new(Operation::ReduceScatter, 411, "unit blocks.7");
        let activity = "save_checkpoint".to_owned();
        heard.peers[3].said = Some(Position { call: Some(last), activity, beat: 3, ..Position::default() });
        heard
    }

    fn failed(step: Step) -> String {
        match step {
            Step::Fail(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_wait_looks_then_warns_once_then_fails() {
        let (call, start) = (call(), Instant::now());
        let mut vigil = vigil(&call, start);
        assert!(matches!(vigil.step(start + seconds(0.9), &Heard::default()), Step::Wait));
        let mut looks = 0;
        let mut warnings = Vec::new();
        for tick in 5..300 {
            let now = start + seconds(f64::from(tick) * 0.2);
            match vigil.step(now, &third_is_saving(now)) {
                Step::Wait => {}
                Step::Look { .. } => looks += 1,
                Step::Warn(missing) => warnings.push((tick, missing)),
                Step::Fail(error) => panic!("{error}"),
            }
        }
        assert!((50..=60).contains(&looks), "{looks} looks in a minute");
        assert_eq!(warnings.len(), 1);
        let (tick, missing) = &warnings[0];
        assert!((25..=30).contains(tick), "{tick}");
        assert_eq!(missing.len(), 1);
        let now = start + seconds(60.0);
        assert_eq!(
            failed(vigil.step(now, &third_is_saving(now))),
            "rank 3 has not reached reduce_scatter #412 of unit blocks.7; it is in save_checkpoint; waited 60.0 s"
        );
    }

    #[test]
    fn a_crowd_looks_less_often() {
        let few = Patience::new(Duration::from_secs(5), Duration::from_secs(60), 8);
        let many = Patience::new(Duration::from_secs(5), Duration::from_secs(60), 1024);
        assert_eq!((many.beat, many.read_every), (few.beat * 8, few.read_every * 8));
    }

    #[test]
    fn the_groups_error_comes_first() {
        let (call, start) = (call(), Instant::now());
        let mut vigil = vigil(&call, start);
        let error = CommError::Segment("said by another rank".to_owned());
        let heard = Heard { error: Some(error.clone()), ..Heard::default() };
        assert_eq!(failed(vigil.step(start, &heard)), error.to_string());
    }

    #[test]
    fn another_call_of_the_same_number_is_a_mismatch_at_the_first_look() {
        let (call, start) = (call(), Instant::now());
        let mut vigil = vigil(&call, start);
        let mut heard = all_here(start);
        let other = Fingerprint::new(Operation::AllGather, 412, "unit blocks.6").elements(64);
        heard.peers[2].said = Some(Position { call: Some(other), inside: true, ..Position::default() });
        let text = failed(vigil.step(start + seconds(1.0), &heard));
        assert!(text.contains("rank 0 called reduce_scatter #412 of unit blocks.7"), "{text}");
        assert!(text.contains("rank 2 called all_gather #412 of unit blocks.6"), "{text}");
    }

    #[test]
    fn who_left_before_the_call_is_named_and_who_left_after_it_is_not() {
        let (call, start) = (call(), Instant::now());
        let mut heard = all_here(start);
        let word = |inside| Position { call: Some(call.clone()), inside, left: true, ..Position::default() };
        heard.peers[1].said = Some(word(false));
        assert!(matches!(vigil(&call, start).step(start + seconds(1.0), &heard), Step::Look { .. }));
        heard.peers[1].said = Some(word(true));
        assert_eq!(
            failed(vigil(&call, start).step(start + seconds(1.0), &heard)),
            "rank 1 (pid 100) left the group before it finished reduce_scatter #412 of unit blocks.7"
        );
    }

    #[test]
    fn a_broken_transport_waits_for_the_board_before_it_names_the_dead() {
        let (call, start) = (call(), Instant::now());
        let mut vigil = vigil(&call, start);
        vigil.transport_failed(start + seconds(0.1), CLOSED.to_owned());
        let mut heard = all_here(start);
        heard.peers[1].ended = Some(Departure::Exited { code: 1 });
        heard.peers[2].ended = Some(Departure::Killed { signal: 9 });
        assert!(matches!(vigil.step(start + seconds(0.1), &heard), Step::Look { all: true }));
        assert!(matches!(vigil.step(start + seconds(0.12), &heard), Step::Wait));
        heard.looked = Some(start + seconds(0.13));
        // Of two that ended, the one that was killed is the likelier reason.
        let text = failed(vigil.step(start + seconds(0.14), &heard));
        assert!(text.starts_with("rank 2 (pid 100) was killed by signal 9 (SIGKILL) before"), "{text}");
    }

    #[test]
    fn a_broken_transport_names_who_has_fallen_silent_on_another_host() {
        let (call, start) = (call(), Instant::now());
        let mut vigil = vigil(&call, start);
        vigil.transport_failed(start, CLOSED.to_owned());
        for tick in 0_u32.. {
            let now = start + seconds(f64::from(tick) * 0.02);
            let mut heard = all_here(now);
            for (rank, peer) in heard.peers.iter_mut().enumerate() {
                peer.remote = rank > 1;
                if let Some(said) = &mut peer.said
                    && rank != 3
                {
                    said.beat += u64::from(tick / 100);
                }
            }
            if let Step::Fail(error) = vigil.step(now, &heard) {
                assert!(error.to_string().starts_with("rank 3 (pid 100) has fallen silent"), "{error}");
                assert!((patience().silence()..seconds(8.0)).contains(&(now - start)));
                return;
            }
        }
    }

    #[test]
    fn a_broken_transport_that_nobody_explains_keeps_its_words() {
        let (call, start) = (call(), Instant::now());
        let mut vigil = vigil(&call, start);
        vigil.transport_failed(start, CLOSED.to_owned());
        let late = start + GRACE;
        assert!(!matches!(vigil.step(start, &third_is_saving(start)), Step::Fail(_)));
        assert_eq!(
            failed(vigil.step(late, &third_is_saving(late))),
            "rank 0 failed in reduce_scatter #412 of unit blocks.7 (64 elements) over a wire: connection closed; rank 3 \
             has not reached reduce_scatter #412 of unit blocks.7; it is in save_checkpoint"
        );
    }

    #[test]
    fn the_transports_own_time_out_is_the_deadline() {
        let (call, start) = (call(), Instant::now());
        let mut vigil = vigil(&call, start);
        let now = start + seconds(59.8);
        vigil.transport_failed(now, "timed out after 60 s".to_owned());
        let text = failed(vigil.step(now, &third_is_saving(now)));
        assert!(text.ends_with("it is in save_checkpoint; waited 59.8 s"), "{text}");
        let mut all = vigil;
        let text = failed(all.step(now, &all_here(now)));
        assert!(text.contains("every rank has reached it, but no bytes come"), "{text}");
    }
}
