//! What is done with a command line, a hostfile and an environment file, whatever they hold: a plan or a typed error, never a panic.
//!
//! The bytes are these three, with a zero byte between them; the words of the command line have a line each. libFuzzer drives this
//! through `fuzz_targets/resources.rs`, and `crates/launch/tests/hostile.rs` runs the corpus and mutations of it with every test run.

use std::collections::BTreeSet;

use clap::Parser;
use deepspeed_launch::{LaunchArgs, Plan, Surroundings, resolve};

/// Resolves the plan and checks what holds for every plan.
pub fn resources(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned());
    let (line, hostfile, env) =
        (parts.next().unwrap_or_default(), parts.next(), parts.next().unwrap_or_default());
    let words = ["deepspeed"].into_iter().chain(line.lines()).chain(["train.py", "--x=$(y)"]);
    let Ok(args) = LaunchArgs::try_parse_from(words) else { return };
    for gpus in [0, 4] {
        let surroundings = Surroundings {
            hostname: "login".to_owned(),
            gpus,
            cores: 4,
            core_ids: (0..4).collect(),
            physical_core_ids: (0..4).collect(),
            hostfile: hostfile.as_ref().map(|text| ("hosts".into(), text.clone())),
            env_files: vec![(".deepspeed_env".into(), env.clone())],
            python: Some("/venv/bin/python".into()),
            tools: ["ssh", "pdsh", "mpirun", "srun"].map(str::to_owned).into(),
            folder: "/job".into(),
            program: "/venv/bin/deepspeed".into(),
            ..Surroundings::default()
        };
        match resolve(&args, &surroundings) {
            Ok(plan) => check(&plan),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

/// Every rank has a place, and one only; every host is named once; what is printed can be printed.
fn check(plan: &Plan) {
    match plan {
        Plan::Here(plan) => {
            assert!(!plan.ranks.is_empty() && plan.ranks.len() == plan.slots.len());
            assert!(plan.ranks.iter().enumerate().all(|(local, rank)| rank.local_rank == local));
            assert!(plan.ranks.iter().all(|rank| rank.rank < plan.world));
            assert_eq!(plan.slots.iter().collect::<BTreeSet<_>>().len(), plan.slots.len());
        }
        Plan::Hosts(plan) => {
            let mut next = 0;
            let mut names = BTreeSet::new();
            for part in &plan.parts {
                assert!(!part.slots.is_empty() && part.first_rank == next);
                assert!(names.insert(&part.host), "{} twice", part.host);
                assert_eq!(part.slots.iter().collect::<BTreeSet<_>>().len(), part.slots.len());
                next += part.slots.len();
            }
            assert!(plan.parts.iter().all(|part| part.world == next && part.nodes == plan.parts.len()));
        }
    }
    assert!(!plan.to_string().is_empty());
}
