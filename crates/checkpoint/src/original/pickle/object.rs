//! Values to be written as a pickle, and the plain values of one that was read.

use super::{Item, Node, TensorRef};

/// A value for [`super::write`].
#[derive(Clone, Debug)]
pub(crate) enum Object {
    None,
    Bool(bool),
    Int(i64),
    /// Two's complement, little endian.
    BigInt(Vec<u8>),
    Float(f64),
    Bytes(Vec<u8>),
    Text(String),
    List(Vec<Object>),
    Tuple(Vec<Object>),
    Set(Vec<Object>),
    Dict(Vec<(Object, Object)>),
    OrderedDict(Vec<(Object, Object)>),
    Tensor(StoredTensor),
    /// `module`, `name`.
    Global(&'static str, &'static str),
    /// `module.name(*arguments)`.
    Call(&'static str, &'static str, Vec<Object>),
    /// An object of `module.name` with these attributes, whose `__init__` is not called.
    New(&'static str, &'static str, Vec<(Object, Object)>),
}

/// A dense tensor: a view of a storage of the file.
#[derive(Clone, Debug)]
pub(crate) struct StoredTensor {
    /// Number of the storage: its entry is `data/N`.
    pub(crate) storage: usize,
    /// torch's class of the storage, as `FloatStorage`.
    pub(crate) class: &'static str,
    /// Elements of the whole storage.
    pub(crate) storage_numel: usize,
    /// First element.
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
}

impl From<&str> for Object {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<i64> for Object {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<usize> for Object {
    fn from(value: usize) -> Self {
        Self::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Object {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<bool> for Object {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl Object {
    /// A dict with keys of text.
    pub(crate) fn dict<'a>(entries: impl IntoIterator<Item = (&'a str, Object)>) -> Self {
        Self::Dict(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }

    /// A `torch.Size`.
    pub(crate) fn size(shape: &[usize]) -> Self {
        let sizes = shape.iter().map(|dim| Object::from(*dim)).collect();
        Self::Call("torch", "Size", vec![Self::Tuple(sizes)])
    }
}

/// Values nest at most so deep.
const MAX_DEPTH: usize = 200;
/// One byte of a pickle makes at most so many values; only sharing makes more than one, and honest sharing is rare.
const VALUES_PER_BYTE: usize = 16;

/// `item` as an [`Object`] of plain values only; tensors are made by `tensor`.
///
/// # Errors
/// The name of the class that is not plain, or that the value is too deep or too large.
pub(crate) fn plain(
    item: Item<'_>,
    tensor: &mut dyn FnMut(&TensorRef) -> Result<Object, String>,
) -> Result<Object, String> {
    let mut left = item.pickle.bytes.saturating_mul(VALUES_PER_BYTE);
    convert(item, tensor, 0, &mut left)
}

fn convert(
    item: Item<'_>,
    tensor: &mut dyn FnMut(&TensorRef) -> Result<Object, String>,
    depth: usize,
    left: &mut usize,
) -> Result<Object, String> {
    if depth > MAX_DEPTH {
        return Err(format!("values nest more than {MAX_DEPTH} deep"));
    }
    *left = left.checked_sub(1).ok_or("far more values than bytes")?;
    let mut next = |id| convert(Item::new(item.pickle, id), tensor, depth + 1, left);
    let mut all = |ids: &[u32]| ids.iter().map(|id| next(*id)).collect::<Result<Vec<_>, _>>();
    Ok(match item.node() {
        Node::None => Object::None,
        Node::Bool(value) => Object::Bool(*value),
        Node::Int(value) => Object::Int(*value),
        Node::BigInt(bytes) => Object::BigInt(bytes.clone()),
        Node::Float(value) => Object::Float(*value),
        Node::Bytes(bytes) => Object::Bytes(bytes.clone()),
        Node::Text(text) => Object::Text(text.clone()),
        Node::List(items) => Object::List(all(items)?),
        Node::Tuple(items) => Object::Tuple(all(items)?),
        Node::Set(items) => Object::Set(all(items)?),
        Node::Dict(pairs) => {
            let pair = |(key, value): &(u32, u32)| Ok::<_, String>((next(*key)?, next(*value)?));
            Object::Dict(pairs.iter().map(pair).collect::<Result<_, _>>()?)
        }
        Node::Called { .. } => return called(item, tensor, depth, left),
        Node::Global(path) => match torch_constant(path) {
            Some(name) => Object::Global("torch", name),
            None => return Err(refused(path)),
        },
        Node::Persistent(_) => return Err("a storage that belongs to no tensor".to_owned()),
    })
}

fn called(
    item: Item<'_>,
    tensor: &mut dyn FnMut(&TensorRef) -> Result<Object, String>,
    depth: usize,
    left: &mut usize,
) -> Result<Object, String> {
    if let Some(found) = item.tensor() {
        return tensor(&found);
    }
    let class = item.class().ok_or("a call of something that is no class")?;
    let arguments = item.arguments().unwrap_or_default();
    let mut argument = |index: usize| match arguments.get(index) {
        Some(item) => convert(*item, tensor, depth + 1, left),
        None => Err(format!("`{class}` without an argument")),
    };
    match class {
        "torch.Size" => {
            let shape = item.shape().ok_or("a torch.Size of something else than sizes")?;
            Ok(Object::size(&shape))
        }
        "torch.device" => argument(0),
        "builtins.set" | "builtins.frozenset" | "__builtin__.set" | "__builtin__.frozenset" => {
            match argument(0)? {
                Object::List(items) => Ok(Object::Set(items)),
                _ => Err("a set of something else than a list".to_owned()),
            }
        }
        "collections.OrderedDict" => match argument(0)? {
            // Protocol 2 gives the entries as pairs in a list.
            Object::List(items) => {
                let pair = |item| match item {
                    Object::Tuple(pair) | Object::List(pair) => <[Object; 2]>::try_from(pair).ok(),
                    _ => None,
                };
                let pairs = items.into_iter().map(|item| pair(item).map(|[key, value]| (key, value)));
                let pairs = pairs.collect::<Option<Vec<_>>>();
                pairs
                    .map(Object::OrderedDict)
                    .ok_or_else(|| "an OrderedDict of something else than pairs".to_owned())
            }
            _ => Err("an OrderedDict of something else than pairs".to_owned()),
        },
        "deepspeed.runtime.zero.config.ZeroStageEnum" => argument(0),
        // (text, "latin1"): how protocol 2 writes bytes.
        "_codecs.encode" => match (arguments.first().and_then(|item| item.text()), arguments.get(1)) {
            (Some(text), Some(encoding)) if encoding.text() == Some("latin1") => {
                let bytes = text.chars().map(|c| u8::try_from(u32::from(c)));
                let bytes = bytes.collect::<Result<Vec<u8>, _>>();
                bytes.map(Object::Bytes).map_err(|_| "bytes that are not latin1".to_owned())
            }
            _ => Err(refused(class)),
        },
        // How protocol 2 writes bytes of length 0.
        "__builtin__.bytes" | "builtins.bytes" if arguments.is_empty() => Ok(Object::Bytes(Vec::new())),
        "numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar" => {
            numpy_scalar(&arguments).ok_or_else(|| refused(class))
        }
        _ => Err(refused(class)),
    }
}

fn refused(path: &str) -> String {
    format!(
        "it holds `{path}`, and classes other than plain values and tensors are not made from a checkpoint"
    )
}

/// Names of torch that stand for themselves.
fn torch_constant(path: &str) -> Option<&'static str> {
    const KNOWN: [&str; 13] = [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "complex64",
        "complex128",
        "strided",
    ];
    let name = path.strip_prefix("torch.")?;
    KNOWN.iter().find(|known| **known == name).copied()
}

/// The number in `scalar(dtype, bytes)`.
fn numpy_scalar(arguments: &[Item<'_>]) -> Option<Object> {
    let [dtype, bytes] = arguments else { return None };
    if dtype.class()? != "numpy.dtype" {
        return None;
    }
    let dtype = *dtype.arguments()?.first()?;
    let mut none = |_: &TensorRef| Err(String::new());
    let Ok(Object::Bytes(bytes)) = plain(*bytes, &mut none) else { return None };
    match dtype.text()? {
        "f8" => Some(Object::Float(f64::from_le_bytes(bytes.try_into().ok()?))),
        "f4" => Some(Object::Float(f32::from_le_bytes(bytes.try_into().ok()?).into())),
        "i8" => Some(Object::Int(i64::from_le_bytes(bytes.try_into().ok()?))),
        "i4" => Some(Object::Int(i32::from_le_bytes(bytes.try_into().ok()?).into())),
        "b1" => Some(Object::Bool(*bytes.first()? != 0)),
        _ => None,
    }
}
