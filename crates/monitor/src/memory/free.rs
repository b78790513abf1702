//! What a host has to give: its own memory, the limits of the control groups this process is in, and the disk.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::{Serialize, Serializer};

use crate::memory::Bytes;

/// What limits memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LimitOrigin {
    /// `MemAvailable` of `/proc/meminfo`.
    Machine,
    /// A control group: its limit, what its processes use without reclaimable file cache, and the file that says so.
    ControlGroup {
        /// The file that holds the limit.
        file: PathBuf,
        /// The limit, bytes.
        limit: u64,
        /// Used and not reclaimable, bytes.
        used: u64,
    },
    /// The file system that holds a folder.
    FileSystem {
        /// The folder.
        folder: PathBuf,
    },
    /// The caller.
    Given {
        /// Where the number comes from, as `--available`.
        by: String,
    },
}

impl fmt::Display for LimitOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("MemAvailable of /proc/meminfo"),
            Self::ControlGroup { file, limit, used } => {
                write!(
                    f,
                    "control group limit of {} in {}, {} used",
                    Bytes(*limit),
                    file.display(),
                    Bytes(*used)
                )
            }
            Self::FileSystem { folder } => write!(f, "free space of the file system of {}", folder.display()),
            Self::Given { by } => f.write_str(by),
        }
    }
}

impl Serialize for LimitOrigin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Bytes that are free, and what says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// Free bytes.
    pub bytes: u64,
    /// What limits them.
    pub origin: LimitOrigin,
}

impl Limit {
    /// A limit that the caller states.
    pub fn given(bytes: u64, by: &str) -> Self {
        Self { bytes, origin: LimitOrigin::Given { by: by.to_owned() } }
    }
}

/// What the ranks of a host may take. `None` where nothing is known; nothing is refused then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Free {
    /// The host's memory, for all its ranks.
    pub host: Option<Limit>,
    /// The memory of one accelerator.
    pub device: Option<Limit>,
    /// The disk of `nvme_path`, for all ranks of the host.
    pub nvme: Option<Limit>,
    /// Bytes of weights that the ranks of this host hold in its memory already: a model that was built before the plan.
    /// They are neither free nor needed once more.
    pub weights_held: u64,
}

/// Where the kernel's files are looked up.
#[derive(Clone, Debug)]
pub struct Sources {
    root: PathBuf,
}

impl Default for Sources {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

impl Sources {
    /// The kernel's files below another folder than `/`, for tests.
    pub fn under(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The host's free memory: the least of what the machine and the control groups leave. `None` where the kernel does
    /// not say (no `/proc`).
    pub fn host_memory(&self) -> Option<Limit> {
        let machine = self
            .read("proc/meminfo")
            .and_then(|text| available(&text))
            .map(|bytes| Limit { bytes, origin: LimitOrigin::Machine });
        let groups = self.read("proc/self/cgroup").unwrap_or_default();
        let limits = group_folders(&groups).into_iter().filter_map(|group| self.group_limit(&group));
        machine.into_iter().chain(limits).min_by_key(|limit| limit.bytes)
    }

    fn group_limit(&self, group: &Group) -> Option<Limit> {
        let read = |name: &str| self.read(group.folder.join(name));
        let (limit, used) = match group.version {
            Version::One => (
                version_one_limit(&read("memory.limit_in_bytes")?, &read("memory.stat").unwrap_or_default()),
                not_reclaimable(
                    &read("memory.usage_in_bytes")?,
                    &read("memory.stat").unwrap_or_default(),
                    ["total_inactive_file", "total_active_file"],
                ),
            ),
            Version::Two => (
                number(&read("memory.max")?),
                not_reclaimable(
                    &read("memory.current")?,
                    &read("memory.stat").unwrap_or_default(),
                    ["inactive_file", "active_file"],
                ),
            ),
        };
        let (limit, used) = (limit?, used?);
        let name = match group.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        let file = Path::new("/").join(group.folder.join(name));
        let origin = LimitOrigin::ControlGroup { file, limit, used };
        Some(Limit { bytes: limit.saturating_sub(used), origin })
    }

    fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        // What cannot be read limits nothing: other kernels and containers lack some of these files.
        fs_err::read_to_string(self.root.join(path)).ok()
    }
}

/// Free bytes of the file system that `folder` is on, or would be on once it is made.
pub(crate) fn disk(folder: &Path) -> Option<Limit> {
    let existing = std::path::absolute(folder).ok()?;
    let existing = existing.ancestors().find(|path| path.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    let bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    Some(Limit { bytes, origin: LimitOrigin::FileSystem { folder: folder.to_owned() } })
}

impl Free {
    /// What this host has, and the disk of `nvme_path` where one is given.
    pub fn of_this_host(nvme_path: Option<&Path>) -> Self {
        Self {
            host: Sources::default().host_memory(),
            device: None,
            nvme: nvme_path.and_then(disk),
            weights_held: 0,
        }
    }
}

/// A control group that may limit memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    version: Version,
    /// Without the leading `/`.
    folder: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The groups that the text of `/proc/self/cgroup` names and all above them, each of which limits the ones below. A
/// container may see its own group only as the root, so that the path does not exist; the root is among them.
fn group_folders(groups: &str) -> Vec<Group> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (version, root) = if controllers.is_empty() {
            (Version::Two, Path::new("sys/fs/cgroup"))
        } else if controllers.split(',').any(|name| name == "memory") {
            (Version::One, Path::new("sys/fs/cgroup/memory"))
        } else {
            continue;
        };
        let path = Path::new(path.trim_start_matches('/'));
        found.extend(path.ancestors().map(|part| Group { version, folder: root.join(part) }));
    }
    found
}

/// `MemAvailable` of `/proc/meminfo`, bytes; kernels before 3.14 have only its parts.
fn available(meminfo: &str) -> Option<u64> {
    let field = |name: &str| {
        meminfo.lines().find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix("kB")?;
            value.trim().parse::<u64>().ok()?.checked_mul(1024)
        })
    };
    field("MemAvailable").or_else(|| Some(field("MemFree")? + field("Buffers")? + field("Cached")?))
}

/// The one number of a file; `max` is none.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A line `name value` of `memory.stat`.
fn field(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The limit of a group of version 1 and those above it, which are known even where they cannot be seen. The kernel
/// says "none" by a number near 2^63.
fn version_one_limit(limit: &str, stat: &str) -> Option<u64> {
    const NONE: u64 = 1 << 60;
    let limits = [number(limit), field(stat, "hierarchical_memory_limit")];
    limits.into_iter().flatten().filter(|limit| *limit < NONE).min()
}

/// What is used without the file cache that the kernel gives back under pressure. Shared memory counts as used.
fn not_reclaimable(usage: &str, stat: &str, cache: [&str; 2]) -> Option<u64> {
    let cached = cache.into_iter().filter_map(|name| field(stat, name)).fold(0, u64::saturating_add);
    Some(number(usage)?.saturating_sub(cached))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEMINFO: &str = "MemTotal:       24682416 kB\nMemFree:         2397380 kB\nMemAvailable:   20478368 kB\n\
                           Buffers:          366728 kB\nCached:         10587720 kB\n";

    /// A root with these files.
    fn sources(files: &[(&str, &str)]) -> (tempfile::TempDir, Sources) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            fs_err::write(path, text).unwrap();
        }
        let sources = Sources::under(folder.path());
        (folder, sources)
    }

    #[test]
    fn the_machine_limits_where_nothing_else_does() {
        let (_folder, sources) = sources(&[("proc/meminfo", MEMINFO), ("proc/self/cgroup", "0::/\n")]);
        let limit = sources.host_memory().unwrap();
        assert_eq!(limit, Limit { bytes: 20_478_368 << 10, origin: LimitOrigin::Machine });
        assert_eq!(limit.origin.to_string(), "MemAvailable of /proc/meminfo");
    }

    #[test]
    fn old_kernels_say_only_the_parts() {
        let text: String = MEMINFO
            .lines()
            .filter(|line| !line.starts_with("MemAvailable"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(available(&text), Some((2_397_380 + 366_728 + 10_587_720) << 10));
        assert_eq!(available("nothing of the kind"), None);
    }

    #[test]
    fn a_control_group_of_version_two_limits_without_its_file_cache() {
        let (_folder, sources) = sources(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/job/step\n"),
            ("sys/fs/cgroup/job/step/memory.max", "max\n"),
            ("sys/fs/cgroup/job/step/memory.current", "3000\n"),
            ("sys/fs/cgroup/job/memory.max", "1000000\n"),
            ("sys/fs/cgroup/job/memory.current", "600000\n"),
            ("sys/fs/cgroup/job/memory.stat", "anon 1\nfile 9\ninactive_file 200000\nactive_file 100000\n"),
        ]);
        let limit = sources.host_memory().unwrap();
        assert_eq!(limit.bytes, 700_000);
        assert_eq!(
            limit.origin,
            LimitOrigin::ControlGroup {
                file: "/sys/fs/cgroup/job/memory.max".into(),
                limit: 1_000_000,
                used: 300_000
            }
        );
        assert_eq!(
            limit.origin.to_string(),
            "control group limit of 976.56 KiB in /sys/fs/cgroup/job/memory.max, 292.97 KiB used"
        );
    }

    #[test]
    fn a_container_that_sees_its_group_as_the_root() {
        let (_folder, sources) = sources(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/../../docker/abc\n"),
            ("sys/fs/cgroup/memory.max", "5000\n"),
            ("sys/fs/cgroup/memory.current", "9000\n"),
        ]);
        assert_eq!(sources.host_memory().unwrap().bytes, 0, "over its limit is not below zero");
    }

    #[test]
    fn a_control_group_of_version_one() {
        let cgroup = "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n";
        let none = "9223372036854771712\n";
        let stat = "cache 5\ninactive_file 1\ntotal_inactive_file 100\ntotal_active_file 50\n\
                    hierarchical_memory_limit 2000\n";
        let (_folder, sources) = sources(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", cgroup),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", none),
            ("sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "1000"),
            ("sys/fs/cgroup/memory/a/b/memory.stat", stat),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", none),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000"),
        ]);
        assert_eq!(sources.host_memory().unwrap().bytes, 2000 - (1000 - 150));
    }

    #[test]
    fn this_host_has_memory_and_a_disk() {
        let folder = tempfile::tempdir().unwrap();
        let free = Free::of_this_host(Some(&folder.path().join("not/made/yet")));
        assert!(free.host.unwrap().bytes > 0);
        assert!(free.nvme.is_some());
    }

    #[test]
    fn nothing_is_known_without_proc() {
        let (_folder, sources) = sources(&[]);
        assert_eq!(sources.host_memory(), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(?s).{0,200}", usage in "[0-9a-z\n ]{0,20}") {
            available(&text);
            group_folders(&text);
            version_one_limit(&usage, &text);
            not_reclaimable(&usage, &text, ["inactive_file", "active_file"]);
        }
    }
}
