//! The optimizers, as sharding sees them.

use deepspeed_comm::Group;
use deepspeed_core::{AlignedBuffer, Layout, Unit};
use deepspeed_offload::OffloadError;
use deepspeed_optim::{Hyper, LambSums, Shard};
use deepspeed_zero::{
    OffloadedState, Passage, Run, RunMemory, ShardUpdate, StreamedUnit, UnitShard, Weights,
};

use crate::EngineError;

/// An element-wise optimizer of ours.
pub(crate) struct ElementWise<'a> {
    pub(crate) hypers: &'a [Hyper],
    pub(crate) step: u64,
    pub(crate) grad_scale: f32,
}

impl ShardUpdate for ElementWise<'_> {
    fn merges_params(&self) -> bool {
        true
    }

    fn update(&self, run: Run, mut memory: RunMemory<'_>) {
        let shard = Shard {
            param: memory.master,
            grad: (&*memory.gradient).into(),
            state: &mut memory.state,
            grad_scale: self.grad_scale,
            out: memory.out,
        };
        deepspeed_optim::update(&self.hypers[run.group], self.step, shard);
    }
}

/// LAMB: the direction of every element, then, once the norms of whole parameters are known, the update.
pub(crate) struct Lamb<'a> {
    hypers: &'a [Hyper],
    step: u64,
    /// By parameter, over all ranks.
    sums: Vec<LambSums>,
}

/// What LAMB looks at before it updates.
pub(crate) struct LambInput<'i, 'w, 's> {
    pub(crate) layout: &'i Layout,
    /// How many units, the first ones, are updated here.
    pub(crate) count: usize,
    pub(crate) shards: &'i mut [UnitShard],
    /// Masters, state and gradients of units that lie on a disk.
    pub(crate) offloaded: Option<&'i mut OffloadedState>,
    pub(crate) weights: &'i mut Weights<'w, 's>,
    pub(crate) group: &'i dyn Group,
}

impl<'a> Lamb<'a> {
    /// Leaves the direction of each element where its gradient was, and adds the sums over ranks, in rank order. Collective.
    pub(crate) fn prepare(
        input: LambInput<'_, '_, '_>,
        hypers: &'a [Hyper],
        step: u64,
        grad_scale: f32,
    ) -> Result<Self, EngineError> {
        let LambInput { layout, count, shards, mut offloaded, weights, group } = input;
        let mut mine = vec![LambSums::default(); layout.params.len()];
        let mut scratch = Vec::new();
        let mut directions = |unit: &Unit, memory: StreamedUnit<'_>| {
            let StreamedUnit { mut master, mut state, gradient, .. } = memory;
            let own = weights.own(unit, group.rank());
            for (fragment, (start, mut in_place)) in unit.fragments(unit.shard(group.rank())).zip(own) {
                let part = start..start + fragment.len;
                let param = match &mut master {
                    Some(master) => &mut master[part.clone()],
                    None => in_place.as_f32_mut().expect("invariant: masters in place are fp32"),
                };
                let gradient = &mut gradient[part.clone()];
                let mut state: Vec<&mut [f32]> =
                    state.iter_mut().map(|tensor| &mut tensor[part.clone()]).collect();
                scratch.resize(fragment.len, 0.0);
                let grad = (&*gradient).into();
                let mut shard = Shard { param, grad, state: &mut state, grad_scale, out: None };
                let hyper = &hypers[layout.param(fragment.param).group];
                mine[fragment.param.index()] +=
                    deepspeed_optim::lamb_direction(hyper, step, &mut shard, &mut scratch);
                gradient.copy_from_slice(&scratch);
            }
        };
        let mut next = 0;
        if let Some(offloaded) = &mut offloaded {
            offloaded.update::<OffloadError>(Passage::Directions, |memory| {
                next = memory.unit + 1;
                directions(&layout.units[memory.unit], memory);
                Ok(())
            })?;
        }
        for unit in layout.units.iter().take(count).skip(next) {
            let UnitShard { gradient, master, state, .. } = &mut shards[unit.id.index()];
            let memory = StreamedUnit {
                unit: unit.id.index(),
                start: 0,
                master: master.as_mut().map(AlignedBuffer::as_f32_mut),
                state: state.iter_mut().map(AlignedBuffer::as_f32_mut).collect(),
                gradient: gradient.as_f32_mut(),
            };
            directions(unit, memory);
        }
        let bytes: Vec<u8> =
            mine.iter().flat_map(|sums| [sums.param, sums.direction]).flat_map(f64::to_le_bytes).collect();
        let mut sums = vec![LambSums::default(); layout.params.len()];
        for rank in group.all_gather_bytes("LAMB parameter norms", &bytes)? {
            let mut numbers = rank.as_chunks::<8>().0.iter().map(|word| f64::from_le_bytes(*word));
            for total in &mut sums {
                if let (Some(param), Some(direction)) = (numbers.next(), numbers.next()) {
                    *total += LambSums { param, direction };
                }
            }
        }
        Ok(Self { hypers, step, sums })
    }
}

impl ShardUpdate for Lamb<'_> {
    fn merges_params(&self) -> bool {
        false
    }

    fn passage(&self) -> Passage {
        Passage::Steps
    }

    fn update(&self, run: Run, memory: RunMemory<'_>) {
        let sums = self.sums[run.param.index()];
        let RunMemory { master, gradient, out, .. } = memory;
        deepspeed_optim::lamb_apply(&self.hypers[run.group], self.step, sums, master, gradient, out);
    }
}
