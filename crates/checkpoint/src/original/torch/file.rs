//! One torch file, opened for reading.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use super::archive::{self, Entry, Problem};
use crate::{
    CheckpointError, ElementType, Result,
    original::{
        damage::Damage,
        pickle::{Item, Pickle, TensorRef, parse},
    },
    record::numel,
};

/// Bytes of a file that are read at a time for their checksum.
const CHECK_BYTES: usize = 1 << 20;
/// A view may repeat elements of a small storage; a tensor of up to this many is believed.
const MAX_REPEATED: usize = 1 << 24;

/// A torch file: its pickle, and where its storages lie.
#[derive(Debug)]
pub(crate) struct TorchFile {
    path: PathBuf,
    /// Its name within the checkpoint's folder, for errors.
    name: String,
    damage: Damage,
    /// By name, without the folder that all entries share.
    entries: HashMap<String, Entry>,
    pickle: Pickle,
    /// Kept open after its first use, unless [`TorchFile::close`] is called.
    open: Mutex<Option<std::sync::Arc<File>>>,
}

/// A tensor in a file, checked against its storage.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) dtype: ElementType,
    pub(crate) shape: Vec<usize>,
    /// Elements from one index to the next, per dimension.
    stride: Vec<usize>,
    /// First byte within the file.
    pub(crate) at: u64,
    /// Number of elements.
    pub(crate) numel: usize,
}

impl View {
    /// Whether the elements lie one after the other, row by row.
    pub(crate) fn is_dense(&self) -> bool {
        let mut expected = 1;
        self.numel == 0
            || self.shape.iter().zip(&self.stride).rev().all(|(dim, stride)| {
                let fits = *dim == 1 || *stride == expected;
                expected *= dim;
                fits
            })
    }

    /// Where element `index` lies, in elements from `at`; `index` counts row by row.
    pub(crate) fn place(&self, mut index: usize) -> usize {
        let mut place = 0;
        for (dim, stride) in self.shape.iter().zip(&self.stride).rev() {
            place += index % dim * stride;
            index /= dim;
        }
        place
    }

    /// Elements from the first to the last in memory, both included.
    pub(crate) fn extent(&self) -> usize {
        if self.numel == 0 {
            return 0;
        }
        1 + self.shape.iter().zip(&self.stride).map(|(dim, stride)| (dim - 1) * stride).sum::<usize>()
    }
}

impl TorchFile {
    /// Opens `folder/name` and reads its pickle.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Damaged`].
    pub(crate) fn open(damage: &Damage, name: &str) -> Result<Self> {
        let path = damage.folder().join(name);
        let file = open_regular(&path)?;
        Self::of(damage, name, path, file).map(|(it, _)| it)
    }

    /// The torch file that `bytes` are; `name` is for errors.
    ///
    /// # Errors
    /// As [`TorchFile::open`].
    pub(crate) fn in_memory(damage: &Damage, name: &str, bytes: &[u8]) -> Result<Self> {
        let path = damage.folder().join(name);
        let memory = rustix::fs::memfd_create("torch-file", rustix::fs::MemfdFlags::CLOEXEC).map(File::from);
        let memory = memory.map_err(|errno| CheckpointError::io("copy", &path)(errno.into()))?;
        memory.write_all_at(bytes, 0).map_err(CheckpointError::io("copy", &path))?;
        let (it, memory) = Self::of(damage, name, path, memory)?;
        *it.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory.into());
        Ok(it)
    }

    fn of(damage: &Damage, name: &str, path: PathBuf, file: File) -> Result<(Self, File)> {
        let whole = |problem| match problem {
            Problem::Io(error) => CheckpointError::io("read", &path)(error),
            Problem::Content(problem) => damage.of(name, problem),
        };
        let mut entries = HashMap::new();
        let mut prefix: Option<String> = None;
        for (entry_name, entry) in archive::entries(&file).map_err(whole)? {
            let (folder, rest) = entry_name.split_once('/').unwrap_or(("", &entry_name));
            if *prefix.get_or_insert_with(|| folder.to_owned()) != folder {
                return Err(damage.of(name, "its entries lie in several folders".to_owned()));
            }
            entries.insert(rest.to_owned(), entry);
        }
        let read = |entry_name: &str| -> Result<Vec<u8>> {
            let Some(entry) = entries.get(entry_name) else {
                return Err(damage.of(name, format!("it is no file of torch.save: it has no `{entry_name}`")));
            };
            // The length was checked against that of the file.
            let mut bytes = vec![0; usize::try_from(entry.len).unwrap_or(usize::MAX)];
            file.read_exact_at(&mut bytes, entry.offset).map_err(CheckpointError::io("read", &path))?;
            Ok(bytes)
        };
        if entries.contains_key("byteorder") && read("byteorder")? != b"little" {
            return Err(damage.of(name, "it was written on a machine with another byte order".to_owned()));
        }
        let pickle = parse(&read("data.pkl")?).map_err(|problem| damage.of(name, problem))?;
        let (name, damage, open) = (name.to_owned(), damage.clone(), Mutex::new(None));
        Ok((Self { path, name, damage, entries, pickle, open }, file))
    }

    /// Its name within the folder.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says.
    pub(crate) fn root(&self) -> Item<'_> {
        self.pickle.root()
    }

    /// An error about this file.
    pub(crate) fn damaged(&self, problem: impl Into<String>) -> CheckpointError {
        self.damage.of(&self.name, problem.into())
    }

    /// Checks a tensor against its storage.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] for a storage that is missing or shorter, or a view that leaves it.
    pub(crate) fn view(&self, tensor: &TensorRef) -> Result<View> {
        self.try_view(tensor).map_err(|problem| self.damaged(problem))
    }

    pub(crate) fn try_view(&self, tensor: &TensorRef) -> Result<View, String> {
        let TensorRef { storage, offset, shape, stride } = tensor;
        let size = storage.dtype.size();
        let entry_name = format!("data/{}", storage.key);
        let entry =
            self.entries.get(&entry_name).ok_or_else(|| format!("it has no storage `{entry_name}`"))?;
        let bytes = storage.numel.checked_mul(size).and_then(|bytes| u64::try_from(bytes).ok());
        if bytes.is_none_or(|bytes| bytes > entry.len) {
            return Err(format!(
                "storage `{entry_name}` has {} bytes and should hold {} elements of {size}",
                entry.len, storage.numel
            ));
        }
        let outside = || format!("a tensor {shape:?} reaches out of its storage `{entry_name}`");
        let numel = numel(shape).filter(|_| shape.len() == stride.len()).ok_or_else(outside)?;
        if numel > storage.numel.max(MAX_REPEATED) {
            return Err(outside());
        }
        if numel > 0 {
            let last = shape.iter().zip(stride).try_fold(*offset, |last, (dim, stride)| {
                (dim - 1).checked_mul(*stride).and_then(|step| last.checked_add(step))
            });
            if last.is_none_or(|last| last >= storage.numel) {
                return Err(outside());
            }
        }
        let first = if numel == 0 { 0 } else { (offset * size) as u64 };
        let (shape, stride) = (shape.clone(), stride.clone());
        Ok(View { dtype: storage.dtype, shape, stride, at: entry.offset + first, numel })
    }

    /// The bytes of a tensor, row by row.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Damaged`].
    pub(crate) fn bytes_of(&self, view: &View) -> Result<Vec<u8>> {
        let size = view.dtype.size();
        let mut memory = vec![0; view.extent() * size];
        self.read_at(view.at, &mut memory)?;
        if view.is_dense() {
            return Ok(memory);
        }
        let mut dense = Vec::with_capacity(view.numel * size);
        for index in 0..view.numel {
            let at = view.place(index) * size;
            dense.extend_from_slice(&memory[at..at + size]);
        }
        Ok(dense)
    }

    /// Reads bytes from position `at` on.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Damaged`] if the file has become shorter.
    pub(crate) fn read_at(&self, at: u64, dst: &mut [u8]) -> Result<()> {
        self.handle()?.read_exact_at(dst, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged("it has become shorter"),
            _ => CheckpointError::io("read", &self.path)(error),
        })
    }

    /// Lets go of the open file; the next read opens it again.
    pub(crate) fn close(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Reads every byte and compares checksums, where the writer has left any.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Damaged`].
    pub(crate) fn verify(&self) -> Result<()> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(_, entry)| entry.offset);
        let mut buffer = vec![0; CHECK_BYTES];
        for (name, entry) in entries {
            let mut hasher = crc32fast::Hasher::new();
            let mut done = 0;
            while done < entry.len {
                let len = usize::try_from(entry.len - done).unwrap_or(usize::MAX).min(CHECK_BYTES);
                self.read_at(entry.offset + done, &mut buffer[..len])?;
                hasher.update(&buffer[..len]);
                done += len as u64;
            }
            let crc = hasher.finalize();
            if entry.crc != 0 && entry.crc != crc {
                let expected = entry.crc;
                return Err(self.damaged(format!(
                    "the checksum of its entry `{name}` is {crc:08x} and should be {expected:08x}"
                )));
            }
        }
        Ok(())
    }

    fn handle(&self) -> Result<std::sync::Arc<File>> {
        // An option is whole whatever a thread did before it panicked.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*open {
            return Ok(file.clone());
        }
        let file = std::sync::Arc::new(open_regular(&self.path)?);
        *open = Some(file.clone());
        Ok(file)
    }
}

/// Opens a regular file; never waits, whatever is behind the name.
fn open_regular(path: &Path) -> Result<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map(File::from);
    let file = file.map_err(|errno| CheckpointError::io("open", path)(errno.into()))?;
    let metadata = file.metadata().map_err(CheckpointError::io("open", path))?;
    if !metadata.is_file() {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
        return Err(CheckpointError::io("open", path)(error));
    }
    Ok(file)
}
