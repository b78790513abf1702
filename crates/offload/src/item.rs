//! What a pass moves through memory at a time.

use crate::{Region, region::piece_len};

/// One region per lane, read, changed and written together: a piece of a unit's shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it belongs to; the caller's to choose (the index of the unit).
    pub tag: usize,
    /// The piece's first element in what it was cut from.
    pub start: usize,
    /// Its part of each lane.
    pub regions: Vec<Region>,
}

impl Item {
    /// All of `regions` at once.
    pub fn whole(tag: usize, regions: &[Region]) -> Self {
        Self { tag, start: 0, regions: regions.to_vec() }
    }

    /// `regions`, which have one length, cut across into items of at most `max_len` elements per lane.
    ///
    /// `max_len` is rounded as in [`Region::pieces`].
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn cut(tag: usize, regions: &[Region], max_len: usize) -> impl Iterator<Item = Self> {
        let len = regions.first().map_or(0, Region::len);
        assert!(regions.iter().all(|region| region.len() == len), "regions cut together have one length");
        let step = piece_len(max_len);
        (0..len).step_by(step).map(move |start| {
            let piece = step.min(len - start);
            Self { tag, start, regions: regions.iter().map(|region| region.slice(start, piece)).collect() }
        })
    }

    /// Elements in the longest lane.
    pub fn len(&self) -> usize {
        self.regions.iter().map(Region::len).max().unwrap_or(0)
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use deepspeed_core::DType;

    use super::*;

    #[test]
    fn lanes_of_different_dtypes_are_cut_at_the_same_elements() {
        let regions = [Region::new(1, 0, 5000, DType::F32), Region::new(1, 20480, 5000, DType::BF16)];
        let items: Vec<Item> = Item::cut(7, &regions, 2100).collect();
        let cuts: Vec<(usize, usize)> = items.iter().map(|item| (item.start, item.len())).collect();
        assert_eq!(cuts, [(0, 2048), (2048, 2048), (4096, 904)]);
        assert!(items.iter().all(|item| item.tag == 7));
        assert_eq!(items[2].regions[1].offset(), 20480 + 8192);
    }
}
