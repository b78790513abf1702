//! One process's place among all.

use crate::DiscoveryError;
use std::collections::HashMap;

/// The variables of a process.
pub type Environment = HashMap<String, String>;

/// One process's place: its rank of how many, its number on its host, and where rank 0 listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// 0 to `size - 1`.
    pub rank: u32,
    /// The number of ranks, at least 1.
    pub size: u32,
    /// The rank among those of this host; `None` where the environment does not say.
    pub local_rank: Option<u32>,
    /// The number of ranks on this host, where known.
    pub local_size: Option<u32>,
    /// Host name or address of rank 0; `None` for a world of one that needs none, and where it is unknown.
    pub master_addr: Option<String>,
    /// The port there.
    pub master_port: u16,
    /// Who said so, in words.
    pub source: &'static str,
    /// Further variables that the place calls for.
    pub extra: Vec<(&'static str, &'static str)>,
    /// How a variable gets to every rank with this source, for messages: ` (mpirun -x ...)` or empty.
    pub(crate) how: &'static str,
}

impl World {
    /// A world of one, met by nobody.
    pub fn alone() -> Self {
        Self {
            rank: 0,
            size: 1,
            local_rank: Some(0),
            local_size: Some(1),
            master_addr: None,
            master_port: 0,
            source: "no launcher: a world of one",
            extra: Vec::new(),
            how: "",
        }
    }

    /// From the host name of every rank, as MPI gives them, and an address of rank 0's host for the others.
    ///
    /// # Errors
    /// A rank that is not among them.
    pub fn from_hosts(
        rank: usize,
        hosts: &[String],
        master_addr: String,
        master_port: u16,
    ) -> Result<Self, DiscoveryError> {
        let Some(host) = hosts.get(rank) else {
            return Err(DiscoveryError::NoSuchRank { rank, ranks: hosts.len() });
        };
        let one_host = hosts.iter().all(|other| other == host);
        let on_this_host = |hosts: &[String]| hosts.iter().filter(|other| *other == host).count() as u32;
        Ok(Self {
            rank: rank as u32,
            size: hosts.len() as u32,
            local_rank: Some(on_this_host(&hosts[..rank])),
            local_size: Some(on_this_host(hosts)),
            master_addr: Some(if one_host { "127.0.0.1".to_owned() } else { master_addr }),
            master_port,
            source: "mpi4py",
            extra: Vec::new(),
            how: "",
        })
    }

    /// Whether several ranks must meet at an address that the environment does not give.
    pub fn needs_master(&self) -> bool {
        self.size > 1 && self.master_addr.is_none()
    }

    /// An error, with what to do, where [`World::needs_master`].
    ///
    /// # Errors
    /// Several ranks, and nobody says where rank 0 is.
    pub fn require_master(&self) -> Result<(), DiscoveryError> {
        if !self.needs_master() {
            return Ok(());
        }
        Err(DiscoveryError::NoMaster {
            rank: self.rank,
            size: self.size,
            source_name: self.source,
            how: self.how,
        })
    }

    /// The variables by which every library finds its place: RANK, WORLD_SIZE and what else is known.
    pub fn environment(&self) -> Environment {
        let mut out = Environment::from([
            ("RANK".to_owned(), self.rank.to_string()),
            ("WORLD_SIZE".to_owned(), self.size.to_string()),
        ]);
        let optional = [
            ("LOCAL_RANK", self.local_rank.map(|n| n.to_string())),
            ("LOCAL_SIZE", self.local_size.map(|n| n.to_string())),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_addr.as_ref().map(|_| self.master_port.to_string())),
        ];
        out.extend(optional.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        out.extend(self.extra.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        out
    }
}
