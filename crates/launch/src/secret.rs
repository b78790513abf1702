//! The job's secret.

use crate::error::LaunchError;
use std::fmt::Write as _;
use std::io::Read as _;

/// 32 random bytes in hexadecimal.
///
/// # Errors
/// The system has no random numbers.
pub(crate) fn new() -> Result<String, LaunchError> {
    let mut bytes = [0; 32];
    fs_err::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|source| LaunchError::File { what: "no random numbers for the job's secret", source })?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}
