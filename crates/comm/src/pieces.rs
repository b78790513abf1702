//! Cutting unit-shaped memory into ranges: reading what lies in a range, writing it back, and the reduction by blocks.

use std::ops::Range;

use deepspeed_core::{AlignedBuffer, DType, Span, SpanMut};
use deepspeed_kernels::{cast, reduce_ranks};

use crate::group::{Into, Pieces, PiecesMut};

/// Elements of a block: shards are reduced, and their squares summed, block by block from the shard's start.
///
/// The same on every transport and for every chunk size, so that the sum of squares of a shard depends only on its
/// elements and its length: each block's sum is [`reduce_ranks`]'s, and the blocks are added in order, in f64.
pub const BLOCK: usize = 4096;

impl<'a> Pieces<'a> {
    /// The only dtype of the runs; none if there is no run, fp32 if they differ.
    pub(crate) fn wire_dtype(&self) -> Option<DType> {
        let mut dtypes = self.runs.iter().map(|(_, run)| run.dtype());
        let first = dtypes.next()?;
        Some(if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 })
    }

    /// The first run that ends behind `start`.
    fn first_run(&self, start: usize) -> usize {
        self.runs.partition_point(|(offset, run)| offset + run.len() <= start)
    }

    /// The elements of `range` where they lie, if one run holds them all.
    pub(crate) fn whole(&self, range: &Range<usize>) -> Option<Span<'a>> {
        let (offset, run) = self.runs.get(self.first_run(range.start))?;
        (*offset <= range.start && range.end <= offset + run.len())
            .then(|| run.slice(range.start - offset, range.len()))
    }

    /// Writes the elements of `range` into `target`, zeros where no run covers it.
    pub(crate) fn read(&self, range: &Range<usize>, target: &mut SpanMut<'_>) {
        let mut next = range.start;
        for (offset, run) in &self.runs[self.first_run(range.start)..] {
            if *offset >= range.end {
                break;
            }
            let from = next.max(*offset);
            let to = range.end.min(offset + run.len());
            zero(target, next - range.start, from - next);
            cast(run.slice(from - offset, to - from), target.slice_mut(from - range.start, to - from));
            next = to;
        }
        zero(target, next - range.start, range.end - next);
    }

    /// What is wrong with the runs, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        problem(self.len, self.runs.iter().map(|(offset, run)| (*offset, run.len())))
    }
}

impl PiecesMut<'_> {
    /// Copies `elements` to where the runs want those of `range`.
    pub(crate) fn write(&mut self, range: &Range<usize>, elements: Span<'_>) {
        let first = self.runs.partition_point(|(offset, run)| offset + run.len() <= range.start);
        for (offset, run) in &mut self.runs[first..] {
            if *offset >= range.end {
                break;
            }
            let from = range.start.max(*offset);
            let to = range.end.min(*offset + run.len());
            cast(elements.slice(from - range.start, to - from), run.slice_mut(from - *offset, to - from));
        }
    }

    /// What is wrong with the runs, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        problem(self.len, self.runs.iter().map(|(offset, run)| (*offset, run.len())))
    }
}

/// Why `(offset, length)` runs are not ascending, disjoint and inside `len` elements, if they are not.
fn problem(len: usize, runs: impl Iterator<Item = (usize, usize)>) -> Option<String> {
    let mut next = 0;
    for (index, (offset, run)) in runs.enumerate() {
        if offset < next || offset > len || run > len - offset {
            return Some(format!(
                "run {index} covers {offset}..{} of {len} elements, the runs before it end at {next}",
                offset.saturating_add(run)
            ));
        }
        next = offset + run;
    }
    None
}

fn zero(target: &mut SpanMut<'_>, start: usize, len: usize) {
    if len > 0 {
        target.slice_mut(start, len).as_bytes_mut().fill(0);
    }
}

/// What a rank with gaps in its input needs to reduce it.
pub(crate) struct Reducer {
    /// One block of the caller's input, where no single run holds it.
    scratch: AlignedBuffer,
    /// One block of zeros, for peers whose input holds nothing at all.
    zeros: AlignedBuffer,
}

/// What does not change during the reduction of one shard.
#[derive(Clone, Copy)]
pub(crate) struct Reduction<'a> {
    pub(crate) input: &'a Pieces<'a>,
    /// Where the caller's shard starts in `input`.
    pub(crate) start: usize,
    pub(crate) me: usize,
    pub(crate) world: usize,
    pub(crate) scale: f32,
    pub(crate) into: Into,
}

impl Reducer {
    pub(crate) fn new() -> Self {
        Self {
            scratch: AlignedBuffer::zeroed(BLOCK, DType::F32),
            zeros: AlignedBuffer::zeroed(BLOCK, DType::F32),
        }
    }

    /// Reduces `shard[range]`, where `range` starts at a block, and adds its blocks' sums of squares to `squares`.
    ///
    /// `peer(rank)` gives that rank's elements of `range`, or nothing where they are all zero.
    pub(crate) fn reduce<'a>(
        &mut self,
        reduction: &Reduction<'_>,
        range: &Range<usize>,
        peer: impl Fn(usize) -> Option<Span<'a>>,
        shard: &mut [f32],
        squares: &mut f64,
    ) {
        let Reduction { input, start, me, world, scale, into } = *reduction;
        for begin in range.clone().step_by(BLOCK) {
            let block = begin..range.end.min(begin + BLOCK);
            let mine = start + block.start..start + block.end;
            let own = match input.whole(&mine) {
                Some(span) => span,
                None => {
                    input.read(&mine, &mut self.scratch.span_mut().slice_mut(0, block.len()));
                    self.scratch.span().slice(0, block.len())
                }
            };
            let inputs: Vec<Span<'_>> = (0..world)
                .map(|rank| match rank == me {
                    true => own,
                    false => peer(rank).map_or_else(
                        || self.zeros.span().slice(0, block.len()),
                        |span| span.slice(begin - range.start, block.len()),
                    ),
                })
                .collect();
            *squares += reduce_ranks(&inputs, scale, &mut shard[block], into == Into::Add);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn gaps_read_as_zero_and_are_dropped_when_written() {
        let (a, b) = ([1.0f32, 2.0], [bf16::from_f32(3.0)]);
        let pieces = Pieces { len: 8, runs: vec![(1, Span::from(&a[..])), (4, Span::from(&b[..]))] };
        assert_eq!(pieces.wire_dtype(), Some(DType::F32));
        for start in 0..8 {
            for end in start..=8 {
                let mut out = vec![9.0f32; end - start];
                pieces.read(&(start..end), &mut SpanMut::from(&mut out[..]));
                assert_eq!(out, [0.0, 1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0][start..end]);
            }
        }
        let mut out = [9.0f32; 2];
        let mut target = PiecesMut { len: 4, runs: vec![(1, SpanMut::from(&mut out[..]))] };
        target.write(&(2..4), Span::from(&[5.0f32, 6.0][..]));
        assert_eq!(out, [9.0, 5.0]);
    }

    #[test]
    fn a_range_is_whole_only_inside_one_run() {
        let a = [1.0f32; 4];
        let pieces = Pieces { len: 8, runs: vec![(0, Span::from(&a[..])), (4, Span::from(&a[..]))] };
        assert_eq!(pieces.whole(&(4..8)).map(|span| span.len()), Some(4));
        assert!(pieces.whole(&(3..5)).is_none());
        assert!(pieces.whole(&(8..8)).is_none());
    }

    #[test]
    fn runs_that_overlap_or_stick_out_are_named() {
        assert_eq!(problem(8, [(0, 4), (4, 4)].into_iter()), None);
        assert!(problem(8, [(0, 4), (3, 1)].into_iter()).unwrap().contains("run 1"));
        assert!(problem(8, [(6, 3)].into_iter()).is_some());
        assert!(problem(8, [(9, 0)].into_iter()).is_some());
    }
}
