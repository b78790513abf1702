//! The weights of many units in one [`Region`]: shared by the ranks of a host, which see all of them and write each its own
//! shards, or those of one rank alone, in a file of its own.

use std::{path::Path, sync::Arc};

use deepspeed_core::{DType, Layout, Span, SpanMut, Unit};

use crate::{Access, CommError, Group, Region, Solo};

/// Units start at whole pages, so that one can be given back to the system without its neighbours.
const PAGE: usize = 4096;

/// Where one unit lies; bytes from the start of the region.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// What lies here of the unit: all of it, or the caller's shard.
    offset: usize,
    bytes: usize,
    /// The caller's shard.
    own: usize,
    dtype: DType,
    /// Elements of one shard.
    shard_len: usize,
}

/// The pages of one unit, which can be given back to the system while somebody holds the unit's weights.
#[derive(Clone, Debug)]
pub struct UnitPages {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl UnitPages {
    /// Gives the memory of a unit that lies in a file back to the system: it is read again when it is used.
    ///
    /// # Errors
    /// As [`Region::drop_pages`].
    pub fn give_back(&self) -> Result<(), CommError> {
        self.region.drop_pages(self.offset, self.len)
    }
}

/// The weights of the units of a [`Layout`]: one copy for all ranks of a host, or one rank's shards.
///
/// A rank holds the only handle through which its own shards can be written (COMM-10).
#[derive(Debug)]
pub struct MappedUnits {
    region: Arc<Region>,
    places: Vec<Place>,
}

impl MappedUnits {
    /// Zeroed memory for the whole units of `layout`, in host memory or in a file in `folder`. Collective.
    ///
    /// # Errors
    /// As [`Region::share`].
    pub fn share(
        group: &dyn Group,
        what: &str,
        layout: &Layout,
        folder: Option<&Path>,
    ) -> Result<Self, CommError> {
        let (places, bytes) = places(layout, |unit| (unit.len(), group.rank().index() * unit.shard_len));
        Ok(Self { region: Region::share(group, what, bytes, folder, Access::Guarded)?, places })
    }

    /// Zeroed memory for the caller's shards of the units of `layout`, in a file of its own in `folder`.
    ///
    /// # Errors
    /// As [`Region::share`].
    pub fn alone(what: &str, layout: &Layout, folder: &Path) -> Result<Self, CommError> {
        let (places, bytes) = places(layout, |unit| (unit.shard_len, 0));
        let region = Region::share(&Solo::new(), what, bytes, Some(folder), Access::Guarded)?;
        Ok(Self { region, places })
    }

    /// The memory itself.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Address of a unit in the framework's view.
    pub fn address(&self, unit: &Unit) -> usize {
        self.region.address() + self.places[unit.id.index()].offset
    }

    /// The caller's shard of a unit.
    pub fn own(&self, unit: &Unit) -> Span<'_> {
        let Place { own, dtype, shard_len, .. } = self.places[unit.id.index()];
        // SAFETY: only this rank writes this shard (COMM-10), and only through `&mut self`.
        unsafe { self.region.span(own, shard_len, dtype) }
    }

    /// The caller's shards of all units, by unit id.
    pub fn own_mut(&mut self) -> Vec<SpanMut<'_>> {
        let Self { region, places } = self;
        let span = |place: &Place| {
            // SAFETY: shards of different units and ranks do not overlap, this handle is borrowed exclusively, and no
            // rank computes with the weights meanwhile (COMM-10).
            unsafe { region.span_mut(place.own, place.shard_len, place.dtype) }
        };
        places.iter().map(span).collect()
    }

    /// The pages of a unit.
    pub fn pages(&self, unit: &Unit) -> UnitPages {
        let Place { offset, bytes, .. } = self.places[unit.id.index()];
        UnitPages { region: Arc::clone(&self.region), offset, len: bytes.next_multiple_of(PAGE) }
    }
}

/// Where the units of `layout` lie, and how many bytes they take; `of` is how many elements of a unit are here, and which is
/// the first of the caller's shard.
fn places(layout: &Layout, of: impl Fn(&Unit) -> (usize, usize)) -> (Vec<Place>, usize) {
    let mut offset: usize = 0;
    let mut places = Vec::with_capacity(layout.units.len());
    for unit in &layout.units {
        let (len, first) = of(unit);
        let (bytes, own) = (len * unit.dtype.size(), offset + first * unit.dtype.size());
        places.push(Place { offset, bytes, own, dtype: unit.dtype, shard_len: unit.shard_len });
        offset = (offset + bytes).next_multiple_of(PAGE);
    }
    (places, offset)
}
