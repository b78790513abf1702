//! One rank of a measurement in shared memory.

use std::{
    env,
    ffi::OsString,
    process::ExitCode,
    time::{Duration, Instant},
};

use deepspeed_comm::{CommError, Group, Into, Options, Pieces, PiecesMut, Segment, SharedMemory};
use deepspeed_core::{AlignedBuffer, DType, Rank, Span, SpanMut};
use deepspeed_kernels::cast;

use super::job::{Cell, Job, Operation};
use super::result::{Header, MARK, Measured};
use crate::output::{fail, print};

/// The hidden command that a rank runs.
pub(crate) const RANK_COMMAND: &str = "__bench_rank";

/// Where the ranks meet: [`Segment::handle`].
pub(super) const SEGMENT_VARIABLE: &str = "DS_BENCH_SEGMENT";

/// A rank that does not come is not waited for longer.
const DEADLINE: Duration = Duration::from_secs(120);

/// What the collectives are called in messages.
const WHAT: &str = "bench";

/// Runs a rank. `args`: the job as JSON.
pub(crate) fn rank_main(args: &[OsString]) -> ExitCode {
    let done = job(args).and_then(|job| measure(&job).map_err(|error| error.to_string()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => fail(&what),
    }
}

fn job(args: &[OsString]) -> Result<Job, String> {
    let text =
        args.first().and_then(|word| word.to_str()).ok_or("a rank of `deepspeed bench` needs its job")?;
    serde_json::from_str(text).map_err(|error| format!("the job makes no sense: {error}"))
}

fn measure(job: &Job) -> Result<(), CommError> {
    let handle = env::var(SEGMENT_VARIABLE).unwrap_or_default();
    let rank = env::var("RANK").ok().and_then(|rank| rank.parse().ok()).unwrap_or(0);
    let options = Options { deadline: DEADLINE, ..Options::default() };
    let group = SharedMemory::join(&Segment::open(&handle)?, Rank::from_index(rank), &options)?;
    let tell = |value: serde_json::Value| {
        if rank == 0 {
            print(&format!("{MARK}{value}\n"));
        }
    };
    tell(serde_json::json!(Header {
        world: group.world(),
        hosts: 1,
        transport: group.transport().to_owned(),
        trials: job.trials,
        warmups: job.warmups,
    }));
    for cell in &job.cells {
        tell(serde_json::json!(one(&group, cell, job)?));
    }
    Ok(())
}

/// One measurement: a call whose result is checked, calls to warm up, calls that are timed.
fn one(group: &SharedMemory, cell: &Cell, job: &Job) -> Result<Measured, CommError> {
    let mut call = Call::new(group, cell);
    call.fill(true);
    call.run()?;
    let wrong = call.wrong();
    call.fill(false);
    for _ in 0..job.warmups {
        call.run()?;
    }
    group.barrier(WHAT)?;
    let began = Instant::now();
    for _ in 0..job.trials {
        call.run()?;
    }
    let seconds = began.elapsed().as_secs_f64() / f64::from(job.trials);
    let mine = [seconds.to_le_bytes(), wrong.to_le_bytes()].concat();
    let (mut slowest, mut all_wrong) = (0.0f64, 0);
    for theirs in group.all_gather_bytes(WHAT, &mine)? {
        if let Some((seconds, wrong)) = theirs.split_first_chunk::<8>() {
            slowest = slowest.max(f64::from_le_bytes(*seconds));
            all_wrong += wrong.first_chunk::<8>().map_or(0, |wrong| u64::from_le_bytes(*wrong));
        }
    }
    Ok(Measured {
        op: cell.op,
        dtype: cell.dtype.name().to_owned(),
        bytes: (call.elements() * cell.dtype.size()) as u64,
        seconds: Some(slowest),
        wrong: Some(all_wrong),
        skipped: None,
    })
}

/// A collective and its memory.
struct Call<'a> {
    group: &'a SharedMemory,
    op: Operation,
    /// What every rank has whole: the input of a reduction, the output of a gathering.
    whole: AlignedBuffer,
    /// The rank's own share of it: the input of a gathering.
    shard: AlignedBuffer,
    /// The rank's own share of a sum.
    sum: AlignedBuffer,
}

/// Element `at` of rank `rank`: small whole numbers, which every dtype holds and whose sums are exact.
fn value(rank: usize, at: usize) -> f32 {
    ((at + 3 * rank) % 8) as f32
}

fn from_f32(numbers: &[f32], target: SpanMut<'_>) {
    cast(Span::from(numbers), target);
}

/// As many numbers as `source` has elements.
fn to_f32(source: Span<'_>) -> Vec<f32> {
    let mut numbers = vec![0.0; source.len()];
    cast(source, SpanMut::from(numbers.as_mut_slice()));
    numbers
}

impl<'a> Call<'a> {
    fn new(group: &'a SharedMemory, cell: &Cell) -> Self {
        let world = group.world();
        let fits = usize::try_from(cell.bytes).unwrap_or(usize::MAX) / cell.dtype.size();
        let each = (fits / world).max(1);
        let scatters = cell.op == Operation::ReduceScatter;
        let gathers = cell.op == Operation::AllGather;
        Self {
            group,
            op: cell.op,
            whole: AlignedBuffer::zeroed(each * world, cell.dtype),
            shard: AlignedBuffer::zeroed(if gathers { each } else { 0 }, cell.dtype),
            sum: AlignedBuffer::zeroed(if scatters { each } else { 0 }, DType::F32),
        }
    }

    fn elements(&self) -> usize {
        self.whole.len()
    }

    /// Fills the inputs with numbers to check, or with zeros, which stay zeros however often they are summed.
    fn fill(&mut self, with_numbers: bool) {
        let rank = self.group.rank().index();
        let number = |at| if with_numbers { value(rank, at) } else { 0.0 };
        let numbers: Vec<f32> = (0..self.whole.len()).map(number).collect();
        from_f32(&numbers, self.whole.span_mut());
        let share = self.shard.len();
        from_f32(&numbers[..share], self.shard.span_mut());
    }

    fn run(&mut self) -> Result<(), CommError> {
        let len = self.whole.len();
        match self.op {
            Operation::AllReduce => self.group.all_reduce(WHAT, self.whole.as_f32_mut()),
            Operation::Broadcast => self.group.broadcast(WHAT, Rank::from_index(0), self.whole.span_mut()),
            Operation::ReduceScatter => {
                let input = Pieces { len, runs: vec![(0, self.whole.span())] };
                self.group.reduce_scatter(WHAT, &input, self.sum.as_f32_mut(), 1.0, Into::Store).map(drop)
            }
            Operation::AllGather => {
                let shard = self.shard.span();
                let mut produce = |range: std::ops::Range<usize>, mut target: SpanMut<'_>| {
                    let source = shard.slice(range.start, range.len());
                    target.as_bytes_mut().copy_from_slice(source.as_bytes());
                };
                let mut output = PiecesMut { len, runs: vec![(0, self.whole.span_mut())] };
                self.group.all_gather(WHAT, shard.dtype(), &mut produce, &mut output)
            }
            Operation::AllToAll => Err(CommError::Segment("our shared memory has no all_to_all".to_owned())),
        }
    }

    /// Elements of this rank's result that are not what they should be.
    fn wrong(&self) -> u64 {
        let (world, rank) = (self.group.world(), self.group.rank().index());
        let sum = |at: usize| (0..world).map(|rank| value(rank, at)).sum::<f32>();
        let each = self.whole.len() / world;
        let count = |found: &[f32], expected: &dyn Fn(usize) -> f32| {
            found.iter().enumerate().filter(|(at, found)| **found != expected(*at)).count() as u64
        };
        match self.op {
            Operation::AllReduce => count(self.whole.as_f32(), &sum),
            Operation::Broadcast => count(&to_f32(self.whole.span()), &|at| value(0, at)),
            Operation::ReduceScatter => count(self.sum.as_f32(), &|at| sum(rank * each + at)),
            Operation::AllGather => count(&to_f32(self.whole.span()), &|at| value(at / each, at % each)),
            Operation::AllToAll => 0,
        }
    }
}
