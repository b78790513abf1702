//! Which consecutive parameters belong together: the blocks of the module tree, read off the parameters' names.

use std::ops::Range;

use crate::ParamSpec;

/// Cuts `params` into runs of consecutive parameters, each the largest subtree of the module tree that holds at most
/// `limit` elements, or one parameter.
///
/// The tree is the one that dots in names spell out: `blocks.3.attn.qkv.weight` lies in `blocks.3.attn`, which lies in
/// `blocks.3`. So a unit made of whole blocks is gathered and released with the modules that compute with it.
///
/// ```text
/// emb.weight | blocks.0.{ln, attn, mlp} | blocks.1.{ln, attn, mlp} | ln.weight | head.weight
/// ```
pub(crate) fn blocks(params: &[ParamSpec], limit: usize) -> Vec<Range<usize>> {
    let paths: Vec<Vec<&str>> = params.iter().map(|spec| spec.name.split('.').collect()).collect();
    let mut found = Vec::new();
    split(params, &paths, 0..params.len(), 0, limit, &mut found);
    found
}

/// Adds the blocks of `range`, whose paths agree up to `depth`.
fn split(
    params: &[ParamSpec],
    paths: &[Vec<&str>],
    range: Range<usize>,
    depth: usize,
    limit: usize,
    found: &mut Vec<Range<usize>>,
) {
    let elements: usize = params[range.clone()].iter().map(ParamSpec::numel).fold(0, usize::saturating_add);
    if range.len() <= 1 || elements <= limit {
        if !range.is_empty() {
            found.push(range);
        }
        return;
    }
    let mut start = range.start;
    for index in range.clone() {
        let here = paths[start].get(depth);
        let next = paths.get(index + 1).filter(|_| index + 1 < range.end);
        let same = next.is_some_and(|path| here.is_some() && path.get(depth) == here);
        if !same {
            split(params, paths, start..index + 1, depth + 1, limit, found);
            start = index + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::DType;

    fn params(named: &[(&str, usize)]) -> Vec<ParamSpec> {
        let spec = |(name, len): &(&str, usize)| ParamSpec {
            name: (*name).to_owned(),
            shape: vec![*len],
            dtype: DType::F32,
            group: 0,
        };
        named.iter().map(spec).collect()
    }

    #[test]
    fn a_block_is_the_largest_subtree_that_fits() {
        let tree = params(&[
            ("emb.weight", 50),
            ("blocks.0.attn.weight", 10),
            ("blocks.0.attn.bias", 1),
            ("blocks.0.mlp.weight", 20),
            ("blocks.1.attn.weight", 10),
            ("blocks.1.mlp.weight", 20),
            ("head.weight", 5),
        ]);
        assert_eq!(blocks(&tree, 40), [0..1, 1..4, 4..6, 6..7]);
        assert_eq!(blocks(&tree, 15), [0..1, 1..3, 3..4, 4..5, 5..6, 6..7]);
        assert_eq!(blocks(&tree, 1000).first(), Some(&(0..7)));
        assert_eq!(blocks(&[], 10), []);
    }

    proptest! {
        #[test]
        fn blocks_cover_all_parameters_in_order(
            sizes in prop::collection::vec((0usize..4, 0usize..4, 0usize..100), 0..30), limit in 1usize..300,
        ) {
            let tree: Vec<ParamSpec> = sizes
                .iter()
                .enumerate()
                .map(|(index, (a, b, len))| ParamSpec {
                    name: format!("{a}.{b}.p{index}"), shape: vec![*len], dtype: DType::F32, group: 0,
                })
                .collect();
            let found = blocks(&tree, limit);
            let mut next = 0;
            for block in found {
                prop_assert_eq!(block.start, next);
                let elements: usize = tree[block.clone()].iter().map(ParamSpec::numel).sum();
                prop_assert!(block.len() == 1 || elements <= limit);
                next = block.end;
            }
            prop_assert_eq!(next, tree.len());
        }
    }
}
