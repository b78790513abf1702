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

/// A unit's memory while it streams through.
#[derive(Debug)]
pub struct StreamedUnit<'a> {
    /// The unit's index.
    pub unit: usize,
    /// Its masters, unless its weights are.
    pub master: Option<&'a mut [f32]>,
    /// The optimizer's state.
    pub state: Vec<&'a mut [f32]>,
    /// Its reduced gradients; empty where the pass leaves them on the disk. What is written here is lost.
    pub gradient: &'a mut [f32],
}

/// How much lies on a disk, where, and how it moves.
#[derive(Clone, Debug)]
pub struct OffloadPlan<'a> {
    /// The folder of the file.
    pub folder: &'a Path,
    /// The part of the elements, 0 to 1, whose state lies there; whole units, the first ones of the layout.
    pub ratio: f64,
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
    /// The same, without the gradients.
    items_of_state: Vec<Item>,
    access: Vec<Access>,
    buffer_bytes: usize,
}

impl OffloadedState {
    /// Room for `states` state tensors and the masters of the units that `plan` moves to the disk; all zero.
    ///
    /// # Errors
    /// As [`Store::create`]: the folder does not serve, or has too little space.
    pub fn create(plan: &OffloadPlan<'_>, layout: &Layout, states: usize) -> Result<Self, OffloadError> {
        let wanted = plan.ratio * layout.numel() as f64;
        let mut moved = 0.0;
        let units: Vec<&Unit> = layout
            .units
            .iter()
            .take_while(|unit| {
                let before = moved;
                moved += unit.filled as f64;
                before < wanted
            })
            .collect();
        let lanes_of = |unit: &Unit| {
            let master = if unit.dtype == DType::F32 { 0 } else { unit.shard_len };
            std::iter::once(master).chain(std::iter::repeat_n(unit.shard_len, states + 1))
        };
        let bytes =
            units.iter().flat_map(|unit| lanes_of(unit)).map(|len| Store::bytes_of(len, DType::F32)).sum();
        let store = Store::create(plan.folder, bytes, &plan.options)?;
        let mut items = Vec::with_capacity(units.len());
        for unit in &units {
            let regions: Vec<Region> =
                lanes_of(unit).map(|len| store.allocate(len, DType::F32)).collect::<Result<_, _>>()?;
            items.push(Item::whole(unit.id.index(), &regions));
        }
        let longest = |lane: usize| items.iter().map(|item| item.regions[lane].len()).max().unwrap_or(0);
        let items_of_state = items.iter().map(without_gradient).collect();
        let lanes: Vec<Lane> = (0..states + 2).map(|lane| Lane::f32(longest(lane))).collect();
        let stream = Stream::new(&store, &lanes, plan.depth);
        let buffer_bytes = stream.buffer_bytes();
        let mut access = vec![Access::Update; states + 1];
        access.push(Access::Read);
        Ok(Self { store, stream: Mutex::new(stream), items, items_of_state, access, buffer_bytes })
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

    /// Streams the state of all units that lie here through memory, in the order of the layout, and `with_gradients` the
    /// gradients that [`OffloadedState::park_gradient`] has put there. What `work` leaves in masters and state is written
    /// back.
    ///
    /// # Errors
    /// What `work` says, and [`OffloadError`].
    pub fn update<E: From<OffloadError>>(
        &mut self,
        with_gradients: bool,
        mut work: impl FnMut(StreamedUnit<'_>) -> Result<(), E>,
    ) -> Result<Traffic, E> {
        let stream = self.stream.get_mut().unwrap_or_else(PoisonError::into_inner);
        let items = if with_gradients { &self.items } else { &self.items_of_state };
        let mut pass = stream.pass(items, &self.access)?;
        while let Some(mut item) = pass.load_next()? {
            let unit = item.item().tag;
            let mut lanes = item.f32_slices();
            let gradient = lanes.pop().unwrap_or_default();
            let mut lanes = lanes.into_iter();
            let master = lanes.next().filter(|master| !master.is_empty());
            work(StreamedUnit { unit, master, state: lanes.collect(), gradient })?;
            item.write_back()?;
        }
        Ok(pass.finish()?)
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

/// `item` with nothing to move in the gradient's lane.
fn without_gradient(item: &Item) -> Item {
    let mut regions = item.regions.clone();
    if let Some(gradient) = regions.last_mut() {
        *gradient = gradient.slice(0, 0);
    }
    Item::whole(item.tag, &regions)
}
