//! Where the elements of each parameter lie.

use std::{collections::HashMap, ops::Range};

use deepspeed_core::DType;

use crate::Manifest;

/// A run of elements of one parameter in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First element inside the parameter.
    pub(crate) start: usize,
    /// Number of elements, at least one.
    pub(crate) len: usize,
    /// Index of the file in the manifest.
    pub(crate) file: usize,
    /// First byte inside the file.
    pub(crate) offset: u64,
}

/// One kind of one parameter: its dtype and its runs, in order, without gaps.
pub(crate) struct Stored {
    pub(crate) dtype: DType,
    runs: Vec<Run>,
}

impl Stored {
    /// The runs, cut to `range`, in order.
    pub(crate) fn runs(&self, range: Range<usize>) -> impl Iterator<Item = Run> + '_ {
        let first = self.runs.partition_point(|run| run.start + run.len <= range.start);
        let size = self.dtype.size() as u64;
        self.runs[first..]
            .iter()
            .take_while({
                let end = range.end;
                move |run| run.start < end
            })
            .map(move |run| {
                let start = run.start.max(range.start);
                let end = (run.start + run.len).min(range.end);
                Run {
                    start,
                    len: end - start,
                    file: run.file,
                    offset: run.offset + (start - run.start) as u64 * size,
                }
            })
    }
}

/// The slices of a manifest by parameter and kind, and the parameters by name.
pub(crate) struct Index {
    params: HashMap<String, usize>,
    stored: Vec<HashMap<String, Stored>>,
}

impl Index {
    /// The index of a manifest that has been validated.
    pub(crate) fn new(manifest: &Manifest) -> Self {
        let params: HashMap<String, usize> =
            manifest.params.iter().enumerate().map(|(index, param)| (param.name.clone(), index)).collect();
        let mut stored: Vec<HashMap<String, Stored>> = Vec::new();
        stored.resize_with(manifest.params.len(), HashMap::new);
        for (file_index, file) in manifest.files.iter().enumerate() {
            for slice in &file.slices {
                let (Some(index), Some(dtype)) = (params.get(&slice.param), slice.dtype.dtype()) else {
                    continue;
                };
                let stored = stored[*index]
                    .entry(slice.kind.clone())
                    .or_insert_with(|| Stored { dtype, runs: Vec::new() });
                if slice.len > 0 {
                    let run =
                        Run { start: slice.start, len: slice.len, file: file_index, offset: slice.offset };
                    stored.runs.push(run);
                }
            }
        }
        for stored in stored.iter_mut().flat_map(HashMap::values_mut) {
            stored.runs.sort_unstable_by_key(|run| run.start);
        }
        Self { params, stored }
    }

    /// The index in the manifest of the parameter of this name.
    pub(crate) fn param(&self, name: &str) -> Option<usize> {
        self.params.get(name).copied()
    }

    /// Where `kind` of the parameter at `index` lies.
    pub(crate) fn stored(&self, index: usize, kind: &str) -> Option<&Stored> {
        self.stored[index].get(kind)
    }

    /// The kinds stored of the parameter at `index`.
    pub(crate) fn kinds(&self, index: usize) -> impl Iterator<Item = &str> {
        self.stored[index].keys().map(String::as_str)
    }
}
