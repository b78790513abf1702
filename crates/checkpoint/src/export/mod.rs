//! A model out of a checkpoint: whole tensors in one dtype, in files that the Hugging Face libraries read.
//!
//! ```text
//! checkpoint (any world, stage, format)          OUT/
//!   w[0:5] of rank 0   ─┐                          model-00001-of-00002.safetensors   at most max_shard_bytes
//!   w[5:8] of rank 1   ─┴─ master, else weight ─>  model-00002-of-00002.safetensors
//!   buffers            ───────────────────────>    model.safetensors.index.json       which tensor is where
//! ```
//!
//! Tensors pass through in pieces, so memory does not grow with the model or with the size of its files. The result is
//! whole or absent.

mod file;
mod files;
mod model_file;
mod plan;
mod read;

use std::{
    fs,
    path::{Path, PathBuf},
};

use deepspeed_core::DType;

pub use model_file::ModelFile;
pub use plan::{ExportPlan, ExportTensor};
pub use read::read_tensor;

use crate::{CheckpointError, Progress, Result, Source, output::Output};

/// The size of files unless another is asked for, as in the Hugging Face libraries: 5 GB.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// In what a model is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExportFormat {
    /// `model.safetensors`.
    #[default]
    Safetensors,
    /// `pytorch_model.bin`, as `torch.save` writes it.
    Torch,
}

impl ExportFormat {
    /// The format of a file of this name: safetensors for `.safetensors`, else torch's.
    pub fn of_name(name: &str) -> Self {
        if name.ends_with(".safetensors") { Self::Safetensors } else { Self::Torch }
    }

    /// The two parts of a file's name.
    fn name(self) -> (&'static str, &'static str) {
        match self {
            Self::Safetensors => ("model", "safetensors"),
            Self::Torch => ("pytorch_model", "bin"),
        }
    }
}

/// How a model is written.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    /// In what.
    pub format: ExportFormat,
    /// The dtype of the weights.
    pub dtype: DType,
    /// A file holds no more than this, unless a single tensor does.
    pub max_shard_bytes: u64,
    /// Whether to leave out parameters that were not trained.
    pub exclude_frozen: bool,
    /// Whether to replace the files of an earlier export.
    pub overwrite: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            format: ExportFormat::default(),
            dtype: DType::F32,
            max_shard_bytes: MAX_SHARD_BYTES,
            exclude_frozen: false,
            overwrite: false,
        }
    }
}

/// What an export wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The files, the index last.
    pub files: Vec<PathBuf>,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Parameters whose weights the checkpoint does not have, because they were left out when it was saved.
    pub absent: Vec<String>,
}

/// Writes the model of `source` into the folder `out`, beside what else is there.
///
/// # Errors
/// [`CheckpointError::Exists`] if `out` has weights already and `options` do not say to replace them; what reading says;
/// [`CheckpointError::Unwritable`]; [`CheckpointError::Io`]. After an error `out` is as it was.
pub fn export(
    source: &dyn Source,
    out: &Path,
    options: ExportOptions,
    progress: &dyn Progress,
) -> Result<Exported> {
    let plan = ExportPlan::new(source, options.dtype, options.exclude_frozen);
    let stale = earlier_weights(out)?;
    if let Some(path) = stale.first()
        && !options.overwrite
    {
        return Err(CheckpointError::Exists { path: path.clone() });
    }
    let shards = plan.shards(options.max_shard_bytes);
    let mut output = Output::begin(out)?;
    let names = files::write(&mut output, source, &plan, &shards, options.format, progress)?;
    output.commit(&stale)?;
    Ok(Exported {
        files: names.iter().map(|name| out.join(name)).collect(),
        tensors: plan.tensors.len(),
        bytes: plan.bytes(),
        absent: plan.absent,
    })
}

/// Weights that a reader of `out` would take for the model's.
fn earlier_weights(out: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(CheckpointError::io("list", out)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(CheckpointError::io("list", out))?;
        if entry.file_name().to_str().is_some_and(is_weights_name) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Whether the Hugging Face libraries would load a file of this name: `model.safetensors`, its parts and its index, and
/// the same for `pytorch_model.bin`.
fn is_weights_name(name: &str) -> bool {
    let of = |stem: &str, suffix: &str| {
        name.strip_prefix(stem).is_some_and(|rest| match rest.strip_suffix(suffix) {
            Some("") => true,
            Some(part) => part.starts_with('-') && part.contains("-of-"),
            None => rest == format!("{suffix}.index.json"),
        })
    };
    of("model", ".safetensors") || of("pytorch_model", ".bin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_known_by_their_names() {
        for name in [
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model.bin.index.json",
        ] {
            assert!(is_weights_name(name), "{name}");
        }
        for name in ["config.json", "model.py", "modeling.safetensors", "tokenizer.json", "model-card.md"] {
            assert!(!is_weights_name(name), "{name}");
        }
    }
}
