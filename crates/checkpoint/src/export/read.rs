//! The bytes of one tensor of an exported model, piece by piece.

use deepspeed_core::{AlignedBuffer, DType, Span};

use super::{ExportTensor, plan::Content};
use crate::{CheckpointError, Result, Source};

/// Elements converted at a time.
const PIECE: usize = 1 << 18;

/// Reads a tensor in the dtype of the export and hands its bytes to `take` in pieces, in order: row by row, little endian.
///
/// # Errors
/// What reading says, and the first error of `take`.
pub fn read_tensor(
    source: &dyn Source,
    tensor: &ExportTensor,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let numel = tensor.numel();
    if numel == 0 {
        return Ok(());
    }
    match tensor.content {
        Content::Tensor(stored) => {
            let bytes = source.tensor(&tensor.name)?;
            match (stored.dtype(), tensor.dtype.dtype()) {
                (Some(from), Some(to)) if from != to => {
                    // Copied into aligned memory: the bytes of a file may lie anywhere.
                    let mut whole = AlignedBuffer::zeroed(numel, from);
                    let mut target = whole.span_mut();
                    if target.as_bytes_mut().len() != bytes.len() {
                        return Err(CheckpointError::Unwritable {
                            what: format!("tensor `{}`", tensor.name),
                            problem: format!("it has {} bytes and {numel} elements of {from}", bytes.len()),
                        });
                    }
                    target.as_bytes_mut().copy_from_slice(&bytes);
                    cast_pieces(whole.span(), to, &mut take)
                }
                _ => take(&bytes),
            }
        }
        Content::Param(kind) => {
            let Some(dtype) = tensor.dtype.dtype() else {
                return Err(CheckpointError::Unwritable {
                    what: format!("parameter `{}`", tensor.name),
                    problem: format!("parameters are not written as {}", tensor.dtype),
                });
            };
            let mut result = Ok(());
            source.visit(&tensor.name, kind, 0..numel, &mut |_, elements| {
                // A visitor cannot stop the visit: after an error the rest passes by.
                if result.is_ok() {
                    result = cast_pieces(elements, dtype, &mut take);
                }
            })?;
            result
        }
    }
}

fn cast_pieces(elements: Span<'_>, dtype: DType, take: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    if elements.dtype() == dtype {
        return take(elements.as_bytes());
    }
    let mut buffer = AlignedBuffer::zeroed(PIECE.min(elements.len()), dtype);
    let mut start = 0;
    while start < elements.len() {
        let len = PIECE.min(elements.len() - start);
        deepspeed_kernels::cast(elements.slice(start, len), buffer.span_mut().slice_mut(0, len));
        take(buffer.span().slice(0, len).as_bytes())?;
        start += len;
    }
    Ok(())
}
