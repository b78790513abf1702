//! Bytes from outside can be wrong in any way: they give an error that says what and where, and nothing else happens.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use common::{Model, open_latest, read_everything};
use deepspeed_checkpoint::{
    Checkpoint, CheckpointError, Checksum, CommitParts, Draft, HostPart, ParamRecord, RankRecord, RankWriter,
    Result, SliceSource, kind, peers_folder,
};
use deepspeed_core::{DType, Rank, Span, SpanMut};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A checkpoint of two ranks beside an older one.
fn saved() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    Model::small(1).save(dir.path(), "older", 1);
    let folder = Model::small(2).save(dir.path(), "newer", 2);
    (dir, folder)
}

fn open_and_read(dir: &Path) -> Result<()> {
    read_everything(&Checkpoint::open(dir, None)?.expect("latest exists"))
}

fn file_names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn write_manifest(folder: &Path, text: &[u8]) {
    fs::write(folder.join("manifest.json"), text).unwrap();
    fs::write(folder.join("manifest.xxh3"), format!("{}  manifest.json\n", Checksum::of(text))).unwrap();
}

fn edit_manifest(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let mut manifest: Value =
        serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    edit(&mut manifest);
    write_manifest(folder, &serde_json::to_vec(&manifest).unwrap());
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let (dir, folder) = saved();
    for name in file_names(&folder) {
        let path = folder.join(&name);
        let good = fs::read(&path).unwrap();
        let step = (good.len() / 40).max(1);
        for position in (0..good.len()).step_by(step).chain([good.len() - 1]) {
            let mut bad = good.clone();
            bad[position] ^= 1 << (position % 8);
            fs::write(&path, bad).unwrap();
            let error = open_and_read(dir.path()).unwrap_err();
            assert!(matches!(error, CheckpointError::Damaged { .. }), "{name} {position}: {error}");
            let text = error.to_string();
            let file = if name == "manifest.xxh3" { "manifest.json" } else { &name };
            assert!(text.contains("checkpoint `newer`") && text.contains(file), "{text}");
            assert!(text.contains("complete ones there: older"), "{text}");
        }
        fs::write(&path, good).unwrap();
    }
    open_and_read(dir.path()).unwrap();
}

#[test]
fn a_file_cut_short_or_grown_or_gone_is_found_at_once() {
    let (dir, folder) = saved();
    for name in file_names(&folder) {
        let path = folder.join(&name);
        let good = fs::read(&path).unwrap();
        for len in [0, 1, good.len() / 2, good.len() - 1] {
            fs::write(&path, &good[..len]).unwrap();
            let error = Checkpoint::open(dir.path(), None).unwrap_err().to_string();
            assert!(error.contains("`newer`") && error.contains("is damaged"), "{error}");
        }
        let mut longer = good.clone();
        longer.push(0);
        fs::write(&path, longer).unwrap();
        assert!(Checkpoint::open(dir.path(), None).is_err(), "{name} grown");
        fs::remove_file(&path).unwrap();
        let error = Checkpoint::open(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains(&name) && error.contains("it is missing"), "{error}");
        fs::write(&path, good).unwrap();
    }
    open_and_read(dir.path()).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_never_replaced_by_another_one() {
    let (dir, folder) = saved();
    fs::remove_file(folder.join("manifest.json")).unwrap();
    for tag in [None, Some("newer")] {
        let error = Checkpoint::open(dir.path(), tag).unwrap_err().to_string();
        assert!(error.contains("not complete") && error.contains("complete ones there: older"), "{error}");
    }
    fs::remove_dir_all(&folder).unwrap();
    let error = Checkpoint::open(dir.path(), None).unwrap_err();
    assert!(matches!(error, CheckpointError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("no checkpoint `newer`"), "{error}");
    assert!(Checkpoint::open(dir.path(), Some("older")).unwrap().is_some());
}

#[test]
fn latest_must_name_a_tag() {
    let (dir, _) = saved();
    let latest = dir.path().join("latest");
    assert_eq!(fs::read(&latest).unwrap(), b"newer");
    fs::write(&latest, "newer\n").unwrap();
    assert_eq!(open_latest(dir.path()).tag(), "newer");
    for text in ["", "\n", "../../etc", "/etc/passwd", "\u{0}", "latest"] {
        fs::write(&latest, text).unwrap();
        let error = Checkpoint::open(dir.path(), None).unwrap_err();
        assert!(matches!(error, CheckpointError::Latest { .. }), "{text:?}: {error}");
        assert!(error.to_string().contains("complete ones there: newer, older"), "{error}");
    }
    fs::write(&latest, [0xff; 10]).unwrap();
    assert!(Checkpoint::open(dir.path(), None).unwrap_err().to_string().contains("not text"));
    fs::write(&latest, vec![b'a'; 100_000]).unwrap();
    assert!(Checkpoint::open(dir.path(), None).is_err());
    assert!(matches!(Checkpoint::open(dir.path(), Some("..")), Err(CheckpointError::Tag { .. })));
}

#[test]
fn a_checkpoint_of_the_original_is_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("global_step10");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("mp_rank_00_model_states.pt"), "pickle").unwrap();
    fs::write(dir.path().join("latest"), "global_step10").unwrap();
    let error = Checkpoint::open(dir.path(), None).unwrap_err();
    assert!(matches!(error, CheckpointError::Foreign { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("mp_rank_00_model_states.pt") && text.contains("open_any"), "{text}");
}

#[test]
fn a_later_version_is_refused_in_clear_words() {
    let (dir, folder) = saved();
    edit_manifest(&folder, |manifest| {
        *manifest = json!({ "format": "deepspeed-checkpoint", "format_version": 7, "shards": [] });
    });
    let text = Checkpoint::open(dir.path(), None).unwrap_err().to_string();
    assert!(text.contains("format version 7") && text.contains("update deepspeed"), "{text}");
}

#[test]
fn keys_of_a_later_minor_version_are_passed_over() {
    let (dir, folder) = saved();
    edit_manifest(&folder, |manifest| manifest["something_new"] = json!([1, 2, 3]));
    open_and_read(dir.path()).unwrap();
}

#[test]
fn a_manifest_cannot_point_outside_its_folder() {
    let (dir, folder) = saved();
    fs::write(dir.path().join("secret"), "x").unwrap();
    for name in ["../secret", "/etc/passwd", "..", "", "weights-rank-00000-of-00002.safetensors/../../secret"]
    {
        edit_manifest(&folder, |manifest| manifest["files"][0]["name"] = json!(name));
        let error = Checkpoint::open(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("not the name of a file of a checkpoint"), "{error}");
    }
}

#[test]
fn impossible_numbers_are_refused() {
    for (pointer, value) in [
        ("/files/0/slices/0/offset", json!(u64::MAX)),
        ("/files/0/slices/0/len", json!(u64::MAX)),
        ("/files/0/slices/0/start", json!(u64::MAX)),
        ("/files/0/slices/0/len", json!(0)),
        ("/files/0/slices/0/dtype", json!("I64")),
        ("/files/0/slices/0/kind", json!("a/b")),
        ("/files/0/slices/0/param", json!("nobody")),
        ("/files/0/rank", json!(2)),
        ("/files/0/bytes", json!(0)),
        ("/files/0/checksums", json!([])),
        ("/files/0/checksums/0", json!("00")),
        ("/files/1/name", json!("weights-rank-00000-of-00002.safetensors")),
        ("/params/0/shape", json!([u64::MAX, 2])),
        ("/params/0/shape", json!([1_u64 << 62])),
        ("/params/0/shape", json!([-1])),
        ("/params/1/name", json!("blocks.0.weight")),
        ("/chunk_bytes", json!(0)),
        ("/chunk_bytes", json!(u64::MAX)),
        ("/format_version", json!(0)),
        ("/format", json!("zip")),
        ("/world", json!(1)),
    ] {
        let (dir, folder) = saved();
        edit_manifest(&folder, |manifest| *manifest.pointer_mut(pointer).unwrap() = value.clone());
        let error = Checkpoint::open(dir.path(), None).unwrap_err();
        assert!(matches!(error, CheckpointError::Damaged { .. }), "{pointer} {value}: {error}");
    }
}

#[test]
fn a_header_that_disagrees_with_the_manifest_is_found_by_verify() {
    let (dir, folder) = saved();
    let name = "optimizer-rank-00001-of-00002.safetensors";
    let path = folder.join(name);
    let good = fs::read(&path).unwrap();
    let replace = |from: &str, to: &str| {
        let text = String::from_utf8_lossy(&good[..4096]).into_owned();
        let at = text.find(from).unwrap();
        let mut bad = good.clone();
        bad[at..at + to.len()].copy_from_slice(to.as_bytes());
        bad
    };
    let with_length = |len: u64| [&len.to_le_bytes()[..], &good[8..]].concat();
    for bad in [
        replace("exp_avg/", "exp_abc/"),
        replace("\"F32\"", "\"I32\""),
        replace("{", "["),
        with_length(u64::MAX),
        with_length(99_999_999),
        with_length(0),
    ] {
        fs::write(&path, &bad).unwrap();
        edit_manifest(&folder, |manifest| {
            let files = manifest["files"].as_array_mut().unwrap();
            let file = files.iter_mut().find(|file| file["name"] == name).unwrap();
            file["checksums"] = json!([Checksum::of(&bad).to_string()]);
        });
        let error = open_latest(dir.path()).verify().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("header"), "{error}");
    }
}

#[test]
fn what_is_no_file_does_not_hang() {
    let (dir, folder) = saved();
    for name in ["manifest.json", "weights-rank-00001-of-00002.safetensors"] {
        let path = folder.join(name);
        let good = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = Checkpoint::open(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(Checkpoint::open(dir.path(), None).unwrap_err().to_string().contains("not a regular file"));
        fs::remove_dir(&path).unwrap();
        fs::write(&path, good).unwrap();
    }
    open_and_read(dir.path()).unwrap();
}

#[test]
fn a_file_cut_short_under_our_feet_is_an_error() {
    let (dir, folder) = saved();
    let checkpoint = open_latest(dir.path());
    let file = fs::OpenOptions::new()
        .write(true)
        .open(folder.join("extra-rank-00001-of-00002.safetensors"))
        .unwrap();
    file.set_len(10).unwrap();
    let error = read_everything(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("extra-rank-00001") && error.contains("shorter"), "{error}");
}

/// Replaces the `nth` value of the tree, counted in the order of the text.
fn replace_nth(value: &mut Value, nth: &mut usize, new: &Value) -> bool {
    if *nth == 0 {
        *value = new.clone();
        return true;
    }
    *nth -= 1;
    match value {
        Value::Array(items) => items.iter_mut().any(|item| replace_nth(item, nth, new)),
        Value::Object(fields) => fields.values_mut().any(|field| replace_nth(field, nth, new)),
        _ => false,
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u64>().prop_map(|x| json!(x)),
        (0u64..5000).prop_map(|x| json!(x)),
        any::<i64>().prop_map(|x| json!(x)),
        any::<f64>().prop_map(|x| json!(x)),
        any::<bool>().prop_map(|x| json!(x)),
        "[a-z./0-9]{0,12}".prop_map(|x| json!(x)),
        prop::sample::select(vec!["F32", "BF16", "U8", "F64", "weight", "master", "blocks.0.weight"])
            .prop_map(|x| json!(x)),
        prop::collection::vec(any::<u64>(), 0..4).prop_map(|x| json!(x)),
        Just(json!({})),
        Just(Value::Null),
    ]
}

/// A copy of a small checkpoint of two ranks, which is saved only once.
fn copy() -> (tempfile::TempDir, PathBuf) {
    static FILES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
        let dir = tempfile::tempdir().unwrap();
        let folder = Model::new(&[&[7, 5], &[40]], 1).save(dir.path(), "t", 2);
        let content = |name: String| (name.clone(), fs::read(folder.join(&name)).unwrap());
        file_names(&folder).into_iter().map(content).collect()
    });
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("t");
    fs::create_dir(&folder).unwrap();
    FILES.iter().for_each(|(name, bytes)| fs::write(folder.join(name), bytes).unwrap());
    fs::write(dir.path().join("latest"), "t").unwrap();
    (dir, folder)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_hostile_manifest_gives_an_error_or_a_harmless_checkpoint(
        edits in prop::collection::vec((0usize..400, any_value()), 1..4),
    ) {
        let (dir, folder) = copy();
        edit_manifest(&folder, |manifest| {
            for (nth, value) in &edits {
                replace_nth(manifest, &mut nth.clone(), value);
            }
        });
        let _ = open_and_read(dir.path());
    }

    #[test]
    fn any_bytes_as_a_manifest_give_an_error(
        start in 0usize..6000, len in 0usize..50, bytes in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let (dir, folder) = copy();
        let mut text = fs::read(folder.join("manifest.json")).unwrap();
        let start = start.min(text.len());
        let end = (start + len).min(text.len());
        text.splice(start..end, bytes);
        write_manifest(&folder, &text);
        let _ = open_and_read(dir.path());
    }

    #[test]
    fn any_bytes_in_a_file_give_an_error_of_that_file(
        position in 0usize..100_000, bytes in prop::collection::vec(any::<u8>(), 1..20), file in 0usize..60,
    ) {
        let (dir, folder) = copy();
        let names: Vec<_> = file_names(&folder).into_iter().filter(|name| name.ends_with("safetensors")).collect();
        let file = file % names.len();
        let path = folder.join(&names[file]);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        let position = position % (good.len() - bytes.len());
        bad[position..position + bytes.len()].copy_from_slice(&bytes);
        fs::write(&path, &bad).unwrap();
        match open_and_read(dir.path()) {
            Ok(()) => prop_assert!(good == bad),
            Err(error) => prop_assert!(error.to_string().contains(&names[file]), "{}", error),
        }
    }
}

#[test]
fn files_that_other_hosts_sent_are_checked_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut draft = Draft::begin(dir.path(), "t", 7).unwrap();
    let weight = [1.0f32, 2.0, 3.0, 4.0];
    let records: Vec<RankRecord> = (0..2)
        .map(|rank| {
            let mut writer = RankWriter::new(draft.folder(), Rank::from_index(rank), 2);
            let data = Span::from(&weight[2 * rank..2 * rank + 2]);
            let slice = SliceSource { name: "w", kind: kind::WEIGHT, shape: &[4], offset: 2 * rank, data };
            writer.slice(slice).unwrap();
            writer.finish().unwrap()
        })
        .collect();
    let param =
        ParamRecord { name: "w".to_owned(), shape: vec![4], dtype: DType::F32.into(), group: Some(0) };
    let parts = CommitParts {
        world: 2,
        stage: 1,
        dtype: DType::F32,
        params: vec![param],
        tied: Vec::new(),
        state: json!({}),
        frozen_excluded: false,
    };
    draft.keep_part(HostPart { ranks: vec![0], save: "one".to_owned() });
    let folder = draft.commit(&records, parts, true).unwrap();
    let peers = peers_folder(dir.path(), "t");
    let name = "weights-rank-00001-of-00002.safetensors";
    fs::create_dir(&peers).unwrap();
    fs::rename(folder.join(name), peers.join(name)).unwrap();
    let open = || Checkpoint::open(dir.path(), None).unwrap().unwrap();
    open().verify().unwrap();
    let mut read = [0.0f32; 4];
    open().read("w", kind::WEIGHT, 0..4, SpanMut::from(&mut read[..])).unwrap();
    assert_eq!(read, weight);

    let mut bytes = fs::read(peers.join(name)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(peers.join(name), bytes).unwrap();
    let error = open().verify().unwrap_err();
    assert!(matches!(&error, CheckpointError::Damaged { file, .. } if file == name), "{error}");
    // Of what has not come, what is here is checked.
    fs::remove_dir_all(&peers).unwrap();
    open().verify().unwrap();
}
