//! Reading a parsed pickle: each question is answered with a value, or with the name of what stands in its place.

use super::{Node, NodeId, Pickle};
use crate::ElementType;

/// A value inside a pickle.
#[derive(Clone, Copy)]
pub(crate) struct Item<'a> {
    pub(super) pickle: &'a Pickle,
    pub(super) id: NodeId,
}

/// A storage of a torch file: elements that several tensors may be views of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StorageRef {
    /// Name of its entry in the archive, below `data/`.
    pub(crate) key: String,
    /// The type of its elements.
    pub(crate) dtype: ElementType,
    /// Number of its elements.
    pub(crate) numel: usize,
}

/// A tensor: a view of a storage. Not yet checked against the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorRef {
    pub(crate) storage: StorageRef,
    /// First element within the storage.
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) stride: Vec<usize>,
}

/// Classes that wrap a tensor when they are called with one: (class, number of the argument).
const WRAPPERS: [(&str, usize); 3] = [
    ("torch._utils._rebuild_parameter", 0),
    ("torch._utils._rebuild_parameter_with_state", 0),
    ("torch.nn.parameter.Parameter", 0),
];

/// Classes that carry one number as their first argument.
const NUMBERS: [&str; 1] = ["deepspeed.runtime.zero.config.ZeroStageEnum"];

impl<'a> Item<'a> {
    pub(super) fn new(pickle: &'a Pickle, id: NodeId) -> Self {
        Self { pickle, id }
    }

    pub(super) fn node(self) -> &'a Node {
        &self.pickle.nodes[self.id as usize]
    }

    fn other(self, id: NodeId) -> Self {
        Self { pickle: self.pickle, id }
    }

    pub(crate) fn is_none(self) -> bool {
        matches!(self.node(), Node::None)
    }

    pub(crate) fn bool(self) -> Option<bool> {
        match self.node() {
            Node::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// An integer, or an enumeration of integers.
    pub(crate) fn int(self) -> Option<i64> {
        match self.node() {
            Node::Int(value) => Some(*value),
            Node::Called { args, .. } if self.class().is_some_and(|class| NUMBERS.contains(&class)) => {
                self.other(*args).items()?.first()?.int()
            }
            _ => None,
        }
    }

    /// An integer that is a size or an index.
    pub(crate) fn size(self) -> Option<usize> {
        self.int().and_then(|value| value.try_into().ok())
    }

    /// A number.
    pub(crate) fn float(self) -> Option<f64> {
        match self.node() {
            Node::Float(value) => Some(*value),
            Node::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    pub(crate) fn text(self) -> Option<&'a str> {
        match self.node() {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The elements of a list or tuple.
    pub(crate) fn items(self) -> Option<Vec<Item<'a>>> {
        match self.node() {
            Node::List(items) | Node::Tuple(items) => Some(items.iter().map(|id| self.other(*id)).collect()),
            _ => None,
        }
    }

    /// The entries of a dict, in order.
    pub(crate) fn pairs(self) -> Option<Vec<(Item<'a>, Item<'a>)>> {
        match self.node() {
            Node::Dict(pairs) => {
                Some(pairs.iter().map(|(key, value)| (self.other(*key), self.other(*value))).collect())
            }
            _ => None,
        }
    }

    /// The entries of a dict whose keys are text, in order.
    pub(crate) fn named(self) -> Option<Vec<(&'a str, Item<'a>)>> {
        self.pairs()?.into_iter().map(|(key, value)| Some((key.text()?, value))).collect()
    }

    /// The value of `key` in a dict, or the attribute of an object. As in Python, the last of several counts.
    pub(crate) fn get(self, key: &str) -> Option<Item<'a>> {
        let pairs = match self.node() {
            Node::Dict(pairs) => pairs,
            Node::Called { state: Some(state), .. } => return self.other(*state).get(key),
            _ => return None,
        };
        let found = pairs.iter().rev().find(|(name, _)| self.other(*name).text() == Some(key));
        found.map(|(_, value)| self.other(*value))
    }

    /// As [`Item::get`]; a value of None counts as absent.
    pub(crate) fn some(self, key: &str) -> Option<Item<'a>> {
        self.get(key).filter(|item| !item.is_none())
    }

    /// The value under an integer key of a dict.
    pub(crate) fn at(self, key: i64) -> Option<Item<'a>> {
        let pairs = self.pairs()?;
        pairs.into_iter().rev().find(|(name, _)| name.int() == Some(key)).map(|(_, value)| value)
    }

    /// The class or function that would have been called to make this.
    pub(crate) fn class(self) -> Option<&'a str> {
        match self.node() {
            Node::Called { callable, .. } => self.other(*callable).global(),
            _ => None,
        }
    }

    /// A class or function by itself.
    pub(crate) fn global(self) -> Option<&'a str> {
        match self.node() {
            Node::Global(path) => Some(path),
            _ => None,
        }
    }

    /// The arguments of the call that would have made this.
    pub(super) fn arguments(self) -> Option<Vec<Item<'a>>> {
        match self.node() {
            Node::Called { args, .. } => self.other(*args).items(),
            _ => None,
        }
    }

    /// A shape: a tuple of sizes, or a `torch.Size`.
    pub(crate) fn shape(self) -> Option<Vec<usize>> {
        let items = match self.class() {
            Some("torch.Size") => self.arguments()?.first()?.items()?,
            Some(_) => return None,
            None => self.items()?,
        };
        items.into_iter().map(Item::size).collect()
    }

    /// A tensor, bare or as a parameter.
    pub(crate) fn tensor(self) -> Option<TensorRef> {
        // Wrappers in wrappers are not written by anyone; two levels are enough.
        self.tensor_within(2)
    }

    fn tensor_within(self, levels: usize) -> Option<TensorRef> {
        let class = self.class()?;
        let arguments = self.arguments()?;
        if let Some((_, index)) = WRAPPERS.iter().find(|(wrapper, _)| *wrapper == class) {
            return arguments.get(*index)?.tensor_within(levels.checked_sub(1)?);
        }
        match class {
            "torch._utils._rebuild_tensor_v2" => rebuilt(&arguments),
            // (function, class, arguments of the function, attributes)
            "torch._tensor._rebuild_from_type_v2" => match arguments.first()?.global()? {
                "torch._utils._rebuild_tensor_v2" => rebuilt(&arguments.get(2)?.items()?),
                function if WRAPPERS.iter().any(|(wrapper, _)| *wrapper == function) => {
                    arguments.get(2)?.items()?.first()?.tensor_within(levels.checked_sub(1)?)
                }
                _ => None,
            },
            _ => None,
        }
    }

    /// What this is, for the text of an error.
    pub(crate) fn describe(self) -> String {
        match self.node() {
            Node::None => "None".to_owned(),
            Node::Bool(_) => "a boolean".to_owned(),
            Node::Int(_) | Node::BigInt(_) => "an integer".to_owned(),
            Node::Float(_) => "a number".to_owned(),
            Node::Bytes(_) => "bytes".to_owned(),
            Node::Text(_) => "text".to_owned(),
            Node::List(_) | Node::Tuple(_) => "a list".to_owned(),
            Node::Set(_) => "a set".to_owned(),
            Node::Dict(_) => "a dict".to_owned(),
            Node::Global(path) => format!("`{path}`"),
            Node::Called { .. } => {
                format!("an object made by `{}`", self.class().unwrap_or("something that is no class"))
            }
            Node::Persistent(_) => "a storage".to_owned(),
        }
    }
}

/// The tensor that `_rebuild_tensor_v2(storage, offset, shape, stride, ...)` makes.
fn rebuilt(arguments: &[Item<'_>]) -> Option<TensorRef> {
    let [storage, offset, shape, stride, ..] = arguments else { return None };
    Some(TensorRef {
        storage: storage_ref(*storage)?,
        offset: offset.size()?,
        shape: shape.shape()?,
        stride: stride.shape()?,
    })
}

/// The storage that `("storage", class, key, location, numel)` refers to.
fn storage_ref(item: Item<'_>) -> Option<StorageRef> {
    let Node::Persistent(id) = item.node() else { return None };
    let parts = item.other(*id).items()?;
    let [kind, class, key, _location, numel] = &parts[..] else { return None };
    if kind.text() != Some("storage") {
        return None;
    }
    let class = class.global()?.strip_prefix("torch.")?;
    let dtype = match class.strip_suffix("Storage")? {
        "Double" => "float64",
        "Float" => "float32",
        "Half" => "float16",
        "BFloat16" => "bfloat16",
        "Long" => "int64",
        "Int" => "int32",
        "Short" => "int16",
        "Char" => "int8",
        "Byte" | "storage.Untyped" => "uint8",
        "Bool" => "bool",
        "ComplexFloat" => "complex64",
        _ => return None,
    };
    Some(StorageRef { key: key.text()?.to_owned(), dtype: dtype.parse().ok()?, numel: numel.size()? })
}
