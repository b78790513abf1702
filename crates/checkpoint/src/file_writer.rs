//! One file of a checkpoint, written from start to end with checksums on the way.

use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
};

use crate::{
    BlobRecord, CheckpointError, FileRecord, Result, SliceRecord, TensorRecord,
    checksum::ChunkHasher,
    disk::{Disk, DiskFile},
    header::{self, Entry},
};

/// Bytes per write: enough to make calls rare, few enough that what was just hashed is still in the cache.
const BLOCK: usize = 512 << 10;
/// Slices below this size are gathered into one block before they are written.
const SMALL: usize = 128 << 10;
/// Bytes brought into memory at a time of what lies elsewhere.
const PIECE: usize = 4 << 20;

/// What an entry of a file is, besides its bytes.
pub(crate) enum Content {
    Slice { param: String, kind: String, start: usize, len: usize },
    Tensor,
    Blob,
}

/// An entry of a file with its bytes.
pub(crate) struct Item<'a> {
    pub(crate) entry: Entry,
    pub(crate) content: Content,
    pub(crate) bytes: Bytes<'a>,
}

/// Reads a piece: first element, and the memory for it.
type Read<'a> = Box<dyn FnMut(usize, &mut [u8]) -> io::Result<()> + 'a>;

/// Where the bytes of an item come from.
pub(crate) enum Bytes<'a> {
    Memory(Cow<'a, [u8]>),
    Elsewhere { read: Read<'a>, bytes: usize, element: usize },
}

impl<'a> Bytes<'a> {
    pub(crate) fn is_elsewhere(&self) -> bool {
        matches!(self, Self::Elsewhere { .. })
    }

    pub(crate) fn into_memory(self) -> Option<Cow<'a, [u8]>> {
        match self {
            Self::Memory(bytes) => Some(bytes),
            Self::Elsewhere { .. } => None,
        }
    }
}

/// A file whose content is known and whose bytes are not written yet.
pub(crate) struct PlannedFile {
    name: String,
    rank: usize,
    header: Vec<u8>,
    total: u64,
    entries: Vec<Entry>,
    contents: Vec<Content>,
}

impl PlannedFile {
    /// Puts `items` in order and returns their bytes in it.
    ///
    /// # Errors
    /// [`CheckpointError::Source`] for two things of one name.
    pub(crate) fn new<'a>(
        name: String,
        rank: usize,
        mut items: Vec<Item<'a>>,
    ) -> Result<(Self, Vec<Bytes<'a>>)> {
        // The widest elements first: then each tensor starts at a multiple of its element size, without gaps. Among
        // those of one width what does not lie in memory comes first: a snapshot writes that at once.
        items.sort_by_key(|item| (std::cmp::Reverse(item.entry.dtype.size()), !item.bytes.is_elsewhere()));
        let mut entries = Vec::with_capacity(items.len());
        let mut contents = Vec::with_capacity(items.len());
        let mut sources = Vec::with_capacity(items.len());
        for Item { entry, content, bytes } in items {
            entries.push(entry);
            contents.push(content);
            sources.push(bytes);
        }
        let header = header::build(&entries)
            .map_err(|problem| CheckpointError::Source { what: format!("file {name}"), problem })?;
        let total = header.len() as u64 + entries.iter().map(|entry| entry.bytes as u64).sum::<u64>();
        Ok((Self { name, rank, header, total, entries, contents }, sources))
    }

    /// Creates the file in `folder` and writes its header.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn create(self, disk: &dyn Disk, folder: &Path) -> Result<FileWriter> {
        let path = folder.join(&self.name);
        let file = disk.create_file(&path, self.total).map_err(CheckpointError::io("create", &path))?;
        let mut stream = Stream::new(file);
        stream.write(&self.header).map_err(CheckpointError::io("write", &path))?;
        Ok(FileWriter { plan: self, path, stream })
    }
}

/// A file that is being written.
pub(crate) struct FileWriter {
    plan: PlannedFile,
    path: PathBuf,
    stream: Stream,
}

impl FileWriter {
    /// Appends the bytes of the next item.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn write(&mut self, bytes: Bytes<'_>) -> Result<()> {
        let written = match bytes {
            Bytes::Memory(bytes) => self.stream.write(&bytes),
            Bytes::Elsewhere { mut read, bytes, element } => {
                let mut piece = vec![0; bytes.min(PIECE)];
                (0..bytes).step_by(PIECE).try_for_each(|start| {
                    let piece = &mut piece[..PIECE.min(bytes - start)];
                    read(start / element, piece)?;
                    self.stream.write(piece)
                })
            }
        };
        written.map_err(CheckpointError::io("write", &self.path))
    }

    /// Appends the bytes of the next item.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn write_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write(bytes).map_err(CheckpointError::io("write", &self.path))
    }

    /// The file, complete and not yet synced, and what is in it.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn finish(mut self) -> Result<(FileRecord, Box<dyn DiskFile>)> {
        self.stream.flush().map_err(CheckpointError::io("write", &self.path))?;
        let PlannedFile { name, rank, header, total, entries, contents } = self.plan;
        let checksums = self.stream.hasher.finish();
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
        Ok((record, self.stream.file))
    }
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
