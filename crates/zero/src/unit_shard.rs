//! What a rank keeps of one unit.

use std::ops::Range;

use deepspeed_core::{AlignedBuffer, DType, ParamId, Rank, Span, Unit};

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
    /// The shard of `unit` whose masters and state lie elsewhere: only gradients are here.
    pub fn of_gradients(unit: &Unit) -> Self {
        let gradient = AlignedBuffer::zeroed(unit.shard_len, DType::F32);
        Self { gradient, square_sum: 0.0, master: None, state: Vec::new() }
    }

    /// A shard that lies on a device: nothing is here.
    pub fn elsewhere() -> Self {
        Self {
            gradient: AlignedBuffer::zeroed(0, DType::F32),
            square_sum: 0.0,
            master: None,
            state: Vec::new(),
        }
    }

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
        if let Some(master) = &mut self.master {
            fill_master(master.as_f32_mut(), unit, unit.shard(rank), params);
        }
    }

    /// Sets the masters of `params` from their whole weights, by parameter id, but for those that round to their weight
    /// already: these keep the precision that the weight lacks.
    ///
    /// # Panics
    /// As [`UnitShard::load_master`].
    pub fn update_master(&mut self, unit: &Unit, rank: Rank, params: &[ParamId], weights: &[Span<'_>]) {
        if let Some(master) = &mut self.master {
            refresh_master(master.as_f32_mut(), unit, unit.shard(rank), params, weights);
        }
    }

    /// Sets the masters of this rank from its shard of the weights, padding included.
    ///
    /// # Panics
    /// If `weights` has another length than the shard.
    pub fn load_own_master(&mut self, weights: Span<'_>) {
        if let Some(master) = &mut self.master {
            deepspeed_kernels::cast(weights, master.span_mut());
        }
    }
}

/// Sets the masters of the elements `range` of `unit` from whole parameters of any dtype, by parameter id.
///
/// # Panics
/// If a parameter of the unit is missing from `params` or has another length than the layout says.
pub fn fill_master(master: &mut [f32], unit: &Unit, range: Range<usize>, params: &[Span<'_>]) {
    for fragment in unit.fragments(range.clone()) {
        let source = params[fragment.param.index()].slice(fragment.param_offset, fragment.len);
        let start = fragment.unit_offset - range.start;
        deepspeed_kernels::cast(source, (&mut master[start..start + fragment.len]).into());
    }
}

/// Sets the masters of `params` among the elements `range` of `unit` from their whole `weights`, by parameter id, but for
/// those that round to their weight already: these keep the precision that the weight lacks.
///
/// # Panics
/// As [`fill_master`].
pub fn refresh_master(
    master: &mut [f32],
    unit: &Unit,
    range: Range<usize>,
    params: &[ParamId],
    weights: &[Span<'_>],
) {
    for fragment in unit.fragments(range.clone()).filter(|fragment| params.contains(&fragment.param)) {
        let source = weights[fragment.param.index()].slice(fragment.param_offset, fragment.len);
        let start = fragment.unit_offset - range.start;
        let master = &mut master[start..start + fragment.len];
        let mut rounded = AlignedBuffer::zeroed(fragment.len, source.dtype());
        deepspeed_kernels::cast((&*master).into(), rounded.span_mut());
        let mut then = AlignedBuffer::zeroed(fragment.len, DType::F32);
        deepspeed_kernels::cast(rounded.span(), then.span_mut());
        let mut now = AlignedBuffer::zeroed(fragment.len, DType::F32);
        deepspeed_kernels::cast(source, now.span_mut());
        for ((master, now), then) in master.iter_mut().zip(now.as_f32()).zip(then.as_f32()) {
            if now.to_bits() != then.to_bits() {
                *master = *now;
            }
        }
    }
}
