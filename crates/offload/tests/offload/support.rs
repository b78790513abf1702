//! The ways a store can do its I/O, and processes under a limit.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use deepspeed_offload::{EngineChoice, EngineKind, Options, Store};
use fs_err as fs;
use tempfile::TempDir;

/// Every way to do I/O: engine, direct or not, and settings that change how requests are handed over. Small blocks, so
/// that small regions are cut into several requests.
pub(crate) fn ways() -> Vec<Options> {
    let mut ways = Vec::new();
    for engine in [EngineChoice::IoUring, EngineChoice::Threads] {
        for direct in [true, false] {
            let way = Options { engine, direct, block_size: 8192, queue_depth: 3, ..Options::default() };
            ways.push(Options { threads: 2, queue_depth: 2, ..way.clone() });
            if engine == EngineChoice::IoUring {
                ways.push(Options { single_submit: true, ..way.clone() });
                ways.push(Options { overlap_events: false, ..way.clone() });
            }
            ways.push(way);
        }
    }
    ways
}

/// A folder on the disk that cargo builds on, where direct I/O is usual, and one in memory where there is one.
pub(crate) fn folders() -> Vec<TempDir> {
    let mut folders = vec![tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()];
    if let Ok(folder) = tempfile::tempdir_in("/dev/shm") {
        folders.push(folder);
    }
    folders
}

/// A store in `folder`, or `None` where the kernel refuses io_uring and `options` ask for it.
pub(crate) fn store(folder: &Path, bytes: u64, options: &Options) -> Option<Store> {
    if options.engine == EngineChoice::IoUring && !io_uring_works() {
        return None;
    }
    Some(Store::create(folder, bytes, options).unwrap())
}

fn io_uring_works() -> bool {
    static WORKS: LazyLock<bool> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path(), 0, &Options::default()).unwrap();
        store.describe().engine == EngineKind::IoUring
    });
    *WORKS
}

/// Numbers that tell where they belong.
pub(crate) fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7 + seed * 1_000_003) as f32 * 0.5).collect()
}

/// What the test that runs in the child process gets its folder from.
const FOLDER: &str = "OFFLOAD_TEST_FOLDER";

/// The folder that the parent chose for this test, if it runs in a child process.
pub(crate) fn folder_from_parent() -> Option<PathBuf> {
    env::var_os(FOLDER).map(PathBuf::from)
}

/// A mount namespace as anybody may have it.
pub(crate) const OWN_MOUNTS: &[&str] = &["unshare", "--user", "--map-root-user", "--mount"];

/// A mount namespace as only root may have it, where every filesystem can be mounted.
pub(crate) const ROOT_MOUNTS: &[&str] = &["unshare", "--mount"];

/// Runs the test `name` alone in a child process after the shell commands `setup`, which see its folder as `$FOLDER`; the
/// shell is started by `wrapper`, if there is one.
///
/// `None` if the system does not allow what `setup` needs.
pub(crate) fn in_child(name: &str, setup: &str, wrapper: &[&str]) -> Option<Output> {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("{setup} || exit 99; exec \"$EXE\" --exact {name} --ignored --nocapture");
    let words: Vec<&str> = wrapper.iter().copied().chain(["sh"]).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command.args(["-c", &script]).env("EXE", env::current_exe().unwrap()).env(FOLDER, folder.path());
    command.env("FOLDER", folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().ok()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "{name} hangs in its child process: {:?}", child.kill());
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let refused =
        String::from_utf8_lossy(&output.stderr).contains("unshare:") || output.status.code() == Some(99);
    (!refused).then_some(output)
}

/// Panics with its output if the test in the child process failed; tells if it could not run.
pub(crate) fn assert_passed(output: Option<Output>) {
    let Some(output) = output else {
        println!("skipped: the system does not allow the limit this test needs");
        return;
    };
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// The files of this process that lie in `folder` and have no name.
pub(crate) fn nameless_files(folder: &Path) -> Vec<PathBuf> {
    let folder = &fs::canonicalize(folder).unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        if let Ok(target) = fs::read_link(&path)
            && target.starts_with(folder)
            && target.to_string_lossy().ends_with("(deleted)")
        {
            found.push(path);
        }
    }
    found
}
