//! Collectives between processes of this host, against a plain copy by as many processes at the same time.
//!
//! `cargo bench -p deepspeed-comm`; `BENCH_WORLD` (2), `BENCH_MIB` (32) and `BENCH_RING` (bytes) change the case,
//! `BENCH_MS` (2000) how long each is measured.
//! GB/s are bytes of the whole array over the time of one call on one rank.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark program")]

use std::{
    hint::black_box,
    process::{Child, Command},
    time::{Duration, Instant},
};

use deepspeed_comm::{Group, Into, Options, Pieces, PiecesMut, Segment, SharedMemory};
use deepspeed_core::{AlignedBuffer, DType, Rank, Span, SpanMut};

const RANK: &str = "BENCH_RANK";

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn main() {
    let mut options = Options { deadline: Duration::from_secs(60), ..Options::default() };
    options.ring_bytes = number("BENCH_RING", options.ring_bytes);
    if let Ok(seat) = std::env::var(RANK) {
        let (rank, handle) = seat.split_once(' ').unwrap();
        let segment = Segment::open(handle).unwrap();
        let group = SharedMemory::join(&segment, Rank(rank.parse().unwrap()), &options).unwrap();
        return run(&group);
    }
    let segment = Segment::create(number("BENCH_WORLD", 2), &options).unwrap();
    let ranks: Vec<Child> = (0..segment.world())
        .map(|rank| {
            let seat = format!("{rank} {}", segment.handle().unwrap());
            Command::new(std::env::current_exe().unwrap()).env(RANK, seat).spawn().unwrap()
        })
        .collect();
    for mut rank in ranks {
        assert!(rank.wait().unwrap().success());
    }
}

/// Calls `body` for a while, every rank equally often, and says how long it takes.
fn measure(group: &SharedMemory, name: &str, bytes: usize, mut body: impl FnMut()) {
    body();
    let mut times = Vec::new();
    let start = Instant::now();
    loop {
        for _ in 0..10 {
            group.barrier("bench").unwrap();
            let begin = Instant::now();
            body();
            times.push(begin.elapsed().as_secs_f64());
        }
        let done = u8::from(start.elapsed() > Duration::from_millis(number("BENCH_MS", 2000) as u64));
        if group.all_gather_bytes("done", &[done]).unwrap().iter().any(|votes| votes[0] == 1) {
            break;
        }
    }
    times.sort_by(f64::total_cmp);
    let (best, median) = (times[0], times[times.len() / 2]);
    if group.rank().0 == 0 {
        if bytes == 0 {
            println!("{name:32} median {:9.2} us   best {:9.2} us", median * 1e6, best * 1e6);
        } else {
            let rate = |time: f64| bytes as f64 / time / 1e9;
            println!("{name:32} median {:6.2} GB/s   best {:6.2} GB/s", rate(median), rate(best));
        }
    }
}

fn run(group: &SharedMemory) {
    let world = group.world();
    let len = number("BENCH_MIB", 32) << 18;
    let bytes = len * 4;
    let (mut data, mut other) = (vec![1.0f32; len], vec![0.0f32; len]);
    if group.rank().0 == 0 {
        println!(
            "{world} processes, {} MiB, ring {} KiB",
            bytes >> 20,
            number("BENCH_RING", Options::default().ring_bytes) >> 10
        );
    }
    measure(group, "copy", bytes, || black_box(&mut other).copy_from_slice(black_box(&data)));
    for part in [1 << 16, len / 2] {
        let inputs = [Span::from(&data[..part]), Span::from(&data[len - part..])];
        measure(group, &format!("reduce_ranks of 2 x {part}"), part * 8, || {
            for start in (0..part).step_by(4096) {
                let block = inputs.map(|input| input.slice(start, 4096));
                black_box(deepspeed_kernels::reduce_ranks(
                    &block,
                    0.5,
                    &mut other[start..start + 4096],
                    false,
                ));
            }
        });
    }
    measure(group, "all_reduce fp32", bytes, || {
        group.all_reduce("bench", &mut data).unwrap();
        black_box(&mut data);
    });
    data.fill(1.0);
    for dtype in [DType::F32, DType::BF16] {
        let mut input = AlignedBuffer::zeroed(len, dtype);
        deepspeed_kernels::cast(Span::from(&data[..]), input.span_mut());
        let bytes = len * dtype.size();
        let shard_len = len / world;
        let mut shard = vec![0.0f32; shard_len];
        measure(group, &format!("reduce_scatter {dtype}"), bytes, || {
            let pieces = Pieces { len, runs: vec![(0, input.span())] };
            black_box(group.reduce_scatter("bench", &pieces, &mut shard, 0.5, Into::Store).unwrap());
        });
        let mut output = AlignedBuffer::zeroed(len, dtype);
        let start = group.rank().index() * shard_len;
        measure(group, &format!("all_gather {dtype}"), bytes, || {
            let mut produce = |range: std::ops::Range<usize>, target: SpanMut<'_>| {
                deepspeed_kernels::cast(input.span().slice(start + range.start, range.len()), target);
            };
            let mut pieces = PiecesMut { len, runs: vec![(0, output.span_mut())] };
            group.all_gather("bench", dtype, &mut produce, &mut pieces).unwrap();
        });
    }
    let mut one = [1.0];
    measure(group, "all_reduce of 1 element", 0, || group.all_reduce("bench", &mut one).unwrap());
    measure(group, "barrier", 0, || group.barrier("bench").unwrap());
}
