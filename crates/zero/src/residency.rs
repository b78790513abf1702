//! Which units are whole at a time, where a rank keeps only shards of the weights: what is gathered and released when.
//!
//! ```text
//!   forward                      backward                                end of the pass
//!   enter(block) -> Gather       enter_backward(block) -> Gather
//!   leave(block) -> Release      delivered(unit), leave_backward(call)   end_pass() -> Release
//!                                   -> Release
//! ```
//!
//! Invariants, cited by the tests:
//! - RESIDENCY-1: a unit that a module computes with is resident from before its forward until after it, and from before
//!   its backward until nothing of that backward needs it: a trained unit until all its gradients are there and the calls
//!   of its modules that began are over, another one until those calls are over.
//! - RESIDENCY-2: what is gathered and released depends on nothing but the sequence of calls, so ranks that run the same
//!   program gather the same units in the same order.
//! - RESIDENCY-3: limits bound what stays or comes early; they never keep a unit away that is needed.

use std::collections::{BTreeMap, BTreeSet};

use crate::use_order::UseOrder;

/// What matters of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitFacts {
    /// Elements of its parameters.
    pub elements: usize,
    /// Elements of its largest parameter.
    pub largest_param: usize,
    /// Whether its parameters get gradients.
    pub trained: bool,
}

/// How much is whole at a time. Everything in elements; the names of the config without `stage3_`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatherLimits {
    /// Gathered ahead of its use.
    pub prefetch_bucket_size: usize,
    /// Whole at one time: bounds what comes early and what stays.
    pub max_live_parameters: usize,
    /// A unit that is used again after at most this much of others stays.
    pub max_reuse_distance: usize,
    /// A unit stays from its first use to the next update if no parameter of it is larger.
    pub param_persistence_threshold: usize,
    /// As long as the units that stay so are not more than this together.
    pub model_persistence_threshold: usize,
    /// Modules that are not larger gather everything below them at once.
    pub module_granularity_threshold: usize,
}

impl Default for GatherLimits {
    /// The defaults of the config.
    fn default() -> Self {
        Self {
            prefetch_bucket_size: 50_000_000,
            max_live_parameters: 1_000_000_000,
            max_reuse_distance: 1_000_000_000,
            param_persistence_threshold: 100_000,
            model_persistence_threshold: usize::MAX,
            module_granularity_threshold: 0,
        }
    }
}

/// What the caller is to do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Gather this unit, the same on all ranks.
    Gather(usize),
    /// Give its memory back.
    Release(usize),
}

/// In which circumstances a module runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Circumstances {
    /// Whether what it does is recorded for a backward pass.
    pub grad: bool,
    /// Whether a backward pass is running that calls it: activations are computed again.
    pub in_backward: bool,
}

/// A module's call whose backward began; given back when it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BackwardCall(pub u64);

#[derive(Clone, Debug)]
struct Unit {
    facts: UnitFacts,
    /// Small enough to stay until the next update.
    persistent: bool,
    resident: bool,
    /// Forward calls that are running and use it.
    active: u32,
    /// Those who asked for it outside of any module.
    pinned: u32,
    /// Calls whose backward began and is not over.
    open: u32,
    /// Calls whose backward began and whose end does not show.
    blind: u32,
    /// The backward pass that is running has used it, or will.
    awaited: bool,
    /// All its gradients of the current pass are there.
    delivered: bool,
    /// A backward pass may need it, and nothing will tell.
    held: bool,
}

impl Unit {
    fn is_needed(&self) -> bool {
        let over = if self.facts.trained { self.delivered } else { self.blind == 0 };
        self.active > 0 || self.pinned > 0 || self.open > 0 || self.held || (self.awaited && !over)
    }

    fn forget_pass(&mut self) {
        (self.open, self.blind, self.awaited, self.delivered) = (0, 0, false, false);
    }
}

#[derive(Clone, Debug, Default)]
struct Module {
    gathers: Vec<usize>,
    watches: Vec<usize>,
    /// Units of other modules' parameters that it was seen to read.
    borrows: BTreeSet<usize>,
}

/// A forward call that is running.
#[derive(Clone, Debug)]
struct Call {
    module: usize,
    borrowed: Vec<usize>,
}

/// The units that are whole on this rank, and the calls that decide about it. Pure.
#[derive(Clone, Debug)]
pub struct ResidentUnits {
    units: Vec<Unit>,
    modules: Vec<Module>,
    limits: GatherLimits,
    order: UseOrder,
    running: Vec<Call>,
    backward: BTreeMap<BackwardCall, (Vec<usize>, bool)>,
    calls: u64,
    live: usize,
}

impl ResidentUnits {
    /// All units released.
    pub fn new(units: &[UnitFacts], limits: GatherLimits) -> Self {
        let mut room = limits.model_persistence_threshold;
        let unit = |facts: &UnitFacts| {
            let small = facts.largest_param <= limits.param_persistence_threshold;
            let persistent = small && facts.elements <= room;
            room -= if persistent { facts.elements } else { 0 };
            Unit {
                facts: *facts,
                persistent,
                resident: false,
                active: 0,
                pinned: 0,
                open: 0,
                blind: 0,
                awaited: false,
                delivered: false,
                held: false,
            }
        };
        Self {
            units: units.iter().map(unit).collect(),
            modules: Vec::new(),
            limits,
            order: UseOrder::default(),
            running: Vec::new(),
            backward: BTreeMap::new(),
            calls: 0,
            live: 0,
        }
    }

    /// A module that computes with the units `gathers` and, in backward, needs `watches` too. Returns its number.
    pub fn add_module(&mut self, gathers: Vec<usize>, watches: Vec<usize>) -> usize {
        self.modules.push(Module { gathers, watches, borrows: BTreeSet::new() });
        self.modules.len() - 1
    }

    /// Whether `unit` is whole.
    pub fn is_resident(&self, unit: usize) -> bool {
        self.units[unit].resident
    }

    /// Whether `unit` stays from its first use to the next update.
    pub fn is_persistent(&self, unit: usize) -> bool {
        self.units[unit].persistent
    }

    /// Whether a forward call that is running uses `unit`.
    pub fn is_active(&self, unit: usize) -> bool {
        self.units[unit].active > 0
    }

    /// Whether `unit` is needed now, or by the backward pass that is running: not if it only came early, or stays.
    pub fn is_needed(&self, unit: usize) -> bool {
        self.units[unit].is_needed()
    }

    /// Whether a forward call is running.
    pub fn is_running(&self) -> bool {
        !self.running.is_empty()
    }

    /// Elements that are whole now.
    pub fn live(&self) -> usize {
        self.live
    }

    /// The forward of `module` begins.
    pub fn enter(&mut self, module: usize, now: Circumstances) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.running.is_empty() && !now.in_backward {
            // Whatever backward pass there was is over, also one that did not say so.
            self.units.iter_mut().for_each(Unit::forget_pass);
            self.backward.clear();
            self.order.begin();
            self.settle_all(now.grad, &mut actions);
        }
        self.running.push(Call { module, borrowed: Vec::new() });
        let gathers = self.modules[module].gathers.clone();
        for unit in &gathers {
            self.units[*unit].active += 1;
            self.order.used(*unit, now.in_backward);
        }
        self.gather(&gathers, now.grad || now.in_backward, &mut actions);
        actions
    }

    /// The forward of `module` is over. `hidden` says that it may have left something to a backward pass that will not
    /// show when it comes.
    pub fn leave(&mut self, module: usize, now: Circumstances, hidden: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        if !self.running.iter().any(|call| call.module == module) {
            return actions;
        }
        // A call whose end was lost ends with the one around it.
        while let Some(call) = self.running.pop() {
            let gathers = self.modules[call.module].gathers.clone();
            for unit in gathers.iter().chain(&call.borrowed) {
                let unit = &mut self.units[*unit];
                unit.active = unit.active.saturating_sub(1);
                unit.awaited |= now.in_backward;
                unit.held |= hidden && now.grad && !now.in_backward;
            }
            for unit in gathers.into_iter().chain(call.borrowed) {
                self.settle(unit, now.grad || now.in_backward, &mut actions);
            }
            if call.module == module {
                break;
            }
        }
        if self.running.is_empty() && !now.in_backward {
            if now.grad {
                self.settle_all(true, &mut actions);
            } else {
                self.release_all(&mut actions);
            }
        }
        actions
    }

    /// A parameter of `unit` is read that no running module accounts for: the innermost module borrows the unit, now and
    /// in every backward of its own. Without a running module the unit stays until the pass is over.
    pub fn borrow(&mut self, unit: usize, now: Circumstances) -> Vec<Action> {
        let mut actions = Vec::new();
        self.order.used(unit, now.in_backward);
        match self.running.last_mut() {
            Some(call) => {
                call.borrowed.push(unit);
                self.modules[call.module].borrows.insert(unit);
                self.units[unit].active += 1;
            }
            None if now.in_backward => self.units[unit].awaited = true,
            None => self.units[unit].held = true,
        }
        self.gather(&[unit], now.grad || now.in_backward, &mut actions);
        actions
    }

    /// The backward of a call of `module` begins; `visible` says whether its end will show, in
    /// [`leave_backward`](Self::leave_backward).
    pub fn enter_backward(&mut self, module: usize, visible: bool) -> (BackwardCall, Vec<Action>) {
        let Module { gathers, watches, borrows } = &self.modules[module];
        let units: Vec<usize> = gathers.iter().chain(watches).chain(borrows).copied().collect();
        for index in &units {
            let unit = &mut self.units[*index];
            *if visible { &mut unit.open } else { &mut unit.blind } += 1;
            (unit.awaited, unit.delivered) = (true, false);
            self.order.used(*index, true);
        }
        let mut actions = Vec::new();
        self.gather(&units, true, &mut actions);
        let call = BackwardCall(self.calls);
        self.calls += 1;
        self.backward.insert(call, (units, visible));
        (call, actions)
    }

    /// The gradients of everything that went into the call are there.
    pub fn leave_backward(&mut self, call: BackwardCall) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some((units, visible)) = self.backward.remove(&call) else { return actions };
        for index in units {
            let unit = &mut self.units[index];
            let count = if visible { &mut unit.open } else { &mut unit.blind };
            *count = count.saturating_sub(1);
            self.settle(index, true, &mut actions);
        }
        actions
    }

    /// All gradients of the trained `unit` are there.
    pub fn delivered(&mut self, unit: usize) -> Vec<Action> {
        let mut actions = Vec::new();
        self.units[unit].delivered = true;
        self.settle(unit, true, &mut actions);
        actions
    }

    /// The backward pass is over: nothing of it is needed any more.
    pub fn end_pass(&mut self) -> Vec<Action> {
        self.order.end();
        self.forget_passes();
        let mut actions = Vec::new();
        self.release_all(&mut actions);
        actions
    }

    /// The shards have new values: what is whole is out of date.
    pub fn updated(&mut self) -> Vec<Action> {
        self.forget_passes();
        let mut actions = Vec::new();
        for index in 0..self.units.len() {
            self.release(index, &mut actions);
            if self.units[index].resident {
                // Somebody is looking at it: with the new values, then.
                actions.push(Action::Gather(index));
            }
        }
        actions
    }

    /// `units` are wanted whole, outside of any module, until [`unpin`](Self::unpin).
    pub fn pin(&mut self, units: &[usize]) -> Vec<Action> {
        let mut actions = Vec::new();
        units.iter().for_each(|unit| self.units[*unit].pinned += 1);
        self.bring(units, false, &mut actions);
        actions
    }

    /// `units` were wanted, and may have been written to: they are released if nobody computes with them.
    pub fn unpin(&mut self, units: &[usize]) -> Vec<Action> {
        let mut actions = Vec::new();
        for index in units {
            let unit = &mut self.units[*index];
            unit.pinned = unit.pinned.saturating_sub(1);
            self.release(*index, &mut actions);
        }
        actions
    }

    fn forget_passes(&mut self) {
        self.backward.clear();
        for unit in &mut self.units {
            unit.forget_pass();
            unit.held = false;
        }
    }

    /// Makes `wanted` resident, and then, if that took a gathering anyway, what comes after.
    fn gather(&mut self, wanted: &[usize], with_backward: bool, actions: &mut Vec<Action>) {
        if self.bring(wanted, with_backward, actions) {
            self.prefetch(with_backward, actions);
        }
    }

    /// Makes `wanted` resident; whether it was not.
    fn bring(&mut self, wanted: &[usize], with_backward: bool, actions: &mut Vec<Action>) -> bool {
        let missing: BTreeSet<usize> =
            wanted.iter().copied().filter(|unit| !self.units[*unit].resident).collect();
        if missing.is_empty() {
            return false;
        }
        let elements: usize = missing.iter().map(|unit| self.units[*unit].facts.elements).sum();
        self.make_room(elements, wanted, with_backward, actions);
        for unit in missing {
            self.become_resident(unit, actions);
        }
        true
    }

    /// Makes the units that come next resident, as far as the limits go.
    fn prefetch(&mut self, with_backward: bool, actions: &mut Vec<Action>) {
        let mut ahead = 0usize;
        let upcoming: Vec<usize> = self.order.upcoming(with_backward).collect();
        for unit in upcoming {
            if self.units[unit].resident {
                continue;
            }
            let elements = self.units[unit].facts.elements;
            ahead = ahead.saturating_add(elements);
            let live = self.live.saturating_add(elements);
            if ahead > self.limits.prefetch_bucket_size || live > self.limits.max_live_parameters {
                break;
            }
            self.become_resident(unit, actions);
        }
    }

    fn become_resident(&mut self, unit: usize, actions: &mut Vec<Action>) {
        self.units[unit].resident = true;
        self.live += self.units[unit].facts.elements;
        actions.push(Action::Gather(unit));
    }

    /// Releases what only stays for a later use, the latest use first, until `elements` more fit.
    fn make_room(
        &mut self,
        elements: usize,
        wanted: &[usize],
        with_backward: bool,
        actions: &mut Vec<Action>,
    ) {
        let limit = self.limits.max_live_parameters;
        if self.live.saturating_add(elements) <= limit {
            return;
        }
        let spare = |index: &usize| {
            let unit = &self.units[*index];
            unit.resident && !unit.is_needed() && !unit.persistent && !wanted.contains(index)
        };
        let mut spare: Vec<(usize, usize)> = (0..self.units.len())
            .filter(spare)
            .map(|index| (self.distance(index, with_backward, usize::MAX).unwrap_or(usize::MAX), index))
            .collect();
        spare.sort_unstable();
        while self.live.saturating_add(elements) > limit
            && let Some((_, unit)) = spare.pop()
        {
            self.release(unit, actions);
        }
    }

    fn distance(&self, unit: usize, with_backward: bool, limit: usize) -> Option<usize> {
        self.order.distance(unit, with_backward, limit, |unit| self.units[unit].facts.elements)
    }

    fn settle_all(&mut self, with_backward: bool, actions: &mut Vec<Action>) {
        for unit in 0..self.units.len() {
            self.settle(unit, with_backward, actions);
        }
    }

    /// Releases what nothing needs now, whatever comes.
    fn release_all(&mut self, actions: &mut Vec<Action>) {
        for index in 0..self.units.len() {
            if !self.units[index].persistent {
                self.release(index, actions);
            }
        }
    }

    /// Releases `unit` if nothing needs it now and nothing will soon.
    fn settle(&mut self, unit: usize, with_backward: bool, actions: &mut Vec<Action>) {
        let Unit { resident, persistent, .. } = self.units[unit];
        let stays = persistent
            || (self.live <= self.limits.max_live_parameters
                && self.distance(unit, with_backward, self.limits.max_reuse_distance).is_some());
        if resident && !stays {
            self.release(unit, actions);
        }
    }

    /// Releases `unit` if nothing needs it now.
    fn release(&mut self, index: usize, actions: &mut Vec<Action>) {
        let unit = &mut self.units[index];
        if unit.resident && !unit.is_needed() {
            unit.resident = false;
            self.live -= unit.facts.elements;
            actions.push(Action::Release(index));
        }
    }
}

#[cfg(test)]
mod tests;
