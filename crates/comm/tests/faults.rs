//! Nobody waits for ever: dead, absent, disagreeing and leaving ranks, and what the others say.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use deepspeed_comm::{
    CommError, ErrorKind, Group, Into, Options, Pieces, PiecesMut, Segment, SharedMemory, Solo, threads,
};
use deepspeed_core::{DType, Rank, Span};
use support::{options, role, run_threads, say, spawn_ranks};

fn reduce(group: &dyn Group, what: &str, shard_len: usize) -> Result<f64, CommError> {
    let input = vec![1.0f32; shard_len * group.world()];
    let pieces = Pieces { len: input.len(), runs: vec![(0, Span::from(&input[..]))] };
    group.reduce_scatter(what, &pieces, &mut vec![0.0; shard_len], 1.0, Into::Store)
}

/// Not a test of its own: what the ranks' processes run.
#[test]
fn child() {
    let Some((role, group)) = role(&options()) else { return };
    group.barrier("start").unwrap();
    say("started");
    loop {
        let result = match (role.as_str(), group.rank().0) {
            ("exit", 1) => std::process::exit(3),
            ("killed-waiting", 1) => {
                std::thread::sleep(support::PATIENCE);
                continue;
            }
            _ => reduce(&group, "unit 0", 300_000).map(|_| ()),
        };
        if let Err(error) = result {
            say(&error);
            let again = group.barrier("after the error").unwrap_err();
            assert_eq!(again.to_string(), error.to_string());
            return;
        }
    }
}

#[test]
fn a_killed_process_ends_the_others_with_its_name() {
    for role in ["killed-waiting", "killed-working"] {
        let segment = Segment::create(3, &options()).unwrap();
        let mut ranks = spawn_ranks(&segment, role);
        for rank in &ranks {
            assert_eq!(rank.line(), "started");
        }
        ranks[1].kill();
        let killed = Instant::now();
        let pid = ranks[1].child.id();
        let (first, third) = (ranks[0].line(), ranks[2].line());
        assert!(
            first.starts_with(&format!("rank 1 (pid {pid}) was killed by signal 9 (SIGKILL) before")),
            "{first}"
        );
        assert!(first.ends_with("of unit 0"), "{first}");
        assert_eq!(first, third);
        // Far less than the group's deadline: it was the death that ended the wait.
        assert!(killed.elapsed() < Duration::from_secs(10));
        assert!(ranks[0].wait().success() && ranks[2].wait().success());
    }
}

#[test]
fn an_exited_process_is_reported_with_its_code() {
    let segment = Segment::create(2, &options()).unwrap();
    let ranks = spawn_ranks(&segment, "exit");
    assert_eq!(ranks[0].line(), "started");
    let error = ranks[0].line();
    let pid = ranks[1].child.id();
    assert!(
        error.starts_with(&format!("rank 1 (pid {pid}) exited with code 3 before it finished ")),
        "{error}"
    );
}

#[test]
fn a_seat_is_taken_once() {
    let segment = Segment::create(2, &options()).unwrap();
    let join = |rank| SharedMemory::join(&segment, Rank(rank), &options());
    let group = join(0).unwrap();
    let error = join(0).unwrap_err().to_string();
    assert!(error.contains(&format!("process {} has joined as that rank", std::process::id())), "{error}");
    drop(group);
    assert!(join(0).unwrap_err().to_string().contains("has left; a rank joins once"));
    assert!(join(2).unwrap_err().to_string().contains("a group of 2 ranks"));
}

#[test]
fn ranks_that_disagree_all_quote_both_calls() {
    let errors = run_threads(3, &options(), |group| {
        group.barrier("start").unwrap();
        match group.rank().0 {
            1 => group.all_reduce("gradient norm", &mut [1.0; 3]).unwrap_err(),
            _ => reduce(&group, "unit blocks.7", 64).map(|_| ()).unwrap_err(),
        }
    });
    for error in &errors {
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        let text = error.to_string();
        assert_eq!(text, errors[0].to_string());
        assert!(text.contains("all_reduce #2 of gradient norm (fp32, 3 elements)"), "{text}");
        assert!(text.contains("reduce_scatter #2 of unit blocks.7 (192 elements)"), "{text}");
    }
}

#[test]
fn lengths_dtypes_roots_and_names_must_agree() {
    type Call = fn(&dyn Group, bool) -> Result<(), CommError>;
    let calls: [Call; 4] = [
        |group, odd| group.all_reduce("x", &mut vec![0.0; if odd { 100_000 } else { 5_000 }]),
        |group, odd| {
            let dtype = if odd { DType::F16 } else { DType::BF16 };
            group.all_gather("x", dtype, &mut |_, _| (), &mut PiecesMut { len: 128, runs: vec![] })
        },
        |group, odd| group.broadcast("x", Rank(u32::from(odd)), (&mut [0.0f32; 4][..]).into()),
        |group, odd| group.barrier(if odd { "before save" } else { "before eval" }),
    ];
    for call in calls {
        let errors =
            run_threads(2, &options(), |group| call(&group, group.rank().0 == 1).unwrap_err().kind());
        assert_eq!(errors, [ErrorKind::Mismatch; 2]);
    }
}

#[test]
fn a_rank_that_never_comes_is_named_with_what_it_does() {
    let short = Options { deadline: Duration::from_millis(300), ..options() };
    let mut groups = threads(4, &short).unwrap();
    let absent = groups.pop().unwrap();
    absent.set_activity("save_checkpoint");
    let errors: Vec<CommError> = std::thread::scope(|scope| {
        let ranks: Vec<_> = groups
            .iter()
            .map(|group| scope.spawn(|| reduce(group, "unit blocks.7", 64).unwrap_err()))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for error in &errors {
        assert_eq!(error.kind(), ErrorKind::Deadline);
        let text = error.to_string();
        assert!(
            text.starts_with(
                "rank 3 has not reached reduce_scatter #1 of unit blocks.7; it is in save_checkpoint; waited 0."
            ),
            "{text}"
        );
        assert_eq!(text, errors[0].to_string());
    }
    // Who comes too late gets the same error at once.
    assert_eq!(absent.barrier("late").unwrap_err().to_string(), errors[0].to_string());
}

#[test]
fn a_rank_that_never_joined_is_named() {
    let short = Options { deadline: Duration::from_millis(200), ..options() };
    let segment = Segment::create(2, &short).unwrap();
    let group = SharedMemory::join(&segment, Rank(0), &short).unwrap();
    let error = group.barrier("start").unwrap_err().to_string();
    assert!(
        error.starts_with("rank 1 has not reached barrier #1 of start; it has not joined the group yet"),
        "{error}"
    );
}

#[test]
fn a_rank_that_is_stuck_inside_the_call_is_named() {
    let short = Options { deadline: Duration::from_millis(300), ..options() };
    let errors = run_threads(2, &short, |group| {
        let stuck = group.rank().0 == 1;
        let mut produce = |_: std::ops::Range<usize>, _: deepspeed_core::SpanMut<'_>| {
            if stuck {
                std::thread::sleep(Duration::from_millis(1500));
            }
        };
        let mut output = PiecesMut { len: 8, runs: vec![] };
        let result = group.all_gather("unit 3", DType::F32, &mut produce, &mut output);
        // The late rank finds all it needs for this call; the next one fails.
        result.and_then(|()| group.barrier("after")).unwrap_err().to_string()
    });
    assert!(
        errors[0].starts_with("rank 1 has reached all_gather #1 of unit 3 but does not do its part"),
        "{errors:?}"
    );
    assert_eq!(errors[0], errors[1]);
}

#[test]
fn a_rank_that_leaves_is_missed_only_by_later_calls() {
    let errors = run_threads(3, &options(), |group| {
        group.barrier("last").unwrap();
        if group.rank().0 == 2 {
            return None;
        }
        Some(group.barrier("one more").unwrap_err().to_string())
    });
    let pid = std::process::id();
    let expected = format!("rank 2 (pid {pid}) left the group before it finished barrier #2 of one more");
    assert_eq!(errors, [Some(expected.clone()), Some(expected), None]);
}

#[test]
fn a_panic_inside_a_call_fails_the_group() {
    let mut groups = threads(2, &options()).unwrap();
    let panics = groups.pop().unwrap();
    let waits = groups.pop().unwrap();
    let gather = |group: &SharedMemory, panic: bool| {
        let mut produce = |_: std::ops::Range<usize>, _: deepspeed_core::SpanMut<'_>| {
            assert!(!panic, "the optimizer panicked (on purpose)");
        };
        group.all_gather("unit 1", DType::F32, &mut produce, &mut PiecesMut { len: 8, runs: vec![] })
    };
    std::thread::scope(|scope| {
        let panicking = scope.spawn(|| gather(&panics, true));
        let error = gather(&waits, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Panicked);
        assert_eq!(error.to_string(), "rank 1 panicked in all_gather #1 of unit 1");
        assert!(panicking.join().is_err());
    });
    assert_eq!(panics.barrier("after").unwrap_err().kind(), ErrorKind::Panicked);
}

#[test]
fn arguments_that_do_not_fit_fail_the_group() {
    let errors = run_threads(2, &options(), |group| {
        let input = Pieces { len: 129, runs: vec![] };
        let len = if group.rank().0 == 0 { 64 } else { 65 };
        group.reduce_scatter("unit", &input, &mut vec![0.0; len], 1.0, Into::Store).unwrap_err()
    });
    assert!(errors.iter().all(|error| error.kind() == ErrorKind::Arguments), "{errors:?}");
    assert!(errors[0].to_string().contains("expected 2 shards of"), "{}", errors[0]);
    let overlap = [1.0f32; 4];
    let input = Pieces { len: 4, runs: vec![(0, Span::from(&overlap[..3])), (2, Span::from(&overlap[..2]))] };
    let group = Solo::new();
    let error = group.reduce_scatter("unit", &input, &mut [0.0; 4], 1.0, Into::Store).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Arguments);
    assert_eq!(group.barrier("after").unwrap_err().to_string(), error.to_string());
}

#[test]
fn waiting_can_be_interrupted() {
    let interrupted = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&interrupted);
    let interrupt: deepspeed_comm::Interrupt = Arc::new(move || seen.load(Ordering::Relaxed));
    let groups = threads(2, &Options { interrupt: Some(interrupt), ..options() }).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| groups[0].barrier("start").unwrap_err());
        std::thread::sleep(Duration::from_millis(20));
        interrupted.store(true, Ordering::Relaxed);
        assert_eq!(waiting.join().unwrap().to_string(), "rank 0 was interrupted in barrier #1 of start");
    });
}

#[test]
fn a_long_wait_sleeps() {
    let groups = threads(2, &options()).unwrap();
    let used = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            groups[0].barrier("start").unwrap();
            rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)
        });
        std::thread::sleep(Duration::from_millis(1000));
        groups[1].barrier("start").unwrap();
        waiting.join().unwrap()
    });
    assert!(used.tv_sec == 0 && used.tv_nsec < 300_000_000, "waiting a second took {used:?} of a core");
}

/// Keeps the messages of warnings.
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Message(String);
        impl tracing::field::Visit for Message {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        self.0.lock().unwrap().push(message.0);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_stall_is_reported_once_before_the_deadline() {
    let options = Options { notice_after: Duration::from_millis(100), ..options() };
    let groups = threads(2, &options).unwrap();
    let warnings = Arc::new(Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        let subscriber = Warnings(Arc::clone(&warnings));
        let group = &groups[0];
        scope
            .spawn(move || tracing::subscriber::with_default(subscriber, || group.barrier("start").unwrap()));
        std::thread::sleep(Duration::from_millis(600));
        groups[1].barrier("start").unwrap();
    });
    let warnings = warnings.lock().unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains("rank 1 has not reached barrier #1 of start; it has made no call yet"),
        "{warnings:?}"
    );
}
