//! The flat layout: how parameters become units and units become shards. Pure arithmetic, the same on every rank.

use std::ops::Range;

use crate::{DType, ParamId, Rank, UnitId, blocks::blocks};

/// Elements to which every shard is aligned: 256 bytes of fp32, 128 bytes of a 16-bit dtype.
///
/// Whole cache lines for every dtype mean that ranks writing neighbouring shards never share a line.
pub const SHARD_ALIGN: usize = 64;

/// What the engine knows about a parameter: never a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// The name by which users and checkpoints know it, such as `blocks.0.qkv.weight`.
    pub name: String,
    /// The shape; its product is the number of elements, and an empty shape is a scalar.
    pub shape: Vec<usize>,
    /// The dtype of the weights as the model computes with them.
    pub dtype: DType,
    /// Index of the optimizer's parameter group it belongs to.
    pub group: usize,
}

impl ParamSpec {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Where a parameter lies inside its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamSlot {
    /// Which parameter.
    pub param: ParamId,
    /// First element inside the unit.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
}

/// A run of elements of one parameter inside a range of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Which parameter.
    pub param: ParamId,
    /// First element inside the parameter.
    pub param_offset: usize,
    /// First element inside the unit.
    pub unit_offset: usize,
    /// Number of elements.
    pub len: usize,
}

/// Consecutive parameters that are gathered, reduced and released together: one flat span, padded, cut into
/// `world` equal shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Which unit.
    pub id: UnitId,
    /// The dtype shared by all its parameters.
    pub dtype: DType,
    /// Its parameters, in order, without gaps; zero-sized parameters are in no unit.
    pub slots: Vec<ParamSlot>,
    /// Elements that belong to parameters; the rest up to [`Unit::len`] is padding.
    pub filled: usize,
    /// Elements of one shard, a multiple of [`SHARD_ALIGN`].
    pub shard_len: usize,
    world: usize,
}

impl Unit {
    /// Number of elements with padding: `shard_len * world`.
    pub fn len(&self) -> usize {
        self.shard_len * self.world
    }

    /// Whether the unit holds no element. Never true inside a [`Layout`].
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// The elements of `rank`'s shard, inside the unit.
    pub fn shard(&self, rank: Rank) -> Range<usize> {
        let start = rank.index() * self.shard_len;
        start..start + self.shard_len
    }

    /// The runs of parameters that cover `range` of the unit, in order; padding is left out.
    pub fn fragments(&self, range: Range<usize>) -> impl Iterator<Item = Fragment> + '_ {
        let first = self.slots.partition_point(|slot| slot.offset + slot.len <= range.start);
        self.slots[first..]
            .iter()
            .take_while({
                let end = range.end;
                move |slot| slot.offset < end
            })
            .filter_map(move |slot| {
                let start = slot.offset.max(range.start);
                let end = (slot.offset + slot.len).min(range.end);
                (start < end).then(|| Fragment {
                    param: slot.param,
                    param_offset: start - slot.offset,
                    unit_offset: start,
                    len: end - start,
                })
            })
    }
}

/// Why a set of parameters has no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Two parameters with one name.
    #[error("two parameters are named `{0}`")]
    DuplicateName(String),
    /// A world of no rank.
    #[error("the world has no rank")]
    EmptyWorld,
    /// More elements than memory has addresses.
    #[error("parameter `{name}` of shape {shape:?} has more elements than memory has addresses")]
    TooLarge {
        /// The parameter's name.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
}

/// The flat layout of all trainable parameters: the same on every rank and at every ZeRO stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The parameters, by [`ParamId`].
    pub params: Vec<ParamSpec>,
    /// The units, by [`UnitId`].
    pub units: Vec<Unit>,
    /// Number of ranks that share each unit.
    pub world: usize,
}

impl Layout {
    /// Groups `params` into units of at most `unit_len` elements for `world` ranks.
    ///
    /// A unit holds consecutive parameters of one dtype, whole blocks of the module tree where they fit (the dots in
    /// names spell the tree out); a parameter is never cut, so one that is larger is a unit of its own. The result
    /// depends on nothing else, above all not on the ZeRO stage: equal layouts are what makes the gradient norm
    /// bit-equal at every stage.
    ///
    /// # Errors
    /// [`LayoutError`] for duplicate names, no ranks or impossible sizes.
    pub fn new(params: Vec<ParamSpec>, world: usize, unit_len: usize) -> Result<Self, LayoutError> {
        if world == 0 {
            return Err(LayoutError::EmptyWorld);
        }
        let mut seen = std::collections::HashSet::new();
        for spec in &params {
            if !seen.insert(spec.name.as_str()) {
                return Err(LayoutError::DuplicateName(spec.name.clone()));
            }
            let bytes = spec.shape.iter().try_fold(8usize, |total, dim| total.checked_mul(*dim));
            if bytes.is_none() {
                return Err(LayoutError::TooLarge { name: spec.name.clone(), shape: spec.shape.clone() });
            }
        }
        let mut units: Vec<Unit> = Vec::new();
        let mut open: Option<(DType, Vec<ParamSlot>, usize)> = None;
        let mut close = |open: &mut Option<(DType, Vec<ParamSlot>, usize)>| {
            if let Some((dtype, slots, filled)) = open.take() {
                let shard_len = filled.div_ceil(world).next_multiple_of(SHARD_ALIGN);
                units.push(Unit {
                    id: UnitId::from_index(units.len()),
                    dtype,
                    slots,
                    filled,
                    shard_len,
                    world,
                });
            }
        };
        for block in blocks(&params, unit_len) {
            let elements: usize = params[block.clone()].iter().map(ParamSpec::numel).sum();
            if open.as_ref().is_some_and(|(_, _, filled)| filled.saturating_add(elements) > unit_len) {
                close(&mut open);
            }
            for (index, spec) in block.clone().zip(&params[block]) {
                let len = spec.numel();
                if len == 0 {
                    continue;
                }
                if open.as_ref().is_some_and(|(dtype, _, _)| *dtype != spec.dtype) {
                    close(&mut open);
                }
                let (_, slots, filled) = open.get_or_insert_with(|| (spec.dtype, Vec::new(), 0));
                slots.push(ParamSlot { param: ParamId::from_index(index), offset: *filled, len });
                *filled += len;
            }
        }
        close(&mut open);
        Ok(Self { params, units, world })
    }

    /// The parameter with this id.
    pub fn param(&self, id: ParamId) -> &ParamSpec {
        &self.params[id.index()]
    }

    /// Elements of all parameters, without padding.
    pub fn numel(&self) -> usize {
        self.units.iter().map(|unit| unit.filled).sum()
    }

    /// Elements of one rank's shards of all units, padding included.
    pub fn shard_numel(&self) -> usize {
        self.units.iter().map(|unit| unit.shard_len).sum()
    }

    /// For each unit, where one rank's shard starts when the shards of all units are stored one after another.
    pub fn shard_starts(&self) -> Vec<usize> {
        self.units
            .iter()
            .scan(0, |start, unit| {
                let this = *start;
                *start += unit.shard_len;
                Some(this)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(name: usize, len: usize) -> ParamSpec {
        ParamSpec { name: format!("p{name}"), shape: vec![len], dtype: DType::F32, group: 0 }
    }

    fn layout(lens: &[usize], world: usize, unit_len: usize) -> Layout {
        let params = lens.iter().enumerate().map(|(i, len)| spec(i, *len)).collect();
        Layout::new(params, world, unit_len).unwrap()
    }

    proptest! {
        #[test]
        fn every_element_has_exactly_one_owner(
            lens in prop::collection::vec(0usize..500, 0..20), world in 1usize..6, unit_len in 1usize..800,
        ) {
            let layout = layout(&lens, world, unit_len);
            let mut owners: Vec<Vec<u32>> = lens.iter().map(|len| vec![0; *len]).collect();
            for unit in &layout.units {
                prop_assert_eq!(unit.shard_len % SHARD_ALIGN, 0);
                prop_assert!(unit.len() >= unit.filled && !unit.is_empty());
                for rank in 0..world {
                    for fragment in unit.fragments(unit.shard(Rank::from_index(rank))) {
                        let run = fragment.param_offset..fragment.param_offset + fragment.len;
                        owners[fragment.param.index()][run].iter_mut().for_each(|count| *count += 1);
                    }
                }
            }
            prop_assert!(owners.iter().flatten().all(|count| *count == 1));
        }

        #[test]
        fn fragments_cover_any_range_in_order(
            lens in prop::collection::vec(1usize..100, 1..10), start in 0usize..1000, len in 0usize..1000,
        ) {
            let layout = layout(&lens, 2, usize::MAX);
            let unit = &layout.units[0];
            let range = start.min(unit.len())..(start + len).min(unit.len());
            let mut next = range.start;
            for fragment in unit.fragments(range.clone()) {
                prop_assert_eq!(fragment.unit_offset, next);
                next += fragment.len;
            }
            prop_assert_eq!(next.max(range.start), range.end.min(unit.filled).max(range.start));
        }
    }

    #[test]
    fn units_are_made_of_whole_blocks() {
        let named = |name: &str, len| ParamSpec { name: name.to_owned(), ..spec(0, len) };
        let params = vec![
            named("emb.weight", 30),
            named("blocks.0.a", 20),
            named("blocks.0.b", 20),
            named("blocks.1.a", 20),
            named("blocks.1.b", 20),
            named("head.weight", 70),
        ];
        let layout = Layout::new(params, 1, 60).unwrap();
        let members: Vec<Vec<usize>> = layout
            .units
            .iter()
            .map(|unit| unit.slots.iter().map(|slot| slot.param.index()).collect())
            .collect();
        assert_eq!(members, [vec![0], vec![1, 2], vec![3, 4], vec![5]]);
    }

    #[test]
    fn duplicate_names_are_refused() {
        let twice = vec![spec(0, 1), spec(0, 2)];
        assert_eq!(Layout::new(twice, 1, 1), Err(LayoutError::DuplicateName("p0".into())));
    }
}
