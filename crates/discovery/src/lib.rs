//! Who a process is among its ranks, where no `deepspeed` command started it: read from what MPI, Slurm and the clouds leave in the
//! environment of each of their processes.
//!
//! ```text
//!   environment --- discover ---> World: rank, size, place on the host, where rank 0 listens, and who said so
//!                      |
//!        RANK, WORLD_SIZE, MASTER_ADDR          a launcher's own variables
//!        AzureML, SageMaker                     Open MPI's ranks, the cloud's word on the first host
//!        Open MPI, MVAPICH, PMI, PMIx, Slurm    ranks; the first host where it follows from them
//! ```
//!
//! Pure functions of a map of variables. Whoever calls them passes `os.environ`, and acts on the answer.

#![forbid(unsafe_code)]

pub mod nodelist;
mod sources;
mod world;

pub use sources::discover;
pub use world::{Environment, World};

/// What an environment says that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// A variable that should hold a number and does not.
    #[error("{name} is {value:?}, expected {expected}")]
    Number {
        /// The variable.
        name: String,
        /// Its value.
        value: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A rank that is not below the number of ranks.
    #[error("{rank_name} is {rank} and {size_name} is {size}: a rank is below the number of ranks")]
    Rank {
        /// The variable with the rank.
        rank_name: String,
        /// The rank.
        rank: u32,
        /// The variable with the number of ranks.
        size_name: String,
        /// The number of ranks.
        size: u32,
    },
    /// Some of a launcher's variables, but not all.
    #[error(
        "WORLD_SIZE is {world}, but {missing} not set: a launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and \
         MASTER_PORT for every rank (start the job with the deepspeed command), and a single process needs none of them"
    )]
    Incomplete {
        /// The number of ranks.
        world: u32,
        /// The names of what is missing, and the verb.
        missing: String,
    },
    /// An address that is no `HOST:PORT`.
    #[error("{name} is {value:?}, expected HOST:PORT")]
    Address {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// A list of hosts or counts that cannot be read.
    #[error("the Slurm list `{list}` cannot be read: {what}")]
    List {
        /// The list, cut to a bearable length.
        list: String,
        /// What is wrong with it.
        what: String,
    },
    /// A rank that is not among the hosts of all ranks.
    #[error("rank {rank} is not among {ranks} hosts")]
    NoSuchRank {
        /// The rank.
        rank: usize,
        /// The number of hosts given.
        ranks: usize,
    },
    /// Nobody says where rank 0 is.
    #[error(
        "rank {rank} of {size} (from {source_name}) does not know where rank 0 is: set MASTER_ADDR to the host of rank 0 \
         for every rank{how}, or install mpi4py, or start the job with the deepspeed command"
    )]
    NoMaster {
        /// The rank.
        rank: u32,
        /// The number of ranks.
        size: u32,
        /// Who said so.
        source_name: &'static str,
        /// How that variable gets to every rank, in parentheses, or empty.
        how: &'static str,
    },
}
