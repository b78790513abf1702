//! Ranks as threads and as processes, and a suite of collectives whose results are known.

#![allow(dead_code, reason = "each test program uses its part")]

use std::{
    io::{BufRead, BufReader},
    ops::Range,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use deepspeed_comm::{Group, Into, Options, Pieces, PiecesMut, Segment, SharedMemory, threads};
use deepspeed_core::{AlignedBuffer, DType, Rank, Span, SpanMut};
use deepspeed_kernels::cast;

/// How long any test waits for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Options under which no test hangs.
pub(crate) fn options() -> Options {
    Options { deadline: Duration::from_secs(30), ..Options::default() }
}

/// Runs `body` for every rank of a group of threads and returns the results in rank order.
pub(crate) fn run_threads<T: Send>(
    world: usize,
    options: &Options,
    body: impl Fn(SharedMemory) -> T + Sync,
) -> Vec<T> {
    let groups = threads(world, options).unwrap();
    std::thread::scope(|scope| {
        let body = &body;
        let ranks: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || body(group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A rank in a process of its own: this test program again, running only its test `child`.
pub(crate) struct RankProcess {
    pub(crate) child: Child,
    lines: mpsc::Receiver<String>,
}

const ROLE: &str = "COMM_TEST_ROLE";
const MARK: &str = "@rank ";

/// Starts one process for each rank from 0, with the same role.
pub(crate) fn spawn_ranks(segment: &Segment, role: &str) -> Vec<RankProcess> {
    (0..segment.world()).map(|rank| spawn_rank(segment, rank, role)).collect()
}

pub(crate) fn spawn_rank(segment: &Segment, rank: usize, role: &str) -> RankProcess {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture", "--test-threads=1"])
        .env(ROLE, format!("{role} {rank} {}", segment.handle().unwrap()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = child.stdout.take().unwrap();
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // libtest may have begun the line.
            if let Some(start) = line.find(MARK) {
                let _ = sender.send(line[start + MARK.len()..].to_owned());
            }
        }
    });
    RankProcess { child, lines }
}

impl RankProcess {
    /// The next line the rank [`say`]s.
    pub(crate) fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("the rank says something in time")
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the rank ends in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a rank's process: its role, and its group.
pub(crate) fn role(options: &Options) -> Option<(String, SharedMemory)> {
    let role = std::env::var(ROLE).ok()?;
    let mut words = role.split(' ');
    let (role, rank, handle) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    let segment = Segment::open(handle).unwrap();
    let group = SharedMemory::join(&segment, Rank(rank.parse().unwrap()), options).unwrap();
    Some((role.to_owned(), group))
}

/// In a rank's process: a line for the test that started it.
#[allow(clippy::print_stdout, reason = "the channel to the parent")]
pub(crate) fn say(line: impl std::fmt::Display) {
    println!("{MARK}{line}");
}

/// SplitMix64: <https://prng.di.unimi.it/splitmix64.c>.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// Numbers of mixed sign and magnitude, so that the order of a sum shows.
fn values(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len)
        .map(|_| {
            let bits = random.next();
            let magnitude = [1e-3, 1.0, 7.0, 300.0][(bits & 3) as usize];
            (((bits >> 40) as f32 / (1u64 << 24) as f32) - 0.5) * magnitude
        })
        .collect()
}

fn buffer(values: &[f32], dtype: DType) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::zeroed(values.len(), dtype);
    cast(Span::from(values), buffer.span_mut());
    buffer
}

fn widened(buffer: &AlignedBuffer) -> Vec<f32> {
    let mut values = vec![0.0; buffer.len()];
    cast(buffer.span(), SpanMut::from(&mut values[..]));
    values
}

/// Disjoint ascending ranges inside `0..len`, with gaps; sometimes none, sometimes all of it.
fn ranges(random: &mut Random, len: usize) -> Vec<Range<usize>> {
    match random.below(5) {
        0 => return Vec::new(),
        1 => return std::iter::once(0..len).collect(),
        _ => {}
    }
    let mut ranges = Vec::new();
    let mut next = 0;
    let most = len / (1 + random.below(6)) + 2;
    while next < len && ranges.len() < 50 {
        let start = (next + if random.below(2) == 0 { 0 } else { random.below(most) }).min(len);
        let end = (start + random.below(most)).min(len);
        ranges.push(start..end);
        next = end;
    }
    ranges
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const LENS: [usize; 14] = [0, 1, 2, 63, 64, 65, 1000, 4095, 4096, 4097, 8192, 20_000, 70_001, 131_072];

/// One rank's gradient pieces: its runs with their memory, and the whole as numbers with zeros in the gaps.
struct Gradients {
    runs: Vec<(usize, AlignedBuffer)>,
    whole: Vec<f32>,
}

impl Gradients {
    /// What `rank` has in this round; any rank can compute it.
    fn of(seed: u64, rank: usize, len: usize, dtype: Option<DType>) -> Self {
        let mut random = Random(seed ^ (rank as u64) << 32);
        let mut whole = vec![0.0; len];
        let mut runs = Vec::new();
        for range in ranges(&mut random, len) {
            let dtype = dtype.unwrap_or_else(|| random.pick(&DTYPES));
            let run = buffer(&values(random.next(), range.len()), dtype);
            whole[range.clone()].copy_from_slice(&widened(&run));
            runs.push((range.start, run));
        }
        Self { runs, whole }
    }

    fn pieces(&self) -> Pieces<'_> {
        let runs = self.runs.iter().map(|(offset, run)| (*offset, run.span())).collect();
        Pieces { len: self.whole.len(), runs }
    }
}

/// The rank-order sum in fp32.
fn sum(parts: &[Vec<f32>]) -> Vec<f32> {
    let mut total = parts[0].clone();
    for part in &parts[1..] {
        total.iter_mut().zip(part).for_each(|(total, x)| *total += x);
    }
    total
}

/// A digest of everything the ranks computed: equal on every transport.
struct Digest(u64);

impl Digest {
    fn bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut eight = [0; 8];
            eight[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0 ^ u64::from_le_bytes(eight)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
    }

    fn floats(&mut self, floats: &[f32]) {
        self.bytes(Span::from(floats).as_bytes());
    }
}

/// Makes `rounds` random calls, checks every result and returns a digest of their bits.
pub(crate) fn conformance(group: &dyn Group, seed: u64, rounds: u64) -> u64 {
    let mut plan = Random(seed);
    let mut digest = Digest(seed);
    for round in 0..rounds {
        let seed = plan.next();
        match plan.below(6) {
            0 | 1 => reduce_scatter(group, &mut plan, seed, &mut digest),
            2 | 3 => all_gather(group, &mut plan, seed, &mut digest),
            4 => all_reduce(group, &mut plan, seed, &mut digest),
            _ => small(group, &mut plan, seed, round, &mut digest),
        }
    }
    digest.0
}

fn reduce_scatter(group: &dyn Group, plan: &mut Random, seed: u64, digest: &mut Digest) {
    let (rank, world) = (group.rank().index(), group.world());
    let shard_len = plan.pick(&LENS);
    let dtype = plan.pick(&[Some(DType::F32), Some(DType::BF16), Some(DType::F16), None]);
    let scale = plan.pick(&[1.0, 0.5, 1.0 / 3.0]);
    let into = plan.pick(&[Into::Store, Into::Add]);
    let all: Vec<Gradients> =
        (0..world).map(|rank| Gradients::of(seed, rank, shard_len * world, dtype)).collect();
    let before = values(seed ^ 1, shard_len);
    let mut shard = before.clone();
    let squares = group.reduce_scatter("unit x", &all[rank].pieces(), &mut shard, scale, into).unwrap();
    let mine = rank * shard_len..(rank + 1) * shard_len;
    let parts: Vec<Vec<f32>> = all.iter().map(|rank| rank.whole[mine.clone()].to_vec()).collect();
    let expected: Vec<f32> = sum(&parts)
        .iter()
        .zip(&before)
        .map(|(sum, before)| if into == Into::Add { before + sum * scale } else { sum * scale })
        .collect();
    assert_eq!(shard, expected, "reduce_scatter {shard_len} {dtype:?}");
    let naive: f64 = shard.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    assert!((squares - naive).abs() <= 1e-9 * naive, "{squares} is not {naive}");
    digest.floats(&shard);
    digest.bytes(&squares.to_bits().to_le_bytes());
}

fn all_gather(group: &dyn Group, plan: &mut Random, seed: u64, digest: &mut Digest) {
    let (rank, world) = (group.rank().index(), group.world());
    let shard_len = plan.pick(&LENS);
    let dtype = plan.pick(&DTYPES);
    let shards: Vec<AlignedBuffer> =
        (0..world as u64).map(|rank| buffer(&values(seed ^ rank << 32, shard_len), dtype)).collect();
    let whole: Vec<f32> = shards.iter().flat_map(widened).collect();
    let mut random = Random(seed ^ 2);
    let same = plan.below(3) > 0;
    let mut runs: Vec<(usize, AlignedBuffer)> = ranges(&mut random, whole.len())
        .into_iter()
        .map(|range| {
            let dtype = if same { dtype } else { random.pick(&DTYPES) };
            (range.start, AlignedBuffer::zeroed(range.len(), dtype))
        })
        .collect();
    let mut next = 0;
    let mut output = PiecesMut {
        len: whole.len(),
        runs: runs.iter_mut().map(|(offset, run)| (*offset, run.span_mut())).collect(),
    };
    let mut produce = |range: Range<usize>, target: SpanMut<'_>| {
        assert_eq!(range.start, next);
        assert_eq!(target.dtype(), dtype);
        next = range.end;
        cast(shards[rank].span().slice(range.start, range.len()), target);
    };
    group.all_gather("unit y", dtype, &mut produce, &mut output).unwrap();
    assert_eq!(next, shard_len);
    for (offset, run) in &runs {
        let expected = buffer(&whole[*offset..offset + run.len()], run.dtype());
        assert_eq!(run.span().as_bytes(), expected.span().as_bytes(), "all_gather {shard_len} {dtype}");
        digest.bytes(run.span().as_bytes());
    }
}

fn all_reduce(group: &dyn Group, plan: &mut Random, seed: u64, digest: &mut Digest) {
    let (rank, world) = (group.rank().index(), group.world());
    let len = plan.pick(&LENS) * (1 + plan.below(3));
    let parts: Vec<Vec<f32>> = (0..world as u64).map(|rank| values(seed ^ rank << 32, len)).collect();
    let mut data = parts[rank].clone();
    group.all_reduce("norm", &mut data).unwrap();
    assert_eq!(data, sum(&parts), "all_reduce {len}");
    digest.floats(&data);
}

fn small(group: &dyn Group, plan: &mut Random, seed: u64, round: u64, digest: &mut Digest) {
    let (rank, world) = (group.rank().index(), group.world());
    group.barrier(&format!("round {round}")).unwrap();
    let root = plan.below(world);
    let len = plan.pick(&LENS);
    let sent = buffer(&values(seed, len), plan.pick(&DTYPES));
    let mut data = AlignedBuffer::zeroed(len, sent.dtype());
    if rank == root {
        cast(sent.span(), data.span_mut());
    }
    group.broadcast("weights", Rank::from_index(root), data.span_mut()).unwrap();
    assert_eq!(data.span().as_bytes(), sent.span().as_bytes(), "broadcast {len}");
    let limit = plan.pick(&[1, 100, 700_000]);
    let bytes: Vec<Vec<u8>> = (0..world as u64)
        .map(|rank| {
            let len = Random(seed ^ rank << 8).below(limit);
            (0..len).map(|i| (i as u64 ^ seed ^ rank) as u8).collect()
        })
        .collect();
    assert_eq!(group.all_gather_bytes("votes", &bytes[rank]).unwrap(), bytes);
    digest.bytes(data.span().as_bytes());
    bytes.iter().for_each(|bytes| digest.bytes(bytes));
}
