//! Pickles without Python: what a file says is kept as values and never executed.
//!
//! ```text
//! bytes --parse--> Pickle (nodes that point at each other) --Item--> what the caller looks for
//!                                                          --Object-> bytes: a new pickle of plain values
//! ```
//!
//! A pickle is a program for a small stack machine. Two of its instructions name and call things of Python; here they
//! only leave a note of what would have been called ([`Node::Called`]), for a list of harmless names as well as for any
//! other. What the notes mean is decided by who reads them: [`Item::tensor`], [`Item::int`] and so on know the few that
//! `torch.save` writes, and everything else that is asked for a value says by which name it is refused.

mod item;
mod object;
mod parse;
mod program;

pub(crate) use item::{Item, TensorRef};
pub(crate) use object::{Object, StoredTensor, plain};
pub(crate) use parse::parse;
pub(crate) use program::write;

/// Number of a node within its pickle.
type NodeId = u32;

/// A value of a pickle, or the note of a call.
#[derive(Debug)]
enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// A wider integer: two's complement, little endian.
    BigInt(Vec<u8>),
    Float(f64),
    Bytes(Vec<u8>),
    Text(String),
    List(Vec<NodeId>),
    Tuple(Vec<NodeId>),
    Set(Vec<NodeId>),
    Dict(Vec<(NodeId, NodeId)>),
    /// `module.name`.
    Global(String),
    /// A call of `callable` that was not made; `state`, `items` and `pairs` would have been given to its result.
    Called {
        callable: NodeId,
        args: NodeId,
        state: Option<NodeId>,
        items: Vec<NodeId>,
        pairs: Vec<(NodeId, NodeId)>,
    },
    /// Something that lies outside the pickle: `torch.save` refers to storages so.
    Persistent(NodeId),
}

/// A parsed pickle.
#[derive(Debug)]
pub(crate) struct Pickle {
    nodes: Vec<Node>,
    root: NodeId,
    /// Its size, a measure of how much can honestly be made of it.
    bytes: usize,
}

impl Pickle {
    /// The value that the pickle stands for.
    pub(crate) fn root(&self) -> Item<'_> {
        Item::new(self, self.root)
    }
}
