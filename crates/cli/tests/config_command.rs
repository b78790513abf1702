//! `deepspeed config` as a user runs it.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    path::PathBuf,
    process::{Command, Output},
};

/// A file of this test's own.
fn file(name: &str, text: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("config_command");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(format!("{}-{name}", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path
}

/// Runs `deepspeed config` without Python in reach.
fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_deepspeed")).arg("config").args(args).env_clear().output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_valid_config_is_resolved() {
    let path = file(
        "valid.json",
        "{\n  \"train_batch_size\": 8, // all ranks\n  \"bf16\": {\"enabled\": true}\n}\n",
    );
    let output = run(&["check", path.to_str().unwrap(), "--world-size", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(
        text.contains("train_batch_size 8 (line 2) = train_micro_batch_size_per_gpu 4 (derived)"),
        "{text}"
    );
    assert!(text.contains("precision   bf16"), "{text}");

    let output = run(&["check", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("give --world-size N"), "{}", stdout(&output));
}

#[test]
fn problems_go_to_stderr_with_exit_code_1() {
    for (name, text, expected) in [
        ("key.json", "{\n  \"gradient_clipp1ng\": 1.0\n}", &["2:3", "did you mean `gradient_clipping`?"][..]),
        (
            "twice.json",
            "{\"dump_state\": true,\n \"dump_state\": false}",
            &["2:2", "set twice", "first set here"],
        ),
        ("broken.json", "{\n  \"dump_state\": true\n  \"fp16\": {}\n}", &["2:21", "a comma is missing"]),
        ("none.json", "{}", &["neither train_batch_size nor train_micro_batch_size_per_gpu is given"]),
    ] {
        let path = file(name, text);
        let output = run(&["check", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert!(output.stdout.is_empty(), "{name}");
        let report = stderr(&output);
        for piece in expected {
            assert!(report.contains(piece), "{name}: {piece}\n{report}");
        }
    }
    let path = file("batch.json", "{\"train_batch_size\": 8}");
    let output = run(&["check", path.to_str().unwrap(), "--world-size", "3"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("train_batch_size 6 or 9 would work"), "{}", stderr(&output));
    assert_eq!(run(&["check", "no-such-file.json"]).status.code(), Some(1));
}

#[test]
fn the_variable_makes_unknown_settings_warnings() {
    let path = file("lax.json", "{\"train_batch_size\": 8, \"mystery\": 1}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_deepspeed"));
    command.args(["config", "check"]).arg(&path).env_clear().env("DS_CONFIG_STRICT", "0");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).starts_with("warning: unknown setting `mystery`"), "{}", stderr(&output));
}

#[test]
fn a_template_of_the_trainer() {
    let path = file("template.json", "{\"train_batch_size\": \"auto\", \"fp16\": {\"enabled\": \"auto\"}}");
    let output = run(&["check", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("Hugging Face Trainer"), "{}", stderr(&output));
    let output = run(&["check", path.to_str().unwrap(), "--allow-auto"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn explain_schema_and_reference() {
    let path = file("explain.json", "{\"zero_optimization\": {\"stage\": 2}}");
    let output = run(&["explain", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("zero_optimization.stage = 2 (line 1)"), "{}", stdout(&output));
    let output = run(&["explain", path.to_str().unwrap(), "gradient_clippin"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("did you mean `gradient_clipping`?"), "{}", stderr(&output));
    assert!(stdout(&run(&["schema"])).starts_with("{\n  \"$schema\""));
    assert!(stdout(&run(&["reference"])).starts_with("# ds_config.json: every setting"));
}

#[test]
fn batch_numbers_that_fit_no_world_are_an_error_without_a_world_size() {
    let text = "{\n  \"train_batch_size\": 7,\n  \"train_micro_batch_size_per_gpu\": 2,\n  \"gradient_accumulation_steps\": 2\n}\n";
    let path = file("batch.json", text);
    let output = run(&["check", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
    let message = stderr(&output);
    for part in ["train_batch_size", "no world size fits", "batch.json", "2 |"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let fitting = file("fitting.json", &text.replace('7', "8"));
    assert_eq!(run(&["check", fitting.to_str().unwrap(), "--world_size", "2"]).status.code(), Some(0));
    assert_eq!(run(&["check", fitting.to_str().unwrap(), "--world_size", "3"]).status.code(), Some(1));
}
