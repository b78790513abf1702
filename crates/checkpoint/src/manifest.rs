//! `manifest.json`: what is where. Checked in every respect before anything else believes it.

use std::collections::HashSet;

use deepspeed_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    ElementType, FileRecord, ParamRecord, coverage,
    record::{RankRecord, numel},
};

/// The version of the format that this software writes, and the newest it reads.
pub const FORMAT_VERSION: u64 = 1;

/// The manifest's name inside a checkpoint's folder.
pub(crate) const MANIFEST: &str = "manifest.json";
/// The name of the manifest's checksum.
pub(crate) const MANIFEST_CHECKSUM: &str = "manifest.xxh3";
/// What `format` says.
const FORMAT: &str = "deepspeed-checkpoint";
/// Larger chunks than this are refused when reading: they would make a reader check far more than it needs.
const MAX_CHUNK_BYTES: u64 = 1 << 30;

/// Everything that is known about a checkpoint without opening its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `deepspeed-checkpoint`.
    pub format: String,
    /// Raised when an older reader would misunderstand.
    pub format_version: u64,
    /// Name and version of the software that wrote it.
    pub writer: String,
    /// When it was committed, milliseconds since 1970 UTC.
    pub saved_at_ms: u64,
    /// Whether `latest` was to name it: it is one to go on from, and retention may remove it. One that is kept aside says
    /// false.
    #[serde(default)]
    pub save_latest: bool,
    /// Number of ranks that wrote it.
    pub world: usize,
    /// The ZeRO stage it was written at.
    pub stage: u8,
    /// The dtype the model was trained in.
    pub dtype: ElementType,
    /// Whether weights of frozen parameters were left out on purpose.
    pub frozen_excluded: bool,
    /// Whatever the engine needs to continue: counters, schedule, loss scaler, parameter groups, data position.
    pub state: Value,
    /// Bytes covered by each checksum of a file; the last chunk of a file may be shorter.
    pub chunk_bytes: u64,
    /// The parameters in registration order.
    pub params: Vec<ParamRecord>,
    /// Other names of parameters and whole tensors: (other name, name under which it is stored).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tied: Vec<(String, String)>,
    /// Where hosts share no storage: which part of the files is in this folder. The others are on other hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostPart>,
    /// The files.
    pub files: Vec<FileRecord>,
}

/// One host's part of a checkpoint whose files are spread over the storage of several hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPart {
    /// The ranks whose files are here.
    pub ranks: Vec<usize>,
    /// The same text on all hosts, and another for every save.
    pub save: String,
}

/// The part of a manifest that every version has.
#[derive(Deserialize)]
struct Preamble {
    format: String,
    format_version: u64,
}

/// Why a text is not a manifest that can be used.
pub(crate) enum ManifestProblem {
    /// A later version wrote it.
    Version(u64),
    /// Anything else.
    Damaged(String),
}

impl From<String> for ManifestProblem {
    fn from(problem: String) -> Self {
        Self::Damaged(problem)
    }
}

/// What the caller of a save knows of the whole model.
#[derive(Clone, Debug)]
pub struct CommitParts {
    /// Number of ranks that wrote files.
    pub world: usize,
    /// The ZeRO stage.
    pub stage: u8,
    /// The dtype the model is trained in.
    pub dtype: DType,
    /// All parameters in registration order, frozen and zero-sized ones included.
    pub params: Vec<ParamRecord>,
    /// Other names of parameters and whole tensors: (other name, name under which it is stored).
    pub tied: Vec<(String, String)>,
    /// Whatever the engine needs to continue. JSON has no NaN and no infinity: they would come back as `null`.
    pub state: Value,
    /// Whether weights of frozen parameters are left out on purpose.
    pub frozen_excluded: bool,
}

impl Manifest {
    /// Whether a file is in this checkpoint's own folder.
    pub fn is_here(&self, file: &FileRecord) -> bool {
        self.host.as_ref().is_none_or(|host| host.ranks.contains(&file.rank))
    }

    /// Puts together what the ranks wrote.
    ///
    /// # Errors
    /// What does not add up.
    pub(crate) fn new(
        parts: CommitParts,
        records: &[RankRecord],
        chunk_bytes: u64,
        saved_at_ms: u64,
        save_latest: bool,
    ) -> Result<Self, String> {
        let mut by_rank: Vec<Option<&RankRecord>> = vec![None; parts.world];
        for record in records {
            let place = by_rank
                .get_mut(record.rank)
                .ok_or_else(|| format!("rank {} reports to a world of {}", record.rank, parts.world))?;
            if place.replace(record).is_some() {
                return Err(format!("rank {} reports twice", record.rank));
            }
        }
        let mut files = Vec::new();
        for (rank, record) in by_rank.into_iter().enumerate() {
            let record = record.ok_or_else(|| format!("rank {rank} of {} did not report", parts.world))?;
            files.extend(record.files.iter().cloned());
        }
        let manifest = Self {
            format: FORMAT.to_owned(),
            format_version: FORMAT_VERSION,
            writer: concat!("deepspeed ", env!("CARGO_PKG_VERSION")).to_owned(),
            saved_at_ms,
            save_latest,
            world: parts.world,
            stage: parts.stage,
            dtype: parts.dtype.into(),
            frozen_excluded: parts.frozen_excluded,
            state: parts.state,
            chunk_bytes,
            host: None,
            params: parts.params,
            tied: parts.tied,
            files,
        };
        manifest.validate()?;
        Ok(manifest)
    }

    /// Reads a manifest and checks it.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestProblem> {
        let not_json = |error: serde_json::Error| format!("it is not a manifest: {error}");
        let preamble: Preamble = serde_json::from_slice(bytes).map_err(not_json)?;
        if preamble.format != FORMAT {
            return Err(format!("its format is `{}` and not `{FORMAT}`", preamble.format).into());
        }
        if preamble.format_version > FORMAT_VERSION {
            return Err(ManifestProblem::Version(preamble.format_version));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(not_json)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The manifest as text: one parameter, slice or blob to a line, so that it can be read and compared.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let value = serde_json::to_value(self).expect("invariant: a manifest serialises to JSON");
        let mut text = String::new();
        write_outline(&value, 0, &mut text);
        text.push('\n');
        text.into_bytes()
    }

    fn validate(&self) -> Result<(), String> {
        if self.format_version == 0 {
            return Err("format version 0 does not exist".to_owned());
        }
        if self.chunk_bytes == 0 || self.chunk_bytes > MAX_CHUNK_BYTES {
            return Err(format!("chunks of {} bytes, expected 1 to {MAX_CHUNK_BYTES}", self.chunk_bytes));
        }
        let mut names = HashSet::new();
        for param in &self.params {
            if !names.insert(param.name.as_str()) {
                return Err(format!("parameter `{}` is there twice", param.name));
            }
            numel(&param.shape).and_then(|len| len.checked_mul(param.dtype.size())).ok_or_else(|| {
                format!("parameter `{}` of shape {:?} is too large", param.name, param.shape)
            })?;
        }
        let mut names = HashSet::new();
        for file in &self.files {
            if !is_file_name(&file.name) {
                return Err(format!("`{}` is not the name of a file of a checkpoint", file.name));
            }
            if !names.insert(file.name.as_str()) {
                return Err(format!("file {} is there twice", file.name));
            }
            self.validate_file(file).map_err(|problem| format!("{}: {problem}", file.name))?;
        }
        coverage::check(&self.params, &self.files, self.frozen_excluded)?;
        self.validate_tied()
    }

    fn validate_tied(&self) -> Result<(), String> {
        let tensors = self.files.iter().flat_map(|file| &file.tensors).map(|tensor| tensor.name.as_str());
        let stored: HashSet<&str> = self.params.iter().map(|it| it.name.as_str()).chain(tensors).collect();
        let mut others = HashSet::new();
        for (other, name) in &self.tied {
            if !stored.contains(name.as_str()) {
                return Err(format!("`{other}` is another name of `{name}`, which is not there"));
            }
            if stored.contains(other.as_str()) || !others.insert(other.as_str()) {
                return Err(format!("`{other}` is there twice"));
            }
        }
        Ok(())
    }

    fn validate_file(&self, file: &FileRecord) -> Result<(), String> {
        if file.rank >= self.world {
            return Err(format!("rank {} in a world of {}", file.rank, self.world));
        }
        let chunks = file.bytes.div_ceil(self.chunk_bytes);
        if file.checksums.len() as u64 != chunks {
            return Err(format!("{} checksums for {chunks} chunks", file.checksums.len()));
        }
        let inside = |what: &str, offset: u64, elements: usize, element: usize| {
            let bytes = (elements as u64).checked_mul(element as u64);
            let end = bytes.and_then(|bytes| offset.checked_add(bytes));
            match end {
                Some(end) if end <= file.bytes => Ok(()),
                _ => Err(format!("{what} reaches past the end of the file, {} bytes", file.bytes)),
            }
        };
        for slice in &file.slices {
            inside(&slice.key, slice.offset, slice.len, slice.dtype.size())?;
            if slice.dtype.dtype().is_none() {
                return Err(format!("{}: parameters cannot be of type {}", slice.key, slice.dtype));
            }
            if slice.kind.contains('/') || slice.kind.is_empty() {
                return Err(format!("{}: `{}` is not a kind", slice.key, slice.kind));
            }
        }
        for tensor in &file.tensors {
            let len = numel(&tensor.shape).ok_or_else(|| format!("{} is too large", tensor.name))?;
            inside(&tensor.name, tensor.offset, len, tensor.dtype.size())?;
        }
        for blob in &file.blobs {
            let len = usize::try_from(blob.bytes).map_err(|_| format!("{} is too large", blob.name))?;
            inside(&blob.name, blob.offset, len, 1)?;
        }
        Ok(())
    }
}

/// The three files of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Weights,
    Optimizer,
    Extra,
}

impl FileKind {
    const ALL: [Self; 3] = [Self::Weights, Self::Optimizer, Self::Extra];

    fn prefix(self) -> &'static str {
        match self {
            Self::Weights => "weights-rank-",
            Self::Optimizer => "optimizer-rank-",
            Self::Extra => "extra-rank-",
        }
    }

    /// The file's name: `weights-rank-00000-of-00002.safetensors`.
    pub(crate) fn file_name(self, rank: usize, world: usize) -> String {
        format!("{}{rank:05}-of-{world:05}.safetensors", self.prefix())
    }
}

/// Whether `name` is one that [`FileKind::file_name`] makes; above all, whether it stays in its folder.
pub(crate) fn is_file_name(name: &str) -> bool {
    let number = |text: &str| text.len() >= 5 && text.bytes().all(|b| b.is_ascii_digit());
    FileKind::ALL
        .iter()
        .find_map(|kind| name.strip_prefix(kind.prefix()))
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|rest| rest.split_once("-of-"))
        .is_some_and(|(rank, world)| number(rank) && number(world))
}

/// Writes JSON with the outer levels indented and every innermost object or array on one line.
fn write_outline(value: &Value, depth: usize, text: &mut String) {
    let nested = |value: &Value| value.is_object() || value.is_array();
    let flat = match value {
        Value::Array(items) => items.iter().all(|item| !nested(item)),
        Value::Object(fields) => fields.values().all(|field| !field.is_object() && !has_objects(field)),
        _ => true,
    };
    if flat && depth > 0 {
        text.push_str(&value.to_string());
        return;
    }
    let indent = " ".repeat(depth + 1);
    let (open, close) = if value.is_array() { ('[', ']') } else { ('{', '}') };
    text.push(open);
    let mut item = |label: Option<&String>, value: &Value, first: bool| {
        text.push_str(if first { "\n" } else { ",\n" });
        text.push_str(&indent);
        if let Some(label) = label {
            text.push_str(&Value::String(label.clone()).to_string());
            text.push_str(": ");
        }
        write_outline(value, depth + 1, text);
    };
    match value {
        Value::Array(items) => items.iter().enumerate().for_each(|(i, value)| item(None, value, i == 0)),
        Value::Object(fields) => {
            fields.iter().enumerate().for_each(|(i, (key, value))| item(Some(key), value, i == 0));
        }
        _ => {}
    }
    text.push('\n');
    text.push_str(&" ".repeat(depth));
    text.push(close);
}

fn has_objects(value: &Value) -> bool {
    value.as_array().is_some_and(|items| items.iter().any(|item| item.is_object() || has_objects(item)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outline_is_the_same_json() {
        let value = serde_json::json!({
            "a": 1, "empty": {}, "none": [], "list": [1, [2, 3]], "objects": [{"x": [1, 2]}, {"y": {"z": null}}], "q\"": "\n",
        });
        let mut text = String::new();
        write_outline(&value, 0, &mut text);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
        assert!(text.contains("\n  {\"x\":[1,2]},\n"), "{text}");
    }

    #[test]
    fn file_names_stay_in_their_folder() {
        assert!(is_file_name(&FileKind::Weights.file_name(3, 4)));
        assert!(is_file_name(&FileKind::Extra.file_name(123_456, 200_000)));
        for name in [
            "weights-rank-00000-of-/../.safetensors",
            "../x",
            "",
            "manifest.json",
            "weights-rank-1-of-2.safetensors",
        ] {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
