//! One file of weights that is being written, in any format: all its tensors are known at the start, their bytes follow.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::ExportFormat;
use crate::{
    CheckpointError, Result, TensorFacts,
    header::{self, Entry},
    original::{
        pickle::Object,
        torch::{Storage, TorchWriter},
    },
    output::{Output, OutputFile},
    record::numel,
};

/// A file whose tensors are written in the order in which they were announced.
pub(crate) enum WeightsFile {
    /// The header is written, the bytes of all tensors follow.
    Safetensors(OutputFile),
    /// A tensor is a storage of its own.
    Torch {
        /// Writes into `file`.
        writer: TorchWriter<Sink>,
        /// For the sync at the end.
        file: Arc<Mutex<OutputFile>>,
    },
}

/// Where the bytes of a torch file go.
type Sink = Box<dyn FnMut(&[u8]) -> Result<()> + Send>;

impl WeightsFile {
    /// Begins the file `name`, which holds `tensors` and, under other names, some of them again.
    ///
    /// # Errors
    /// [`CheckpointError::Unwritable`] for what the format does not hold; [`CheckpointError::Io`].
    pub(crate) fn create(
        output: &mut Output,
        name: &str,
        format: ExportFormat,
        tensors: &[TensorFacts],
        tied: &[(String, String)],
    ) -> Result<Self> {
        let unwritable =
            |problem: String| CheckpointError::Unwritable { what: format!("file {name}"), problem };
        match format {
            ExportFormat::Safetensors => {
                let mut entries = Vec::with_capacity(tensors.len());
                for tensor in tensors {
                    let bytes =
                        usize::try_from(bytes_of(tensor)).map_err(|error| unwritable(error.to_string()))?;
                    let (key, shape) = (tensor.name.clone(), tensor.shape.clone());
                    entries.push(Entry { key, dtype: tensor.dtype, shape, bytes });
                }
                // Where `safetensors.torch` and `huggingface_hub` put the names that they leave out.
                let metadata: HashMap<String, String> = tied.iter().cloned().collect();
                let header = header::build_with(&entries, metadata).map_err(unwritable)?;
                let data: u64 = tensors.iter().map(bytes_of).sum();
                let mut file = output.create(name, header.len() as u64 + data)?;
                file.write(&header)?;
                Ok(Self::Safetensors(file))
            }
            ExportFormat::Torch => {
                let object = state_dict(tensors, tied).map_err(unwritable)?;
                // What is around the data is not much, and its size not known yet.
                let file = output.create(name, tensors.iter().map(bytes_of).sum())?;
                let file = Arc::new(Mutex::new(file));
                let sink: Sink = {
                    let file = Arc::clone(&file);
                    Box::new(move |bytes| file.lock().unwrap_or_else(PoisonError::into_inner).write(bytes))
                };
                let archive = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
                Ok(Self::Torch { writer: TorchWriter::start(sink, archive, &object)?, file })
            }
        }
    }

    /// Begins the next tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], here and below.
    pub(crate) fn begin(&mut self) -> Result<()> {
        match self {
            Self::Safetensors(_) => Ok(()),
            Self::Torch { writer, .. } => writer.begin_storage(),
        }
    }

    /// More bytes of the tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Safetensors(file) => file.write(bytes),
            Self::Torch { writer, .. } => writer.bytes(bytes),
        }
    }

    /// Ends the tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn end(&mut self) -> Result<()> {
        match self {
            Self::Safetensors(_) => Ok(()),
            Self::Torch { writer, .. } => writer.end_storage(),
        }
    }

    /// Ends the file and syncs it.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn finish(self) -> Result<()> {
        match self {
            Self::Safetensors(file) => file.finish(),
            Self::Torch { writer, file } => {
                writer.finish()?;
                file.lock().unwrap_or_else(PoisonError::into_inner).sync()
            }
        }
    }
}

/// The state dict that a torch file holds: an `OrderedDict` of tensors, the other names of one at the end.
///
/// # Errors
/// A type of elements that torch has no storage for.
fn state_dict(tensors: &[TensorFacts], tied: &[(String, String)]) -> Result<Object, String> {
    let mut pairs = Vec::with_capacity(tensors.len() + tied.len());
    for (index, tensor) in tensors.iter().enumerate() {
        let numel = numel(&tensor.shape).unwrap_or(0);
        let storage = Storage { dtype: tensor.dtype, numel };
        let value = storage.tensor(index, 0..numel, tensor.shape.clone()).ok_or_else(|| {
            format!("`{}` is of type {}, which torch cannot store", tensor.name, tensor.dtype)
        })?;
        pairs.push((Object::from(tensor.name.as_str()), value));
    }
    let index: HashMap<&str, usize> =
        tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.as_str(), index)).collect();
    for (other, name) in tied {
        if let Some(index) = index.get(name.as_str()) {
            let value = pairs[*index].1.clone();
            pairs.push((Object::from(other.as_str()), value));
        }
    }
    Ok(Object::OrderedDict(pairs))
}

/// The size of a tensor in a file.
pub(crate) fn bytes_of(tensor: &TensorFacts) -> u64 {
    numel(&tensor.shape).unwrap_or(0) as u64 * tensor.dtype.size() as u64
}
