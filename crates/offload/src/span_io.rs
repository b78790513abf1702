//! Plain reads and writes of regions from and to anybody's memory: first values, checkpoints, single parameters.
//!
//! They go through a few buffers of their own, because the memory need not be aligned and may be freed at any time.

use std::ops::Range;

use deepspeed_core::{DType, Span, SpanMut};

use crate::{Access, Depth, Item, Lane, OffloadError, PAGE, Region, Result, Store, Stream};

/// Bytes moved at a time.
const CHUNK: usize = 4 << 20;

/// Chunks in flight beside the one that is being copied.
const IN_FLIGHT: usize = 3;

impl Store {
    /// Reads a whole region into `span`.
    ///
    /// # Errors
    /// As [`Store::read_at`].
    pub fn read(&self, region: &Region, span: SpanMut<'_>) -> Result<()> {
        check_len("Store::read", region, span.len())?;
        self.read_at(region, 0, span)
    }

    /// Writes all of `span` as a whole region.
    ///
    /// # Errors
    /// As [`Store::write_at`].
    pub fn write(&self, region: &Region, span: Span<'_>) -> Result<()> {
        check_len("Store::write", region, span.len())?;
        self.write_at(region, 0, span)
    }

    /// Reads the elements of a region from `start` on into `span`.
    ///
    /// # Errors
    /// [`OffloadError::Arguments`] if the range reaches past the region's end, or the dtypes differ; else what the
    /// device says.
    pub fn read_at(&self, region: &Region, start: usize, mut span: SpanMut<'_>) -> Result<()> {
        let range = self.range("Store::read_at", region, start, span.len(), span.dtype())?;
        let size = region.dtype().size();
        let bytes = span.as_bytes_mut();
        self.each_chunk(region, &covering(region, &range), Access::Read, |chunk_start, chunk| {
            let (from, to) = shared(&range, chunk_start, chunk.len());
            let source = &chunk.as_span().as_bytes()[(from - chunk_start) * size..(to - chunk_start) * size];
            bytes[(from - start) * size..(to - start) * size].copy_from_slice(source);
        })
    }

    /// Writes all of `span` over the elements of a region from `start` on; the other elements keep their values.
    ///
    /// # Errors
    /// [`OffloadError::Arguments`] if the range reaches past the region's end, or the dtypes differ; else what the
    /// device says.
    pub fn write_at(&self, region: &Region, start: usize, span: Span<'_>) -> Result<()> {
        let range = self.range("Store::write_at", region, start, span.len(), span.dtype())?;
        let size = region.dtype().size();
        let bytes = span.as_bytes();
        for (range, access) in by_pages(region, &range) {
            self.each_chunk(region, &covering(region, &range), access, |chunk_start, chunk| {
                let (from, to) = shared(&range, chunk_start, chunk.len());
                chunk.as_bytes_mut()[(from - chunk_start) * size..(to - chunk_start) * size]
                    .copy_from_slice(&bytes[(from - start) * size..(to - start) * size]);
            })?;
        }
        Ok(())
    }

    /// The elements from `start`, after checks.
    fn range(
        &self,
        call: &'static str,
        region: &Region,
        start: usize,
        len: usize,
        dtype: DType,
    ) -> Result<Range<usize>> {
        let problem = if !self.owns(region) {
            "the region belongs to another store".into()
        } else if dtype != region.dtype() {
            format!("{dtype} memory for a region of {}", region.dtype())
        } else if start > region.len() || len > region.len() - start {
            format!("{len} elements from {start} on of a region of {}", region.len())
        } else {
            return Ok(start..start + len);
        };
        Err(OffloadError::Arguments { call, problem })
    }

    /// Calls `work` with each chunk of the elements `range` (whole pages) of `region`, and where it starts.
    fn each_chunk(
        &self,
        region: &Region,
        range: &Range<usize>,
        access: Access,
        mut work: impl FnMut(usize, &mut SpanMut<'_>),
    ) -> Result<()> {
        let region = region.slice(range.start, range.len());
        let items: Vec<Item> = Item::cut(0, &[region], CHUNK / region.dtype().size()).collect();
        let lane = Lane { dtype: region.dtype(), len: items.iter().map(Item::len).max().unwrap_or(0) };
        let others = IN_FLIGHT.min(items.len().saturating_sub(1));
        let depth = match access {
            Access::Read => Depth { read_ahead: others, write_behind: 0 },
            Access::Update | Access::Overwrite => Depth { read_ahead: 0, write_behind: others },
        };
        let mut stream = Stream::new(self, &[lane], depth);
        let mut pass = stream.pass(&items, std::slice::from_ref(&access))?;
        while let Some(mut loaded) = pass.load_next()? {
            work(range.start + loaded.item().start, &mut loaded.lane_mut(0));
            loaded.write_back()?;
        }
        pass.finish().map(drop)
    }
}

fn check_len(call: &'static str, region: &Region, len: usize) -> Result<()> {
    if len == region.len() {
        return Ok(());
    }
    let problem = format!("memory for {len} elements, but the region has {}", region.len());
    Err(OffloadError::Arguments { call, problem })
}

/// The whole pages that hold `range`; the end of the region counts as a page's end.
fn covering(region: &Region, range: &Range<usize>) -> Range<usize> {
    let per_page = PAGE / region.dtype().size();
    let end = range.end.next_multiple_of(per_page).min(region.len());
    (range.start / per_page * per_page).min(end)..end
}

/// The part of `range` in the chunk of `len` elements from `start`: first element and end.
fn shared(range: &Range<usize>, start: usize, len: usize) -> (usize, usize) {
    (range.start.max(start), range.end.min(start + len))
}

/// `range` in up to three parts: the page it begins in the middle of, whole pages, the page it ends in the middle of.
/// The whole ones need not be read to be written.
fn by_pages(region: &Region, range: &Range<usize>) -> impl Iterator<Item = (Range<usize>, Access)> + use<> {
    let per_page = PAGE / region.dtype().size();
    let first = range.start.next_multiple_of(per_page).min(range.end);
    let last =
        if range.end == region.len() { range.end } else { (range.end / per_page * per_page).max(first) };
    let parts = [
        (range.start..first, Access::Update),
        (first..last, Access::Overwrite),
        (last..range.end, Access::Update),
    ];
    parts.into_iter().filter(|(part, _)| !part.is_empty())
}
