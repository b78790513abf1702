//! Over a byte transport that waits, as Gloo does: who is missing is named, and every rank says the same.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::HashMap,
    process::{Child, Command},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use deepspeed_comm::{
    Board, ByteTransport, CommError, ErrorKind, Group, Into, Member, Options, OverBytes, Pieces, Progress,
};
use deepspeed_core::{Rank, Span};

/// A store in memory, which can go away.
#[derive(Clone, Debug, Default)]
struct Store {
    values: Arc<Mutex<HashMap<String, Vec<u8>>>>,
    gone: Arc<AtomicBool>,
}

impl Store {
    fn open(&self) -> Result<std::sync::MutexGuard<'_, HashMap<String, Vec<u8>>>, String> {
        if self.gone.load(Ordering::Relaxed) {
            return Err("connection refused".to_owned());
        }
        Ok(self.values.lock().unwrap())
    }
}

impl Board for Store {
    fn put(&self, key: &str, value: &[u8]) -> Result<(), String> {
        self.open()?.insert(key.to_owned(), value.to_vec());
        Ok(())
    }

    fn get(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, String> {
        let values = self.open()?;
        Ok(keys.iter().map(|key| values.get(key).cloned()).collect())
    }

    fn claim(&self, key: &str, value: &[u8]) -> Result<Vec<u8>, String> {
        Ok(self.open()?.entry(key.to_owned()).or_insert_with(|| value.to_vec()).clone())
    }
}

/// A transfer's kind and bytes.
type Sent = (&'static str, Vec<u8>);

/// What each rank has sent in each of its transfers.
#[derive(Debug, Default)]
struct Wire {
    sent: Mutex<Vec<Vec<Sent>>>,
    changed: Condvar,
}

/// One rank's end of the wire: a transfer is over when all ranks have begun one of its number and kind.
#[derive(Debug)]
struct End {
    rank: usize,
    wire: Arc<Wire>,
    begun: Mutex<Option<(usize, &'static str, usize)>>,
    /// What `wait` fails with, once this is set.
    broken: Arc<Mutex<Option<String>>>,
}

impl End {
    fn begin(&self, kind: &'static str, send: &[u8], receive: &mut [u8]) -> Result<Progress, String> {
        let mut sent = self.wire.sent.lock().unwrap();
        sent[self.rank].push((kind, send.to_vec()));
        *self.begun.lock().unwrap() = Some((sent[self.rank].len() - 1, kind, receive.as_mut_ptr().addr()));
        self.wire.changed.notify_all();
        Ok(Progress::Pending)
    }
}

impl ByteTransport for End {
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<Progress, String> {
        self.begin("all_to_all", send, receive)
    }

    fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<Progress, String> {
        self.begin("all_gather", mine, all)
    }

    fn broadcast(&self, _: &mut [u8], _: Rank) -> Result<Progress, String> {
        Err("not in this test".to_owned())
    }

    fn wait(&self, at_most: Duration) -> Result<Progress, String> {
        if let Some(problem) = self.broken.lock().unwrap().clone() {
            return Err(problem);
        }
        let (number, kind, target) = self.begun.lock().unwrap().unwrap();
        let sent = self.wire.sent.lock().unwrap();
        let missing = |sent: &mut Vec<Vec<Sent>>| {
            sent.iter().any(|sent| sent.get(number).is_none_or(|(theirs, _)| *theirs != kind))
        };
        let (sent, waited) = self.wire.changed.wait_timeout_while(sent, at_most, missing).unwrap();
        if waited.timed_out() {
            return Ok(Progress::Pending);
        }
        assert_eq!(kind, "all_gather", "the only kind that succeeds here");
        let all: Vec<u8> = sent.iter().flat_map(|sent| sent[number].1.clone()).collect();
        // SAFETY: the group keeps the memory of a transfer in place until it is over, and it holds all ranks' bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(
                all.as_ptr(),
                std::ptr::with_exposed_provenance_mut(target),
                all.len(),
            );
        };
        Ok(Progress::Done)
    }
}

struct World {
    groups: Vec<OverBytes<End>>,
    store: Store,
    broken: Vec<Arc<Mutex<Option<String>>>>,
}

/// Deadline of these tests' groups.
const DEADLINE: Duration = Duration::from_secs(3);

fn world(members: &[Member]) -> World {
    let size = members.len();
    let wire = Arc::new(Wire { sent: Mutex::new(vec![Vec::new(); size]), changed: Condvar::new() });
    let store = Store::default();
    let broken: Vec<_> = (0..size).map(|_| Arc::default()).collect();
    let options = Options { deadline: DEADLINE, ..Options::default() };
    let groups = (0..size).map(|rank| {
        let begun = Mutex::new(None);
        let end = End { rank, wire: Arc::clone(&wire), begun, broken: Arc::clone(&broken[rank]) };
        OverBytes::new(end, Rank::from_index(rank), size, "a wire".to_owned())
            .watched(Box::new(store.clone()), members.to_vec(), &options)
            .unwrap()
    });
    World { groups: groups.collect(), store, broken }
}

fn here(size: usize) -> Vec<Member> {
    vec![Member::current(); size]
}

fn run<T: Send>(groups: Vec<OverBytes<End>>, work: impl Fn(OverBytes<End>) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let ranks: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || work(group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn a_rank_that_does_not_come_is_named_with_what_it_does() {
    let texts = run(world(&here(3)).groups, |group| {
        group.barrier("start").unwrap();
        let began = Instant::now();
        if group.rank() == Rank(1) {
            group.set_activity("save_checkpoint");
            thread::sleep(DEADLINE + Duration::from_secs(2));
        }
        let error = group.barrier("the norm").unwrap_err();
        assert!(began.elapsed() < DEADLINE * 4);
        assert_eq!(error.kind(), ErrorKind::Deadline);
        let later = group.all_gather_bytes("anything", &[1]).unwrap_err();
        assert_eq!(error.to_string(), later.to_string(), "the first error is kept");
        error.to_string()
    });
    assert!(
        texts[0].starts_with(
            "rank 1 has not reached barrier #2 of the norm; it is in save_checkpoint; waited 3."
        ),
        "{}",
        texts[0]
    );
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
}

#[test]
fn ranks_in_different_calls_learn_of_both() {
    let texts = run(world(&here(2)).groups, |group| {
        let error = if group.rank() == Rank(0) {
            group.barrier("the end").unwrap_err()
        } else {
            let gradient = [0.0f32; 8];
            let input = Pieces { len: 8, runs: vec![(0, Span::from(&gradient[..]))] };
            group.reduce_scatter("unit 7", &input, &mut [0.0; 4], 1.0, Into::Store).unwrap_err()
        };
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        error.to_string()
    });
    assert_eq!(texts[0], texts[1]);
    assert!(texts[0].contains("barrier #1 of the end"), "{}", texts[0]);
    assert!(texts[0].contains("reduce_scatter #1 of unit 7 (fp32, 8 elements)"), "{}", texts[0]);
}

#[test]
fn a_rank_that_leaves_is_named() {
    let texts = run(world(&here(3)).groups, |group| {
        group.barrier("start").unwrap();
        if group.rank() == Rank(2) {
            return String::new();
        }
        let error = group.barrier("step 2").unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::PeerGone), "{error}");
        error.to_string()
    });
    let pid = std::process::id();
    let expected = format!("rank 2 (pid {pid}) left the group before it finished barrier #2 of step 2");
    assert_eq!(texts, [expected.clone(), expected, String::new()]);
}

#[test]
fn without_the_store_the_deadline_still_ends_the_wait() {
    let World { groups, store, .. } = world(&here(2));
    let texts = run(groups, |group| {
        group.barrier("start").unwrap();
        store.gone.store(true, Ordering::Relaxed);
        if group.rank() == Rank(1) {
            thread::sleep(DEADLINE * 2);
            return String::new();
        }
        group.barrier("step").unwrap_err().to_string()
    });
    assert!(texts[0].starts_with("rank 1 has not reached barrier #2 of step; "), "{}", texts[0]);
}

#[test]
fn arguments_that_do_not_fit_are_told_to_all() {
    let texts = run(world(&here(2)).groups, |group| {
        let gradient = [0.0f32; 8];
        let len = if group.rank() == Rank(0) { 7 } else { 8 };
        let input = Pieces { len, runs: vec![(0, Span::from(&gradient[..len]))] };
        let error = group.reduce_scatter("unit 7", &input, &mut [0.0; 4], 1.0, Into::Store).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Arguments);
        error.to_string()
    });
    assert_eq!(texts[0], texts[1]);
    assert!(texts[0].starts_with("rank 0 called reduce_scatter of unit 7 with arguments"), "{}", texts[0]);
}

/// A process that waits to be killed.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        Self(Command::new("sleep").arg("60").spawn().unwrap())
    }

    fn member(&self) -> Member {
        let pid = self.0.id();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 1..].split_ascii_whitespace().collect();
        Member { pid, started: fields[19].parse().unwrap(), remote: false }
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two ranks whose connections break; the process of the third dies, in the group's first call.
fn third_dies() -> (Vec<CommError>, u32) {
    let mut sleeper = Sleeper::start();
    let me = Member::current();
    let World { mut groups, broken, .. } = world(&[me, me, sleeper.member()]);
    // Of the third rank, the test keeps the connection's end: it says nothing any more, and does not say that it leaves.
    std::mem::forget(groups.pop());
    sleeper.0.kill().unwrap();
    for problem in &broken {
        *problem.lock().unwrap() = Some("connection closed by peer".to_owned());
    }
    let errors = run(groups, |group| group.barrier("step").unwrap_err());
    (errors, sleeper.0.id())
}

#[test]
fn a_connection_that_breaks_is_explained_by_who_was_killed() {
    let (errors, pid) = third_dies();
    for error in errors {
        assert_eq!(
            error.to_string(),
            format!(
                "rank 2 (pid {pid}) was killed by signal 9 (SIGKILL) before it finished barrier #1 of step"
            )
        );
    }
}

#[test]
fn a_connection_that_breaks_without_a_reason_says_so_in_its_own_words() {
    let World { groups, broken, .. } = world(&here(2));
    for problem in &broken {
        *problem.lock().unwrap() = Some("connection closed by peer".to_owned());
    }
    let texts = run(groups, |group| {
        group.set_activity("step");
        let error = group.barrier("step").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transport);
        error.to_string()
    });
    assert_eq!(texts[0], texts[1]);
    assert!(texts[0].contains("barrier #1 of step"), "{}", texts[0]);
    assert!(texts[0].contains("during step over a wire: connection closed by peer"), "{}", texts[0]);
}

#[test]
fn leaving_at_the_end_of_the_program_does_not_wait_for_a_store_that_is_gone() {
    let World { groups, store, .. } = world(&here(2));
    store.gone.store(true, Ordering::Relaxed);
    let began = Instant::now();
    for group in &groups {
        group.farewell().unwrap().leave(Duration::from_secs(20));
    }
    assert!(began.elapsed() < Duration::from_secs(10));
}
