//! What every checkpoint offers to those who read one, whatever software wrote it and in whatever format.
//!
//! Loading, exporting, comparing and converting are written against [`Source`], so that each works on every format.

use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
};

use deepspeed_core::{DType, Rank, Span, SpanMut};
use serde_json::Value;

use crate::{Checkpoint, ElementType, ParamRecord, Result};

/// A whole tensor that is not a parameter, such as a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorFacts {
    /// Its name in the model.
    pub name: String,
    /// The type of its elements.
    pub dtype: ElementType,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// A pickle that a face may execute, if its user trusts whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedFile {
    /// The file.
    pub path: PathBuf,
    /// The keys of the dict in it that are the client's.
    pub keys: Vec<String>,
}

/// A checkpoint of any format, opened for reading. Threads may share one.
pub trait Source: fmt::Debug + Send + Sync {
    /// The format in words, as `deepspeed-checkpoint 1`.
    fn format(&self) -> String;

    /// The tag.
    fn tag(&self) -> &str;

    /// The checkpoint's folder.
    fn folder(&self) -> &Path;

    /// Number of ranks that wrote it.
    fn world(&self) -> usize;

    /// The ZeRO stage it was written at, where that is known.
    fn stage(&self) -> Option<u8>;

    /// The parameters in registration order, frozen ones included, each once.
    fn params(&self) -> &[ParamRecord];

    /// The parameter of this name.
    fn param(&self, name: &str) -> Option<&ParamRecord>;

    /// Other names of parameters and whole tensors: (other name, name under which it is stored).
    fn tied(&self) -> &[(String, String)];

    /// What is stored of a parameter, in alphabetic order.
    fn kinds(&self, name: &str) -> Vec<&str>;

    /// The dtype in which `kind` of a parameter is stored; `None` if it is not.
    fn dtype(&self, name: &str, kind: &str) -> Option<DType>;

    /// Reads the elements `range` of `kind` of a parameter. An empty range is always fine.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`](crate::CheckpointError::Missing), [`Length`](crate::CheckpointError::Length),
    /// [`DType`](crate::CheckpointError::DType) if `dst` is not made for it,
    /// [`Damaged`](crate::CheckpointError::Damaged), [`Io`](crate::CheckpointError::Io).
    fn read(&self, name: &str, kind: &str, range: Range<usize>, dst: SpanMut<'_>) -> Result<()>;

    /// As [`Source::read`], for a caller that converts: hands out the elements in pieces, in order, in the dtype in which
    /// they are stored, each with the index of its first element inside the parameter.
    ///
    /// # Errors
    /// As [`Source::read`]; pieces before the one in error have been handed out.
    fn visit(
        &self,
        name: &str,
        kind: &str,
        range: Range<usize>,
        visit: &mut dyn FnMut(usize, Span<'_>),
    ) -> Result<()>;

    /// The whole tensors that are not parameters, such as buffers.
    fn tensors(&self) -> Vec<TensorFacts>;

    /// The bytes of a whole tensor: row by row, little endian.
    ///
    /// # Errors
    /// As [`Source::read`].
    fn tensor(&self, name: &str) -> Result<Vec<u8>>;

    /// What the engine continues from: counters, loss scaler, as the engine itself would have saved them.
    fn state(&self) -> &Value;

    /// The bytes that `rank` stored under `name`, for the face that wrote them; `None` if it stored none.
    ///
    /// # Errors
    /// As [`Source::read`].
    fn blob(&self, rank: Rank, name: &str) -> Result<Option<Vec<u8>>>;

    /// Tells which parameters the reader trains, in registration order, each with its parameter group: what a format
    /// without names needs to know whose state is whose.
    ///
    /// # Errors
    /// As [`Source::read`].
    fn resolve(&mut self, _trained: &[(&str, usize)]) -> Result<()> {
        Ok(())
    }

    /// Where the client state of `rank` lies as a pickle, for a face that may execute it; the blob `client_state` holds
    /// what of it is plain. None in a format that keeps client state apart.
    fn trusted_file(&self, _rank: Rank) -> Option<TrustedFile> {
        None
    }

    /// The share of one of `world` ranks in checking every byte of every file against what is known of it. Of a checkpoint
    /// that is spread over hosts, the files that are here.
    ///
    /// # Errors
    /// As [`Source::read`].
    fn verify_share(&self, rank: Rank, world: usize) -> Result<()>;

    /// Says that all shares have been found right, by whoever: what is read need not be checked again.
    fn trust(&self) {}
}

impl Source for Checkpoint {
    fn format(&self) -> String {
        format!("{} {}", self.manifest().format, self.manifest().format_version)
    }

    fn tag(&self) -> &str {
        self.tag()
    }

    fn folder(&self) -> &Path {
        self.folder()
    }

    fn world(&self) -> usize {
        self.manifest().world
    }

    fn stage(&self) -> Option<u8> {
        Some(self.manifest().stage)
    }

    fn params(&self) -> &[ParamRecord] {
        &self.manifest().params
    }

    fn param(&self, name: &str) -> Option<&ParamRecord> {
        self.param(name)
    }

    fn tied(&self) -> &[(String, String)] {
        &self.manifest().tied
    }

    fn kinds(&self, name: &str) -> Vec<&str> {
        self.kinds(name)
    }

    fn dtype(&self, name: &str, kind: &str) -> Option<DType> {
        self.dtype(name, kind)
    }

    fn read(&self, name: &str, kind: &str, range: Range<usize>, dst: SpanMut<'_>) -> Result<()> {
        self.read(name, kind, range, dst)
    }

    fn visit(
        &self,
        name: &str,
        kind: &str,
        range: Range<usize>,
        visit: &mut dyn FnMut(usize, Span<'_>),
    ) -> Result<()> {
        self.visit(name, kind, range, visit)
    }

    fn tensors(&self) -> Vec<TensorFacts> {
        let facts = |it: &crate::TensorRecord| TensorFacts {
            name: it.name.clone(),
            dtype: it.dtype,
            shape: it.shape.clone(),
        };
        self.tensors().map(facts).collect()
    }

    fn tensor(&self, name: &str) -> Result<Vec<u8>> {
        self.tensor(name)
    }

    fn state(&self) -> &Value {
        self.state()
    }

    fn blob(&self, rank: Rank, name: &str) -> Result<Option<Vec<u8>>> {
        self.blob(rank, name)
    }

    fn verify_share(&self, rank: Rank, world: usize) -> Result<()> {
        self.verify_share(rank, world)
    }

    fn trust(&self) {
        self.trust();
    }
}
