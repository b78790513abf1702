//! Gradients of several micro-batches, summed in fp32 on this rank alone until they are reduced.

use deepspeed_comm::Pieces;
use deepspeed_core::{AlignedBuffer, DType, Layout, Span, UnitId};

/// The whole gradient of every unit in fp32; takes memory from the first [`add`](Self::add) on.
#[derive(Debug, Default)]
pub struct LocalAccumulator {
    units: Vec<AlignedBuffer>,
    /// Whether anything was added since the last clear.
    filled: bool,
}

impl LocalAccumulator {
    /// Adds one micro-batch; a parameter without a gradient adds nothing.
    ///
    /// # Panics
    /// If a gradient has another length than the layout says.
    pub fn add(&mut self, layout: &Layout, gradients: &[Option<Span<'_>>]) {
        if self.units.is_empty() {
            self.units =
                layout.units.iter().map(|unit| AlignedBuffer::zeroed(unit.filled, DType::F32)).collect();
        }
        for unit in &layout.units {
            let sum = self.units[unit.id.index()].as_f32_mut();
            for slot in &unit.slots {
                let sum = &mut sum[slot.offset..slot.offset + slot.len];
                match gradients[slot.param.index()] {
                    Some(gradient) if self.filled => deepspeed_kernels::add_assign(sum, gradient),
                    Some(gradient) => deepspeed_kernels::cast(gradient, sum.into()),
                    None if self.filled => {}
                    None => sum.fill(0.0),
                }
            }
        }
        self.filled = true;
    }

    /// A device has added one micro-batch to a sum of its own.
    pub fn mark_filled(&mut self) {
        self.filled = true;
    }

    /// Whether there is anything to reduce.
    pub fn is_filled(&self) -> bool {
        self.filled
    }

    /// The accumulated gradient of `unit`.
    pub fn pieces(&self, layout: &Layout, unit: UnitId) -> Pieces<'_> {
        let sum = &self.units[unit.index()];
        Pieces { len: layout.units[unit.index()].len(), runs: vec![(0, sum.span())] }
    }

    /// Forgets the sum; the memory is kept for the next accumulation.
    pub fn clear(&mut self) {
        self.filled = false;
    }
}
