//! What every rank does in a save: streams the slices it owns into its files, with checksums on the way.

use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use deepspeed_core::{DType, Rank, Span};

use crate::{
    CheckpointError, ElementType, FileRecord, RankRecord, Result, Snapshot, SnapshotMemory,
    disk::{Disk, DiskFile, RealDisk},
    file_writer::{Bytes, Content, Item, PlannedFile},
    header::{self, Entry},
    kind,
    manifest::FileKind,
    record::numel,
    snapshot::CopyPair,
};

/// Elements of one parameter that this rank owns.
#[derive(Clone, Copy, Debug)]
pub struct SliceSource<'a> {
    /// The parameter's name.
    pub name: &'a str,
    /// What of it; see [`kind`].
    pub kind: &'a str,
    /// The shape of the whole parameter.
    pub shape: &'a [usize],
    /// First element inside the parameter.
    pub offset: usize,
    /// The elements; may be none.
    pub data: Span<'a>,
}

/// A whole tensor that is not a parameter, such as a buffer.
#[derive(Clone, Copy, Debug)]
pub struct TensorSource<'a> {
    /// Its name in the model.
    pub name: &'a str,
    /// The type of its elements.
    pub dtype: ElementType,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its elements, row by row, little endian.
    pub bytes: &'a [u8],
}

/// Collects what one rank has to save and writes it. Nothing is copied; nothing is written before
/// [`RankWriter::finish`].
pub struct RankWriter<'a> {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    rank: Rank,
    world: usize,
    weights: Vec<Item<'a>>,
    optimizer: Vec<Item<'a>>,
    extra: Vec<Item<'a>>,
}

impl<'a> RankWriter<'a> {
    /// A writer for `rank` of `world` into a folder that [`crate::Draft::begin`] has made.
    pub fn new(folder: &Path, rank: Rank, world: usize) -> Self {
        Self::on(Arc::new(RealDisk), folder, rank, world)
    }

    /// As [`RankWriter::new`], on another disk.
    pub fn on(disk: Arc<dyn Disk>, folder: &Path, rank: Rank, world: usize) -> Self {
        let folder = folder.to_owned();
        Self { disk, folder, rank, world, weights: Vec::new(), optimizer: Vec::new(), extra: Vec::new() }
    }

    /// Adds a slice: weights to the file of weights, every other kind to that of the optimizer.
    ///
    /// # Errors
    /// [`CheckpointError::Source`] if the slice reaches past the end of the parameter or the kind has a `/`.
    pub fn slice(&mut self, slice: SliceSource<'a>) -> Result<()> {
        let SliceSource { name, kind, shape, offset, data } = slice;
        self.add_slice(
            (name, kind, shape),
            offset,
            (data.len(), data.dtype()),
            Bytes::Memory(data.as_bytes().into()),
        )
    }

    /// As [`RankWriter::slice`], for `len` elements of `dtype` that `read` brings into memory when their turn comes: state
    /// that lies elsewhere passes through memory piece by piece. `read` is given the first element of a piece, counted
    /// from the slice's first, and the memory for it.
    ///
    /// # Errors
    /// As [`RankWriter::slice`]. What `read` says is an error of [`RankWriter::finish`].
    pub fn slice_from(
        &mut self,
        (name, kind, shape): (&str, &str, &[usize]),
        offset: usize,
        (len, dtype): (usize, DType),
        read: impl FnMut(usize, &mut [u8]) -> io::Result<()> + 'a,
    ) -> Result<()> {
        self.add_slice(
            (name, kind, shape),
            offset,
            (len, dtype),
            Bytes::Elsewhere { read: Box::new(read), bytes: len * dtype.size(), element: dtype.size() },
        )
    }

    fn add_slice(
        &mut self,
        (name, kind, shape): (&str, &str, &[usize]),
        offset: usize,
        (len, dtype): (usize, DType),
        bytes: Bytes<'a>,
    ) -> Result<()> {
        let refused = |problem: String| {
            Err(CheckpointError::Source { what: format!("`{kind}` of parameter `{name}`"), problem })
        };
        if kind.is_empty() || kind.contains('/') {
            return refused("a kind is any text without `/`, and not empty".to_owned());
        }
        let fits = numel(shape).zip(offset.checked_add(len)).is_some_and(|(len, end)| end <= len);
        if !fits {
            return refused(format!("{len} elements from {offset} do not fit into the shape {shape:?}"));
        }
        let (key, stored_shape) = header::slice_entry(kind, name, shape, offset, len);
        let entry = Entry { key, dtype: dtype.into(), shape: stored_shape, bytes: len * dtype.size() };
        let content = Content::Slice { param: name.to_owned(), kind: kind.to_owned(), start: offset, len };
        let items = if kind == kind::WEIGHT { &mut self.weights } else { &mut self.optimizer };
        items.push(Item { entry, content, bytes });
        Ok(())
    }

    /// Adds a whole tensor to the file of weights. One rank of all adds it.
    ///
    /// # Errors
    /// [`CheckpointError::Source`] if the bytes are not those of the shape.
    pub fn tensor(&mut self, tensor: TensorSource<'a>) -> Result<()> {
        let TensorSource { name, dtype, shape, bytes } = tensor;
        let expected = numel(shape).and_then(|len| len.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            let problem = format!("{} bytes for the shape {shape:?} of {dtype}", bytes.len());
            return Err(CheckpointError::Source { what: format!("tensor `{name}`"), problem });
        }
        let entry = Entry { key: name.to_owned(), dtype, shape: shape.to_vec(), bytes: bytes.len() };
        self.weights.push(Item { entry, content: Content::Tensor, bytes: Bytes::Memory(bytes.into()) });
        Ok(())
    }

    /// Adds bytes that only the caller understands, such as random states or a client's state. Every rank has its own.
    pub fn blob(&mut self, name: &str, bytes: impl Into<Cow<'a, [u8]>>) {
        let bytes = bytes.into();
        let shape = vec![bytes.len()];
        let entry = Entry { key: name.to_owned(), dtype: ElementType::U8, shape, bytes: bytes.len() };
        self.extra.push(Item { entry, content: Content::Blob, bytes: Bytes::Memory(bytes) });
    }

    /// Bytes that [`RankWriter::finish`] will write, without headers.
    pub fn bytes(&self) -> u64 {
        let all = [&self.weights, &self.optimizer, &self.extra];
        all.into_iter().flatten().map(|item| item.entry.bytes as u64).sum()
    }

    /// Writes and syncs this rank's files, and says what is in them. A file without content is not made.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] for what the system refuses, [`CheckpointError::Source`] for two things of one name.
    pub fn finish(self) -> Result<RankRecord> {
        let (disk, folder, rank) = (self.disk.clone(), self.folder.clone(), self.rank);
        let mut written = Vec::new();
        for (file, sources) in self.plan()? {
            let mut writing = file.create(&*disk, &folder)?;
            for source in sources {
                writing.write(source)?;
            }
            written.push(writing.finish()?);
        }
        sync_all(&folder, written).map(|files| RankRecord { rank: rank.index(), files })
    }

    /// Copies everything into `memory`, so that training may change the originals while the copy is written, and returns
    /// what remains to be done. `copy` is given what goes where, in one call, and may use as many threads as it likes.
    ///
    /// What does not lie in memory (see [`RankWriter::slice_from`]) is written here and now, piece by piece: a copy of it
    /// has no place.
    ///
    /// # Errors
    /// As [`RankWriter::finish`], and [`CheckpointError::Memory`] where the system refuses the memory.
    pub fn snapshot(
        self,
        mut memory: SnapshotMemory,
        copy: impl FnOnce(Vec<CopyPair<'_>>),
    ) -> Result<Snapshot> {
        let (disk, folder, rank) = (self.disk.clone(), self.folder.clone(), self.rank);
        let mut files = Vec::new();
        let mut kept = Vec::new();
        for (file, sources) in self.plan()? {
            // Up to the last of those that lie elsewhere, everything is written now: a file is written in order.
            let now = sources.iter().rposition(Bytes::is_elsewhere).map_or(0, |last| last + 1);
            let mut sources = sources.into_iter();
            let started = if now > 0 {
                let mut writing = file.create(&*disk, &folder)?;
                for source in sources.by_ref().take(now) {
                    writing.write(source)?;
                }
                Ok(writing)
            } else {
                Err(file)
            };
            let first = kept.len();
            kept.extend(sources.filter_map(Bytes::into_memory));
            files.push((started, first..kept.len()));
        }
        let places = memory.fill(&kept, copy)?;
        let files = files.into_iter().map(|(started, items)| (started, places[items].to_vec())).collect();
        Ok(Snapshot::new(disk, folder, rank, files, memory))
    }

    /// The files in the order in which they are written, each with its content.
    fn plan(self) -> Result<Vec<(PlannedFile, Vec<Bytes<'a>>)>> {
        let lists = [
            (FileKind::Weights, self.weights),
            (FileKind::Optimizer, self.optimizer),
            (FileKind::Extra, self.extra),
        ];
        lists
            .into_iter()
            .filter(|(_, items)| !items.is_empty())
            .map(|(kind, items)| {
                let name = kind.file_name(self.rank.index(), self.world);
                PlannedFile::new(name, self.rank.index(), items)
            })
            .collect()
    }
}

/// Syncs files that have been written. Only when all have been, so that the disk is busy with one while the next is being
/// written.
pub(crate) fn sync_all(
    folder: &Path,
    files: Vec<(FileRecord, Box<dyn DiskFile>)>,
) -> Result<Vec<FileRecord>> {
    let sync = |(record, mut file): (FileRecord, Box<dyn DiskFile>)| {
        file.sync().map_err(CheckpointError::io("sync", &folder.join(&record.name)))?;
        Ok(record)
    };
    files.into_iter().map(sync).collect()
}
