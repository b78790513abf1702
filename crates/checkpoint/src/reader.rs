//! Reading: any rank of any world takes the elements it needs, checked against their checksums on the way.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use deepspeed_core::{AlignedBuffer, DType, Rank, Span, SpanMut};
use serde_json::Value;

use crate::{
    BlobRecord, CheckpointError, Manifest, ParamRecord, Result, TensorRecord,
    checksum::PieceHasher,
    draft::peers_folder,
    header,
    index::{Index, Stored},
    kind,
    latest::{self, Folder},
    record::numel,
    validate_tag,
};

/// Bytes that [`Checkpoint::visit`] hands out at a time.
const VISIT_BYTES: usize = 1 << 20;
/// Bytes read at a time while a checksum is computed: they stay in the cache between the read and the sum.
const CHECK_BYTES: usize = 256 << 10;
/// Files kept open at a time: below every usual limit, whatever world wrote the checkpoint.
const OPEN_FILES: usize = 64;

/// A checkpoint opened for reading. Every rank opens its own; threads may share one.
pub struct Checkpoint {
    dir: PathBuf,
    tag: String,
    folder: Folder,
    manifest: Manifest,
    index: Index,
    open: Mutex<HashMap<usize, Arc<File>>>,
    /// For each file and chunk, whether its checksum has been found right.
    checked: Vec<Vec<AtomicBool>>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Manifest { world, stage, saved_at_ms, .. } = self.manifest;
        write!(
            f,
            "Checkpoint({} of {world} ranks at stage {stage}, {saved_at_ms})",
            self.folder.path.display()
        )
    }
}

impl Checkpoint {
    /// Opens the checkpoint `tag` of `dir`, or, without a tag, the one that `latest` names; `None` if there is no
    /// `latest`. Checks the manifest and the sizes of all files, not yet their contents.
    ///
    /// Never opens another one than asked: what is missing or damaged is an error that lists those that are complete.
    ///
    /// # Errors
    /// [`CheckpointError::NotFound`], [`CheckpointError::Damaged`], [`CheckpointError::Latest`],
    /// [`CheckpointError::Foreign`], [`CheckpointError::Version`], [`CheckpointError::Tag`], [`CheckpointError::Io`].
    pub fn open(dir: &Path, tag: Option<&str>) -> Result<Option<Self>> {
        let tag = match tag {
            Some(tag) => {
                validate_tag(tag)?;
                tag.to_owned()
            }
            None => match latest::read_latest(dir)? {
                Some(tag) => tag,
                None => return Ok(None),
            },
        };
        let (folder, manifest) = latest::find(dir, &tag).map_err(|mut error| {
            if let CheckpointError::NotFound { complete, .. } | CheckpointError::Damaged { complete, .. } =
                &mut error
            {
                *complete = latest::complete_names(dir, &tag);
            }
            error
        })?;
        let index = Index::new(&manifest);
        let checked = manifest
            .files
            .iter()
            .map(|file| file.checksums.iter().map(|_| AtomicBool::new(false)).collect())
            .collect();
        let open = Mutex::new(HashMap::new());
        Ok(Some(Self { dir: dir.to_owned(), tag, folder, manifest, index, open, checked }))
    }

    /// The tag.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The checkpoint's folder.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// All that is known about the checkpoint.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What the engine gave to continue from.
    pub fn state(&self) -> &Value {
        &self.manifest.state
    }

    /// The parameter of this name.
    pub fn param(&self, name: &str) -> Option<&ParamRecord> {
        self.index.param(name).map(|index| &self.manifest.params[index])
    }

    /// What is stored of a parameter, in alphabetic order.
    pub fn kinds(&self, name: &str) -> Vec<&str> {
        let mut kinds: Vec<&str> =
            self.index.param(name).map(|index| self.index.kinds(index).collect()).unwrap_or_default();
        kinds.sort_unstable();
        kinds
    }

    /// The dtype in which `kind` of a parameter is stored; `None` if it is not.
    pub fn dtype(&self, name: &str, kind: &str) -> Option<DType> {
        let index = self.index.param(name)?;
        let param = &self.manifest.params[index];
        match self.index.stored(index, kind) {
            Some(stored) => Some(stored.dtype),
            // Nothing needs to be stored of the weights of a parameter without elements.
            None if kind == kind::WEIGHT && numel(&param.shape) == Some(0) => param.dtype.dtype(),
            None => None,
        }
    }

    /// Reads the elements `range` of `kind` of a parameter, wherever they lie. An empty range is always fine.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] for a parameter, kind or range that is not there; [`CheckpointError::Length`] and
    /// [`CheckpointError::DType`] if `dst` is not made for it; [`CheckpointError::Damaged`] if a checksum is wrong, in
    /// which case `dst` holds garbage; [`CheckpointError::Io`].
    pub fn read(&self, name: &str, kind: &str, range: Range<usize>, mut dst: SpanMut<'_>) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        if dst.len() != len {
            let (name, kind) = (name.to_owned(), kind.to_owned());
            return Err(CheckpointError::Length { name, kind, len, dst: dst.len() });
        }
        let Some(stored) = self.stored(name, kind, &range)? else { return Ok(()) };
        if stored.dtype != dst.as_span().dtype() {
            let (name, kind, stored) = (name.to_owned(), kind.to_owned(), stored.dtype);
            return Err(CheckpointError::DType { name, kind, stored, dst: dst.as_span().dtype() });
        }
        for run in stored.runs(range.clone()) {
            let mut part = dst.slice_mut(run.start - range.start, run.len);
            self.read_at(run.file, run.offset, part.as_bytes_mut())?;
        }
        Ok(())
    }

    /// As [`Checkpoint::read`], for a caller that converts: hands out the elements in pieces of at most 1 MiB in the
    /// dtype in which they are stored, in order, each with the index of its first element inside the parameter.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; pieces before the one in error have been handed out.
    pub fn visit(
        &self,
        name: &str,
        kind: &str,
        range: Range<usize>,
        mut visit: impl FnMut(usize, Span<'_>),
    ) -> Result<()> {
        let Some(stored) = self.stored(name, kind, &range)? else { return Ok(()) };
        let most = (VISIT_BYTES / stored.dtype.size()).min(range.len());
        let mut buffer = AlignedBuffer::zeroed(most, stored.dtype);
        for run in stored.runs(range) {
            let mut done = 0;
            while done < run.len {
                let len = most.min(run.len - done);
                let offset = run.offset + (done * stored.dtype.size()) as u64;
                self.read_at(run.file, offset, buffer.span_mut().slice_mut(0, len).as_bytes_mut())?;
                visit(run.start + done, buffer.span().slice(0, len));
                done += len;
            }
        }
        Ok(())
    }

    /// The whole tensors that are not parameters, such as buffers.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorRecord> {
        self.manifest.files.iter().flat_map(|file| &file.tensors)
    }

    /// The bytes of a whole tensor: row by row, little endian.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`], [`CheckpointError::Damaged`], [`CheckpointError::Io`].
    pub fn tensor(&self, name: &str) -> Result<Vec<u8>> {
        let mut all = self.manifest.files.iter().enumerate();
        let found =
            all.find_map(|(file, record)| Some((file, record.tensors.iter().find(|t| t.name == name)?)));
        let Some((file, tensor)) = found else { return Err(self.missing(format!("tensor `{name}`"))) };
        let bytes = numel(&tensor.shape).unwrap_or(0) * tensor.dtype.size();
        self.read_vec(file, tensor.offset, bytes)
    }

    /// The blobs, each with the rank that wrote it.
    pub fn blobs(&self) -> impl Iterator<Item = (Rank, &BlobRecord)> {
        let files = self.manifest.files.iter();
        files.flat_map(|file| file.blobs.iter().map(|blob| (Rank::from_index(file.rank), blob)))
    }

    /// The blob that `rank` stored under `name`; `None` if it stored none, as where fewer ranks wrote the checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`], [`CheckpointError::Io`].
    pub fn blob(&self, rank: Rank, name: &str) -> Result<Option<Vec<u8>>> {
        let mut files = self.manifest.files.iter().enumerate().filter(|(_, file)| file.rank == rank.index());
        let found =
            files.find_map(|(file, record)| Some((file, record.blobs.iter().find(|b| b.name == name)?)));
        let Some((file, blob)) = found else { return Ok(None) };
        let bytes = usize::try_from(blob.bytes).unwrap_or(usize::MAX);
        self.read_vec(file, blob.offset, bytes).map(Some)
    }

    /// Reads every byte of every file and checks it.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] with the first file that is, [`CheckpointError::Io`].
    pub fn verify(&self) -> Result<()> {
        self.verify_share(Rank(0), 1)
    }

    /// The share of [`Checkpoint::verify`] of one of `world` ranks: all of them together check everything that is here. Of a
    /// checkpoint that is spread over hosts, that is this host's files and those that a load has brought.
    ///
    /// # Errors
    /// As [`Checkpoint::verify`].
    pub fn verify_share(&self, rank: Rank, world: usize) -> Result<()> {
        let files: Vec<usize> = (0..self.checked.len()).filter(|file| self.is_available(*file)).collect();
        let total: usize = files.iter().map(|file| self.checked[*file].len()).sum();
        let chunks =
            files.iter().flat_map(|file| (0..self.checked[*file].len()).map(move |chunk| (*file, chunk)));
        let world = world.max(1);
        let share = total * rank.index() / world..total * (rank.index() + 1) / world;
        for (file, chunk) in chunks.skip(share.start).take(share.len()) {
            self.check_chunk(file, chunk)?;
            if chunk == 0 {
                self.check_header(file)?;
            }
        }
        Ok(())
    }

    /// Says that all shares of [`Checkpoint::verify_share`] have been found right, by whoever: what is read from now on is
    /// not checked again.
    pub fn trust(&self) {
        for chunk in self.checked.iter().flatten() {
            chunk.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a file can be read here.
    fn is_available(&self, file: usize) -> bool {
        let record = &self.manifest.files[file];
        self.manifest.is_here(record) || peers_folder(&self.dir, &self.tag).join(&record.name).exists()
    }

    /// What is stored, or `None` if there is nothing to read in the range.
    fn stored(&self, name: &str, kind: &str, range: &Range<usize>) -> Result<Option<&Stored>> {
        let index = self.index.param(name).ok_or_else(|| self.missing(format!("parameter `{name}`")))?;
        let shape = &self.manifest.params[index].shape;
        let len = numel(shape).unwrap_or(0);
        if range.start > range.end || range.end > len {
            let what =
                format!("elements {}..{} of parameter `{name}`, which has {len}", range.start, range.end);
            return Err(self.missing(what));
        }
        if range.is_empty() {
            return Ok(None);
        }
        let stored = self.index.stored(index, kind);
        stored.map(Some).ok_or_else(|| {
            let kinds = self.kinds(name).join(", ");
            self.missing(format!("`{kind}` of parameter `{name}`, only: {kinds}"))
        })
    }

    fn read_vec(&self, file: usize, offset: u64, bytes: usize) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        content.try_reserve_exact(bytes).map_err(|_| {
            let refused = io::Error::new(io::ErrorKind::OutOfMemory, format!("no memory for {bytes} bytes"));
            self.io_error("read", file, refused)
        })?;
        content.resize(bytes, 0);
        self.read_at(file, offset, &mut content)?;
        Ok(content)
    }

    /// Reads bytes of a file, and checks the chunks they lie in unless that has been done.
    fn read_at(&self, file: usize, offset: u64, dst: &mut [u8]) -> Result<()> {
        let mut rest = dst;
        let mut position = offset;
        while !rest.is_empty() {
            let chunk = usize::try_from(position / self.manifest.chunk_bytes)
                .map_err(|_| self.damaged(file, "an offset is beyond its end".to_owned()))?;
            let bounds = self.chunk_bounds(file, chunk);
            let len = usize::try_from(bounds.end - position).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            let whole = position == bounds.start && position + len as u64 == bounds.end;
            if self.is_checked(file, chunk) {
                self.pread(file, position, now)?;
            } else if whole {
                let mut hasher = PieceHasher::new();
                for (i, piece) in now.chunks_mut(CHECK_BYTES).enumerate() {
                    self.pread(file, position + (i * CHECK_BYTES) as u64, piece)?;
                    hasher.update(piece);
                }
                self.compare(file, chunk, &hasher)?;
            } else {
                self.check_chunk(file, chunk)?;
                self.pread(file, position, now)?;
            }
            position += len as u64;
            rest = later;
        }
        Ok(())
    }

    /// Reads a chunk for its checksum only.
    fn check_chunk(&self, file: usize, chunk: usize) -> Result<()> {
        let bounds = self.chunk_bounds(file, chunk);
        let bytes = usize::try_from(bounds.end - bounds.start).unwrap_or(usize::MAX);
        let mut piece = vec![0; bytes.min(CHECK_BYTES)];
        let mut hasher = PieceHasher::new();
        let mut position = bounds.start;
        while position < bounds.end {
            let len = usize::try_from(bounds.end - position).unwrap_or(usize::MAX).min(piece.len());
            self.pread(file, position, &mut piece[..len])?;
            hasher.update(&piece[..len]);
            position += len as u64;
        }
        self.compare(file, chunk, &hasher)
    }

    fn compare(&self, file: usize, chunk: usize, hasher: &PieceHasher) -> Result<()> {
        let expected = self.manifest.files[file].checksums[chunk];
        let actual = hasher.finish();
        if actual != expected {
            let Range { start, end } = self.chunk_bounds(file, chunk);
            let problem =
                format!("bytes {start}..{end}: their checksum is {actual} and should be {expected}");
            return Err(self.damaged(file, problem));
        }
        self.checked[file][chunk].store(true, Ordering::Relaxed);
        Ok(())
    }

    fn check_header(&self, file: usize) -> Result<()> {
        let record = &self.manifest.files[file];
        let mut start = [0; 8];
        self.pread(file, 0, &mut start)?;
        let len = header::json_len(start, record.bytes).map_err(|problem| self.damaged(file, problem))?;
        let json = self.read_vec(file, start.len() as u64, len)?;
        header::agrees(&json, record).map_err(|problem| self.damaged(file, problem))
    }

    fn is_checked(&self, file: usize, chunk: usize) -> bool {
        self.checked[file][chunk].load(Ordering::Relaxed)
    }

    /// The bytes of a file that one checksum covers.
    fn chunk_bounds(&self, file: usize, chunk: usize) -> Range<u64> {
        let start = chunk as u64 * self.manifest.chunk_bytes;
        start..(start + self.manifest.chunk_bytes).min(self.manifest.files[file].bytes)
    }

    fn pread(&self, file: usize, offset: u64, dst: &mut [u8]) -> Result<()> {
        let handle = self.file(file)?;
        match handle.read_exact_at(dst, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.damaged(file, "it has become shorter".to_owned()))
            }
            result => result.map_err(|error| self.io_error("read", file, error)),
        }
    }

    fn file(&self, file: usize) -> Result<Arc<File>> {
        // The map is whole whatever a thread did before it panicked.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = open.get(&file) {
            return Ok(Arc::clone(handle));
        }
        let record = &self.manifest.files[file];
        let handle = if self.manifest.is_here(record) {
            self.folder.open_file(&record.name).map_err(|error| self.io_error("open", file, error))?
        } else {
            let path = peers_folder(&self.dir, &self.tag).join(&record.name);
            File::open(path).map_err(|_| {
                let host = format!("file {} here: it is on the host of rank {}", record.name, record.rank);
                self.missing(host)
            })?
        };
        let handle = Arc::new(handle);
        if open.len() >= OPEN_FILES {
            open.clear();
        }
        open.insert(file, Arc::clone(&handle));
        Ok(handle)
    }

    fn io_error(&self, action: &'static str, file: usize, source: io::Error) -> CheckpointError {
        let path = self.folder.path.join(&self.manifest.files[file].name);
        CheckpointError::Io { action, path, source }
    }

    fn missing(&self, what: String) -> CheckpointError {
        CheckpointError::Missing { folder: self.folder.path.clone(), what }
    }

    fn damaged(&self, file: usize, problem: String) -> CheckpointError {
        CheckpointError::Damaged {
            dir: self.dir.clone(),
            tag: self.tag.clone(),
            file: self.manifest.files[file].name.clone(),
            problem,
            complete: latest::complete_names(&self.dir, &self.tag),
        }
    }
}
