//! Opening a checkpoint whatever wrote it.

use std::path::Path;

use crate::{
    Checkpoint, CheckpointError, OriginalCheckpoint, Result, Source, latest, original, validate_tag,
};

/// The file in which the original names its latest universal checkpoint.
const LATEST_UNIVERSAL: &str = "latest_universal";

/// Opens the checkpoint `tag` of `dir`, or, without a tag, the one that `latest` names; `None` if there is no `latest`.
/// A folder with a `manifest.json` is of our format, one with the files of the original is the original's.
///
/// # Errors
/// As [`Checkpoint::open`] and [`OriginalCheckpoint::open`].
pub fn open_any(dir: &Path, tag: Option<&str>) -> Result<Option<Box<dyn Source>>> {
    let named = match tag {
        Some(tag) => Some(tag.to_owned()),
        None => match latest::read_latest(dir)? {
            Some(tag) => Some(tag),
            None => latest::read_tag(dir, LATEST_UNIVERSAL)?,
        },
    };
    let Some(tag) = named else { return Ok(None) };
    validate_tag(&tag)?;
    let folder = dir.join(&tag);
    if !folder.join("manifest.json").exists() && original::is_original(&folder) {
        return Ok(Some(Box::new(OriginalCheckpoint::open(dir, &tag)?)));
    }
    let checkpoint = Checkpoint::open(dir, Some(&tag))?;
    Ok(checkpoint.map(|checkpoint| Box::new(checkpoint) as Box<dyn Source>))
}

/// As [`open_any`] for the original's universal format alone: without a tag, the one that `latest_universal` names.
///
/// # Errors
/// [`CheckpointError::Unsupported`] for a checkpoint of another format; as [`open_any`].
pub fn open_universal(dir: &Path, tag: Option<&str>) -> Result<Option<Box<dyn Source>>> {
    let tag = match tag {
        Some(tag) => Some(tag.to_owned()),
        None => match latest::read_tag(dir, LATEST_UNIVERSAL)? {
            Some(tag) => Some(tag),
            None => latest::read_latest(dir)?,
        },
    };
    let Some(tag) = tag else { return Ok(None) };
    validate_tag(&tag)?;
    if original::is_original(&dir.join(&tag)) {
        let checkpoint = OriginalCheckpoint::open(dir, &tag)?;
        if checkpoint.is_universal() {
            return Ok(Some(Box::new(checkpoint)));
        }
    }
    Err(CheckpointError::Unsupported {
        folder: dir.join(&tag),
        reason: "checkpoint.load_universal is set, and it is no universal checkpoint; take the setting away (every \
                 checkpoint is loaded at any number of ranks without it), or name the universal one"
            .to_owned(),
    })
}
