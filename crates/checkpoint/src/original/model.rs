//! A model file: weights or their shapes, buffers, counters and the client's own entries.

use std::collections::{HashMap, HashSet};

use super::{pickle::Item, pickle::TensorRef, torch::TorchFile};
use crate::Result;

/// Keys of a model file that belong to the original; everything else is the client's.
pub(super) const RESERVED: [&str; 22] = [
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "num_experts",
    "num_experts_per_layer",
    "ds_config",
    "ds_version",
    "csr_tensor_module_names",
];

/// A named shape.
pub(super) type Shape<'a> = (&'a str, Vec<usize>);

/// The memory of a tensor: storage, offset, shape, stride.
type Memory<'a> = (&'a str, usize, &'a [usize], &'a [usize]);

/// What a model file says of the model.
pub(super) struct ModelStates<'a> {
    pub(super) root: Item<'a>,
    /// The tensors of the module's state dict, in order.
    pub(super) module: Vec<(&'a str, TensorRef)>,
    pub(super) buffers: HashSet<&'a str>,
    /// Per parameter group, the trained parameters in the order of the flat memory. None at stage 0.
    pub(super) groups: Option<Vec<Vec<Shape<'a>>>>,
    pub(super) frozen: Vec<Shape<'a>>,
    pub(super) frozen_fragments: HashMap<&'a str, TensorRef>,
    /// (other name, name).
    pub(super) shared: Vec<(&'a str, &'a str)>,
}

impl<'a> ModelStates<'a> {
    /// Reads the file's pickle.
    ///
    /// # Errors
    /// [`crate::CheckpointError::Damaged`] for a file that is no model file.
    pub(super) fn read(file: &'a TorchFile) -> Result<Self> {
        let root = file.root();
        let wrong = |key: &str, item: Option<Item<'_>>| {
            let found = item.map_or("missing".to_owned(), Item::describe);
            file.damaged(format!("its `{key}` is {found}"))
        };
        if root.pairs().is_none() {
            return Err(file.damaged(format!("it holds {} instead of a dict", root.describe())));
        }
        let named = |key: &str| -> Result<Vec<(&'a str, Item<'a>)>> {
            match root.some(key) {
                None => Ok(Vec::new()),
                Some(item) => item.named().ok_or_else(|| wrong(key, Some(item))),
            }
        };
        let shapes = |key: &str, item: Item<'a>| -> Result<Vec<Shape<'a>>> {
            let entries = item.named().ok_or_else(|| wrong(key, Some(item)))?;
            let shape = |(name, item): (&'a str, Item<'a>)| Some((name, item.shape()?));
            entries.into_iter().map(|entry| shape(entry).ok_or_else(|| wrong(key, Some(entry.1)))).collect()
        };
        let module = root.some("module").and_then(Item::named);
        let module = module.ok_or_else(|| wrong("module", root.get("module")))?;
        let buffers = match root.some("buffer_names") {
            None => HashSet::new(),
            Some(item) => {
                let names = item.items().ok_or_else(|| wrong("buffer_names", Some(item)))?;
                names.into_iter().filter_map(Item::text).collect()
            }
        };
        let groups = match root.some("param_shapes") {
            None => None,
            Some(item) => {
                let groups = item.items().ok_or_else(|| wrong("param_shapes", Some(item)))?;
                Some(groups.into_iter().map(|group| shapes("param_shapes", group)).collect::<Result<_>>()?)
            }
        };
        let frozen = match root.some("frozen_param_shapes") {
            None => Vec::new(),
            Some(item) => shapes("frozen_param_shapes", item)?,
        };
        let fragments = named("frozen_param_fragments")?.into_iter();
        let shared = named("shared_params")?.into_iter();
        Ok(Self {
            root,
            // What is no tensor in a state dict is the extra state of a module, which belongs to its code.
            module: module.into_iter().filter_map(|(name, item)| Some((name, item.tensor()?))).collect(),
            buffers,
            groups,
            frozen,
            frozen_fragments: fragments.filter_map(|(name, item)| Some((name, item.tensor()?))).collect(),
            shared: shared.filter_map(|(other, name)| Some((other, name.text()?))).collect(),
        })
    }

    /// Number of ranks that shared the model's state.
    pub(super) fn world(&self) -> Option<usize> {
        self.root.get("dp_world_size").and_then(Item::size)
    }

    /// The client's own entries.
    pub(super) fn client(&self) -> Vec<(Item<'a>, Item<'a>)> {
        let own = |(key, _): &(Item<'a>, Item<'a>)| !key.text().is_some_and(|key| RESERVED.contains(&key));
        self.root.pairs().unwrap_or_default().into_iter().filter(own).collect()
    }

    /// Other names of parameters: those that the file names, and those whose memory is that of an earlier one.
    pub(super) fn tied(&self) -> Vec<(String, String)> {
        let mut tied: Vec<(String, String)> =
            self.shared.iter().map(|(other, name)| ((*other).to_owned(), (*name).to_owned())).collect();
        let mut first: HashMap<Memory<'_>, &str> = HashMap::new();
        for (name, tensor) in &self.module {
            if self.buffers.contains(name) || tensor.shape.contains(&0) || tensor.storage.numel == 0 {
                continue;
            }
            if self.shared.iter().any(|(other, _)| other == name) {
                continue;
            }
            let memory = (tensor.storage.key.as_str(), tensor.offset, &tensor.shape[..], &tensor.stride[..]);
            match first.get(&memory) {
                Some(other) => tied.push(((*name).to_owned(), (*other).to_owned())),
                None => drop(first.insert(memory, name)),
            }
        }
        tied
    }
}
