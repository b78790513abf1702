//! What is in which file: the entries of the manifest, and what each rank reports to the rank that writes it.

use deepspeed_core::ParamSpec;
use serde::{Deserialize, Serialize};

use crate::{CheckpointError, Checksum, ElementType, Result};

/// A parameter of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamRecord {
    /// Its name in the model.
    pub name: String,
    /// Its whole shape, whatever a rank holds of it.
    pub shape: Vec<usize>,
    /// The dtype of its weights.
    pub dtype: ElementType,
    /// The optimizer's parameter group; none for a frozen parameter.
    pub group: Option<usize>,
}

impl From<&ParamSpec> for ParamRecord {
    fn from(spec: &ParamSpec) -> Self {
        Self {
            name: spec.name.clone(),
            shape: spec.shape.clone(),
            dtype: spec.dtype.into(),
            group: Some(spec.group),
        }
    }
}

/// A run of elements of one parameter inside a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceRecord {
    /// The parameter's name.
    pub param: String,
    /// What of it: `weight`, `master`, `exp_avg`, ...
    pub kind: String,
    /// First element inside the parameter, counted row by row.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
    /// The type of the elements.
    pub dtype: ElementType,
    /// First byte inside the file.
    pub offset: u64,
    /// The tensor's name in the safetensors header.
    pub key: String,
}

/// A whole tensor that is not a parameter, such as a buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Its name in the model, and in the safetensors header.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The type of its elements.
    pub dtype: ElementType,
    /// First byte inside the file.
    pub offset: u64,
}

/// Bytes that only their writer understands; a tensor of type `U8` in the safetensors header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRecord {
    /// Its name, one of a kind on its rank.
    pub name: String,
    /// Number of bytes.
    pub bytes: u64,
    /// First byte inside the file.
    pub offset: u64,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name inside the checkpoint's folder.
    pub name: String,
    /// The rank that wrote it.
    pub rank: usize,
    /// Its size in bytes.
    pub bytes: u64,
    /// A checksum for each chunk of `chunk_bytes` (see [`crate::Manifest`]).
    pub checksums: Vec<Checksum>,
    /// The slices it holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slices: Vec<SliceRecord>,
    /// The whole tensors it holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<TensorRecord>,
    /// The blobs it holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blobs: Vec<BlobRecord>,
}

/// What one rank has written and synced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRecord {
    /// The rank.
    pub rank: usize,
    /// Its files.
    pub files: Vec<FileRecord>,
}

impl RankRecord {
    /// The record as bytes, to be sent to the rank that commits.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("invariant: records serialise to JSON")
    }

    /// Reads what [`RankRecord::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`CheckpointError::Record`] for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(CheckpointError::Record)
    }
}

/// Number of elements of a shape, unless it is larger than any file.
pub(crate) fn numel(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |total, dim| total.checked_mul(*dim))
}
