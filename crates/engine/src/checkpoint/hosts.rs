//! Checkpoints on storage that hosts do not share: who is where, and bringing files from where they are.
//!
//! ```text
//! host a: ranks 0, 1          TAG/manifest.json  (all files, `host.ranks` [0, 1])   files of ranks 0 and 1
//! host b: ranks 2, 3          TAG/manifest.json  (all files, `host.ranks` [2, 3])   files of ranks 2 and 3
//!
//! load: which tag do all hosts have, of one and the same save?
//!       what does each rank need that its host lacks?  ->  the host that has it sends it over the group, piece by piece
//! ```

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use deepspeed_checkpoint::{Checkpoint, Chosen, FileRecord, Manifest, complete_tags, kind, peers_folder};
use deepspeed_comm::CommError;
use deepspeed_core::Rank;
use serde::{Deserialize, Serialize};

use super::agree::agree;
use crate::{Engine, EngineError, OptimizerChoice};

/// Bytes of a file that are sent at a time.
const PIECE: usize = 8 << 20;

/// The ranks by host.
#[derive(Debug)]
pub(super) struct Hosts {
    /// By rank, the first rank of its host.
    lead: Vec<usize>,
}

impl Hosts {
    /// The first rank of the host of `rank`.
    pub(super) fn lead(&self, rank: Rank) -> usize {
        self.lead[rank.index()]
    }

    /// The ranks of the host whose first rank is `lead`.
    pub(super) fn ranks_of(&self, lead: usize) -> Vec<usize> {
        (0..self.lead.len()).filter(|rank| self.lead[*rank] == lead).collect()
    }
}

/// A checkpoint that a host has a part of.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct Part {
    tag: String,
    save: String,
    saved_at_ms: u64,
    save_latest: bool,
}

impl Engine {
    /// Who is where; all on one host where the storage is shared. Collective where it is not.
    pub(super) fn hosts(&self) -> Result<Hosts, CommError> {
        if !self.settings.saving.node_local {
            return Ok(Hosts { lead: vec![0; self.group.world()] });
        }
        let own = self.settings.saving.host.clone();
        let own = own.unwrap_or_else(|| {
            let name = fs::read_to_string("/proc/sys/kernel/hostname");
            // Without a name all ranks count as one host, and a folder that is not shared is an error of the save.
            name.map(|name| name.trim().to_owned()).unwrap_or_default()
        });
        let names = self.group.all_gather_bytes("names of the hosts", own.as_bytes())?;
        let first = |name: &Vec<u8>| names.iter().position(|other| other == name).unwrap_or(0);
        Ok(Hosts { lead: names.iter().map(first).collect() })
    }

    /// The checkpoint that all hosts have: `tag`, or the newest. Collective.
    ///
    /// # Errors
    /// [`EngineError::Usage`] if `tag`, or any at all, is not on all hosts.
    pub(super) fn choose_on_all_hosts(
        &self,
        dir: &Path,
        tag: Option<&str>,
        except: &[(String, String)],
    ) -> Result<Option<Chosen>, EngineError> {
        let group = &*self.group;
        let mine = parts_here(dir).map_err(|error| error.to_string());
        let (_, all) = agree(group, "checkpoints of the hosts", mine, |parts| {
            serde_json::to_vec(parts).expect("invariant: names and numbers serialise to JSON")
        })?;
        let all: Vec<Vec<Part>> =
            all.iter().map(|bytes| serde_json::from_slice(bytes).unwrap_or_default()).collect();
        let same = |a: &Part, b: &Part| a.tag == b.tag && a.save == b.save;
        let everywhere = |part: &&Part| all.iter().all(|parts| parts.iter().any(|other| same(part, other)));
        let usable = |part: &&Part| except.iter().all(|(tag, _)| *tag != part.tag);
        // Newest first, as rank 0 sees them.
        let common: Vec<&Part> = all[0].iter().filter(everywhere).filter(usable).collect();
        let wanted = match tag {
            Some(tag) => common.iter().find(|part| part.tag == tag),
            None => common.iter().find(|part| part.save_latest).or(common.first()),
        };
        if let Some(part) = wanted {
            let newer = all.iter().flatten().find(|it| it.save_latest && it.saved_at_ms > part.saved_at_ms);
            let newer = newer.filter(|it| it.tag != part.tag);
            let damaged = except.last().map(|(tag, problem)| format!(" (`{tag}` cannot be used: {problem})"));
            let missing = newer.map(|it| format!(" (`{}` is not complete on every host)", it.tag));
            let reason = damaged.or(missing);
            return Ok(Some(Chosen {
                tag: part.tag.clone(),
                why: format!("the newest that every host has{}", reason.clone().unwrap_or_default()),
                unexpected: reason.is_some(),
            }));
        }
        if tag.is_none() && except.is_empty() && all.iter().all(Vec::is_empty) {
            return Ok(None);
        }
        let lacking =
            all.iter().position(|parts| tag.is_none_or(|tag| parts.iter().all(|part| part.tag != tag)));
        Err(EngineError::Usage(format!(
            "no host-local checkpoint {}in {} can be loaded{}: each host needs its part of one and the same save; copy the \
             folder with its manifest to a host that has none",
            tag.map_or_else(String::new, |tag| format!("`{tag}` ")),
            dir.display(),
            lacking.map_or_else(String::new, |rank| format!(" (the host of rank {rank} lacks it)")),
        )))
    }

    /// Brings the files of `tag` that a rank of this host needs and the host does not have. Collective.
    pub(super) fn bring_files(&self, dir: &Path, tag: &str) -> Result<(), EngineError> {
        let group = &*self.group;
        let hosts = self.hosts()?;
        let (lead, rank) = (hosts.lead(group.rank()), group.rank().index());
        let opened = Checkpoint::open(dir, Some(tag));
        let (checkpoint, _) = agree(group, "checkpoint of the host", opened, |_| Vec::new())?;
        let Some(checkpoint) = checkpoint else { return Ok(()) };
        let manifest = checkpoint.manifest();
        let mine: Vec<u8> = manifest
            .files
            .iter()
            .map(|file| u8::from(self.needs(file, manifest)) << 1 | u8::from(manifest.is_here(file)))
            .collect();
        let all = group.all_gather_bytes("files of the hosts", &mine)?;
        let peers = peers_folder(dir, tag);
        let mut made = Ok(());
        if rank == lead {
            made = match fs::remove_dir_all(&peers) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => fs::create_dir_all(&peers),
            };
        }
        let mut written: io::Result<()> = made;
        for (index, file) in manifest.files.iter().enumerate() {
            let state = |rank: usize| all[rank].get(index).copied().unwrap_or_default();
            let lacks = |rank: usize| state(rank) == 0b10;
            if !(0..all.len()).any(lacks) {
                continue;
            }
            let Some(owner) = (0..all.len()).find(|rank| state(*rank) & 1 == 1) else {
                return Err(EngineError::Usage(format!(
                    "{} of checkpoint `{tag}` is on none of the hosts of this job: copy it from the host of rank {} of the \
                     job that saved it",
                    file.name, file.rank
                )));
            };
            let keeps = rank == lead && hosts.ranks_of(lead).into_iter().any(lacks);
            let arrived = self.send(&checkpoint, file, owner, keeps.then_some(&*peers))?;
            written = written.and(arrived);
        }
        agree(group, "files from other hosts", written, |()| Vec::new()).map(drop)
    }

    /// Sends a file from `owner` to all ranks; this one keeps it in `target`, if there is one. What goes wrong with that
    /// is the inner error, so that the others are not left waiting.
    fn send(
        &self,
        checkpoint: &Checkpoint,
        file: &FileRecord,
        owner: usize,
        target: Option<&Path>,
    ) -> Result<io::Result<()>, EngineError> {
        let owns = self.group.rank().index() == owner;
        let mut source = owns.then(|| File::open(checkpoint.folder().join(&file.name)));
        let mut target = target.map(|folder| File::create(folder.join(&file.name)));
        let mut left = file.bytes;
        while left > 0 {
            let bytes = usize::try_from(left).unwrap_or(usize::MAX).min(PIECE);
            let piece = match &mut source {
                Some(Ok(source)) => read_piece(source, bytes).map_err(|error| error.to_string()),
                Some(Err(error)) => Err(error.to_string()),
                None => Ok(Vec::new()),
            };
            let piece = piece.map_err(|error| format!("cannot read {}: {error}", file.name));
            let (_, pieces) = agree(&*self.group, "a file of another host", piece, Vec::clone)?;
            if let Some(Ok(file)) = &mut target
                && let Err(error) = file.write_all(&pieces[owner])
            {
                target = Some(Err(error));
            }
            left -= bytes as u64;
        }
        Ok(target.map_or(Ok(()), |written| written.map(drop)))
    }

    /// Whether this rank will read anything of a file.
    fn needs(&self, file: &FileRecord, manifest: &Manifest) -> bool {
        let rank = self.group.rank();
        let blobs_of = if rank.index() < manifest.world { rank.index() } else { 0 };
        if !file.tensors.is_empty() || (!file.blobs.is_empty() && file.rank == blobs_of) {
            return true;
        }
        let client = matches!(self.optimizer, OptimizerChoice::Client { .. });
        let own: HashSet<(&str, usize, usize)> = self
            .layout
            .units
            .iter()
            .flat_map(|unit| unit.fragments(unit.shard(rank)))
            .map(|it| {
                let name = self.layout.param(it.param).name.as_str();
                (name, it.param_offset, it.param_offset + it.len)
            })
            .collect();
        file.slices.iter().any(|slice| {
            if slice.kind == kind::WEIGHT {
                return true;
            }
            let (start, end) = (slice.start, slice.start + slice.len);
            let overlaps =
                |(name, from, to): &(&str, usize, usize)| *name == slice.param && *from < end && start < *to;
            // fp32 weights are read from masters, whole.
            let whole = client || slice.kind == kind::MASTER;
            whole || own.iter().any(overlaps)
        })
    }
}

/// The complete parts in `dir`, newest first.
fn parts_here(dir: &Path) -> Result<Vec<Part>, deepspeed_checkpoint::CheckpointError> {
    let mut parts = Vec::new();
    for complete in complete_tags(dir)? {
        // One that goes while it is looked at is not there.
        let Ok(Some(checkpoint)) = Checkpoint::open(dir, Some(&complete.tag)) else { continue };
        // A checkpoint of shared storage is whole on every host that has it.
        let save = match &checkpoint.manifest().host {
            Some(host) => host.save.clone(),
            None => format!("whole, saved at {}", complete.saved_at_ms),
        };
        let (saved_at_ms, save_latest) = (complete.saved_at_ms, complete.save_latest);
        parts.push(Part { tag: complete.tag, save, saved_at_ms, save_latest });
    }
    Ok(parts)
}

fn read_piece(source: &mut File, bytes: usize) -> io::Result<Vec<u8>> {
    let mut piece = vec![0; bytes];
    source.read_exact(&mut piece)?;
    Ok(piece)
}
