//! Stage 3: the weights that a rank keeps only a shard of.

use std::path::Path;

use deepspeed_comm::{CommError, Group, MappedUnits, UnitPages};
use deepspeed_core::{AlignedBuffer, Layout, Rank, Span, SpanMut, Unit};

/// Where shards of weights lie between uses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Home<'a> {
    /// In memory that the ranks of the host share, or in a file that they all map, in a folder.
    Shared(Option<&'a Path>),
    /// In a file of this rank's own, in a folder.
    Disk(&'a Path),
    /// In this rank's own memory: the shards of so many of the trained units, the first ones, and no others, as a device has
    /// those; of all units, without a number.
    Memory(Option<usize>),
}

/// The shards of one layout's units, in the model's dtype.
#[derive(Debug)]
pub(crate) enum Shards {
    /// One copy for all ranks of the host: what others own is there to be read, and nothing is ever gathered.
    Shared(MappedUnits),
    /// A file of this rank alone; whoever computes gathers units first.
    Disk(MappedUnits),
    /// Memory of this rank alone; whoever computes gathers units first. A shard that a device has takes none.
    Memory(Vec<AlignedBuffer>),
}

impl Shards {
    /// Zeroed shards of the units of `layout`, which are `trained` or not. Collective where they are shared.
    ///
    /// # Errors
    /// [`CommError`] where shared memory, or disk, is refused.
    fn new(group: &dyn Group, layout: &Layout, home: Home<'_>, trained: bool) -> Result<Self, CommError> {
        let what = if trained { "weights" } else { "frozen weights" };
        Ok(match home {
            Home::Shared(folder) => Self::Shared(MappedUnits::share(group, what, layout, folder)?),
            Home::Disk(folder) => Self::Disk(MappedUnits::alone(what, layout, folder)?),
            Home::Memory(count) => {
                let count = count.map_or(usize::MAX, |count| if trained { count } else { 0 });
                let len = |unit: &Unit| if unit.id.index() < count { unit.shard_len } else { 0 };
                let zeros = |unit: &Unit| AlignedBuffer::zeroed(len(unit), unit.dtype);
                Self::Memory(layout.units.iter().map(zeros).collect())
            }
        })
    }

    /// The buffer of one unit, where it is memory of this rank alone.
    pub(crate) fn buffer_mut(&mut self, unit: &Unit) -> Option<&mut AlignedBuffer> {
        match self {
            Self::Shared(_) | Self::Disk(_) => None,
            Self::Memory(shards) => shards.get_mut(unit.id.index()),
        }
    }

    /// This rank's shard of `unit`.
    pub(crate) fn own(&self, unit: &Unit) -> Span<'_> {
        match self {
            Self::Shared(units) | Self::Disk(units) => units.own(unit),
            Self::Memory(shards) => shards[unit.id.index()].span(),
        }
    }

    /// This rank's shards of all units, by unit id.
    pub(crate) fn own_mut(&mut self) -> Vec<SpanMut<'_>> {
        match self {
            Self::Shared(units) | Self::Disk(units) => units.own_mut(),
            Self::Memory(shards) => shards.iter_mut().map(AlignedBuffer::span_mut).collect(),
        }
    }

    /// Fills this rank's shards, but for those that a device has, from whole parameters of any dtype, by parameter id.
    pub(crate) fn fill(&mut self, layout: &Layout, rank: Rank, params: &[Span<'_>]) {
        for (unit, mut own) in layout.units.iter().zip(self.own_mut()).filter(|(_, own)| !own.is_empty()) {
            let shard = unit.shard(rank);
            for fragment in unit.fragments(shard.clone()) {
                let source = params[fragment.param.index()].slice(fragment.param_offset, fragment.len);
                let target = own.slice_mut(fragment.unit_offset - shard.start, fragment.len);
                deepspeed_kernels::cast(source, target);
            }
        }
    }

    /// The memory that all ranks share, if they do.
    pub(crate) fn shared(&self) -> Option<&MappedUnits> {
        match self {
            Self::Shared(units) => Some(units),
            Self::Disk(_) | Self::Memory(_) => None,
        }
    }

    /// This rank's own file, if it has one.
    pub(crate) fn on_disk(&self) -> Option<&MappedUnits> {
        match self {
            Self::Disk(units) => Some(units),
            Self::Shared(_) | Self::Memory(_) => None,
        }
    }

    /// The pages of a unit, where they can be given back to the system.
    fn pages(&self, unit: &Unit) -> Option<UnitPages> {
        match self {
            Self::Shared(units) | Self::Disk(units) => Some(units.pages(unit)),
            Self::Memory(_) => None,
        }
    }

    /// Bytes of memory this rank is charged with: its shards.
    pub(crate) fn bytes(&self, layout: &Layout) -> usize {
        layout.units.iter().map(|unit| unit.shard_len * unit.dtype.size()).sum()
    }
}

/// Trained and frozen weights at stage 3.
#[derive(Debug)]
pub(crate) struct ShardedWeights {
    pub(crate) trained: Shards,
    /// The layout of the parameters that are not trained, and their weights.
    pub(crate) frozen_layout: Layout,
    pub(crate) frozen: Shards,
    /// By unit, the trained ones first: its pages, if it lies in a file and leaves memory after each use.
    pub(crate) pages: Vec<Option<UnitPages>>,
}

impl ShardedWeights {
    /// Zeroed weights of the units of `layout` and `frozen_layout`; of those in a file, the first `kept` elements of each
    /// rank's part stay in memory. Collective where they are shared.
    ///
    /// # Errors
    /// [`CommError`] where shared memory, or disk, is refused.
    pub(crate) fn new(
        group: &dyn Group,
        layout: &Layout,
        frozen_layout: Layout,
        home: Home<'_>,
        kept: usize,
    ) -> Result<Self, CommError> {
        let trained = Shards::new(group, layout, home, true)?;
        let frozen = Shards::new(group, &frozen_layout, home, false)?;
        let in_a_file = matches!(home, Home::Shared(Some(_)) | Home::Disk(_));
        let units = layout.units.iter().map(|unit| (&trained, unit));
        let units = units.chain(frozen_layout.units.iter().map(|unit| (&frozen, unit)));
        let mut elements = 0usize;
        let pages = units
            .map(|(shards, unit)| {
                elements = elements.saturating_add(unit.shard_len);
                shards.pages(unit).filter(|_| in_a_file && elements > kept)
            })
            .collect();
        Ok(Self { trained, frozen_layout, frozen, pages })
    }

    /// Gives the memory of all units back that lie in a file and leave memory after each use.
    ///
    /// # Errors
    /// [`CommError`] where the system refuses.
    pub(crate) fn give_back_all(&self) -> Result<(), CommError> {
        self.pages.iter().flatten().try_for_each(UnitPages::give_back)
    }
}

/// Gives the memory of a unit back to the system where it has `pages` to give: it is read again when it is used.
///
/// # Errors
/// [`CommError`] where the system refuses.
pub(crate) fn give_back(pages: &[Option<UnitPages>], unit: usize) -> Result<(), CommError> {
    pages.get(unit).and_then(Option::as_ref).map_or(Ok(()), UnitPages::give_back)
}
