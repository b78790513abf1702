//! What is saved by one world is read by any other, by us and by anyone who can read safetensors and JSON.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;

use common::{Model, open_latest, read_everything, real_disk};
use deepspeed_checkpoint::{Checkpoint, CheckpointError, Draft, complete_tags, kind};
use deepspeed_core::{Rank, SpanMut};
use proptest::prelude::*;
use safetensors::SafeTensors;

#[test]
fn any_world_reads_what_any_world_wrote() {
    for saved in 1..=4 {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::small(saved as u32);
        let folder = model.save(dir.path(), "global_step1", saved);
        assert_eq!(folder, dir.path().join("global_step1"));
        let checkpoint = open_latest(dir.path());
        assert_eq!(checkpoint.manifest().world, saved);
        assert_eq!(checkpoint.manifest().params, model.records());
        read_everything(&checkpoint).unwrap();
        for loaded in 1..=4 {
            // A fresh one each time: reading in another order must check the same sums.
            model.assert_in(&open_latest(dir.path()), loaded);
        }
        for rank in 0..4 {
            let blob = checkpoint.blob(Rank(rank), "rng").unwrap();
            assert_eq!(blob, ((rank as usize) < saved).then(|| vec![rank as u8; 100]));
        }
    }
}

#[test]
fn the_order_in_which_ranks_report_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(9);
    let draft = Draft::begin(dir.path(), "t", 1).unwrap();
    let mut records: Vec<_> =
        (0..3).map(|rank| model.write_rank(&real_disk(), draft.folder(), rank, 3).unwrap()).collect();
    records.reverse();
    draft.commit(&records, model.parts(3), true).unwrap();
    model.assert_in(&open_latest(dir.path()), 2);
    let ranks: Vec<usize> = open_latest(dir.path()).manifest().files.iter().map(|file| file.rank).collect();
    assert!(ranks.is_sorted());
}

#[test]
fn plain_safetensors_and_json_are_enough() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(5);
    let folder = model.save(dir.path(), "t", 3);
    // From here on nothing of ours is used.
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    let mut whole: BTreeMap<(String, String), Vec<u8>> = BTreeMap::new();
    for file in manifest["files"].as_array().unwrap() {
        let bytes = std::fs::read(folder.join(file["name"].as_str().unwrap())).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for slice in file["slices"].as_array().into_iter().flatten() {
            let tensor = tensors.tensor(slice["key"].as_str().unwrap()).unwrap();
            assert_eq!(slice["dtype"], tensor.dtype().to_string());
            let size = tensor.dtype().bitsize() / 8;
            let start = slice["start"].as_u64().unwrap() as usize * size;
            let param = slice["param"].as_str().unwrap().to_owned();
            let all = whole.entry((param, slice["kind"].as_str().unwrap().to_owned())).or_default();
            all.resize(all.len().max(start + tensor.data().len()), 0);
            all[start..start + tensor.data().len()].copy_from_slice(tensor.data());
        }
    }
    for (i, spec) in model.params.iter().enumerate().filter(|(_, spec)| spec.numel() > 0) {
        for kind in [kind::WEIGHT, kind::MASTER, kind::EXP_AVG, kind::EXP_AVG_SQ] {
            assert_eq!(whole[&(spec.name.clone(), kind.to_owned())], model.bytes(i, kind));
        }
    }
}

#[test]
fn the_weights_of_one_rank_are_an_ordinary_safetensors_file() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(5);
    let folder = model.save(dir.path(), "t", 1);
    let bytes = std::fs::read(folder.join("weights-rank-00000-of-00001.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (i, spec) in model.params.iter().enumerate().filter(|(_, spec)| spec.numel() > 0) {
        let tensor = tensors.tensor(&spec.name).unwrap();
        assert_eq!((tensor.shape(), tensor.data()), (&spec.shape[..], &model.bytes(i, kind::WEIGHT)[..]));
    }
    assert_eq!(tensors.tensor("bn.steps").unwrap().data(), 5u32.to_le_bytes());
}

#[test]
fn without_latest_there_is_nothing_to_resume() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Checkpoint::open(dir.path(), None).unwrap().is_none());
    assert!(Checkpoint::open(&dir.path().join("absent"), None).unwrap().is_none());
    let model = Model::small(1);
    let draft = Draft::begin(dir.path(), "t", 1).unwrap();
    let record = model.write_rank(&real_disk(), draft.folder(), 0, 1).unwrap();
    draft.commit(&[record], model.parts(1), false).unwrap();
    assert!(Checkpoint::open(dir.path(), None).unwrap().is_none());
    model.assert_in(&Checkpoint::open(dir.path(), Some("t")).unwrap().unwrap(), 2);
}

#[test]
fn tags_are_listed_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, tag) in ["b", "2.345678", "a"].into_iter().enumerate() {
        Model::small(seed as u32).save(dir.path(), tag, 1);
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
    std::fs::create_dir(dir.path().join("not one")).unwrap();
    let tags: Vec<String> = complete_tags(dir.path()).unwrap().into_iter().map(|c| c.tag).collect();
    assert_eq!(tags, ["a", "2.345678", "b"]);
    assert!(complete_tags(&dir.path().join("absent")).unwrap().is_empty());
    assert_eq!(open_latest(dir.path()).tag(), "a");
}

#[test]
fn what_is_not_there_is_said_by_name() {
    let dir = tempfile::tempdir().unwrap();
    Model::small(1).save(dir.path(), "t", 2);
    let checkpoint = open_latest(dir.path());
    let mut one = [0.0f32; 1];
    let mut error = |name: &str, kind: &str, range| {
        checkpoint.read(name, kind, range, common::scalar(&mut one)).unwrap_err().to_string()
    };
    assert!(error("nope", "weight", 0..1).contains("no parameter `nope`"));
    let kinds = error("blocks.0.weight", "momentum", 0..1);
    assert!(kinds.contains("no `momentum` of parameter `blocks.0.weight`, only: exp_avg,"), "{kinds}");
    assert!(error("blocks.0.weight", "weight", 35..36).contains("elements 35..36"));
    assert!(error("blocks.0.weight", "weight", 0..2).contains("2 elements asked for, the destination has 1"));
    assert!(error("blocks.0.weight", "weight", 0..1).contains("stored as bf16, the destination is fp32"));
    assert!(checkpoint.tensor("nope").unwrap_err().to_string().contains("no tensor `nope`"));
    assert!(checkpoint.param("nope").is_none() && checkpoint.kinds("nope").is_empty());
    // A parameter without elements is there, and empty.
    assert!(checkpoint.dtype("blocks.1.weight", kind::WEIGHT).is_some());
    checkpoint.read("blocks.1.weight", kind::WEIGHT, 0..0, SpanMut::from(&mut [0.0f32; 0][..])).unwrap();
}

#[test]
fn a_checkpoint_stays_readable_while_another_takes_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let old = Model::small(1);
    old.save(dir.path(), "t", 2);
    let checkpoint = open_latest(dir.path());
    let mut one = [0.0f32; 1];
    checkpoint.read("blocks.2.weight", kind::WEIGHT, 0..1, common::scalar(&mut one)).unwrap();
    Model::small(2).save(dir.path(), "t", 3);
    // Its files are gone or still the old ones; never those of the other.
    match read_everything(&checkpoint) {
        Ok(()) => old.assert_in(&checkpoint, 1),
        Err(error) => assert!(matches!(error, CheckpointError::Io { .. }), "{error}"),
    }
    Model::small(2).assert_in(&open_latest(dir.path()), 1);
}

#[test]
fn shares_of_the_verification_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Model::small(1).save(dir.path(), "t", 3);
    let victims: Vec<_> = open_latest(dir.path()).manifest().files.iter().map(|f| f.name.clone()).collect();
    for victim in victims {
        let path = folder.join(&victim);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bad).unwrap();
        for world in 1..=5 {
            let checkpoint = open_latest(dir.path());
            let failed =
                (0..world).filter(|rank| checkpoint.verify_share(Rank(*rank), world as usize).is_err());
            assert_eq!(failed.count(), 1, "{victim} by {world}");
        }
        std::fs::write(&path, good).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_model_survives(
        shapes in prop::collection::vec(prop::collection::vec(0usize..9, 0..4), 1..12),
        saved in 1usize..6,
        loaded in 1usize..6,
        seed in any::<u32>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        let model = Model::new(&shapes, seed);
        model.save(dir.path(), "t", saved);
        let checkpoint = open_latest(dir.path());
        model.assert_in(&checkpoint, loaded);
        read_everything(&checkpoint).unwrap();
    }
}

#[test]
fn slices_larger_than_a_chunk_are_read_from_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let len = 3_000_001;
    let model = Model::new(&[&[3], &[17], &[len]], 3);
    model.save(dir.path(), "t", 2);
    let expected = model.bytes(2, kind::MASTER);
    for range in [0..len, 5..6, 1_048_575..1_048_577, 999_999..2_700_000, len - 1..len] {
        let checkpoint = open_latest(dir.path());
        let mut read = vec![0.0f32; range.len()];
        checkpoint
            .read("blocks.2.weight", kind::MASTER, range.clone(), SpanMut::from(&mut read[..]))
            .unwrap();
        let bytes: Vec<u8> = read.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(bytes == expected[range.start * 4..range.end * 4], "{range:?}");
    }
}
