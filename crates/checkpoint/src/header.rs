//! The header of a safetensors file: 8 bytes of length, then JSON that names each tensor, its dtype, shape and bytes.

use std::collections::{HashMap, HashSet};

use safetensors::tensor::{Metadata, TensorInfo};

use crate::{ElementType, FileRecord, kind};

/// Data starts at a multiple of this many bytes, so that it can be read with direct I/O.
const DATA_ALIGN: usize = 4096;
/// Readers of the format refuse longer headers.
const MAX_HEADER: usize = 100_000_000;
/// Bytes of the length before the header.
const LENGTH_BYTES: usize = 8;

/// One tensor of a file.
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) dtype: ElementType,
    pub(crate) shape: Vec<usize>,
    /// Size in bytes.
    pub(crate) bytes: usize,
}

/// The name of a slice's tensor and its shape. A whole parameter keeps its shape and, if it is a weight, its plain
/// name; a part of one is flat and says which elements it holds: `exp_avg/blocks.0.weight[1024:2048]`.
pub(crate) fn slice_entry(
    kind: &str,
    param: &str,
    shape: &[usize],
    start: usize,
    len: usize,
) -> (String, Vec<usize>) {
    let whole = start == 0 && crate::record::numel(shape) == Some(len);
    let prefix = if kind == kind::WEIGHT { String::new() } else { format!("{kind}/") };
    if whole {
        (format!("{prefix}{param}"), shape.to_vec())
    } else {
        (format!("{prefix}{param}[{start}:{}]", start + len), vec![len])
    }
}

/// The header for tensors that follow each other in this order, padded so that the data is aligned.
///
/// # Errors
/// Two tensors of one name, or more tensors than a header may name.
pub(crate) fn build(entries: &[Entry]) -> Result<Vec<u8>, String> {
    build_with(entries, HashMap::new())
}

/// [`build`] with more texts for the header's metadata.
pub(crate) fn build_with(
    entries: &[Entry],
    mut metadata: HashMap<String, String>,
) -> Result<Vec<u8>, String> {
    let mut seen = HashSet::new();
    let mut infos = Vec::with_capacity(entries.len());
    let mut offset = 0usize;
    for entry in entries {
        if entry.key == "__metadata__" || !seen.insert(entry.key.as_str()) {
            return Err(format!("two tensors of a file are called `{}`", entry.key));
        }
        let end = offset.checked_add(entry.bytes).ok_or("the file is larger than memory has addresses")?;
        let info = TensorInfo {
            dtype: entry.dtype.safetensors(),
            shape: entry.shape.clone(),
            data_offsets: (offset, end),
        };
        infos.push((entry.key.clone(), info));
        offset = end;
    }
    metadata.insert("format".to_owned(), "pt".to_owned());
    let metadata = Metadata::new(Some(metadata), infos).map_err(|error| error.to_string())?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| error.to_string())?;
    let padded = (LENGTH_BYTES + json.len()).next_multiple_of(DATA_ALIGN) - LENGTH_BYTES;
    if padded > MAX_HEADER {
        return Err(format!(
            "{} tensors need a header of {padded} bytes, at most {MAX_HEADER}",
            entries.len()
        ));
    }
    json.resize(padded, b' ');
    let mut header = (padded as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// The number of bytes of the JSON, from the first 8 bytes of a file of `file_bytes`.
pub(crate) fn json_len(start: [u8; LENGTH_BYTES], file_bytes: u64) -> Result<usize, String> {
    let len = u64::from_le_bytes(start);
    let fits = len <= MAX_HEADER as u64 && len + LENGTH_BYTES as u64 <= file_bytes;
    usize::try_from(len)
        .ok()
        .filter(|_| fits)
        .ok_or_else(|| format!("a header of {len} bytes in a file of {file_bytes}"))
}

/// Checks that a header says the same as the manifest.
pub(crate) fn agrees(json: &[u8], file: &FileRecord) -> Result<(), String> {
    let metadata: Metadata =
        serde_json::from_slice(json).map_err(|error| format!("its header is broken: {error}"))?;
    let data_start = (LENGTH_BYTES + json.len()) as u64;
    if data_start.checked_add(metadata.data_len() as u64) != Some(file.bytes) {
        return Err("its header describes a file of another size".to_owned());
    }
    let slices =
        file.slices.iter().map(|slice| (slice.key.as_str(), slice.dtype, slice.offset, Some(slice.len)));
    let tensors = file.tensors.iter().map(|tensor| {
        (tensor.name.as_str(), tensor.dtype, tensor.offset, crate::record::numel(&tensor.shape))
    });
    let blobs = file
        .blobs
        .iter()
        .map(|blob| (blob.name.as_str(), ElementType::U8, blob.offset, usize::try_from(blob.bytes).ok()));
    let mut count = 0;
    for (key, dtype, offset, len) in slices.chain(tensors).chain(blobs) {
        count += 1;
        let info = metadata.info(key).ok_or_else(|| format!("its header does not name `{key}`"))?;
        let same = info.dtype == dtype.safetensors()
            && data_start + info.data_offsets.0 as u64 == offset
            && Some(info.data_offsets.1 - info.data_offsets.0) == len.map(|len| len * dtype.size());
        if !same {
            return Err(format!("its header and the manifest disagree about `{key}`"));
        }
    }
    if metadata.offset_keys().len() != count {
        return Err("its header names tensors that the manifest does not".to_owned());
    }
    Ok(())
}
