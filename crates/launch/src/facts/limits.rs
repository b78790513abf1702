//! Memory, `/dev/shm` and the limits of processes.

use deepspeed_monitor::memory::Free;
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Memory that a job on this host can take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFacts {
    /// Bytes of the machine.
    pub total: u64,
    /// Bytes that are free for a job: the least of what the machine and the control groups leave.
    pub free: u64,
    /// What says so.
    pub limited_by: String,
}

impl MemoryFacts {
    pub(super) fn read() -> Self {
        let text = fs_err::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = total(&text);
        match Free::of_this_host(None).host {
            Some(limit) => Self { total, free: limit.bytes, limited_by: limit.origin.to_string() },
            None => Self { total, free: 0, limited_by: "unknown: /proc/meminfo cannot be read".to_owned() },
        }
    }
}

/// `MemTotal` of `/proc/meminfo`, bytes; 0 where it is not there.
fn total(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// A file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystemFacts {
    /// Bytes in all.
    pub size: u64,
    /// Bytes that an ordinary process may still take.
    pub free: u64,
}

impl FileSystemFacts {
    /// The file system that holds `path`; `None` where there is no such path.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let stat = rustix::fs::statvfs(path).ok()?;
        Some(Self {
            size: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }
}

/// Limits of this process, which its ranks inherit; `None`: unlimited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitFacts {
    /// Bytes that may be locked in memory (`ulimit -l`).
    pub locked_memory: Option<u64>,
    /// Files that may be open at a time (`ulimit -n`).
    pub open_files: Option<u64>,
    /// Processes of this user (`ulimit -u`).
    pub processes: Option<u64>,
}

impl LimitFacts {
    pub(super) fn read() -> Self {
        Self {
            locked_memory: getrlimit(Resource::Memlock).current,
            open_files: getrlimit(Resource::Nofile).current,
            processes: getrlimit(Resource::Nproc).current,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals() {
        assert_eq!(total("MemTotal:       2048 kB\nMemFree: 1 kB\n"), 2 << 20);
        assert_eq!(total("MemTotal: x"), 0);
        assert!(FileSystemFacts::of(Path::new("/")).unwrap().size > 0);
        assert!(FileSystemFacts::of(Path::new("/not there")).is_none());
    }
}
