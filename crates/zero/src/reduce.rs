//! A unit's gradients become the rank's shard of their average.

use deepspeed_comm::{CommError, Group, Into, Pieces};
use deepspeed_core::{AlignedBuffer, DType, Unit};

use crate::UnitShard;

/// In which dtype and with which factors gradients travel.
///
/// The product `before * after` is `1 / world` whatever the settings: `prescale_gradients` and
/// `gradient_predivide_factor` only choose on which side of the sum the division happens, which matters where the
/// wire is a 16-bit dtype that can overflow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchange {
    /// The dtype on the wire; `None` sends each gradient in its own dtype. The sum is fp32 either way.
    pub wire: Option<DType>,
    /// The dtype to which the accumulated shard is rounded after every addition; fp32 rounds nothing.
    pub accumulate: DType,
    /// Factor applied before a gradient is cast to the wire dtype.
    pub before: f32,
    /// Factor applied to the fp32 sum over ranks.
    pub after: f32,
}

impl Exchange {
    /// Factors for `world` ranks: all of the division before the sum if `prescale`, else `1 / predivide` before and
    /// `predivide / world` after. Without a wire dtype the sum is fp32 and one division after it is exact enough.
    pub fn new(
        world: usize,
        wire: Option<DType>,
        accumulate: Option<DType>,
        prescale: bool,
        predivide: f64,
    ) -> Self {
        let world = world as f64;
        let (before, after) = match (wire, prescale) {
            (None, _) => (1.0, 1.0 / world),
            (Some(_), true) => (1.0 / world, 1.0),
            (Some(_), false) => (1.0 / predivide, predivide / world),
        };
        let accumulate = accumulate.unwrap_or(DType::F32);
        Self { wire, accumulate, before: before as f32, after: after as f32 }
    }
}

/// Reduces one unit into `shard`: `gradient` becomes, or grows by, the average over ranks; `square_sum` follows.
///
/// # Errors
/// [`CommError`], as [`Group::reduce_scatter`].
pub fn reduce_unit(
    group: &dyn Group,
    what: &str,
    unit: &Unit,
    gradients: &Pieces<'_>,
    exchange: &Exchange,
    shard: &mut UnitShard,
    into: Into,
) -> Result<(), CommError> {
    let packed = exchange.wire.map(|wire| pack(unit, gradients, wire, exchange.before));
    let packed = packed.as_ref().map(|buffer| Pieces { len: unit.len(), runs: vec![(0, buffer.span())] });
    let input = packed.as_ref().unwrap_or(gradients);
    shard.square_sum =
        group.reduce_scatter(what, input, shard.gradient.as_f32_mut(), exchange.after, into)?;
    if exchange.accumulate != DType::F32 {
        round(&mut shard.gradient, exchange.accumulate);
        shard.square_sum = deepspeed_kernels::sum_squares(shard.gradient.span());
    }
    Ok(())
}

/// The unit's gradients times `factor`, in the wire dtype, in one run.
fn pack(unit: &Unit, gradients: &Pieces<'_>, wire: DType, factor: f32) -> AlignedBuffer {
    let mut whole = AlignedBuffer::zeroed(unit.filled, DType::F32);
    for (offset, run) in &gradients.runs {
        let target = &mut whole.as_f32_mut()[*offset..*offset + run.len()];
        deepspeed_kernels::cast(*run, target.into());
    }
    if factor != 1.0 {
        deepspeed_kernels::scale_in_place(whole.as_f32_mut(), factor);
    }
    if wire == DType::F32 {
        return whole;
    }
    let mut packed = AlignedBuffer::zeroed(unit.filled, wire);
    deepspeed_kernels::cast(whole.span(), packed.span_mut());
    packed
}

/// Rounds every element through `dtype`.
fn round(buffer: &mut AlignedBuffer, dtype: DType) {
    let mut narrow = AlignedBuffer::zeroed(buffer.len(), dtype);
    deepspeed_kernels::cast(buffer.span(), narrow.span_mut());
    deepspeed_kernels::cast(narrow.span(), buffer.span_mut());
}
