//! A model whose every element has a known value, saved and loaded by any world.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod faulty;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use deepspeed_checkpoint::{
    Checkpoint, CommitParts, CopyPair, Draft, ParamRecord, RankRecord, RankWriter, Result, SliceSource,
    Snapshot, SnapshotMemory, TensorSource,
    disk::{Disk, RealDisk},
    draft_folder, kind,
};
use deepspeed_core::{AlignedBuffer, DType, Layout, ParamSpec, Rank, Span, SpanMut};

pub const OPTIMIZER_KINDS: [&str; 3] = [kind::MASTER, kind::EXP_AVG, kind::EXP_AVG_SQ];

/// A model and the number that all its values are derived from, such as the step.
pub struct Model {
    pub params: Vec<ParamSpec>,
    pub seed: u32,
}

impl Model {
    pub fn new(shapes: &[&[usize]], seed: u32) -> Self {
        let params = shapes.iter().enumerate().map(|(i, shape)| ParamSpec {
            name: format!("blocks.{i}.weight"),
            shape: shape.to_vec(),
            dtype: if i % 3 == 2 { DType::F32 } else { DType::BF16 },
            group: i % 2,
        });
        Self { params: params.collect(), seed }
    }

    pub fn small(seed: u32) -> Self {
        Self::new(&[&[7, 5], &[0, 4], &[], &[130], &[3, 1, 11], &[64]], seed)
    }

    /// The bytes of a whole parameter.
    pub fn bytes(&self, param: usize, kind: &str) -> Vec<u8> {
        let spec = &self.params[param];
        let salt = kind.bytes().fold(self.seed, |sum, b| sum.wrapping_mul(31).wrapping_add(b.into()));
        let elements = 0..u32::try_from(spec.numel()).unwrap();
        let values = elements.map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(salt) ^ (param as u32) << 7);
        match self.dtype(param, kind) {
            DType::F32 => values.flat_map(u32::to_le_bytes).collect(),
            _ => values.flat_map(|value| (value as u16).to_le_bytes()).collect(),
        }
    }

    pub fn dtype(&self, param: usize, kind: &str) -> DType {
        if kind == kind::WEIGHT { self.params[param].dtype } else { DType::F32 }
    }

    pub fn buffer(&self, param: usize, kind: &str) -> AlignedBuffer {
        let mut buffer = AlignedBuffer::zeroed(self.params[param].numel(), self.dtype(param, kind));
        buffer.span_mut().as_bytes_mut().copy_from_slice(&self.bytes(param, kind));
        buffer
    }

    pub fn records(&self) -> Vec<ParamRecord> {
        self.params.iter().map(ParamRecord::from).collect()
    }

    pub fn parts(&self, world: usize) -> CommitParts {
        CommitParts {
            world,
            stage: 2,
            dtype: DType::BF16,
            params: self.records(),
            tied: self
                .params
                .first()
                .map(|it| ("head.weight".to_owned(), it.name.clone()))
                .into_iter()
                .collect(),
            state: serde_json::json!({ "global_steps": self.seed, "scale": 1.5 }),
            frozen_excluded: false,
        }
    }

    /// What each rank of `world` owns of each parameter.
    pub fn fragments(&self, world: usize) -> Vec<Vec<deepspeed_core::Fragment>> {
        let layout = Layout::new(self.params.clone(), world, 50).unwrap();
        let of = |rank| {
            let rank = Rank::from_index(rank);
            layout.units.iter().flat_map(move |unit| unit.fragments(unit.shard(rank)).collect::<Vec<_>>())
        };
        (0..world).map(|rank| of(rank).collect()).collect()
    }

    pub fn write_rank(
        &self,
        disk: &Arc<dyn Disk>,
        folder: &Path,
        rank: usize,
        world: usize,
    ) -> Result<RankRecord> {
        #[expect(
            clippy::redundant_closure_for_method_calls,
            reason = "the method itself is not general enough"
        )]
        self.writer(disk, folder, rank, world, |writer| writer.finish())
    }

    /// What a rank has to save, in memory of its own.
    pub fn snapshot(&self, disk: &Arc<dyn Disk>, folder: &Path, rank: usize, world: usize) -> Snapshot {
        let copy = |pairs: Vec<CopyPair<'_>>| {
            pairs.into_iter().for_each(|(from, to)| to.copy_from_slice(from));
        };
        self.writer(disk, folder, rank, world, |writer| writer.snapshot(SnapshotMemory::default(), copy))
            .unwrap()
    }

    /// Calls `work` with everything that a rank has to save.
    pub fn writer<T>(
        &self,
        disk: &Arc<dyn Disk>,
        folder: &Path,
        rank: usize,
        world: usize,
        work: impl FnOnce(RankWriter<'_>) -> Result<T>,
    ) -> Result<T> {
        let kinds: Vec<&str> = std::iter::once(kind::WEIGHT).chain(OPTIMIZER_KINDS).collect();
        let buffers: Vec<Vec<AlignedBuffer>> = (0..self.params.len())
            .map(|param| kinds.iter().map(|kind| self.buffer(param, kind)).collect())
            .collect();
        let running_mean = self.seed.to_le_bytes();
        let mut writer = RankWriter::on(Arc::clone(disk), folder, Rank::from_index(rank), world);
        for fragment in &self.fragments(world)[rank] {
            let spec = &self.params[fragment.param.index()];
            for (kind, buffer) in kinds.iter().zip(&buffers[fragment.param.index()]) {
                let data: Span<'_> = buffer.span().slice(fragment.param_offset, fragment.len);
                let offset = fragment.param_offset;
                writer.slice(SliceSource { name: &spec.name, kind, shape: &spec.shape, offset, data })?;
            }
        }
        if rank == 0 {
            let dtype = "torch.int32".parse().unwrap();
            writer.tensor(TensorSource { name: "bn.steps", dtype, shape: &[], bytes: &running_mean })?;
            writer.blob("client_state", self.seed.to_string().into_bytes());
        }
        writer.blob("rng", vec![rank as u8; 100]);
        work(writer)
    }

    pub fn save_on(&self, disk: &Arc<dyn Disk>, dir: &Path, tag: &str, world: usize) -> Result<PathBuf> {
        self.save_as(disk, dir, tag, world, true)
    }

    /// A save that `latest` does not name.
    pub fn save_aside(&self, dir: &Path, tag: &str) {
        self.save_as(&real_disk(), dir, tag, 1, false).unwrap();
    }

    fn save_as(
        &self,
        disk: &Arc<dyn Disk>,
        dir: &Path,
        tag: &str,
        world: usize,
        latest: bool,
    ) -> Result<PathBuf> {
        let nonce = u64::from(self.seed);
        let draft = Draft::begin_on(Arc::clone(disk), dir, tag, nonce)?;
        assert_eq!(draft.folder(), draft_folder(dir, tag, nonce));
        let records: Result<Vec<RankRecord>> = (0..world)
            .map(|rank| {
                let record = self.write_rank(disk, draft.folder(), rank, world)?;
                RankRecord::from_bytes(&record.to_bytes())
            })
            .collect();
        draft.commit(&records?, self.parts(world), latest)
    }

    pub fn save(&self, dir: &Path, tag: &str, world: usize) -> PathBuf {
        self.save_on(&real_disk(), dir, tag, world).unwrap()
    }

    /// Panics unless the checkpoint holds this model, read as `world` ranks would.
    pub fn assert_in(&self, checkpoint: &Checkpoint, world: usize) {
        assert_eq!(checkpoint.state()["global_steps"], self.seed);
        for fragments in self.fragments(world) {
            for fragment in fragments {
                let param = fragment.param.index();
                let name = &self.params[param].name;
                for kind in std::iter::once(kind::WEIGHT).chain(OPTIMIZER_KINDS) {
                    let range = fragment.param_offset..fragment.param_offset + fragment.len;
                    let dtype = checkpoint.dtype(name, kind).unwrap();
                    let expected =
                        &self.bytes(param, kind)[range.start * dtype.size()..range.end * dtype.size()];
                    let mut read = AlignedBuffer::zeroed(fragment.len, dtype);
                    checkpoint.read(name, kind, range.clone(), read.span_mut()).unwrap();
                    assert_eq!(read.span().as_bytes(), expected, "{name} {kind} {range:?}");
                    let mut visited = Vec::new();
                    checkpoint
                        .visit(name, kind, range.clone(), |start, piece| {
                            assert_eq!(start, range.start + visited.len() / dtype.size());
                            visited.extend_from_slice(piece.as_bytes());
                        })
                        .unwrap();
                    assert_eq!(visited, expected);
                }
            }
        }
        assert_eq!(checkpoint.tensor("bn.steps").unwrap(), self.seed.to_le_bytes());
        let client = checkpoint.blob(Rank(0), "client_state").unwrap().unwrap();
        assert_eq!(client, self.seed.to_string().as_bytes());
    }
}

pub fn real_disk() -> Arc<dyn Disk> {
    Arc::new(RealDisk)
}

pub fn open_latest(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, None).unwrap().unwrap()
}

/// Reads everything there is, in any way there is; errors are fine, panics are not.
pub fn read_everything(checkpoint: &Checkpoint) -> Result<()> {
    checkpoint.verify()?;
    for param in &checkpoint.manifest().params {
        let len: usize = param.shape.iter().product();
        for kind in checkpoint.kinds(&param.name) {
            let dtype = checkpoint.dtype(&param.name, kind).unwrap();
            checkpoint.visit(&param.name, kind, 0..len, |_, _| {})?;
            // Allocated only after the visit has shown that the elements are there.
            let mut all = AlignedBuffer::zeroed(len, dtype);
            checkpoint.read(&param.name, kind, 0..len, all.span_mut())?;
        }
    }
    let names: Vec<String> = checkpoint.tensors().map(|tensor| tensor.name.clone()).collect();
    names.iter().try_for_each(|name| checkpoint.tensor(name).map(drop))?;
    checkpoint.blobs().try_for_each(|(rank, blob)| checkpoint.blob(rank, &blob.name).map(drop))
}

/// One scalar to read into.
pub fn scalar(value: &mut [f32; 1]) -> SpanMut<'_> {
    SpanMut::from(&mut value[..])
}
