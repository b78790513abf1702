//! A save either becomes a whole checkpoint or leaves nothing: what is refused, what is replaced, what is cleaned up.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use common::{Model, open_latest, read_everything, real_disk};
use deepspeed_checkpoint::{
    Checkpoint, CheckpointError, CommitParts, Draft, ParamRecord, RankRecord, RankWriter, SliceSource,
    TensorSource, draft_folder, kind,
};
use deepspeed_core::{DType, Rank, Span};

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn param(name: &str, len: usize, group: Option<usize>) -> ParamRecord {
    ParamRecord { name: name.into(), shape: vec![len], dtype: DType::F32.into(), group }
}

/// Saves slices given as (rank, parameter, kind, start, length) in a world of two and returns what commit says.
fn commit(
    params: &[ParamRecord],
    frozen_excluded: bool,
    slices: &[(u32, &str, &str, usize, usize)],
) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let draft = Draft::begin(dir.path(), "t", 1).unwrap();
    let numbers = [0.0f32; 100];
    let records: Vec<RankRecord> = (0..2)
        .map(|rank| {
            let mut writer = RankWriter::new(draft.folder(), Rank(rank), 2);
            for (_, name, kind, offset, len) in slices.iter().filter(|slice| slice.0 == rank) {
                let data = Span::from(&numbers[..*len]);
                // As if the parameter were large: what a rank believes is checked when all come together.
                writer.slice(SliceSource { name, kind, shape: &[1000], offset: *offset, data }).unwrap();
            }
            writer.finish().unwrap()
        })
        .collect();
    let parts = CommitParts {
        world: 2,
        stage: 1,
        dtype: DType::F32,
        params: params.to_vec(),
        tied: Vec::new(),
        state: serde_json::Value::Null,
        frozen_excluded,
    };
    let result = draft.commit(&records, parts, true).map(drop).map_err(|error| error.to_string());
    match &result {
        Ok(()) => read_everything(&open_latest(dir.path())).unwrap(),
        Err(_) => assert!(names(dir.path()).is_empty(), "a refused save leaves nothing"),
    }
    result
}

#[test]
fn every_element_is_there_exactly_once() {
    let params = [param("a", 10, Some(0)), param("b", 6, Some(1))];
    let whole = [(0, "a", "weight", 0, 4), (1, "a", "weight", 4, 6), (1, "b", "weight", 0, 6)];
    commit(&params, false, &whole).unwrap();
    // Zero-length slices are legal, wherever they are.
    commit(&params, false, &[&whole[..], &[(0, "b", "weight", 3, 0)]].concat()).unwrap();
    // Kinds may differ between groups, not inside one.
    commit(&params, false, &[&whole[..], &[(0, "a", "master", 0, 10)]].concat()).unwrap();

    let refused = |slices: &[(u32, &str, &str, usize, usize)], expected: &str| {
        let error = commit(&params, false, slices).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    refused(&whole[..2], "the weights of parameter `b` are in no file");
    refused(&whole[1..], "elements 0..4 of `weight` of parameter `a` are in no file");
    refused(&[whole[0], whole[2]], "elements 4..10 of `weight` of parameter `a` are in no file");
    refused(
        &[&whole[..], &[(1, "a", "weight", 2, 3)]].concat(),
        "elements 2..4 of `weight` of parameter `a` are there twice, in weights-rank-00000-of-00002.safetensors",
    );
    refused(
        &[&whole[..], &[(1, "b", "weight", 6, 3)]].concat(),
        "3 elements from 6 of parameter `b`, which has 6",
    );
    refused(&[&whole[..], &[(1, "c", "weight", 0, 3)]].concat(), "`c` is not a parameter");
    refused(&[&whole[..], &[(0, "a", "master", 0, 9)]].concat(), "elements 9..10 of `master`");
}

#[test]
fn kinds_are_the_same_within_a_group() {
    let params = [param("a", 4, Some(0)), param("b", 4, Some(0)), param("empty", 0, Some(0))];
    let weights = [(0, "a", "weight", 0, 4), (1, "b", "weight", 0, 4)];
    commit(&params, false, &weights).unwrap();
    let error = commit(&params, false, &[&weights[..], &[(0, "a", "exp_avg", 0, 4)]].concat()).unwrap_err();
    assert!(
        error.contains("`exp_avg` of parameter `b` is in no file, and others of its group have it"),
        "{error}"
    );
}

#[test]
fn frozen_weights_may_be_left_out_if_said() {
    let params = [param("a", 4, Some(0)), param("frozen", 4, None)];
    let weights = [(0, "a", "weight", 0, 4)];
    assert!(commit(&params, false, &weights).unwrap_err().contains("weights of parameter `frozen`"));
    commit(&params, true, &weights).unwrap();
    commit(&params, false, &[&weights[..], &[(1, "frozen", "weight", 0, 4)]].concat()).unwrap();
    let trained = [param("a", 4, Some(0)), param("frozen", 4, Some(0))];
    assert!(commit(&trained, true, &weights).is_err());
}

#[test]
fn every_rank_reports_once_and_its_files_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(1);
    let attempt = |choose: &dyn Fn(&Draft, Vec<RankRecord>) -> Vec<RankRecord>| {
        let draft = Draft::begin(dir.path(), "t", 1).unwrap();
        let records =
            (0..2).map(|rank| model.write_rank(&real_disk(), draft.folder(), rank, 2).unwrap()).collect();
        let records = choose(&draft, records);
        let error = draft.commit(&records, model.parts(2), true).unwrap_err();
        assert!(matches!(error, CheckpointError::Coverage { .. }), "{error}");
        assert!(names(dir.path()).is_empty());
        error.to_string()
    };
    let error = attempt(&|_, records| records[..1].to_vec());
    assert!(error.contains("rank 1 of 2 did not report"), "{error}");
    let error = attempt(&|_, records| vec![records[0].clone(), records[0].clone()]);
    assert!(error.contains("rank 0 reports twice"), "{error}");
    let error = attempt(&|draft, records| {
        fs::remove_file(draft.folder().join(&records[1].files[0].name)).unwrap();
        records
    });
    assert!(error.contains("rank 1 wrote") && error.contains("shared by all hosts"), "{error}");
    let error = attempt(&|draft, records| {
        fs::write(draft.folder().join(&records[1].files[0].name), "short").unwrap();
        records
    });
    assert!(error.contains("it has 5 bytes here"), "{error}");
}

#[test]
fn a_source_that_does_not_fit_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let numbers = [0.0f32; 8];
    let data = Span::from(&numbers[..]);
    let mut writer = RankWriter::new(dir.path(), Rank(0), 1);
    for (kind, shape, offset) in [
        ("weight", &[7][..], 0),
        ("weight", &[8], 1),
        ("weight", &[8], usize::MAX),
        ("a/b", &[8], 0),
        ("", &[8], 0),
    ] {
        let slice = SliceSource { name: "p", kind, shape, offset, data };
        assert!(
            matches!(writer.slice(slice), Err(CheckpointError::Source { .. })),
            "{kind} {shape:?} {offset}"
        );
    }
    let dtype = "bool".parse().unwrap();
    let tensor = TensorSource { name: "b", dtype, shape: &[3], bytes: &[0; 4] };
    assert!(writer.tensor(tensor).unwrap_err().to_string().contains("4 bytes for the shape [3] of BOOL"));
    writer.blob("twice", vec![1]);
    writer.blob("twice", vec![2]);
    assert!(writer.finish().unwrap_err().to_string().contains("two tensors of a file are called `twice`"));
    assert!(RankRecord::from_bytes(b"{}").is_err());
}

#[test]
fn buffers_of_any_type_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let draft = Draft::begin(dir.path(), "t", 1).unwrap();
    let types =
        ["torch.int64", "torch.bool", "torch.float64", "torch.uint8", "torch.complex64", "torch.bfloat16"];
    let contents: Vec<Vec<u8>> = types
        .iter()
        .map(|t| vec![7; 3 * t.parse::<deepspeed_checkpoint::ElementType>().unwrap().size()])
        .collect();
    let mut writer = RankWriter::new(draft.folder(), Rank(0), 1);
    for (name, bytes) in types.iter().zip(&contents) {
        writer.tensor(TensorSource { name, dtype: name.parse().unwrap(), shape: &[3, 1], bytes }).unwrap();
    }
    writer
        .tensor(TensorSource { name: "none", dtype: "bool".parse().unwrap(), shape: &[0], bytes: &[] })
        .unwrap();
    let record = writer.finish().unwrap();
    let parts = Model::new(&[], 0).parts(1);
    draft.commit(&[record], parts, true).unwrap();
    let checkpoint = open_latest(dir.path());
    checkpoint.verify().unwrap();
    for (name, bytes) in types.iter().zip(&contents) {
        assert_eq!(&checkpoint.tensor(name).unwrap(), bytes);
        let record = checkpoint.tensors().find(|tensor| tensor.name == *name).unwrap();
        assert_eq!((&record.shape[..], record.offset % record.dtype.size() as u64), (&[3, 1][..], 0));
        assert_eq!(format!("torch.{}", record.dtype.torch_name().unwrap()), *name);
    }
    assert!(checkpoint.tensor("none").unwrap().is_empty());
}

#[test]
fn a_draft_that_is_dropped_or_aborted_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(1);
    for abort in [false, true] {
        let draft = Draft::begin(&dir.path().join("new/folders"), "t", 1).unwrap();
        model.write_rank(&real_disk(), draft.folder(), 0, 1).unwrap();
        if abort {
            draft.abort().unwrap();
        } else {
            drop(draft);
        }
        assert!(names(&dir.path().join("new/folders")).is_empty());
    }
}

#[test]
fn saving_under_the_same_tag_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    Model::small(1).save(dir.path(), "t", 3);
    Model::small(2).save(dir.path(), "t", 1);
    Model::small(2).assert_in(&open_latest(dir.path()), 2);
    assert_eq!(names(dir.path()), ["latest", "t"]);
    assert_eq!(names(&dir.path().join("t")).len(), 5);
}

#[test]
fn what_is_no_checkpoint_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("data")).unwrap();
    // An empty folder is nobody's.
    Model::small(1).save(dir.path(), "data", 1);
    fs::write(dir.path().join("data/thesis.tex"), "irreplaceable").unwrap();
    fs::write(dir.path().join("notes"), "").unwrap();
    for (tag, entry) in [("data", "thesis.tex"), ("notes", "a file of that name")] {
        let error = Draft::begin(dir.path(), tag, 1).err().unwrap();
        assert!(matches!(error, CheckpointError::Occupied { .. }), "{error}");
        assert!(error.to_string().contains(entry), "{error}");
    }
    assert_eq!(names(dir.path()), ["data", "latest", "notes"]);
}

#[test]
fn a_path_through_a_file_is_said_so() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let error = Draft::begin(&dir.path().join("file/sub"), "t", 1).err().unwrap().to_string();
    assert!(error.contains("/file: ") && error.contains("a part of this path is a file"), "{error}");
    assert!(matches!(Draft::begin(dir.path(), "a/b", 1), Err(CheckpointError::Tag { .. })));
}

#[test]
fn leftovers_of_dead_jobs_are_removed_and_live_ones_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::small(1);
    let live = Draft::begin(dir.path(), "live", 1).unwrap();
    let dead = draft_folder(dir.path(), "dead", 2);
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("weights-rank-00000-of-00001.safetensors"), "half").unwrap();
    fs::write(dir.path().join(".tmp-dead-0000000000000002.lock"), "").unwrap();
    fs::write(dir.path().join(".tmp-dead-0000000000000002.latest"), "").unwrap();
    // Without a lock file the owner is unknown, and age decides.
    let young = draft_folder(dir.path(), "young", 3);
    let old = draft_folder(dir.path(), "old", 4);
    fs::create_dir(&young).unwrap();
    fs::create_dir(&old).unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(7200);
    fs::File::open(&old).unwrap().set_modified(long_ago).unwrap();
    fs::create_dir(dir.path().join(".tmp-mine")).unwrap();

    let next = Draft::begin(dir.path(), "next", 5).unwrap();
    assert!(next.warnings().is_empty(), "{:?}", next.warnings());
    let expected = [
        ".tmp-live-0000000000000001",
        ".tmp-live-0000000000000001.lock",
        ".tmp-mine",
        ".tmp-next-0000000000000005",
        ".tmp-next-0000000000000005.lock",
        ".tmp-young-0000000000000003",
    ];
    assert_eq!(names(dir.path()), expected);
    let record = model.write_rank(&real_disk(), live.folder(), 0, 1).unwrap();
    live.commit(&[record], model.parts(1), true).unwrap();
    model.assert_in(&open_latest(dir.path()), 1);
}

#[test]
fn two_jobs_may_save_into_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for seed in 0..4u32 {
            let dir = dir.path();
            scope.spawn(move || {
                for _ in 0..5 {
                    Model::small(seed).save(dir, &format!("job{seed}"), 2);
                }
            });
        }
    });
    for seed in 0..4 {
        let checkpoint = Checkpoint::open(dir.path(), Some(&format!("job{seed}"))).unwrap().unwrap();
        Model::small(seed).assert_in(&checkpoint, 1);
    }
    assert_eq!(names(dir.path()), ["job0", "job1", "job2", "job3", "latest"]);
}

#[test]
fn the_manifest_is_readable_text() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Model::new(&[&[2, 3]], 1).save(dir.path(), "t", 1);
    let text = fs::read_to_string(folder.join("manifest.json")).unwrap();
    assert!(
        text.contains("\n  {\"name\":\"blocks.0.weight\",\"shape\":[2,3],\"dtype\":\"BF16\",\"group\":0}\n"),
        "{text}"
    );
    assert!(text.contains(
        "\"param\":\"blocks.0.weight\",\"kind\":\"master\",\"start\":0,\"len\":6,\"dtype\":\"F32\""
    ));
    assert!(text.contains(kind::EXP_AVG));
}
