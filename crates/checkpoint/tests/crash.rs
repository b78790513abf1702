//! A kill, a full disk or a power cut at any instant leaves the newest complete checkpoint loadable.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "how the child tells its parent, and why a test was skipped"
)]

mod common;

use std::{
    collections::{BTreeSet, hash_map::RandomState},
    fs,
    hash::BuildHasher,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use common::{
    Model,
    faulty::{Fault, FaultyDisk},
    open_latest, read_everything, real_disk,
};
use deepspeed_checkpoint::{
    BackgroundSave, Checkpoint, CheckpointError, Commit, Draft, Failure, Outcome, Presence, Role, choose,
    disk::{Disk, DiskFile, RealDisk},
};

/// A folder in memory where there is one: hundreds of saves, and what a kill leaves is the same on every file system.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn hidden(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

/// How a save is done.
type Save = fn(&Model, &Arc<dyn Disk>, &Path, &str) -> Result<(), CheckpointError>;

/// Waiting for it.
fn waiting(model: &Model, disk: &Arc<dyn Disk>, dir: &Path, tag: &str) -> Result<(), CheckpointError> {
    model.save_on(disk, dir, tag, 2).map(drop)
}

/// By threads of two ranks, behind whatever their process does.
fn behind(model: &Model, disk: &Arc<dyn Disk>, dir: &Path, tag: &str) -> Result<(), CheckpointError> {
    let draft = Draft::begin_on(Arc::clone(disk), dir, tag, u64::from(model.seed))?;
    let folder = draft.folder().to_owned();
    let commit = Commit { draft, parts: model.parts(2), save_latest: true, keep_last: Some(2) };
    let roles = [Role::First(Box::new(commit)), Role::Other { dir: dir.to_owned(), tag: tag.to_owned() }];
    let presences: Vec<Presence> =
        (0..2).map(|rank| Presence::announce(&folder, rank)).collect::<Result<_, _>>()?;
    let mut saves = Vec::new();
    for ((rank, role), presence) in roles.into_iter().enumerate().zip(presences) {
        saves.push(BackgroundSave::start(presence, model.snapshot(disk, &folder, rank, 2), role)?);
    }
    let outcomes: Vec<Outcome> = saves.into_iter().map(|save| save.finish().1).collect();
    // The other way round only when the new one is in place, and rank 0 could not do what comes after that.
    assert!(outcomes[1].is_ok() || outcomes[0].is_err(), "{outcomes:?}");
    let failed = |failure: &Failure| CheckpointError::Coverage { problem: failure.to_string() };
    outcomes[0].as_ref().map(drop).map_err(failed)
}

/// Saves a second checkpoint with a fault at each operation in turn, and calls `check` with the directory and the
/// result of that save.
fn with_fault_at_every_operation(
    fault: Fault,
    can_exchange: bool,
    save: Save,
    check: impl Fn(usize, &Path, Result<(), CheckpointError>),
) {
    for tag in ["first", "second"] {
        for at in 0.. {
            assert!(at < 1000, "the save never ends");
            let dir = scratch();
            Model::small(1).save(dir.path(), "first", 2);
            let faulty = FaultyDisk::new(fault, can_exchange);
            faulty.fail_at(at);
            let disk: Arc<dyn Disk> = Arc::new(faulty.clone());
            let result = save(&Model::small(2), &disk, dir.path(), tag);
            check(at, dir.path(), result);
            if !faulty.has_failed() {
                break;
            }
        }
    }
}

#[test]
fn a_crash_at_any_operation_leaves_a_whole_checkpoint() {
    for (can_exchange, save) in [(true, waiting as Save), (false, waiting), (true, behind)] {
        with_fault_at_every_operation(Fault::Crash, can_exchange, save, |at, dir, result| {
            let checkpoint = open_latest(dir);
            read_everything(&checkpoint).unwrap_or_else(|error| panic!("operation {at}: {error}"));
            let seed = u32::try_from(checkpoint.state()["global_steps"].as_u64().unwrap()).unwrap();
            Model::small(seed).assert_in(&checkpoint, 1);
            assert!(result.is_err() || seed == 2, "a save that succeeded is the newest");
            // A run goes on from it, too, however it finds it.
            let chosen = choose(dir, &[]).unwrap().unwrap();
            let chosen = Checkpoint::open(dir, Some(&chosen.tag)).unwrap().unwrap();
            read_everything(&chosen).unwrap();
            assert!(chosen.manifest().saved_at_ms >= checkpoint.manifest().saved_at_ms, "operation {at}");
            // The next job saves as if nothing had happened, and cleans up.
            Model::small(3).save(dir, "first", 1);
            Model::small(3).assert_in(&open_latest(dir), 2);
            assert!(hidden(dir).is_empty(), "operation {at}: {:?}", hidden(dir));
        });
    }
}

#[test]
fn an_error_at_any_operation_is_reported_and_harmless() {
    const ENOSPC: i32 = 28;
    for can_exchange in [true, false] {
        with_fault_at_every_operation(Fault::Errno(ENOSPC), can_exchange, waiting, |at, dir, result| {
            let checkpoint = open_latest(dir);
            read_everything(&checkpoint).unwrap();
            let seed = u32::try_from(checkpoint.state()["global_steps"].as_u64().unwrap()).unwrap();
            match result {
                Ok(()) => assert_eq!(seed, 2),
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("disk is full"), "{text}");
                    assert!(text.contains(dir.to_str().unwrap()), "{text}");
                    assert!(hidden(dir).is_empty(), "operation {at}: {:?}", hidden(dir));
                    // Only what comes after the rename finds the new one in place, complete.
                    assert!(seed == 1 || text.contains("sync") || text.contains("latest"), "{at}: {text}");
                }
            }
        });
    }
}

#[test]
fn an_error_at_any_operation_behind_training_is_reported_and_harmless() {
    const ENOSPC: i32 = 28;
    with_fault_at_every_operation(Fault::Errno(ENOSPC), true, behind, |at, dir, result| {
        let checkpoint = open_latest(dir);
        read_everything(&checkpoint).unwrap();
        let seed = checkpoint.state()["global_steps"].as_u64().unwrap();
        if result.is_ok() {
            assert_eq!(seed, 2, "operation {at}");
        }
        Model::small(3).save(dir, "first", 1);
        assert!(hidden(dir).is_empty(), "operation {at}: {:?}", hidden(dir));
    });
}

/// Writes down what is done, in order.
#[derive(Clone, Debug, Default)]
struct LoggingDisk(Arc<Mutex<Vec<String>>>);

impl LoggingDisk {
    fn log(&self, what: &str, path: &Path) {
        self.0.lock().unwrap().push(format!("{what} {}", path.file_name().unwrap().to_str().unwrap()));
    }
}

/// One of its files.
struct LoggingFile(LoggingDisk, PathBuf, Box<dyn DiskFile>);

impl Disk for LoggingDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.log("make", path);
        RealDisk.create_dir(path)
    }

    fn create_file(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(LoggingFile(self.clone(), path.to_owned(), RealDisk.create_file(path, bytes)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.log("rename to", to);
        RealDisk.rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.log("exchange with", other);
        RealDisk.exchange(one, other)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.log("remove", path);
        RealDisk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.log("remove", path);
        RealDisk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.log("sync", path);
        RealDisk.sync_dir(path)
    }
}

impl DiskFile for LoggingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.log("write", &self.1);
        self.2.write(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.log("sync", &self.1);
        self.2.sync()
    }
}

#[test]
fn nothing_gets_its_name_before_its_content_is_on_the_disk() {
    let temp = scratch();
    let dir = temp.path().join("saves");
    for (seed, placed) in [(1, "rename to t"), (2, "exchange with t")] {
        let log = LoggingDisk::default();
        let disk: Arc<dyn Disk> = Arc::new(log.clone());
        Model::small(seed).save_on(&disk, &dir, "t", 2).unwrap();
        let log = log.0.lock().unwrap();
        let at = |event: &str| log.iter().rposition(|e| e == event).unwrap_or_else(|| panic!("no `{event}`"));
        let draft = format!(".tmp-t-{seed:016x}");
        let mut order = vec![
            at(&format!("sync {draft}")),
            at(placed),
            // The name is on the disk before `latest` points to it.
            log.iter().position(|e| e == "sync saves").unwrap(),
            at(&format!("write {draft}.latest")),
            at(&format!("sync {draft}.latest")),
            at("rename to latest"),
            at("sync saves"),
        ];
        if seed == 2 {
            order.push(at(&format!("remove {draft}")));
        }
        assert!(order.is_sorted(), "{log:#?}");
        let files = log.iter().filter_map(|event| event.strip_prefix("write "));
        let files: BTreeSet<&str> = files.filter(|file| !file.starts_with('.')).collect();
        assert_eq!(files.len(), 8, "three files of each rank, the manifest and its checksum");
        for file in files {
            let order = [at(&format!("write {file}")), at(&format!("sync {file}")), order[0]];
            assert!(order.is_sorted(), "{file}: {log:#?}");
        }
    }
}

const CHILD_DIR: &str = "DEEPSPEED_CHECKPOINT_TEST_DIR";

/// Not a test of its own: what the killed process does.
#[test]
fn child_saves_until_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let dir = Path::new(&dir);
    let chosen = choose(dir, &[]).unwrap();
    let resumed = chosen.map(|chosen| Checkpoint::open(dir, Some(&chosen.tag)).unwrap().unwrap());
    let start = resumed.map_or(0, |checkpoint| checkpoint.state()["global_steps"].as_u64().unwrap());
    for seed in u32::try_from(start).unwrap() + 1.. {
        let save = if seed % 2 == 0 { waiting } else { behind };
        save(&Model::small(seed), &real_disk(), dir, &format!("step{}", seed % 5)).unwrap();
        println!("\nsaved {seed}");
    }
}

#[test]
fn a_kill_at_any_instant_leaves_the_newest_complete_checkpoint() {
    // Two hundred, with a whole engine: crates/engine/tests/crash.rs.
    const KILLS: u64 = 40;
    let dir = scratch();
    let random = RandomState::new();
    let deadline = Instant::now() + Duration::from_secs(240);
    let mut newest = 0;
    let mut alive = 0;
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_saves_until_killed", "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, saved) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            let seeds =
                lines.map_while(Result::ok).filter_map(|line| line.strip_prefix("saved ")?.parse().ok());
            seeds
                .for_each(|seed: u64| sender.send(seed).expect("the parent listens until the child is gone"));
        });
        // The first save shows that the child has started; then any instant of the next ones.
        let first = saved.recv_timeout(deadline - Instant::now()).expect("the child saves in time");
        std::thread::sleep(Duration::from_micros(random.hash_one(kill) % 30_000));
        child.kill().unwrap();
        child.wait().unwrap();
        reader.join().unwrap();
        let reported = saved.try_iter().last().unwrap_or(first);
        let chosen = choose(dir.path(), &[]).unwrap().unwrap();
        let checkpoint = Checkpoint::open(dir.path(), Some(&chosen.tag)).unwrap().unwrap();
        read_everything(&checkpoint).unwrap();
        let seed = checkpoint.state()["global_steps"].as_u64().unwrap();
        assert!(seed >= reported && seed > newest, "{seed} of {reported} reported, {newest} before");
        Model::small(u32::try_from(seed).unwrap()).assert_in(&checkpoint, 3);
        newest = seed;
        alive += 1;
    }
    assert_eq!(alive, KILLS);
    Model::small(7).save(dir.path(), "last", 1);
    assert!(hidden(dir.path()).is_empty(), "{:?}", hidden(dir.path()));
}

const SMALL_DISK: &str = "DEEPSPEED_CHECKPOINT_TEST_SMALL_DISK";

/// Runs this test binary again in a mount namespace of its own, where a small file system can be mounted. `None`, with
/// the reason printed, where the kernel does not allow that.
fn in_small_disk(test: &str) -> Option<bool> {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"mount -t tmpfs -o size=1m none "$1" || exit 99; exec "$2" --exact "$3" --nocapture"#;
    let exe = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .args([dir.path().as_os_str(), exe.as_os_str(), test.as_ref()])
        .env(SMALL_DISK, dir.path())
        .output();
    match output {
        Ok(output) if output.status.code() == Some(99) => {
            eprintln!("skipped: cannot mount here: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            if text.contains("unshare:") {
                eprintln!("skipped: {text}");
                return None;
            }
            eprintln!("{}{text}", String::from_utf8_lossy(&output.stdout));
            Some(output.status.success())
        }
        Err(error) => {
            eprintln!("skipped: cannot run unshare: {error}");
            None
        }
    }
}

#[test]
fn a_full_disk_leaves_the_previous_checkpoint() {
    let Some(dir) = std::env::var_os(SMALL_DISK) else {
        if let Some(passed) = in_small_disk("a_full_disk_leaves_the_previous_checkpoint") {
            assert!(passed);
        }
        return;
    };
    let dir = Path::new(&dir);
    Model::small(1).save(dir, "small", 2);
    let large = Model::new(&[&[3], &[3], &[120_000]], 2);
    for tag in ["small", "large"] {
        let error = large.save_on(&real_disk(), dir, tag, 2).unwrap_err().to_string();
        assert!(error.contains("-rank-0000") && error.contains("the disk is full"), "{error}");
        Model::small(1).assert_in(&open_latest(dir), 1);
        assert!(hidden(dir).is_empty());
    }
    Model::small(3).save(dir, "small", 2);
}

#[test]
fn a_read_only_disk_is_said_so() {
    let Some(dir) = std::env::var_os(SMALL_DISK) else {
        if let Some(passed) = in_small_disk("a_read_only_disk_is_said_so") {
            assert!(passed);
        }
        return;
    };
    let dir = Path::new(&dir);
    Model::small(1).save(dir, "t", 1);
    assert!(Command::new("mount").args(["-o", "remount,ro"]).arg(dir).status().unwrap().success());
    let error = Model::small(2).save_on(&real_disk(), dir, "t", 1).unwrap_err().to_string();
    assert!(error.contains("read-only"), "{error}");
    Model::small(1).assert_in(&open_latest(dir), 1);
}
