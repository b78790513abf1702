//! The processes that descend from this one, found in `/proc`: what the ranks may leave behind.

use fs_err as fs;
use rustix::process::Pid;

/// All living descendants of `ancestor`, zombies left out.
pub(crate) fn of(ancestor: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let processes: Vec<(i32, i32, bool)> = entries
        .flatten()
        .filter_map(|entry| {
            entry.file_name().to_str()?.parse::<i32>().ok()?;
            parse_stat(&fs::read_to_string(entry.path().join("stat")).ok()?)
        })
        .collect();
    let mut family = vec![ancestor.as_raw_nonzero().get()];
    let mut at = 0;
    while at < family.len() {
        let parent = family[at];
        family.extend(processes.iter().filter(|(_, of, _)| *of == parent).map(|(pid, ..)| *pid));
        at += 1;
    }
    let is_alive = |pid: &i32| processes.iter().any(|(known, _, zombie)| known == pid && !zombie);
    family.into_iter().skip(1).filter(is_alive).filter_map(Pid::from_raw).collect()
}

/// Process, parent and whether it is a zombie, from `/proc/<pid>/stat`; the name in parentheses may hold anything.
fn parse_stat(stat: &str) -> Option<(i32, i32, bool)> {
    let pid = stat.split_whitespace().next()?.parse().ok()?;
    let mut rest = stat.rsplit_once(')')?.1.split_whitespace();
    let state = rest.next()?;
    Some((pid, rest.next()?.parse().ok()?, matches!(state, "Z" | "X")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses() {
        assert_eq!(parse_stat("12 (a) b) S 1 12 12 0"), Some((12, 1, false)));
        assert_eq!(parse_stat("12 (x) Z 7 12"), Some((12, 7, true)));
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_child_is_found() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let found = of(rustix::process::getpid()).contains(&pid);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found);
    }
}
