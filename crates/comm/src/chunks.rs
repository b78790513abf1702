//! The arithmetic of collectives: what is cut where, and which arguments fit together.

use std::ops::Range;

use deepspeed_core::Rank;

use crate::{
    BLOCK,
    group::{Pieces, PiecesMut},
};

/// The elements `range` of a rank's shard, as a range of the whole.
pub(crate) fn shard_range(rank: usize, shard_len: usize, range: &Range<usize>) -> Range<usize> {
    rank * shard_len + range.start..rank * shard_len + range.end
}

/// A shard cut into chunks of whole blocks. There is always one, maybe empty, to carry the fingerprint.
pub(crate) struct Chunks {
    len: usize,
    size: usize,
    /// At least one.
    pub(crate) count: usize,
}

impl Chunks {
    pub(crate) fn new(len: usize, most: usize) -> Self {
        let size = most / BLOCK * BLOCK;
        assert!(size > 0, "a slot holds at least a block");
        Self { len, size, count: len.div_ceil(size).max(1) }
    }

    pub(crate) fn range(&self, chunk: usize) -> Range<usize> {
        (chunk * self.size).min(self.len)..((chunk + 1) * self.size).min(self.len)
    }
}

/// Where the parts for the peers lie in a slot: one for each peer, in rank order. The label is the parts' dtype.
pub(crate) struct Parts {
    me: usize,
    /// Bytes of a part.
    pub(crate) stride: usize,
}

impl Parts {
    pub(crate) fn new(me: usize, world: usize, capacity: usize) -> Self {
        let most = capacity / world.saturating_sub(1).max(1);
        Self { me, stride: most / (BLOCK * size_of::<f32>()) * (BLOCK * size_of::<f32>()) }
    }

    /// The part of this rank's slot for `peer`.
    pub(crate) fn to(&self, peer: usize) -> usize {
        self.stride * (peer - usize::from(peer > self.me))
    }

    /// The part of `peer`'s slot for this rank.
    pub(crate) fn from(&self, peer: usize) -> usize {
        self.stride * (self.me - usize::from(self.me > peer))
    }
}

pub(crate) fn broadcast_problem(root: Rank, world: usize) -> Option<String> {
    (root.index() >= world).then(|| format!("root rank {root} is not one of {world} ranks"))
}

pub(crate) fn reduce_scatter_problem(input: &Pieces<'_>, shard_len: usize, world: usize) -> Option<String> {
    if shard_len.checked_mul(world) != Some(input.len) {
        return Some(format!("input of {} elements, expected {world} shards of {shard_len}", input.len));
    }
    input.problem()
}

pub(crate) fn all_gather_problem(output: &PiecesMut<'_>, world: usize) -> Option<String> {
    if !output.len.is_multiple_of(world) {
        return Some(format!("output of {} elements, expected equal shards for {world} ranks", output.len));
    }
    output.problem()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_whole_blocks_and_cover_the_shard_once() {
        for len in [0, 1, BLOCK, BLOCK + 1, 10 * BLOCK + 7] {
            for most in [BLOCK, 3 * BLOCK + 5] {
                let chunks = Chunks::new(len, most);
                let mut next = 0;
                for chunk in 0..chunks.count {
                    let range = chunks.range(chunk);
                    assert_eq!((range.start, range.start % BLOCK), (next, 0));
                    assert!(range.len() <= most && (len == 0 || !range.is_empty()));
                    next = range.end;
                }
                assert_eq!(next, len);
            }
        }
    }

    #[test]
    fn writer_and_reader_of_a_part_agree_and_parts_do_not_overlap() {
        for world in [2, 3, 64] {
            let capacity = (world - 1) * BLOCK * 4 + 100;
            for me in 0..world {
                let mine = Parts::new(me, world, capacity);
                let mut next = 0;
                for peer in (0..world).filter(|peer| *peer != me) {
                    assert_eq!(mine.to(peer), Parts::new(peer, world, capacity).from(me));
                    assert_eq!(mine.to(peer), next);
                    next += mine.stride;
                }
                assert!(next <= capacity && mine.stride >= BLOCK * 4);
            }
        }
    }
}
