//! What a rank keeps of one unit.

use std::ops::Range;

use deepspeed_core::{AlignedBuffer, DType, Rank, Span, Unit};

/// A rank's shard of one unit: reduced gradients, fp32 masters, optimizer state. All `shard_len` elements of fp32.
#[derive(Debug)]
pub struct UnitShard {
    /// The averaged gradients of this accumulation, still multiplied by the loss scale.
    pub gradient: AlignedBuffer,
    /// The sum of squares of `gradient`; not finite exactly if an element is not.
    pub square_sum: f64,
    /// fp32 masters; `None` where the model's own weights are fp32 and serve as masters in place.
    pub master: Option<AlignedBuffer>,
    /// The optimizer's per-element state, in the order of its state names.
    pub state: Vec<AlignedBuffer>,
}

impl UnitShard {
    /// The zeroed shard of `unit` with `state_count` per-element state tensors.
    pub fn new(unit: &Unit, state_count: usize) -> Self {
        let zeros = || AlignedBuffer::zeroed(unit.shard_len, DType::F32);
        Self {
            gradient: zeros(),
            square_sum: 0.0,
            master: (unit.dtype != DType::F32).then(zeros),
            state: (0..state_count).map(|_| zeros()).collect(),
        }
    }

    /// Sets the masters of this rank from whole parameters of any dtype, by parameter id.
    ///
    /// # Panics
    /// If a parameter of the unit is missing from `params` or has another length than the layout says.
    pub fn load_master(&mut self, unit: &Unit, rank: Rank, params: &[Span<'_>]) {
        let Some(master) = &mut self.master else { return };
        let shard = unit.shard(rank);
        for fragment in unit.fragments(shard.clone()) {
            let source = params[fragment.param.index()].slice(fragment.param_offset, fragment.len);
            let start = fragment.unit_offset - shard.start;
            deepspeed_kernels::cast(source, (&mut master.as_f32_mut()[start..start + fragment.len]).into());
        }
    }

    /// One rank's part of state tensor `index`, elements `range` of the shard.
    pub fn state_range(&self, index: usize, range: Range<usize>) -> &[f32] {
        &self.state[index].as_f32()[range]
    }
}
