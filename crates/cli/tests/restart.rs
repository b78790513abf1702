//! `--max_restarts`: all ranks start again, what they are told, and when that ends.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use rustix::process::Signal;
use std::fs;
use support::{Folder, await_that, is_alive};

/// Leaves the environment and the processes of each attempt in files.
const NOTE: &str = "env > env.$DS_RESTART_COUNT.$RANK
sleep 600 & child=$!
setsid sleep 600 & apart=$!
echo $$ $child $apart > pids.$DS_RESTART_COUNT.$RANK
";

/// Says that the engine is in step 5, as the engine does.
const IN_STEP_5: &str = "printf '\\005\\0\\0\\0\\0\\0\\0\\0' > $DS_PROGRESS_FILE\n";

fn get(folder: &Folder, attempt: u32, rank: usize, name: &str) -> Option<String> {
    let prefix = format!("{name}=");
    folder
        .read(&format!("env.{attempt}.{rank}"))
        .lines()
        .find_map(|line| Some(line.strip_prefix(&prefix)?.to_owned()))
}

#[test]
fn a_killed_rank_and_then_all_goes_well() {
    let folder = Folder::new();
    folder.script(
        "t.sh",
        &format!(
            "{NOTE}
            if [ $DS_RESTART_COUNT.$RANK = 0.1 ]; then
                while [ ! -s pids.0.0 ]; do sleep 0.01; done
                {IN_STEP_5}kill -9 $$
            elif [ $DS_RESTART_COUNT = 0 ]; then
                trap '' TERM; while true; do sleep 0.05; done
            fi
            kill $child $apart; echo attempt $DS_RESTART_COUNT of rank $RANK"
        ),
    );
    let done = folder.run(&["--num_gpus=2", "--max_restarts=3", "--no_python", "./t.sh"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(
        done.out.contains("attempt 1 of rank 0\n") && done.out.contains("attempt 1 of rank 1\n"),
        "{done:?}"
    );
    for text in [
        "killed by signal 9 (SIGKILL) in step 5, after",
        "all ranks start again: restart 1 of 3",
        "done after 1 restart\n    attempt 1: rank 1 on ",
    ] {
        assert!(done.err.contains(text), "{text} in {}", done.err);
    }
    for rank in 0..2 {
        for pid in folder.await_pids(&format!("pids.0.{rank}")) {
            assert!(!is_alive(pid), "process {pid} of the first attempt is left");
        }
        let of = |attempt, name| get(&folder, attempt, rank, name);
        assert_ne!(of(0, "DS_JOB_SECRET"), of(1, "DS_JOB_SECRET"));
        assert_eq!(of(0, "DS_RESTART_REASON"), None);
        assert_eq!(of(1, "DS_RESTART_REASON").as_deref(), Some("rank-killed"));
        assert_eq!(of(1, "DS_RESTART_STEP").as_deref(), Some("5"));
        assert_eq!(of(1, "TORCHELASTIC_RESTART_COUNT").as_deref(), Some("1"));
        assert_eq!(of(1, "TORCHELASTIC_MAX_RESTARTS").as_deref(), Some("3"));
    }
}

#[test]
fn the_same_step_twice_ends_it() {
    let folder = Folder::new();
    folder.script("t.sh", &format!("{IN_STEP_5}echo try >> tries; echo bad batch >&2; exit 3"));
    let done = folder.run(&["--num_gpus=1", "--max_restarts=9", "--no_python", "./t.sh"]);
    assert_eq!((done.code, folder.read("tries").as_str()), (Some(3), "try\ntry\n"), "{done:?}");
    for text in [
        "deepspeed: rank 0 failed: exited with code 3",
        "  step:      5\n",
        "  restarts:  1 restart; no further one: it has failed twice in step 5",
        "    attempt 1: rank 0 on ",
        "    attempt 2: rank 0 on ",
        "exited with code 3 in step 5, after",
        "  | bad batch\n",
    ] {
        assert!(done.err.contains(text), "{text} in {}", done.err);
    }
    assert_eq!(done.err.matches(" failed: ").count(), 1, "one report: {}", done.err);
}

#[test]
fn only_what_was_asked_for_and_only_so_often() {
    let folder = Folder::new();
    folder.script("t.sh", "echo try >> tries; exit $CODE");
    let run = |code: &str, args: &[&str]| {
        let _ = fs::remove_file(folder.path().join("tries"));
        let mut command = folder.deepspeed(args);
        command.args(["--num_gpus=1", "--no_python", "./t.sh"]).env("CODE", code);
        let done = folder.start_command(command).finish();
        assert_eq!(done.code.map(|code| code.to_string()).as_deref(), Some(code), "{done:?}");
        (folder.read("tries").lines().count(), done.err)
    };
    let (tries, text) = run("3", &["--max_restarts=2", "--restart_on=host-lost,exit=7"]);
    assert!(tries == 1 && text.contains("--restart_on does not name `exit`"), "{text}");
    let (tries, text) = run("7", &["--max_restarts=2", "--restart_on=host-lost,exit=7"]);
    assert!(tries == 3 && text.contains("2 restarts; no further one: --max_restarts=2 is used up"), "{text}");
    let (tries, text) = run("7", &[]);
    assert!(tries == 1 && !text.contains("restart"), "{text}");
    let done = folder.run(&["--max_restarts=1", "--restart_on=hots-lost", "--no_python", "./t.sh"]);
    assert!(done.code == Some(2) && done.err.contains("did you mean 'host-lost'?"), "{done:?}");
}

#[test]
fn an_interrupt_is_no_failure() {
    let folder = Folder::new();
    folder.script("t.sh", "echo $$ >> tries\nwhile true; do sleep 0.05; done");
    let job = folder.start(&["--num_gpus=1", "--max_restarts=5", "--no_python", "./t.sh"]);
    await_that("the rank runs", || folder.path().join("tries").exists().then_some(()));
    job.signal(Signal::INT);
    let done = job.finish();
    assert_eq!((done.code, folder.read("tries").lines().count()), (Some(130), 1), "{done:?}");
}
