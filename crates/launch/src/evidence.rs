//! What the kernel says about a rank that was killed: out-of-memory kills, by the cgroup's counters and the kernel's log.

use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt;
use std::io::Read;
use std::path::{Path, PathBuf};

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

    /// What has happened since, in view of the process `pid` that was killed; one sentence each.
    pub(crate) fn explain(&self, pid: i32) -> String {
        if let Some(line) = read_kernel_log().as_deref().and_then(|log| kill_in_log(log, pid)) {
            return format!("out of memory: the kernel's log says `{line}`");
        }
        if let Some((path, before)) = &self.cgroup
            && let Some(kills) =
                read_counter(path).and_then(|now| now.checked_sub(*before)).filter(|kills| *kills > 0)
        {
            return format!(
                "out of memory: {kills} process{} of this job's control group killed since the start ({})",
                if kills == 1 { "" } else { "es" },
                path.display()
            );
        }
        if let Some(before) = self.machine
            && let Some(kills) = read_counter(Path::new("/proc/vmstat"))
                .and_then(|now| now.checked_sub(before))
                .filter(|kills| *kills > 0)
        {
            return format!(
                "probably out of memory: {kills} process{} on this machine killed for want of memory since the start \
                 (/proc/vmstat)",
                if kills == 1 { "" } else { "es" }
            );
        }
        if self.cgroup.is_none() && self.machine.is_none() {
            return "out of memory? the kernel's counters cannot be read here".to_owned();
        }
        "no out-of-memory event seen; then someone, or a job scheduler, sent the signal".to_owned()
    }
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
        let watch = OutOfMemory { cgroup: Some((path, 1)), machine: None };
        assert!(watch.explain(-5).starts_with("out of memory: 2 processes"));
    }
}
