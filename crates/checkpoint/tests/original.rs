//! The original's layout: what is written is read back, and files that are wrong in any way give errors.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, may end a test")]

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use deepspeed_checkpoint::{
    CheckpointError, CommitParts, Draft, OriginalOptions, ParamRecord, Progress, RankWriter, Silent,
    SliceSource, Source, TensorSource, WholeState, kind, open_any, open_universal, write_original,
    write_universal,
};
use deepspeed_core::{DType, Rank, Span, SpanMut};
use half::bf16;
use proptest::prelude::*;
use serde_json::json;

/// Name, shape, group.
const PARAMS: [(&str, &[usize], Option<usize>); 6] = [
    ("token.weight", &[11, 5], Some(0)),
    ("frozen.weight", &[5, 5], None),
    ("norm.weight", &[5], Some(1)),
    ("up.weight", &[7, 5], Some(0)),
    ("up.bias", &[7], Some(1)),
    ("empty", &[0, 3], Some(1)),
];

fn value(param: usize, kind: usize, index: usize) -> f32 {
    (param * 1000 + kind * 300 + index) as f32 * 0.37 - 11.0
}

/// A checkpoint of ours with masters, Adam's state, a frozen parameter and a buffer.
fn ours(dir: &Path, dtype: DType) -> Box<dyn Source> {
    let draft = Draft::begin(dir, "ours", 7).unwrap();
    let mut params = Vec::new();
    let values = |param: usize, kind: usize| -> Vec<f32> {
        (0..PARAMS[param].1.iter().product()).map(|index| value(param, kind, index)).collect()
    };
    let wide: Vec<Vec<Vec<f32>>> =
        (0..PARAMS.len()).map(|param| (0..3).map(|kind| values(param, kind)).collect()).collect();
    let narrow: Vec<Vec<bf16>> =
        wide.iter().map(|kinds| kinds[0].iter().map(|value| bf16::from_f32(*value)).collect()).collect();
    let bytes = 42i64.to_le_bytes();
    let mut writer = RankWriter::new(draft.folder(), Rank(0), 1);
    for (index, (name, shape, group)) in PARAMS.iter().enumerate() {
        let weight = match dtype {
            DType::F32 => Span::from(&wide[index][0][..]),
            _ => Span::from(&narrow[index][..]),
        };
        let mut slice = |kind, data| {
            writer.slice(SliceSource { name, kind, shape, offset: 0, data }).unwrap();
        };
        slice(kind::WEIGHT, weight);
        if group.is_some() {
            if dtype != DType::F32 {
                slice(kind::MASTER, Span::from(&wide[index][0][..]));
            }
            slice(kind::EXP_AVG, Span::from(&wide[index][1][..]));
            slice(kind::EXP_AVG_SQ, Span::from(&wide[index][2][..]));
        }
        let (name, shape) = ((*name).to_owned(), shape.to_vec());
        params.push(ParamRecord { name, shape, dtype: dtype.into(), group: *group });
    }
    let dtype_of = "int64".parse().unwrap();
    writer.tensor(TensorSource { name: "calls", dtype: dtype_of, shape: &[], bytes: &bytes }).unwrap();
    let record = writer.finish().unwrap();
    let state = json!({
        "counters": {
            "micro_steps": 8, "global_steps": 4, "global_samples": 64, "skipped_steps": 1, "optimizer_steps": 3,
        },
        "loss_scaler": { "type": "static", "scale": 1.0 },
        "train_batch_size": 16,
        "accumulation_steps": 2,
        "gradient_clipping": 0.5,
    });
    let parts =
        CommitParts { world: 1, stage: 2, dtype, params, tied: Vec::new(), state, frozen_excluded: false };
    draft.commit(&[record], parts, true).unwrap();
    open_any(dir, Some("ours")).unwrap().unwrap()
}

fn read(source: &dyn Source, name: &str, kind: &str, range: std::ops::Range<usize>) -> Vec<f32> {
    let mut out = Vec::new();
    source
        .visit(name, kind, range, &mut |_, span| match span.as_f32() {
            Some(values) => out.extend_from_slice(values),
            None => out.extend(span.as_bf16().unwrap().iter().map(|value| value.to_f32())),
        })
        .unwrap();
    out
}

#[test]
fn what_is_written_is_read_back_at_every_stage_and_world() {
    for dtype in [DType::F32, DType::BF16] {
        let dir = tempfile::tempdir().unwrap();
        let source = ours(dir.path(), dtype);
        for stage in 0..=3 {
            for world in [1, 2, 3, 8, 64] {
                let tag = format!("stage{stage}-world{world}");
                let options = OriginalOptions::new(stage, world);
                let folder = write_original(&*source, dir.path(), &tag, options, &Silent).unwrap();
                assert!(!folder.join("manifest.json").exists());
                let written = open_any(dir.path(), None).unwrap().unwrap();
                assert_eq!((written.tag(), written.world(), written.stage()), (&*tag, world, Some(stage)));
                assert!(written.format().contains("DeepSpeed 0.19.8"), "{}", written.format());
                written.verify_share(Rank(0), 1).unwrap();
                for (name, shape, group) in &PARAMS {
                    let numel: usize = shape.iter().product();
                    let param = written.param(name);
                    if numel == 0 && stage == 3 {
                        continue; // the original's stage 3 forgets its shape
                    }
                    let param = param.unwrap();
                    assert_eq!((&param.shape[..], param.dtype.dtype()), (*shape, Some(dtype)), "{name}");
                    let kept = numel > 0 || (stage == 0 && dtype == DType::F32);
                    assert_eq!(param.group, group.filter(|_| kept), "{tag} {name}");
                    assert_eq!(
                        written.kinds(name).len(),
                        if kept { source.kinds(name).len() } else { 1 },
                        "{tag} {name}"
                    );
                    for kind in source.kinds(name).into_iter().filter(|_| numel > 0) {
                        assert_eq!(
                            read(&*written, name, kind, 0..numel),
                            read(&*source, name, kind, 0..numel),
                            "{tag} {name} {kind}"
                        );
                        let mid = numel / 3..numel - 1;
                        assert_eq!(read(&*written, name, kind, mid.clone()), read(&*source, name, kind, mid));
                    }
                }
                assert_eq!(written.tensor("calls").unwrap(), 42i64.to_le_bytes());
                assert_eq!(written.state()["gradient_clipping"], 0.5);
                for key in ["global_steps", "global_samples", "skipped_steps", "optimizer_steps"] {
                    assert_eq!(written.state()["counters"][key], source.state()["counters"][key], "{key}");
                }
            }
        }
    }
}

/// Counts the bytes that an operation announces and passes.
#[derive(Default)]
struct Count {
    announced: AtomicU64,
    passed: AtomicU64,
}

impl Progress for Count {
    fn begin(&self, _what: &str, bytes: u64) {
        self.announced.fetch_add(bytes, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) {
        self.passed.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[test]
fn stage_0_keeps_the_state_of_16_bit_models_in_two_forms() {
    let dir = tempfile::tempdir().unwrap();
    let source = ours(dir.path(), DType::BF16);
    for (tag, state) in [("flat", WholeState::Flat), ("each", WholeState::PerParameter)] {
        let options = OriginalOptions { state: Some(state), ..OriginalOptions::new(0, 2) };
        let count = Count::default();
        let folder = write_original(&*source, dir.path(), tag, options, &count).unwrap();
        let files: Vec<_> = fs::read_dir(folder).unwrap().map(|it| it.unwrap().file_name()).collect();
        assert_eq!(files, ["mp_rank_00_model_states.pt"]);
        assert!(count.announced.load(Ordering::Relaxed) > 0);
        assert_eq!(count.announced.into_inner(), count.passed.into_inner());
        let written = open_any(dir.path(), Some(tag)).unwrap().unwrap();
        assert_eq!((written.stage(), written.world()), (Some(0), 2));
        for (name, shape, _) in
            PARAMS.iter().filter(|(_, shape, group)| group.is_some() && !shape.contains(&0))
        {
            let numel: usize = shape.iter().product();
            for kind in [kind::MASTER, kind::EXP_AVG, kind::EXP_AVG_SQ] {
                let (one, other) =
                    (read(&*written, name, kind, 0..numel), read(&*source, name, kind, 0..numel));
                assert_eq!(one, other, "{tag} {name} {kind}");
            }
        }
    }
}

#[test]
fn the_universal_format_is_read_back_and_replaced_in_one_step() {
    for dtype in [DType::F32, DType::BF16] {
        let dir = tempfile::tempdir().unwrap();
        let source = ours(dir.path(), dtype);
        for stage in 1..=3 {
            let out = dir.path().join("converted");
            let count = Count::default();
            write_universal(&*source, &out, OriginalOptions::new(stage, 2), true, &count).unwrap();
            assert_eq!(count.announced.into_inner(), count.passed.into_inner());
            let written = open_universal(dir.path(), None).unwrap().unwrap();
            assert_eq!((written.tag(), written.world()), ("converted", 2));
            for (name, shape, group) in PARAMS.iter().filter(|(_, shape, _)| !shape.contains(&0)) {
                let numel: usize = shape.iter().product();
                assert_eq!(written.param(name).unwrap().group, *group);
                for kind in source.kinds(name) {
                    let (one, other) =
                        (read(&*written, name, kind, 0..numel), read(&*source, name, kind, 0..numel));
                    assert_eq!(one, other, "stage {stage} {name} {kind}");
                }
            }
            assert_eq!(written.tensor("calls").unwrap(), 42i64.to_le_bytes());
            let steps = &written.state()["counters"]["optimizer_steps"];
            assert_eq!(steps, &source.state()["counters"]["optimizer_steps"]);
            let error = write_universal(&*source, &out, OriginalOptions::new(stage, 2), false, &Silent);
            assert!(matches!(error, Err(CheckpointError::Exists { .. })), "{error:?}");
        }
    }
}

#[test]
fn an_empty_client_state_is_none() {
    for blob in [&b""[..], b"{}"] {
        let dir = tempfile::tempdir().unwrap();
        let draft = Draft::begin(dir.path(), "t", 7).unwrap();
        let mut writer = RankWriter::new(draft.folder(), Rank(0), 1);
        let weight = [1.0f32, 2.0];
        let data = Span::from(&weight[..]);
        let slice = SliceSource { name: "w", kind: kind::WEIGHT, shape: &[2], offset: 0, data };
        writer.slice(slice).unwrap();
        writer.blob("client_state", blob.to_vec());
        let record = writer.finish().unwrap();
        let parts = CommitParts {
            world: 1,
            stage: 0,
            dtype: DType::F32,
            params: vec![ParamRecord {
                name: "w".to_owned(),
                shape: vec![2],
                dtype: DType::F32.into(),
                group: Some(0),
            }],
            tied: Vec::new(),
            state: json!({}),
            frozen_excluded: false,
        };
        draft.commit(&[record], parts, true).unwrap();
        let source = open_any(dir.path(), None).unwrap().unwrap();
        for stage in 0..=3 {
            let (tag, options) = (format!("stage{stage}"), OriginalOptions::new(stage, 1));
            write_original(&*source, dir.path(), &tag, options, &Silent).unwrap();
            let written = open_any(dir.path(), Some(&tag)).unwrap().unwrap();
            assert_eq!(read(&*written, "w", kind::WEIGHT, 0..2), weight, "{tag}");
        }
    }
}

#[test]
fn what_has_no_place_in_the_layout_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let source = ours(dir.path(), DType::F32);
    for (stage, world) in [(4, 1), (1, 0)] {
        let error = write_original(&*source, dir.path(), "x", OriginalOptions::new(stage, world), &Silent);
        assert!(matches!(error, Err(CheckpointError::Unsupported { .. })), "{error:?}");
    }
    assert!(!dir.path().join("x").exists());
    let error = open_universal(dir.path(), None).unwrap_err().to_string();
    assert!(error.contains("load_universal"), "{error}");
}

#[test]
fn a_conversion_may_change_the_dtype() {
    let dir = tempfile::tempdir().unwrap();
    let source = ours(dir.path(), DType::F32);
    let options = OriginalOptions { dtype: Some(DType::BF16), ..OriginalOptions::new(2, 2) };
    write_original(&*source, dir.path(), "bf16", options, &Silent).unwrap();
    let written = open_any(dir.path(), Some("bf16")).unwrap().unwrap();
    assert_eq!(written.dtype("up.weight", kind::WEIGHT), Some(DType::BF16));
    assert_eq!(
        read(&*written, "up.weight", kind::MASTER, 0..35),
        read(&*source, "up.weight", kind::WEIGHT, 0..35)
    );
    let expected: Vec<f32> = (0..35).map(|index| bf16::from_f32(value(3, 0, index)).to_f32()).collect();
    assert_eq!(read(&*written, "up.weight", kind::WEIGHT, 0..35), expected);
}

#[test]
fn missing_and_strange_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = ours(dir.path(), DType::BF16);
    for (stage, file, words) in [
        (2, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "ranks [0, 2]"),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt", "ranks [0, 2]"),
        (1, "mp_rank_00_model_states.pt", "is missing"),
    ] {
        let tag = format!("without-{stage}");
        let folder =
            write_original(&*source, dir.path(), &tag, OriginalOptions::new(stage, 3), &Silent).unwrap();
        fs::remove_file(folder.join(file)).unwrap();
        let error = open_any(dir.path(), None).unwrap_err();
        assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains("ours"), "the whole ones are listed: {error}");
    }
    for (name, words) in [
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_00-model_00-model_states.pt", "pipeline parallelism"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "mixture of experts"),
    ] {
        let folder = dir.path().join("parallel");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), "").unwrap();
        let error = open_any(dir.path(), Some("parallel")).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(name), "{error}");
        fs::remove_file(folder.join(name)).unwrap();
    }
    let folder = dir.path().join("old");
    fs::create_dir_all(&folder).unwrap();
    fs::write(
        folder.join("mp_rank_00_model_states.pt"),
        [b"\x80\x02\x8a\x0a".to_vec(), vec![b'x'; 64]].concat(),
    )
    .unwrap();
    let error = open_any(dir.path(), Some("old")).unwrap_err().to_string();
    assert!(error.contains("before 1.6") && error.contains("mp_rank_00_model_states.pt"), "{error}");
}

/// Reads everything there is to read.
fn read_all(dir: &Path) -> Result<(), CheckpointError> {
    let source = open_any(dir, None)?.expect("there is a `latest`");
    source.verify_share(Rank(0), 1)?;
    let mut memory = vec![0.0f32; 64];
    for param in source.params() {
        for kind in source.kinds(&param.name) {
            let numel = param.shape.iter().product::<usize>().min(64);
            source.visit(&param.name, kind, 0..numel, &mut |_, _| {})?;
            if source.dtype(&param.name, kind) == Some(DType::F32) {
                source.read(&param.name, kind, 0..numel, SpanMut::from(&mut memory[..numel]))?;
            }
        }
    }
    for tensor in source.tensors() {
        source.tensor(&tensor.name)?;
    }
    for rank in 0..source.world().min(4) {
        source.blob(Rank::from_index(rank), "client_state")?;
        source.blob(Rank::from_index(rank), "python")?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_byte_or_a_cut_never_panics(
        stage in 0u8..=3,
        which in 0usize..8,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let source = ours(dir.path(), DType::BF16);
        let folder = write_original(&*source, dir.path(), "x", OriginalOptions::new(stage, 2), &Silent).unwrap();
        let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let file = &files[which % files.len()];
        let mut bytes = fs::read(file).unwrap();
        // Most of a file this small is padding: aim at the pickle and at the directory.
        let len = bytes.len();
        for (at, value) in changes {
            let at = at.index(len);
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(len));
        }
        fs::write(file, &bytes).unwrap();
        let cut_short = bytes.len() < len;
        let result = read_all(dir.path());
        prop_assert!(!cut_short || result.is_err());
    }
}
