//! What ranks are given and what becomes of their output, through the real command.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use rustix::pty::OpenptFlags;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Stdio;
use support::{Folder, await_that};

#[test]
fn ranks_find_their_place_in_the_environment() {
    let folder = Folder::new();
    folder.script("t.sh", "env > env.$RANK; echo $* > args.$RANK");
    let done = folder.run(&["--num_gpus", "3", "--no_python", "./t.sh", "--x", "a b", "--", "-q"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    let mut shared = Vec::new();
    for rank in 0..3 {
        let text = folder.read(&format!("env.{rank}"));
        let get = |name: &str| {
            let prefix = format!("{name}=");
            let value = text.lines().find_map(|line| line.strip_prefix(&prefix));
            value.unwrap_or_else(|| panic!("{name} is not set")).to_owned()
        };
        assert_eq!(get("LOCAL_RANK"), rank.to_string());
        for (name, value) in [
            ("WORLD_SIZE", "3"),
            ("LOCAL_SIZE", "3"),
            ("CROSS_RANK", "0"),
            ("CROSS_SIZE", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("PYTHONUNBUFFERED", "1"),
        ] {
            assert_eq!(get(name), value, "{name}");
        }
        assert!(get("OMP_NUM_THREADS").parse::<usize>().unwrap() >= 1);
        assert!(get("MASTER_PORT").parse::<u16>().unwrap() > 0);
        let secret = get("DS_JOB_SECRET");
        assert!(secret.len() == 64 && secret.bytes().all(|b| b.is_ascii_hexdigit()), "{secret}");
        shared.push((get("MASTER_PORT"), secret));
        assert_eq!(folder.read(&format!("args.{rank}")), format!("--local_rank={rank} --x a b -- -q\n"));
    }
    shared.dedup();
    assert_eq!(shared.len(), 1, "port and secret are the same for all ranks");
    let secret = shared[0].1.clone();
    assert!(!done.out.contains(&secret) && !done.err.contains(&secret));

    folder.run(&["--num_gpus", "1", "--no_python", "./t.sh"]);
    assert!(!folder.read("env.0").contains(&secret), "the secret is new for each job");
}

#[test]
fn python_is_started_as_the_original_does() {
    let folder = Folder::new();
    folder.script("venv/bin/python", "echo python $*").write("train.py", "");
    let run = |args: &[&str]| {
        let mut command = folder.deepspeed(args);
        command.env("VIRTUAL_ENV", folder.path().join("venv"));
        folder.start_command(command).finish().out
    };
    let one = ["-q", "--num_gpus=1"];
    assert_eq!(run(&[&one[..], &["train.py", "-x"]].concat()), "python -u train.py --local_rank=0 -x\n");
    assert_eq!(run(&[&one[..], &["--no_local_rank", "train.py"]].concat()), "python -u train.py\n");
    assert_eq!(run(&[&one[..], &["--module", "a.b", "1"]].concat()), "python -u -m a.b --local_rank=0 1\n");
}

#[test]
fn output_is_merged_line_by_line() {
    let folder = Folder::new();
    folder.script(
        "t.sh",
        "i=0; while [ $i -lt 200 ]; do echo out $RANK $i; echo err $RANK $i >&2; i=$((i+1)); done; printf end$RANK",
    );
    let done = folder.run(&["-q", "--num_gpus", "3", "--no_python", "./t.sh"]);
    assert_eq!(done.code, Some(0));
    for (text, word) in [(&done.out, "out"), (&done.err, "err")] {
        for rank in 0..3 {
            let prefix = if rank == 0 { String::new() } else { format!("[rank {rank}] ") };
            let begin = format!("{prefix}{word} {rank} ");
            let numbers: Vec<usize> =
                text.lines().filter_map(|line| line.strip_prefix(&begin)?.parse().ok()).collect();
            assert_eq!(numbers, (0..200).collect::<Vec<_>>(), "{word} of rank {rank}");
        }
    }
    for end in ["end0", "[rank 1] end1\n", "[rank 2] end2\n"] {
        assert!(done.out.contains(end), "{end}");
    }
}

#[test]
fn each_rank_has_a_log_and_the_console_too() {
    let folder = Folder::new();
    folder.script("t.sh", "echo out $RANK; echo err $RANK >&2");
    let done = folder.run(&["--num_gpus", "2", "--enable_each_rank_log", "a/logs", "--no_python", "./t.sh"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.out.contains("out 0\n") && done.out.contains("[rank 1] out 1\n"));
    let mut names: Vec<String> = fs::read_dir(folder.path().join("a/logs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    for (rank, name) in names.iter().enumerate() {
        let (time, rest) = name.split_at(14);
        assert!(time.bytes().all(|b| b.is_ascii_digit()), "{name}");
        assert_eq!(rest, format!("_rank{rank}.log"));
        let text = folder.read(&format!("a/logs/{name}"));
        assert!(text.contains(&format!("out {rank}\n")) && text.contains(&format!("err {rank}\n")));
    }
    assert_eq!(names.len(), 2);
}

#[test]
fn a_terminal_reaches_rank_0_and_only_rank_0() {
    let folder = Folder::new();
    folder.script("t.sh", "if [ -t 1 ] && [ -t 2 ]; then echo terminal $RANK; else echo pipe $RANK; fi");
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    rustix::pty::grantpt(&ours).unwrap();
    rustix::pty::unlockpt(&ours).unwrap();
    let name = rustix::pty::ptsname(&ours, Vec::new()).unwrap();
    let theirs = || fs::OpenOptions::new().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let mut command = folder.deepspeed(&["-q", "--num_gpus", "2", "--no_python", "./t.sh"]);
    let mut child = command.stdout(theirs()).stderr(theirs()).spawn().unwrap();
    drop(command);
    rustix::io::ioctl_fionbio(&ours, true).unwrap();
    let mut ours = fs::File::from(ours);
    let mut text = String::new();
    let status = await_that("the launcher has exited", || {
        let mut bytes = [0; 4096];
        while let Ok(length @ 1..) = ours.read(&mut bytes) {
            text += &String::from_utf8_lossy(&bytes[..length]);
        }
        child.try_wait().unwrap()
    });
    assert!(status.success());
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["[rank 1] pipe 1", "terminal 0"], "{text:?}");
}

#[test]
fn rank_0_reads_what_is_piped_in() {
    let folder = Folder::new();
    folder.script("t.sh", "read -r line; echo \"$RANK got <$line>\"");
    let mut command = folder.deepspeed(&["-q", "--num_gpus", "2", "--no_python", "./t.sh"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    assert!(out.contains("0 got <hello>") && out.contains("1 got <>"), "{out}");
}

#[test]
fn cores_are_bound() {
    let folder = Folder::new();
    folder.script("t.sh", "grep Cpus_allowed_list /proc/self/status; echo threads $OMP_NUM_THREADS");
    let allowed = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = allowed.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let last = allowed.rsplit([',', '-']).next().unwrap();
    let args =
        ["-q", "--num_gpus", "1", "--bind_cores_to_rank", "--bind_core_list", last, "--no_python", "./t.sh"];
    let done = folder.run(&args);
    assert_eq!(done.code, Some(0), "{done:?}");
    let bound = done.out.lines().next().and_then(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    assert_eq!(bound.trim(), last);
    assert!(done.out.contains("threads 1\n"));

    let mut command = folder.deepspeed(&args);
    let refused = folder.start_command({
        command.env("KMP_AFFINITY", "compact");
        command
    });
    assert!(refused.finish().err.contains("KMP_AFFINITY=compact is set"));
}

#[test]
fn a_dry_run_starts_nothing() {
    let folder = Folder::new();
    folder.script("t.sh", "touch started");
    let done = folder.run(&[
        "--dry_run",
        "--num_gpus",
        "2",
        "--master_port",
        "12345",
        "--no_python",
        "./t.sh",
        "a b",
    ]);
    assert_eq!(done.code, Some(0));
    for part in
        ["MASTER_PORT=12345", "WORLD_SIZE=2", "rank 1\n", "LOCAL_RANK=1", "./t.sh --local_rank=1 'a b'"]
    {
        assert!(done.out.contains(part), "{part} in {}", done.out);
    }
    assert!(!folder.path().join("started").exists());
}

#[test]
fn a_port_in_use_is_named_with_its_owner() {
    let folder = Folder::new();
    folder.script("t.sh", "touch started");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let done = folder.run(&["--num_gpus", "1", "--master_port", &port, "--no_python", "./t.sh"]);
    assert_eq!(done.code, Some(2));
    assert!(done.err.contains(&format!("--master_port={port}: the port is already in use")), "{}", done.err);
    assert!(done.err.contains(&format!("by process {}", std::process::id())), "{}", done.err);
    assert!(!folder.path().join("started").exists());
}

#[test]
fn a_missing_script_is_an_error_with_the_nearest_name() {
    let folder = Folder::new();
    folder.script("train.py", "").write("plain.sh", "");
    for (args, what) in [
        (&["trian.py"][..], "script 'trian.py' does not exist; did you mean 'train.py'?"),
        (&["nowhere/train.py"], "there is no folder 'nowhere'"),
        (&["--no_python", "./trian.py"], "did you mean './train.py'?"),
        (&["--no_python", "./plain.sh"], "cannot run './plain.sh': it is not executable"),
        (&["--no_python", "train.py"], "for the file in this folder write ./train.py"),
        (&["--no_python", "no-such-program-anywhere"], "no folder of PATH has it"),
    ] {
        // A python must be found first, whether this machine has one or not.
        folder.script("venv/bin/python", "exit 9");
        let mut command = folder.deepspeed(args);
        command.env("VIRTUAL_ENV", folder.path().join("venv"));
        let done = folder.start_command(command).finish();
        assert_eq!(done.code, Some(2), "{args:?}: {done:?}");
        assert!(done.err.contains(what), "{args:?}: {}", done.err);
    }
}

#[test]
fn bad_arguments_and_filters_are_explained() {
    let folder = Folder::new();
    folder.script("t.sh", "echo $RANK of $WORLD_SIZE").write("hosts", "worker-1 slots=4\nworker-2 slots=4\n");
    for (args, what) in [
        (&["--num_gpsu", "2", "t.sh"][..], "--num_gpus"),
        (&["--num_gpus", "two", "t.sh"], "invalid value 'two'"),
        (&["--master_port", "99999", "t.sh"], "99999"),
        (&["-H", "hosts", "--launcher", "pdhs", "--no_python", "./t.sh"], "did you mean 'pdsh'?"),
        (&["--include", "worker-9", "--no_python", "./t.sh"], "hostname 'worker-9' not found"),
        (&["--exclude", "localhost", "--no_python", "./t.sh"], "no slot is left after --exclude"),
        (&["--module", "--no_python", "t"], "--no_python and --module contradict each other"),
    ] {
        let done = folder.run(args);
        assert_eq!(done.code, Some(2), "{args:?}: {done:?}");
        assert!(done.err.contains(what), "{args:?}: {}", done.err);
        assert_eq!(done.out, "");
    }
    let done = folder.run(&["-q", "-H", "hosts", "--include", "worker-2:1,3", "--no_python", "./t.sh"]);
    assert!(done.out.contains("0 of 2\n") && done.out.contains("[rank 1] 1 of 2\n"), "{done:?}");
    let done = folder.run(&["-q", "--include", "localhost:0", "--no_python", "./t.sh"]);
    assert_eq!(done.out, "0 of 1\n");
}

#[test]
fn environment_files_reach_the_ranks() {
    let folder = Folder::new();
    folder.script("t.sh", "echo $A $B $C").write(".deepspeed_env", "A=1\n\nbroken line\nB=two words\n");
    let done = folder.run(&["--num_gpus", "1", "--no_python", "./t.sh"]);
    assert_eq!(done.out, "1 two words\n");
    assert!(done.err.contains(".deepspeed_env sets for every rank: A, B"), "{}", done.err);
    assert!(done.err.contains(".deepspeed_env:3: `broken line` has no `=`"), "{}", done.err);
    folder.write("other.env", "C=3\n");
    let mut command = folder.deepspeed(&["-q", "--num_gpus", "1", "--no_python", "./t.sh"]);
    command.env("DS_ENV_FILE", folder.path().join("other.env"));
    let done = folder.start_command(command).finish();
    assert_eq!((done.out.as_str(), done.err.as_str()), ("3\n", ""));
}

#[test]
fn the_process_id_is_saved_while_the_job_runs() {
    let folder = Folder::new();
    folder.script("t.sh", "cat $TMPDIR/*.deepspeed; echo");
    let job = folder.start(&["-q", "--num_gpus", "1", "--save_pid", "--no_python", "./t.sh"]);
    let pid = job.pid();
    assert_eq!(job.finish().out, format!("{pid}\n"));
    assert!(!folder.path().join(format!("{pid}.deepspeed")).exists());
}

#[test]
fn command_words_are_words_only_where_no_file_has_that_name() {
    let folder = Folder::new();
    assert!(folder.run(&["config", "--help"]).out.contains("check"));
    folder.script("venv/bin/python", "echo $*").write("doctor", "").write("config", "");
    for word in ["doctor", "config"] {
        let mut command = folder.deepspeed(&[word, "--num_gpus", "1"]);
        // Every core would run a rank; the first line is rank 0's or another's.
        command.env("VIRTUAL_ENV", folder.path().join("venv"));
        let done = folder.start_command(command).finish();
        assert!(done.out.contains(&format!("-u {word} --local_rank=0 --num_gpus 1")), "{done:?}");
    }
    // What the original's other commands start is a command whatever lies here.
    assert!(folder.run(&["__run", "config", "--help"]).out.contains("check"));
    let unknown = folder.run(&["__run", "nonsense"]);
    assert!(unknown.code == Some(1) && unknown.err.contains("there is no command `nonsense`"), "{unknown:?}");
}

#[test]
fn help_and_version() {
    let folder = Folder::new();
    let help = folder.run(&["--help"]);
    assert_eq!(help.code, Some(0));
    for part in ["--num_gpus", "--include", "--dry_run", "Which ranks to start", "deepspeed config"] {
        assert!(help.out.contains(part), "{part}");
    }
    assert_eq!(folder.run(&["--version"]).out, format!("deepspeed {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(folder.run(&[]).code, Some(2));
}
