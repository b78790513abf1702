//! What rank 0 does in a save: makes the temporary folder, and turns it into a checkpoint all at once.
//!
//! ```text
//! begin    lock .tmp-TAG-N.lock, make .tmp-TAG-N/          a kill here: nothing but a leftover
//! ranks    write and sync their files into it
//! commit   write and sync the manifest, sync the folder
//!          rename .tmp-TAG-N -> TAG (or exchange), sync DIR   <- the checkpoint exists from here on
//!          write .tmp-TAG-N.latest, rename it -> latest       <- it is the one to resume from
//!          remove what was replaced, then the lock
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    CheckpointError, Manifest, RankRecord, Result,
    checksum::CHUNK_BYTES,
    disk::{self, Disk, RealDisk},
    latest::manifest_checksum_text,
    lock::{self, Lock, Owner},
    manifest::{CommitParts, HostPart, MANIFEST, MANIFEST_CHECKSUM, is_file_name},
    tag::{self, LATEST},
    validate_tag,
};

/// A temporary folder without a lock file is removed only when it has not changed for this long.
const UNLOCKED_LEFTOVER_AGE: Duration = Duration::from_secs(3600);

/// The folder into which the ranks write the checkpoint `tag` of `dir`. The same on every rank for the same nonce.
pub fn draft_folder(dir: &Path, tag: &str, nonce: u64) -> PathBuf {
    dir.join(tag::draft_name(tag, nonce))
}

/// Where files of `tag` are put that a load has brought from other hosts, beside the folder of the checkpoint itself. The
/// next save removes it.
pub fn peers_folder(dir: &Path, tag: &str) -> PathBuf {
    dir.join(tag::removed_name(tag, 0))
}

/// A checkpoint that is being written. Dropped without [`Draft::commit`], it vanishes.
pub struct Draft {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    tag: String,
    nonce: u64,
    folder: PathBuf,
    warnings: Vec<CheckpointError>,
    finished: bool,
    host: Option<HostPart>,
    _lock: Lock,
}

impl Draft {
    /// Makes the folder for a new checkpoint `tag` in `dir`, and `dir` itself if need be. Removes what dead jobs left
    /// behind. `nonce` is any number that no other save into `dir` is using, such as a random one.
    ///
    /// # Errors
    /// [`CheckpointError::Tag`]; [`CheckpointError::Occupied`] if `dir/tag` holds other things than a checkpoint;
    /// [`CheckpointError::Io`].
    pub fn begin(dir: &Path, tag: &str, nonce: u64) -> Result<Self> {
        Self::begin_on(Arc::new(RealDisk), dir, tag, nonce)
    }

    /// As [`Draft::begin`], on another disk.
    ///
    /// # Errors
    /// As [`Draft::begin`].
    pub fn begin_on(disk: Arc<dyn Disk>, dir: &Path, tag: &str, nonce: u64) -> Result<Self> {
        validate_tag(tag)?;
        create_dirs(&*disk, dir)?;
        check_replaceable(&dir.join(tag))?;
        let warnings = remove_leftovers(&*disk, dir);
        let folder = draft_folder(dir, tag, nonce);
        let lock_path = lock::lock_path(&folder);
        let lock = lock::acquire(&lock_path).map_err(CheckpointError::io("lock", &lock_path))?;
        let (dir, tag) = (dir.to_owned(), tag.to_owned());
        let draft =
            Self { disk, dir, tag, nonce, folder, warnings, finished: false, host: None, _lock: lock };
        draft.disk.create_dir(&draft.folder).map_err(CheckpointError::io("create", &draft.folder))?;
        Ok(draft)
    }

    /// Where the ranks write.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The checkpoint directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The checkpoint's folder, once it is committed.
    pub fn target(&self) -> PathBuf {
        self.dir.join(&self.tag)
    }

    /// Says that only this part of the files will be in the folder, because other hosts keep theirs.
    pub fn keep_part(&mut self, host: HostPart) {
        self.host = Some(host);
    }

    /// What could not be done about leftovers of dead jobs. None of it hinders this save.
    pub fn warnings(&self) -> &[CheckpointError] {
        &self.warnings
    }

    /// Makes what the ranks wrote the checkpoint `tag`, replacing an older one in one step, then, with `save_latest`,
    /// the one that `latest` names. Returns the checkpoint's folder.
    ///
    /// # Errors
    /// [`CheckpointError::Coverage`] if the records do not add up to every element of every parameter exactly once, or
    /// a file is not in the folder; [`CheckpointError::Occupied`]; [`CheckpointError::Io`]. After an error the draft is
    /// gone and older checkpoints are as they were; only an error about `latest` itself leaves the new checkpoint in
    /// place, complete.
    pub fn commit(
        mut self,
        records: &[RankRecord],
        parts: CommitParts,
        save_latest: bool,
    ) -> Result<PathBuf> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let saved_at_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let mut manifest = Manifest::new(parts, records, CHUNK_BYTES, saved_at_ms, save_latest)
            .map_err(|problem| CheckpointError::Coverage { problem })?;
        manifest.host.clone_from(&self.host);
        self.check_files(&manifest)?;
        self.remove_reports()?;
        let text = manifest.to_bytes();
        self.write_file(&self.folder.join(MANIFEST), &text)?;
        self.write_file(&self.folder.join(MANIFEST_CHECKSUM), manifest_checksum_text(&text).as_bytes())?;
        self.sync_dir(&self.folder)?;
        let target = self.place()?;
        self.sync_dir(&self.dir)?;
        if save_latest {
            let temporary = self.temporary_latest();
            self.write_file(&temporary, self.tag.as_bytes())?;
            let latest = self.dir.join(LATEST);
            self.disk.rename(&temporary, &latest).map_err(CheckpointError::io("replace", &latest))?;
            self.sync_dir(&self.dir)?;
        }
        self.finished = true;
        // The checkpoint is safe: what cannot be removed now, the next `begin` tries again and reports.
        let _ = self.remove();
        Ok(target)
    }

    /// As [`Draft::commit`] with `save_latest`, for a folder of another format: the files are what they are, written and
    /// synced.
    ///
    /// # Errors
    /// [`CheckpointError::Occupied`], [`CheckpointError::Io`].
    pub(crate) fn commit_files(mut self) -> Result<PathBuf> {
        self.sync_dir(&self.folder)?;
        let target = self.place()?;
        self.sync_dir(&self.dir)?;
        let (temporary, latest) = (self.temporary_latest(), self.dir.join(LATEST));
        self.write_file(&temporary, self.tag.as_bytes())?;
        self.disk.rename(&temporary, &latest).map_err(CheckpointError::io("replace", &latest))?;
        self.sync_dir(&self.dir)?;
        self.finished = true;
        // As in `commit`.
        let _ = self.remove();
        Ok(target)
    }

    /// Removes the draft.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; the next [`Draft::begin`] tries again.
    pub fn abort(mut self) -> Result<()> {
        self.finished = true;
        self.remove()
    }

    /// Removes what threads of a save behind training told each other.
    fn remove_reports(&self) -> Result<()> {
        for entry in fs::read_dir(&self.folder).map_err(CheckpointError::io("list", &self.folder))? {
            let entry = entry.map_err(CheckpointError::io("list", &self.folder))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                remove(&*self.disk, &entry.path())?;
            }
        }
        Ok(())
    }

    fn check_files(&self, manifest: &Manifest) -> Result<()> {
        for file in manifest.files.iter().filter(|file| manifest.is_here(file)) {
            let path = self.folder.join(&file.name);
            let found = match fs::metadata(&path) {
                Ok(metadata) if metadata.len() == file.bytes => continue,
                Ok(metadata) => format!("it has {} bytes here", metadata.len()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => "it is not here".to_owned(),
                Err(error) => return Err(CheckpointError::io("read", &path)(error)),
            };
            let problem = format!(
                "rank {} wrote {} bytes to {}, but {found}; is the folder shared by all hosts?",
                file.rank,
                file.bytes,
                path.display()
            );
            return Err(CheckpointError::Coverage { problem });
        }
        Ok(())
    }

    /// Gives the folder its name.
    fn place(&self) -> Result<PathBuf> {
        let target = self.dir.join(&self.tag);
        let rename = |from: &Path, to: &Path| {
            self.disk.rename(from, to).map_err(CheckpointError::io("rename a checkpoint to", to))
        };
        if !check_replaceable(&target)? {
            rename(&self.folder, &target)?;
            return Ok(target);
        }
        match self.disk.exchange(&self.folder, &target) {
            // The older checkpoint is now in the temporary folder, which `remove` removes.
            Ok(()) => Ok(target),
            Err(error) if disk::is_unsupported(&error) => {
                let aside = self.dir.join(tag::replaced_name(&self.tag, self.nonce));
                rename(&target, &aside)?;
                // A kill between the two leaves only `aside`, which readers know about.
                if let Err(error) = rename(&self.folder, &target) {
                    rename(&aside, &target)?;
                    return Err(error);
                }
                Ok(target)
            }
            Err(error) => Err(CheckpointError::io("replace", &target)(error)),
        }
    }

    fn temporary_latest(&self) -> PathBuf {
        self.dir.join(format!("{}.latest", tag::draft_name(&self.tag, self.nonce)))
    }

    fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file =
            self.disk.create_file(path, bytes.len() as u64).map_err(CheckpointError::io("create", path))?;
        file.write(bytes).map_err(CheckpointError::io("write", path))?;
        file.sync().map_err(CheckpointError::io("sync", path))
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.disk.sync_dir(path).map_err(CheckpointError::io("sync", path))
    }

    /// Removes the temporary folder or what was exchanged into it, then the lock.
    fn remove(&self) -> Result<()> {
        let aside = self.dir.join(tag::replaced_name(&self.tag, self.nonce));
        let mut paths = vec![self.folder.clone(), self.temporary_latest()];
        if self.dir.join(&self.tag).exists() {
            paths.push(aside);
        }
        paths.push(lock::lock_path(&self.folder));
        paths.iter().try_for_each(|path| remove(&*self.disk, path))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.finished {
            // An error that made us give up is on its way already; the next `begin` tries again.
            let _ = self.remove();
        }
    }
}

fn remove(disk: &dyn Disk, path: &Path) -> Result<()> {
    disk::remove_tree(disk, path).map_err(CheckpointError::io("remove", path))
}

/// Makes `dir` and the folders above it, each synced into the one above.
pub(crate) fn create_dirs(disk: &dyn Disk, dir: &Path) -> Result<()> {
    if dir.as_os_str().is_empty() || dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().unwrap_or(Path::new(""));
    create_dirs(disk, parent)?;
    match disk.create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // Another rank or job was faster, unless it is a file.
            let is_file = io::Error::from(io::ErrorKind::NotADirectory);
            return if dir.is_dir() { Ok(()) } else { Err(CheckpointError::io("create", dir)(is_file)) };
        }
        result => result.map_err(CheckpointError::io("create", dir))?,
    }
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    disk.sync_dir(parent).map_err(CheckpointError::io("sync", parent))
}

/// Whether something of this name is there to be replaced. Only a checkpoint or an empty folder may be.
fn check_replaceable(target: &Path) -> Result<bool> {
    let occupied = |entry: String| CheckpointError::Occupied { folder: target.to_owned(), entry };
    match fs::metadata(target) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(occupied("a file of that name".to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(CheckpointError::io("read", target)(error)),
    }
    for entry in fs::read_dir(target).map_err(CheckpointError::io("list", target))? {
        let name = entry.map_err(CheckpointError::io("list", target))?.file_name();
        let name = name.to_string_lossy();
        let ours = name == MANIFEST || name == MANIFEST_CHECKSUM || is_file_name(&name);
        if !ours && !name.starts_with('.') {
            return Err(occupied(name.into_owned()));
        }
    }
    Ok(true)
}

/// Removes what jobs that have died left in `dir`, and gives a checkpoint its name back that was being replaced.
fn remove_leftovers(disk: &dyn Disk, dir: &Path) -> Vec<CheckpointError> {
    let mut names: Vec<String> = match fs::read_dir(dir) {
        Ok(entries) => entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect(),
        Err(error) => return vec![CheckpointError::io("list", dir)(error)],
    };
    // Of the names of one draft, the folder and the files beside it, one stands for all.
    for name in &mut names {
        if let Some(stem) = name.strip_suffix(".lock").or_else(|| name.strip_suffix(".latest")) {
            *name = stem.to_owned();
        }
    }
    names.sort();
    names.dedup();
    names.iter().filter_map(|name| remove_leftover(disk, dir, name).err()).collect()
}

fn remove_leftover(disk: &dyn Disk, dir: &Path, name: &str) -> Result<()> {
    if tag::tag_of_removed(name).is_some() {
        // Nothing but that is ever done with it; two who do it do not mind each other.
        return remove(disk, &dir.join(name));
    }
    let (tag, draft, aside) = match (tag::tag_of_draft(name), tag::tag_of_replaced(name)) {
        (Some(tag), _) => (tag, name.to_owned(), None),
        (_, Some(tag)) => (tag, name.replacen(".old-", ".tmp-", 1), Some(dir.join(name))),
        _ => return Ok(()),
    };
    let folder = dir.join(&draft);
    let lock_path = lock::lock_path(&folder);
    let owner = lock::owner(&lock_path).map_err(CheckpointError::io("lock", &lock_path))?;
    let dead = match &owner {
        Owner::MayLive => false,
        Owner::Dead(_) => true,
        Owner::NoLock => [Some(&folder), aside.as_ref()].into_iter().flatten().all(|path| is_old(path)),
    };
    if !dead {
        return Ok(());
    }
    if let Some(aside) = aside {
        let target = dir.join(tag);
        if target.exists() {
            remove(disk, &aside)?;
        } else {
            disk.rename(&aside, &target).map_err(CheckpointError::io("restore", &target))?;
            disk.sync_dir(dir).map_err(CheckpointError::io("sync", dir))?;
        }
        return Ok(());
    }
    remove(disk, &folder)?;
    remove(disk, &dir.join(format!("{draft}.latest")))?;
    remove(disk, &lock_path)
}

/// Whether nothing has changed at `path` for long, or nothing is there.
fn is_old(path: &Path) -> bool {
    let Ok(modified) = fs::metadata(path).and_then(|metadata| metadata.modified()) else { return true };
    modified.elapsed().is_ok_and(|age| age > UNLOCKED_LEFTOVER_AGE)
}
