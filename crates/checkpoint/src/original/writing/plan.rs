//! One file to be written: its value, and where the elements of its storages come from.

use std::{ops::Range, path::Path};

use deepspeed_core::{DType, Span};
use half::{bf16, f16};

use crate::{
    CheckpointError, ElementType, Progress, Result, Source,
    disk::{Disk, RealDisk},
    original::{
        pickle::Object,
        torch::{Storage, TorchWriter},
    },
};

/// Zeros written at a time, bytes.
const ZEROS: [u8; 4096] = [0; 4096];

/// A part of a storage.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// Elements of a parameter's kind, cast to the storage's dtype.
    Elements { param: String, kind: String, range: Range<usize> },
    /// Zeros.
    Padding(usize),
    /// Bytes as they are.
    Bytes(Vec<u8>),
}

impl Piece {
    pub(super) fn elements(param: &str, kind: &str, range: Range<usize>) -> Self {
        Self::Elements { param: param.to_owned(), kind: kind.to_owned(), range }
    }
}

/// A file.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) name: String,
    pub(super) object: Object,
    pub(super) storages: Storages,
}

/// The storages of a file, in order.
#[derive(Debug, Default)]
pub(super) struct Storages(Vec<(Storage, Vec<Piece>)>);

impl Storages {
    /// Adds a storage that is one tensor, and gives that.
    pub(super) fn tensor(&mut self, dtype: ElementType, shape: &[usize], pieces: Vec<Piece>) -> Object {
        let numel = shape.iter().product();
        let storage = Storage { dtype, numel };
        let tensor = storage.tensor(self.0.len(), 0..numel, shape.to_vec());
        self.0.push((storage, pieces));
        tensor.expect("invariant: callers check that torch has a storage of the type")
    }
}

impl Plan {
    /// Bytes of all storages.
    pub(super) fn bytes(&self) -> u64 {
        self.storages.0.iter().map(|(storage, _)| (storage.numel * storage.dtype.size()) as u64).sum()
    }

    /// Writes and syncs the file in `folder`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; errors of reading.
    pub(super) fn write(&self, source: &dyn Source, folder: &Path, progress: &dyn Progress) -> Result<()> {
        let path = folder.join(&self.name);
        let mut file = RealDisk.create_file(&path, 0).map_err(CheckpointError::io("create", &path))?;
        // Readers take everything up to the first slash for the archive's name.
        let archive = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("archive");
        {
            let sink = |bytes: &[u8]| file.write(bytes).map_err(CheckpointError::io("write", &path));
            let mut writer = TorchWriter::start(sink, archive, &self.object)?;
            for (storage, pieces) in &self.storages.0 {
                writer.begin_storage()?;
                for piece in pieces {
                    put(source, piece, storage.dtype, &mut |bytes| {
                        progress.advance(bytes.len() as u64);
                        writer.bytes(bytes)
                    })?;
                }
                writer.end_storage()?;
            }
            writer.finish()?;
        }
        file.sync().map_err(CheckpointError::io("sync", &path))
    }
}

fn put(
    source: &dyn Source,
    piece: &Piece,
    dtype: ElementType,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let (param, kind, range) = match piece {
        Piece::Elements { param, kind, range } => (param, kind, range),
        Piece::Padding(elements) => {
            let mut left = elements * dtype.size();
            while left > 0 {
                let len = left.min(ZEROS.len());
                write(&ZEROS[..len])?;
                left -= len;
            }
            return Ok(());
        }
        Piece::Bytes(bytes) => return write(bytes),
    };
    let mut written = Ok(());
    source.visit(param, kind, range.clone(), &mut |_, span| {
        if written.is_ok() {
            written = cast(span, dtype.dtype(), write);
        }
    })?;
    written
}

/// Writes the elements in `dtype`, rounded to nearest even.
fn cast(span: Span<'_>, dtype: Option<DType>, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let Some(dtype) = dtype.filter(|dtype| *dtype != span.dtype()) else {
        return write(span.as_bytes());
    };
    let wide: Vec<f32> = if let Some(values) = span.as_f32() {
        values.to_vec()
    } else if let Some(values) = span.as_bf16() {
        values.iter().map(|value| value.to_f32()).collect()
    } else {
        span.as_f16().unwrap_or_default().iter().map(|value| value.to_f32()).collect()
    };
    match dtype {
        DType::F32 => write(Span::from(&wide[..]).as_bytes()),
        DType::BF16 => {
            let narrow: Vec<bf16> = wide.iter().map(|value| bf16::from_f32(*value)).collect();
            write(Span::from(&narrow[..]).as_bytes())
        }
        DType::F16 => {
            let narrow: Vec<f16> = wide.iter().map(|value| f16::from_f32(*value)).collect();
            write(Span::from(&narrow[..]).as_bytes())
        }
    }
}
