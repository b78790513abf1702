//! Sums: over ranks, of squares, in place.
//!
//! A sum of squares has one order, which depends on the length alone: element `i` goes to lane `i % 16`, each
//! lane adds its squares in fp64 in order of `i`, and a fixed tree adds the lanes.

use deepspeed_core::Span;

use crate::{BLOCK, Isa, cast::widened, element::Element, isa::kernel};

/// Number of independent fp64 sums: two AVX-512 registers.
const LANES: usize = 16;

/// A running sum of squares with a fixed order.
pub(crate) struct SquareSum([f64; LANES]);

impl SquareSum {
    pub(crate) fn new() -> Self {
        Self([0.0; LANES])
    }

    /// Adds the squares of `x`. All calls but the last bring a multiple of 16 elements.
    pub(crate) fn add(&mut self, isa: Isa, x: &[f32]) {
        add_squares(isa, &mut self.0, x);
    }

    /// The sum: lane `i` is added to lane `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    pub(crate) fn total(mut self) -> f64 {
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                self.0[i] += self.0[i + half];
            }
            half /= 2;
        }
        self.0[0]
    }
}

kernel! {
    fn add_squares(lanes: &mut [f64; LANES], x: &[f32]) {
        let mut sums = *lanes;
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                let x = f64::from(chunk[lane]);
                sums[lane] += x * x;
            }
        }
        for (sum, x) in sums.iter_mut().zip(rest) {
            let x = f64::from(*x);
            *sum += x * x;
        }
        *lanes = sums;
    }
}

kernel! {
    fn add_widened<S: Element>(dst: &mut [f32], src: &[S]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst += src.to_f32();
        }
    }
}

kernel! {
    fn scale_into(src: &[f32], scale: f32, dst: &mut [f32]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = src * scale;
        }
    }
}

kernel! {
    fn scale_onto(src: &[f32], scale: f32, dst: &mut [f32]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst += src * scale;
        }
    }
}

kernel! {
    fn pair_into<S: Element>(a: &[S], b: &[S], scale: f32, dst: &mut [f32]) {
        for ((dst, a), b) in dst.iter_mut().zip(a).zip(b) {
            *dst = (a.to_f32() + b.to_f32()) * scale;
        }
    }
}

kernel! {
    fn pair_onto<S: Element>(a: &[S], b: &[S], scale: f32, dst: &mut [f32]) {
        for ((dst, a), b) in dst.iter_mut().zip(a).zip(b) {
            *dst += (a.to_f32() + b.to_f32()) * scale;
        }
    }
}

/// [`reduce_ranks`] for two ranks of one dtype, the inputs read once and the sum never stored apart.
fn reduce_pair<S: Element>(isa: Isa, a: &[S], b: &[S], scale: f32, shard: &mut [f32], add: bool) -> f64 {
    let mut squares = SquareSum::new();
    for ((a, b), shard) in a.chunks(BLOCK).zip(b.chunks(BLOCK)).zip(shard.chunks_mut(BLOCK)) {
        if add {
            pair_onto(isa, a, b, scale, shard);
        } else {
            pair_into(isa, a, b, scale, shard);
        }
        squares.add(isa, shard);
    }
    squares.total()
}

kernel! {
    fn scale(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

/// Sums the ranks' gradients into a shard, in one pass over memory, and returns the shard's sum of squares.
///
/// With `s = (inputs[0][i] + inputs[1][i] + ...) * scale`, in fp32 and in the order of `inputs`, sets `shard[i]`
/// to `s`, or to `shard[i] + s` if `add`. The result is the sum of the squares of `shard` afterwards, in fp64 and
/// equal to the last bit to [`sum_squares`] of it; it is finite exactly if every element is.
///
/// Inputs may be of different dtypes.
///
/// # Panics
/// If there is no input, or one whose length is not that of `shard`.
pub fn reduce_ranks(inputs: &[Span<'_>], scale: f32, shard: &mut [f32], add: bool) -> f64 {
    reduce_ranks_on(Isa::active(), inputs, scale, shard, add)
}

/// [`reduce_ranks`] on a given instruction set.
///
/// # Panics
/// As [`reduce_ranks`], or if this machine does not have `isa`.
pub fn reduce_ranks_on(isa: Isa, inputs: &[Span<'_>], scale: f32, shard: &mut [f32], add: bool) -> f64 {
    let (first, others) = inputs.split_first().expect("invariant: at least one rank to reduce");
    for input in inputs {
        assert_eq!(input.len(), shard.len(), "input and shard of different length");
    }
    if let [a, b] = inputs {
        if let (Some(a), Some(b)) = (a.as_bf16(), b.as_bf16()) {
            return reduce_pair(isa, a, b, scale, shard, add);
        }
        if let (Some(a), Some(b)) = (a.as_f16(), b.as_f16()) {
            return reduce_pair(isa, a, b, scale, shard, add);
        }
        if let (Some(a), Some(b)) = (a.as_f32(), b.as_f32()) {
            return reduce_pair(isa, a, b, scale, shard, add);
        }
    }
    let mut squares = SquareSum::new();
    let mut scratch = [0.0; BLOCK];
    for (index, shard) in shard.chunks_mut(BLOCK).enumerate() {
        let (start, len) = (index * BLOCK, shard.len());
        let first = first.slice(start, len);
        let sum = if others.is_empty() {
            widened(isa, first, &mut scratch)
        } else {
            let sum = &mut scratch[..len];
            crate::cast_on(isa, first, (&mut *sum).into());
            for other in others {
                add_assign_on(isa, sum, other.slice(start, len));
            }
            sum
        };
        if add {
            scale_onto(isa, sum, scale, shard);
        } else {
            scale_into(isa, sum, scale, shard);
        }
        squares.add(isa, shard);
    }
    squares.total()
}

/// The sum of the squares of `x` in fp64, in the fixed order of this module: finite exactly if every element is.
pub fn sum_squares(x: Span<'_>) -> f64 {
    sum_squares_on(Isa::active(), x)
}

/// [`sum_squares`] on a given instruction set.
///
/// # Panics
/// If this machine does not have `isa`.
pub fn sum_squares_on(isa: Isa, x: Span<'_>) -> f64 {
    let mut squares = SquareSum::new();
    if let Some(x) = x.as_f32() {
        squares.add(isa, x);
        return squares.total();
    }
    let mut scratch = [0.0; BLOCK];
    for start in (0..x.len()).step_by(BLOCK) {
        let block = x.slice(start, BLOCK.min(x.len() - start));
        squares.add(isa, widened(isa, block, &mut scratch));
    }
    squares.total()
}

/// Multiplies every element by `factor`.
pub fn scale_in_place(x: &mut [f32], factor: f32) {
    scale_in_place_on(Isa::active(), x, factor);
}

/// [`scale_in_place`] on a given instruction set.
///
/// # Panics
/// If this machine does not have `isa`.
pub fn scale_in_place_on(isa: Isa, x: &mut [f32], factor: f32) {
    scale(isa, x, factor);
}

/// Adds `src`, widened to fp32, to `dst`.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign(dst: &mut [f32], src: Span<'_>) {
    add_assign_on(Isa::active(), dst, src);
}

/// [`add_assign`] on a given instruction set.
///
/// # Panics
/// If the lengths differ or this machine does not have `isa`.
pub fn add_assign_on(isa: Isa, dst: &mut [f32], src: Span<'_>) {
    assert_eq!(dst.len(), src.len(), "addition of spans of different length");
    if let Some(src) = src.as_f32() {
        add_widened(isa, dst, src);
    } else if let Some(src) = src.as_f16() {
        add_widened(isa, dst, src);
    } else if let Some(src) = src.as_bf16() {
        add_widened(isa, dst, src);
    }
}
