//! Zero-initialised memory aligned for every SIMD width and for direct I/O.

use std::{
    alloc::{Layout as Allocation, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    num::NonZero,
    ptr::NonNull,
};

use memmap2::{MmapMut, UncheckedAdvice};

use crate::{DType, Span, SpanMut};

/// Alignment of every [`AlignedBuffer`], bytes: one page, which also serves cache lines and direct I/O.
const ALIGN: usize = 4096;

/// Bytes from which a buffer is mapped instead of allocated: its pages then come zeroed from the kernel when they are
/// first touched, where the allocator would write zeros at once.
const MAP_FROM: usize = 1 << 20;

/// An owned run of `len` elements of one dtype, zero at first, aligned to 4096 bytes.
///
/// A buffer of a mebibyte or more costs resident memory only where it has been written.
pub struct AlignedBuffer {
    ptr: NonNull<u8>,
    len: usize,
    dtype: DType,
    memory: Memory,
}

/// Who owns the bytes at `AlignedBuffer::ptr`.
enum Memory {
    Nothing,
    Heap(Allocation),
    Mapped(MmapMut),
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
            return Self { ptr, len, dtype, memory: Memory::Nothing };
        }
        let bytes = len.checked_mul(dtype.size()).expect("invariant: buffer size fits in memory");
        let allocation =
            Allocation::from_size_align(bytes, ALIGN).expect("invariant: buffer size fits in memory");
        if bytes >= MAP_FROM {
            let Ok(mut map) = MmapMut::map_anon(bytes) else { handle_alloc_error(allocation) };
            let ptr = NonNull::new(map.as_mut_ptr()).expect("invariant: a mapping is not at address 0");
            return Self { ptr, len, dtype, memory: Memory::Mapped(map) };
        }
        // SAFETY: the size is not zero.
        let ptr = unsafe { alloc_zeroed(allocation) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(allocation) };
        Self { ptr, len, dtype, memory: Memory::Heap(allocation) }
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

    /// Makes all elements zero, and gives the memory back to the system until it is written again (from a mebibyte on).
    pub fn give_back(&mut self) {
        if let Memory::Mapped(map) = &self.memory {
            // SAFETY: the mapping is private and anonymous, so that its pages read as zeros afterwards, which is a valid
            // number of each dtype; `&mut self` says that nobody holds a span.
            if unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) }.is_ok() {
                return;
            }
        }
        self.span_mut().as_bytes_mut().fill(0);
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
        if let Memory::Heap(allocation) = self.memory {
            // SAFETY: allocated in `zeroed` with the same size and alignment.
            unsafe { dealloc(self.ptr.as_ptr(), allocation) }
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
    fn is_zero_and_aligned_whoever_owns_it() {
        for len in [1, 1000, MAP_FROM / 4, MAP_FROM] {
            let mut buffer = AlignedBuffer::zeroed(len, DType::F32);
            assert_eq!(buffer.as_f32_mut().as_ptr() as usize % ALIGN, 0);
            assert!(buffer.as_f32().iter().all(|x| *x == 0.0));
            buffer.as_f32_mut()[len - 1] = 1.0;
            assert_eq!(buffer.as_f32()[len - 1], 1.0);
        }
    }

    #[test]
    fn is_zero_again_after_its_memory_was_given_back() {
        for len in [1000, MAP_FROM] {
            let mut buffer = AlignedBuffer::zeroed(len, DType::F32);
            buffer.as_f32_mut().fill(1.0);
            buffer.give_back();
            assert!(buffer.as_f32().iter().all(|x| *x == 0.0));
            buffer.as_f32_mut()[len - 1] = 2.0;
            assert_eq!(buffer.as_f32()[len - 1], 2.0);
        }
    }

    #[test]
    fn may_be_empty() {
        let mut buffer = AlignedBuffer::zeroed(0, DType::F32);
        assert!(buffer.as_f32_mut().is_empty());
    }
}
