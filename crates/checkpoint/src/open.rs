//! Opening a checkpoint whatever wrote it.

use std::path::Path;

use crate::{Checkpoint, Result, Source};

/// Opens the checkpoint `tag` of `dir`, or, without a tag, the one that `latest` names; `None` if there is no `latest`.
/// The format is known by what lies in the folder.
///
/// # Errors
/// As [`Checkpoint::open`], whatever the format.
pub fn open_any(dir: &Path, tag: Option<&str>) -> Result<Option<Box<dyn Source>>> {
    let checkpoint = Checkpoint::open(dir, tag)?;
    Ok(checkpoint.map(|checkpoint| Box::new(checkpoint) as Box<dyn Source>))
}
