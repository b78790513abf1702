//! Saving and resuming through the engine: bit-exact on the same world, and on any other.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use deepspeed_core::{DType, Span, SpanMut};
use deepspeed_engine::{LoadOptions, SaveRequest, Settings, TagRule};
use deepspeed_optim::{LossScaler, OptimizerKind};
use deepspeed_zero::Stage;
use support::{Replica, ranks};

fn settings(stage: Stage, precision: DType) -> Settings {
    Settings { stage, precision, unit_len: 150, ..Settings::default() }
}

fn save(replica: &mut Replica, dir: &std::path::Path, tag: &str, rule: TagRule) -> Result<bool, String> {
    let weights: Vec<Span<'_>> = replica.weights.iter().map(|it| it.span()).collect();
    let request = SaveRequest {
        dir,
        tag,
        rule,
        save_latest: true,
        weights: &weights,
        hypers: &replica.hypers,
        slices: &[],
        frozen: &[],
        exclude_frozen: false,
        tied: &[],
        tensors: &[],
        blobs: &[],
        face: serde_json::json!({ "micro": replica.micro }),
    };
    replica.engine.save_checkpoint(&request).map(|saved| saved.tags_differ).map_err(|error| error.to_string())
}

fn load(replica: &mut Replica, dir: &std::path::Path, tag: Option<&str>) -> Result<(), String> {
    let options = LoadOptions { weights: true, module_only: false, optimizer_states: true, strict: true };
    let mut weights: Vec<SpanMut<'_>> = replica.weights.iter_mut().map(|it| it.span_mut()).collect();
    let loaded = replica
        .engine
        .load_checkpoint(dir, tag, options, &replica.hypers, &mut weights, &mut [])
        .map_err(|error| error.to_string())?;
    replica.micro = loaded.ok_or("nothing to load")?.state()["face"]["micro"].as_u64().unwrap() as usize;
    Ok(())
}

fn replica(settings: Settings, group: std::sync::Arc<dyn deepspeed_comm::Group>) -> Replica {
    Replica::new(settings, OptimizerKind::Adam, LossScaler::fixed(1.0), group)
}

#[test]
fn a_resumed_run_gives_the_bits_of_one_that_never_stopped() {
    for precision in [DType::F32, DType::BF16] {
        for world in 1..=4 {
            let dir = tempfile::tempdir().unwrap();
            let through = ranks(world, |group| {
                let mut replica = replica(settings(Stage::Two, precision), group);
                (0..3).for_each(|_| drop(replica.micro_step().unwrap()));
                save(&mut replica, dir.path(), "three", TagRule::Fail).unwrap();
                (0..3).for_each(|_| drop(replica.micro_step().unwrap()));
                replica.bytes()
            });
            let resumed = ranks(world, |group| {
                let mut replica = replica(settings(Stage::One, precision), group);
                load(&mut replica, dir.path(), None).unwrap();
                assert_eq!(replica.engine.counters().global_steps, 3);
                (0..3).for_each(|_| drop(replica.micro_step().unwrap()));
                replica.bytes()
            });
            assert_eq!(through, resumed, "{precision} world {world}");
        }
    }
}

#[test]
fn any_world_reads_what_any_other_wrote() {
    let dir = tempfile::tempdir().unwrap();
    for from in 1..=4 {
        let saved = ranks(from, |group| {
            let mut replica = replica(settings(Stage::Two, DType::BF16), group);
            (0..2).for_each(|_| drop(replica.micro_step().unwrap()));
            save(&mut replica, dir.path(), &format!("world{from}"), TagRule::Fail).unwrap();
            replica.bytes()
        });
        for to in 1..=4 {
            let again = tempfile::tempdir().unwrap();
            let loaded = ranks(to, |group| {
                let mut replica = replica(settings(Stage::One, DType::BF16), group);
                load(&mut replica, dir.path(), Some(&format!("world{from}"))).unwrap();
                save(&mut replica, again.path(), "copy", TagRule::Fail).unwrap();
                replica.bytes()
            });
            assert_eq!(saved[0], loaded[0], "{from} -> {to}");
            // Masters and moments, too: a copy written by `to` ranks and read by one equals the first one read by one.
            let state = |dir: &std::path::Path, tag: &str| {
                let checkpoint = deepspeed_checkpoint::Checkpoint::open(dir, Some(tag)).unwrap().unwrap();
                let mut all = Vec::new();
                for param in &checkpoint.manifest().params {
                    let len = param.shape.iter().product();
                    for kind in ["master", "exp_avg", "exp_avg_sq"] {
                        if len > 0 {
                            let mut values = vec![0.0f32; len];
                            checkpoint
                                .read(&param.name, kind, 0..len, SpanMut::from(&mut values[..]))
                                .unwrap();
                            all.extend(values.iter().map(|x| x.to_bits()));
                        }
                    }
                }
                all
            };
            assert_eq!(
                state(dir.path(), &format!("world{from}")),
                state(again.path(), "copy"),
                "{from} -> {to}"
            );
        }
    }
}

#[test]
fn different_tags_are_told_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let results = ranks(2, |group| {
        let tag = format!("loss{}", group.rank());
        let mut replica = replica(settings(Stage::Zero, DType::F32), group);
        replica.micro_step().unwrap();
        let told = save(&mut replica, dir.path(), &tag, TagRule::FirstRank);
        let refused = save(&mut replica, dir.path(), &tag, TagRule::Fail);
        (told, refused)
    });
    for (told, refused) in results {
        assert_eq!(told, Ok(true));
        assert!(refused.unwrap_err().contains("rank 0 has `loss0`, rank 1 has `loss1`"));
    }
    assert!(dir.path().join("loss0/manifest.json").exists());
    assert!(!dir.path().join("loss1").exists());
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_on_every_rank() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "not a folder").unwrap();
    let errors = ranks(3, |group| {
        let mut replica = replica(settings(Stage::Two, DType::F32), group);
        replica.micro_step().unwrap();
        save(&mut replica, &file.join("inside"), "tag", TagRule::Fail).unwrap_err()
    });
    assert!(
        errors.iter().all(|error| *error == errors[0] && error.starts_with("rank 0: cannot")),
        "{errors:?}"
    );
}

#[test]
fn a_tag_that_is_missing_is_an_error_and_no_latest_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = ranks(2, |group| {
        let mut replica = replica(settings(Stage::Two, DType::F32), group);
        let missing = load(&mut replica, dir.path(), Some("nowhere")).unwrap_err();
        (missing, load(&mut replica, dir.path(), None).unwrap_err())
    });
    assert!(outcome.iter().all(|(missing, none)| missing.contains("`nowhere`") && none == "nothing to load"));
}
