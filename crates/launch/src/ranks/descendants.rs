//! Processes found in `/proc`: those that descend from this one, and those that were started with a given environment. It is what ranks may
//! leave behind.

use fs_err as fs;
use rustix::process::Pid;

/// A process, as `/proc/<pid>/stat` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    is_zombie: bool,
}

/// All living descendants of `ancestor`, zombies left out.
pub(crate) fn of(ancestor: Pid) -> Vec<Pid> {
    let processes = all();
    let ancestor = ancestor.as_raw_nonzero().get();
    living(&processes, family(&processes, vec![ancestor]).into_iter().filter(|pid| *pid != ancestor))
}

/// All living processes, but for this one, that have this entry (`NAME=value`) in the environment that they were started with, and their
/// descendants.
pub(crate) fn marked(entry: &[u8]) -> Vec<Pid> {
    let processes = all();
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let is_marked = |pid: i32| {
        // Processes of other users do not show theirs, and are not of this job.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|one| one == entry)
    };
    let roots: Vec<i32> = processes.iter().map(|process| process.pid).filter(|pid| is_marked(*pid)).collect();
    living(&processes, family(&processes, roots).into_iter().filter(|pid| *pid != own))
}

fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            entry.file_name().to_str()?.parse::<i32>().ok()?;
            parse_stat(&fs::read_to_string(entry.path().join("stat")).ok()?)
        })
        .collect()
}

/// These processes and all that descend from them, each once.
fn family(processes: &[Process], roots: Vec<i32>) -> Vec<i32> {
    let mut family = roots;
    let mut at = 0;
    while at < family.len() {
        let parent = family[at];
        for process in processes.iter().filter(|process| process.parent == parent) {
            if !family.contains(&process.pid) {
                family.push(process.pid);
            }
        }
        at += 1;
    }
    family
}

fn living(processes: &[Process], pids: impl Iterator<Item = i32>) -> Vec<Pid> {
    let is_alive = |pid: &i32| processes.iter().any(|known| known.pid == *pid && !known.is_zombie);
    pids.filter(is_alive).filter_map(Pid::from_raw).collect()
}

/// The name in parentheses may hold anything.
fn parse_stat(stat: &str) -> Option<Process> {
    let pid = stat.split_whitespace().next()?.parse().ok()?;
    let mut rest = stat.rsplit_once(')')?.1.split_whitespace();
    let state = rest.next()?;
    Some(Process { pid, parent: rest.next()?.parse().ok()?, is_zombie: matches!(state, "Z" | "X") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses() {
        let process = |pid, parent, is_zombie| Some(Process { pid, parent, is_zombie });
        assert_eq!(parse_stat("12 (a) b) S 1 12 12 0"), process(12, 1, false));
        assert_eq!(parse_stat("12 (x) Z 7 12"), process(12, 7, true));
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_child_is_found_by_its_parent_and_by_its_environment() {
        let mut child =
            std::process::Command::new("sleep").arg("60").env("DS_TEST_MARK", "a b").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let found = [
            of(rustix::process::getpid()).contains(&pid),
            marked(b"DS_TEST_MARK=a b").contains(&pid),
            marked(b"DS_TEST_MARK=a").contains(&pid),
        ];
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, [true, true, false]);
    }
}
