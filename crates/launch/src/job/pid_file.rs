//! `--save_pid`: the launcher's process id in `<temporary folder>/<pid>.deepspeed` while it runs.

use crate::error::LaunchError;
use fs_err as fs;
use std::env;
use std::io::{self, Write};
use std::path::PathBuf;

/// The file; it goes when this value does.
#[derive(Debug)]
pub(crate) struct PidFile {
    path: PathBuf,
}

impl PidFile {
    /// Writes the file. An old one of the same name is replaced, never written through: it could be a link.
    pub(crate) fn write() -> Result<Self, LaunchError> {
        let error = |source| LaunchError::File { what: "--save_pid", source };
        let pid = std::process::id();
        let path = env::temp_dir().join(format!("{pid}.deepspeed"));
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error(source)),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&path).map_err(error)?;
        let written = Self { path };
        write!(file, "{pid}").map_err(error)?;
        Ok(written)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // A file that is already gone needs no removal, and there is nothing to be done about another failure.
        let _ = fs::remove_file(&self.path);
    }
}
