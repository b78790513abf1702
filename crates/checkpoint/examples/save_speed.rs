//! How fast a checkpoint is written and read beside plain writes and reads of the same bytes to the same disk.
//!
//! ```text
//! cargo run --release -p deepspeed-checkpoint --example save_speed -- DIR [MEGABYTES] [ROUNDS]
//! ```
#![expect(clippy::print_stdout, reason = "a program whose output is its result")]

use std::{
    env,
    error::Error,
    fs::{self, File},
    io::{Read, Write},
    path::Path,
    time::Instant,
};

use deepspeed_checkpoint::{Checkpoint, CommitParts, Draft, ParamRecord, RankWriter, SliceSource, kind};
use deepspeed_core::{AlignedBuffer, DType, ParamSpec, Rank};

const KINDS: [(&str, DType); 4] = [
    (kind::WEIGHT, DType::BF16),
    (kind::MASTER, DType::F32),
    (kind::EXP_AVG, DType::F32),
    (kind::EXP_AVG_SQ, DType::F32),
];
/// Bytes of all kinds of one element.
const ELEMENT_BYTES: usize = 14;
const PARAMS: usize = 24;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let dir = arguments.next().ok_or("usage: save_speed DIR [MEGABYTES] [ROUNDS]")?;
    let megabytes: usize = arguments.next().map_or(Ok(1300), |text| text.parse())?;
    let rounds: usize = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let dir = Path::new(&dir);
    fs::create_dir_all(dir)?;

    let len = megabytes * 1_000_000 / ELEMENT_BYTES / PARAMS;
    let params: Vec<ParamSpec> = (0..PARAMS)
        .map(|i| ParamSpec {
            name: format!("blocks.{i}.weight"),
            shape: vec![len],
            dtype: DType::BF16,
            group: 0,
        })
        .collect();
    // Every page differs, so that nothing below can be clever about zeros.
    let buffers: Vec<AlignedBuffer> = KINDS.iter().map(|(_, dtype)| filled(len, *dtype)).collect();
    let bytes = PARAMS * buffers.iter().map(|buffer| buffer.span().as_bytes().len()).sum::<usize>();

    for round in 0..rounds {
        let plain = timed(|| plain_write(dir, &buffers))?;
        let save = timed(|| save(dir, round as u64, &params, &buffers))?;
        let read_cold = cold(dir).and_then(|()| timed(|| plain_read(dir)))?;
        let read_warm = timed(|| plain_read(dir))?;
        let load_cold = cold(&dir.join("speed")).and_then(|()| timed(|| load(dir, &params, len)))?;
        let load_warm = timed(|| load(dir, &params, len))?;
        let line = |what: &str, it: &Cost| {
            let rate = bytes as f64 / it.wall / 1e6;
            println!("  {what:20} {rate:6.0} MB/s, {:5.2} s, on the CPU {:5.2} s", it.wall, it.cpu);
        };
        println!("round {round}: {} MB", bytes / 1_000_000);
        line("plain write + fsync", &plain);
        line("save", &save);
        line("plain read, cold", &read_cold);
        line("load, cold", &load_cold);
        line("plain read, warm", &read_warm);
        line("load, warm", &load_warm);
    }
    fs::remove_file(dir.join("plain"))?;
    Ok(())
}

fn filled(len: usize, dtype: DType) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::zeroed(len, dtype);
    for (i, byte) in buffer.span_mut().as_bytes_mut().iter_mut().enumerate() {
        *byte = (i.wrapping_mul(2_654_435_761) >> 11) as u8;
    }
    buffer
}

/// Seconds by the clock, and seconds on the processor, which say more on a busy machine.
struct Cost {
    wall: f64,
    cpu: f64,
}

fn timed(work: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<Cost, Box<dyn Error>> {
    let start = Instant::now();
    let cpu = cpu_seconds()?;
    work()?;
    Ok(Cost { wall: start.elapsed().as_secs_f64(), cpu: cpu_seconds()? - cpu })
}

fn cpu_seconds() -> Result<f64, Box<dyn Error>> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds: f64 = text.split_whitespace().next().ok_or("schedstat is empty")?.parse()?;
    Ok(nanoseconds / 1e9)
}

fn plain_write(dir: &Path, buffers: &[AlignedBuffer]) -> Result<(), Box<dyn Error>> {
    let path = dir.join("plain");
    if path.exists() {
        fs::remove_file(&path)?;
    }
    let mut file = File::create(&path)?;
    for _ in 0..PARAMS {
        for buffer in buffers {
            for block in buffer.span().as_bytes().chunks(4 << 20) {
                file.write_all(block)?;
            }
        }
    }
    file.sync_all()?;
    Ok(())
}

/// Makes the system forget what it keeps of the files in a folder.
fn cold(dir: &Path) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_file() {
            rustix::fs::fadvise(File::open(path)?, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}

fn plain_read(dir: &Path) -> Result<(), Box<dyn Error>> {
    let mut file = File::open(dir.join("plain"))?;
    let mut block = vec![0; 4 << 20];
    while file.read(&mut block)? > 0 {}
    Ok(())
}

fn save(
    dir: &Path,
    nonce: u64,
    params: &[ParamSpec],
    buffers: &[AlignedBuffer],
) -> Result<(), Box<dyn Error>> {
    let draft = Draft::begin(dir, "speed", nonce)?;
    let mut writer = RankWriter::new(draft.folder(), Rank(0), 1);
    for spec in params {
        for ((kind, _), buffer) in KINDS.iter().zip(buffers) {
            let data = buffer.span();
            writer.slice(SliceSource { name: &spec.name, kind, shape: &spec.shape, offset: 0, data })?;
        }
    }
    let record = writer.finish()?;
    let parts = CommitParts {
        world: 1,
        stage: 2,
        dtype: DType::BF16,
        params: params.iter().map(ParamRecord::from).collect(),
        tied: Vec::new(),
        state: serde_json::Value::Null,
        frozen_excluded: false,
    };
    draft.commit(&[record], parts, true)?;
    Ok(())
}

fn load(dir: &Path, params: &[ParamSpec], len: usize) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(dir, None)?.ok_or("just saved")?;
    let mut buffers: Vec<AlignedBuffer> =
        KINDS.iter().map(|(_, dtype)| AlignedBuffer::zeroed(len, *dtype)).collect();
    for spec in params {
        for ((kind, _), buffer) in KINDS.iter().zip(&mut buffers) {
            checkpoint.read(&spec.name, kind, 0..len, buffer.span_mut())?;
        }
    }
    Ok(())
}
