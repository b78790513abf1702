//! Files of `torch.save`: a zip archive of stored entries, one of them a pickle, the others the memory of tensors.
//!
//! ```text
//! NAME/data.pkl       the pickle: everything but the elements
//! NAME/byteorder      `little`
//! NAME/data/0, ...    storages, each at a multiple of 64 bytes
//! NAME/version
//! ```
//!
//! An entry is never loaded whole: a tensor is a place in the file, and its elements are read when they are asked for.

mod archive;
mod file;
mod out;

pub(crate) use file::{TorchFile, View};
pub(crate) use out::{Storage, TorchWriter, storage_class};
