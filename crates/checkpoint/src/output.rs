//! Results that are whole or absent: written under a temporary name, synced, then renamed.
//!
//! ```text
//! OUT does not exist    .OUT.part-NONCE/ beside it           becomes OUT in one rename
//! OUT is a folder       .part-NONCE/ in it                   its files move to OUT one by one, the index last
//! ```

use std::{
    collections::{BTreeSet, hash_map::RandomState},
    fs,
    hash::BuildHasher,
    io,
    path::{Path, PathBuf},
};

use crate::{
    CheckpointError, Result,
    disk::{self, Disk, DiskFile, RealDisk},
    draft::create_dirs,
    lock::{self, Lock, Owner},
};

/// Files that are being written for a folder. Dropped without [`Output::commit`], they vanish.
pub(crate) struct Output {
    out: PathBuf,
    staging: PathBuf,
    /// Whether `out` is there, so that files move into it.
    joins: bool,
    names: Vec<String>,
    _lock: Lock,
}

impl Output {
    /// Begins the folder `out`, which may be there and hold other files. Removes what a process that died left behind.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn begin(out: &Path) -> Result<Self> {
        Self::start(out, false)
    }

    /// As [`Output::begin`]; if `out` is there, it is replaced with all that is in it, in one step.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn begin_whole(out: &Path) -> Result<Self> {
        Self::start(out, true)
    }

    fn start(out: &Path, whole: bool) -> Result<Self> {
        let joins = match fs::metadata(out) {
            Ok(metadata) if metadata.is_dir() => !whole,
            Ok(_) => {
                let file = io::Error::from(io::ErrorKind::NotADirectory);
                return Err(CheckpointError::io("write into", out)(file));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(CheckpointError::io("open", out)(error)),
        };
        let (home, prefix) = if joins {
            (out.to_owned(), ".part-".to_owned())
        } else {
            let name = out.file_name().unwrap_or_default().to_string_lossy();
            (parent(out), format!(".{name}.part-"))
        };
        create_dirs(&RealDisk, &home)?;
        remove_dead(&home, &prefix)?;
        let nonce = RandomState::new().hash_one(std::process::id());
        let staging = home.join(format!("{prefix}{nonce:016x}"));
        let lock_path = lock::lock_path(&staging);
        let lock = lock::acquire(&lock_path).map_err(CheckpointError::io("lock", &lock_path))?;
        let output = Self { out: out.to_owned(), staging, joins, names: Vec::new(), _lock: lock };
        RealDisk.create_dir(&output.staging).map_err(CheckpointError::io("create", &output.staging))?;
        Ok(output)
    }

    /// Creates a file of `bytes` bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; a full disk is found out here.
    pub(crate) fn create(&mut self, name: &str, bytes: u64) -> Result<OutputFile> {
        let path = self.staging.join(name);
        create_dirs(&RealDisk, &parent(&path))?;
        let file = RealDisk.create_file(&path, bytes).map_err(CheckpointError::io("create", &path))?;
        self.names.push(name.to_owned());
        Ok(OutputFile { file, shown: self.out.join(name) })
    }

    /// Makes room for a file that somebody else writes; the folder to which `name` is relative.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn place(&mut self, name: &str) -> Result<PathBuf> {
        create_dirs(&RealDisk, &parent(&self.staging.join(name)))?;
        self.names.push(name.to_owned());
        Ok(self.staging.clone())
    }

    /// Creates a file with this content.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn write(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let mut file = self.create(name, content.len() as u64)?;
        file.write(content)?;
        file.finish()
    }

    /// Makes everything visible, in the order in which it was created, and removes the files `stale` of the folder.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn commit(self, stale: &[PathBuf]) -> Result<()> {
        let folders: BTreeSet<PathBuf> =
            self.names.iter().map(|name| parent(&self.staging.join(name))).collect();
        folders.iter().try_for_each(|folder| sync_dir(folder))?;
        sync_dir(&self.staging)?;
        let rename = |from: &Path, to: &Path| {
            RealDisk.rename(from, to).map_err(CheckpointError::io("rename the result to", to))
        };
        if !self.joins {
            if self.out.exists() {
                // What was there is then in the temporary folder, which goes.
                let exchanged = RealDisk.exchange(&self.staging, &self.out);
                exchanged.map_err(CheckpointError::io("replace", &self.out))?;
            } else {
                rename(&self.staging, &self.out)?;
            }
            return sync_dir(&parent(&self.out));
        }
        for name in &self.names {
            let target = self.out.join(name);
            create_dirs(&RealDisk, &parent(&target))?;
            rename(&self.staging.join(name), &target)?;
        }
        for path in stale.iter().filter(|path| !self.names.iter().any(|name| self.out.join(name) == **path)) {
            disk::remove_tree(&RealDisk, path).map_err(CheckpointError::io("remove", path))?;
        }
        sync_dir(&self.out)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // What cannot be removed now, the next `begin` tries again and reports.
        let _ = disk::remove_tree(&RealDisk, &self.staging);
        let _ = disk::remove_tree(&RealDisk, &lock::lock_path(&self.staging));
    }
}

/// A file of an [`Output`].
pub(crate) struct OutputFile {
    file: Box<dyn DiskFile>,
    shown: PathBuf,
}

impl OutputFile {
    /// Appends.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write(bytes).map_err(CheckpointError::io("write", &self.shown))
    }

    /// Makes the content survive a loss of power.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn finish(mut self) -> Result<()> {
        self.sync()
    }

    /// As [`OutputFile::finish`], where somebody else still holds the file.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.file.sync().map_err(CheckpointError::io("sync", &self.shown))
    }
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn sync_dir(path: &Path) -> Result<()> {
    RealDisk.sync_dir(path).map_err(CheckpointError::io("sync", path))
}

/// Removes the temporary folders of processes that have died.
fn remove_dead(home: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(home).map_err(CheckpointError::io("list", home))? {
        let name = entry.map_err(CheckpointError::io("list", home))?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with(prefix)) else { continue };
        let Some(folder) = name.strip_suffix(".lock").map(|name| home.join(name)) else { continue };
        let lock = home.join(name);
        // Keeps the lock until both are gone.
        let owner = lock::owner(&lock).map_err(CheckpointError::io("lock", &lock))?;
        if matches!(owner, Owner::Dead(_)) {
            disk::remove_tree(&RealDisk, &folder).map_err(CheckpointError::io("remove", &folder))?;
            disk::remove_tree(&RealDisk, &lock).map_err(CheckpointError::io("remove", &lock))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_is_seen_before_the_commit_and_nothing_is_left_without_one() {
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("a/model");
        let mut output = Output::begin(&out).unwrap();
        output.write("one", b"1").unwrap();
        output.write("deep/two", b"2").unwrap();
        assert!(!out.exists());
        drop(output);
        assert!(names(&temp.path().join("a")).is_empty());

        let mut output = Output::begin(&out).unwrap();
        output.write("one", b"1").unwrap();
        output.commit(&[]).unwrap();
        assert_eq!(names(&temp.path().join("a")), ["model"]);
        assert_eq!(names(&out), ["one"]);
    }

    #[test]
    fn files_join_a_folder_and_replace_what_is_stale() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["config.json", "old", "same"] {
            fs::write(temp.path().join(name), "before").unwrap();
        }
        let mut output = Output::begin(temp.path()).unwrap();
        output.write("same", b"after").unwrap();
        output.write("new", b"after").unwrap();
        assert_eq!(fs::read(temp.path().join("same")).unwrap(), b"before");
        output.commit(&[temp.path().join("old"), temp.path().join("same")]).unwrap();
        assert_eq!(names(temp.path()), ["config.json", "new", "same"]);
        assert_eq!(fs::read(temp.path().join("same")).unwrap(), b"after");
    }

    #[test]
    fn what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not() {
        let temp = tempfile::tempdir().unwrap();
        let dead = temp.path().join(".part-00000000000000aa");
        fs::create_dir(&dead).unwrap();
        fs::write(lock::lock_path(&dead), "").unwrap();
        let living = Output::begin(temp.path()).unwrap();
        assert!(!dead.exists());
        let mut other = Output::begin(temp.path()).unwrap();
        other.write("x", b"").unwrap();
        assert!(living.staging.exists());
        other.commit(&[]).unwrap();
        drop(living);
        assert_eq!(names(temp.path()), ["x"]);
    }
}
