//! A rank reads the slices it needs, and no others.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::{collections::HashMap, ops::Range, path::Path, sync::Mutex};

use deepspeed_checkpoint::{Checkpoint, ParamRecord, Result, Source, TensorFacts, kind};
use deepspeed_core::{DType, Rank, Span, SpanMut};
use deepspeed_engine::{LoadOptions, SaveSettings, Settings};
use deepspeed_optim::{LossScaler, OptimizerKind};
use deepspeed_zero::Stage;
use serde_json::Value;
use support::{Replica, ranks, saving::save};

/// What was read of each kind of each parameter.
type Reads = HashMap<(String, String), Vec<Range<usize>>>;

/// A checkpoint that writes down what is read of it.
#[derive(Debug)]
struct Noting {
    checkpoint: Checkpoint,
    reads: Mutex<Reads>,
}

impl Noting {
    fn note(&self, name: &str, kind: &str, range: Range<usize>) {
        let key = (name.to_owned(), kind.to_owned());
        self.reads.lock().unwrap().entry(key).or_default().push(range);
    }
}

impl Source for Noting {
    fn read(&self, name: &str, kind: &str, range: Range<usize>, dst: SpanMut<'_>) -> Result<()> {
        self.note(name, kind, range.clone());
        self.checkpoint.read(name, kind, range, dst)
    }

    fn visit(
        &self,
        name: &str,
        kind: &str,
        range: Range<usize>,
        visit: &mut dyn FnMut(usize, Span<'_>),
    ) -> Result<()> {
        self.note(name, kind, range.clone());
        self.checkpoint.visit(name, kind, range, visit)
    }

    fn format(&self) -> String {
        Source::format(&self.checkpoint)
    }

    fn tag(&self) -> &str {
        self.checkpoint.tag()
    }

    fn folder(&self) -> &Path {
        self.checkpoint.folder()
    }

    fn world(&self) -> usize {
        self.checkpoint.world()
    }

    fn stage(&self) -> Option<u8> {
        self.checkpoint.stage()
    }

    fn params(&self) -> &[ParamRecord] {
        self.checkpoint.params()
    }

    fn param(&self, name: &str) -> Option<&ParamRecord> {
        self.checkpoint.param(name)
    }

    fn tied(&self) -> &[(String, String)] {
        self.checkpoint.tied()
    }

    fn kinds(&self, name: &str) -> Vec<&str> {
        self.checkpoint.kinds(name)
    }

    fn dtype(&self, name: &str, kind: &str) -> Option<DType> {
        self.checkpoint.dtype(name, kind)
    }

    fn tensors(&self) -> Vec<TensorFacts> {
        Source::tensors(&self.checkpoint)
    }

    fn tensor(&self, name: &str) -> Result<Vec<u8>> {
        self.checkpoint.tensor(name)
    }

    fn state(&self) -> &Value {
        self.checkpoint.state()
    }

    fn blob(&self, rank: Rank, name: &str) -> Result<Option<Vec<u8>>> {
        self.checkpoint.blob(rank, name)
    }

    fn verify_share(&self, rank: Rank, world: usize) -> Result<()> {
        self.checkpoint.verify_share(rank, world)
    }
}

fn replica(stage: Stage, group: std::sync::Arc<dyn deepspeed_comm::Group>) -> Replica {
    let saving = SaveSettings::default();
    let settings = Settings { stage, precision: DType::BF16, unit_len: 150, saving, ..Settings::default() };
    Replica::new(settings, OptimizerKind::Adam, LossScaler::fixed(1.0), group)
}

/// What each rank reads when `world` ranks load at `stage` what three ranks saved at stage 2.
fn loaded(dir: &Path, stage: Stage, world: usize) -> Vec<Reads> {
    ranks(world, |group| {
        let mut replica = replica(stage, group);
        let checkpoint = Checkpoint::open(dir, None).unwrap().unwrap();
        let noting = Noting { checkpoint, reads: Mutex::default() };
        let options = LoadOptions { weights: true, module_only: false, optimizer_states: true, strict: true };
        let mut weights: Vec<SpanMut<'_>> = replica.weights.iter_mut().map(|it| it.span_mut()).collect();
        replica.engine.load_from(&noting, options, &replica.hypers, &mut weights, &mut []).unwrap();
        noting.reads.into_inner().unwrap()
    })
}

/// Whether the ranges are all elements of a parameter, each once.
fn is_whole(mut ranges: Vec<Range<usize>>, numel: usize) -> bool {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut end = 0;
    ranges.iter().all(|range| std::mem::replace(&mut end, range.end) == range.start) && end == numel
}

#[test]
fn each_element_is_read_by_the_ranks_that_hold_it_and_once_by_each() {
    let dir = tempfile::tempdir().unwrap();
    ranks(3, |group| {
        let mut replica = replica(Stage::Two, group);
        replica.micro_step().unwrap();
        save(&mut replica, dir.path(), "t").map(drop)
    })
    .into_iter()
    .for_each(|saved| saved.unwrap());
    let checkpoint = Checkpoint::open(dir.path(), None).unwrap().unwrap();
    for stage in [Stage::Zero, Stage::One, Stage::Two, Stage::Three] {
        for world in 1..=4 {
            let reads = loaded(dir.path(), stage, world);
            for param in checkpoint.params() {
                let numel: usize = param.shape.iter().product();
                let of = |reads: &Reads, kind: &str| {
                    reads.get(&(param.name.clone(), kind.to_owned())).cloned().unwrap_or_default()
                };
                // State is sharded at every stage: what one rank reads no other does.
                for kind in [kind::MASTER, kind::EXP_AVG, kind::EXP_AVG_SQ] {
                    let all = reads.iter().flat_map(|reads| of(reads, kind)).collect();
                    assert!(is_whole(all, numel), "{kind} of {} at {stage:?} of {world}", param.name);
                }
                // Weights are whole on every rank, or sharded.
                if stage == Stage::Three {
                    let all = reads.iter().flat_map(|reads| of(reads, kind::WEIGHT)).collect();
                    assert!(is_whole(all, numel), "weights of {} of {world}", param.name);
                } else {
                    let each = reads.iter().all(|reads| is_whole(of(reads, kind::WEIGHT), numel));
                    assert!(each, "weights of {} at {stage:?} of {world}", param.name);
                }
            }
        }
    }
}
