//! Removing checkpoints that are no longer wanted, so that none is ever seen in part.
//!
//! ```text
//! rename TAG -> .del-TAG-NONCE, sync DIR     from here on it is gone, and nothing that is left of it looks like one
//! remove .del-TAG-NONCE                      a kill here: a leftover, which the next save removes
//! ```

use std::{
    fs, io,
    os::fd::AsFd,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{fs::FlockOperation, io::Errno};

use crate::{
    CheckpointError, CompleteTag, complete_tags,
    disk::{self, Disk},
    latest::read_latest,
    manifest::MANIFEST,
    tag,
};

/// What [`retire`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retired {
    /// The tags that are gone, newest first.
    pub removed: Vec<String>,
    /// What could not be removed, and why. The next save tries again.
    pub problems: Vec<String>,
}

/// Removes complete checkpoints of `dir` until the newest `keep` are left.
///
/// Those that were saved without becoming the latest ("best", say) neither count nor go, nor does the one that `latest`
/// names, one that somebody is reading, or anything that is not a checkpoint of this format.
pub fn retire(disk: &dyn Disk, dir: &Path, keep: usize) -> Retired {
    let mut retired = Retired::default();
    let mut problem = |error: &CheckpointError| retired.problems.push(error.to_string());
    let (tags, latest) = match (complete_tags(dir), read_latest(dir)) {
        (Ok(tags), Ok(latest)) => (tags, latest),
        (Err(error), _) | (_, Err(error)) => {
            problem(&error);
            return retired;
        }
    };
    let in_line = tags.iter().filter(|it| it.save_latest);
    let old = in_line.skip(keep.max(1)).filter(|it| latest.as_ref() != Some(&it.tag));
    let mut gone = Vec::new();
    for CompleteTag { tag, .. } in old {
        let aside = dir.join(tag::removed_name(tag, now_ns()));
        match set_aside(disk, &dir.join(tag), &aside) {
            Ok(true) => gone.push((tag.clone(), aside)),
            Ok(false) => {}
            Err(error) => problem(&error),
        }
    }
    if gone.is_empty() {
        return retired;
    }
    // On the disk before the first file of them goes: a power cut brings them back whole or not at all.
    if let Err(error) = disk.sync_dir(dir).map_err(CheckpointError::io("sync", dir)) {
        problem(&error);
        return retired;
    }
    for (tag, aside) in gone {
        if let Err(error) = disk::remove_tree(disk, &aside).map_err(CheckpointError::io("remove", &aside)) {
            problem(&error);
        }
        retired.removed.push(tag);
    }
    retired
}

/// Takes the checkpoint's name away, unless somebody reads it.
fn set_aside(disk: &dyn Disk, folder: &Path, aside: &Path) -> Result<bool, CheckpointError> {
    let manifest = folder.join(MANIFEST);
    let file = match fs::OpenOptions::new().read(true).write(true).open(&manifest) {
        Ok(file) => file,
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(CheckpointError::io("open", &manifest)(error)),
    };
    match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(false),
        // Without locks nobody can tell; who reads it gets an error and reads another.
        Err(error) if disk::is_unsupported(&error.into()) => {}
        Err(error) => return Err(CheckpointError::io("lock", &manifest)(error.into())),
    }
    disk.rename(folder, aside).map_err(CheckpointError::io("rename", folder))?;
    Ok(true)
}

/// A number that no other removal of the same tag uses.
fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
