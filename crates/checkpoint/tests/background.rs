//! Saves behind training: threads of ranks that meet in the draft's folder.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::{fs, path::Path, sync::Arc, time::Duration};

use common::{Model, open_latest, read_everything, real_disk};
use deepspeed_checkpoint::{
    BackgroundSave, Checkpoint, CheckpointError, Commit, Draft, Outcome, Presence, Role, Snapshot,
    SnapshotMemory, choose, complete_tags, disk::RealDisk, retire,
};

fn copy(pairs: Vec<deepspeed_checkpoint::CopyPair<'_>>) {
    pairs.into_iter().for_each(|(from, to)| to.copy_from_slice(from));
}

/// A save of `model` that has only just begun.
fn start(
    model: &Model,
    dir: &Path,
    tag: &str,
    world: usize,
    keep_last: Option<usize>,
) -> Vec<BackgroundSave> {
    let draft = Draft::begin(dir, tag, u64::from(model.seed)).unwrap();
    let folder = draft.folder().to_owned();
    let parts = model.parts(world);
    let presences: Vec<_> = (0..world).map(|rank| Presence::announce(&folder, rank).unwrap()).collect();
    let mut roles = vec![Role::First(Box::new(Commit { draft, parts, save_latest: true, keep_last }))];
    roles.extend((1..world).map(|_| Role::Other { dir: dir.to_owned(), tag: tag.to_owned() }));
    let saves = presences.into_iter().zip(roles).enumerate().map(|(rank, (presence, role))| {
        let snapshot = model.snapshot(&real_disk(), &folder, rank, world);
        BackgroundSave::start(presence, snapshot, role).unwrap()
    });
    saves.collect()
}

fn finish(saves: Vec<BackgroundSave>) -> Vec<Outcome> {
    saves.into_iter().map(|save| save.finish().1).collect()
}

#[test]
fn the_same_files_as_a_save_that_waits() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for world in [1, 2, 3] {
        let model = Model::small(world as u32);
        let saves = start(&model, dir.path(), &format!("w{world}"), world, None);
        for save in &saves {
            assert!(save.wait(Duration::from_secs(60)));
            let (written, total) = save.progress();
            assert!(written == total && total > 0, "{written} of {total}");
        }
        for outcome in finish(saves) {
            outcome.unwrap();
        }
        let waited = model.save(other.path(), &format!("w{world}"), world);
        let folder = dir.path().join(format!("w{world}"));
        let names = |folder: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&folder), names(&waited));
        for name in names(&folder) {
            if name.to_str().unwrap().ends_with(".safetensors") {
                assert_eq!(fs::read(folder.join(&name)).unwrap(), fs::read(waited.join(&name)).unwrap());
            }
        }
        model.assert_in(&open_latest(dir.path()), 2);
        assert!(hidden(dir.path()).is_empty(), "{:?}", hidden(dir.path()));
    }
}

#[test]
fn the_memory_is_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(1);
    fs::create_dir(dir.path().join("a")).unwrap();
    let memory = SnapshotMemory::with_capacity(1 << 20).unwrap();
    let capacity = memory.capacity();
    let snapshot =
        model.writer(&real_disk(), &dir.path().join("a"), 0, 1, |w| w.snapshot(memory, copy)).unwrap();
    assert!(snapshot.bytes() > 0);
    let mut told = 0;
    let total = snapshot.bytes();
    let (memory, record) = snapshot.write(|bytes| {
        told += bytes as u64;
        Ok(())
    });
    assert_eq!((memory.capacity(), told), (capacity, total));
    assert_eq!(record.unwrap().files.len(), 3);
}

#[test]
fn a_rank_that_fails_is_an_error_on_every_rank() {
    for failing in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        Model::small(1).save(dir.path(), "first", 2);
        let model = Model::small(2);
        let draft = Draft::begin(dir.path(), "second", 2).unwrap();
        let folder = draft.folder().to_owned();
        let name = format!("optimizer-rank-{failing:05}-of-00003.safetensors");
        fs::write(folder.join(&name), "in the way").unwrap();
        let presences: Vec<_> = (0..3).map(|rank| Presence::announce(&folder, rank).unwrap()).collect();
        let commit = Commit { draft, parts: model.parts(3), save_latest: true, keep_last: None };
        let mut first = Some(Role::First(Box::new(commit)));
        let other = || Role::Other { dir: dir.path().to_owned(), tag: "second".to_owned() };
        let saves: Vec<_> = presences
            .into_iter()
            .enumerate()
            .map(|(rank, presence)| {
                let snapshot = model.snapshot(&real_disk(), &folder, rank, 3);
                BackgroundSave::start(presence, snapshot, first.take().unwrap_or_else(other)).unwrap()
            })
            .collect();
        let outcomes = finish(saves);
        for (rank, outcome) in outcomes.iter().enumerate() {
            let failure = outcome.as_ref().unwrap_err();
            if rank == failing || rank == 0 {
                assert_eq!(failure.rank, failing, "{failure}");
                assert!(failure.problem.contains(&name) && failure.problem.contains("exists"), "{failure}");
            } else {
                assert!(failure.problem.contains("another rank"), "{failure}");
            }
        }
        Model::small(1).assert_in(&open_latest(dir.path()), 1);
        assert!(hidden(dir.path()).is_empty(), "{:?}", hidden(dir.path()));
    }
}

#[test]
fn a_rank_that_dies_does_not_hold_up_the_others() {
    let dir = tempfile::tempdir().unwrap();
    Model::small(1).save(dir.path(), "first", 2);
    let model = Model::small(2);
    let draft = Draft::begin(dir.path(), "second", 2).unwrap();
    let folder = draft.folder().to_owned();
    let dying = Presence::announce(&folder, 1).unwrap();
    let presence = Presence::announce(&folder, 0).unwrap();
    let commit = Commit { draft, parts: model.parts(2), save_latest: true, keep_last: None };
    let snapshot = model.snapshot(&real_disk(), &folder, 0, 2);
    let save = BackgroundSave::start(presence, snapshot, Role::First(Box::new(commit))).unwrap();
    assert!(!save.wait(Duration::from_millis(200)), "rank 1 is still at work");
    assert!(save.outcome().is_none());
    drop(dying);
    let failure = save.finish().1.unwrap_err();
    assert_eq!(failure.rank, 1);
    assert!(failure.problem.contains("it has ended"), "{failure}");
    Model::small(1).assert_in(&open_latest(dir.path()), 1);
    assert!(hidden(dir.path()).is_empty(), "{:?}", hidden(dir.path()));
}

#[test]
fn rank_0_that_dies_is_noticed_by_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(2);
    let draft = Draft::begin(dir.path(), "t", 2).unwrap();
    let folder = draft.folder().to_owned();
    let presence = Presence::announce(&folder, 1).unwrap();
    let snapshot = model.snapshot(&real_disk(), &folder, 1, 2);
    let role = Role::Other { dir: dir.path().to_owned(), tag: "t".to_owned() };
    let save = BackgroundSave::start(presence, snapshot, role).unwrap();
    assert!(!save.wait(Duration::from_millis(200)), "rank 0 has not committed");
    drop(draft);
    assert_eq!(save.finish().1.unwrap_err().rank, 0);
    assert!(complete_tags(dir.path()).unwrap().is_empty());
}

#[test]
fn a_slice_that_lies_elsewhere_is_read_before_training_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    let folder = dir.path().join("d");
    let values: Vec<f32> = (0..3_000_000u32).map(|i| i as f32).collect();
    let mut reads = Vec::new();
    let mut writer = deepspeed_checkpoint::RankWriter::new(&folder, deepspeed_core::Rank(0), 1);
    let what = ("w", "exp_avg", &[3_000_000usize][..]);
    let (source, log) = (&values, std::cell::RefCell::new(&mut reads));
    writer
        .slice_from(what, 0, (3_000_000, deepspeed_core::DType::F32), |first, piece| {
            log.borrow_mut().push(first);
            let bytes: Vec<u8> =
                source[first..first + piece.len() / 4].iter().flat_map(|x| x.to_le_bytes()).collect();
            piece.copy_from_slice(&bytes);
            Ok(())
        })
        .unwrap();
    writer.blob("b", vec![7; 10]);
    let snapshot: Snapshot = writer.snapshot(SnapshotMemory::default(), copy).unwrap();
    assert_eq!(snapshot.bytes(), 10, "only the blob is left to write");
    let record = snapshot.write(|_| Ok(())).1.unwrap();
    assert_eq!(reads, [0, 1 << 20, 2 << 20]);
    let slice = &record.files[0].slices[0];
    let file = fs::read(folder.join(&record.files[0].name)).unwrap();
    let stored = &file[slice.offset as usize..];
    assert!(stored.chunks(4).zip(&values).all(|(stored, value)| stored == value.to_le_bytes()));
}

#[test]
fn the_last_few_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 1..=5 {
        let saves = start(&Model::small(seed), dir.path(), &format!("step{seed}"), 1, Some(2));
        let retired = finish(saves).remove(0).unwrap();
        let expected = if seed > 2 { vec![format!("step{}", seed - 2)] } else { vec![] };
        assert_eq!(retired.removed, expected);
        assert!(retired.problems.is_empty(), "{retired:?}");
    }
    let tags = || {
        let mut tags: Vec<_> = complete_tags(dir.path()).unwrap().into_iter().map(|it| it.tag).collect();
        tags.sort();
        tags
    };
    assert_eq!(tags(), ["step4", "step5"]);
    // What was kept aside neither counts nor goes; nor does what others have put there.
    Model::small(6).save_aside(dir.path(), "best");
    fs::create_dir(dir.path().join("mine")).unwrap();
    fs::write(dir.path().join("mine/notes.txt"), "x").unwrap();
    Model::small(7).save(dir.path(), "step7", 1);
    // Nor the one that `latest` names, nor one that is being read.
    fs::write(dir.path().join("latest"), "step4").unwrap();
    let reading = Checkpoint::open(dir.path(), Some("step5")).unwrap().unwrap();
    assert!(retire(&RealDisk, dir.path(), 1).removed.is_empty());
    read_everything(&reading).unwrap();
    drop(reading);
    assert_eq!(retire(&RealDisk, dir.path(), 1).removed, ["step5"]);
    assert_eq!(tags(), ["best", "step4", "step7"]);
    assert!(dir.path().join("mine/notes.txt").exists());
    assert!(hidden(dir.path()).is_empty());
}

#[test]
fn a_removal_that_was_interrupted_is_finished_by_the_next_save() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Model::small(1).save(dir.path(), "old", 1);
    fs::rename(&folder, dir.path().join(".del-old-0000000000000001")).unwrap();
    assert!(complete_tags(dir.path()).unwrap().is_empty());
    Model::small(2).save(dir.path(), "new", 1);
    assert!(hidden(dir.path()).is_empty());
}

#[test]
fn which_one_to_go_on_from() {
    let dir = tempfile::tempdir().unwrap();
    let chosen = |except: &[(String, String)]| choose(dir.path(), except).unwrap().unwrap();
    assert_eq!(choose(dir.path(), &[]).unwrap(), None);
    assert_eq!(choose(&dir.path().join("nowhere"), &[]).unwrap(), None);
    Model::small(1).save(dir.path(), "one", 1);
    std::thread::sleep(Duration::from_millis(5));
    Model::small(2).save(dir.path(), "two", 1);
    assert_eq!((chosen(&[]).tag.as_str(), chosen(&[]).unexpected), ("two", false));
    assert!(chosen(&[]).why.contains("`latest` names it"));
    // Kept aside: newer, and not one to go on from.
    std::thread::sleep(Duration::from_millis(5));
    Model::small(3).save_aside(dir.path(), "aside");
    assert_eq!((chosen(&[]).tag.as_str(), chosen(&[]).unexpected), ("two", false));
    // A user goes back to an older one.
    fs::write(dir.path().join("latest"), "one").unwrap();
    let back = chosen(&[]);
    assert_eq!((back.tag.as_str(), back.unexpected), ("one", true));
    assert!(back.why.contains("`two` is newer"), "{}", back.why);
    // A save dies after the rename of its folder and before that of `latest`.
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    fs::File::open(dir.path().join("latest")).unwrap().set_modified(old).unwrap();
    let newer = chosen(&[]);
    assert_eq!((newer.tag.as_str(), newer.unexpected), ("two", true));
    assert!(newer.why.contains("`latest` still names `one`"), "{}", newer.why);
    // What turned out to be damaged is passed over.
    let instead = chosen(&[("two".to_owned(), "a bit flipped".to_owned())]);
    assert_eq!((instead.tag.as_str(), instead.unexpected), ("one", true));
    assert!(instead.why.contains("`two` cannot be used: a bit flipped"), "{}", instead.why);
    // `latest` names one that is cut short.
    fs::write(dir.path().join("latest"), "two").unwrap();
    let file = dir.path().join("two/weights-rank-00000-of-00001.safetensors");
    fs::File::options().write(true).open(&file).unwrap().set_len(100).unwrap();
    let instead = chosen(&[]);
    assert_eq!((instead.tag.as_str(), instead.unexpected), ("one", true));
    assert!(
        instead.why.contains("weights-rank-00000-of-00001.safetensors: it has 100 bytes"),
        "{}",
        instead.why
    );
    // No `latest`.
    fs::remove_file(dir.path().join("latest")).unwrap();
    assert_eq!(chosen(&[]).tag, "one");
    // None is whole.
    for tag in ["one", "aside"] {
        fs::remove_file(dir.path().join(tag).join("manifest.json")).unwrap();
    }
    assert!(matches!(choose(dir.path(), &[]), Err(CheckpointError::NoneComplete { .. })));
    fs::write(dir.path().join("latest"), "two").unwrap();
    assert!(matches!(choose(dir.path(), &[]), Err(CheckpointError::Damaged { .. })));
}

fn hidden(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn what_nobody_was_told_is_told_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(2);
    let draft = Draft::begin(dir.path(), "t", 2).unwrap();
    let folder = draft.folder().to_owned();
    fs::write(folder.join("weights-rank-00000-of-00001.safetensors"), "in the way").unwrap();
    let presence = Presence::announce(&folder, 0).unwrap();
    let commit = Commit { draft, parts: model.parts(1), save_latest: true, keep_last: None };
    let snapshot = model.snapshot(&(Arc::new(RealDisk) as Arc<_>), &folder, 0, 1);
    drop(BackgroundSave::start(presence, snapshot, Role::First(Box::new(commit))).unwrap());
    let failed = deepspeed_checkpoint::wait_for_all();
    // Other tests of this process may have saves of their own under way; theirs succeed or are taken.
    let (_, failure) = failed.iter().find(|(folder, _)| folder.starts_with(dir.path())).unwrap();
    assert!(failure.problem.contains("exists"), "{failure}");
    assert!(deepspeed_checkpoint::wait_for_all().iter().all(|(folder, _)| !folder.starts_with(dir.path())));
}
