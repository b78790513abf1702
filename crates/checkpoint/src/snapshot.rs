//! A copy in memory of what a rank has to save, so that training goes on while the copy is written.

use std::{
    borrow::Cow,
    fmt, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use deepspeed_core::Rank;
use memmap2::{Advice, MmapMut};

use crate::{
    CheckpointError, RankRecord, Result,
    disk::Disk,
    file_writer::{FileWriter, PlannedFile},
    writer::sync_all,
};

/// Items begin at a multiple of this many bytes, so that no two threads write to one cache line.
const ALIGN: usize = 64;
/// Bytes written between two looks at whether to go on.
const STRETCH: usize = 8 << 20;

/// What is copied, and where to.
pub type CopyPair<'a> = (&'a [u8], &'a mut [u8]);

/// The memory of snapshots: one run of bytes that grows to the largest of them and is used again.
#[derive(Default)]
pub struct SnapshotMemory {
    map: Option<MmapMut>,
}

impl SnapshotMemory {
    /// `bytes` of memory that the system has already handed out, so that the first copy into it is as fast as any other.
    ///
    /// # Errors
    /// What the system says.
    pub fn with_capacity(bytes: usize) -> io::Result<Self> {
        let mut memory = Self::default();
        memory.reserve(bytes)?;
        if let Some(map) = &mut memory.map
            && map.advise(Advice::PopulateWrite).is_err()
        {
            // Linux before 5.14.
            const PAGE: usize = 4096;
            map.iter_mut().step_by(PAGE).for_each(|byte| *byte = 0);
        }
        Ok(memory)
    }

    /// How many bytes it holds.
    pub fn capacity(&self) -> usize {
        self.map.as_ref().map_or(0, |map| map.len())
    }

    /// Makes room for `bytes`; what was there is lost.
    fn reserve(&mut self, bytes: usize) -> io::Result<()> {
        if self.capacity() >= bytes {
            return Ok(());
        }
        // Given back first: two of them would be twice what was planned.
        self.map = None;
        let map = MmapMut::map_anon(bytes)?;
        // Only advice: with small pages the first copy is slower.
        let _ = map.advise(Advice::HugePage);
        self.map = Some(map);
        Ok(())
    }

    /// Copies all `sources` by means of `copy` and says where each is now.
    pub(crate) fn fill(
        &mut self,
        sources: &[Cow<'_, [u8]>],
        copy: impl FnOnce(Vec<CopyPair<'_>>),
    ) -> Result<Vec<Range<usize>>> {
        let total: usize = sources.iter().map(|source| source.len().next_multiple_of(ALIGN)).sum();
        self.reserve(total).map_err(|source| CheckpointError::Memory { bytes: total, source })?;
        let mut rest: &mut [u8] = self.map.as_deref_mut().unwrap_or_default();
        let mut pairs: Vec<CopyPair<'_>> = Vec::with_capacity(sources.len());
        let mut places = Vec::with_capacity(sources.len());
        let mut start = 0;
        for source in sources {
            let (place, later) = rest.split_at_mut(source.len().next_multiple_of(ALIGN));
            rest = later;
            places.push(start..start + source.len());
            start += place.len();
            pairs.push((source, &mut place[..source.len()]));
        }
        copy(pairs);
        Ok(places)
    }

    fn at(&self, range: Range<usize>) -> &[u8] {
        self.map.as_deref().unwrap_or_default().get(range).unwrap_or_default()
    }
}

impl fmt::Debug for SnapshotMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotMemory({} bytes)", self.capacity())
    }
}

/// A file that has been begun, or only planned, and where the bytes are that it still lacks.
type SnapshotFile = (Result<FileWriter, PlannedFile>, Vec<Range<usize>>);

/// What one rank has to save, in memory that nobody else uses.
pub struct Snapshot {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    rank: Rank,
    files: Vec<SnapshotFile>,
    memory: SnapshotMemory,
}

impl Snapshot {
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        folder: PathBuf,
        rank: Rank,
        files: Vec<SnapshotFile>,
        memory: SnapshotMemory,
    ) -> Self {
        Self { disk, folder, rank, files, memory }
    }

    /// The folder it is written into.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The rank that took it.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        self.disk.clone()
    }

    /// Bytes that are still to be written.
    pub fn bytes(&self) -> u64 {
        self.files.iter().flat_map(|(_, items)| items).map(|item| item.len() as u64).sum()
    }

    /// Writes and syncs the files; as [`crate::RankWriter::finish`]. `go_on` learns every few mebibytes how many bytes
    /// have been written since it was last asked, and may end it all by an error. The memory comes back in any case.
    ///
    /// # Errors
    /// As [`crate::RankWriter::finish`], and what `go_on` says.
    pub fn write(self, mut go_on: impl FnMut(usize) -> Result<()>) -> (SnapshotMemory, Result<RankRecord>) {
        let Self { disk, folder, rank, files, memory } = self;
        let written = (|| {
            let mut written = Vec::with_capacity(files.len());
            for (file, items) in files {
                let mut writing = match file {
                    Ok(started) => started,
                    Err(planned) => planned.create(&*disk, &folder)?,
                };
                for item in items {
                    let bytes = memory.at(item);
                    // A small item goes whole, so that it is gathered with its neighbours.
                    for stretch in bytes.chunks(STRETCH) {
                        writing.write_bytes(stretch)?;
                        go_on(stretch.len())?;
                    }
                }
                written.push(writing.finish()?);
            }
            let files = sync_all(&folder, written)?;
            Ok(RankRecord { rank: rank.index(), files })
        })();
        (memory, written)
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot(rank {}, {} bytes to write)", self.rank, self.bytes())
    }
}
