//! Regions: where in a store's file a run of numbers lies.

use deepspeed_core::DType;

/// What offsets and sizes on disk are multiples of, bytes; what direct I/O asks of nearly every device.
pub const PAGE: usize = 4096;

/// Elements that fill whole pages whatever the dtype: pieces of one length can be cut from regions of any.
pub(crate) const GRANULE: usize = PAGE / 2;

/// A run of `len` numbers of one dtype in a [`Store`](crate::Store). A plain value: copying it copies no data.
///
/// On disk it starts on a page and is padded to whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    store: u64,
    offset: u64,
    len: usize,
    dtype: DType,
}

impl Region {
    pub(crate) fn new(store: u64, offset: u64, len: usize, dtype: DType) -> Self {
        Self { store, offset, len, dtype }
    }

    /// The store it belongs to.
    pub(crate) fn store(&self) -> u64 {
        self.store
    }

    /// Where it starts in the file, bytes.
    pub fn offset(&self) -> u64 {
        self.offset
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

    /// Bytes on disk: those of the elements, rounded up to whole pages.
    pub fn padded_bytes(&self) -> usize {
        padded_bytes(self.len, self.dtype)
    }

    /// The elements `start..start + len` as a region of their own.
    ///
    /// # Panics
    /// If the range reaches past the end, or does not consist of whole pages (its end may be that of the region).
    pub fn slice(&self, start: usize, len: usize) -> Self {
        let per_page = PAGE / self.dtype.size();
        assert!(start <= self.len && len <= self.len - start, "region range {start}+{len} of {}", self.len);
        assert!(
            start.is_multiple_of(per_page) && (start + len == self.len || len.is_multiple_of(per_page)),
            "region range {start}+{len} of {} is not made of whole pages of {per_page} elements",
            self.len
        );
        Self { offset: self.offset + (start * self.dtype.size()) as u64, len, ..*self }
    }

    /// The region in pieces of at most `max_len` elements, in order, each made of whole pages.
    ///
    /// The length of a piece is `max_len` rounded down to a multiple of 2048 (whole pages for every dtype), at least
    /// 2048; the last piece has the rest. A region without elements has no pieces.
    pub fn pieces(&self, max_len: usize) -> impl Iterator<Item = Self> + use<> {
        let (region, step) = (*self, piece_len(max_len));
        (0..region.len).step_by(step).map(move |start| region.slice(start, step.min(region.len - start)))
    }
}

/// The length of the pieces of at most `max_len` elements, see [`Region::pieces`].
pub(crate) fn piece_len(max_len: usize) -> usize {
    (max_len - max_len % GRANULE).max(GRANULE)
}

/// Bytes of `len` elements of `dtype` on disk.
///
/// # Panics
/// If they do not fit the address space.
pub(crate) fn padded_bytes(len: usize, dtype: DType) -> usize {
    len.checked_mul(dtype.size())
        .and_then(|bytes| bytes.checked_next_multiple_of(PAGE))
        .expect("invariant: a region's size fits in memory")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_cover_a_region_in_whole_pages(
            len in 0usize..20_000, max_len in 1usize..8_000, half in any::<bool>(),
        ) {
            let dtype = if half { DType::BF16 } else { DType::F32 };
            let region = Region::new(1, 8192, len, dtype);
            let mut end = 0;
            for piece in region.pieces(max_len) {
                prop_assert_eq!(piece.offset(), 8192 + (end * dtype.size()) as u64);
                prop_assert!(piece.offset().is_multiple_of(PAGE as u64));
                prop_assert!(!piece.is_empty() && piece.len() <= max_len.max(GRANULE));
                end += piece.len();
            }
            prop_assert_eq!(end, len);
        }
    }

    #[test]
    #[should_panic(expected = "whole pages of 1024 elements")]
    fn a_slice_off_the_pages_is_refused() {
        let _ = Region::new(1, 0, 5000, DType::F32).slice(1000, 1024);
    }

    #[test]
    fn a_slice_may_end_with_the_region() {
        let slice = Region::new(1, 4096, 5000, DType::F32).slice(4096, 904);
        assert_eq!((slice.offset(), slice.padded_bytes()), (4096 + 4 * 4096, 4096));
    }
}
