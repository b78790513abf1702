//! Whether a rank died for want of memory, by what the kernel says (its log, the counters of control groups) and by what the rank itself
//! has said.

use crate::ranks::signals::Ending;
use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::{Path, PathBuf};

/// What is known of a rank's death.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Evidence {
    /// Whether memory was short.
    pub(crate) out_of_memory: bool,
    /// What shows it, or that nothing does: one line.
    pub(crate) text: String,
}

impl Evidence {
    fn out_of_memory(text: String) -> Self {
        Self { out_of_memory: true, text }
    }
}

/// What `/proc` still tells of a process that is over and not yet collected.
#[derive(Debug, Clone, Default)]
pub(crate) struct Remains {
    cgroup: String,
    limits: String,
}

impl Remains {
    /// Reads it.
    pub(crate) fn of(pid: i32) -> Self {
        let read = |name| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        Self { cgroup: read("cgroup"), limits: read("limits") }
    }
}

/// The counters of out-of-memory kills when the job started, to compare with later.
#[derive(Debug)]
pub(crate) struct OutOfMemory {
    cgroup: Option<(PathBuf, u64)>,
    machine: Option<u64>,
}

impl OutOfMemory {
    /// Reads the counters.
    pub(crate) fn watch() -> Self {
        let cgroup = counter_files(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default())
            .into_iter()
            .find_map(|path| Some((path.clone(), read_counter(&path)?)));
        Self { cgroup, machine: read_counter(Path::new("/proc/vmstat")) }
    }

    /// What can be said of the end of the process `pid`, if memory may have had to do with it.
    pub(crate) fn explain(
        &self,
        pid: i32,
        ending: Ending,
        remains: &Remains,
        last_words: &str,
    ) -> Option<Evidence> {
        if ending.is_success() {
            return None;
        }
        if let Some(line) = refused_allocation(last_words) {
            return Some(Evidence::out_of_memory(format!(
                "out of memory: it was refused memory and said `{line}`{}",
                memory_limit(&remains.limits)
            )));
        }
        ending.may_be_out_of_memory().then(|| self.explain_kill(pid, remains))
    }

    /// What has happened since the start, in view of the process `pid` that was killed.
    fn explain_kill(&self, pid: i32, remains: &Remains) -> Evidence {
        if let Some(line) = read_kernel_log().as_deref().and_then(|log| kill_in_log(log, pid)) {
            return Evidence::out_of_memory(format!("out of memory: the kernel's log says `{line}`"));
        }
        let kills_since = |path: &Path, before: u64| {
            read_counter(path).and_then(|now| now.checked_sub(before)).filter(|kills| *kills > 0)
        };
        let killed = |kills: u64| format!("{kills} process{}", if kills == 1 { "" } else { "es" });
        // A rank may have been put into a group of its own, by the scheduler or by the script; nobody has counted there before.
        let own = own_group(&remains.cgroup)
            .filter(|path| self.cgroup.as_ref().is_none_or(|(known, _)| known != path))
            .and_then(|path| Some((kills_since(&path, 0)?, path)));
        let of_job = || {
            let (path, before) = self.cgroup.as_ref()?;
            Some((kills_since(path, *before)?, path.clone()))
        };
        if let Some((kills, path)) = own.or_else(of_job) {
            let limit =
                group_limit(&path).map_or_else(String::new, |limit| format!(", whose limit is {limit},"));
            return Evidence::out_of_memory(format!(
                "out of memory: {} of its control group{limit} killed since the start ({})",
                killed(kills),
                path.display()
            ));
        }
        let machine = self.machine.and_then(|before| kills_since(Path::new("/proc/vmstat"), before));
        if let Some(kills) = machine {
            return Evidence::out_of_memory(format!(
                "probably out of memory: {} on this machine killed for want of memory since the start (/proc/vmstat)",
                killed(kills)
            ));
        }
        let text = if self.cgroup.is_none() && self.machine.is_none() {
            "out of memory? the kernel's counters cannot be read here"
        } else {
            "no out-of-memory event seen; then someone, or a job scheduler, sent the signal"
        };
        Evidence { out_of_memory: false, text: text.to_owned() }
    }
}

/// The line in which a program says that it was refused memory.
fn refused_allocation(last_words: &str) -> Option<&str> {
    const SIGNS: [&str; 8] = [
        "MemoryError",
        "OutOfMemoryError",
        "out of memory",
        "can't allocate memory",
        "Cannot allocate memory",
        "not enough memory",
        "bad_alloc",
        "memory allocation of",
    ];
    last_words.lines().find(|line| SIGNS.iter().any(|sign| line.contains(sign))).map(str::trim)
}

/// The limits of memory that a process has set for itself or was started under, from the text of `/proc/<pid>/limits`.
fn memory_limit(limits: &str) -> String {
    let of = |name: &str, how: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        let bytes: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(format!("{} ({how})", size(bytes)))
    };
    let found: Vec<String> = [of("Max address space", "ulimit -v"), of("Max data size", "ulimit -d")]
        .into_iter()
        .flatten()
        .collect();
    if found.is_empty() { String::new() } else { format!("; its limit is {}", found.join(" and ")) }
}

/// `512 MiB`, `1.5 GiB`.
fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    match bytes / MIB {
        0 => format!("{bytes} bytes"),
        mib @ 1..1024 => format!("{mib} MiB"),
        mib => format!("{:.1} GiB", mib as f64 / 1024.0),
    }
}

/// The counter of the control group that a process was in, by its `/proc/<pid>/cgroup`; version 2 only, as version 1 forgets a process at
/// its end.
fn own_group(groups: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    (!path.is_empty()).then(|| Path::new("/sys/fs/cgroup").join(path).join("memory.events"))
}

/// The limit of the control group with this counter, in words.
fn group_limit(counter: &Path) -> Option<String> {
    let folder = counter.parent()?;
    let text = ["memory.max", "memory.limit_in_bytes"]
        .into_iter()
        .find_map(|name| fs::read_to_string(folder.join(name)).ok())?;
    // Version 1 says that there is none by a number that no machine has.
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 60).map(size)
}

/// Files that may count the kills of this process's control group, for the text of `/proc/self/cgroup`: version 2, version 1, and
/// each without the path for a container that does not see it.
fn counter_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let path = path.trim_start_matches('/');
        if controllers.is_empty() {
            files.push(Path::new("/sys/fs/cgroup").join(path).join("memory.events"));
            files.push(PathBuf::from("/sys/fs/cgroup/memory.events"));
        } else if controllers.split(',').any(|name| name == "memory") {
            files.push(Path::new("/sys/fs/cgroup/memory").join(path).join("memory.oom_control"));
            files.push(PathBuf::from("/sys/fs/cgroup/memory/memory.oom_control"));
        }
    }
    files
}

/// The number in the line `oom_kill N`.
fn read_counter(path: &Path) -> Option<u64> {
    fs::read_to_string(path)
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// The kernel's log as far as this process may read it.
fn read_kernel_log() -> Option<String> {
    let mut log = fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open("/dev/kmsg")
        .ok()?;
    // One record for each read; the log's size bounds their number.
    let mut text = String::new();
    let mut record = [0; 8192];
    for _ in 0..100_000 {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(length) => text += &String::from_utf8_lossy(&record[..length]),
            // Records that are overwritten while they are read.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {}
            Err(_) => break,
        }
    }
    Some(text)
}

/// The message of the out-of-memory killer about a process.
fn kill_in_log(log: &str, pid: i32) -> Option<String> {
    let word = format!("Killed process {pid} ");
    let line = log.lines().rfind(|line| line.contains(&word))?;
    // `priority,number,time,flags;message`
    Some(line.split_once(';').map_or(line, |(_, message)| message).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_control_groups() {
        let paths = |text| -> Vec<String> {
            counter_files(text).into_iter().map(|path| path.to_string_lossy().into_owned()).collect()
        };
        assert_eq!(
            paths("0::/user.slice/job\n"),
            ["/sys/fs/cgroup/user.slice/job/memory.events", "/sys/fs/cgroup/memory.events"]
        );
        assert_eq!(
            paths("5:cpu,cpuacct:/x\n4:memory:/a/b\n"),
            ["/sys/fs/cgroup/memory/a/b/memory.oom_control", "/sys/fs/cgroup/memory/memory.oom_control"]
        );
        assert!(paths("garbage\n1:2").is_empty());
    }

    #[test]
    fn the_log_names_the_process() {
        let log = "6,1,2,-;x\n3,900,5,-;Out of memory: Killed process 12 (python3) total-vm:1kB\n \
                   3,901,5,-;Memory cgroup out of memory: Killed process 123 (python3) total-vm:1kB\n";
        assert_eq!(kill_in_log(log, 12).unwrap(), "Out of memory: Killed process 12 (python3) total-vm:1kB");
        assert_eq!(kill_in_log(log, 1), None);
    }

    #[test]
    fn counters_are_compared() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory.events");
        fs::write(&path, "low 0\noom 2\noom_kill 3\noom_group_kill 9\n").unwrap();
        fs::write(folder.path().join("memory.max"), "536870912\n").unwrap();
        let watch = OutOfMemory { cgroup: Some((path, 1)), machine: None };
        let explain = |ending, words| watch.explain(-5, ending, &Remains::default(), words);
        let evidence = explain(Ending::Signal(9), "").unwrap();
        assert!(evidence.out_of_memory);
        let start =
            "out of memory: 2 processes of its control group, whose limit is 512 MiB, killed since the start";
        assert!(evidence.text.starts_with(start), "{}", evidence.text);
        assert_eq!(explain(Ending::Code(1), "ValueError: no"), None);
        assert_eq!(explain(Ending::Code(0), "MemoryError"), None);
    }

    #[test]
    fn a_refused_allocation_is_out_of_memory() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max data size             unlimited            unlimited            bytes     \n\
                      Max address space         536870912            unlimited            bytes     \n";
        let watch = OutOfMemory { cgroup: None, machine: None };
        let remains = Remains { cgroup: String::new(), limits: limits.to_owned() };
        let evidence = watch.explain(-5, Ending::Code(1), &remains, "MemoryError").unwrap();
        assert!(evidence.out_of_memory);
        assert_eq!(
            evidence.text,
            "out of memory: it was refused memory and said `MemoryError`; its limit is 512 MiB (ulimit -v)"
        );
    }

    #[test]
    fn the_group_of_a_process_that_is_over() {
        assert_eq!(own_group("0::/job/step\n"), Some("/sys/fs/cgroup/job/step/memory.events".into()));
        assert_eq!(own_group("4:memory:/a\n0::/\n"), None);
    }
}
