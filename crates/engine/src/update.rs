//! The optimizers, as sharding sees them.

use deepspeed_comm::{CommError, Group};
use deepspeed_core::Layout;
use deepspeed_optim::{Hyper, LambSums, Shard};
use deepspeed_zero::{Run, RunMemory, ShardUpdate, UnitShard, Weights};

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

impl<'a> Lamb<'a> {
    /// Leaves the direction of each element in the shards' gradients and adds the sums over ranks, in rank order.
    pub(crate) fn prepare(
        layout: &Layout,
        shards: &mut [UnitShard],
        weights: &mut Weights<'_, '_>,
        group: &dyn Group,
        hypers: &'a [Hyper],
        step: u64,
        grad_scale: f32,
    ) -> Result<Self, CommError> {
        let mut mine = vec![LambSums::default(); layout.params.len()];
        let mut direction = Vec::new();
        for unit in &layout.units {
            let UnitShard { gradient, master, state, .. } = &mut shards[unit.id.index()];
            let range = unit.shard(group.rank());
            let own = weights.own(unit, group.rank());
            for (fragment, (start, mut in_place)) in unit.fragments(range).zip(own) {
                let part = start..start + fragment.len;
                let param = match master {
                    Some(master) => &mut master.as_f32_mut()[part.clone()],
                    None => in_place.as_f32_mut().expect("invariant: masters in place are fp32"),
                };
                let gradient = &mut gradient.as_f32_mut()[part.clone()];
                let mut state: Vec<&mut [f32]> =
                    state.iter_mut().map(|tensor| &mut tensor.as_f32_mut()[part.clone()]).collect();
                direction.resize(fragment.len, 0.0);
                let grad = (&*gradient).into();
                let mut shard = Shard { param, grad, state: &mut state, grad_scale, out: None };
                let hyper = &hypers[layout.param(fragment.param).group];
                mine[fragment.param.index()] +=
                    deepspeed_optim::lamb_direction(hyper, step, &mut shard, &mut direction);
                gradient.copy_from_slice(&direction);
            }
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

    fn update(&self, run: Run, memory: RunMemory<'_>) {
        let sums = self.sums[run.param.index()];
        let RunMemory { master, gradient, out, .. } = memory;
        deepspeed_optim::lamb_apply(&self.hypers[run.group], self.step, sums, master, gradient, out);
    }
}
