//! Errors about the files of one checkpoint.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{CheckpointError, latest};

/// Knows which checkpoint is being read, for the text of errors.
#[derive(Clone, Debug)]
pub(crate) struct Damage(Arc<Place>);

#[derive(Debug)]
struct Place {
    dir: PathBuf,
    tag: String,
    folder: PathBuf,
}

impl Damage {
    /// For the checkpoint `tag` of `dir`.
    pub(crate) fn new(dir: &Path, tag: &str) -> Self {
        let folder = dir.join(tag);
        Self(Arc::new(Place { dir: dir.to_owned(), tag: tag.to_owned(), folder }))
    }

    /// The checkpoint's folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.0.folder
    }

    /// Its tag.
    pub(crate) fn tag(&self) -> &str {
        &self.0.tag
    }

    /// `file` has this `problem`.
    pub(crate) fn of(&self, file: &str, problem: String) -> CheckpointError {
        CheckpointError::Damaged {
            dir: self.0.dir.clone(),
            tag: self.0.tag.clone(),
            file: file.to_owned(),
            problem,
            complete: latest::complete_names(&self.0.dir, &self.0.tag),
        }
    }

    /// The checkpoint is whole, and of a kind that cannot be read.
    pub(crate) fn unsupported(&self, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Unsupported { folder: self.0.folder.clone(), reason: reason.into() }
    }

    /// `what` was asked for and is not there.
    pub(crate) fn missing(&self, what: String) -> CheckpointError {
        CheckpointError::Missing { folder: self.0.folder.clone(), what }
    }
}
