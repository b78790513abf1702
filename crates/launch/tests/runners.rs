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

/// How a host's shell finds the command, and what every agent is told.
const FOUND: &str = "p='/my venv/bin/deepspeed'; [ -x \"$p\" ] || p=deepspeed; exec \"$p\" \"$@\"";
const TOLD: [&str; 6] = ["deepspeed", "__agent", "--connect", "ADDRESS:PORT", "--fingerprint", "FINGERPRINT"];

/// Words one to a line, and what all runners have in common in one line: `env (asks nothing)`, and `(agent)` or, where a script is
/// sourced first, `(agent after SCRIPT)`.
fn condensed(words: &[String]) -> String {
    let asks_nothing = ["env", "SSH_ASKPASS=/bin/false", "SSH_ASKPASS_REQUIRE=force"];
    let mut text = String::new();
    let mut rest = words;
    while let Some(word) = rest.first() {
        let (line, taken) = match rest {
            words if words.starts_with(&asks_nothing.map(str::to_owned)) => {
                ("env (asks nothing)".to_owned(), 3)
            }
            [sh, c, script, told @ ..]
                if sh == "/bin/sh" && c == "-c" && told.starts_with(&TOLD.map(str::to_owned)) =>
            {
                (if script == FOUND { "(agent)".to_owned() } else { format!("(agent after {script})") }, 9)
            }
            _ => (word.clone(), 1),
        };
        text += &format!("{line}\n");
        rest = &rest[taken..];
    }
    text
}

/// The runner's command line.
fn words(line: &str, surroundings: &Surroundings) -> String {
    match resolved(line, surroundings) {
        Ok(Plan::Hosts(plan)) => {
            assert_eq!(plan.connections.len(), 1);
            let words: Vec<String> =
                plan.connections[0].iter().map(|word| word.display().to_string()).collect();
            condensed(&words)
        }
        Ok(Plan::Here(plan)) => plan.to_string(),
        Err(error) => error,
    }
}

#[test]
fn a_dry_run_shows_the_line_and_each_hosts_ranks() {
    let line = "-H hosts --launcher openmpi --num_gpus 1 --no_local_rank train.py";
    insta::assert_snapshot!(resolved(line, &login_machine(&["mpirun"])).unwrap(), @r#"
        2 ranks on 2 hosts by openmpi: worker-1 (1), worker-2 (1)

        every rank gets, in the folder /home/u
          PYTHONPATH=/home/u
          WORLD_SIZE=2 CROSS_SIZE=2
          MASTER_ADDR=(address of worker-1, as the hosts reach it)
          MASTER_PORT=(a free port of worker-1, chosen at the start)
          DS_JOB_SECRET=(random, new for each job; sent through the connection)
          and what its host decides: CUDA_VISIBLE_DEVICES where it has GPUs, OMP_NUM_THREADS, cores

        an agent on each host is started by one line, and calls back at ADDRESS:PORT, which are this machine's; they and FINGERPRINT are new for each job
          env SSH_ASKPASS=/bin/false SSH_ASKPASS_REQUIRE=force mpirun --bind-to none --host worker-1:1 -n 1 /bin/sh -c 'p='\''/my venv/bin/deepspeed'\''; [ -x "$p" ] || p=deepspeed; exec "$p" "$@"' deepspeed __agent --connect ADDRESS:PORT --fingerprint FINGERPRINT --place 0 : --host worker-2:1 -n 1 /bin/sh -c 'p='\''/my venv/bin/deepspeed'\''; [ -x "$p" ] || p=deepspeed; exec "$p" "$@"' deepspeed __agent --connect ADDRESS:PORT --fingerprint FINGERPRINT --place 1

        host worker-1: slots 0
          RANK=0 LOCAL_RANK=0 LOCAL_SIZE=1 CROSS_RANK=0: (the host's python) -u train.py

        host worker-2: slots 0
          RANK=1 LOCAL_RANK=0 LOCAL_SIZE=1 CROSS_RANK=1: (the host's python) -u train.py
        "#);
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
    ), @r#"
        env (asks nothing)
        PDSH_RCMD_TYPE=ssh
        PDSH_SSH_ARGS_APPEND=-F /my/config -p 2222 -oBatchMode=yes
        pdsh
        -S
        -f
        2
        -t5
        -w
        worker-1,worker-2
        exec /bin/sh -c 'p='\''/100%% mine/bin/deepspeed'\''; [ -x "$p" ] || p=deepspeed; exec "$p" "$@"' deepspeed __agent --connect ADDRESS:PORT --fingerprint FINGERPRINT --place %n
        "#);
}

#[test]
fn openmpi() {
    let line = "-H hosts --launcher OpenMPI --ssh_port 2222 --venv_script activate --launcher_args=--allow-run-as-root train.py";
    insta::assert_snapshot!(words(line, &login_machine(&["mpirun", "mpirun.openmpi"])), @r#"
        env (asks nothing)
        mpirun.openmpi
        --bind-to
        none
        --mca
        plm_rsh_args
        -p 2222
        --allow-run-as-root
        --host
        worker-1:1
        -n
        1
        (agent after . ./activate && exec deepspeed "$@")
        --place
        0
        :
        --host
        worker-2:1
        -n
        1
        (agent after . ./activate && exec deepspeed "$@")
        --place
        1
        "#);
}

#[test]
fn mpich() {
    let line = "-H hosts --launcher mpich --ssh_port 2222 --include worker-2:1 --force_multi train.py";
    insta::assert_snapshot!(words(line, &login_machine(&["mpirun", "mpirun.mpich"])), @r#"
        env (asks nothing)
        HYDRA_LAUNCHER_EXTRA_ARGS=-p 2222
        mpirun.mpich
        -hosts
        worker-2
        -ppn
        1
        -n
        1
        (agent)
        --place-from
        PMI_RANK
        "#);
}

#[test]
fn intel_mpi() {
    insta::assert_snapshot!(words(
        "-H hosts --launcher impi --ssh_port 2222 train.py",
        &login_machine(&["mpirun"])
    ), @r#"
        env (asks nothing)
        I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=0
        I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS=-p 2222
        mpirun
        -hosts
        worker-1,worker-2
        -ppn
        1
        -n
        2
        -genv
        I_MPI_PIN
        0
        (agent)
        --place-from
        PMI_RANK
        "#);
}

#[test]
fn mvapich() {
    insta::assert_snapshot!(words("-H hosts --launcher mvapich train.py", &login_machine(&["mpirun"])), @r#"
        env (asks nothing)
        mpirun
        -hosts
        worker-1,worker-2
        -ppn
        1
        -n
        2
        (agent)
        --place-from
        PMI_RANK
        "#);
}

#[test]
fn slurm_with_a_hostfile() {
    let line = "-H hosts --launcher slurm --launcher_args=--comment=mine --ssh_port 7 train.py";
    insta::assert_snapshot!(words(line, &login_machine(&["srun"])), @r#"
        srun
        --nodes=2
        --ntasks=2
        --ntasks-per-node=1
        --nodelist=worker-1,worker-2
        --mpi=none
        --cpu-bind=none
        --input=none
        --kill-on-bad-exit=0
        --wait=0
        --cpus-per-task=4
        --comment=mine
        (agent)
        --place-from
        SLURMD_NODENAME
        "#);
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
    insta::assert_snapshot!(words("--launcher slurm train.py", &job("n[01-02]", "2(x2)", None)), @r#"
        srun
        --nodes=2
        --ntasks=2
        --ntasks-per-node=1
        --nodelist=n01,n02
        --mpi=none
        --cpu-bind=none
        --input=none
        --kill-on-bad-exit=0
        --wait=0
        --overlap
        (agent)
        --place-from
        SLURMD_NODENAME
        "#);
    insta::assert_snapshot!(
        [
            brief("--launcher slurm train.py", &job("n[01-03]", "2(x2),1", None)),
            brief("--launcher slurm train.py", &job("n[01-02]", "1(x2)", Some("8"))),
            brief("--launcher slurm --num_nodes 2 --num_gpus 2 train.py", &job("n[01-03]", "8(x3)", None)),
            brief("--launcher slurm --exclude n02:0 train.py", &job("n[01-02]", "2(x2)", None)),
            brief("--launcher slurm --num_nodes 4 train.py", &job("n[01-03]", "8(x3)", None)),
            brief("--launcher slurm train.py", &job("n01", "2", None)),
        brief("--launcher slurm train.py", &job("login", "2", None)),
            brief("--launcher slurm train.py", &job("n[01", "2", None)),
            brief("train.py", &job("n[01-02]", "2(x2)", None)),
        ]
        .join("\n\n"), @r#"
        5 ranks on 3 hosts by slurm: n01 (2), n02 (2), n03 (1)

        16 ranks on 2 hosts by slurm: n01 (8), n02 (8)

        4 ranks on 2 hosts by slurm: n01 (2), n02 (2)

        3 ranks on 2 hosts by slurm: n01 (2), n02 (1)

        error: --num_nodes=4, but the Slurm job (SLURM_JOB_NODELIST) names only 3

        2 ranks on 1 host by slurm: n01 (2)

        2 ranks on login (4 CPU cores), meeting at 127.0.0.1:(free port)
        note: without effect on one host: --launcher

        error: SLURM_JOB_NODELIST: the Slurm list `n[01` cannot be read: a bracket does not close

        4 ranks on localhost (4 CPU cores), meeting at 127.0.0.1:(free port)
        note: this Slurm job has 2 hosts: using this machine only; --launcher slurm uses all of them
        "#);
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
        .join("\n\n"), @r#"
        error: the host 'ssh:a' cannot be reached by pdsh: a name has letters, digits and any of . - _ @, and does not begin with a dash

        error: the host 'a[1-3]' cannot be reached by pdsh: a name has letters, digits and any of . - _ @, and does not begin with a dash

        2 ranks on 2 hosts by pdsh: u@a (1), b (1)

        error: the host 'u@a' cannot be reached by openmpi: a name has letters, digits and any of . - _, and does not begin with a dash

        error: the host '$(reboot)' cannot be reached by slurm: a name has letters, digits and any of . - _, and does not begin with a dash

        error: launcher 'mpich' not installed: no folder of PATH has `mpirun`; load its module or put its bin folder on PATH, or leave --launcher out, and each host is reached by ssh

        error: --launcher_args=`'`: the quote at column 1 does not end

        2 ranks on 2 hosts by ssh: a (1), b (1)
        note: without effect by ssh, where every host must answer before a rank is started: --launcher_addr
        "#);
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
