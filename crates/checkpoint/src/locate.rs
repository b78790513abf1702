//! Which checkpoint a path means: a folder of checkpoints and a tag, or a checkpoint's own folder.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    CheckpointError, Result, Source,
    latest::{complete_names, original_file},
    manifest::MANIFEST,
    open_any,
    tag::LATEST,
};

/// Where a checkpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The folder of checkpoints.
    pub dir: PathBuf,
    /// The tag; without one, the one that `latest` names.
    pub tag: Option<String>,
}

impl Location {
    /// What `path` and `tag` mean: `DIR` with or without a tag, or `DIR/TAG`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if `path` cannot be read.
    pub fn find(path: &Path, tag: Option<&str>) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(CheckpointError::io("open", path))?;
        let tag = tag.map(str::to_owned);
        if tag.is_some() || !metadata.is_dir() || !is_checkpoint(path) {
            return Ok(Self { dir: path.to_owned(), tag });
        }
        // `.` and `DIR/TAG/..` have no name of their own.
        let folder = fs::canonicalize(path).map_err(CheckpointError::io("open", path))?;
        match (folder.parent(), folder.file_name().and_then(|name| name.to_str())) {
            (Some(dir), Some(name)) => Ok(Self { dir: dir.to_owned(), tag: Some(name.to_owned()) }),
            _ => Ok(Self { dir: path.to_owned(), tag: None }),
        }
    }

    /// Opens the checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::NoLatest`] if nothing says which one is meant; what opening it says.
    pub fn open(&self) -> Result<Box<dyn Source>> {
        open_any(&self.dir, self.tag.as_deref())?.ok_or_else(|| CheckpointError::NoLatest {
            dir: self.dir.clone(),
            complete: complete_names(&self.dir, ""),
        })
    }
}

/// Whether `path` is the folder of one checkpoint and not one of checkpoints.
fn is_checkpoint(path: &Path) -> bool {
    !path.join(LATEST).exists() && (path.join(MANIFEST).exists() || original_file(path).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_folder_of_checkpoints_or_a_checkpoint() {
        let temp = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(temp.path()).unwrap();
        let folder = dir.join("step1");
        fs::create_dir(&folder).unwrap();
        let find = |path: &Path, tag| Location::find(path, tag).unwrap();
        assert_eq!(find(&dir, None), Location { dir: dir.clone(), tag: None });
        assert_eq!(find(&folder, None), Location { dir: folder.clone(), tag: None });
        fs::write(folder.join(MANIFEST), "").unwrap();
        let expected = Location { dir: dir.clone(), tag: Some("step1".to_owned()) };
        assert_eq!(find(&folder, None), expected);
        assert_eq!(find(&folder.join("../step1"), None), expected);
        assert_eq!(find(&dir, Some("step1")), expected);
        assert!(Location::find(&dir.join("absent"), None).is_err());
    }
}
