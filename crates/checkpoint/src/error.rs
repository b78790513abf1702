//! What can go wrong with a checkpoint, in words a user can act on.

use std::{
    io,
    path::{Path, PathBuf},
};

use deepspeed_core::DType;

/// A result of this crate.
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The tag cannot be the name of a folder below the checkpoint directory.
    #[error("`{tag}` cannot be a checkpoint tag: {reason}")]
    Tag {
        /// The tag as given.
        tag: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// What was tried: `write`, `sync`, ...
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no checkpoint of this tag.
    #[error("there is no checkpoint `{tag}` in {}; {}", dir.display(), listed(complete))]
    NotFound {
        /// The checkpoint directory.
        dir: PathBuf,
        /// The tag asked for, or named by `latest`.
        tag: String,
        /// Tags of complete checkpoints, newest first.
        complete: Vec<String>,
    },
    /// The checkpoint is there but cannot be trusted.
    #[error("checkpoint `{tag}` in {} is damaged: {file}: {problem}; {}", dir.display(), listed(complete))]
    Damaged {
        /// The checkpoint directory.
        dir: PathBuf,
        /// The checkpoint's tag.
        tag: String,
        /// The file inside the checkpoint.
        file: String,
        /// What is wrong with it.
        problem: String,
        /// Tags of other complete checkpoints, newest first.
        complete: Vec<String>,
    },
    /// The text in `latest` names no checkpoint.
    #[error("{} is damaged: {problem}; {}; write the tag to resume from into it, or pass the tag", path.display(), listed(complete))]
    Latest {
        /// The file `latest`.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// Tags of complete checkpoints, newest first.
        complete: Vec<String>,
    },
    /// Nothing says which checkpoint of a folder is meant.
    #[error("{} has no file `latest` to say which checkpoint is meant; {}; name one by its tag", dir.display(), listed(complete))]
    NoLatest {
        /// The checkpoint directory.
        dir: PathBuf,
        /// Tags of complete checkpoints, newest first.
        complete: Vec<String>,
    },
    /// A result would overwrite what is there.
    #[error("{} already exists; remove it, choose another place, or ask for it to be overwritten (--overwrite)", path.display())]
    Exists {
        /// What is in the way.
        path: PathBuf,
    },
    /// A model or checkpoint cannot be written in the format asked for.
    #[error("cannot write {what}: {problem}")]
    Unwritable {
        /// What was to be written.
        what: String,
        /// Why it cannot be.
        problem: String,
    },
    /// The folder holds a checkpoint of the original DeepSpeed.
    #[error(
        "{} is a checkpoint of the original DeepSpeed (it holds {example}), and this reads only its own format: open it \
         with `open_any`",
        folder.display()
    )]
    Foreign {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// One of the files that gave it away.
        example: String,
    },
    /// The checkpoint is whole, and of a kind that cannot be read.
    #[error("checkpoint {} cannot be read: {reason}", folder.display())]
    Unsupported {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// A later version of this software wrote the checkpoint.
    #[error(
        "{} has format version {found}, and this version reads up to {supported}: update deepspeed to read it",
        manifest.display()
    )]
    Version {
        /// The manifest.
        manifest: PathBuf,
        /// The version it states.
        found: u64,
        /// The newest version that can be read.
        supported: u64,
    },
    /// The folder that a new checkpoint would replace holds other things.
    #[error(
        "cannot replace {}: it holds `{entry}`, which is not part of a checkpoint of this format; move it away or choose \
         another tag",
        folder.display()
    )]
    Occupied {
        /// The folder.
        folder: PathBuf,
        /// What it holds.
        entry: String,
    },
    /// What the ranks wrote does not add up to a checkpoint.
    #[error("the ranks did not write a whole checkpoint: {problem}")]
    Coverage {
        /// What is missing, or there twice.
        problem: String,
    },
    /// A slice, tensor or blob that cannot be stored.
    #[error("cannot store {what}: {problem}")]
    Source {
        /// Which one.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Something that this checkpoint does not hold was asked of it.
    #[error("checkpoint {} has no {what}", folder.display())]
    Missing {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// What was asked for.
        what: String,
    },
    /// The destination of a read has another size than the range.
    #[error("`{kind}` of parameter `{name}`: {len} elements asked for, the destination has {dst}")]
    Length {
        /// The parameter.
        name: String,
        /// The kind.
        kind: String,
        /// Elements in the range.
        len: usize,
        /// Elements of the destination.
        dst: usize,
    },
    /// The destination of a read has another dtype than what is stored.
    #[error("`{kind}` of parameter `{name}` is stored as {stored}, the destination is {dst}")]
    DType {
        /// The parameter.
        name: String,
        /// The kind.
        kind: String,
        /// The dtype in the file.
        stored: DType,
        /// The dtype of the destination.
        dst: DType,
    },
    /// There are checkpoints, and none of them is complete.
    #[error(
        "no checkpoint in {} is complete: {problem}; move what is there away to start from the beginning, or pass the tag \
         of another folder",
        dir.display()
    )]
    NoneComplete {
        /// The checkpoint directory.
        dir: PathBuf,
        /// What is wrong with one of them.
        problem: String,
    },
    /// The system refuses the memory of a snapshot.
    #[error(
        "no memory for a copy of {bytes} bytes, which a save behind training needs: {source}; set checkpoint.async to false \
         to save without one"
    )]
    Memory {
        /// The bytes.
        bytes: usize,
        /// What the system said.
        source: io::Error,
    },
    /// Another rank could not do its part of a save behind training.
    #[error("the checkpoint was not completed because of an error on another rank, which reports it")]
    GivenUp,
    /// The bytes another rank sent are not a record.
    #[error("the record of a rank's files cannot be read: {0}")]
    Record(#[source] serde_json::Error),
}

impl CheckpointError {
    /// Wraps what the system said about `path`; for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => {
            "; the disk is full: free space or save elsewhere (what was saved before is untouched)"
        }
        io::ErrorKind::QuotaExceeded => {
            "; the quota is used up: free space or save elsewhere (what was saved before is untouched)"
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "; the file system is read-only: save elsewhere or mount it writable"
        }
        io::ErrorKind::PermissionDenied => "; check the owner and mode of the folder",
        io::ErrorKind::NotADirectory => "; a part of this path is a file",
        _ => "",
    }
}

fn listed(complete: &[String]) -> String {
    const SHOWN: usize = 8;
    match complete {
        [] => "no complete checkpoint is there".to_owned(),
        tags if tags.len() <= SHOWN => format!("complete ones there: {}", tags.join(", ")),
        tags => {
            format!("complete ones there: {} and {} older ones", tags[..SHOWN].join(", "), tags.len() - SHOWN)
        }
    }
}
