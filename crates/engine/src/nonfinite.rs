//! Finds the first parameter whose reduced gradient is not finite.

use std::fmt;

use deepspeed_comm::{CommError, Group};
use deepspeed_core::Layout;
use deepspeed_zero::UnitShard;

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
    group: &dyn Group,
) -> Result<Option<NonFinite>, CommError> {
    let mine = layout.units.iter().find_map(|unit| {
        let shard = &shards[unit.id.index()];
        if shard.square_sum.is_finite() {
            return None;
        }
        let range = unit.shard(group.rank());
        unit.fragments(range.clone()).find_map(|fragment| {
            let start = fragment.unit_offset - range.start;
            let elements = &shard.gradient.as_f32()[start..start + fragment.len];
            elements.iter().find(|x| !x.is_finite()).map(|x| (fragment.param.0, x.is_nan()))
        })
    });
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
