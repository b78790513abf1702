//! `deepspeed doctor`: what would cost a job an hour, found before it starts.
//!
//! ```text
//!   this host                         every host, at the same time
//!      | connect, hello ------------->  agent            can it be reached, with the same deepspeed
//!      | Clock, thrice -------------->  its time         difference, by the middle of the fastest answer
//!      | Facts ---------------------->  versions, cores, memory, GPUs, the folder of the job
//!      | Listen, then Reach --------->  all pairs of hosts, in both directions
//!      | Port (first host) ---------->  where rank 0 would await the others
//!      | Write, then Read ----------->  what one host writes into the shared folder the others see
//!      v
//!   Examination --- judge (pure) ---> findings ---> table or JSON, exit code
//! ```
//!
//! Nothing is left on any host: an agent ends with its connection, and its file in the shared folder with it.

mod examination;
mod examiner;
mod judge;
mod party;
mod question;
mod render;

pub use examination::{Clock, Connected, Examination, HostExamination, Meeting, SharedFolder, examine};
pub use judge::{Finding, Level};

pub(crate) use examiner::Examiner;
pub(crate) use question::{Answer, Question};

use crate::arguments::host_args::HostArgs;
use clap::{Args, ValueHint};
use std::path::PathBuf;

/// The arguments of `deepspeed doctor`.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Which hosts.
    #[command(flatten)]
    pub hosts: HostArgs,

    /// A script that the hosts' shell sources first: the environment with their deepspeed
    #[arg(long = "venv_script", alias = "venv-script", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub venv_script: Option<PathBuf>,

    /// The address at which rank 0 would await the others [default: as a launch chooses it]
    #[arg(long = "master_addr", alias = "master-addr", value_name = "ADDRESS")]
    pub master_addr: Option<String>,

    /// The port for that: must be free on the first host [default: a free one]
    #[arg(long = "master_port", alias = "master-port", value_name = "PORT",
          value_parser = clap::value_parser!(u16).range(1..))]
    pub master_port: Option<u16>,

    /// A folder that all hosts share, for checkpoints: what each host writes there the others must see
    #[arg(long = "shared-folder", alias = "shared_folder", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub shared_folder: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
