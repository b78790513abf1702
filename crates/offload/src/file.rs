//! The private file of a store: without a name, its space reserved, around the page cache where that is possible.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    process,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use deepspeed_core::{AlignedBuffer, DType};
use rustix::{
    fs::{
        FallocateFlags, Mode, OFlags, fallocate, fcntl_getfl, fcntl_setfl, fstatfs, fstatvfs, ftruncate,
        open, unlink,
    },
    io::Errno,
};

use crate::{OffloadError, PAGE, Result};

/// The file, and what could be had of its filesystem.
#[derive(Debug)]
pub(crate) struct PrivateFile {
    pub(crate) file: File,
    /// The name of the filesystem, or its number where we have no name for it.
    pub(crate) filesystem: String,
    /// Why the page cache is used; `None` with direct I/O.
    pub(crate) buffered: Option<&'static str>,
    /// Whether the space is reserved: the disk cannot run full under us.
    pub(crate) reserved: bool,
}

/// Makes a file of `bytes` zeros in `folder` that only this process can reach, with direct I/O if `direct` and if the
/// filesystem allows it.
pub(crate) fn create(folder: &Path, bytes: u64, direct: bool) -> Result<PrivateFile> {
    let file = open_unnamed(folder).map_err(|errno| OffloadError::Folder {
        folder: folder.into(),
        source: Arc::new(io::Error::from(errno)),
    })?;
    let reserved = reserve(&file, folder, bytes)?;
    let buffered = if direct { go_direct(&file, bytes) } else { Some("as asked for") };
    Ok(PrivateFile { filesystem: filesystem_name(&file), file, buffered, reserved })
}

/// Opens a file without a name, which nobody else can open.
fn open_unnamed(folder: &Path) -> Result<File, Errno> {
    // EXCL: nobody can give it a name later.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE | OFlags::EXCL;
    match open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // EISDIR is what a kernel or a FUSE filesystem says that does not know the flag.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS) => open_and_unlink(folder),
        Err(errno) => Err(errno),
    }
}

/// The same where the filesystem knows only files with names: the name is gone when this returns.
fn open_and_unlink(folder: &Path) -> Result<File, Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let mut taken = 0;
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let path = folder.join(format!(".deepspeed-offload-{}-{now:x}", process::id()));
        match open(&path, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => {
                unlink(&path)?;
                return Ok(file.into());
            }
            Err(Errno::EXIST) if taken < 100 => taken += 1,
            Err(errno) => return Err(errno),
        }
    }
}

/// Reserves `bytes` and says whether the filesystem can; where it cannot, the file has the size and no more.
fn reserve(file: &File, folder: &Path, bytes: u64) -> Result<bool> {
    let free = free_bytes(file);
    // Asked first: reserving more than there is would fill the disk before it fails.
    if bytes > free {
        return Err(OffloadError::NoSpace { folder: folder.into(), asked: bytes, free });
    }
    if bytes == 0 {
        return Ok(true);
    }
    let reserved = loop {
        match fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => break Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break ftruncate(file, bytes).map(|()| false),
            Err(errno) => break Err(errno),
        }
    };
    reserved.map_err(|errno| OffloadError::Reserve {
        folder: folder.into(),
        asked: bytes,
        free,
        source: Arc::new(errno.into()),
    })
}

/// Bytes that this user may still write to the file's filesystem; unlimited where it does not say.
fn free_bytes(file: &File) -> u64 {
    match fstatvfs(file) {
        // A tmpfs without a limit has zero blocks in all.
        Ok(stat) if stat.f_blocks > 0 => stat.f_bavail.saturating_mul(stat.f_frsize),
        _ => u64::MAX,
    }
}

/// Switches to direct I/O, or says why that cannot be.
fn go_direct(file: &File, bytes: u64) -> Option<&'static str> {
    let refused = "the filesystem refuses direct I/O";
    let Ok(flags) = fcntl_getfl(file) else { return Some(refused) };
    if fcntl_setfl(file, flags | OFlags::DIRECT).is_err() {
        return Some(refused);
    }
    // Some filesystems accept the flag and refuse the I/O, and a device may ask for larger pages than ours.
    let mut page = AlignedBuffer::zeroed(PAGE / DType::F32.size(), DType::F32);
    if bytes > 0 && file.read_at(page.span_mut().as_bytes_mut(), 0).is_err() {
        return match fcntl_setfl(file, flags) {
            Ok(()) => Some("the filesystem refuses direct I/O in pages of 4096 bytes"),
            // Then direct it stays, and the first request will say what is wrong.
            Err(_) => None,
        };
    }
    None
}

/// What the file's filesystem is called.
fn filesystem_name(file: &File) -> String {
    let Ok(stat) = fstatfs(file) else { return "unknown filesystem".into() };
    let name = match stat.f_type as u32 {
        0xEF53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683E => "btrfs",
        0x0102_1994 => "tmpfs",
        0x794C_7630 => "overlayfs",
        0x2FC1_2FC1 => "zfs",
        0x6969 => "nfs",
        0x6573_5546 => "fuse",
        0xF2F5_2010 => "f2fs",
        0x0BD0_0BD0 => "lustre",
        0x4750_4653 => "gpfs",
        other => return format!("filesystem {other:#x}"),
    };
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn with_names_only_the_name_is_gone_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = open_and_unlink(folder.path()).unwrap();
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.nlink(), metadata.mode() & 0o777), (0, 0o600));
        file.write_at(&[1, 2, 3], 0).unwrap();
        assert_eq!(open_and_unlink(Path::new("/nowhere")).unwrap_err(), Errno::NOENT);
    }
}
