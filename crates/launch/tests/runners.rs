//! The command lines of every runner as snapshots, those that cannot be installed here among them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use clap::Parser;
use deepspeed_launch::{LaunchArgs, Plan, Surroundings, resolve};
use proptest::prelude::*;
use std::path::PathBuf;

fn login_machine(tools: &[&str]) -> Surroundings {
    Surroundings {
        hostname: "login".into(),
        cores: 4,
        core_ids: (0..4).collect(),
        physical_core_ids: (0..4).collect(),
        python: Some("/venv/bin/python".into()),
        hostfile: Some((PathBuf::from("hosts"), "worker-1 slots=4\nworker-2 slots=2\n".into())),
        tools: tools.iter().map(|tool| (*tool).to_owned()).collect(),
        folder: "/home/u".into(),
        program: "/my venv/bin/deepspeed".into(),
        ..Surroundings::default()
    }
}

fn resolved(line: &str, surroundings: &Surroundings) -> Result<Plan, String> {
    let args =
        LaunchArgs::try_parse_from(std::iter::once("deepspeed").chain(line.split_whitespace())).unwrap();
    resolve(&args, surroundings).map_err(|error| format!("error: {error}"))
}

/// The runner's command line, word by word.
fn words(line: &str, surroundings: &Surroundings) -> String {
    match resolved(line, surroundings) {
        Ok(Plan::Hosts(plan)) => {
            assert_eq!(plan.connections.len(), 1);
            plan.connections[0].iter().map(|word| format!("{}\n", word.display())).collect()
        }
        Ok(Plan::Here(plan)) => plan.to_string(),
        Err(error) => error,
    }
}

#[test]
fn a_dry_run_shows_the_line_and_each_hosts_ranks() {
    let line = "-H hosts --launcher openmpi --num_gpus 1 --no_local_rank train.py";
    insta::assert_snapshot!(resolved(line, &login_machine(&["mpirun"])).unwrap());
}

#[test]
fn pdsh() {
    let surroundings = Surroundings {
        environment: [("PDSH_SSH_ARGS_APPEND".to_owned(), "-F /my/config".to_owned())].into(),
        program: "/100% mine/bin/deepspeed".into(),
        ..login_machine(&["pdsh"])
    };
    insta::assert_snapshot!(words(
        "-H hosts --launcher pdsh --ssh_port 2222 --launcher_args=-t5 train.py",
        &surroundings
    ));
}

#[test]
fn openmpi() {
    let line = "-H hosts --launcher OpenMPI --ssh_port 2222 --venv_script activate --launcher_args=--allow-run-as-root train.py";
    insta::assert_snapshot!(words(line, &login_machine(&["mpirun", "mpirun.openmpi"])));
}

#[test]
fn mpich() {
    let line = "-H hosts --launcher mpich --ssh_port 2222 --include worker-2:1 --force_multi train.py";
    insta::assert_snapshot!(words(line, &login_machine(&["mpirun", "mpirun.mpich"])));
}

#[test]
fn intel_mpi() {
    insta::assert_snapshot!(words(
        "-H hosts --launcher impi --ssh_port 2222 train.py",
        &login_machine(&["mpirun"])
    ));
}

#[test]
fn mvapich() {
    insta::assert_snapshot!(words("-H hosts --launcher mvapich train.py", &login_machine(&["mpirun"])));
}

#[test]
fn slurm_with_a_hostfile() {
    let line = "-H hosts --launcher slurm --launcher_args=--comment=mine --ssh_port 7 train.py";
    insta::assert_snapshot!(words(line, &login_machine(&["srun"])));
    let gpus = Surroundings { gpus: 4, ..login_machine(&["srun"]) };
    let text = words("-H hosts --launcher slurm --num_gpus 2 train.py", &gpus);
    assert!(text.contains("\n--gpus-per-node=2\n"), "{text}");
}

fn job(list: &str, tasks: &str, gpus: Option<&str>) -> Surroundings {
    let mut environment =
        vec![("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", list), ("SLURM_TASKS_PER_NODE", tasks)];
    environment.extend(gpus.map(|gpus| ("SLURM_GPUS_ON_NODE", gpus)));
    Surroundings {
        hostfile: None,
        environment: environment
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        ..login_machine(&["srun", "ssh"])
    }
}

/// The first line and the notes.
fn brief(line: &str, surroundings: &Surroundings) -> String {
    match resolved(line, surroundings) {
        Ok(plan) => plan.to_string().split("\n\n").next().unwrap_or_default().to_owned(),
        Err(error) => error,
    }
}

#[test]
fn a_slurm_job_is_its_own_hostfile() {
    insta::assert_snapshot!(words("--launcher slurm train.py", &job("n[01-02]", "2(x2)", None)));
    insta::assert_snapshot!(
        [
            brief("--launcher slurm train.py", &job("n[01-03]", "2(x2),1", None)),
            brief("--launcher slurm train.py", &job("n[01-02]", "1(x2)", Some("8"))),
            brief("--launcher slurm --num_nodes 2 --num_gpus 2 train.py", &job("n[01-03]", "8(x3)", None)),
            brief("--launcher slurm --exclude n02:0 train.py", &job("n[01-02]", "2(x2)", None)),
            brief("--launcher slurm --num_nodes 4 train.py", &job("n[01-03]", "8(x3)", None)),
            brief("--launcher slurm train.py", &job("n01", "2", None)),
            brief("--launcher slurm train.py", &job("n[01", "2", None)),
            brief("train.py", &job("n[01-02]", "2(x2)", None)),
        ]
        .join("\n\n")
    );
}

#[test]
fn refusals() {
    let hosts = |name: &str, tools: &[&str]| Surroundings {
        hostfile: Some((PathBuf::from("hosts"), format!("{name} slots=1\nb slots=1\n"))),
        ..login_machine(tools)
    };
    insta::assert_snapshot!(
        [
            brief("-H hosts --launcher pdsh train.py", &hosts("ssh:a", &["pdsh"])),
            brief("-H hosts --launcher pdsh train.py", &hosts("a[1-3]", &["pdsh"])),
            brief("-H hosts --launcher pdsh train.py", &hosts("u@a", &["pdsh"])),
            brief("-H hosts --launcher openmpi train.py", &hosts("u@a", &["mpirun"])),
            brief("-H hosts --launcher slurm train.py", &hosts("$(reboot)", &["srun"])),
            brief("-H hosts --launcher mpich train.py", &hosts("a", &["srun"])),
            brief("-H hosts --launcher impi --launcher_args=' train.py", &hosts("a", &["mpirun"])),
            brief("-H hosts --launcher_addr 10.0.0.1 train.py", &hosts("a", &["ssh"])),
        ]
        .join("\n\n")
    );
}

/// Reads a line as a POSIX shell splits it into words: `None` where it would do anything else.
fn split_by_shell(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut letters = line.chars();
    while let Some(c) = letters.next() {
        match c {
            ' ' => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match letters.next()? {
                        '\'' => break,
                        c => word.push(c),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(letters.next()?),
            c if c.is_alphanumeric() || "_@%+=:,./-".contains(c) => word.get_or_insert_default().push(c),
            _ => return None,
        }
    }
    words.extend(word);
    Some(words)
}

proptest! {
    /// Whatever the path of the command and of the script that is sourced: what pdsh hands to the hosts' shells is words, and the
    /// script that finds the command has them in quotes.
    #[test]
    fn no_shell_is_given_an_unquoted_word(program in "[ -~]{1,20}", venv in "[ -~]{1,20}", args in "[ -~]{0,20}") {
        let surroundings = Surroundings { program: program.clone().into(), ..login_machine(&["pdsh", "mpirun", "srun"]) };
        for runner in ["pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm"] {
            for sourced in [None, Some(&venv)] {
                let mut line = vec!["deepspeed".to_owned(), "-H".into(), "hosts".into(), "--launcher".into(), runner.into(),
                    format!("--launcher_args={args}")];
                line.extend(sourced.map(|venv| format!("--venv_script={venv}")));
                line.push("train.py".into());
                let Ok(Plan::Hosts(plan)) = resolve(&LaunchArgs::try_parse_from(line).unwrap(), &surroundings) else { continue };
                let words: Vec<String> = plan.connections[0].iter().map(|word| word.to_string_lossy().into_owned()).collect();
                let words = if runner == "pdsh" {
                    // As pdsh does, and then as the host's shell does.
                    let command = words.last().unwrap().replace("%%", "\0").replace("%n", "0").replace('\0', "%");
                    let words = split_by_shell(&command);
                    prop_assert!(words.is_some(), "{}", command);
                    words.unwrap()
                } else {
                    words
                };
                let at = words.iter().position(|word| word == "/bin/sh").unwrap();
                let script = &words[at + 2];
                let quoted = if let Some(venv) = sourced {
                    let path = if venv.contains('/') { venv.clone() } else { format!("./{venv}") };
                    let script = script.strip_prefix(". ").unwrap().strip_suffix(" && exec deepspeed \"$@\"").unwrap().to_owned();
                    (script, path)
                } else {
                    let script = script.strip_prefix("p=").unwrap();
                    let script = script.strip_suffix("; [ -x \"$p\" ] || p=deepspeed; exec \"$p\" \"$@\"").unwrap();
                    (script.to_owned(), program.clone())
                };
                prop_assert_eq!(split_by_shell(&quoted.0), Some(vec![quoted.1]));
                prop_assert_eq!(&words[at + 3..at + 6], &["deepspeed", "__agent", "--connect"]);
            }
        }
    }
}
