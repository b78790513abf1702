//! Masters and optimizer state that lie on a disk between steps, and stream through memory during the update, and the
//! reduced gradients that wait there for it.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use deepspeed_core::{AlignedBuffer, DType, Layout, Span, SpanMut, Unit, UnitId};
use deepspeed_offload::{Access, Depth, Item, Lane, OffloadError, Options, Region, Store, Stream, Traffic};

/// What of a unit lies on the disk: lane 0 is the master, the last one the gradient, those between are the optimizer's
/// state.
///
/// A unit whose fp32 weights are its masters has an empty lane 0.
const MASTER: usize = 0;

/// The memory of a unit, or of a piece of its shard, while it streams through.
#[derive(Debug)]
pub struct StreamedUnit<'a> {
    /// The unit's index.
    pub unit: usize,
    /// The first element inside the shard.
    pub start: usize,
    /// Its masters, unless its weights are.
    pub master: Option<&'a mut [f32]>,
    /// The optimizer's state.
    pub state: Vec<&'a mut [f32]>,
    /// Its reduced gradients; empty where the pass leaves them on the disk.
    pub gradient: &'a mut [f32],
}

/// What a pass over the units on the disk moves through memory. What it only reads may be written to, and is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// Masters and state, there and back.
    State,
    /// Masters and state, there and back; gradients are read.
    Update,
    /// The first half of an update that looks at whole parameters: masters are read; state there and back, and so are
    /// gradients, in whose place the direction of each element is left.
    Directions,
    /// The second half: masters there and back; directions are read, the state stays on the disk.
    Steps,
}

impl Passage {
    /// What is done with masters, state tensors, gradients; `None` for what stays on the disk.
    fn access(self) -> [Option<Access>; 3] {
        match self {
            Self::State => [Some(Access::Update), Some(Access::Update), None],
            Self::Update => [Some(Access::Update), Some(Access::Update), Some(Access::Read)],
            Self::Directions => [Some(Access::Read), Some(Access::Update), Some(Access::Update)],
            Self::Steps => [Some(Access::Update), None, Some(Access::Read)],
        }
    }
}

/// How much lies on a disk, where, and how it moves.
#[derive(Clone, Debug)]
pub struct OffloadPlan<'a> {
    /// The folder of the file.
    pub folder: &'a Path,
    /// The part of the elements, 0 to 1, whose state lies there; whole units, the first ones of the layout.
    pub ratio: f64,
    /// The most elements of a shard that are in memory as one piece; a shard is never cut where this is none.
    pub piece_len: Option<usize>,
    /// How the file is read and written.
    pub options: Options,
    /// How far reading and writing run apart from the update.
    pub depth: Depth,
}

/// The state of a rank's shards of some units, in a file without a name.
#[derive(Debug)]
pub struct OffloadedState {
    store: Store,
    /// Only one thread updates; the mutex, never locked, says so to the compiler.
    stream: Mutex<Stream>,
    /// One per unit that lies here, in the order of the layout; `tag` is the unit's index.
    items: Vec<Item>,
    /// State tensors.
    states: usize,
    /// The most elements that move at a time.
    piece_len: usize,
    buffer_bytes: usize,
}

impl OffloadedState {
    /// Room for `states` state tensors and the masters of the units that `plan` moves to the disk; all zero.
    ///
    /// # Errors
    /// As [`Store::create`]: the folder does not serve, or has too little space.
    pub fn create(plan: &OffloadPlan<'_>, layout: &Layout, states: usize) -> Result<Self, OffloadError> {
        let units = &layout.units[..units_within(layout, plan.ratio)];
        let lanes_of = |unit: &Unit| {
            let master = if unit.dtype == DType::F32 { 0 } else { unit.shard_len };
            std::iter::once(master).chain(std::iter::repeat_n(unit.shard_len, states + 1))
        };
        let bytes = units.iter().flat_map(lanes_of).map(|len| Store::bytes_of(len, DType::F32)).sum();
        let store = Store::create(plan.folder, bytes, &plan.options)?;
        let mut items = Vec::with_capacity(units.len());
        for unit in units {
            let regions: Vec<Region> =
                lanes_of(unit).map(|len| store.allocate(len, DType::F32)).collect::<Result<_, _>>()?;
            items.push(Item::whole(unit.id.index(), &regions));
        }
        let piece_len = plan.piece_len.unwrap_or(usize::MAX);
        let pieces = || items.iter().flat_map(|item| cut(item, piece_len));
        let longest = |lane: usize| pieces().map(|piece| piece.regions[lane].len()).max().unwrap_or(0);
        let lanes: Vec<Lane> = (0..states + 2).map(|lane| Lane::f32(longest(lane))).collect();
        let stream = Stream::new(&store, &lanes, plan.depth);
        let buffer_bytes = stream.buffer_bytes();
        Ok(Self { store, stream: Mutex::new(stream), items, states, piece_len, buffer_bytes })
    }

    /// Where the state lies and how it moves, in one line.
    pub fn describe(&self) -> String {
        self.store.describe().to_string()
    }

    /// Bytes of memory that streaming takes.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Whether the state of `unit` lies here.
    pub fn holds(&self, unit: UnitId) -> bool {
        self.items.get(unit.index()).is_some_and(|item| item.tag == unit.index())
    }

    /// Streams what `passage` says of all units that lie here through memory, in the order of the layout; the gradients are
    /// those that [`OffloadedState::park_gradient`] has put there.
    ///
    /// # Errors
    /// What `work` says, and [`OffloadError`].
    pub fn update<E: From<OffloadError>>(
        &mut self,
        passage: Passage,
        mut work: impl FnMut(StreamedUnit<'_>) -> Result<(), E>,
    ) -> Result<Traffic, E> {
        let lanes = self.by_lane(passage.access());
        let items = self.items.iter().flat_map(|item| cut(item, self.piece_len));
        let items: Vec<Item> = items.map(|piece| moved(&piece, &lanes)).collect();
        // Nothing moves in a lane that stays on the disk, whatever the access.
        let access: Vec<Access> = lanes.into_iter().map(|access| access.unwrap_or(Access::Read)).collect();
        let stream = self.stream.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut pass = stream.pass(&items, &access)?;
        while let Some(mut item) = pass.load_next()? {
            let (unit, start) = (item.item().tag, item.item().start);
            let mut lanes = item.f32_slices();
            let gradient = lanes.pop().unwrap_or_default();
            let mut lanes = lanes.into_iter();
            let master = lanes.next().filter(|master| !master.is_empty());
            let state = lanes.filter(|state| !state.is_empty()).collect();
            work(StreamedUnit { unit, start, master, state, gradient })?;
            item.write_back()?;
        }
        Ok(pass.finish()?)
    }

    /// Masters, state tensors and gradients as lanes.
    fn by_lane<T: Copy>(&self, [master, state, gradient]: [T; 3]) -> Vec<T> {
        let states = std::iter::repeat_n(state, self.states);
        std::iter::once(master).chain(states).chain(std::iter::once(gradient)).collect()
    }

    /// Moves the reduced gradients of `unit` from memory to the disk; `gradient` takes no memory afterwards and is zero.
    ///
    /// # Errors
    /// [`OffloadError`].
    pub fn park_gradient(&self, unit: UnitId, gradient: &mut AlignedBuffer) -> Result<(), OffloadError> {
        self.store.write(self.gradient_region(unit), gradient.span())?;
        gradient.give_back();
        Ok(())
    }

    /// Reads the gradients of `unit` that were parked, from element `start` of the shard on.
    ///
    /// # Errors
    /// [`OffloadError`].
    pub fn read_gradient(&self, unit: UnitId, start: usize, target: SpanMut<'_>) -> Result<(), OffloadError> {
        self.store.read_at(self.gradient_region(unit), start, target)
    }

    /// Reads masters (`state` is `None`) or a state tensor of `unit`, from element `start` of the shard on.
    ///
    /// # Errors
    /// [`OffloadError`].
    pub fn read(
        &self,
        unit: UnitId,
        state: Option<usize>,
        start: usize,
        target: SpanMut<'_>,
    ) -> Result<(), OffloadError> {
        self.store.read_at(self.region(unit, state), start, target)
    }

    /// Writes masters (`state` is `None`) or a state tensor of `unit`, from element `start` of the shard on.
    ///
    /// # Errors
    /// [`OffloadError`].
    pub fn write(
        &self,
        unit: UnitId,
        state: Option<usize>,
        start: usize,
        source: Span<'_>,
    ) -> Result<(), OffloadError> {
        self.store.write_at(self.region(unit, state), start, source)
    }

    /// Whether the masters of `unit` lie here, apart from its weights.
    pub fn has_master(&self, unit: UnitId) -> bool {
        self.holds(unit) && !self.region(unit, None).is_empty()
    }

    fn gradient_region(&self, unit: UnitId) -> &Region {
        self.items[unit.index()].regions.last().expect("invariant: every item has a lane for the gradient")
    }

    fn region(&self, unit: UnitId, state: Option<usize>) -> &Region {
        &self.items[unit.index()].regions[state.map_or(MASTER, |index| index + 1)]
    }
}

/// `item` in pieces of at most `len` elements; lanes without elements have none in any piece.
fn cut(item: &Item, len: usize) -> Vec<Item> {
    let filled: Vec<Region> = item.regions.iter().filter(|region| !region.is_empty()).copied().collect();
    let pieces = Item::cut(item.tag, &filled, len);
    let with_empty = |piece: Item| {
        let mut cut = piece.regions.into_iter();
        let regions = item.regions.iter().map(|region| {
            let part = if region.is_empty() { None } else { cut.next() };
            part.unwrap_or_else(|| region.slice(0, 0))
        });
        Item { tag: piece.tag, start: piece.start, regions: regions.collect() }
    };
    pieces.map(with_empty).collect()
}

/// `item` with nothing to move in lanes without access.
fn moved(item: &Item, access: &[Option<Access>]) -> Item {
    let lanes = item.regions.iter().zip(access);
    let regions: Vec<Region> =
        lanes.map(|(region, access)| if access.is_some() { *region } else { region.slice(0, 0) }).collect();
    Item { tag: item.tag, start: item.start, regions }
}

/// How many units, the first ones of `layout`, make up the part `ratio` (0 to 1) of its elements.
pub fn units_within(layout: &Layout, ratio: f64) -> usize {
    let wanted = ratio * layout.numel() as f64;
    let mut before = 0.0;
    let reaches = |unit: &&Unit| {
        let reached = before < wanted;
        before += unit.filled as f64;
        reached
    };
    layout.units.iter().take_while(reaches).count()
}
