//! Small torch files in memory: what is handed to the Python face, made of plain values and tensors only.

use super::{
    pickle::{Item, Object, TensorRef, plain},
    torch::{Storage, TorchFile, TorchWriter},
};

/// Values on their way from files of the original into a torch file of their own.
#[derive(Debug, Default)]
pub(super) struct Blob {
    storages: Vec<(Storage, Vec<u8>)>,
}

impl Blob {
    /// `item` of `file` as a plain value.
    ///
    /// # Errors
    /// What in it is not plain, in words.
    pub(super) fn plain(&mut self, file: &TorchFile, item: Item<'_>) -> Result<Object, String> {
        plain(item, &mut |tensor| self.tensor(file, tensor))
    }

    /// Whether any value was a tensor.
    pub(super) fn has_tensors(&self) -> bool {
        !self.storages.is_empty()
    }

    fn tensor(&mut self, file: &TorchFile, tensor: &TensorRef) -> Result<Object, String> {
        let view = file.try_view(tensor)?;
        let bytes = file.bytes_of(&view).map_err(|error| error.to_string())?;
        let storage = Storage { dtype: view.dtype, numel: view.numel };
        let shape = view.shape.clone();
        let object = storage.tensor(self.storages.len(), 0..view.numel, shape);
        self.storages.push((storage, bytes));
        object.ok_or_else(|| format!("elements of type {} have no storage in torch", view.dtype))
    }

    /// The bytes of a torch file that holds `object`.
    pub(super) fn finish(self, object: &Object) -> Vec<u8> {
        let mut bytes = Vec::new();
        let written = self.write(object, &mut bytes);
        match written {
            Ok(()) => bytes,
            Err(never) => match never {},
        }
    }

    fn write(self, object: &Object, bytes: &mut Vec<u8>) -> Result<(), std::convert::Infallible> {
        let sink = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok(())
        };
        let mut writer = TorchWriter::start(sink, "archive", object)?;
        for (_, memory) in &self.storages {
            writer.begin_storage()?;
            writer.bytes(memory)?;
            writer.end_storage()?;
        }
        writer.finish()
    }
}
