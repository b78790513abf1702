//! A plan in words: what `--dry_run` prints.

use crate::cores::list_cores;
use crate::filters::list_slots;
use crate::plan::{LaunchPlan, SECRET_VARIABLE};
use crate::resources::Device;
use std::ffi::OsStr;
use std::fmt;

impl fmt::Display for LaunchPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary())?;
        for note in &self.notes {
            writeln!(f, "{}: {}", if note.warning { "warning" } else { "note" }, note.text)?;
        }
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
        writeln!(f, "  {SECRET_VARIABLE}=(random, new for each job)")?;
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
            f.write_str("\n ")?;
            for word in &rank.command {
                write!(f, " {}", quote(word))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl LaunchPlan {
    /// The plan in one line: how many ranks, on what, meeting where.
    pub fn summary(&self) -> String {
        let world = self.world_size();
        let ranks = if world == 1 { "rank" } else { "ranks" };
        let slots = match self.device {
            Device::Gpu => {
                format!("GPU{} {}", if self.slots.len() == 1 { "" } else { "s" }, list_slots(&self.slots))
            }
            Device::Cpu => format!("{} CPU core{}", self.cores, if self.cores == 1 { "" } else { "s" }),
        };
        let port = self.master_port.map_or_else(|| "(free port)".to_owned(), |port| port.to_string());
        format!("{world} {ranks} on {} ({slots}), meeting at {}:{port}", self.host, self.master_addr)
    }
}

/// A word as a shell would need it.
pub(crate) fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let is_plain = |c: char| c.is_alphanumeric() || "_@%+=:,./-".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
