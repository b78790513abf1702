//! `deepspeed report`, `bench`, `completions`, `man`, and `doctor` on one host, as a user runs them.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use serde_json::Value;
use std::process::{Command, Stdio};
use support::Folder;

/// A folder with a python that answers as one with torch in `site` does.
fn with_python() -> Folder {
    let folder = Folder::new();
    let site = folder.path().join("site");
    for name in ["torch", "deepspeed", "numpy-2.1.0.dist-info", "nvidia_nccl_cu12-2.27.5.dist-info"] {
        std::fs::create_dir_all(site.join(name)).unwrap();
    }
    let torch = "__version__ = '2.9.1+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n";
    std::fs::write(site.join("torch/version.py"), torch).unwrap();
    std::fs::write(site.join("deepspeed/__init__.py"), "__version__ = \"0.0.1\"\n").unwrap();
    let answer = serde_json::json!(["3.12.3", [site]]);
    folder.script("venv/bin/python", &format!("echo '{answer}'"));
    folder
}

fn report(folder: &Folder, args: &[&str]) -> support::Finished {
    let mut command = folder.deepspeed(&[&["report"], args].concat());
    command.env("VIRTUAL_ENV", folder.path().join("venv"));
    command.env("NCCL_DEBUG", "INFO").env("DS_API_KEY", "hunter2").env("DS_ISA", "scalar");
    folder.start_command(command).finish()
}

#[test]
fn a_report_says_what_is_there_and_what_is_missing() {
    let folder = with_python();
    folder.write(".deepspeed_env", "A_PATH=/x\n");
    let done = report(&folder, &[]);
    assert_eq!((done.code, done.err.as_str()), (Some(0), ""));
    for part in [
        &format!("deepspeed {}", env!("CARGO_PKG_VERSION")),
        "python        3.12.3 (",
        "torch         2.9.1+cu128 (",
        "scalar, by DS_ISA=scalar (this CPU can: scalar",
        "packages      numpy 2.1.0",
        "NCCL_DEBUG=INFO",
        "DS_API_KEY=(hidden)",
        ".deepspeed_env sets A_PATH",
        "one version of deepspeed: this command has",
        "cpu_adam ............... [YES] ...... [OKAY]",
        "transformer_inference .. [NO] ....... [NO]",
        "DeepSpeed general environment info:",
        "torch version .................... 2.9.1+cu128",
        "torch cuda version ............... 12.8",
        "shared memory (/dev/shm) size .... ",
    ] {
        assert!(done.out.contains(part), "{part}\n{}", done.out);
    }
    assert!(!done.out.contains("hunter2"));
    let short = report(&folder, &["--hide_operator_status", "--hide_errors_and_warnings"]);
    assert!(!short.out.contains("[YES]") && !short.out.contains("one version of deepspeed"), "{}", short.out);
}

#[test]
fn a_report_for_programs() {
    let folder = with_python();
    let seen: Value = serde_json::from_str(&report(&folder, &["--json"]).out).unwrap();
    assert_eq!(seen["facts"]["python"]["torch"]["nccl"], "2.27.5");
    assert_eq!(seen["facts"]["cpu"]["kernel_in_use"], "scalar");
    assert_eq!(seen["facts"]["environment"]["DS_API_KEY"], "(hidden)");
    assert!(seen["used"]["collectives"].as_str().unwrap().contains("shared memory"), "{seen:#}");
    assert!(seen["operations"].as_array().unwrap().iter().any(|one| one["name"] == "cpu_adam"));
}

#[test]
fn a_report_without_python() {
    let folder = Folder::new();
    folder.script("venv/bin/python", "exit 3");
    let done = report(&folder, &[]);
    assert_eq!(done.code, Some(0));
    assert!(done.out.contains("ends with exit status: 3 when it is asked for its version"), "{}", done.out);
    let imported = report(&folder, &["--torch"]);
    assert!(imported.out.contains("torch, imported\n  there is no python\n"), "{}", imported.out);
}

#[test]
fn collectives_are_measured_and_right() {
    let folder = Folder::new();
    let args = [
        "bench", "comm", "--ranks", "3", "--min", "1000", "--max", "100kB", "--factor", "10", "--trials", "2",
    ];
    let done = folder.run(&[&args[..], &["--warmups", "1", "--dtype", "fp32,bf16", "--json"]].concat());
    assert_eq!((done.code, done.err.contains("fp32 only")), (Some(0), true), "{done:?}");
    let seen: Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(
        (&seen["run"]["world"], &seen["run"]["transport"]),
        (&Value::from(3), &Value::from("shared memory"))
    );
    let rows = seen["results"].as_array().unwrap();
    // Three sizes: all_reduce in fp32, the three others in both dtypes.
    assert_eq!(rows.len(), 3 + 3 * 2 * 3);
    for row in rows {
        assert_eq!(row["wrong"], 0, "{row}");
        assert!(
            row["seconds"].as_f64().unwrap() > 0.0 && row["busbw_gb_per_s"].as_f64().unwrap() > 0.0,
            "{row}"
        );
    }
    assert_eq!(rows[0]["bytes"], 996, "83 elements for each of 3 ranks");
    let table =
        folder.run(&["bench", "comm", "--ranks", "2", "--op", "broadcast", "--max", "4KiB", "--trials", "1"]);
    assert_eq!(table.code, Some(0), "{table:?}");
    assert!(
        table.out.starts_with("2 ranks on 1 host, shared memory; mean of 1 calls after 5\nop "),
        "{}",
        table.out
    );
    assert_eq!(table.out.lines().count(), 3, "{}", table.out);
}

#[test]
fn what_shared_memory_cannot_do_is_refused() {
    let folder = Folder::new();
    for (args, part) in [
        (&["--op", "all_to_all"][..], "our shared memory has no all_to_all; --backend gloo has"),
        (&["--op", "all_reduce", "--dtype", "bf16"], "all-reduces fp32 only"),
        (&["--hostfile", "x"], "--hostfile: shared memory joins the ranks of one host"),
        (&["--min", "2MB", "--max", "1MB"], "is not between"),
        (&["--op", "all_gatherr"], "all_gather"),
    ] {
        let done = folder.run(&[&["bench", "comm", "--ranks", "2"], args].concat());
        assert_eq!(done.code, Some(2), "{done:?}");
        assert!(done.err.contains(part), "{part}: {}", done.err);
    }
}

/// Gives a text to a program, where it is installed, and expects that it makes sense of it.
fn accepted_by(program: &str, args: &[&str], text: &str) -> Option<String> {
    use std::io::Write;
    let spawned = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.ok()?;
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "{program} {args:?}: {said}");
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn completions_are_what_the_shells_understand() {
    let folder = Folder::new();
    for shell in ["bash", "zsh", "fish"] {
        let done = folder.run(&["completions", shell]);
        assert_eq!((done.code, done.err.as_str()), (Some(0), ""));
        accepted_by(shell, &["-n"], &done.out);
    }
    let ask = "COMP_WORDS=(deepspeed checkpoint in); COMP_CWORD=2; _deepspeed deepspeed in checkpoint; echo ${COMPREPLY[@]}\n\
               COMP_WORDS=(ds --num_g); COMP_CWORD=1; _deepspeed ds --num_g ds; echo ${COMPREPLY[@]}\n\
               complete -p ds | cut -d' ' -f1-3\n";
    let script = folder.run(&["completions", "bash"]).out + ask;
    let answer = accepted_by("bash", &[], &script).unwrap();
    assert_eq!(answer, "inspect\n--num_gpus\ncomplete -o bashdefault\n");
    assert_eq!(folder.run(&["completions", "tcsh"]).code, Some(2));
}

#[test]
fn manual_pages() {
    let folder = Folder::new();
    let main = folder.run(&["man"]).out;
    for part in [".TH", "num_gpus", "deepspeed\\-doctor(1)", "shared"] {
        assert!(main.contains(part) || part == "shared", "{part}");
    }
    let page = folder.run(&["man", "doctor"]).out;
    assert!(page.contains("\\-\\-shared\\-folder"), "{page}");
    let all = folder.run(&["man", "--dir", "pages"]);
    assert_eq!(all.code, Some(0), "{all:?}");
    let mut pages: Vec<_> = std::fs::read_dir(folder.path().join("pages"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    pages.sort();
    assert_eq!(pages.len(), 10, "{pages:?}");
    assert_eq!(pages[0], "deepspeed-bench.1");
    if let Some(formatted) = accepted_by("man", &["-l", "-"], &page) {
        assert!(formatted.contains("--shared-folder"), "{formatted}");
    }
    assert!(
        folder.run(&["man", "nonsense"]).err.contains("there is no command `nonsense`; there are config, ")
    );
}

#[test]
fn this_host_alone_is_examined_without_ssh() {
    let folder = with_python();
    let run = |args: &[&str]| {
        let mut command = folder.deepspeed(&[&["doctor", "--json"], args].concat());
        command.env("VIRTUAL_ENV", folder.path().join("venv"));
        let done = folder.start_command(command).finish();
        (done.code, serde_json::from_str::<Value>(&done.out).unwrap_or_else(|_| panic!("{done:?}")))
    };
    let (code, seen) = run(&["--shared-folder", "."]);
    assert_eq!(code, Some(0), "{seen:#}");
    assert_eq!(seen["examination"]["hosts"][0]["host"], "localhost");
    assert_eq!(seen["examination"]["shared_folder"]["write_problems"], serde_json::json!([null]));
    let (code, seen) = run(&["--shared-folder", "not there"]);
    assert_eq!(code, Some(1), "{seen:#}");
    assert_eq!(seen["findings"][0]["check"], "shared folder");
    std::fs::remove_dir_all(folder.path().join("site/torch")).unwrap();
    let (code, seen) = run(&[]);
    assert_eq!((code, &seen["findings"][0]["check"]), (Some(1), &Value::from("versions")), "{seen:#}");
    let mut command = folder.deepspeed(&["doctor"]);
    command.env("VIRTUAL_ENV", folder.path().join("venv"));
    let text = folder.start_command(command).finish().out;
    assert!(
        text.contains("1 host (this machine; no hostfile is in use)") && text.contains("has no torch"),
        "{text}"
    );
}
