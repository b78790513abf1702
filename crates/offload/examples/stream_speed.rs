//! How fast optimizer state streams through memory, beside a plain direct copy of the same bytes, in turns.
//!
//! ```text
//! cargo run --release -p deepspeed-offload --example stream_speed -- FOLDER [GIGABYTES] [ROUNDS] [PIECE_ELEMENTS] [QUEUE_DEPTH] [BLOCK_KB]
//! ```
//!
//! The stream reads and writes back master, `exp_avg` and `exp_avg_sq` (12 bytes each way per element) and touches a
//! number of each page: what is measured is the way, not the update. The plain copies read and write back the same number of bytes of a file of their own with `O_DIRECT` in blocks
//! of 16 MiB: one after the other (what `dd` does), and with a reading and a writing thread side by side (the best that
//! plain calls do). Both figures count read and written bytes.
#![expect(clippy::print_stdout, reason = "a program whose output is its result")]

use std::{
    env,
    error::Error,
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::mpsc,
    thread,
    time::Instant,
};

use deepspeed_core::{AlignedBuffer, DType};
use deepspeed_offload::{Access, Depth, EngineChoice, Item, Lane, Options, Store, Stream};
use rustix::fs::OFlags;

/// Bytes in one plain read or write.
const BLOCK: usize = 16 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let folder = arguments
        .next()
        .ok_or("usage: stream_speed FOLDER [GIGABYTES] [ROUNDS] [PIECE_ELEMENTS] [QUEUE_DEPTH] [BLOCK_KB]")?;
    let gigabytes: f64 = arguments.next().map_or(Ok(2.0), |text| text.parse())?;
    let rounds = arguments.next().map_or(Ok(5), |text| text.parse::<usize>())?.max(1);
    let piece: usize = arguments.next().map_or(Ok(2 << 20), |text| text.parse())?;
    let queue_depth: usize =
        arguments.next().map_or(Ok(Options::default().queue_depth), |text| text.parse())?;
    let block_kb: usize = arguments.next().map_or(Ok(1024), |text| text.parse())?;
    let folder = Path::new(&folder);
    let len = (gigabytes * 1e9 / 12.0) as usize;

    let plain = PlainFile::create(folder, 12 * len)?;
    let mut streams = Vec::new();
    for engine in [EngineChoice::Auto, EngineChoice::Threads] {
        let options = Options { engine, queue_depth, block_size: block_kb << 10, ..Options::default() };
        let stream = StateStream::new(folder, len, piece, &options)?;
        println!("stream: {}", stream.store.describe());
        println!("        {} MB of buffers", stream.stream.buffer_bytes() / 1_000_000);
        streams.push(stream);
    }
    println!(
        "\nGB/s, read + written: plain one by one, side by side; stream over the first engine, the second"
    );
    // The first writes to reserved space also make its metadata: not what a step sees.
    plain.one_by_one()?;
    for stream in &mut streams {
        stream.run()?;
    }
    // Of each engine: its speed by that of the plain copy one by one, and side by side.
    let mut ratios = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    for round in 1..=rounds {
        let gb = 2.0 * 12.0 * len as f64 / 1e9;
        let alone = gb / timed(|| plain.one_by_one())?;
        let first = gb / timed(|| streams[0].run())?;
        let beside = gb / timed(|| plain.side_by_side())?;
        let second = gb / timed(|| streams[1].run())?;
        println!("round {round:2}: {alone:6.2} {beside:6.2}; {first:6.2} {second:6.2}");
        for (ratios, speed) in ratios.iter_mut().zip([first, second]) {
            ratios[0].push(speed / alone);
            ratios[1].push(speed / beside);
        }
    }
    for (stream, [alone, beside]) in streams.iter().zip(ratios) {
        println!(
            "{:?}: {} of the plain copy one by one, {} of the one side by side",
            stream.store.describe().engine,
            spread(alone),
            spread(beside)
        );
    }
    Ok(())
}

/// The median of ratios, and their range.
fn spread(mut ratios: Vec<f64>) -> String {
    ratios.sort_by(f64::total_cmp);
    let [lowest, median, highest] = [0, ratios.len() / 2, ratios.len() - 1].map(|i| 100.0 * ratios[i]);
    format!("{median:.0}% ({lowest:.0} to {highest:.0})")
}

/// Seconds that `work` takes.
fn timed(work: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// The state of an Adam optimizer in a store.
struct StateStream {
    store: Store,
    items: Vec<Item>,
    stream: Stream,
}

impl StateStream {
    fn new(folder: &Path, len: usize, piece: usize, options: &Options) -> Result<Self, Box<dyn Error>> {
        let store = Store::create(folder, 3 * Store::bytes_of(len, DType::F32), options)?;
        let regions = [
            store.allocate(len, DType::F32)?,
            store.allocate(len, DType::F32)?,
            store.allocate(len, DType::F32)?,
        ];
        let items: Vec<Item> = Item::cut(0, &regions, piece).collect();
        let stream = Stream::new(&store, &[Lane::f32(piece); 3], Depth::default());
        Ok(Self { store, items, stream })
    }

    /// One step of the optimizer.
    fn run(&mut self) -> Result<(), Box<dyn Error>> {
        let mut pass = self.stream.pass(&self.items, &[Access::Update; 3])?;
        while let Some(mut loaded) = pass.load_next()? {
            loaded.f32_slices().into_iter().flatten().step_by(1024).for_each(|x| *x += 1.0);
            loaded.write_back()?;
        }
        pass.finish()?;
        Ok(())
    }
}

/// A file that is read and written back with plain direct calls.
struct PlainFile {
    file: File,
    blocks: u64,
}

impl PlainFile {
    fn create(folder: &Path, bytes: usize) -> io::Result<Self> {
        let flags = (OFlags::TMPFILE | OFlags::DIRECT).bits() as i32;
        let file = File::options().read(true).write(true).custom_flags(flags).open(folder)?;
        let blocks = bytes.div_ceil(BLOCK) as u64;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, blocks * BLOCK as u64)?;
        Ok(Self { file, blocks })
    }

    /// Reads a block, writes it back, and so on.
    fn one_by_one(&self) -> Result<(), Box<dyn Error>> {
        let mut buffer = AlignedBuffer::zeroed(BLOCK / 4, DType::F32);
        for block in 0..self.blocks {
            self.file.read_exact_at(buffer.span_mut().as_bytes_mut(), block * BLOCK as u64)?;
            self.file.write_all_at(buffer.span().as_bytes(), block * BLOCK as u64)?;
        }
        Ok(())
    }

    /// One thread reads blocks, another writes them back.
    fn side_by_side(&self) -> Result<(), Box<dyn Error>> {
        let (full, to_write) = mpsc::sync_channel::<(u64, AlignedBuffer)>(2);
        let (empty, to_fill) = mpsc::channel();
        for _ in 0..4 {
            empty.send(AlignedBuffer::zeroed(BLOCK / 4, DType::F32))?;
        }
        thread::scope(|scope| {
            let writer = scope.spawn(move || -> io::Result<()> {
                for (block, buffer) in to_write {
                    self.file.write_all_at(buffer.span().as_bytes(), block * BLOCK as u64)?;
                    if empty.send(buffer).is_err() {
                        break;
                    }
                }
                Ok(())
            });
            for block in 0..self.blocks {
                let mut buffer: AlignedBuffer = to_fill.recv()?;
                self.file.read_exact_at(buffer.span_mut().as_bytes_mut(), block * BLOCK as u64)?;
                full.send((block, buffer))?;
            }
            drop(full);
            writer.join().map_err(|_| "the writer panicked")??;
            Ok(())
        })
    }
}
