//! Zero-initialised memory aligned for every SIMD width and for direct I/O.

use std::{
    alloc::{Layout as Allocation, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    num::NonZero,
    ptr::NonNull,
};

use crate::{DType, Span, SpanMut};

/// Alignment of every [`AlignedBuffer`], bytes: one page, which also serves cache lines and direct I/O.
const ALIGN: usize = 4096;

/// An owned run of `len` elements of one dtype, zero at first, aligned to 4096 bytes.
///
/// The memory comes from the system's zero pages, so a buffer costs resident memory only where it is written.
pub struct AlignedBuffer {
    ptr: NonNull<u8>,
    len: usize,
    dtype: DType,
}

// SAFETY: the buffer owns its memory exclusively and holds plain numbers.
unsafe impl Send for AlignedBuffer {}
// SAFETY: through `&AlignedBuffer` only reads are possible.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` zeros of `dtype`.
    ///
    /// # Panics
    /// If the size in bytes overflows; aborts, as every Rust allocation does, if memory is refused.
    pub fn zeroed(len: usize, dtype: DType) -> Self {
        if len == 0 {
            // Never read; aligned like the rest so that slices of length zero are well formed.
            let ptr =
                NonNull::without_provenance(NonZero::<usize>::new(ALIGN).expect("invariant: ALIGN > 0"));
            return Self { ptr, len, dtype };
        }
        let allocation = Self::allocation(len, dtype);
        // SAFETY: the size is not zero.
        let ptr = unsafe { alloc_zeroed(allocation) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(allocation) };
        Self { ptr, len, dtype }
    }

    fn allocation(len: usize, dtype: DType) -> Allocation {
        let bytes = len.checked_mul(dtype.size()).expect("invariant: buffer size fits in memory");
        Allocation::from_size_align(bytes, ALIGN).expect("invariant: buffer size fits in memory")
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

    /// All elements, read-only.
    pub fn span(&self) -> Span<'_> {
        // SAFETY: the buffer owns `len` initialised, aligned elements for as long as it is borrowed.
        unsafe { Span::from_raw(self.ptr.as_ptr(), self.len, self.dtype) }
    }

    /// All elements, writable.
    pub fn span_mut(&mut self) -> SpanMut<'_> {
        // SAFETY: as in `span`, and `&mut self` is exclusive.
        unsafe { SpanMut::from_raw(self.ptr.as_ptr(), self.len, self.dtype) }
    }

    /// The elements as `f32`.
    ///
    /// # Panics
    /// If the dtype is another one.
    pub fn as_f32(&self) -> &[f32] {
        self.span().as_f32().expect("invariant: an fp32 buffer")
    }

    /// The elements as writable `f32`.
    ///
    /// # Panics
    /// If the dtype is another one.
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.dtype, DType::F32, "an fp32 buffer");
        // SAFETY: the dtype was checked; the buffer owns `len` aligned elements and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), self.len) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with the same size and alignment.
            unsafe { dealloc(self.ptr.as_ptr(), Self::allocation(self.len, self.dtype)) }
        }
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} x {})", self.len, self.dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zero_and_aligned() {
        let mut buffer = AlignedBuffer::zeroed(1000, DType::F32);
        assert_eq!(buffer.as_f32_mut().as_ptr() as usize % ALIGN, 0);
        assert!(buffer.as_f32().iter().all(|x| *x == 0.0));
        buffer.as_f32_mut()[999] = 1.0;
        assert_eq!(buffer.as_f32()[999], 1.0);
    }

    #[test]
    fn may_be_empty() {
        let mut buffer = AlignedBuffer::zeroed(0, DType::F32);
        assert!(buffer.as_f32_mut().is_empty());
    }
}
