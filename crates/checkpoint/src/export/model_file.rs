//! A model that is written tensor by tensor, by somebody who has one of them in memory at a time.

use std::{collections::VecDeque, path::Path};

use super::{
    ExportFormat,
    file::{WeightsFile, bytes_of},
};
use crate::{CheckpointError, Result, TensorFacts, output::Output};

/// A file of weights that appears under its name when it is complete. Dropped without [`ModelFile::finish`], it vanishes.
pub struct ModelFile {
    output: Output,
    file: WeightsFile,
    next: VecDeque<TensorFacts>,
}

impl std::fmt::Debug for ModelFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ModelFile({} tensors to come)", self.next.len())
    }
}

impl ModelFile {
    /// Begins `folder/name`, with `tensors` in the order in which they will be written, of which `tied` have other names as
    /// well: (other name, name).
    ///
    /// # Errors
    /// [`CheckpointError::Unwritable`] for what the format does not hold; [`CheckpointError::Io`].
    pub fn create(
        folder: &Path,
        name: &str,
        format: ExportFormat,
        tensors: Vec<TensorFacts>,
        tied: &[(String, String)],
    ) -> Result<Self> {
        let mut output = Output::begin(folder)?;
        let file = WeightsFile::create(&mut output, name, format, &tensors, tied)?;
        Ok(Self { output, file, next: tensors.into() })
    }

    /// Writes the next tensor, row by row, little endian.
    ///
    /// # Errors
    /// [`CheckpointError::Unwritable`] if it is not the next one or has another size; [`CheckpointError::Io`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let unwritable =
            |problem: String| Err(CheckpointError::Unwritable { what: format!("tensor `{name}`"), problem });
        match self.next.pop_front() {
            Some(facts) if facts.name == name && bytes_of(&facts) == bytes.len() as u64 => {}
            Some(facts) => {
                return unwritable(format!(
                    "it has {} bytes, and `{}` of {} bytes is the next one in the file",
                    bytes.len(),
                    facts.name,
                    bytes_of(&facts)
                ));
            }
            None => return unwritable("the file has all its tensors".to_owned()),
        }
        self.file.begin()?;
        self.file.bytes(bytes)?;
        self.file.end()
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`CheckpointError::Unwritable`] if tensors are missing; [`CheckpointError::Io`].
    pub fn finish(self) -> Result<()> {
        if let Some(facts) = self.next.front() {
            let what = format!("tensor `{}`", facts.name);
            return Err(CheckpointError::Unwritable { what, problem: "it was not given".to_owned() });
        }
        self.file.finish()?;
        self.output.commit(&[])
    }
}
