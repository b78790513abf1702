//! A plan in words: what `--dry_run` prints.

use crate::oversight::report::ranks;
use crate::plan::cores::list_cores;
use crate::plan::hosts_plan::HostsPlan;
use crate::plan::{Interpreter, LaunchPlan, Note, Plan, SECRET_VARIABLE};
use crate::reach::runner::Runner;
use crate::reach::words::{join, quote};
use crate::resources::Device;
use crate::resources::filters::list_slots;
use std::ffi::OsStr;
use std::fmt;

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", if self.warning { "warning" } else { "note" }, self.text)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Plan::Here(plan) => plan.fmt(f),
            Plan::Hosts(plan) => plan.fmt(f),
        }
    }
}

impl fmt::Display for HostsPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary())?;
        self.notes.iter().try_for_each(|note| writeln!(f, "{note}"))?;
        let Some(first) = self.parts.first() else { return Ok(()) };
        writeln!(f, "\nevery rank gets, in the folder {}", quote(self.folder.as_os_str()))?;
        for (name, value) in &first.env {
            writeln!(f, "  {name}={}", quote(OsStr::new(value)))?;
        }
        writeln!(f, "  WORLD_SIZE={} CROSS_SIZE={}", self.world(), self.parts.len())?;
        let (addr, port) = self.meeting();
        writeln!(f, "  MASTER_ADDR={addr}\n  MASTER_PORT={port}")?;
        writeln!(f, "  {SECRET_VARIABLE}=(random, new for each job; sent through the connection)")?;
        writeln!(
            f,
            "  and what its host decides: CUDA_VISIBLE_DEVICES where it has GPUs, OMP_NUM_THREADS, cores"
        )?;
        let is_for_all = self.runner != Runner::Ssh;
        if is_for_all {
            writeln!(
                f,
                "\nan agent on each host is started by one line, and calls back at ADDRESS:PORT, which are this machine's; they \
                         and FINGERPRINT are new for each job"
            )?;
            self.connections.iter().try_for_each(|line| writeln!(f, "  {}", join(line)))?;
        }
        for (at, part) in self.parts.iter().enumerate() {
            writeln!(f, "\nhost {}: slots {}", part.host, list_slots(&part.slots))?;
            if let Some(line) = self.connections.get(at).filter(|_| !is_for_all) {
                writeln!(f, "  {}", join(line))?;
            }
            for local_rank in 0..part.slots.len() {
                let rank = part.first_rank + local_rank;
                let python =
                    if part.program.interpreter == Interpreter::None { "" } else { "(the host's python) " };
                writeln!(
                    f,
                    "  RANK={rank} LOCAL_RANK={local_rank} LOCAL_SIZE={} CROSS_RANK={}: {python}{}",
                    part.slots.len(),
                    part.node_rank,
                    join(&part.program.words(local_rank))
                )?;
            }
            if let Some(folder) = &part.rank_log_dir {
                let last = part.first_rank + part.slots.len();
                let list: Vec<usize> = (part.first_rank..last).collect();
                writeln!(f, "  output of {} also in {} on this host", ranks(&list), folder.display())?;
            }
        }
        Ok(())
    }
}

impl HostsPlan {
    /// Where the ranks meet, in words.
    fn meeting(&self) -> (String, String) {
        let Some(first) = self.parts.first() else { return Default::default() };
        let addr = match first.master_addr.as_str() {
            "" => format!("(address of {}, as the hosts reach it)", first.host),
            address => address.to_owned(),
        };
        let port = first.master_port.map_or_else(
            || format!("(a free port of {}, chosen at the start)", first.host),
            |port| port.to_string(),
        );
        (addr, port)
    }

    /// The plan in one line.
    pub fn summary(&self) -> String {
        let hosts: Vec<String> =
            self.parts.iter().map(|part| format!("{} ({})", part.host, part.slots.len())).collect();
        let count = hosts.len();
        format!(
            "{} ranks on {count} host{} by {}: {}",
            self.world(),
            if count == 1 { "" } else { "s" },
            self.runner,
            hosts.join(", ")
        )
    }
}

impl fmt::Display for LaunchPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary())?;
        self.notes.iter().try_for_each(|note| writeln!(f, "{note}"))?;
        writeln!(f, "\nevery rank gets")?;
        let Some(first) = self.ranks.first() else { return Ok(()) };
        let is_shared = |name: &String, value: &String| {
            !matches!(name.as_str(), "RANK" | "LOCAL_RANK")
                && self.ranks.iter().all(|rank| rank.env.get(name) == Some(value))
        };
        for (name, value) in &first.env {
            if is_shared(name, value) {
                writeln!(f, "  {name}={}", quote(OsStr::new(value)))?;
            }
        }
        if self.master_port.is_none() {
            writeln!(f, "  MASTER_PORT=(a free port, chosen at the start)")?;
        }
        if self.ranks.len() == self.world {
            writeln!(f, "  {SECRET_VARIABLE}=(random, new for each job)")?;
        }
        for rank in &self.ranks {
            write!(f, "\nrank {}", rank.rank)?;
            if let Some(cores) = &rank.cores {
                write!(f, ", bound to cores {}", list_cores(cores))?;
            }
            if let Some(folder) = &self.rank_log_dir {
                write!(
                    f,
                    ", output also in {}",
                    folder.join(format!("(time)_rank{}.log", rank.rank)).display()
                )?;
            }
            f.write_str("\n ")?;
            for (name, value) in rank.env.iter().filter(|(name, value)| !is_shared(name, value)) {
                write!(f, " {name}={}", quote(OsStr::new(value)))?;
            }
            writeln!(f, "\n  {}", join(&rank.command))?;
        }
        Ok(())
    }
}

impl LaunchPlan {
    /// The plan in one line: how many ranks, on what, meeting where.
    pub fn summary(&self) -> String {
        let world = self.ranks.len();
        let ranks = if self.world == 1 { "rank" } else { "ranks" };
        let slots = match self.device {
            Device::Gpu => {
                format!("GPU{} {}", if self.slots.len() == 1 { "" } else { "s" }, list_slots(&self.slots))
            }
            Device::Cpu => format!("{} CPU core{}", self.cores, if self.cores == 1 { "" } else { "s" }),
        };
        let port = self.master_port.map_or_else(|| "(free port)".to_owned(), |port| port.to_string());
        let of = if world == self.world { String::new() } else { format!(" of {}", self.world) };
        format!("{world}{of} {ranks} on {} ({slots}), meeting at {}:{port}", self.host, self.master_addr)
    }
}
