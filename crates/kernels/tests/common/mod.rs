//! Numbers, spans and comparisons for the tests.

#![allow(dead_code, reason = "each test binary uses a part")]

use deepspeed_core::{DType, Span, SpanMut};
use deepspeed_kernels::{Isa, cast_on};

/// A stream of numbers: splitmix64.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// One number of at most `size`.
    pub(crate) fn moderate(&mut self, size: f32) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 * size - size
    }

    /// Ordinary numbers of at most `size`.
    pub(crate) fn ordinary(&mut self, len: usize, size: f32) -> Vec<f32> {
        (0..len).map(|_| self.moderate(size)).collect()
    }

    /// Ordinary numbers, and one in three of anything: zeros, infinities, NaN, subnormals, the limits of the 16-bit
    /// types, any bits.
    pub(crate) fn any(&mut self, len: usize) -> Vec<f32> {
        const SPECIAL: [f32; 12] = [
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MAX,
            f32::MIN_POSITIVE,
            1e-40,
            -1e-45,
            65504.0,
            65520.0,
            6e-8,
        ];
        (0..len)
            .map(|_| match self.below(6) {
                0 => SPECIAL[self.below(SPECIAL.len())],
                1 => f32::from_bits(self.next() as u32),
                _ => self.moderate(2.0),
            })
            .collect()
    }
}

/// The bytes of `values` in `dtype`, by the baseline cast.
pub(crate) fn narrow(values: &[f32], dtype: DType) -> Vec<u8> {
    let mut bytes = vec![0u8; values.len() * 4];
    cast_on(Isa::Scalar, values.into(), span_mut(&mut bytes, values.len(), dtype));
    bytes
}

/// `len` elements of `dtype` in `bytes`, which the allocator has aligned.
pub(crate) fn span(bytes: &[u8], len: usize, dtype: DType) -> Span<'_> {
    assert!(bytes.len() >= len * dtype.size() && (len == 0 || bytes.as_ptr().cast::<f32>().is_aligned()));
    // SAFETY: long enough and aligned, as just checked; borrowed for the lifetime.
    unsafe { Span::from_raw(bytes.as_ptr(), len, dtype) }
}

/// As [`span`], writable.
pub(crate) fn span_mut(bytes: &mut [u8], len: usize, dtype: DType) -> SpanMut<'_> {
    assert!(bytes.len() >= len * dtype.size() && (len == 0 || bytes.as_ptr().cast::<f32>().is_aligned()));
    // SAFETY: long enough and aligned, as just checked; borrowed exclusively for the lifetime.
    unsafe { SpanMut::from_raw(bytes.as_mut_ptr(), len, dtype) }
}

/// Equal bits, or both NaN: the payload of a NaN that arithmetic made is not specified.
pub(crate) fn assert_same(ours: &[f32], expected: &[f32], isa: Isa) {
    assert_eq!(ours.len(), expected.len());
    for (index, (a, b)) in ours.iter().zip(expected).enumerate() {
        let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(same, "element {index} on {isa:?}: {a} ({:#010x}), {b} ({:#010x})", a.to_bits(), b.to_bits());
    }
}

/// As [`assert_same`] for fp64.
pub(crate) fn same64(a: f64, b: f64) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}
