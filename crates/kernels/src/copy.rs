//! Copies of what will not be looked at soon.

/// Bytes from which a copy goes past the cache.
const LARGE: usize = 1 << 20;

/// Copies `from` to `to`. A large copy is written past the cache: the memory written to is not read first, and what the
/// cache holds stays there.
///
/// # Panics
/// If the lengths differ.
pub fn copy_past_cache(from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len(), "a copy is as long as its source");
    #[cfg(target_arch = "x86_64")]
    if from.len() >= LARGE {
        streamed(from, to);
        return;
    }
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
fn streamed(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    const WORD: usize = size_of::<__m128i>();
    /// Words to a line of the cache, which is filled and written out as a whole.
    const LINE: usize = 4;

    let head = to.as_ptr().align_offset(WORD * LINE).min(from.len());
    let (from_head, from) = from.split_at(head);
    let (to_head, to) = to.split_at_mut(head);
    to_head.copy_from_slice(from_head);
    let mut sources = from.chunks_exact(WORD * LINE);
    let mut targets = to.chunks_exact_mut(WORD * LINE);
    for (source, target) in sources.by_ref().zip(targets.by_ref()) {
        // SAFETY: both have the size of LINE words; `target` begins at a multiple of that, as streaming stores ask, and
        // loads need no alignment. SSE2 is part of x86-64.
        unsafe {
            let (source, target) = (source.as_ptr().cast::<__m128i>(), target.as_mut_ptr().cast::<__m128i>());
            let words: [__m128i; LINE] = std::array::from_fn(|i| _mm_loadu_si128(source.add(i)));
            for (i, word) in words.into_iter().enumerate() {
                _mm_stream_si128(target.add(i), word);
            }
        }
    }
    targets.into_remainder().copy_from_slice(sources.remainder());
    // SAFETY: no memory is touched; streaming stores come before whatever this thread tells others from here on.
    unsafe { _mm_sfence() };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_offset() {
        let from: Vec<u8> = (0..LARGE + 500).map(|i| (i % 251) as u8).collect();
        for (start, len) in [(0, 0), (1, 10), (0, LARGE), (3, LARGE + 1), (63, LARGE + 130), (64, LARGE + 64)]
        {
            for offset in [0, 1, 17, 63] {
                let mut to = vec![0xaa; len + offset + 1];
                copy_past_cache(&from[start..start + len], &mut to[offset..offset + len]);
                assert_eq!(to[offset..offset + len], from[start..start + len], "{start} {len} {offset}");
                assert_eq!(to[offset + len], 0xaa);
            }
        }
    }
}
