//! What a process takes in fact, and how it compares with the plan.

use std::io;

use crate::memory::{Bytes, Plan, Tier};

/// Proportional set size of a process, bytes: memory that several processes share counts for each by its part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// All of it.
    pub total: u64,
    /// The process's own: heaps, tensors, our shards.
    pub anonymous: u64,
    /// Files that are mapped: libraries, checkpoints, shards on a disk.
    pub file: u64,
    /// Shared memory: weights that the ranks of a host share, the ring through which they exchange.
    pub shared: u64,
}

impl Actual {
    /// What came after `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            total: self.total.saturating_sub(before.total),
            anonymous: self.anonymous.saturating_sub(before.anonymous),
            file: self.file.saturating_sub(before.file),
            shared: self.shared.saturating_sub(before.shared),
        }
    }
}

/// Reads a text of `/proc/<pid>/smaps_rollup`. Kernels before 5.4 do not divide the total; it is then all anonymous.
pub fn parse_smaps_rollup(text: &str) -> Option<Actual> {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix("kB")?;
            value.trim().parse::<u64>().ok()?.checked_mul(1024)
        })
    };
    let total = field("Pss")?;
    let part = |name| field(name).unwrap_or(0);
    let anonymous = field("Pss_Anon").unwrap_or(total);
    Some(Actual { total, anonymous, file: part("Pss_File"), shared: part("Pss_Shmem") })
}

/// What this process takes now. The kernel walks its page tables: milliseconds for a large process.
///
/// # Errors
/// The kernel has no `/proc/self/smaps_rollup`, or one that cannot be read.
pub fn actual() -> io::Result<Actual> {
    let text = fs_err::read_to_string("/proc/self/smaps_rollup")?;
    parse_smaps_rollup(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "/proc/self/smaps_rollup does not state a Pss in kB")
    })
}

/// The log line that compares a rank's plan with what it takes. `before` is what the process took before there were a
/// model and an engine (the interpreter, its libraries).
///
/// Pages of files are told apart: they are mostly libraries, whose part of a process changes with every other process
/// that uses them, and the kernel takes them back when memory runs short.
pub fn planned_against_actual(plan: &Plan, before: Actual, now: Actual) -> String {
    let planned = plan.total(Tier::Host).per_rank;
    let ours = now.since(before);
    let in_use = ours.anonymous + ours.shared;
    let difference = match planned {
        0 => String::new(),
        planned => {
            let share = (in_use as f64 - planned as f64) / planned as f64;
            format!(" ({:+.0}%)", 100.0 * share)
        }
    };
    format!(
        "host memory of this rank: {} planned, {} in use{difference}: {} of its own, {} shared; besides {} of files, and \
         {} from before the engine",
        Bytes(planned),
        Bytes(in_use),
        Bytes(ours.anonymous),
        Bytes(ours.shared),
        Bytes(ours.file),
        Bytes(before.total),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Amount, Kind, Row};

    const ROLLUP: &str = "560351086000-7ffdb72a8000 ---p 00000000 00:00 0                          [rollup]\n\
        Rss:                1764 kB\nPss:                 288 kB\nPss_Dirty:           112 kB\nPss_Anon:            112 kB\n\
        Pss_File:            146 kB\nPss_Shmem:            30 kB\nSwapPss:               0 kB\n";

    #[test]
    fn the_proportional_set_size_and_its_parts() {
        let expected = Actual { total: 288 << 10, anonymous: 112 << 10, file: 146 << 10, shared: 30 << 10 };
        assert_eq!(parse_smaps_rollup(ROLLUP), Some(expected));
        assert_eq!(parse_smaps_rollup("Rss: 5 kB\n"), None);
        assert_eq!(parse_smaps_rollup("Pss: 5 kB\n").unwrap().anonymous, 5 << 10);
    }

    #[test]
    fn memory_that_is_written_is_seen() {
        let before = actual().unwrap();
        let bytes = vec![1u8; 64 << 20];
        let now = actual().unwrap();
        assert!(now.since(before).anonymous > 60 << 20, "{before:?} {now:?}");
        assert_eq!(bytes[bytes.len() - 1], 1);
    }

    #[test]
    fn the_line_of_the_log() {
        let amount = Amount { per_rank: 100 << 20, per_host: 200 << 20 };
        let plan =
            Plan { rows: vec![Row { kind: Kind::Weights, tier: Tier::Host, amount }], ranks_per_host: 2 };
        let before = Actual { total: 300 << 20, anonymous: 200 << 20, file: 100 << 20, shared: 0 };
        let now = Actual { total: 405 << 20, anonymous: 280 << 20, file: 100 << 20, shared: 25 << 20 };
        assert_eq!(
            planned_against_actual(&plan, before, now),
            "host memory of this rank: 100.00 MiB planned, 105.00 MiB in use (+5%): 80.00 MiB of its own, 25.00 MiB \
             shared; besides 0 B of files, and 300.00 MiB from before the engine"
        );
    }
}
