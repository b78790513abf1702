//! What every rank does in a save: streams the slices it owns into its files, with checksums on the way.

use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use deepspeed_core::{DType, Rank, Span};

use crate::{
    BlobRecord, CheckpointError, ElementType, FileRecord, RankRecord, Result, SliceRecord, TensorRecord,
    checksum::ChunkHasher,
    disk::{Disk, DiskFile, RealDisk},
    header::{self, Entry},
    kind,
    manifest::FileKind,
    record::numel,
};

/// Bytes per write: enough to make calls rare, few enough that what was just hashed is still in the cache.
const BLOCK: usize = 512 << 10;
/// Slices below this size are gathered into one block before they are written.
const SMALL: usize = 128 << 10;

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

/// What an entry of a file is, besides its bytes.
enum Content {
    Slice { param: String, kind: String, start: usize, len: usize },
    Tensor,
    Blob,
}

struct Item<'a> {
    entry: Entry,
    content: Content,
    bytes: Bytes<'a>,
}

/// Where the bytes of an item come from.
enum Bytes<'a> {
    Memory(Cow<'a, [u8]>),
    Read(Box<dyn FnOnce() -> io::Result<Vec<u8>> + 'a>),
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
    /// that lies elsewhere passes through memory slice by slice.
    ///
    /// # Errors
    /// As [`RankWriter::slice`]. What `read` says, and a wrong number of bytes, are errors of [`RankWriter::finish`].
    pub fn slice_from(
        &mut self,
        (name, kind, shape): (&str, &str, &[usize]),
        offset: usize,
        (len, dtype): (usize, DType),
        read: impl FnOnce() -> io::Result<Vec<u8>> + 'a,
    ) -> Result<()> {
        self.add_slice((name, kind, shape), offset, (len, dtype), Bytes::Read(Box::new(read)))
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
        let mut written = Vec::new();
        let lists = [
            (FileKind::Weights, self.weights),
            (FileKind::Optimizer, self.optimizer),
            (FileKind::Extra, self.extra),
        ];
        for (file_kind, items) in lists {
            if items.is_empty() {
                continue;
            }
            let name = file_kind.file_name(self.rank.index(), self.world);
            written.push(write_file(&*self.disk, &self.folder, name, self.rank.index(), items)?);
        }
        // Synced only now, so that the disk is busy with one file while the next is being written.
        let sync = |(record, mut file): (FileRecord, Box<dyn DiskFile>)| {
            file.sync().map_err(CheckpointError::io("sync", &self.folder.join(&record.name)))?;
            Ok(record)
        };
        let files = written.into_iter().map(sync).collect::<Result<_>>()?;
        Ok(RankRecord { rank: self.rank.index(), files })
    }
}

fn write_file(
    disk: &dyn Disk,
    folder: &Path,
    name: String,
    rank: usize,
    mut items: Vec<Item<'_>>,
) -> Result<(FileRecord, Box<dyn DiskFile>)> {
    let path = folder.join(&name);
    // The widest elements first: then each tensor starts at a multiple of its element size, without gaps.
    items.sort_by_key(|item| std::cmp::Reverse(item.entry.dtype.size()));
    let mut entries = Vec::with_capacity(items.len());
    let mut contents = Vec::with_capacity(items.len());
    let mut sources = Vec::with_capacity(items.len());
    for Item { entry, content, bytes } in items {
        sources.push((entry.bytes, bytes));
        entries.push(entry);
        contents.push(content);
    }
    let header = header::build(&entries)
        .map_err(|problem| CheckpointError::Source { what: format!("file {name}"), problem })?;
    let total = header.len() as u64 + entries.iter().map(|entry| entry.bytes as u64).sum::<u64>();

    let file = disk.create_file(&path, total).map_err(CheckpointError::io("create", &path))?;
    let mut stream = Stream::new(file);
    let written = (|| {
        stream.write(&header)?;
        for (expected, bytes) in sources {
            match bytes {
                Bytes::Memory(bytes) => stream.write(&bytes)?,
                Bytes::Read(read) => {
                    let bytes = read()?;
                    if bytes.len() != expected {
                        let problem =
                            format!("{} bytes of state were read, expected {expected}", bytes.len());
                        return Err(io::Error::other(problem));
                    }
                    stream.write(&bytes)?;
                }
            }
        }
        stream.flush()
    })();
    written.map_err(CheckpointError::io("write", &path))?;
    let checksums = stream.hasher.finish();

    let mut record = FileRecord {
        name,
        rank,
        bytes: total,
        checksums,
        slices: Vec::new(),
        tensors: Vec::new(),
        blobs: Vec::new(),
    };
    let mut offset = header.len() as u64;
    for (entry, content) in entries.into_iter().zip(contents) {
        let Entry { key, dtype, shape, bytes } = entry;
        match content {
            Content::Slice { param, kind, start, len } => {
                record.slices.push(SliceRecord { param, kind, start, len, dtype, offset, key });
            }
            Content::Tensor => record.tensors.push(TensorRecord { name: key, shape, dtype, offset }),
            Content::Blob => record.blobs.push(BlobRecord { name: key, bytes: bytes as u64, offset }),
        }
        offset += bytes as u64;
    }
    Ok((record, stream.file))
}

/// A file with checksums: small pieces are gathered, large ones pass through without a copy.
struct Stream {
    file: Box<dyn DiskFile>,
    hasher: ChunkHasher,
    gathered: Vec<u8>,
}

impl Stream {
    fn new(file: Box<dyn DiskFile>) -> Self {
        Self { file, hasher: ChunkHasher::new(), gathered: Vec::with_capacity(BLOCK) }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() < SMALL {
            if self.gathered.len() + bytes.len() > BLOCK {
                self.flush()?;
            }
            self.gathered.extend_from_slice(bytes);
            return Ok(());
        }
        self.flush()?;
        bytes.chunks(BLOCK).try_for_each(|block| {
            self.hasher.update(block);
            self.file.write(block)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        self.hasher.update(&self.gathered);
        let result = self.file.write(&self.gathered);
        self.gathered.clear();
        result
    }
}
