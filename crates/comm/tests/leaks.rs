//! Nothing is left behind, whoever is killed. Alone in its program, because it counts the process's files.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use deepspeed_comm::{Group, Segment};
use support::{options, role, run_threads, say, spawn_ranks};

fn open_segments() -> usize {
    let files = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
    links.filter(|link| link.to_string_lossy().contains("deepspeed-comm")).count()
}

fn mapped_segments() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("deepspeed-comm")).count()
}

fn named_segments() -> usize {
    let files = std::fs::read_dir("/dev/shm").into_iter().flatten();
    files
        .filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().contains("deepspeed-comm"))
        .count()
}

#[test]
fn child() {
    if let Some((_, group)) = role(&options()) {
        group.barrier("start").unwrap();
        say("started");
        let error = loop {
            if let Err(error) = group.barrier("work") {
                break error;
            }
        };
        say(error);
    } else {
        leaves_nothing();
    }
}

fn leaves_nothing() {
    let segment = Segment::create(2, &options()).unwrap();
    assert_eq!((open_segments(), mapped_segments()), (1, 1));
    let mut ranks = spawn_ranks(&segment, "killed");
    for rank in &ranks {
        assert_eq!(rank.line(), "started");
    }
    ranks.iter_mut().for_each(support::RankProcess::kill);
    for rank in &mut ranks {
        assert!(!rank.wait().success());
    }
    drop(segment);
    run_threads(2, &options(), |group| group.barrier("start").unwrap());
    assert_eq!((open_segments(), mapped_segments(), named_segments()), (0, 0, 0));
}
