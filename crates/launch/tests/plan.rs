//! Plans as snapshots: arguments and surroundings in, what would be started out.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use clap::Parser;
use deepspeed_launch::{LaunchArgs, Plan, Surroundings, resolve};
use proptest::prelude::*;
use std::path::PathBuf;

fn cpu_machine(cores: usize) -> Surroundings {
    Surroundings {
        hostname: "node".into(),
        cores,
        core_ids: (0..cores).collect(),
        physical_core_ids: (0..cores).collect(),
        python: Some("/venv/bin/python".into()),
        ..Surroundings::default()
    }
}

fn gpu_machine(gpus: usize) -> Surroundings {
    Surroundings { gpus, ..cpu_machine(16) }
}

fn plan(line: &str, surroundings: &Surroundings) -> String {
    let args =
        LaunchArgs::try_parse_from(std::iter::once("deepspeed").chain(line.split_whitespace())).unwrap();
    match resolve(&args, surroundings) {
        Ok(plan) => plan.to_string(),
        Err(error) => format!("error: {error}"),
    }
}

/// The first line, notes, and the slots that the ranks see.
fn brief(line: &str, surroundings: &Surroundings) -> String {
    let text = plan(line, surroundings);
    let head: Vec<&str> = text.trim_end().split("\n\n").next().unwrap_or_default().lines().collect();
    let devices = text.lines().find(|line| line.starts_with("  CUDA_VISIBLE_DEVICES=")).unwrap_or("");
    head.into_iter().chain((!devices.is_empty()).then_some(devices)).collect::<Vec<_>>().join("\n")
}

#[test]
fn cores_of_a_cpu_machine() {
    insta::assert_snapshot!(plan("train.py --deepspeed --deepspeed_config ds.json", &cpu_machine(2)), @r"
        2 ranks on localhost (2 CPU cores), meeting at 127.0.0.1:(free port)

        every rank gets
          CROSS_RANK=0
          CROSS_SIZE=1
          LOCAL_SIZE=2
          MASTER_ADDR=127.0.0.1
          OMP_NUM_THREADS=1
          WORLD_SIZE=2
          MASTER_PORT=(a free port, chosen at the start)
          DS_JOB_SECRET=(random, new for each job)

        rank 0
          LOCAL_RANK=0 RANK=0
          /venv/bin/python -u train.py --local_rank=0 --deepspeed --deepspeed_config ds.json

        rank 1
          LOCAL_RANK=1 RANK=1
          /venv/bin/python -u train.py --local_rank=1 --deepspeed --deepspeed_config ds.json
        ");
}

#[test]
fn gpus_module_port_and_logs() {
    let line = "--num_gpus 2 --master_port 29501 --module --enable_each_rank_log logs pkg.train -x";
    insta::assert_snapshot!(plan(line, &gpu_machine(4)), @r"
        2 ranks on localhost (GPUs 0,1), meeting at 127.0.0.1:29501

        every rank gets
          CROSS_RANK=0
          CROSS_SIZE=1
          CUDA_VISIBLE_DEVICES=0,1
          LOCAL_SIZE=2
          MASTER_ADDR=127.0.0.1
          MASTER_PORT=29501
          OMP_NUM_THREADS=8
          WORLD_SIZE=2
          DS_JOB_SECRET=(random, new for each job)

        rank 0, output also in logs/(time)_rank0.log
          LOCAL_RANK=0 RANK=0
          /venv/bin/python -u -m pkg.train --local_rank=0 -x

        rank 1, output also in logs/(time)_rank1.log
          LOCAL_RANK=1 RANK=1
          /venv/bin/python -u -m pkg.train --local_rank=1 -x
        ");
}

#[test]
fn a_program_without_python_bound_to_cores() {
    let line =
        "--num_gpus 2 --no_python --no_local_rank --bind_cores_to_rank --bind_core_list 0-3,6 ./train it's";
    insta::assert_snapshot!(plan(line, &cpu_machine(8)), @r"
        2 ranks on localhost (8 CPU cores), meeting at 127.0.0.1:(free port)
        note: 1 of 5 cores stay unused: ranks get equal shares

        every rank gets
          CROSS_RANK=0
          CROSS_SIZE=1
          LOCAL_SIZE=2
          MASTER_ADDR=127.0.0.1
          OMP_NUM_THREADS=2
          PYTHONUNBUFFERED=1
          WORLD_SIZE=2
          MASTER_PORT=(a free port, chosen at the start)
          DS_JOB_SECRET=(random, new for each job)

        rank 0, bound to cores 0-1
          LOCAL_RANK=0 RANK=0
          ./train 'it'\''s'

        rank 1, bound to cores 2-3
          LOCAL_RANK=1 RANK=1
          ./train 'it'\''s'
        ");
}

#[test]
fn environment_files_and_flags_without_effect() {
    let surroundings = Surroundings {
        env_files: vec![
            ("/home/u/.deepspeed_env".into(), "NCCL_IB_DISABLE=1\nA=home\n\nRANK=7\n".into()),
            ("./.deepspeed_env".into(), "export A=here\nwhat is this\nOMP_NUM_THREADS=3".into()),
        ],
        ..cpu_machine(4)
    };
    let line = "--num_gpus 1 --launcher slurm --no_ssh_check --bind_core_list 0 train.py";
    insta::assert_snapshot!(plan(line, &surroundings), @r"
        1 rank on localhost (4 CPU cores), meeting at 127.0.0.1:(free port)
        note: --bind_core_list has no effect without --bind_cores_to_rank
        note: without effect on one host: --launcher, --no_ssh_check
        warning: /home/u/.deepspeed_env: RANK is set by the launcher itself; the line is left out
        note: /home/u/.deepspeed_env sets for every rank: NCCL_IB_DISABLE, A
        warning: ./.deepspeed_env:2: `what is this` has no `=`; the line is left out
        note: ./.deepspeed_env sets for every rank: A, OMP_NUM_THREADS

        every rank gets
          A=here
          CROSS_RANK=0
          CROSS_SIZE=1
          LOCAL_SIZE=1
          MASTER_ADDR=127.0.0.1
          NCCL_IB_DISABLE=1
          OMP_NUM_THREADS=3
          WORLD_SIZE=1
          MASTER_PORT=(a free port, chosen at the start)
          DS_JOB_SECRET=(random, new for each job)

        rank 0
          LOCAL_RANK=0 RANK=0
          /venv/bin/python -u train.py --local_rank=0
        ");
}

#[test]
fn visible_devices() {
    let with = |list: &str| Surroundings { visible_devices: Some(list.into()), ..gpu_machine(4) };
    insta::assert_snapshot!([
        brief("train.py", &with("3,1")),
        brief("train.py", &with("GPU-8932f937,GPU-1")),
        brief("--num_gpus 1 train.py", &with("3,1")),
        brief("--include localhost:0,2 train.py", &with("3,1")),
        brief("train.py", &with("7")),
        brief("train.py", &with("0,-1,2")),
        brief("train.py", &with("")),
        brief("train.py", &Surroundings { visible_devices: Some("0".into()), ..cpu_machine(1) }),
        brief("train.py", &Surroundings { accelerator: Some("cpu".into()), ..gpu_machine(4) }),
        brief("train.py", &Surroundings { accelerator: Some("cuda".into()), ..cpu_machine(4) }),
    ].join("\n\n"), @r"
        2 ranks on localhost (GPUs 3,1), meeting at 127.0.0.1:(free port)
          CUDA_VISIBLE_DEVICES=3,1

        2 ranks on localhost (GPUs GPU-8932f937,GPU-1), meeting at 127.0.0.1:(free port)
          CUDA_VISIBLE_DEVICES=GPU-8932f937,GPU-1

        1 rank on localhost (GPU 3), meeting at 127.0.0.1:(free port)
          CUDA_VISIBLE_DEVICES=3

        2 ranks on localhost (GPUs 0,2), meeting at 127.0.0.1:(free port)
        note: CUDA_VISIBLE_DEVICES=3,1 is set aside: --include and --exclude count all GPUs of the machine
          CUDA_VISIBLE_DEVICES=0,2

        1 rank on localhost (GPU 7), meeting at 127.0.0.1:(free port)
        warning: CUDA_VISIBLE_DEVICES=7 names GPU 7, but only 4 are found
          CUDA_VISIBLE_DEVICES=7

        1 rank on localhost (GPU 0), meeting at 127.0.0.1:(free port)
          CUDA_VISIBLE_DEVICES=0

        16 ranks on localhost (16 CPU cores), meeting at 127.0.0.1:(free port)
        note: CUDA_VISIBLE_DEVICES= hides every GPU: using the CPU cores

        1 rank on localhost (1 CPU core), meeting at 127.0.0.1:(free port)
        warning: CUDA_VISIBLE_DEVICES is set, but no NVIDIA GPU is found: using the CPU cores

        16 ranks on localhost (16 CPU cores), meeting at 127.0.0.1:(free port)

        error: unable to proceed, no GPU resources available: DS_ACCELERATOR=cuda, but neither /proc/driver/nvidia/gpus nor /dev/nvidia[0-9]* shows a GPU; unset DS_ACCELERATOR to run on the CPU cores
        ");
}

#[test]
fn hostfile_and_filters() {
    let hosts =
        |text: &str| Surroundings { hostfile: Some((PathBuf::from("hosts"), text.into())), ..gpu_machine(8) };
    let two = hosts("worker-1 slots=4\nworker-2 slots=2\n");
    insta::assert_snapshot!([
        brief("-H hosts train.py", &two),
        brief("-H hosts --num_nodes 1 --num_gpus 2 train.py", &two),
        brief("-H hosts --include worker-2 train.py", &two),
        brief("-H hosts --exclude worker-1:0@worker-2 train.py", &two),
        brief("-H hosts --exclude worker-3 train.py", &two),
        brief("-H hosts --num_nodes 3 train.py", &two),
        brief("-H hosts train.py", &hosts("node slots=2")),
        brief("-H hosts --force_multi train.py", &hosts("worker-1 slots=2")),
        brief("-H hosts train.py", &hosts("node slots=0")),
        brief("-H hosts train.py", &hosts("node slots=two")),
    ].join("\n\n"), @r"
        error: launcher 'ssh' not installed: no folder of PATH has `ssh`; install OpenSSH's client, or start the command on each host with --no_ssh and --node_rank

        2 ranks on worker-1 (GPUs 0,1), meeting at 127.0.0.1:(free port)
        warning: the hostfile's host 'worker-1' is not this machine's name ('node'); as it is the only one, its ranks start here (--force_multi starts them there)
          CUDA_VISIBLE_DEVICES=0,1

        2 ranks on worker-2 (GPUs 0,1), meeting at 127.0.0.1:(free port)
        warning: the hostfile's host 'worker-2' is not this machine's name ('node'); as it is the only one, its ranks start here (--force_multi starts them there)
          CUDA_VISIBLE_DEVICES=0,1

        3 ranks on worker-1 (GPUs 1-3), meeting at 127.0.0.1:(free port)
        warning: the hostfile's host 'worker-1' is not this machine's name ('node'); as it is the only one, its ranks start here (--force_multi starts them there)
          CUDA_VISIBLE_DEVICES=1,2,3

        error: --exclude: hostname 'worker-3' not found in hostfile hosts; did you mean 'worker-2'?

        error: --num_nodes=3, but hostfile hosts names only 2

        2 ranks on node (GPUs 0,1), meeting at 127.0.0.1:(free port)
          CUDA_VISIBLE_DEVICES=0,1

        error: launcher 'ssh' not installed: no folder of PATH has `ssh`; install OpenSSH's client, or start the command on each host with --no_ssh and --node_rank

        error: no slot is left after hostfile hosts; nothing to launch

        error: hosts:1:12: hostfile contains a bad entry: `slots=two` is not a whole number; unable to proceed with launching
            node slots=two
          each line is `<host> slots=<number>`, for example `worker-1 slots=4`
        ");
}

/// A login machine without GPUs, with ssh.
fn login_machine(hostfile: &str) -> Surroundings {
    Surroundings {
        hostname: "login".into(),
        hostfile: Some((PathBuf::from("hosts"), hostfile.into())),
        tools: vec!["ssh".into()],
        folder: "/home/u/my work".into(),
        program: "/venv/bin/deepspeed".into(),
        ..cpu_machine(4)
    }
}

#[test]
fn several_hosts() {
    let environment = [
        ("NCCL_DEBUG", "INFO"),
        ("PYTHONPATH", "/lib/mine"),
        ("UCX_TLS", "tcp"),
        ("MV2_X", "$(reboot)"),
        ("PATH", "/bin"),
        ("NCCLX", ""),
    ];
    let surroundings = Surroundings {
        env_files: vec![("./.deepspeed_env".into(), "NCCL_DEBUG=WARN\n\nA=b c".into())],
        environment: environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        ..login_machine("worker-1 slots=4\nworker-2 slots=2\n")
    };
    let line = "--hostfile=hosts --exclude=worker-1:0,2 --ssh_port 2222 --no_ssh_check --venv_script ~/venv/activate \
                --enable_each_rank_log logs train.py --deepspeed --x=it's";
    insta::assert_snapshot!(plan(line, &surroundings), @r"
        4 ranks on 2 hosts by ssh: worker-1 (2), worker-2 (2)
        note: ./.deepspeed_env sets for every rank: NCCL_DEBUG, A
        note: handed on to every host: MV2_X, NCCLX, NCCL_DEBUG, PYTHONPATH, UCX_TLS
        note: without effect by ssh, where every host must answer before a rank is started: --no_ssh_check

        every rank gets, in the folder '/home/u/my work'
          A='b c'
          MV2_X='$(reboot)'
          NCCLX=''
          NCCL_DEBUG=WARN
          PYTHONPATH='/home/u/my work:/lib/mine'
          UCX_TLS=tcp
          WORLD_SIZE=4 CROSS_SIZE=2
          MASTER_ADDR=(address of worker-1, as the hosts reach it)
          MASTER_PORT=(a free port of worker-1, chosen at the start)
          DS_JOB_SECRET=(random, new for each job; sent through the connection)
          and what its host decides: CUDA_VISIBLE_DEVICES where it has GPUs, OMP_NUM_THREADS, cores

        host worker-1: slots 1,3
          ssh -p 2222 -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ControlMaster=no -o ControlPath=none -- worker-1 'exec /bin/sh -c '\''. '\''\'\'''\''~/venv/activate'\''\'\'''\'' && exec deepspeed __agent'\'''
          RANK=0 LOCAL_RANK=0 LOCAL_SIZE=2 CROSS_RANK=0: (the host's python) -u train.py --local_rank=0 --deepspeed '--x=it'\''s'
          RANK=1 LOCAL_RANK=1 LOCAL_SIZE=2 CROSS_RANK=0: (the host's python) -u train.py --local_rank=1 --deepspeed '--x=it'\''s'
          output of ranks 0-1 also in logs on this host

        host worker-2: slots 0,1
          ssh -p 2222 -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ControlMaster=no -o ControlPath=none -- worker-2 'exec /bin/sh -c '\''. '\''\'\'''\''~/venv/activate'\''\'\'''\'' && exec deepspeed __agent'\'''
          RANK=2 LOCAL_RANK=0 LOCAL_SIZE=2 CROSS_RANK=1: (the host's python) -u train.py --local_rank=0 --deepspeed '--x=it'\''s'
          RANK=3 LOCAL_RANK=1 LOCAL_SIZE=2 CROSS_RANK=1: (the host's python) -u train.py --local_rank=1 --deepspeed '--x=it'\''s'
          output of ranks 2-3 also in logs on this host
        ");
}

#[test]
fn several_hosts_in_brief() {
    let hosts = login_machine("worker-1 slots=4\nworker-2 slots=4\nworker-3 slots=4\n");
    let aisc = Surroundings {
        environment: [
            ("AISC_JOB_NAME", "x"),
            ("NCCL_IB_HCA", "mlx5"),
            ("UCX_NET_DEVICES", "a"),
            ("NCCL_X", "1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        ..hosts.clone()
    };
    insta::assert_snapshot!([
        brief("-H hosts train.py", &hosts),
        brief("-H hosts --num_nodes=2 train.py", &hosts),
        brief("-H hosts --num_nodes=2 --num_gpus=2 train.py", &hosts),
        brief("-H hosts --exclude=worker-2:0@worker-3:0,1 train.py", &hosts),
        brief("-H hosts --include=worker-2:0,1 train.py", &hosts),
        brief("-H hosts --include=worker-2:0,1 --force_multi --launcher SSH train.py", &hosts),
        brief("-H hosts train.py", &aisc),
        brief("-H hosts --node_rank=1 train.py", &hosts),
        brief("-H hosts --no_ssh --node_rank=1 train.py", &hosts),
        brief("-H hosts --no_ssh --node_rank=0 --master_addr=10.0.0.1 --master_port=5 --ssh_port=1 train.py", &hosts),
        brief("-H hosts --no_ssh train.py", &hosts),
        brief("-H hosts --launcher=pdsh train.py", &hosts),
        brief("-H hosts --launcher=slurm train.py", &hosts),
        brief("-H hosts --launcher_args=' train.py", &hosts),
        brief("-H hosts train.py", &Surroundings { tools: vec![], ..hosts.clone() }),
        brief("-H hosts train.py", &login_machine("-oProxyCommand=x slots=1\nb slots=1\n")),
        brief("-H hosts train.py", &login_machine("$(reboot) slots=1\nb slots=1\n")),
    ].join("\n\n"), @r"
        12 ranks on 3 hosts by ssh: worker-1 (4), worker-2 (4), worker-3 (4)

        8 ranks on 2 hosts by ssh: worker-1 (4), worker-2 (4)

        4 ranks on 2 hosts by ssh: worker-1 (2), worker-2 (2)

        9 ranks on 3 hosts by ssh: worker-1 (4), worker-2 (3), worker-3 (2)

        2 ranks on worker-2 (4 CPU cores), meeting at 127.0.0.1:(free port)
        warning: the hostfile's host 'worker-2' is not this machine's name ('login'); as it is the only one, its ranks start here (--force_multi starts them there)

        2 ranks on 1 host by ssh: worker-2 (2)

        12 ranks on 3 hosts by ssh: worker-1 (4), worker-2 (4), worker-3 (4)
        note: handed on to every host: NCCL_X

        12 ranks on 3 hosts by ssh: worker-1 (4), worker-2 (4), worker-3 (4)
        note: without effect by ssh, where every host must answer before a rank is started: --node_rank

        4 of 12 ranks on worker-2 (4 CPU cores), meeting at worker-1:29500
        note: with --no_ssh every host must be told the same --master_port; it is 29500 as none is given

        4 of 12 ranks on worker-1 (4 CPU cores), meeting at 10.0.0.1:5
        note: without effect with --no_ssh: --ssh_port

        error: --no_ssh starts the ranks of this host only, so --node_rank must say which of the 3 hosts it is (0 to 2); it is -1

        error: launcher 'pdsh' not installed: no folder of PATH has `pdsh`; install pdsh, or leave --launcher out, and each host is reached by ssh

        error: launcher 'slurm' not installed: no folder of PATH has `srun`; load its module or put its bin folder on PATH, or leave --launcher out, and each host is reached by ssh

        error: --launcher_args=`'`: the quote at column 1 does not end

        error: launcher 'ssh' not installed: no folder of PATH has `ssh`; install OpenSSH's client, or start the command on each host with --no_ssh and --node_rank

        error: the host '-oProxyCommand=x' cannot be reached by ssh: a name has letters, digits and any of . - _ @ : % [ ], and does not begin with a dash

        error: the host '$(reboot)' cannot be reached by ssh: a name has letters, digits and any of . - _ @ : % [ ], and does not begin with a dash
        ");
}

#[test]
fn ranks_of_a_host_that_is_started_by_hand() {
    let hosts = login_machine("worker-1 slots=3\nworker-2 slots=1\n");
    let line = "-H hosts --no_ssh --node_rank=1 --no_local_rank train.py";
    insta::assert_snapshot!(plan(line, &hosts), @r"
        1 of 4 ranks on worker-2 (4 CPU cores), meeting at worker-1:29500
        note: with --no_ssh every host must be told the same --master_port; it is 29500 as none is given

        every rank gets
          CROSS_RANK=1
          CROSS_SIZE=2
          LOCAL_SIZE=1
          MASTER_ADDR=worker-1
          MASTER_PORT=29500
          OMP_NUM_THREADS=4
          WORLD_SIZE=4

        rank 3
          LOCAL_RANK=0 RANK=3
          /venv/bin/python -u train.py
        ");
}

/// The hosts and slots that the original's rules leave, written as plainly as can be: `None` is an error.
fn model(
    hosts: &[(String, u32)],
    include: &str,
    exclude: &str,
    nodes: i64,
    gpus: i64,
) -> Option<Vec<(String, Vec<u32>)>> {
    let filtered = !include.is_empty() || !exclude.is_empty();
    let bad_count = [nodes, gpus].iter().any(|count| *count != -1 && *count < 1);
    if bad_count || (!include.is_empty() && !exclude.is_empty()) || (filtered && (nodes, gpus) != (-1, -1)) {
        return None;
    }
    let mut named: Vec<(String, u32)> = Vec::new();
    for part in [include, exclude].concat().split('@').filter(|part| !part.is_empty()) {
        let (host, list) = part.split_once(':').unwrap_or((part, ""));
        let slots = hosts.iter().find(|(name, _)| name == host)?.1;
        for slot in if list.is_empty() { (0..slots).collect() } else { numbers(list) } {
            if slot >= slots {
                return None;
            }
            named.push((host.to_owned(), slot));
        }
    }
    let mut kept = Vec::new();
    for (host, slots) in hosts {
        let keep = |slot: &u32| !filtered || named.contains(&(host.clone(), *slot)) != include.is_empty();
        let slots: Vec<u32> = (0..*slots).filter(keep).collect();
        if !slots.is_empty() {
            kept.push((host.clone(), slots));
        }
    }
    if kept.is_empty() || nodes > i64::try_from(kept.len()).unwrap() {
        return None;
    }
    if nodes > 0 {
        kept.truncate(usize::try_from(nodes).unwrap());
    }
    if gpus > 0 {
        for (_, slots) in &mut kept {
            // Slots of cores: there can be any number of them.
            *slots = (0..u32::try_from(gpus).unwrap()).collect();
        }
    }
    Some(kept)
}

fn numbers(list: &str) -> Vec<u32> {
    list.split(',').map(|word| word.parse().unwrap()).collect()
}

/// A filter that is of the form, whether its hosts and slots are there or not.
fn filter() -> impl Strategy<Value = String> {
    let slots = prop::collection::vec(0u32..4, 0..3).prop_map(|list| {
        let words: Vec<String> = list.iter().map(u32::to_string).collect();
        if words.is_empty() { String::new() } else { format!(":{}", words.join(",")) }
    });
    let part = ("[a-c]", slots).prop_map(|(host, slots)| format!("{host}{slots}"));
    prop_oneof![Just(String::new()), prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("@"))]
}

proptest! {
    /// Any hostfile and filter resolve to what a plain model says, or are an error where it says so.
    #[test]
    fn resources_are_those_of_the_model(
        slots in prop::collection::vec(0u32..4, 1..4),
        include in filter(),
        exclude in filter(),
        nodes in -1i64..4,
        gpus in -1i64..3,
    ) {
        let hosts: Vec<(String, u32)> =
            ["a", "b", "c"].iter().zip(&slots).map(|(host, slots)| ((*host).to_owned(), *slots)).collect();
        let text: String = hosts.iter().map(|(host, slots)| format!("{host} slots={slots}\n")).collect();
        let surroundings = login_machine(&text);
        let args = LaunchArgs::try_parse_from([
            "deepspeed".to_owned(), "-H".to_owned(), "hosts".to_owned(), format!("--include={include}"),
            format!("--exclude={exclude}"), format!("--num_nodes={nodes}"), format!("--num_gpus={gpus}"),
            "--force_multi".to_owned(), "train.py".to_owned(),
        ]).unwrap();
        let resolved = resolve(&args, &surroundings).ok().map(|plan| match plan {
            Plan::Here(_) => unreachable!("--force_multi reaches a single host, too"),
            Plan::Hosts(plan) => plan.parts.into_iter().map(|part| {
                (part.host, part.slots.iter().map(|slot| slot.to_string().parse().unwrap()).collect())
            }).collect::<Vec<(String, Vec<u32>)>>(),
        });
        prop_assert_eq!(resolved, model(&hosts, &include, &exclude, nodes, gpus));
    }

    /// No input panics, and what is printed for a shell holds no host's name that is not in quotes or plain.
    #[test]
    fn any_text_is_survived(hostfile in "[ -~\n]{0,60}", filter in "[ -~]{0,20}", args in "[ -~]{0,20}") {
        for flag in ["include", "exclude"] {
            let line = ["deepspeed", "-H", "hosts", &format!("--{flag}={filter}"),
                &format!("--launcher_args={args}"), "train.py"].map(str::to_owned);
            if let Ok(args) = LaunchArgs::try_parse_from(line) {
                let _ = resolve(&args, &login_machine(&hostfile)).map(|plan| plan.to_string());
            }
        }
    }
}

#[test]
fn refusals() {
    let cpu = cpu_machine(2);
    let gpu = gpu_machine(2);
    let kmp = Surroundings { kmp_affinity: Some("compact".into()), ..cpu_machine(2) };
    insta::assert_snapshot!([
        plan("--include a --exclude b train.py", &cpu),
        plan("--include localhost:0 --num_gpus 1 train.py", &cpu),
        plan("--num_nodes 2 train.py", &cpu),
        plan("--num_gpus 0 train.py", &cpu),
        plan("--num_gpus 9999999 train.py", &cpu),
        plan("--num_gpus 3 train.py", &gpu),
        plan("--include localhost:5 train.py", &gpu),
        plan("--include worker-1:0 train.py", &gpu),
        plan("--exclude localhost train.py", &gpu),
        plan("--module --no_python x", &cpu),
        plan("--launcher slrum train.py", &cpu),
        plan("--autotuning run train.py", &cpu),
        plan("--autotuning fast train.py", &cpu),
        plan("--bind_cores_to_rank train.py", &kmp),
        plan("--bind_cores_to_rank --num_gpus 3 train.py", &cpu),
        plan("--bind_cores_to_rank --bind_core_list 1,5 train.py", &cpu),
        plan("--bind_cores_to_rank --bind_core_list 1-0 train.py", &cpu),
        plan("train.py", &Surroundings { python: None, ..cpu_machine(2) }),
    ].join("\n"), @r"
        error: include_str and exclude_str are mutually exclusive: give --include or --exclude, not both
        error: cannot specify num_nodes/gpus with include/exclude: --num_gpus and --include are both given; drop one
        error: --num_nodes=2 needs a hostfile that names the hosts (looked for /job/hostfile); give one with --hostfile
        error: --num_gpus is 0; it must be at least 1 (or -1 for all)
        error: --num_gpus is 9999999; at most 4096 are possible
        error: --num_gpus=3, but host 'localhost' has only 2 (0,1)
        error: --include: no slot '5' specified on host 'localhost'; its slots are 0,1
        error: --include: hostname 'worker-1' not found in the local resources (no hostfile is in use); known: localhost
        error: no slot is left after --exclude; nothing to launch
        error: --no_python and --module contradict each other: a module needs python to run it; drop one
        error: --launcher: unknown value 'slrum'; known are ssh, pdsh, openmpi, mpich, impi, mvapich, slurm; did you mean 'slurm'?
        error: --autotuning=run is not built yet; leave it out to train
        error: --autotuning: unknown value 'fast'; known are tune, run
        error: KMP_AFFINITY=compact is set, which binds threads by itself and contradicts --bind_cores_to_rank; unset KMP_AFFINITY, or drop --bind_cores_to_rank
        error: --bind_cores_to_rank: 2 cores (the physical cores that this process may use) cannot be shared out to 3 ranks, each needs at least one; start fewer ranks or widen --bind_core_list
        error: --bind_core_list=`1,5`: core 5 is not among those that this process may use (0-1); give ascending, disjoint ranges such as `0-7,16-23`
        error: --bind_core_list=`1-0`: `1-0` runs backwards; give ascending, disjoint ranges such as `0-7,16-23`
        error: no python found: none beside the deepspeed command, VIRTUAL_ENV is not set, and PATH has no python3; activate an environment, or give --no_python to run the program itself
        ");
}

#[test]
fn a_plan_is_a_value_that_serialises() {
    let args = LaunchArgs::try_parse_from(["deepspeed", "--num_gpus=1", "train.py"]).unwrap();
    let plan = resolve(&args, &cpu_machine(2)).unwrap();
    let json: serde_json::Value = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["ranks"][0]["command"][2], "train.py");
    assert_eq!(json["ranks"][0]["env"]["WORLD_SIZE"], "1");
    assert_eq!(json["slots"][0], "0");
    assert!(!json.to_string().contains("DS_JOB_SECRET"));
}
