//! What is done with bytes from outside, whatever they are: no panic, no hang, no allocation larger than the bytes justify.
//!
//! Each target puts the bytes where a hostile checkpoint would have them and opens it through the public doors. Errors are
//! fine. libFuzzer drives the targets through `fuzz_targets/`, and `crates/checkpoint/tests/hostile.rs` runs the corpus and
//! mutations of it with every test run.

use std::{
    fs,
    path::{Path, PathBuf},
};

use deepspeed_checkpoint::{
    Checkpoint, Checksum, CommitParts, Draft, OriginalOptions, ParamRecord, RankRecord, RankWriter, Silent,
    SliceSource, Source, TensorSource,
    diff::diff,
    export::{ExportPlan, read_tensor},
    inspect::{inspect, inspect_dir},
    kind, open_any, write_original,
};
use deepspeed_core::{AlignedBuffer, DType, ParamSpec, Rank, Span};

/// Something that bytes are done with.
pub type Target = fn(&[u8]);

/// The targets, each with the name of its folder in the corpus.
pub const TARGETS: [(&str, Target); 6] = [
    ("manifest", manifest),
    ("header", header),
    ("record", record),
    ("latest", latest),
    ("pickle", pickle),
    ("torch_file", torch_file),
];

/// The tag of the checkpoint that is attacked.
const TAG: &str = "t";
/// Elements of each parameter.
const SHAPE: [usize; 2] = [3, 5];
/// Files of the original's checkpoints that are attacked.
const MODEL_FILE: &str = "mp_rank_00_model_states.pt";
const OPTIMIZER_FILE: &str = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt";
/// Views may repeat elements; beyond this many, what the library would allocate for them is not asked for.
const MAX_ELEMENTS: usize = 1 << 20;

/// The bytes are the manifest of a checkpoint whose files are in order.
pub fn manifest(data: &[u8]) {
    with_room(|room| {
        let folder = room.valid();
        write_manifest(&folder, data);
        open_and_read(&room.dir, TAG);
    });
}

/// The bytes are a file of a checkpoint whose manifest says that it is as it should be.
pub fn header(data: &[u8]) {
    const CHUNK: usize = 4 << 20;
    if data.len() < 16 {
        return;
    }
    with_room(|room| {
        let folder = room.dir.join(TAG);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a folder for the input");
        let name = "weights-rank-00000-of-00001.safetensors";
        fs::write(folder.join(name), data).expect("a file for the input");
        let checksums: Vec<String> =
            data.chunks(CHUNK).map(|chunk| Checksum::of(chunk).to_string()).collect();
        let manifest = serde_json::json!({
            "format": "deepspeed-checkpoint", "format_version": 1, "writer": "", "saved_at_ms": 0, "world": 1, "stage": 0,
            "dtype": "F32", "frozen_excluded": false, "state": null, "chunk_bytes": CHUNK,
            "params": [{"name": "w", "shape": [4], "dtype": "F32", "group": 0}],
            "files": [{"name": name, "rank": 0, "bytes": data.len(), "checksums": checksums, "slices": [
                {"param": "w", "kind": "weight", "start": 0, "len": 4, "dtype": "F32", "offset": data.len() - 16, "key": "w"},
            ]}],
        });
        write_manifest(&folder, manifest.to_string().as_bytes());
        open_and_read(&room.dir, TAG);
    });
}

/// The bytes are what a rank reports of the files that it has written.
pub fn record(data: &[u8]) {
    let Ok(record) = RankRecord::from_bytes(data) else { return };
    with_room(|room| {
        let _ = fs::remove_dir_all(room.dir.join(TAG));
        let draft = Draft::begin(&room.dir, TAG, 1).expect("a folder for the draft");
        write_rank(draft.folder(), 0, 1);
        if draft.commit(&[record], parts(1), true).is_ok() {
            open_and_read(&room.dir, TAG);
        }
    });
}

/// The bytes are the file `latest`.
pub fn latest(data: &[u8]) {
    with_room(|room| {
        room.valid();
        fs::write(room.dir.join("latest"), data).expect("a file for the input");
        open_and_read(&room.dir, TAG);
        let _ = Checkpoint::open(&room.dir, None);
        if let Ok(text) = std::str::from_utf8(data) {
            let _ = open_any(&room.dir, Some(text));
        }
    });
}

/// The bytes are the pickle in a file of the original, of which the storages are in order: the model's and the optimizer's
/// in one file (stage 0), or the optimizer's (stage 2).
pub fn pickle(data: &[u8]) {
    let storages: Vec<String> = (0..64).map(|number| format!("archive/data/{number}")).collect();
    let mut entries: Vec<(&str, &[u8])> = vec![("archive/data.pkl", data)];
    entries.extend(storages.iter().map(|name| (name.as_str(), &[0u8; 512] as &[u8])));
    let file = archive(&entries);
    with_room(|room| {
        for (stage, name) in [(0, MODEL_FILE), (2, OPTIMIZER_FILE)] {
            let tag = room.original(stage);
            fs::write(room.dir.join(&tag).join(name), &file).expect("a file for the input");
            open_and_read(&room.dir, &tag);
        }
    });
}

/// The bytes are a file of the original.
pub fn torch_file(data: &[u8]) {
    with_room(|room| {
        let tag = room.original(0);
        fs::write(room.dir.join(&tag).join(MODEL_FILE), data).expect("a file for the input");
        open_and_read(&room.dir, &tag);
    });
}

/// A zip archive whose entries are stored as they are, without checksums.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let offset = (file.len() as u32).to_le_bytes();
        let size = (bytes.len() as u32).to_le_bytes();
        let name_len = (name.len() as u16).to_le_bytes();
        file.extend([b"PK\x03\x04" as &[u8], &[0; 14], &size, &size, &name_len, &[0; 2]].concat());
        file.extend([name.as_bytes(), bytes].concat());
        directory.extend([b"PK\x01\x02" as &[u8], &[0; 16], &size, &size, &name_len].concat());
        directory.extend([&[0u8; 12] as &[u8], &offset, name.as_bytes()].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let (len, start) = ((directory.len() as u32).to_le_bytes(), (file.len() as u32).to_le_bytes());
    file.extend(directory);
    file.extend([b"PK\x05\x06" as &[u8], &[0; 4], &count, &count, &len, &start, &[0; 2]].concat());
    file
}

/// The file of a checkpoint that a target takes as its bytes, undamaged: where mutations begin.
pub fn valid_input(target: &str) -> Vec<u8> {
    let mut found = Vec::new();
    with_room(|room| {
        let folder = room.valid();
        found = match target {
            "manifest" => fs::read(folder.join("manifest.json")).expect("a manifest"),
            "header" => {
                // Its parameter is the last in the file, as the target's manifest has it.
                let header =
                    format!("{:<4088}", r#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#);
                [&4088u64.to_le_bytes()[..], header.as_bytes(), &[7; 16]].concat()
            }
            "record" => {
                let draft = Draft::begin(&room.dir, "r", 1).expect("a folder for the draft");
                write_rank(draft.folder(), 0, 1).to_bytes()
            }
            "torch_file" => room.model_file(),
            "pickle" => {
                let file = room.model_file();
                // It is the first entry: behind its header, up to the note of its size.
                let at = |offset: usize| usize::from(u16::from_le_bytes([file[offset], file[offset + 1]]));
                let start = 30 + at(26) + at(28);
                let len = file[start..].windows(4).position(|bytes| bytes == b"PK\x07\x08");
                file[start..start + len.expect("a note of the size")].to_vec()
            }
            _ => b"t".to_vec(),
        };
    });
    found
}

/// Opens `tag` and reads all of it, in every way there is.
fn open_and_read(dir: &Path, tag: &str) {
    let _ = inspect_dir(dir);
    if let Ok(Some(source)) = open_any(dir, Some(tag)) {
        let _ = read_everything(&*source);
    }
}

fn read_everything(source: &dyn Source) -> deepspeed_checkpoint::Result<()> {
    let _ = inspect(source);
    let plan = ExportPlan::new(source, DType::BF16, false);
    let _ = plan.shards(1000).len();
    source.verify_share(Rank(0), 1)?;
    for param in source.params() {
        let numel: usize = param.shape.iter().product();
        if numel > MAX_ELEMENTS {
            continue;
        }
        for kind in source.kinds(&param.name) {
            let Some(dtype) = source.dtype(&param.name, kind) else { continue };
            source.visit(&param.name, kind, 0..numel, &mut |_, _| {})?;
            // Allocated only after the visit has shown that the elements are there.
            let mut all = AlignedBuffer::zeroed(numel, dtype);
            source.read(&param.name, kind, 0..numel, all.span_mut())?;
        }
    }
    let small = |shape: &[usize]| shape.iter().product::<usize>() <= MAX_ELEMENTS;
    for tensor in plan.tensors.iter().filter(|tensor| small(&tensor.shape)) {
        read_tensor(source, tensor, |_| Ok(()))?;
    }
    for rank in 0..source.world().min(4) {
        for name in ["python", "client_state"] {
            let _ = source.blob(Rank::from_index(rank), name)?;
        }
    }
    diff(source, source, &Silent).map(drop)
}

/// A folder of this thread's own, in memory where the system has such.
struct Room {
    dir: PathBuf,
}

impl Room {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let name = format!("deepspeed-fuzz-{}-{:?}", std::process::id(), std::thread::current().id());
        let dir = parent.join(name);
        fs::create_dir_all(&dir).expect("a folder for inputs");
        Self { dir }
    }

    /// Makes the checkpoint valid again; its folder.
    fn valid(&self) -> PathBuf {
        let folder = self.dir.join(TAG);
        if !folder.join("optimizer-rank-00001-of-00002.safetensors").exists() {
            let _ = fs::remove_dir_all(&folder);
            let draft = Draft::begin(&self.dir, TAG, 1).expect("a folder for the draft");
            let records: Vec<RankRecord> = (0..2).map(|rank| write_rank(draft.folder(), rank, 2)).collect();
            draft.commit(&records, parts(2), true).expect("a valid checkpoint");
        }
        folder
    }
}

impl Room {
    /// Makes a checkpoint of one rank in the original's layout, whole; its tag.
    fn original(&self, stage: u8) -> String {
        let tag = format!("stage{stage}");
        if !self.dir.join(&tag).exists() {
            // Other targets may have been at it.
            let _ = fs::remove_dir_all(self.dir.join(TAG));
            self.valid();
            let source = open_any(&self.dir, Some(TAG)).ok().flatten().expect("a valid checkpoint");
            write_original(&*source, &self.dir, &tag, OriginalOptions::new(stage, 1), &Silent)
                .expect("a checkpoint of the original");
        }
        tag
    }

    /// The file of a checkpoint of stage 0, undamaged.
    fn model_file(&self) -> Vec<u8> {
        let _ = fs::remove_dir_all(self.dir.join("stage0"));
        let tag = self.original(0);
        fs::read(self.dir.join(tag).join(MODEL_FILE)).expect("a model file")
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn with_room(work: impl FnOnce(&Room)) {
    thread_local! {
        static ROOM: Room = Room::new();
    }
    ROOM.with(|room| work(room));
}

fn write_manifest(folder: &Path, text: &[u8]) {
    fs::write(folder.join("manifest.json"), text).expect("a file for the manifest");
    let checksum = format!("{}  manifest.json\n", Checksum::of(text));
    fs::write(folder.join("manifest.xxh3"), checksum).expect("a file for the checksum");
}

fn specs() -> Vec<ParamSpec> {
    let spec =
        |name: &str, dtype| ParamSpec { name: name.to_owned(), shape: SHAPE.to_vec(), dtype, group: 0 };
    vec![spec("a", DType::BF16), spec("b", DType::F32)]
}

fn parts(world: usize) -> CommitParts {
    CommitParts {
        world,
        stage: 1,
        dtype: DType::BF16,
        params: specs().iter().map(ParamRecord::from).collect(),
        tied: vec![("c".to_owned(), "a".to_owned())],
        state: serde_json::json!({ "counters": { "global_steps": 1 } }),
        frozen_excluded: false,
    }
}

/// Writes what `rank` of `world` has of each parameter: an equal part.
fn write_rank(folder: &Path, rank: usize, world: usize) -> RankRecord {
    let numel: usize = SHAPE.iter().product();
    let (start, end) = (rank * numel / world, (rank + 1) * numel / world);
    let memory = AlignedBuffer::zeroed(end - start, DType::F32);
    let half = AlignedBuffer::zeroed(end - start, DType::BF16);
    let specs = specs();
    let mut writer = RankWriter::new(folder, Rank::from_index(rank), world);
    for spec in &specs {
        for kind in [kind::WEIGHT, kind::MASTER, kind::EXP_AVG] {
            let narrow = kind == kind::WEIGHT && spec.dtype == DType::BF16;
            let data: Span<'_> = if narrow { half.span() } else { memory.span() };
            let slice = SliceSource { name: &spec.name, kind, shape: &spec.shape, offset: start, data };
            writer.slice(slice).expect("a slice of the parameter");
        }
    }
    if rank == 0 {
        let dtype = "int64".parse().expect("a dtype");
        writer
            .tensor(TensorSource { name: "steps", dtype, shape: &[], bytes: &[1; 8] })
            .expect("a tensor of 8 bytes");
    }
    writer.blob("client_state", b"{}".to_vec());
    writer.finish().expect("a file is written")
}
