//! A job that ends at any instant of saving is gone on from, to the bit: killed two hundred times, and stopped after every
//! operation that changes the disk.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::print_stdout, reason = "how the child tells its parent")]

#[path = "../../checkpoint/tests/common/faulty.rs"]
mod faulty;
mod support;

use std::{
    collections::hash_map::RandomState,
    fs,
    hash::BuildHasher,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use deepspeed_checkpoint::disk::{Disk, RealDisk};
use deepspeed_comm::Group;
use deepspeed_core::DType;
use deepspeed_engine::{SaveSettings, Settings};
use deepspeed_optim::{LossScaler, OptimizerKind};
use deepspeed_zero::Stage;
use faulty::{Fault, FaultyDisk};
use support::{
    Replica, ranks,
    saving::{load, save},
};

const WORLD: usize = 2;
/// Steps that a resumed run is compared over.
const AFTER: usize = 2;

/// A loss, and every bit of the weights after the step.
type Step = (f64, Vec<u8>);

fn replica(group: Arc<dyn Group>, behind: bool, disk: Arc<dyn Disk>) -> Replica {
    let saving = SaveSettings { behind, keep_last: Some(3), disk, ..SaveSettings::default() };
    let stage = if behind { Stage::Two } else { Stage::Three };
    let settings = Settings { stage, precision: DType::BF16, unit_len: 150, saving, ..Settings::default() };
    Replica::new(settings, OptimizerKind::Adam, LossScaler::fixed(1.0), group)
}

fn fresh(group: Arc<dyn Group>) -> Replica {
    replica(group, false, Arc::new(RealDisk))
}

fn steps(replica: &mut Replica, count: usize) -> Vec<Step> {
    let step = |_| {
        let loss = replica.loss();
        replica.micro_step().unwrap();
        (loss, replica.bytes())
    };
    (0..count).map(step).collect()
}

/// Each step of a run that nothing interrupts, by rank.
fn through(count: usize) -> Vec<Vec<Step>> {
    ranks(WORLD, |group| steps(&mut fresh(group), count))
}

/// Goes on from what is in `dir`: how many steps had been made, and the next ones of each rank.
fn go_on(dir: &Path) -> (usize, Vec<Vec<Step>>) {
    let found = ranks(WORLD, |group| {
        let mut replica = fresh(group);
        load(&mut replica, dir, None).unwrap();
        let made = replica.engine.counters().global_steps;
        (usize::try_from(made).unwrap(), steps(&mut replica, AFTER))
    });
    assert!(found.iter().all(|(made, _)| *made == found[0].0));
    (found[0].0, found.into_iter().map(|(_, steps)| steps).collect())
}

fn assert_same(what: &str, made: usize, found: &[Vec<Step>], through: &[Vec<Step>]) {
    for (rank, (found, through)) in found.iter().zip(through).enumerate() {
        assert!(found[..] == through[made..made + found.len()], "{what}: rank {rank} after {made} steps");
    }
}

/// A folder in memory where there is one: hundreds of saves, and what a kill leaves is the same on every file system.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn hidden(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

const CHILD_DIR: &str = "DEEPSPEED_ENGINE_TEST_DIR";
const CHILD_BEHIND: &str = "DEEPSPEED_ENGINE_TEST_BEHIND";

/// Not a test of its own: the job that is killed. Trains and saves each step, and tells which one is safe.
#[test]
fn child_trains_and_saves_until_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let (dir, behind) = (Path::new(&dir), std::env::var_os(CHILD_BEHIND).is_some());
    ranks(WORLD, |group| {
        let first = group.rank().index() == 0;
        let mut replica = replica(group, behind, Arc::new(RealDisk));
        if dir.join("latest").exists() {
            load(&mut replica, dir, None).unwrap();
        }
        let mut begun = 0;
        loop {
            replica.micro_step().unwrap();
            let made = replica.engine.counters().global_steps;
            save(&mut replica, dir, &format!("step{}", made % 5)).unwrap();
            if behind && begun == 0 {
                replica.engine.finish_save().unwrap();
                begun = made;
            }
            // Behind training it is the one before that is safe: the next save has waited for it.
            let safe = if behind { begun } else { made };
            if first {
                println!("\nsaved {safe}");
            }
            begun = made;
        }
    });
}

#[test]
fn two_hundred_kills_at_any_instant_of_saving() {
    const KILLS: u64 = 200;
    let dir = scratch();
    let random = RandomState::new();
    let deadline = Instant::now() + Duration::from_secs(600);
    let mut found: Vec<(usize, Vec<Vec<Step>>)> = Vec::new();
    for kill in 0..KILLS {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child_trains_and_saves_until_killed", "--nocapture"]);
        command.env(CHILD_DIR, dir.path()).stdout(Stdio::piped()).stderr(Stdio::null());
        if kill % 2 == 1 {
            command.env(CHILD_BEHIND, "1");
        }
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, saved) = mpsc::channel();
        let reader = thread::spawn(move || {
            let told = lines.map_while(Result::ok);
            let told = told.filter_map(|line| line.strip_prefix("saved ")?.parse().ok());
            told.for_each(|made: usize| {
                sender.send(made).expect("the parent listens until the child is gone");
            });
        });
        // The first save shows that the child has started; then any instant of the next ones.
        let first = saved.recv_timeout(deadline - Instant::now()).expect("the child saves in time");
        thread::sleep(Duration::from_micros(random.hash_one(kill) % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();
        reader.join().unwrap();
        let safe = saved.try_iter().last().unwrap_or(first);
        let (made, after) = go_on(dir.path());
        let before = found.last().map_or(0, |(made, _)| *made);
        assert!(made >= safe && made > before, "{made} of {safe} that were safe, {before} before");
        found.push((made, after));
    }
    let through = through(found.last().unwrap().0 + AFTER);
    for (made, after) in &found {
        assert_same("killed", *made, after, &through);
    }
    // The next save leaves nothing of all that.
    ranks(WORLD, |group| save(&mut fresh(group), dir.path(), "next").map(drop));
    assert!(hidden(dir.path()).is_empty(), "{:?}", hidden(dir.path()));
}

/// Saves after two steps and, with a fault at each operation in turn, after the third. `check` is given how that went on
/// each rank, and each rank's next steps if it is still there.
fn with_fault_at_every_operation(
    fault: Fault,
    (behind, can_exchange): (bool, bool),
    check: impl Fn(&str, &Path, &[Result<(), String>], &[Vec<Step>]),
) {
    for tag in ["first", "second"] {
        for at in 0.. {
            assert!(at < 1000, "the save never ends");
            let dir = scratch();
            let disk = FaultyDisk::new(fault, can_exchange);
            let went = ranks(WORLD, |group| {
                let first = group.rank().index() == 0;
                let mut replica = replica(group, behind, Arc::new(disk.clone()));
                steps(&mut replica, 2);
                save(&mut replica, dir.path(), "first").unwrap();
                replica.engine.finish_save().unwrap();
                steps(&mut replica, 1);
                // All files of the first are written, and no rank begins the second without rank 0.
                if first {
                    disk.fail_at(at);
                }
                let saved = save(&mut replica, dir.path(), tag);
                let ended = replica.engine.finish_save().map_err(|error| error.to_string());
                let said = saved.map(drop).and(ended.map(drop));
                let after = if fault == Fault::Crash { Vec::new() } else { steps(&mut replica, AFTER) };
                (said, after)
            });
            let (said, after): (Vec<_>, Vec<_>) = went.into_iter().unzip();
            let what =
                format!("operation {at} of saving `{tag}`, behind: {behind}, exchange: {can_exchange}");
            check(&what, dir.path(), &said, &after);
            if !disk.has_failed() {
                break;
            }
        }
    }
}

#[test]
fn a_crash_at_any_operation_is_gone_on_from_to_the_bit() {
    let through = through(3 + AFTER);
    for mode in [(false, true), (false, false), (true, true)] {
        with_fault_at_every_operation(Fault::Crash, mode, |what, dir, said, _| {
            let (made, after) = go_on(dir);
            assert!(made == 3 || (made == 2 && said.iter().any(Result::is_err)), "{what}: {made}, {said:?}");
            assert_same(what, made, &after, &through);
        });
    }
}

#[test]
fn a_full_disk_at_any_operation_is_an_error_on_all_ranks_and_training_goes_on() {
    const ENOSPC: i32 = 28;
    let through = through(3 + AFTER);
    for mode in [(false, true), (true, true)] {
        with_fault_at_every_operation(Fault::Errno(ENOSPC), mode, |what, dir, said, after| {
            assert_same(what, 3, after, &through);
            let (made, after) = go_on(dir);
            assert_same(what, made, &after, &through);
            assert!(said.iter().all(|it| it.is_ok() == said[0].is_ok()), "{what}: {said:?}");
            match &said[0] {
                Ok(()) => assert_eq!(made, 3, "{what}"),
                Err(text) => {
                    assert!(text.contains("rank ") && text.contains("disk is full"), "{what}: {text}");
                }
            }
        });
    }
}
