//! Which modules of the tree gather which units: as few as possible, so that a unit is gathered once for all of them.

use std::collections::{BTreeSet, HashMap};

/// A module, as far as gathering is concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleFacts {
    /// Its path in the tree, as `blocks.3.attn`; empty for the root.
    pub path: String,
    /// Whether it can be called; containers that only hold modules cannot.
    pub callable: bool,
    /// Whether everything below it is to be gathered at once.
    pub leaf: bool,
    /// The units of the parameters that it holds itself.
    pub units: Vec<usize>,
    /// Elements of those parameters.
    pub elements: usize,
}

/// What one module does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gathers {
    /// Index of the module.
    pub module: usize,
    /// Units that are there during its forward and backward.
    pub gathers: Vec<usize>,
    /// Units that are not trained, of parameters that it holds itself while another module gathers them: they are needed
    /// until its backward is over.
    pub watches: Vec<usize>,
}

/// Chooses, for every unit, the largest callable modules whose parameters (of its kind, trained or not) are all in it.
///
/// `modules` are in the order of the tree, the root first; `trained` tells, by unit, whether its parameters are. A module
/// of at most `granularity` elements counts as a leaf. The root is always among the modules chosen: it uses what other
/// modules' parameters are used for outside of them.
pub fn gathering_modules(modules: &[ModuleFacts], trained: &[bool], granularity: usize) -> Vec<Gathers> {
    let tree = Tree::new(modules, trained, granularity);
    let mut gathers: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); modules.len()];
    let mut watches = gathers.clone();
    for (owner, facts) in modules.iter().enumerate() {
        for unit in &facts.units {
            let (chosen, inside_leaf) = tree.gatherer(owner, *unit, trained[*unit]);
            gathers[chosen].insert(*unit);
            if chosen != owner && !trained[*unit] && !inside_leaf && facts.callable {
                watches[owner].insert(*unit);
            }
        }
    }
    let found = gathers.into_iter().zip(watches).enumerate().map(|(module, (gathers, watches))| Gathers {
        module,
        watches: watches.difference(&gathers).copied().collect(),
        gathers: gathers.into_iter().collect(),
    });
    found.filter(|it| it.module == 0 || !it.gathers.is_empty() || !it.watches.is_empty()).collect()
}

/// The modules with what lies below them.
struct Tree<'m> {
    modules: &'m [ModuleFacts],
    parents: Vec<Option<usize>>,
    /// By module: the units of all parameters below it, not trained and trained.
    below: [Vec<BTreeSet<usize>>; 2],
    leaf: Vec<bool>,
}

impl<'m> Tree<'m> {
    fn new(modules: &'m [ModuleFacts], trained: &[bool], granularity: usize) -> Self {
        let indices: HashMap<&str, usize> =
            modules.iter().enumerate().map(|(index, it)| (it.path.as_str(), index)).collect();
        let parents: Vec<Option<usize>> = modules
            .iter()
            .enumerate()
            .map(|(index, it)| {
                let parent = it.path.rsplit_once('.').map_or("", |(parent, _)| parent);
                // A module that several others share has one path; where its parent's is not here, the root will do.
                (index > 0).then(|| indices.get(parent).copied().filter(|found| *found < index).unwrap_or(0))
            })
            .collect();
        let mut below = [vec![BTreeSet::new(); modules.len()], vec![BTreeSet::new(); modules.len()]];
        let mut elements: Vec<usize> = modules.iter().map(|it| it.elements).collect();
        for (index, it) in modules.iter().enumerate() {
            for unit in &it.units {
                below[usize::from(trained[*unit])][index].insert(*unit);
            }
        }
        for index in (1..modules.len()).rev() {
            let parent = parents[index].unwrap_or(0);
            elements[parent] = elements[parent].saturating_add(elements[index]);
            for kind in &mut below {
                let units = kind[index].clone();
                kind[parent].extend(units);
            }
        }
        let leaf = modules.iter().zip(elements).map(|(it, elements)| it.leaf || elements <= granularity);
        Self { modules, leaf: leaf.collect(), parents, below }
    }

    /// `module` and what is above it, the root last.
    fn path(&self, module: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(Some(module), |module| self.parents[*module])
    }

    /// The module that gathers `unit` for its parameters in `owner`, and whether that is because of a leaf.
    fn gatherer(&self, owner: usize, unit: usize, trained: bool) -> (usize, bool) {
        let callable = |module: &usize| self.modules[*module].callable;
        if let Some(leaf) = self.path(owner).filter(|module| self.leaf[*module]).last() {
            return (self.path(leaf).find(callable).unwrap_or(0), true);
        }
        let nearest = self.path(owner).find(callable).unwrap_or(0);
        let below = &self.below[usize::from(trained)];
        let alone = |module: &usize| below[*module].iter().all(|other| *other == unit);
        let largest = self.path(nearest).take_while(alone).filter(callable).last();
        (largest.unwrap_or(nearest), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Modules as (path, callable, units of its own parameters).
    fn tree(listed: &[(&str, bool, &[usize])]) -> Vec<ModuleFacts> {
        let facts = |(path, callable, units): &(&str, bool, &[usize])| ModuleFacts {
            path: (*path).to_owned(),
            callable: *callable,
            leaf: false,
            units: units.to_vec(),
            elements: 10 * units.len(),
        };
        listed.iter().map(facts).collect()
    }

    fn gathers(found: &[Gathers]) -> Vec<(usize, &[usize])> {
        found.iter().map(|it| (it.module, &it.gathers[..])).collect()
    }

    fn gpt() -> Vec<ModuleFacts> {
        tree(&[
            ("", true, &[]),
            ("emb", true, &[0]),
            ("blocks", false, &[]),
            ("blocks.0", true, &[]),
            ("blocks.0.attn", true, &[]),
            ("blocks.0.attn.qkv", true, &[1]),
            ("blocks.0.mlp", true, &[1]),
            ("blocks.1", true, &[]),
            ("blocks.1.attn", true, &[]),
            ("blocks.1.attn.qkv", true, &[2]),
            ("blocks.1.mlp", true, &[3]),
        ])
    }

    #[test]
    fn a_block_gathers_what_it_alone_is_made_of() {
        let found = gathering_modules(&gpt(), &[true; 4], 0);
        assert_eq!(gathers(&found), [(0, &[][..]), (1, &[0]), (3, &[1]), (8, &[2]), (10, &[3])]);
    }

    #[test]
    fn a_unit_of_several_modules_is_gathered_by_each() {
        let modules = tree(&[("", true, &[1]), ("a", true, &[0]), ("b", true, &[0]), ("c", true, &[1])]);
        let found = gathering_modules(&modules, &[true; 2], 0);
        assert_eq!(gathers(&found), [(0, &[1][..]), (1, &[0]), (2, &[0]), (3, &[1])]);
    }

    #[test]
    fn a_container_that_cannot_be_called_leaves_it_to_the_one_above() {
        let modules = tree(&[("", true, &[]), ("x", true, &[1]), ("x.list", false, &[0]), ("y", true, &[1])]);
        let found = gathering_modules(&modules, &[true; 2], 0);
        assert_eq!(gathers(&found), [(0, &[][..]), (1, &[0, 1]), (3, &[1])]);
    }

    #[test]
    fn frozen_and_trained_parameters_of_a_block_do_not_get_in_each_others_way() {
        let modules = tree(&[
            ("", true, &[]),
            ("block", true, &[]),
            ("block.base", true, &[2]),
            ("block.adapter", true, &[0]),
            ("other", true, &[1, 3]),
        ]);
        let found = gathering_modules(&modules, &[true, true, false, false], 0);
        assert_eq!(gathers(&found), [(0, &[][..]), (1, &[0, 2]), (2, &[]), (4, &[1, 3])]);
        assert_eq!(found[2].watches, [2]);
    }

    #[test]
    fn a_leaf_gathers_everything_below_at_once() {
        let mut modules = gpt();
        modules[7].leaf = true;
        let found = gathering_modules(&modules, &[true; 4], 0);
        assert_eq!(gathers(&found), [(0, &[][..]), (1, &[0]), (3, &[1]), (7, &[2, 3])]);
        modules[2].leaf = true;
        let found = gathering_modules(&modules, &[true; 4], 0);
        assert_eq!(gathers(&found), [(0, &[1, 2, 3][..]), (1, &[0])]);
    }

    #[test]
    fn small_modules_count_as_leaves() {
        let found = gathering_modules(&gpt(), &[true; 4], 20);
        assert_eq!(gathers(&found), [(0, &[][..]), (1, &[0]), (3, &[1]), (7, &[2, 3])]);
    }

    #[test]
    fn every_unit_is_gathered_by_somebody() {
        for granularity in [0, 15, 1000] {
            let found = gathering_modules(&gpt(), &[true, false, true, false], granularity);
            let units: BTreeSet<usize> = found.iter().flat_map(|it| it.gathers.iter().copied()).collect();
            assert_eq!(units.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
        }
    }
}
