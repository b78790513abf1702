//! Ranks that fail, are killed, or are interrupted: one report, the right exit code, and nothing left behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use rustix::process::Signal;
use std::process::Stdio;
use std::time::{Duration, Instant};
use support::{Folder, await_that, is_alive, kill, limit};

/// A rank that writes its process id and that of a child in its group and of one in a session of its own, and then waits.
const FAMILY: &str = "sleep 600 & child=$!
setsid sleep 600 & apart=$!
echo $$ $child $apart > pids.$RANK
";

/// The process ids that ranks with [`FAMILY`] have written.
fn families(folder: &Folder, world: usize) -> Vec<Vec<i32>> {
    (0..world).map(|rank| folder.await_pids(&format!("pids.{rank}"))).collect()
}

fn assert_gone(families: &[Vec<i32>]) {
    for pid in families.iter().flatten() {
        assert!(!is_alive(*pid), "process {pid} of {families:?} is left");
    }
}

#[test]
fn an_exit_code_ends_the_job_and_is_passed_on() {
    let folder = Folder::new();
    folder.script(
        "t.sh",
        &format!(
            "{FAMILY}
            if [ $RANK = 1 ]; then
                while [ ! -s pids.0 ] || [ ! -s pids.2 ]; do sleep 0.01; done
                echo Traceback of rank 1 >&2; exit 3
            fi
            wait"
        ),
    );
    let done = folder.run(&["--num_gpus", "3", "--no_python", "./t.sh"]);
    assert_gone(&families(&folder, 3));
    assert_eq!(done.code, Some(3), "{done:?}");
    assert!(done.err.contains("deepspeed: rank 1 failed: exited with code 3"), "{}", done.err);
    assert!(done.err.contains("ended:     ranks 0, 2, by the launcher"), "{}", done.err);
    assert!(done.err.contains("  | Traceback of rank 1\n"), "{}", done.err);
}

#[test]
fn a_killed_rank_ends_the_job_within_ten_seconds() {
    let folder = Folder::new();
    // The others ignore SIGTERM, which is the worst that they can do.
    folder.script("t.sh", &format!("trap '' TERM\n{FAMILY}while true; do sleep 0.1; done"));
    let job = folder.start(&["--num_gpus", "3", "--no_python", "./t.sh"]);
    let families = families(&folder, 3);
    let began = Instant::now();
    kill(families[1][0], Signal::KILL);
    let done = job.finish();
    let took = began.elapsed();
    assert_gone(&families);
    assert_eq!(done.code, Some(137), "{done:?}");
    assert!(took < limit(Duration::from_secs(10)), "took {took:?}");
    for part in [
        "deepspeed: rank 1 failed: killed by signal 9 (SIGKILL)",
        &format!("process {}", families[1][0]),
        "evidence:",
        "ended:     ranks 0, 2, by the launcher",
        "it wrote nothing to stderr",
    ] {
        assert!(done.err.contains(part), "{part} in {}", done.err);
    }
    assert_eq!(done.err.matches("failed:").count(), 1);
}

#[test]
fn the_cause_is_told_from_its_victims() {
    let folder = Folder::new();
    folder.script(
        "t.sh",
        "if [ $RANK = 1 ]; then : > dying; sleep 0.1; echo 'ValueError: no such file' >&2; exit 5; fi
        while [ ! -e dying ]; do sleep 0.01; done
        echo 'Traceback (most recent call last):' >&2
        echo \"deepspeed.CommError: peer rank 1 left all_reduce #$RANK\" >&2
        exit 1",
    );
    let done = folder.run(&["--num_gpus", "4", "--no_python", "./t.sh"]);
    assert_eq!(done.code, Some(5), "{done:?}");
    assert!(done.err.contains("rank 1 failed: exited with code 5"), "{}", done.err);
    assert!(
        done.err.contains("followed:  rank 0 exited with code 1: deepspeed.CommError: peer"),
        "{}",
        done.err
    );
    assert!(done.err.contains("  | ValueError: no such file\n"), "{}", done.err);
}

#[test]
fn the_same_traceback_of_all_ranks_is_shown_once_in_the_report() {
    let folder = Folder::new();
    folder.script("t.sh", "echo starting >&2; echo 'Traceback (most recent call last):' >&2; echo \"E: rank $RANK\" >&2; exit 1");
    let done = folder.run(&["--num_gpus", "3", "--enable_each_rank_log", "logs", "--no_python", "./t.sh"]);
    assert_eq!(done.code, Some(1));
    assert_eq!(done.err.matches("\n  | Traceback").count(), 1, "{}", done.err);
    assert!(done.err.contains("failed with the same last lines"), "{}", done.err);
    // While it ran, too: in full from one rank, and the exception alone of the others.
    assert_eq!(done.err.matches("Traceback (most recent call last)").count(), 2, "{}", done.err);
    assert_eq!(done.err.matches(" (the traceback is that of rank ").count(), 2, "{}", done.err);
    assert!(done.err.contains("full log:  logs/"), "{}", done.err);
}

#[test]
fn a_rank_that_finishes_early_ends_nothing() {
    let folder = Folder::new();
    folder.script("t.sh", "if [ $RANK = 0 ]; then exit 0; fi; sleep 0.5; echo late; exit ${CODE:-0}");
    let done = folder.run(&["-q", "--num_gpus", "2", "--no_python", "./t.sh"]);
    assert_eq!((done.code, done.out.as_str(), done.err.as_str()), (Some(0), "[rank 1] late\n", ""));
    let mut command = folder.deepspeed(&["--num_gpus", "2", "--no_python", "./t.sh"]);
    command.env("CODE", "4");
    let done = folder.start_command(command).finish();
    assert_eq!(done.code, Some(4));
    assert!(done.err.contains("finished:  rank 0, before this"), "{}", done.err);
}

#[test]
fn ctrl_c_lets_ranks_finish_and_leaves_nothing() {
    for (signal, name, code) in [(Signal::INT, "INT", 130), (Signal::TERM, "TERM", 143)] {
        let folder = Folder::new();
        folder.script(
            "t.sh",
            &format!(
                "trap 'echo saved by {name} $RANK; exit 0' {name}\n{FAMILY}while true; do sleep 0.05; done"
            ),
        );
        let job = folder.start(&["--num_gpus", "2", "--no_python", "./t.sh"]);
        let families = families(&folder, 2);
        job.signal(signal);
        let done = job.finish();
        assert_gone(&families);
        assert_eq!(done.code, Some(code), "{done:?}");
        for rank in 0..2 {
            assert!(done.out.contains(&format!("saved by {name} {rank}\n")), "{done:?}");
        }
    }
}

#[test]
fn a_second_ctrl_c_kills_at_once() {
    let folder = Folder::new();
    folder.script(
        "t.sh",
        &format!("trap '' INT; trap 'echo asked > asked' TERM\n{FAMILY}while true; do sleep 0.05; done"),
    );
    let job = folder.start(&["--num_gpus", "2", "--no_python", "./t.sh"]);
    let families = families(&folder, 2);
    job.signal(Signal::INT);
    // From then on a further signal soon is taken for the same one.
    await_that("the first is passed on", || job.err().contains("passed on to the ranks").then_some(()));
    std::thread::sleep(Duration::from_millis(600));
    job.signal(Signal::INT);
    let done = job.finish();
    assert!(!folder.path().join("asked").exists(), "after the first alone they are asked to end, first");
    assert_gone(&families);
    assert_eq!(done.code, Some(130), "{done:?}");
}

#[test]
fn the_launchers_own_death_ends_the_ranks() {
    let folder = Folder::new();
    folder.script("t.sh", &format!("{FAMILY}while true; do sleep 0.05; done"));
    let job = folder.start(&["--num_gpus", "2", "--no_python", "./t.sh"]);
    let families = families(&folder, 2);
    job.signal(Signal::KILL);
    assert_eq!(job.finish().code, None);
    // The child in a session of its own, too: the guard knows it by its environment.
    for pid in families.into_iter().flatten() {
        await_that("the ranks and their children are gone", || (!is_alive(pid)).then_some(()));
    }
}

#[test]
fn a_program_that_cannot_run_is_an_error_and_leaves_nothing() {
    let folder = Folder::new();
    folder.script("t.sh", "").write("t.sh", "#!/no/such/interpreter\n");
    let done = folder.run(&["--num_gpus", "2", "--no_python", "./t.sh"]);
    assert_eq!(done.code, Some(2), "{done:?}");
    assert!(done.err.contains("rank 0 could not be started: ./t.sh"), "{}", done.err);
}

#[test]
fn output_that_nobody_reads_ends_the_job() {
    let folder = Folder::new();
    folder.script("t.sh", &format!("{FAMILY}while true; do echo line; sleep 0.02; done"));
    let mut command = folder.deepspeed(&["--num_gpus", "2", "--no_python", "./t.sh"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let families = families(&folder, 2);
    drop(child.stdout.take());
    let status = await_that("the launcher has exited", || child.try_wait().unwrap());
    assert_gone(&families);
    assert_eq!(status.code(), Some(141));
}

#[test]
fn an_interrupt_that_is_ignored_stays_ignored() {
    let folder = Folder::new();
    folder.script("t.sh", "sleep 0.5; echo done");
    let binary = env!("CARGO_BIN_EXE_deepspeed");
    let line = format!(
        "trap '' INT; {binary} -q --num_gpus 1 --no_python ./t.sh & sleep 0.2; kill -INT $!; wait $!"
    );
    let mut command = folder.deepspeed(&[]);
    let environment: Vec<_> =
        command.get_envs().map(|(name, value)| (name.to_owned(), value.unwrap().to_owned())).collect();
    command = std::process::Command::new("/bin/sh");
    command.args(["-c", &line]).env_clear().envs(environment).current_dir(folder.path());
    let done = folder.start_command(command).finish();
    assert_eq!((done.code, done.out.as_str()), (Some(0), "done\n"), "{done:?}");
}
