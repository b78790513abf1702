//! Finds the first parameter whose reduced gradient is not finite.

use std::fmt;

use deepspeed_comm::Group;
use deepspeed_core::{Layout, SpanMut, Unit};
use deepspeed_zero::{OffloadedState, UnitShard};

use crate::EngineError;

/// Where the first gradient that is not finite was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NonFinite {
    /// The parameter, by name.
    pub(crate) param: String,
    /// Whether the element is NaN; otherwise it is infinite.
    pub(crate) nan: bool,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the gradient of `{}` is {}", self.param, if self.nan { "NaN" } else { "infinite" })
    }
}

/// The first parameter, in registration order over all ranks, with a non-finite element. Collective.
pub(crate) fn find(
    layout: &Layout,
    shards: &[UnitShard],
    offloaded: Option<&OffloadedState>,
    group: &dyn Group,
) -> Result<Option<NonFinite>, EngineError> {
    let in_unit = |unit: &Unit, gradient: &[f32]| {
        let range = unit.shard(group.rank());
        unit.fragments(range.clone()).find_map(|fragment| {
            let start = fragment.unit_offset - range.start;
            let elements = &gradient[start..start + fragment.len];
            elements.iter().find(|x| !x.is_finite()).map(|x| (fragment.param.0, x.is_nan()))
        })
    };
    let mut mine = None;
    for unit in layout.units.iter().filter(|unit| !shards[unit.id.index()].square_sum.is_finite()) {
        mine = match offloaded.filter(|offloaded| offloaded.holds(unit.id)) {
            Some(offloaded) => {
                let mut gradient = vec![0.0f32; unit.shard_len];
                offloaded.read_gradient(unit.id, 0, SpanMut::from(&mut gradient[..]))?;
                in_unit(unit, &gradient)
            }
            None => in_unit(unit, shards[unit.id.index()].gradient.as_f32()),
        };
        if mine.is_some() {
            break;
        }
    }
    let message = mine.map_or_else(Vec::new, |(param, nan)| {
        let mut bytes = param.to_le_bytes().to_vec();
        bytes.push(u8::from(nan));
        bytes
    });
    let all = group.all_gather_bytes("first gradient that is not finite", &message)?;
    let first = all
        .iter()
        .filter_map(|bytes| match bytes[..] {
            [a, b, c, d, nan] => Some((u32::from_le_bytes([a, b, c, d]), nan != 0)),
            _ => None,
        })
        .min();
    Ok(first.and_then(|(param, nan)| {
        layout.params.get(param as usize).map(|spec| NonFinite { param: spec.name.clone(), nan })
    }))
}
