//! What a host offers to a job: read from the kernel's files, the environment and packages' metadata. Imports nothing, opens no device
//! and takes well under a second; `deepspeed report` prints it, and `deepspeed doctor` compares it between hosts.

mod cpu;
mod gpus;
mod limits;
mod python;
mod variables;

pub use cpu::CpuFacts;
pub use gpus::{Gpu, GpuFacts};
pub use limits::{FileSystemFacts, LimitFacts, MemoryFacts};
pub use python::{Package, PythonFacts, TorchFacts};

use crate::plan::surroundings::{Surroundings, find_on_path};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Programs that start jobs or look at devices.
const PROGRAMS: [&str; 7] = ["ssh", "pdsh", "mpirun", "srun", "numactl", "nvidia-smi", "ninja"];

/// The facts of one host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// What the host calls itself.
    pub hostname: String,
    /// The address that its own name stands for there, if it stands for any.
    pub own_address: Option<String>,
    /// The distribution and the kernel.
    pub system: String,
    /// The version of this command.
    pub version: String,
    /// Where this command lies.
    pub program: PathBuf,
    /// Processor and kernels.
    pub cpu: CpuFacts,
    /// Memory that a job can take.
    pub memory: MemoryFacts,
    /// `/dev/shm`; `None` where there is none.
    pub shm: Option<FileSystemFacts>,
    /// Limits of processes.
    pub limits: LimitFacts,
    /// Why io_uring cannot be used; `None` where it can.
    pub io_uring_refused: Option<String>,
    /// NVIDIA GPUs.
    pub gpus: GpuFacts,
    /// The python that ranks run with.
    pub python: Option<PythonFacts>,
    /// Why there is none.
    pub python_problem: Option<String>,
    /// Programs by name, with their paths where they are installed.
    pub programs: BTreeMap<String, Option<PathBuf>>,
    /// Variables that matter to a job; values that look like secrets are hidden.
    pub environment: BTreeMap<String, String>,
    /// Environment files, each with the names that it sets.
    pub env_files: Vec<(PathBuf, Vec<String>)>,
}

impl HostFacts {
    /// Reads the facts of this host, as this process sees it. What cannot be read is left out.
    pub fn read() -> Self {
        let surroundings = Surroundings::of_host(false).unwrap_or_default();
        let hostname = surroundings.hostname.clone();
        let python = match &surroundings.python {
            Some(python) => PythonFacts::read(python),
            None => Err("no python beside this command, in VIRTUAL_ENV or on PATH".to_owned()),
        };
        Self {
            own_address: own_address(&hostname),
            hostname,
            system: system(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            program: std::env::current_exe().unwrap_or_default(),
            cpu: CpuFacts::read(&surroundings),
            memory: MemoryFacts::read(),
            shm: FileSystemFacts::of(Path::new("/dev/shm")),
            limits: LimitFacts::read(),
            io_uring_refused: deepspeed_offload::probe_io_uring().err(),
            gpus: GpuFacts::read(Path::new("/"), surroundings.gpus),
            python_problem: python.as_ref().err().cloned(),
            python: python.ok(),
            programs: PROGRAMS.iter().map(|name| ((*name).to_owned(), find_on_path(name))).collect(),
            environment: variables::relevant(),
            env_files: variables::files(),
        }
    }

    /// The path of an installed program.
    pub fn program_path(&self, name: &str) -> Option<&Path> {
        self.programs.get(name)?.as_deref()
    }
}

/// The address that a name stands for on this host.
fn own_address(hostname: &str) -> Option<String> {
    use std::net::ToSocketAddrs;
    let mut addresses = (hostname, 0).to_socket_addrs().ok()?;
    addresses.next().map(|address| address.ip().to_string())
}

/// `Debian GNU/Linux 13, Linux 6.1.0`.
fn system() -> String {
    let kernel = rustix::system::uname();
    let kernel = format!("{} {}", kernel.sysname().to_string_lossy(), kernel.release().to_string_lossy());
    let release = fs_err::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    match name {
        Some(name) => format!("{}, {kernel}", name.trim_matches('"')),
        None => kernel,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_facts_that_travel() {
        let facts = HostFacts::read();
        assert!(!facts.hostname.is_empty() && facts.cpu.cores > 0);
        assert!(facts.memory.free > 0 && facts.memory.free <= facts.memory.total);
        let text = serde_json::to_string(&facts).unwrap();
        let back: HostFacts = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
    }
}
