//! `deepspeed memory` as a user runs it.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    path::PathBuf,
    process::{Command, Output},
};

/// A file of this test's own.
fn file(name: &str, text: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("memory_command");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(format!("{}-{name}", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path
}

/// Runs `deepspeed memory` without Python in reach.
fn run(config: &PathBuf, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deepspeed"));
    command.arg("memory").arg(config).args(args).env_clear().output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

const ADAMW: &str = "\"train_micro_batch_size_per_gpu\": 1, \"bf16\": {\"enabled\": true}, \
                     \"optimizer\": {\"type\": \"AdamW\"}";

#[test]
fn a_plan_that_fits() {
    let path = file("fits.json", &format!("{{{ADAMW}, \"zero_optimization\": {{\"stage\": 2}}}}"));
    let output =
        run(&path, &["--params", "1e9", "--world", "4", "--largest-unit", "50M", "--available", "40GiB"]);
    assert_eq!(output.status.code(), Some(0), "{}{}", stdout(&output), stderr(&output));
    let text = stdout(&output);
    for part in [
        "bf16: 1.00 B parameters, ZeRO stage 2, 4 rank(s), 4 on each host",
        "weights                host memory              1.86 GiB     7.45 GiB\n",
        "optimizer state        host memory              1.86 GiB     7.45 GiB\n",
        "free                   host memory                          40.00 GiB  --available\n",
        "fits; left for activations and everything else: 16.9",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert!(!text.contains("assumed"), "{text}");
}

#[test]
fn a_plan_that_does_not_fit_says_what_to_change() {
    let path = file("large.json", &format!("{{{ADAMW}}}"));
    let output = run(&path, &["--params", "1b", "--world", "4", "--available", "20GiB"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    for part in [
        "the model state does not fit: this host needs 29.",
        "and 20.00 GiB are free (--available)",
        "the smallest change that fits:\n  \"zero_optimization\": {\"stage\": 3}\n",
        "assumed: units",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let output = run(&path, &["--params", "1b", "--world", "4", "--available", "3g", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["verdict"]["answer"], "too_large");
    assert_eq!(json["verdict"]["shortages"][0]["free"]["bytes"], 3_u64 << 30);
    assert_eq!(json["verdict"]["change"]["offload_optimizer"], "nvme");
}

#[test]
fn numbers_of_programs() {
    let path = file("json.json", &format!("{{{ADAMW}, \"zero_optimization\": {{\"stage\": 1}}}}"));
    let output = run(&path, &["--params", "1000000", "--frozen", "2M", "--world", "2", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["params"], 3_000_000);
    assert_eq!(json["plan"]["rows"][0]["kind"], "weights");
    assert_eq!(json["plan"]["rows"][0]["tier"], "host");
    assert_eq!(json["plan"]["rows"][0]["per_rank"], 6_000_000);
    assert_eq!(json["plan"]["rows"][0]["per_host"], 12_000_000);
    assert_eq!(json["verdict"]["answer"], "fits");
    assert!(json["free"]["host"]["bytes"].as_u64().unwrap() > 0);
}

#[test]
fn accelerators_and_offload() {
    let path = file(
        "offload.json",
        &format!(
            "{{{ADAMW}, \"zero_optimization\": {{\"stage\": 2, \"offload_optimizer\": {{\"device\": \"cpu\"}}}}}}"
        ),
    );
    let output =
        run(&path, &["--params", "7b", "--world", "8", "--device-memory", "24GiB", "--available", "256GiB"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    let text = stdout(&output);
    assert!(text.contains("optimizer state        host memory"), "{text}");
    assert!(text.contains("weights                accelerator memory      13.04 GiB"), "{text}");
}

#[test]
fn what_is_wrong_is_said() {
    let path = file("typo.json", "{\"train_batch_sise\": 8}");
    let output = run(&path, &["--params", "1b"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("did you mean `train_batch_size`?"), "{}", stderr(&output));

    let path = file("batch.json", "{\"train_batch_size\": 8}");
    let output = run(&path, &["--params", "1b", "--world", "3"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--world"), "{}", stderr(&output));

    let output = run(&path, &["--params", "many"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("`many` is not a number of parameters"), "{}", stderr(&output));

    let path = file("template.json", "{\"train_batch_size\": \"auto\"}");
    assert_eq!(run(&path, &["--params", "1M"]).status.code(), Some(1));
    let output = run(&path, &["--params", "1M", "--allow-auto"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("assumed: the state of Adam"), "{}", stdout(&output));
}

#[test]
fn a_file_named_memory_is_a_script() {
    let output = Command::new(env!("CARGO_BIN_EXE_deepspeed")).args(["memory", "--help"]).output().unwrap();
    assert!(stdout(&output).contains("--params"), "{}", stdout(&output));
}
