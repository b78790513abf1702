//! Chunks of fixed size, worked on by a fixed number of threads.
//!
//! The chunks depend on the length alone and results come back in their order, so a caller that folds them in
//! order gets the same bits from one thread as from many.

use deepspeed_core::{Span, SpanMut};
use rayon::iter::{IntoParallelIterator, ParallelIterator};

/// Elements per chunk: large enough that handing it out costs nothing, a multiple of every alignment in use.
pub const CHUNK: usize = 1 << 16;

/// Something that can be cut in two: slices, spans, and tuples, options and vectors of them, cut at one place.
pub trait Split: Sized + Send {
    /// Number of elements; `None` if any number would do.
    ///
    /// # Panics
    /// If parts of a tuple or vector differ in length.
    fn elements(&self) -> Option<usize>;

    /// The elements before `mid` and the rest.
    ///
    /// # Panics
    /// If `mid` is past the end.
    fn split(self, mid: usize) -> (Self, Self);
}

impl<T: Sync> Split for &[T] {
    fn elements(&self) -> Option<usize> {
        Some(self.len())
    }

    fn split(self, mid: usize) -> (Self, Self) {
        self.split_at(mid)
    }
}

impl<T: Send> Split for &mut [T] {
    fn elements(&self) -> Option<usize> {
        Some(self.len())
    }

    fn split(self, mid: usize) -> (Self, Self) {
        self.split_at_mut(mid)
    }
}

impl Split for Span<'_> {
    fn elements(&self) -> Option<usize> {
        Some(self.len())
    }

    fn split(self, mid: usize) -> (Self, Self) {
        (self.slice(0, mid), self.slice(mid, self.len() - mid))
    }
}

impl<'a> Split for SpanMut<'a> {
    fn elements(&self) -> Option<usize> {
        Some(self.len())
    }

    fn split(mut self, mid: usize) -> (Self, Self) {
        let (len, dtype) = (self.len(), self.dtype());
        let (left, right) = self.as_bytes_mut().split_at_mut(mid * dtype.size());
        // SAFETY: the halves do not overlap; `self`, which held both for `'a`, is consumed.
        unsafe {
            (
                SpanMut::<'a>::from_raw(left.as_mut_ptr(), mid, dtype),
                SpanMut::<'a>::from_raw(right.as_mut_ptr(), len - mid, dtype),
            )
        }
    }
}

/// `None` counts as any length.
impl<S: Split> Split for Option<S> {
    fn elements(&self) -> Option<usize> {
        self.as_ref().and_then(Split::elements)
    }

    fn split(self, mid: usize) -> (Self, Self) {
        self.map(|part| part.split(mid)).unzip()
    }
}

/// An empty vector counts as any length.
impl<S: Split> Split for Vec<S> {
    fn elements(&self) -> Option<usize> {
        self.iter().fold(None, |len, part| same(len, part.elements()))
    }

    fn split(self, mid: usize) -> (Self, Self) {
        self.into_iter().map(|part| part.split(mid)).unzip()
    }
}

macro_rules! split_tuple {
    ($($part:ident),+) => {
        #[allow(non_snake_case, reason = "the type parameters name the parts")]
        impl<$($part: Split),+> Split for ($($part,)+) {
            fn elements(&self) -> Option<usize> {
                let ($($part,)+) = self;
                let len = None;
                $(let len = same(len, $part.elements());)+
                len
            }

            fn split(self, mid: usize) -> (Self, Self) {
                let ($($part,)+) = self;
                $(let $part = $part.split(mid);)+
                (($($part.0,)+), ($($part.1,)+))
            }
        }
    };
}
split_tuple!(A, B);
split_tuple!(A, B, C);
split_tuple!(A, B, C, D);
split_tuple!(A, B, C, D, E);

/// The length of both parts.
fn same(a: Option<usize>, b: Option<usize>) -> Option<usize> {
    if let (Some(a), Some(b)) = (a, b) {
        assert_eq!(a, b, "parts of different length");
    }
    a.or(b)
}

/// A fixed number of threads; one means the caller's own and no pool.
#[derive(Debug)]
pub struct Workers {
    pool: Option<rayon::ThreadPool>,
}

impl Workers {
    /// `threads` of them; 0 counts as 1.
    ///
    /// # Errors
    /// If the system refuses the threads.
    pub fn new(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let pool = match threads {
            0 | 1 => None,
            _ => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|index| format!("ds-kernel-{index}"))
                    .build()?,
            ),
        };
        Ok(Self { pool })
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }

    /// Calls `work` with each of `parts`, in any order.
    ///
    /// # Panics
    /// If `work` panics.
    pub fn each<T: Send>(&self, parts: Vec<T>, work: impl Fn(T) + Sync) {
        match &self.pool {
            None => parts.into_iter().for_each(work),
            Some(pool) => pool.install(|| parts.into_par_iter().for_each(&work)),
        }
    }

    /// Cuts `data` into chunks of [`CHUNK`] elements (the last may be shorter), calls `work` on each, and returns
    /// the results in the order of the chunks. Data without elements is no chunk.
    ///
    /// # Panics
    /// If parts of `data` differ in length, or `work` panics.
    pub fn map_chunks<D: Split, R: Send>(&self, data: D, work: impl Fn(D) -> R + Sync) -> Vec<R> {
        let mut left = data.elements().unwrap_or(0);
        let mut chunks = Vec::with_capacity(left.div_ceil(CHUNK));
        let mut data = data;
        while left > CHUNK {
            let (chunk, rest) = data.split(CHUNK);
            chunks.push(chunk);
            data = rest;
            left -= CHUNK;
        }
        if left > 0 {
            chunks.push(data);
        }
        match &self.pool {
            None => chunks.into_iter().map(&work).collect(),
            Some(pool) => pool.install(|| chunks.into_par_iter().map(&work).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_change_no_result_and_no_order() {
        let len = 3 * CHUNK + 17;
        let input: Vec<f32> = (0..len).map(|i| i as f32).collect();
        let run = |threads| {
            let workers = Workers::new(threads).unwrap();
            assert_eq!(workers.threads(), threads.max(1));
            let mut output = vec![0.0f32; len];
            let sums =
                workers.map_chunks((&input[..], SpanMut::from(&mut output[..])), |(input, mut output)| {
                    output.as_f32_mut().unwrap().copy_from_slice(input);
                    crate::sum_squares(input.into())
                });
            assert_eq!(sums.len(), 4);
            (output, sums)
        };
        assert_eq!(run(0), run(1));
        assert_eq!(run(1), run(3));
        assert_eq!(run(1).0, input);
    }

    #[test]
    fn nothing_is_no_chunk_and_none_has_any_length() {
        let workers = Workers::new(1).unwrap();
        assert!(workers.map_chunks(&[0.0f32; 0][..], |_| ()).is_empty());
        let parts = (&[0.0f32; 5][..], None::<Span<'_>>);
        assert_eq!(workers.map_chunks(parts, |(x, none)| (x.len(), none.is_none())), [(5, true)]);
    }

    #[test]
    #[should_panic(expected = "parts of different length")]
    fn unequal_parts_are_refused() {
        let _ = Workers::new(1).unwrap().map_chunks((&[0u8; 2][..], &[0u8; 3][..]), |_| ());
    }
}
