//! A checkpoint of any format as one of this format.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    io,
    path::{Path, PathBuf},
};

use deepspeed_core::{AlignedBuffer, DType, Rank};

use crate::{
    CheckpointError, CommitParts, Draft, ParamRecord, Progress, RankWriter, Result, Source, TensorSource,
    kind, record::numel,
};

/// The blobs that travel with a checkpoint: what the Python face and the client saved.
const BLOBS: [&str; 2] = ["python", "client_state"];

/// Writes the checkpoint `tag` into `dir`. Rank 0 has all slices; the others, as many as wrote `source`, what only they
/// can know: random states and the client's state. Elements pass through memory piece by piece.
///
/// # Errors
/// [`CheckpointError::Exists`] if there is a checkpoint of that tag and not `overwrite`, or if it is `source` itself; what
/// reading and writing say.
pub fn to_ours(
    source: &dyn Source,
    dir: &Path,
    tag: &str,
    overwrite: bool,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let target = dir.join(tag);
    if target.exists() && (!overwrite || is_same(&target, source.folder())) {
        return Err(CheckpointError::Exists { path: target });
    }
    let draft = Draft::begin(dir, tag, RandomState::new().hash_one(std::process::id()))?;
    let world = source.world().max(1);
    let buffers = source.tensors();
    let contents = buffers.iter().map(|it| source.tensor(&it.name)).collect::<Result<Vec<_>>>()?;
    let mut writer = RankWriter::new(draft.folder(), Rank(0), world);
    for param in source.params() {
        let len = numel(&param.shape).unwrap_or(0);
        for Stored { kind, from, dtype } in stored(source, param) {
            writer.slice_from((&param.name, kind, &param.shape), 0, (len, dtype), move |start, memory| {
                read_as(source, (&param.name, from), start, dtype, memory).map_err(io::Error::other)?;
                progress.advance(memory.len() as u64);
                Ok(())
            })?;
        }
    }
    for (facts, bytes) in buffers.iter().zip(&contents) {
        let tensor = TensorSource { name: &facts.name, dtype: facts.dtype, shape: &facts.shape, bytes };
        writer.tensor(tensor)?;
    }
    add_blobs(&mut writer, source, Rank(0))?;
    progress.begin("converting", writer.bytes());
    let mut records = vec![writer.finish()?];
    for rank in 1..world {
        let rank = Rank::from_index(rank);
        let mut writer = RankWriter::new(draft.folder(), rank, world);
        add_blobs(&mut writer, source, rank)?;
        records.push(writer.finish()?);
    }
    let parts = CommitParts {
        world,
        stage: source.stage().unwrap_or(0),
        dtype: trained_dtype(source),
        params: source.params().to_vec(),
        tied: source.tied().to_vec(),
        state: source.state().clone(),
        frozen_excluded: lacks_frozen(source),
    };
    draft.commit(&records, parts, true)
}

/// One kind of a parameter in the new checkpoint.
struct Stored<'a> {
    kind: &'a str,
    /// The kind it is read from.
    from: &'a str,
    dtype: DType,
}

/// What is to be stored of a parameter: what `source` has and, where that is only the fp32 master, the weights made of it.
fn stored<'a>(source: &'a dyn Source, param: &ParamRecord) -> Vec<Stored<'a>> {
    let name = &param.name;
    let kinds = source.kinds(name);
    let mut stored: Vec<Stored<'a>> = kinds
        .iter()
        .filter_map(|kind| Some(Stored { kind, from: kind, dtype: source.dtype(name, kind)? }))
        .collect();
    if !kinds.contains(&kind::WEIGHT)
        && let Some(master) = stored.iter().position(|it| it.kind == kind::MASTER)
    {
        let dtype = param.dtype.dtype().unwrap_or(DType::F32);
        let weights = Stored { kind: kind::WEIGHT, from: kind::MASTER, dtype };
        if dtype == DType::F32 {
            stored[master] = weights;
        } else {
            stored.push(weights);
        }
    }
    stored
}

/// Fills `memory` with elements of a kind of a parameter in `dtype`, from element `start` on.
fn read_as(
    source: &dyn Source,
    (name, kind): (&str, &str),
    start: usize,
    dtype: DType,
    memory: &mut [u8],
) -> Result<()> {
    // The memory may lie anywhere, elements may not.
    let mut elements = AlignedBuffer::zeroed(memory.len() / dtype.size(), dtype);
    let range = start..start + elements.len();
    let mut target = elements.span_mut();
    source.visit(name, kind, range, &mut |at, piece| {
        deepspeed_kernels::cast(piece, target.slice_mut(at - start, piece.len()));
    })?;
    memory.copy_from_slice(elements.span().as_bytes());
    Ok(())
}

/// The dtype of the first parameter that was trained.
fn trained_dtype(source: &dyn Source) -> DType {
    let trained = source.params().iter().find(|param| param.group.is_some());
    trained.and_then(|param| param.dtype.dtype()).unwrap_or(DType::F32)
}

fn add_blobs(writer: &mut RankWriter<'_>, source: &dyn Source, rank: Rank) -> Result<()> {
    for name in BLOBS {
        if let Some(bytes) = source.blob(rank, name)? {
            writer.blob(name, bytes);
        }
    }
    Ok(())
}

/// Whether weights of frozen parameters are not there.
fn lacks_frozen(source: &dyn Source) -> bool {
    let mut frozen = source.params().iter().filter(|param| param.group.is_none());
    frozen.any(|param| numel(&param.shape) != Some(0) && source.kinds(&param.name).is_empty())
}

fn is_same(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}
