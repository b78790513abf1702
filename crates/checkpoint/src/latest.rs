//! Finding checkpoints: which one `latest` names, whether it is whole, and which others are there.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Advice, FileType, FlockOperation, Mode, OFlags};

use crate::{
    CheckpointError, Checksum, Manifest, Result,
    manifest::{MANIFEST, MANIFEST_CHECKSUM, ManifestProblem},
    tag::{self, LATEST},
    validate_tag,
};

/// A manifest larger than this is not one: a thousand ranks with ten thousand parameters need a hundredth.
const MAX_MANIFEST: u64 = 1 << 30;
/// `latest` and the manifest's checksum are shorter than this.
const MAX_SMALL: u64 = 4096;

/// A checkpoint that is all there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompleteTag {
    /// Its tag.
    pub tag: String,
    /// When it was committed, milliseconds since 1970 UTC.
    pub saved_at_ms: u64,
    /// Whether it was saved to be gone on from, as opposed to one that was kept aside.
    pub save_latest: bool,
}

/// The complete checkpoints in `dir`, newest first. Complete means: the manifest is intact and every file has its size;
/// contents are not read. A `dir` that does not exist has none.
///
/// # Errors
/// [`CheckpointError::Io`] if `dir` cannot be listed.
pub fn complete_tags(dir: &Path) -> Result<Vec<CompleteTag>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(CheckpointError::io("list", dir)(error)),
    };
    let mut tags = Vec::new();
    for entry in entries {
        let entry = entry.map_err(CheckpointError::io("list", dir))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let tag = tag::tag_of_replaced(&name).unwrap_or(&name);
        if validate_tag(tag).is_ok() && !tags.iter().any(|known: &CompleteTag| known.tag == tag) {
            // What is broken is not complete; why it is broken is said when it is asked for.
            if let Ok((_, manifest)) = find(dir, tag) {
                let Manifest { saved_at_ms, save_latest, .. } = manifest;
                tags.push(CompleteTag { tag: tag.to_owned(), saved_at_ms, save_latest });
            }
        }
    }
    tags.sort_by(|one, other| (other.saved_at_ms, &other.tag).cmp(&(one.saved_at_ms, &one.tag)));
    Ok(tags)
}

/// The tags of complete checkpoints other than `except`, for the text of an error: if listing fails as well, the first
/// error is the one to report.
pub(crate) fn complete_names(dir: &Path, except: &str) -> Vec<String> {
    let tags = complete_tags(dir).unwrap_or_default();
    tags.into_iter().map(|complete| complete.tag).filter(|tag| tag != except).collect()
}

/// The tag in `latest`, if there is such a file.
pub(crate) fn read_latest(dir: &Path) -> Result<Option<String>> {
    read_tag(dir, LATEST)
}

/// The tag in the file `name` of `dir`, if there is such a file.
pub(crate) fn read_tag(dir: &Path, name: &str) -> Result<Option<String>> {
    let path = dir.join(name);
    let text = match File::open(&path).and_then(|file| read_limited(&file, MAX_SMALL)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CheckpointError::io("read", &path)(error)),
    };
    let refused = |problem: String| CheckpointError::Latest {
        path: path.clone(),
        problem,
        complete: complete_names(dir, ""),
    };
    let text = String::from_utf8(text).map_err(|_| refused("it is not text".to_owned()))?;
    let tag = text.trim_end();
    validate_tag(tag).map_err(|error| refused(error.to_string()))?;
    Ok(Some(tag.to_owned()))
}

/// An open folder of a checkpoint: stays the same one even if another takes its name.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    fd: OwnedFd,
    /// The manifest, locked for as long as somebody reads: retention leaves the checkpoint alone.
    reading: Option<File>,
}

impl Folder {
    fn open(path: PathBuf) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::empty())?;
        Ok(Self { path, fd, reading: None })
    }

    /// Opens a regular file in the folder; never waits, whatever is behind the name.
    pub(crate) fn open_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(self.fd.as_fd(), name, flags, Mode::empty())?);
        if file.metadata()?.is_file() {
            // Only advice: a file system that does not take it reads all the same.
            let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"))
        }
    }

    /// The size of a regular file in the folder.
    fn size(&self, name: &str) -> io::Result<u64> {
        let stat = rustix::fs::statat(self.fd.as_fd(), name, rustix::fs::AtFlags::empty())?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }
}

/// Opens the checkpoint `tag` of `dir`: checks its manifest and the sizes of its files.
///
/// # Errors
/// Not found, foreign, of a later version, or damaged. The lists of complete checkpoints in the errors are left empty.
pub(crate) fn find(dir: &Path, tag: &str) -> Result<(Folder, Manifest)> {
    let path = dir.join(tag);
    match Folder::open(path.clone()) {
        Ok(folder) => check(dir, tag, folder),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match replaced(dir, tag) {
            Some(folder) => check(dir, tag, folder),
            None => Err(CheckpointError::NotFound {
                dir: dir.to_owned(),
                tag: tag.to_owned(),
                complete: Vec::new(),
            }),
        },
        Err(error) => Err(CheckpointError::io("open", &path)(error)),
    }
}

/// The previous version of `tag`, if a save that was replacing it died between its two renames.
fn replaced(dir: &Path, tag: &str) -> Option<Folder> {
    let names = fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| tag::tag_of_replaced(name) == Some(tag)).collect();
    names.sort();
    names.into_iter().find_map(|name| Folder::open(dir.join(name)).ok())
}

fn check(dir: &Path, tag: &str, mut folder: Folder) -> Result<(Folder, Manifest)> {
    let damaged = |file: &str, problem: String| CheckpointError::Damaged {
        dir: dir.to_owned(),
        tag: tag.to_owned(),
        file: file.to_owned(),
        problem,
        complete: Vec::new(),
    };
    let bytes = match folder.open_file(MANIFEST).and_then(|file| {
        // Where there are no locks, a checkpoint that is removed while it is read is an error and not garbage.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
        let bytes = read_limited(&file, MAX_MANIFEST);
        folder.reading = Some(file);
        bytes
    }) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(match original_file(&folder.path) {
                Some(example) => CheckpointError::Foreign { folder: folder.path, example },
                None => damaged(MANIFEST, "it is missing, so the checkpoint is not complete".to_owned()),
            });
        }
        Err(error) if is_content(&error) => return Err(damaged(MANIFEST, error.to_string())),
        Err(error) => return Err(CheckpointError::io("read", &folder.path.join(MANIFEST))(error)),
    };
    // A checksum that is there and differs explains every other oddity; one that is missing may belong to another
    // version of the format, which the manifest states.
    let checksum = read_small(&folder, MANIFEST_CHECKSUM, MAX_SMALL);
    if let Ok(text) = &checksum {
        check_manifest_checksum(text, &bytes).map_err(|problem| damaged(MANIFEST, problem))?;
    }
    let manifest = Manifest::from_bytes(&bytes).map_err(|problem| match problem {
        ManifestProblem::Version(found) => CheckpointError::Version {
            manifest: folder.path.join(MANIFEST),
            found,
            supported: crate::FORMAT_VERSION,
        },
        ManifestProblem::Damaged(problem) => damaged(MANIFEST, problem),
    })?;
    checksum.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => damaged(MANIFEST_CHECKSUM, "it is missing".to_owned()),
        _ if is_content(&error) => damaged(MANIFEST_CHECKSUM, error.to_string()),
        _ => CheckpointError::io("read", &folder.path.join(MANIFEST_CHECKSUM))(error),
    })?;
    for file in manifest.files.iter().filter(|file| manifest.is_here(file)) {
        match folder.size(&file.name) {
            Ok(bytes) if bytes == file.bytes => {}
            Ok(bytes) => {
                return Err(damaged(&file.name, format!("it has {bytes} bytes instead of {}", file.bytes)));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged(&file.name, "it is missing".to_owned()));
            }
            Err(error) if is_content(&error) => return Err(damaged(&file.name, error.to_string())),
            Err(error) => return Err(CheckpointError::io("open", &folder.path.join(&file.name))(error)),
        }
    }
    Ok((folder, manifest))
}

/// The text of the manifest's checksum file, as `xxhsum -c` reads it.
pub(crate) fn manifest_checksum_text(manifest: &[u8]) -> String {
    format!("{}  {MANIFEST}\n", Checksum::of(manifest))
}

fn check_manifest_checksum(text: &[u8], manifest: &[u8]) -> Result<(), String> {
    let expected = manifest_checksum_text(manifest);
    if text == expected.as_bytes() {
        return Ok(());
    }
    Err(format!("its checksum is {} and {MANIFEST_CHECKSUM} says otherwise", Checksum::of(manifest)))
}

fn read_small(folder: &Folder, name: &str, limit: u64) -> io::Result<Vec<u8>> {
    read_limited(&folder.open_file(name)?, limit)
}

fn read_limited(file: &File, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let len = file.take(limit + 1).read_to_end(&mut bytes)?;
    if len as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Whether the error is about what lies there, not about the disk.
fn is_content(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput)
}

/// A file by which a checkpoint of the original DeepSpeed is known.
pub(crate) fn original_file(folder: &Path) -> Option<String> {
    let names = fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.into_iter().find(|name| name.ends_with(".pt") || name == "zero")
}
