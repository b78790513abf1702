//! Whether slices add up to whole parameters: every element of every kind exactly once.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::{ElementType, FileRecord, ParamRecord, kind, record::numel};

/// The slices of one kind of one parameter: where each starts and ends, and in which file.
type Runs<'a> = Vec<(usize, usize, &'a str)>;

/// Checks that
/// - every slice belongs to a parameter and stays inside it,
/// - every kind of a parameter that is there at all is there whole, once and in one dtype,
/// - every parameter has its weights, in its own dtype (frozen ones may be left out if `frozen_excluded`),
/// - within a parameter group all parameters have the same kinds,
/// - names of tensors and, per rank, of blobs are unique.
///
/// # Errors
/// The first thing that is wrong, in words.
pub(crate) fn check(
    params: &[ParamRecord],
    files: &[FileRecord],
    frozen_excluded: bool,
) -> Result<(), String> {
    let by_name: HashMap<&str, usize> =
        params.iter().enumerate().map(|(index, param)| (param.name.as_str(), index)).collect();
    let mut stored: Vec<BTreeMap<&str, (ElementType, Runs<'_>)>> = vec![BTreeMap::new(); params.len()];
    for file in files {
        for slice in &file.slices {
            let Some(index) = by_name.get(slice.param.as_str()) else {
                return Err(format!("{}: `{}` is not a parameter of the model", file.name, slice.param));
            };
            let len = numel(&params[*index].shape).unwrap_or(0);
            let end = slice.start.checked_add(slice.len).filter(|end| *end <= len).ok_or_else(|| {
                format!(
                    "{}: {} elements from {} of parameter `{}`, which has {len}",
                    file.name, slice.len, slice.start, slice.param
                )
            })?;
            let (dtype, runs) =
                stored[*index].entry(&slice.kind).or_insert_with(|| (slice.dtype, Vec::new()));
            if *dtype != slice.dtype {
                return Err(format!(
                    "`{}` of parameter `{}` is both {dtype} and {}",
                    slice.kind, slice.param, slice.dtype
                ));
            }
            if slice.len > 0 {
                runs.push((slice.start, end, &file.name));
            }
        }
    }
    for (param, kinds) in params.iter().zip(&mut stored) {
        for (kind, (dtype, runs)) in kinds.iter_mut() {
            check_runs(param, kind, runs)?;
            if *kind == kind::WEIGHT && *dtype != param.dtype {
                return Err(format!(
                    "parameter `{}` is {} and its weights are {dtype}",
                    param.name, param.dtype
                ));
            }
        }
    }
    check_kinds(params, &stored, frozen_excluded)?;
    check_names(files)
}

fn check_runs(param: &ParamRecord, kind: &str, runs: &mut Runs<'_>) -> Result<(), String> {
    runs.sort_unstable();
    let name = &param.name;
    let len = numel(&param.shape).unwrap_or(0);
    let mut next = 0;
    let mut previous = "";
    for (start, end, file) in runs.iter() {
        if *start > next {
            return Err(format!("elements {next}..{start} of `{kind}` of parameter `{name}` are in no file"));
        }
        if *start < next {
            return Err(format!(
                "elements {start}..{} of `{kind}` of parameter `{name}` are there twice, in {previous} and in {file}",
                next.min(*end)
            ));
        }
        next = *end;
        previous = file;
    }
    if next < len {
        return Err(format!("elements {next}..{len} of `{kind}` of parameter `{name}` are in no file"));
    }
    Ok(())
}

fn check_kinds(
    params: &[ParamRecord],
    stored: &[BTreeMap<&str, (ElementType, Runs<'_>)>],
    frozen_excluded: bool,
) -> Result<(), String> {
    let mut of_group: HashMap<usize, HashSet<&str>> = HashMap::new();
    let elements = |param: &ParamRecord| numel(&param.shape).unwrap_or(0);
    for (param, kinds) in params.iter().zip(stored) {
        if let Some(group) = param.group {
            of_group.entry(group).or_default().extend(kinds.keys().copied());
        }
    }
    for (param, kinds) in params.iter().zip(stored) {
        // Nothing needs to be stored of a parameter without elements.
        if elements(param) == 0 {
            continue;
        }
        let left_out = frozen_excluded && param.group.is_none();
        if !kinds.contains_key(kind::WEIGHT) && !left_out {
            return Err(format!("the weights of parameter `{}` are in no file", param.name));
        }
        let expected = param.group.and_then(|group| of_group.get(&group)).into_iter().flatten();
        if let Some(missing) = expected.filter(|kind| !kinds.contains_key(*kind)).min() {
            return Err(format!(
                "`{missing}` of parameter `{}` is in no file, and others of its group have it",
                param.name
            ));
        }
    }
    Ok(())
}

fn check_names(files: &[FileRecord]) -> Result<(), String> {
    let mut tensors = HashSet::new();
    let mut blobs = HashSet::new();
    for file in files {
        for tensor in &file.tensors {
            if !tensors.insert(tensor.name.as_str()) {
                return Err(format!("tensor `{}` is there twice", tensor.name));
            }
        }
        for blob in &file.blobs {
            if !blobs.insert((file.rank, blob.name.as_str())) {
                return Err(format!("blob `{}` of rank {} is there twice", blob.name, file.rank));
            }
        }
    }
    Ok(())
}
