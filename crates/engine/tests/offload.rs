//! Masters and optimizer state on a disk change no bit of what is trained.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::path::Path;

use deepspeed_core::{DType, ParamId, ParamSpec, Span};
use deepspeed_engine::{Engine, OffloadSettings, OptimizerChoice, Settings, StateKind};
use deepspeed_offload::{Depth, Options};
use deepspeed_optim::{Hyper, LossScaler, OptimizerKind};
use deepspeed_zero::Stage;
use support::{Replica, ranks, specs};

const KINDS: [OptimizerKind; 6] = [
    OptimizerKind::Adam,
    OptimizerKind::AdamW,
    OptimizerKind::Sgd,
    OptimizerKind::Adagrad,
    OptimizerKind::Lion,
    OptimizerKind::Lamb,
];

fn settings(stage: Stage, precision: DType) -> Settings {
    Settings { stage, precision, gradient_clipping: 0.8, unit_len: 200, ..Settings::default() }
}

fn on_disk(folder: &Path, ratio: f64, ahead: usize, behind: usize) -> Option<OffloadSettings> {
    Some(OffloadSettings {
        folder: folder.to_owned(),
        ratio,
        sub_group_len: usize::MAX,
        options: Options::default(),
        depth: Depth { read_ahead: ahead, write_behind: behind },
    })
}

/// Weights, norm, and the whole state of every parameter.
type Outcome = (Vec<u8>, Option<f64>, Vec<Vec<f32>>);

fn train(world: usize, kind: OptimizerKind, settings: &Settings) -> Vec<Outcome> {
    ranks(world, |group| {
        let mut replica = Replica::new(settings.clone(), kind, LossScaler::fixed(1.0), group);
        for _ in 0..5 {
            replica.micro_step().unwrap();
        }
        let engine = &replica.engine;
        let mut kinds = vec![StateKind::Master, StateKind::Optimizer(0)];
        kinds.retain(|kind| engine.has_state(kind));
        let states = kinds
            .iter()
            .flat_map(|kind| (0..engine.layout().params.len()).map(move |param| (kind, param)))
            .map(|(kind, param)| engine.whole_state(ParamId::from_index(param), kind).unwrap())
            .collect();
        (replica.bytes(), engine.norm(), states)
    })
}

#[test]
fn a_disk_gives_the_bits_of_memory() {
    let folder = tempfile::tempdir().unwrap();
    for kind in KINDS {
        for (world, stage, precision) in [
            (1, Stage::Two, DType::F32),
            (1, Stage::Three, DType::BF16),
            (2, Stage::One, DType::BF16),
            (2, Stage::Three, DType::F32),
            (3, Stage::Three, DType::F16),
            (3, Stage::Two, DType::BF16),
        ] {
            let memory = settings(stage, precision);
            let expected = train(world, kind, &memory);
            for (ratio, ahead, behind) in [(1.0, 1, 1), (1.0, 0, 0), (0.4, 2, 1)] {
                let offload = on_disk(folder.path(), ratio, ahead, behind);
                let found = train(world, kind, &Settings { offload, ..memory.clone() });
                assert_eq!(found, expected, "{kind} {stage:?} {precision} world {world} ratio {ratio}");
            }
        }
    }
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "nothing is left behind");
}

/// The masters and both moments of one large parameter after three updates, and the bytes that the engine keeps.
fn train_large(world: usize, settings: &Settings) -> Vec<(Vec<Vec<f32>>, usize)> {
    const LEN: usize = 20_000;
    ranks(world, |group| {
        let mut hypers = [Hyper::defaults(OptimizerKind::AdamW)];
        hypers[0].weight_decay = 0.1;
        let spec = ParamSpec { name: "large".to_owned(), shape: vec![LEN], dtype: DType::BF16, group: 0 };
        let choice = OptimizerChoice::Native(OptimizerKind::AdamW);
        let scaler = LossScaler::fixed(1.0);
        let mut engine =
            Engine::new(settings.clone(), vec![spec], vec![], choice, &hypers, scaler, group).unwrap();
        let first: Vec<f32> = (0..LEN).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
        engine.load_masters(&[Span::from(&first[..])]).unwrap();
        engine.fill_weights(&[Span::from(&first[..])], &[]).unwrap();
        for step in 0..3 {
            let gradient: Vec<f32> = (0..LEN).map(|i| ((i * 31 + step) % 89) as f32 / 89.0 - 0.4).collect();
            engine.end_backward(&vec![Some(Span::from(&gradient[..]))], 1.0).unwrap();
            engine.step(&hypers, &mut []).unwrap();
        }
        let kinds = [StateKind::Master, StateKind::Optimizer(0), StateKind::Optimizer(1)];
        let state = kinds.map(|kind| engine.whole_state(ParamId::from_index(0), &kind).unwrap());
        (state.to_vec(), engine.resident_bytes())
    })
}

#[test]
fn a_unit_may_stream_in_pieces() {
    let folder = tempfile::tempdir().unwrap();
    for world in [1, 2] {
        let memory = settings(Stage::Three, DType::BF16);
        let whole = Settings { offload: on_disk(folder.path(), 1.0, 1, 1), ..memory.clone() };
        let mut cut = whole.clone();
        cut.offload.as_mut().unwrap().sub_group_len = 3000;
        let [memory, whole, cut] = [memory, whole, cut].map(|settings| train_large(world, &settings));
        for ((memory, whole), cut) in memory.iter().zip(&whole).zip(&cut) {
            assert!(memory.0 == whole.0 && memory.0 == cut.0, "the same bits, world {world}");
            assert!(cut.1 * 2 < whole.1, "{} and {} bytes", cut.1, whole.1);
        }
    }
}

#[test]
fn weights_in_a_file_give_the_bits_of_memory() {
    let folder = tempfile::tempdir().unwrap();
    for world in [1, 2] {
        let memory = settings(Stage::Three, DType::BF16);
        let weights_folder = Some(folder.path().to_owned());
        let file = Settings { weights_folder, offload: on_disk(folder.path(), 1.0, 1, 1), ..memory.clone() };
        assert_eq!(train(world, OptimizerKind::Adam, &file), train(world, OptimizerKind::Adam, &memory));
    }
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn what_cannot_stream_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let make = |choice: OptimizerChoice, kind: OptimizerKind, folder: &Path| {
        ranks(1, |group| {
            let settings =
                Settings { offload: on_disk(folder, 1.0, 1, 1), ..settings(Stage::Two, DType::F32) };
            let hypers = [Hyper::defaults(kind), Hyper::defaults(kind)];
            let scaler = LossScaler::fixed(1.0);
            Engine::new(settings, specs(DType::F32), vec![], choice.clone(), &hypers, scaler, group)
                .map(drop)
                .unwrap_err()
                .to_string()
        })
        .remove(0)
    };
    let class = "torch.optim.adamw.AdamW".to_owned();
    let client = make(OptimizerChoice::Client { class }, OptimizerKind::Adam, folder.path());
    assert!(client.contains("makes its state itself"), "{client}");
    let missing = folder.path().join("nowhere");
    let nowhere = make(OptimizerChoice::Native(OptimizerKind::Adam), OptimizerKind::Adam, &missing);
    assert!(nowhere.contains("nowhere"), "{nowhere}");
}
