//! What one host is asked to run: all that does not depend on the host itself. The host's own plan follows from it there.

use crate::plan::Interpreter;
use crate::resources::filters::Slot;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// The part of a job that falls to one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPart {
    /// The host, as the hostfile or the filters call it.
    pub host: String,
    /// Its place among the hosts.
    pub node_rank: usize,
    /// The number of hosts.
    pub nodes: usize,
    /// The rank of its first rank.
    pub first_rank: usize,
    /// The number of ranks in the job.
    pub world: usize,
    /// Its slots; local rank `i` has `slots[i]`.
    pub slots: Vec<Slot>,
    /// Where rank 0 awaits the others; empty as long as it is not known.
    pub master_addr: String,
    /// The port for that; `None` as long as it is not chosen.
    pub master_port: Option<u16>,
    /// What each rank runs.
    pub program: Program,
    /// Variables of the environment files, and those handed on from the launcher's environment.
    pub env: BTreeMap<String, String>,
    /// Whether each rank is bound to cores of its own, and which are shared out (`--bind_core_list`).
    pub bind_cores: bool,
    /// The cores to share out, as given.
    pub core_list: Option<String>,
    /// The folder for one log file per rank.
    pub rank_log_dir: Option<PathBuf>,
}

/// What each rank runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// How the script is run.
    pub interpreter: Interpreter,
    /// The user's script, module or program, as given.
    pub script: OsString,
    /// What follows it.
    pub args: Vec<OsString>,
    /// Whether `--local_rank=N` is passed to the script.
    pub local_rank: bool,
}

impl HostPart {
    /// Where rank 0 awaits the others, in words.
    pub(crate) fn meeting(&self) -> String {
        let port = self.master_port.map_or_else(|| "(free port)".to_owned(), |port| port.to_string());
        format!("{}:{port}", self.master_addr)
    }
}

impl Program {
    /// The words after the interpreter, or all of them where there is none.
    pub(crate) fn words(&self, local_rank: usize) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        match self.interpreter {
            Interpreter::None => {}
            Interpreter::Script => words.push("-u".into()),
            Interpreter::Module => words.extend(["-u".into(), "-m".into()]),
        }
        words.push(self.script.clone());
        if self.local_rank {
            words.push(format!("--local_rank={local_rank}").into());
        }
        words.extend(self.args.iter().cloned());
        words
    }
}
