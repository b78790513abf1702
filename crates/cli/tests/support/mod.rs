//! A folder with scripts, the real `deepspeed` binary started in it, and a deadline on everything.

#![allow(dead_code, reason = "each test program uses its own part")]

use rustix::process::{Pid, Signal};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// No test waits longer than this for anything.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A folder for one test.
pub(crate) struct Folder {
    dir: TempDir,
}

impl Folder {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes an executable shell script.
    pub(crate) fn script(&self, name: &str, body: &str) -> &Self {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> &Self {
        fs::write(self.path().join(name), text).unwrap();
        self
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap()
    }

    /// Waits for a file that a rank writes, and returns the process ids in it. A file counts when it ends with a line end.
    pub(crate) fn await_pids(&self, name: &str) -> Vec<i32> {
        let path = self.path().join(name);
        let text = await_that(&format!("{name} is written"), || {
            fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n'))
        });
        text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }

    /// The command, in this folder, with a clean environment and as on a machine without GPUs.
    pub(crate) fn deepspeed(&self, args: &[&str]) -> Command {
        // A test run that was started in the background ignores Ctrl-C, and the launcher would honour that.
        let mut command = Command::new("env");
        command.arg("--default-signal=INT").arg(env!("CARGO_BIN_EXE_deepspeed"));
        command
            .args(args)
            .current_dir(self.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path())
            .env("TMPDIR", self.path())
            .env("DS_ACCELERATOR", "cpu")
            .stdin(Stdio::null());
        command
    }

    /// Runs the command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Finished {
        self.start(args).finish()
    }

    pub(crate) fn start(&self, args: &[&str]) -> Job {
        self.start_command(self.deepspeed(args))
    }

    pub(crate) fn start_command(&self, mut command: Command) -> Job {
        let [out, err] = ["launcher.out", "launcher.err"].map(|name| self.path().join(name));
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        Job { child: command.spawn().unwrap(), out, err }
    }
}

/// A launcher that runs.
pub(crate) struct Job {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

/// A launcher that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The exit code; `None` after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Job {
    pub(crate) fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    /// What it has said so far.
    pub(crate) fn err(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.err).unwrap()).into_owned()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn finish(mut self) -> Finished {
        let status = await_that("the launcher has exited", || self.child.try_wait().unwrap());
        let [out, err] =
            [&self.out, &self.err].map(|path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned());
        Finished { code: status.code(), out, err }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// So long on a machine that has nothing else to do: longer where others want its processors, too.
pub(crate) fn limit(time: Duration) -> Duration {
    let load = fs::read_to_string("/proc/loadavg").unwrap();
    let load: f64 = load.split(' ').next().unwrap().parse().unwrap();
    let cores = std::thread::available_parallelism().unwrap().get();
    time.mul_f64((load / cores as f64).max(1.0))
}

/// Waits until there is a value.
pub(crate) fn await_that<T>(what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(began.elapsed() < DEADLINE, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process is there and not a zombie.
pub(crate) fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !matches!(stat.rsplit_once(") ").map(|(_, rest)| &rest[..1]), Some("Z" | "X")))
}

pub(crate) fn kill(pid: i32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}
