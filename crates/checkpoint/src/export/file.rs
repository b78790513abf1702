//! One file of weights that is being written, in any format: all its tensors are known at the start, their bytes follow.

use std::collections::HashMap;

use super::ExportFormat;
use crate::{
    CheckpointError, Result, TensorFacts,
    header::{self, Entry},
    output::{Output, OutputFile},
    record::numel,
};

/// A file whose tensors are written in the order in which they were announced.
pub(crate) enum WeightsFile {
    /// The header is written, the bytes of all tensors follow.
    Safetensors(OutputFile),
}

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
            ExportFormat::Torch => Err(unwritable("WIP".to_owned())),
        }
    }

    /// Begins the next tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], here and below.
    pub(crate) fn begin(&mut self) -> Result<()> {
        match self {
            Self::Safetensors(_) => Ok(()),
        }
    }

    /// More bytes of the tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Safetensors(file) => file.write(bytes),
        }
    }

    /// Ends the tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn end(&mut self) -> Result<()> {
        match self {
            Self::Safetensors(_) => Ok(()),
        }
    }

    /// Ends the file and syncs it.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn finish(self) -> Result<()> {
        match self {
            Self::Safetensors(file) => file.finish(),
        }
    }
}

/// The size of a tensor in a file.
pub(crate) fn bytes_of(tensor: &TensorFacts) -> u64 {
    numel(&tensor.shape).unwrap_or(0) as u64 * tensor.dtype.size() as u64
}
