//! Hosts that share no storage, as ranks with folders of their own.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::{fs, path::Path, sync::Arc};

use deepspeed_comm::Group;
use deepspeed_core::{DType, ParamId};
use deepspeed_engine::{SaveSettings, Settings, StateKind};
use deepspeed_optim::{LossScaler, OptimizerKind};
use deepspeed_zero::Stage;
use support::{
    Replica, ranks,
    saving::{load, save},
};

/// Two ranks to a host.
fn host_of(group: &dyn Group) -> String {
    host_with(group, 2)
}

fn host_with(group: &dyn Group, ranks: usize) -> String {
    format!("host{}", group.rank().index() / ranks)
}

fn replica(stage: Stage, group: Arc<dyn Group>) -> Replica {
    let host = host_of(&*group);
    replica_on(host, stage, group)
}

fn replica_on(host: String, stage: Stage, group: Arc<dyn Group>) -> Replica {
    let saving = SaveSettings { node_local: true, host: Some(host), ..SaveSettings::default() };
    let settings = Settings { stage, precision: DType::BF16, unit_len: 150, saving, ..Settings::default() };
    Replica::new(settings, OptimizerKind::Adam, LossScaler::fixed(1.0), group)
}

fn train(replica: &mut Replica, steps: usize) -> Vec<u8> {
    (0..steps).for_each(|_| drop(replica.micro_step().unwrap()));
    replica.bytes()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn each_host_keeps_its_own_and_brings_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let through = ranks(4, |group| {
        let home = dir.path().join(host_of(&*group));
        let mut replica = replica(Stage::Two, group);
        train(&mut replica, 2);
        save(&mut replica, &home, "old").unwrap();
        train(&mut replica, 1);
        save(&mut replica, &home, "new").unwrap();
        train(&mut replica, 2)
    });
    for (host, own) in [("host0", ["00000", "00001"]), ("host1", ["00002", "00003"])] {
        let names = names(&dir.path().join(host).join("new"));
        let files: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
        // The model is so small that the last rank has nothing.
        assert!(files.len() >= 2 && names.len() == files.len() + 2, "{names:?}");
        assert!(files.iter().all(|name| own.iter().any(|rank| name.contains(&format!("rank-{rank}-of")))));
    }
    for stage in [Stage::Zero, Stage::One, Stage::Three] {
        let resumed = ranks(4, |group| {
            let home = dir.path().join(host_of(&*group));
            let mut replica = replica(stage, group);
            load(&mut replica, &home, None).unwrap();
            assert_eq!(replica.engine.chosen().unwrap().tag, "new");
            train(&mut replica, 2)
        });
        assert_eq!(resumed, through, "{stage:?}");
    }
    // What was brought is removed by the next save.
    ranks(4, |group| {
        let home = dir.path().join(host_of(&*group));
        save(&mut replica(Stage::One, group), &home, "next").map(drop)
    });
    assert!(names(&dir.path().join("host1")).iter().all(|name| !name.starts_with('.')));
}

/// Masters and moments of all parameters, whole.
fn state(replica: &Replica) -> Vec<Vec<f32>> {
    let engine = &replica.engine;
    let params = (0..engine.layout().params.len()).map(ParamId::from_index);
    let kinds = [StateKind::Master, StateKind::Optimizer(0), StateKind::Optimizer(1)];
    params.flat_map(|param| kinds.iter().map(move |kind| engine.whole_state(param, kind).unwrap())).collect()
}

#[test]
fn other_numbers_of_ranks_bring_what_their_host_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let saved = ranks(4, |group| {
        let home = dir.path().join(host_of(&*group));
        let mut replica = replica(Stage::Two, group);
        train(&mut replica, 2);
        save(&mut replica, &home, "t").unwrap();
        (replica.bytes(), state(&replica))
    });
    for (world, to_a_host, stage) in [(2, 1, Stage::Three), (3, 2, Stage::One), (2, 2, Stage::Two)] {
        let found = ranks(world, |group| {
            let host = host_with(&*group, to_a_host);
            let home = dir.path().join(&host);
            let mut replica = replica_on(host, stage, group);
            let loaded = load(&mut replica, &home, None);
            loaded.map(|()| (replica.bytes(), state(&replica)))
        });
        for found in found {
            if (world, to_a_host) == (2, 2) {
                // All on one host: the other one's files are out of reach.
                let refused = found.unwrap_err();
                assert!(refused.contains("is on none of the hosts of this job"), "{refused}");
            } else {
                assert!(found.unwrap() == saved[0], "{world} ranks at {stage:?}");
            }
        }
    }
}

#[test]
fn a_save_that_one_host_did_not_finish_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    ranks(4, |group| {
        let home = dir.path().join(host_of(&*group));
        let mut replica = replica(Stage::Two, group);
        for tag in ["old", "new"] {
            train(&mut replica, 1);
            save(&mut replica, &home, tag).unwrap();
        }
    });
    // As after a kill between the commits of the two hosts.
    fs::remove_dir_all(dir.path().join("host1/new")).unwrap();
    fs::write(dir.path().join("host1/latest"), "old").unwrap();
    let found = ranks(4, |group| {
        let home = dir.path().join(host_of(&*group));
        let mut replica = replica(Stage::Two, group);
        let asked = load(&mut replica, &home, Some("new")).unwrap_err();
        load(&mut replica, &home, None).unwrap();
        let chosen = replica.engine.chosen().unwrap().clone();
        (asked, chosen, replica.engine.counters().global_steps)
    });
    for (asked, chosen, steps) in found {
        assert!(asked.contains("`new`") && asked.contains("rank 2 lacks it"), "{asked}");
        assert_eq!((chosen.tag.as_str(), chosen.unexpected, steps), ("old", true, 1));
        assert!(chosen.why.contains("`new` is not complete on every host"), "{}", chosen.why);
    }
}

#[test]
fn damage_on_one_host_is_passed_over_or_an_error_on_all_ranks() {
    let dir = tempfile::tempdir().unwrap();
    ranks(4, |group| {
        let home = dir.path().join(host_of(&*group));
        let mut replica = replica(Stage::Two, group);
        for tag in ["old", "new"] {
            train(&mut replica, 1);
            save(&mut replica, &home, tag).unwrap();
        }
    });
    let file = dir.path().join("host1/new/optimizer-rank-00002-of-00004.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() - 10;
    bytes[middle] ^= 4;
    fs::write(&file, bytes).unwrap();
    let found = ranks(4, |group| {
        let home = dir.path().join(host_of(&*group));
        let mut replica = replica(Stage::Two, group);
        let asked = load(&mut replica, &home, Some("new")).unwrap_err();
        load(&mut replica, &home, None).unwrap();
        (asked, replica.engine.counters().global_steps)
    });
    for (asked, steps) in found {
        assert!(asked.contains("rank-00002") && asked.contains("checksum"), "{asked}");
        assert_eq!(steps, 1);
    }
}
