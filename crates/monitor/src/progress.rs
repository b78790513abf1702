//! Which step a rank is in, left where its launcher finds it when the rank is no more.
//!
//! ```text
//!   launcher: ProgressFile::create -- DS_PROGRESS_FILE=/proc/<launcher>/fd/<n> --> rank: Progress::from_environment
//!       |                                                                             |
//!       step()  <------------- eight bytes of memory that outlives the rank ------- tell()
//! ```
//!
//! Telling costs one write of eight bytes to memory for each step; the launcher looks only when a rank has failed.

use std::{
    env,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use fs_err as fs;

/// The variable in which a rank finds the path of its file.
pub const PROGRESS_VARIABLE: &str = "DS_PROGRESS_FILE";

/// The name under which the kernel shows the file. It is in no folder.
const NAME: &str = "deepspeed-progress";

/// The launcher's end.
#[derive(Debug)]
pub struct ProgressFile {
    file: File,
}

impl ProgressFile {
    /// Makes the file of one rank.
    ///
    /// # Errors
    /// The system refuses the memory or the descriptor.
    pub fn create() -> io::Result<Self> {
        let file: OwnedFd = rustix::fs::memfd_create(NAME, rustix::fs::MemfdFlags::CLOEXEC)?;
        Ok(Self { file: File::from(file) })
    }

    /// The path by which the rank, and no other user, can open the file as long as this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// The step that the rank is or was in, counted from 1; `None` where it has never said so.
    pub fn step(&self) -> Option<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, 0).ok()?;
        Some(u64::from_le_bytes(bytes)).filter(|step| *step > 0)
    }
}

/// The rank's end.
#[derive(Debug)]
pub struct Progress {
    file: File,
}

impl Progress {
    /// Opens the file that the launcher has left word of. Without one, or where it cannot be reached (a container with processes of its
    /// own), there is nobody to tell.
    pub fn from_environment() -> Option<Self> {
        Self::open(&env::var(PROGRESS_VARIABLE).ok()?)
    }

    fn open(path: &str) -> Option<Self> {
        let file = File::options().write(true).open(path).ok()?;
        // The launcher may be gone and its number another program's, whose files are not to be written to.
        let shown = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        shown.to_str()?.starts_with(&format!("/memfd:{NAME}")).then_some(Self { file })
    }

    /// Says that `steps` steps are done and the next one begins.
    pub fn tell(&self, steps: u64) {
        // Eight bytes of memory are always to be had; without them the launcher only knows less.
        let _ = self.file.write_all_at(&steps.saturating_add(1).to_le_bytes(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_read() {
        let ours = ProgressFile::create().unwrap();
        assert_eq!(ours.step(), None);
        let rank = Progress::open(&ours.path()).unwrap();
        for steps in [0, 56] {
            rank.tell(steps);
            assert_eq!(ours.step(), Some(steps + 1));
        }
        drop(rank);
        assert_eq!(ours.step(), Some(57));
    }

    #[test]
    fn another_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        fs::write(&path, "precious").unwrap();
        let other = File::open(&path).unwrap();
        assert!(Progress::open(&format!("/proc/{}/fd/{}", std::process::id(), other.as_raw_fd())).is_none());
        assert!(Progress::open("/proc/self/fd/nothing").is_none());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
