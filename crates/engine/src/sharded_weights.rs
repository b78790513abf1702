//! Stage 3: the weights that a rank keeps only a shard of.

use std::path::Path;

use deepspeed_comm::{CommError, Group, SharedUnits, UnitPages};
use deepspeed_core::{AlignedBuffer, Layout, Rank, Span, SpanMut, Unit};

/// The shards of one layout's units, in the model's dtype.
#[derive(Debug)]
pub(crate) enum Shards {
    /// One copy for all ranks of the host: what others own is there to be read, and nothing is ever gathered.
    Shared(SharedUnits),
    /// Memory of this rank alone; whoever computes gathers units first.
    Private(Vec<AlignedBuffer>),
}

impl Shards {
    /// Zeroed shards of the units of `layout`. Collective.
    ///
    /// # Errors
    /// [`CommError`] where shared memory, or disk in `folder`, is refused.
    pub(crate) fn new(
        group: &dyn Group,
        what: &str,
        layout: &Layout,
        folder: Option<&Path>,
    ) -> Result<Self, CommError> {
        if group.shares_memory() {
            return Ok(Self::Shared(SharedUnits::share(group, what, layout, folder)?));
        }
        Ok(Self::private(layout, true))
    }

    /// Zeroed shards of this rank alone; without elements where a device has them (`here` is false).
    pub(crate) fn private(layout: &Layout, here: bool) -> Self {
        let zeros = |unit: &Unit| AlignedBuffer::zeroed(if here { unit.shard_len } else { 0 }, unit.dtype);
        Self::Private(layout.units.iter().map(zeros).collect())
    }

    /// The buffer of one unit, where it is this rank's alone.
    pub(crate) fn buffer_mut(&mut self, unit: &Unit) -> Option<&mut AlignedBuffer> {
        match self {
            Self::Shared(_) => None,
            Self::Private(shards) => shards.get_mut(unit.id.index()),
        }
    }

    /// This rank's shard of `unit`.
    pub(crate) fn own(&self, unit: &Unit) -> Span<'_> {
        match self {
            Self::Shared(units) => units.own(unit),
            Self::Private(shards) => shards[unit.id.index()].span(),
        }
    }

    /// This rank's shards of all units, by unit id.
    pub(crate) fn own_mut(&mut self) -> Vec<SpanMut<'_>> {
        match self {
            Self::Shared(units) => units.own_mut(),
            Self::Private(shards) => shards.iter_mut().map(AlignedBuffer::span_mut).collect(),
        }
    }

    /// Fills this rank's shards from whole parameters of any dtype, by parameter id.
    pub(crate) fn fill(&mut self, layout: &Layout, rank: Rank, params: &[Span<'_>]) {
        for (unit, mut own) in layout.units.iter().zip(self.own_mut()) {
            let shard = unit.shard(rank);
            for fragment in unit.fragments(shard.clone()) {
                let source = params[fragment.param.index()].slice(fragment.param_offset, fragment.len);
                let target = own.slice_mut(fragment.unit_offset - shard.start, fragment.len);
                deepspeed_kernels::cast(source, target);
            }
        }
    }

    /// The memory that all ranks share, if they do.
    pub(crate) fn shared(&self) -> Option<&SharedUnits> {
        match self {
            Self::Shared(units) => Some(units),
            Self::Private(_) => None,
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
    /// Zeroed weights of the units of `layout` and `frozen_layout`, in memory or in a file in `folder`, of which the first
    /// `kept` elements stay in memory. Collective.
    ///
    /// # Errors
    /// As [`Shards::new`].
    pub(crate) fn new(
        group: &dyn Group,
        layout: &Layout,
        frozen_layout: Layout,
        folder: Option<&Path>,
        kept: usize,
    ) -> Result<Self, CommError> {
        let trained = Shards::new(group, "weights", layout, folder)?;
        let frozen = Shards::new(group, "frozen weights", &frozen_layout, folder)?;
        let units = layout.units.iter().map(|unit| (&trained, unit));
        let units = units.chain(frozen_layout.units.iter().map(|unit| (&frozen, unit)));
        let mut elements = 0usize;
        let pages = units
            .map(|(shards, unit)| {
                elements = elements.saturating_add(unit.len());
                let leaves = folder.is_some() && elements > kept;
                shards.shared().filter(|_| leaves).map(|units| units.pages(unit))
            })
            .collect();
        Ok(Self { trained, frozen_layout, frozen, pages })
    }
}

/// Gives the memory of a unit back to the system where it has `pages` to give: it is read again when it is used.
///
/// # Errors
/// [`CommError`] where the system refuses.
pub(crate) fn give_back(pages: &[Option<UnitPages>], unit: usize) -> Result<(), CommError> {
    pages.get(unit).and_then(Option::as_ref).map_or(Ok(()), UnitPages::give_back)
}
