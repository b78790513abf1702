//! Collectives over a transport of bytes give the bits of shared memory, and notice ranks that disagree.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    sync::{Arc, Barrier, Mutex},
    thread,
};

use deepspeed_comm::{
    ByteTransport, CommError, Group, Into, Options, OverBytes, Pieces, PiecesMut, Progress, threads,
};
use deepspeed_core::{AlignedBuffer, DType, Rank, Span, SpanMut};

/// Bytes through memory that threads share: one board per rank, and a barrier before and after each reading.
#[derive(Clone, Debug)]
struct Board {
    rank: usize,
    posts: Arc<Vec<Mutex<Vec<u8>>>>,
    turn: Arc<Barrier>,
}

impl Board {
    fn exchange(&self, mine: &[u8], read: impl FnOnce(&[Mutex<Vec<u8>>])) {
        *self.posts[self.rank].lock().unwrap() = mine.to_vec();
        self.turn.wait();
        read(&self.posts);
        self.turn.wait();
    }
}

impl ByteTransport for Board {
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<Progress, String> {
        self.exchange(send, |posts| {
            let part = receive.len() / posts.len();
            for (peer, part_of) in receive.chunks_exact_mut(part).enumerate() {
                let post = posts[peer].lock().unwrap();
                part_of.copy_from_slice(&post[self.rank * part..(self.rank + 1) * part]);
            }
        });
        Ok(Progress::Done)
    }

    fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<Progress, String> {
        self.exchange(mine, |posts| {
            for (peer, part) in all.chunks_exact_mut(mine.len()).enumerate() {
                part.copy_from_slice(&posts[peer].lock().unwrap());
            }
        });
        Ok(Progress::Done)
    }

    fn broadcast(&self, data: &mut [u8], root: Rank) -> Result<Progress, String> {
        let mine = data.to_vec();
        self.exchange(&mine, |posts| data.copy_from_slice(&posts[root.index()].lock().unwrap()));
        Ok(Progress::Done)
    }
}

fn over_bytes(world: usize) -> Vec<Arc<dyn Group>> {
    let posts = Arc::new((0..world).map(|_| Mutex::default()).collect::<Vec<_>>());
    let turn = Arc::new(Barrier::new(world));
    (0..world)
        .map(|rank| {
            let board = Board { rank, posts: Arc::clone(&posts), turn: Arc::clone(&turn) };
            Arc::new(OverBytes::new(board, Rank::from_index(rank), world, "a board".to_owned()))
                as Arc<dyn Group>
        })
        .collect()
}

fn shared(world: usize) -> Vec<Arc<dyn Group>> {
    let ranks = threads(world, &Options::default()).unwrap();
    ranks.into_iter().map(|rank| Arc::new(rank) as Arc<dyn Group>).collect()
}

fn run<T: Send>(groups: Vec<Arc<dyn Group>>, work: impl Fn(&dyn Group) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let handles: Vec<_> = groups
            .into_iter()
            .map(|group| {
                let work = &work;
                scope.spawn(move || work(&*group))
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

/// Some numbers of `dtype` that differ by rank.
fn numbers(len: usize, rank: usize, dtype: DType) -> AlignedBuffer {
    let mut wide = AlignedBuffer::zeroed(len, DType::F32);
    for (i, x) in wide.as_f32_mut().iter_mut().enumerate() {
        *x = (((i * 37 + rank * 1009) % 2003) as f32 - 1000.0) / 771.0;
    }
    let mut out = AlignedBuffer::zeroed(len, dtype);
    deepspeed_kernels::cast(wide.span(), out.span_mut());
    out
}

/// What came out of each collective.
#[derive(Debug, PartialEq)]
struct Outcome {
    gathered: Vec<u32>,
    squares: u64,
    summed: Vec<u32>,
    shard: Vec<u32>,
    texts: Vec<Vec<u8>>,
}

/// Everything a group does, as bits.
fn everything(group: &dyn Group) -> Outcome {
    let (rank, world) = (group.rank().index(), group.world());
    let part = 5000;
    let (head, tail) = (numbers(3000, rank, DType::BF16), numbers(4001, rank + 7, DType::BF16));
    let input =
        Pieces { len: part * world, runs: vec![(10, head.span()), (part * world - 4001, tail.span())] };
    let input = if world == 1 { Pieces { len: part, runs: vec![(10, head.span())] } } else { input };
    let mut shard = vec![1.0f32; part];
    let squares = group.reduce_scatter("unit 0", &input, &mut shard, 0.25, Into::Add).unwrap();

    let mut gathered = vec![0.0f32; part * world];
    let mut produce = |range: std::ops::Range<usize>, target: SpanMut<'_>| {
        deepspeed_kernels::cast(Span::from(&shard[range]), target);
    };
    let mut output = PiecesMut { len: part * world, runs: vec![(0, SpanMut::from(&mut gathered[..]))] };
    group.all_gather("unit 0", DType::F32, &mut produce, &mut output).unwrap();

    let mut summed: Vec<f32> = numbers(777, rank, DType::F32).as_f32().to_vec();
    group.all_reduce("a sum", &mut summed).unwrap();
    group.broadcast("a value", Rank(0), SpanMut::from(&mut shard[..])).unwrap();
    group.barrier("the end").unwrap();
    let texts = group.all_gather_bytes("texts", &vec![rank as u8; rank * 300]).unwrap();
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect();
    Outcome {
        gathered: bits(&gathered),
        squares: squares.to_bits(),
        summed: bits(&summed),
        shard: bits(&shard),
        texts,
    }
}

#[test]
fn the_bits_are_those_of_shared_memory() {
    for world in 2..=4 {
        assert_eq!(run(over_bytes(world), everything), run(shared(world), everything), "world {world}");
    }
}

#[test]
fn ranks_that_disagree_are_told_what_each_called() {
    let errors = run(over_bytes(2), |group| {
        let what = if group.rank() == Rank(0) { "unit a" } else { "unit b" };
        let first = group.barrier(what).unwrap_err();
        let later = group.barrier("again").unwrap_err();
        assert_eq!(first.to_string(), later.to_string(), "the first error is kept");
        first
    });
    for error in errors {
        assert!(matches!(error, CommError::Mismatch { .. }), "{error}");
        assert!(error.to_string().contains("unit a") && error.to_string().contains("unit b"), "{error}");
    }
}

#[test]
fn a_broken_transport_is_named_with_the_call() {
    #[derive(Debug)]
    struct Broken;
    impl ByteTransport for Broken {
        fn all_to_all(&self, _: &[u8], _: &mut [u8]) -> Result<Progress, String> {
            Err("connection closed by peer".to_owned())
        }
        fn all_gather(&self, _: &[u8], _: &mut [u8]) -> Result<Progress, String> {
            Err("connection closed by peer".to_owned())
        }
        fn broadcast(&self, _: &mut [u8], _: Rank) -> Result<Progress, String> {
            Err("connection closed by peer".to_owned())
        }
    }
    let group = OverBytes::new(Broken, Rank(1), 4, "a wire".to_owned());
    group.set_activity("step");
    let error = group.all_gather_bytes("gradient norm", &[1]).unwrap_err().to_string();
    assert_eq!(
        error,
        "rank 1 failed in all_gather_bytes #1 of gradient norm during step over a wire: connection closed by peer"
    );
}
