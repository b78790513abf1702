//! What is in a folder of checkpoints, and what is in one checkpoint.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use serde::Serialize;
use serde_json::Value;

use crate::{
    CheckpointError, ElementType, Location, Result, Source, TensorFacts,
    latest::{original_file, read_latest},
    manifest::{MANIFEST, is_file_name},
    record::numel,
    tag::{tag_of_draft, tag_of_replaced},
    validate_tag,
};

/// A checkpoint, or what is left of one, in a folder of checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TagFacts {
    /// The tag; of a save that has not finished, the name of its temporary folder.
    pub tag: String,
    /// Whether `latest` names it.
    pub latest: bool,
    /// Why it cannot be read; none for a complete checkpoint. Contents are not read for this.
    pub problem: Option<String>,
    /// The format, where that is known.
    pub format: Option<String>,
    /// Number of ranks that wrote it.
    pub world: Option<usize>,
    /// The ZeRO stage it was written at.
    pub stage: Option<u8>,
    /// Bytes of its files.
    pub bytes: u64,
    /// When its folder last changed, milliseconds since 1970 UTC.
    pub changed_at_ms: Option<u64>,
}

/// All checkpoints of a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DirFacts {
    /// The folder.
    pub dir: PathBuf,
    /// The tag in `latest`.
    pub latest: Option<String>,
    /// The checkpoints, newest first.
    pub tags: Vec<TagFacts>,
}

/// One kind of what is stored of a parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KindFacts {
    /// The kind.
    pub kind: String,
    /// Its dtype.
    pub dtype: ElementType,
}

/// A parameter of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParamFacts {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The optimizer's parameter group; none for a frozen one.
    pub group: Option<usize>,
    /// What is stored of it.
    pub kinds: Vec<KindFacts>,
}

/// How much there is of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Number of tensors.
    pub tensors: usize,
    /// Number of elements.
    pub elements: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BufferFacts {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its dtype.
    pub dtype: ElementType,
}

/// What is in one checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointFacts {
    /// Its folder.
    pub folder: PathBuf,
    /// Its tag.
    pub tag: String,
    /// The format, in words.
    pub format: String,
    /// Number of ranks that wrote it.
    pub world: usize,
    /// The ZeRO stage it was written at.
    pub stage: Option<u8>,
    /// Number of elements of all parameters.
    pub elements: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// How much there is of each kind; `buffers` of the tensors that are not parameters.
    pub kinds: BTreeMap<String, Amount>,
    /// The parameters, in the model's order.
    pub params: Vec<ParamFacts>,
    /// The other tensors.
    pub buffers: Vec<BufferFacts>,
    /// Other names of parameters and buffers: (other name, name).
    pub tied: Vec<(String, String)>,
    /// What training continues from.
    pub state: Value,
}

/// The checkpoints of a folder. Checks manifests and sizes, not contents.
///
/// # Errors
/// [`CheckpointError::Io`] if `dir` cannot be listed.
pub fn inspect_dir(dir: &Path) -> Result<DirFacts> {
    // What is wrong with `latest` is said where it is needed, and not here.
    let latest = read_latest(dir).ok().flatten();
    let mut tags: Vec<TagFacts> = Vec::new();
    for entry in fs::read_dir(dir).map_err(CheckpointError::io("list", dir))? {
        let Ok(name) = entry.map_err(CheckpointError::io("list", dir))?.file_name().into_string() else {
            continue;
        };
        if let Some(facts) = tag_facts(dir, &name, latest.as_deref())
            && !tags.iter().any(|known| known.tag == facts.tag)
        {
            tags.push(facts);
        }
    }
    tags.sort_by(|one, other| (other.changed_at_ms, &other.tag).cmp(&(one.changed_at_ms, &one.tag)));
    Ok(DirFacts { dir: dir.to_owned(), latest, tags })
}

/// What the folder `name` is; `None` if it has nothing to do with checkpoints.
fn tag_facts(dir: &Path, name: &str, latest: Option<&str>) -> Option<TagFacts> {
    let folder = dir.join(name);
    if !folder.is_dir() {
        return None;
    }
    let mut facts = TagFacts {
        tag: name.to_owned(),
        latest: latest == Some(name),
        problem: None,
        format: None,
        world: None,
        stage: None,
        bytes: folder_size(&folder).0,
        changed_at_ms: changed_at_ms(&folder),
    };
    if tag_of_draft(name).is_some() {
        facts.problem = Some("a save that is under way, or of a job that died".to_owned());
        return Some(facts);
    }
    let tag = tag_of_replaced(name).unwrap_or(name);
    if validate_tag(tag).is_err() || !(facts.latest || holds_a_checkpoint(&folder)) {
        return None;
    }
    let location = Location { dir: dir.to_owned(), tag: Some(tag.to_owned()) };
    tag.clone_into(&mut facts.tag);
    facts.latest = latest == Some(tag);
    match location.open() {
        Ok(source) => {
            facts.format = Some(source.format());
            facts.world = Some(source.world());
            facts.stage = source.stage();
        }
        Err(CheckpointError::Damaged { file, problem, .. }) => {
            facts.problem = Some(format!("{file}: {problem}"));
        }
        Err(error) => facts.problem = Some(error.to_string()),
    }
    Some(facts)
}

/// Whether something in the folder was written by a save.
fn holds_a_checkpoint(folder: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder) else { return false };
    let ours = |name: &str| name == MANIFEST || is_file_name(name);
    original_file(folder).is_some()
        || entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).any(|name| ours(&name))
}

/// What is in a checkpoint. Contents are not read.
pub fn inspect(source: &dyn Source) -> CheckpointFacts {
    let mut kinds: BTreeMap<String, Amount> = BTreeMap::new();
    let mut count = |kind: &str, shape: &[usize], dtype: ElementType| {
        let amount = kinds.entry(kind.to_owned()).or_default();
        let elements = numel(shape).unwrap_or(0) as u64;
        amount.tensors += 1;
        amount.elements += elements;
        amount.bytes += elements * dtype.size() as u64;
    };
    let mut params = Vec::new();
    for param in source.params() {
        let mut stored = Vec::new();
        for kind in source.kinds(&param.name) {
            if let Some(dtype) = source.dtype(&param.name, kind) {
                let dtype = ElementType::from(dtype);
                count(kind, &param.shape, dtype);
                stored.push(KindFacts { kind: kind.to_owned(), dtype });
            }
        }
        let (name, shape) = (param.name.clone(), param.shape.clone());
        params.push(ParamFacts { name, shape, group: param.group, kinds: stored });
    }
    let buffers: Vec<BufferFacts> = source
        .tensors()
        .into_iter()
        .map(|TensorFacts { name, dtype, shape }| BufferFacts { name, shape, dtype })
        .collect();
    for buffer in &buffers {
        count("buffers", &buffer.shape, buffer.dtype);
    }
    CheckpointFacts {
        folder: source.folder().to_owned(),
        tag: source.tag().to_owned(),
        format: source.format(),
        world: source.world(),
        stage: source.stage(),
        elements: source
            .params()
            .iter()
            .map(|param| numel(&param.shape).unwrap_or(0) as u64)
            .fold(0, u64::saturating_add),
        bytes: folder_size(source.folder()).0,
        kinds,
        params,
        buffers,
        tied: source.tied().to_vec(),
        state: source.state().clone(),
    }
}

/// Bytes and number of the files in a folder and the folders in it. What cannot be read counts nothing.
pub(crate) fn folder_size(folder: &Path) -> (u64, u64) {
    let Ok(entries) = fs::read_dir(folder) else { return (0, 0) };
    let of = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_size(&entry.path()),
        Ok(metadata) if metadata.is_file() => (metadata.len(), 1),
        _ => (0, 0),
    };
    entries.filter_map(Result::ok).map(of).fold((0, 0), |sum, it| (sum.0 + it.0, sum.1 + it.1))
}

fn changed_at_ms(path: &Path) -> Option<u64> {
    let since = fs::metadata(path).ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_millis()).ok()
}
