//! Spans of memory that somebody else owns (a framework's tensor, a shared segment), with their dtype.
//!
//! A span is how tensors cross into the engine: pointer, number of elements, dtype. Creating one is `unsafe`
//! because the creator promises the lifetime; everything after that is safe.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::DType;

/// A read-only run of elements of one dtype in memory owned elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    ptr: *const u8,
    len: usize,
    dtype: DType,
    owner: PhantomData<&'a [u8]>,
}

/// A writable run of elements of one dtype in memory owned elsewhere.
#[derive(Debug)]
pub struct SpanMut<'a> {
    ptr: *mut u8,
    len: usize,
    dtype: DType,
    owner: PhantomData<&'a mut [u8]>,
}

// SAFETY: a `Span` is a shared slice in all but its element type, and the elements are plain numbers.
unsafe impl Send for Span<'_> {}
// SAFETY: as above; it offers only reads.
unsafe impl Sync for Span<'_> {}
// SAFETY: a `SpanMut` is an exclusive slice in all but its element type, and the elements are plain numbers.
unsafe impl Send for SpanMut<'_> {}
// SAFETY: through `&SpanMut` only reads are possible.
unsafe impl Sync for SpanMut<'_> {}

impl<'a> Span<'a> {
    /// A span over `len` elements of `dtype` at `ptr`.
    ///
    /// # Safety
    /// `ptr` is aligned for `dtype`, and the `len` elements are initialised, stay allocated for `'a`, and are not
    /// written by anyone for `'a`. With `len == 0` any `ptr` will do.
    pub unsafe fn from_raw(ptr: *const u8, len: usize, dtype: DType) -> Self {
        Self { ptr, len, dtype, owner: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements `start..start + len`.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn slice(&self, start: usize, len: usize) -> Span<'a> {
        assert!(start <= self.len && len <= self.len - start, "span range {start}+{len} of {}", self.len);
        let ptr = self.ptr.wrapping_add(start * self.dtype.size());
        Span { ptr, len, dtype: self.dtype, owner: PhantomData }
    }

    /// The elements as `f32`, if that is the dtype.
    pub fn as_f32(&self) -> Option<&'a [f32]> {
        // SAFETY: the dtype matches, and `from_raw` promised alignment, initialisation and lifetime.
        (self.dtype == DType::F32).then(|| unsafe { raw_slice(self.ptr.cast(), self.len) })
    }

    /// The elements as `f16`, if that is the dtype.
    pub fn as_f16(&self) -> Option<&'a [f16]> {
        // SAFETY: as in `as_f32`; `f16` is a transparent `u16`.
        (self.dtype == DType::F16).then(|| unsafe { raw_slice(self.ptr.cast(), self.len) })
    }

    /// The elements as `bf16`, if that is the dtype.
    pub fn as_bf16(&self) -> Option<&'a [bf16]> {
        // SAFETY: as in `as_f32`; `bf16` is a transparent `u16`.
        (self.dtype == DType::BF16).then(|| unsafe { raw_slice(self.ptr.cast(), self.len) })
    }

    /// The elements as raw bytes.
    pub fn as_bytes(&self) -> &'a [u8] {
        // SAFETY: any initialised number is readable as bytes; `from_raw` promised the rest.
        unsafe { raw_slice(self.ptr, self.len * self.dtype.size()) }
    }
}

impl<'a> SpanMut<'a> {
    /// A writable span over `len` elements of `dtype` at `ptr`.
    ///
    /// # Safety
    /// As [`Span::from_raw`], and nobody else reads or writes the elements for `'a`.
    pub unsafe fn from_raw(ptr: *mut u8, len: usize, dtype: DType) -> Self {
        Self { ptr, len, dtype, owner: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The same elements, read-only, for as long as this borrow lasts.
    pub fn as_span(&self) -> Span<'_> {
        Span { ptr: self.ptr, len: self.len, dtype: self.dtype, owner: PhantomData }
    }

    /// The same elements, borrowed from this span.
    pub fn reborrow(&mut self) -> SpanMut<'_> {
        SpanMut { ptr: self.ptr, len: self.len, dtype: self.dtype, owner: PhantomData }
    }

    /// The elements `start..start + len`, borrowed from this span.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn slice_mut(&mut self, start: usize, len: usize) -> SpanMut<'_> {
        assert!(start <= self.len && len <= self.len - start, "span range {start}+{len} of {}", self.len);
        let ptr = self.ptr.wrapping_add(start * self.dtype.size());
        SpanMut { ptr, len, dtype: self.dtype, owner: PhantomData }
    }

    /// The elements before and from `at`, as two spans.
    ///
    /// # Panics
    /// If `at` is past the end.
    pub fn split_at(self, at: usize) -> (SpanMut<'a>, SpanMut<'a>) {
        assert!(at <= self.len, "span split at {at} of {}", self.len);
        let Self { ptr, len, dtype, owner } = self;
        let tail = ptr.wrapping_add(at * dtype.size());
        (SpanMut { ptr, len: at, dtype, owner }, SpanMut { ptr: tail, len: len - at, dtype, owner })
    }

    /// The elements as `f32`, if that is the dtype.
    pub fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        // SAFETY: the dtype matches, `from_raw` promised alignment, lifetime and exclusiveness.
        (self.dtype == DType::F32).then(|| unsafe { raw_slice_mut(self.ptr.cast(), self.len) })
    }

    /// The elements as `f16`, if that is the dtype.
    pub fn as_f16_mut(&mut self) -> Option<&mut [f16]> {
        // SAFETY: as in `as_f32_mut`; `f16` is a transparent `u16`.
        (self.dtype == DType::F16).then(|| unsafe { raw_slice_mut(self.ptr.cast(), self.len) })
    }

    /// The elements as `bf16`, if that is the dtype.
    pub fn as_bf16_mut(&mut self) -> Option<&mut [bf16]> {
        // SAFETY: as in `as_f32_mut`; `bf16` is a transparent `u16`.
        (self.dtype == DType::BF16).then(|| unsafe { raw_slice_mut(self.ptr.cast(), self.len) })
    }

    /// The elements as raw bytes.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: any byte pattern is a valid number of each dtype; `from_raw` promised the rest.
        unsafe { raw_slice_mut(self.ptr, self.len * self.dtype.size()) }
    }
}

/// [`std::slice::from_raw_parts`] that allows any pointer for an empty slice.
///
/// # Safety
/// As `from_raw_parts` where `len > 0`.
unsafe fn raw_slice<'a, T>(ptr: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(ptr, len) }
}

/// [`std::slice::from_raw_parts_mut`] that allows any pointer for an empty slice.
///
/// # Safety
/// As `from_raw_parts_mut` where `len > 0`.
unsafe fn raw_slice_mut<'a, T>(ptr: *mut T, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(ptr, len) }
}

macro_rules! from_slice {
    ($($element:ty => $dtype:expr),*) => {$(
        impl<'a> From<&'a [$element]> for Span<'a> {
            fn from(slice: &'a [$element]) -> Self {
                Span { ptr: slice.as_ptr().cast(), len: slice.len(), dtype: $dtype, owner: PhantomData }
            }
        }

        impl<'a> From<&'a mut [$element]> for SpanMut<'a> {
            fn from(slice: &'a mut [$element]) -> Self {
                SpanMut { ptr: slice.as_mut_ptr().cast(), len: slice.len(), dtype: $dtype, owner: PhantomData }
            }
        }
    )*};
}
from_slice!(f32 => DType::F32, f16 => DType::F16, bf16 => DType::BF16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_reads_only_as_its_own_dtype() {
        let numbers = [1.0f32, 2.0, 3.0];
        let span = Span::from(&numbers[..]);
        assert_eq!(span.slice(1, 2).as_f32(), Some(&[2.0, 3.0][..]));
        assert!(span.as_bf16().is_none());
        assert_eq!(span.as_bytes().len(), 12);
    }

    #[test]
    fn a_mutable_span_writes_through() {
        let mut numbers = [bf16::ZERO; 4];
        let mut span = SpanMut::from(&mut numbers[..]);
        span.slice_mut(2, 1).as_bf16_mut().unwrap()[0] = bf16::ONE;
        assert_eq!(numbers, [bf16::ZERO, bf16::ZERO, bf16::ONE, bf16::ZERO]);
    }

    #[test]
    #[should_panic(expected = "span range 2+2 of 3")]
    fn a_range_past_the_end_is_refused() {
        let _ = Span::from(&[0.0f32; 3][..]).slice(2, 2);
    }
}
