//! The weights of many units in one [`Region`]: every rank sees all of them, and writes its own shards.

use std::{path::Path, sync::Arc};

use deepspeed_core::{DType, Layout, Rank, Span, SpanMut, Unit};

use crate::{Access, CommError, Group, Region};

/// Units start at whole pages, so that one can be given back to the system without its neighbours.
const PAGE: usize = 4096;

/// Where one unit lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Bytes from the start of the region.
    offset: usize,
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

/// The weights of the units of a [`Layout`], one copy for all ranks of a host.
///
/// A rank holds the only handle through which its own shards can be written (COMM-10).
#[derive(Debug)]
pub struct SharedUnits {
    region: Arc<Region>,
    places: Vec<Place>,
    rank: Rank,
}

impl SharedUnits {
    /// Zeroed memory for the units of `layout`, in host memory or in a file in `folder`. Collective.
    ///
    /// # Errors
    /// As [`Region::share`].
    pub fn share(
        group: &dyn Group,
        what: &str,
        layout: &Layout,
        folder: Option<&Path>,
    ) -> Result<Self, CommError> {
        let mut offset = 0;
        let mut places = Vec::with_capacity(layout.units.len());
        for unit in &layout.units {
            places.push(Place { offset, dtype: unit.dtype, shard_len: unit.shard_len });
            offset = (offset + unit.len() * unit.dtype.size()).next_multiple_of(PAGE);
        }
        Ok(Self {
            region: Region::share(group, what, offset, folder, Access::Guarded)?,
            places,
            rank: group.rank(),
        })
    }

    /// The memory itself.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Address of a whole unit in the framework's view.
    pub fn address(&self, unit: &Unit) -> usize {
        self.region.address() + self.places[unit.id.index()].offset
    }

    /// The caller's shard of a unit.
    pub fn own(&self, unit: &Unit) -> Span<'_> {
        let Place { dtype, shard_len, .. } = self.places[unit.id.index()];
        // SAFETY: only this rank writes this shard (COMM-10), and only through `&mut self`.
        unsafe { self.region.span(self.start(unit), shard_len, dtype) }
    }

    /// The caller's shards of all units, by unit id.
    pub fn own_mut(&mut self) -> Vec<SpanMut<'_>> {
        let Self { region, places, rank } = self;
        let span = |place: &Place| {
            let start = place.offset + rank.index() * place.shard_len * place.dtype.size();
            // SAFETY: shards of different units and ranks do not overlap, this handle is borrowed exclusively, and no
            // rank computes with the weights meanwhile (COMM-10).
            unsafe { region.span_mut(start, place.shard_len, place.dtype) }
        };
        places.iter().map(span).collect()
    }

    /// The pages of a unit.
    pub fn pages(&self, unit: &Unit) -> UnitPages {
        let len = (unit.len() * unit.dtype.size()).next_multiple_of(PAGE);
        UnitPages { region: Arc::clone(&self.region), offset: self.places[unit.id.index()].offset, len }
    }

    fn start(&self, unit: &Unit) -> usize {
        let place = self.places[unit.id.index()];
        place.offset + self.rank.index() * place.shard_len * place.dtype.size()
    }
}
