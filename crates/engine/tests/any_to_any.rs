//! Saved at any stage, on any number of ranks, with any offload; continued at any other.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::path::Path;

use deepspeed_core::DType;
use deepspeed_engine::{OffloadSettings, SaveSettings, Settings};
use deepspeed_offload::{Depth, Options};
use deepspeed_optim::{LossScaler, OptimizerKind};
use deepspeed_zero::Stage;
use support::{
    Replica, ranks,
    saving::{load, save},
};

const STAGES: [Stage; 4] = [Stage::Zero, Stage::One, Stage::Two, Stage::Three];
const WORLDS: [usize; 4] = [1, 2, 3, 4];
/// Steps before and after the save.
const STEPS: usize = 2;
/// Relative: what fp32 sums over another number of ranks may differ by.
const TOLERANCE: f64 = 1e-6;

/// How a run keeps its state. On a CPU, state that is offloaded to the host's memory lies where it would lie anyway; it is
/// a variant of its own for the number of threads that take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offload {
    None,
    Cpu,
    Nvme,
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    stage: Stage,
    world: usize,
    offload: Offload,
}

fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    for stage in STAGES {
        for world in WORLDS {
            for offload in [Offload::None, Offload::Cpu, Offload::Nvme] {
                all.push(Variant { stage, world, offload });
            }
        }
    }
    all
}

fn settings(variant: Variant, precision: DType, folder: &Path, behind: bool) -> Settings {
    Settings {
        stage: variant.stage,
        precision,
        unit_len: 150,
        threads: if variant.offload == Offload::Cpu { 2 } else { 1 },
        offload: (variant.offload == Offload::Nvme).then(|| OffloadSettings {
            folder: folder.to_owned(),
            ratio: 0.6,
            sub_group_len: usize::MAX,
            options: Options::default(),
            depth: Depth { read_ahead: 1, write_behind: 1 },
        }),
        saving: SaveSettings { behind, ..SaveSettings::default() },
        ..Settings::default()
    }
}

fn replica(settings: Settings, group: std::sync::Arc<dyn deepspeed_comm::Group>) -> Replica {
    let mut replica = Replica::new(settings, OptimizerKind::Adam, LossScaler::fixed(1.0), group);
    replica.same_data = true;
    replica
}

/// The losses of the next steps, and the weights after them.
type Outcome = (Vec<f64>, Vec<u8>);

fn go_on(replica: &mut Replica) -> Outcome {
    let losses = (0..STEPS).map(|_| {
        let loss = replica.loss();
        replica.micro_step().unwrap();
        loss
    });
    (losses.collect(), replica.bytes())
}

fn same(one: &Outcome, other: &Outcome) -> bool {
    one.0.iter().zip(&other.0).all(|(a, b)| (a - b).abs() <= TOLERANCE * a.abs())
}

/// Saves under every variant, continues under every other.
fn all_pairs(precision: DType, behind: bool, pairs: impl Fn(usize, usize) -> bool) {
    let dir = tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" }).unwrap();
    let disk = tempfile::tempdir().unwrap();
    let variants = variants();
    let tag = |variant: usize| format!("v{variant}");
    let mut through: Vec<Outcome> = Vec::new();
    for (number, variant) in variants.iter().enumerate() {
        let outcomes = ranks(variant.world, |group| {
            let mut replica = replica(settings(*variant, precision, disk.path(), behind), group);
            go_on(&mut replica);
            save(&mut replica, dir.path(), &tag(number)).unwrap();
            let outcome = go_on(&mut replica);
            replica.engine.finish_save().unwrap();
            outcome
        });
        through.push(outcomes[0].clone());
    }
    let mut tried = 0;
    for (from, saved) in variants.iter().enumerate() {
        for (to, loaded) in variants.iter().enumerate() {
            if !pairs(from, to) {
                continue;
            }
            tried += 1;
            let again = ranks(loaded.world, |group| {
                let mut replica = replica(settings(*loaded, precision, disk.path(), behind), group);
                load(&mut replica, dir.path(), Some(&tag(from))).unwrap();
                go_on(&mut replica)
            });
            if saved.world == loaded.world {
                assert_eq!(again[0], through[from], "{saved:?} -> {loaded:?}");
            }
            for outcome in &again {
                assert!(same(outcome, &through[from]), "{saved:?} -> {loaded:?}: {outcome:?}");
            }
        }
    }
    assert!(tried > 100, "{tried}");
}

#[test]
fn fp32_from_anywhere_to_anywhere() {
    all_pairs(DType::F32, false, |_, _| true);
}

#[test]
fn bf16_saved_behind_training_on_the_same_world_to_the_bit() {
    let all = variants();
    all_pairs(DType::BF16, true, |from, to| all[from].world == all[to].world && (from + to) % 3 == 0);
}

#[test]
fn precision_may_change() {
    let disk = tempfile::tempdir().unwrap();
    let variant = |stage, world| Variant { stage, world, offload: Offload::None };
    for (from, to) in [
        (DType::BF16, DType::F32),
        (DType::BF16, DType::F16),
        (DType::F32, DType::BF16),
        (DType::F32, DType::F16),
        (DType::F16, DType::F32),
        (DType::F16, DType::BF16),
    ] {
        for (saved, loaded) in [
            (variant(Stage::Two, 2), variant(Stage::Three, 3)),
            (variant(Stage::Three, 3), variant(Stage::One, 1)),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let masters = ranks(saved.world, |group| {
                let mut replica = replica(settings(saved, from, disk.path(), false), group);
                go_on(&mut replica);
                save(&mut replica, dir.path(), "t").unwrap();
                whole_masters(&replica)
            });
            let found = ranks(loaded.world, |group| {
                let mut replica = replica(settings(loaded, to, disk.path(), false), group);
                load(&mut replica, dir.path(), None).unwrap();
                let masters = whole_masters(&replica);
                (masters, go_on(&mut replica).0)
            });
            for (found, losses) in &found {
                // fp32 values survive the way through any dtype of weights.
                assert_eq!(*found, masters[0], "{from} -> {to}");
                assert!(losses.iter().all(|loss| loss.is_finite()));
            }
        }
    }
}

/// The fp32 values of all parameters.
fn whole_masters(replica: &Replica) -> Vec<Vec<f32>> {
    let engine = &replica.engine;
    if engine.settings().precision == DType::F32 {
        return replica.weights.iter().map(|weights| weights.as_f32().to_vec()).collect();
    }
    let params = 0..engine.layout().params.len();
    let whole = |param| {
        let id = deepspeed_core::ParamId::from_index(param);
        engine.whole_state(id, &deepspeed_engine::StateKind::Master).unwrap()
    };
    params.map(whole).collect()
}
