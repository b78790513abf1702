//! How two checkpoints differ: parameters, shapes, dtypes, values, counters. Formats, worlds and stages may be any.

use std::collections::BTreeMap;

use deepspeed_core::{AlignedBuffer, DType, Span};
use serde::Serialize;
use serde_json::Value;

use crate::{ElementType, ParamRecord, Progress, Result, Source, record::numel};

/// Elements compared at a time.
const PIECE: usize = 1 << 20;

/// How the values of one kind of a parameter, or of a buffer, differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ValueDifference {
    /// The parameter or buffer.
    pub name: String,
    /// The kind; `buffer` for a buffer.
    pub kind: String,
    /// The dtypes.
    pub dtypes: (ElementType, ElementType),
    /// Number of elements.
    pub elements: u64,
    /// Elements that differ in value, or in their bits where the dtypes are equal.
    pub differing: u64,
    /// The first of them.
    pub first: Option<u64>,
    /// The largest absolute difference of numbers.
    pub max_abs: f64,
    /// The largest difference relative to the larger of two numbers, of those that differ.
    pub max_rel: f64,
    /// Elements of which one is NaN or infinite and the other is not the same.
    pub not_finite: u64,
}

/// One setting that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StateDifference {
    /// Where in the state, as `counters.global_steps`.
    pub path: String,
    /// In the first checkpoint; null where it is not there.
    pub a: Value,
    /// In the second.
    pub b: Value,
}

/// Something of which the two have different facts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FactDifference {
    /// What of which parameter or buffer.
    pub what: String,
    /// In the first checkpoint.
    pub a: String,
    /// In the second.
    pub b: String,
}

/// How two checkpoints differ.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Differences {
    /// Parameters, kinds and buffers that only the first has.
    pub only_in_a: Vec<String>,
    /// Those that only the second has.
    pub only_in_b: Vec<String>,
    /// Shapes, dtypes and parameter groups.
    pub facts: Vec<FactDifference>,
    /// Values.
    pub values: Vec<ValueDifference>,
    /// Counters and everything else training continues from.
    pub state: Vec<StateDifference>,
    /// Number of tensors that were compared and are the same bit by bit.
    pub identical: u64,
}

impl Differences {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        let Self { only_in_a, only_in_b, facts, values, state, identical: _ } = self;
        [only_in_a.len(), only_in_b.len(), facts.len(), values.len(), state.len()].iter().all(|len| *len == 0)
    }
}

/// Compares two checkpoints. Blobs (random states, the client's state) and other names of tied parameters are not
/// compared, nor are format, world and stage.
///
/// # Errors
/// What reading says.
pub fn diff(a: &dyn Source, b: &dyn Source, progress: &dyn Progress) -> Result<Differences> {
    let mut found = Differences::default();
    progress.begin("comparing", elements(a));
    for param in a.params() {
        let Some(other) = b.param(&param.name) else {
            found.only_in_a.push(format!("parameter `{}`", param.name));
            continue;
        };
        let mut fact = |what: &str, one: String, other: String| {
            if one != other {
                found.facts.push(FactDifference {
                    what: format!("{what} of parameter `{}`", param.name),
                    a: one,
                    b: other,
                });
            }
        };
        fact("shape", format!("{:?}", param.shape), format!("{:?}", other.shape));
        let group = |it: Option<usize>| it.map_or("frozen".to_owned(), |group| format!("group {group}"));
        fact("optimizer group", group(param.group), group(other.group));
        let (kinds_a, kinds_b) = (a.kinds(&param.name), b.kinds(&param.name));
        for kind in &kinds_a {
            if !kinds_b.contains(kind) {
                found.only_in_a.push(format!("`{kind}` of parameter `{}`", param.name));
                continue;
            }
            let (Some(one), Some(two)) = (a.dtype(&param.name, kind), b.dtype(&param.name, kind)) else {
                continue;
            };
            if one != two {
                found.facts.push(FactDifference {
                    what: format!("dtype of `{kind}` of parameter `{}`", param.name),
                    a: one.to_string(),
                    b: two.to_string(),
                });
            }
            if param.shape == other.shape {
                let compared =
                    compare_param(a, b, (&param.name, kind), numel(&param.shape).unwrap_or(0), progress)?;
                found.identical += u64::from(compared.differing == 0);
                found.values.extend((compared.differing > 0).then_some(compared));
            }
        }
        let missing = kinds_b.iter().filter(|kind| !kinds_a.contains(kind));
        found.only_in_b.extend(missing.map(|kind| format!("`{kind}` of parameter `{}`", param.name)));
    }
    let extra = b.params().iter().filter(|param| a.param(&param.name).is_none());
    found.only_in_b.extend(extra.map(|param| format!("parameter `{}`", param.name)));
    compare_buffers(a, b, &mut found)?;
    compare_state("", a.state(), b.state(), &mut found.state);
    Ok(found)
}

/// Elements of all that is stored of parameters: for the progress, an element counts as a byte.
fn elements(source: &dyn Source) -> u64 {
    let of = |param: &ParamRecord| {
        let kinds = source.kinds(&param.name).len() as u64;
        (numel(&param.shape).unwrap_or(0) as u64).saturating_mul(kinds)
    };
    source.params().iter().map(of).fold(0, u64::saturating_add)
}

fn compare_param(
    a: &dyn Source,
    b: &dyn Source,
    (name, kind): (&str, &str),
    numel: usize,
    progress: &dyn Progress,
) -> Result<ValueDifference> {
    let dtypes = (a.dtype(name, kind).unwrap_or(DType::F32), b.dtype(name, kind).unwrap_or(DType::F32));
    let mut comparison = Comparison::new(name, kind, (dtypes.0.into(), dtypes.1.into()));
    let most = PIECE.min(numel);
    let mut pieces = (AlignedBuffer::zeroed(most, dtypes.0), AlignedBuffer::zeroed(most, dtypes.1));
    let mut start = 0;
    while start < numel {
        let len = PIECE.min(numel - start);
        a.read(name, kind, start..start + len, pieces.0.span_mut().slice_mut(0, len))?;
        b.read(name, kind, start..start + len, pieces.1.span_mut().slice_mut(0, len))?;
        comparison.add(pieces.0.span().slice(0, len), pieces.1.span().slice(0, len));
        progress.advance(len as u64);
        start += len;
    }
    Ok(comparison.found)
}

/// Goes through two tensors piece by piece.
struct Comparison {
    found: ValueDifference,
}

impl Comparison {
    fn new(name: &str, kind: &str, dtypes: (ElementType, ElementType)) -> Self {
        let found = ValueDifference {
            name: name.to_owned(),
            kind: kind.to_owned(),
            dtypes,
            elements: 0,
            differing: 0,
            first: None,
            max_abs: 0.0,
            max_rel: 0.0,
            not_finite: 0,
        };
        Self { found }
    }

    fn add(&mut self, a: Span<'_>, b: Span<'_>) {
        let before = self.found.elements;
        self.found.elements += a.len() as u64;
        if a.dtype() == b.dtype() && a.as_bytes() == b.as_bytes() {
            return;
        }
        let size = a.dtype().size();
        let same_dtype = a.dtype() == b.dtype();
        let bits = (a.as_bytes(), b.as_bytes());
        let (wide_a, wide_b) = (widened(a), widened(b));
        for (index, (x, y)) in wide_a.as_f32().iter().zip(wide_b.as_f32()).enumerate() {
            let equal = if same_dtype {
                let range = index * size..(index + 1) * size;
                bits.0[range.clone()] == bits.1[range]
            } else {
                x == y || (x.is_nan() && y.is_nan())
            };
            if !equal {
                self.differ(before + index as u64, (*x).into(), (*y).into());
            }
        }
    }

    fn differ(&mut self, index: u64, x: f64, y: f64) {
        let found = &mut self.found;
        found.differing += 1;
        found.first = found.first.or(Some(index));
        if !(x.is_finite() && y.is_finite()) {
            found.not_finite += 1;
            return;
        }
        let apart = (x - y).abs();
        found.max_abs = found.max_abs.max(apart);
        let largest = x.abs().max(y.abs());
        // Zeros of two signs differ in their bits and by nothing else.
        if largest > 0.0 {
            found.max_rel = found.max_rel.max(apart / largest);
        }
    }
}

fn widened(span: Span<'_>) -> AlignedBuffer {
    let mut wide = AlignedBuffer::zeroed(span.len(), DType::F32);
    deepspeed_kernels::cast(span, wide.span_mut());
    wide
}

fn compare_buffers(a: &dyn Source, b: &dyn Source, found: &mut Differences) -> Result<()> {
    let theirs: BTreeMap<String, _> = b.tensors().into_iter().map(|it| (it.name.clone(), it)).collect();
    let ours = a.tensors();
    for tensor in &ours {
        let Some(other) = theirs.get(&tensor.name) else {
            found.only_in_a.push(format!("buffer `{}`", tensor.name));
            continue;
        };
        let what = |what: &str| format!("{what} of buffer `{}`", tensor.name);
        if tensor.shape != other.shape {
            let (a, b) = (format!("{:?}", tensor.shape), format!("{:?}", other.shape));
            found.facts.push(FactDifference { what: what("shape"), a, b });
        }
        if tensor.dtype != other.dtype {
            let (a, b) = (tensor.dtype.to_string(), other.dtype.to_string());
            found.facts.push(FactDifference { what: what("dtype"), a, b });
        }
        if tensor.shape == other.shape && tensor.dtype == other.dtype {
            let (one, two) = (a.tensor(&tensor.name)?, b.tensor(&tensor.name)?);
            if one == two {
                found.identical += 1;
                continue;
            }
            let mut comparison = Comparison::new(&tensor.name, "buffer", (tensor.dtype, other.dtype));
            match tensor.dtype.dtype() {
                Some(dtype) if one.len() == two.len() => {
                    let (one, two) = (aligned(&one, dtype), aligned(&two, dtype));
                    comparison.add(one.span(), two.span());
                }
                _ => compare_opaque(&one, &two, tensor.dtype.size(), &mut comparison.found),
            }
            found.values.push(comparison.found);
        }
    }
    let missing = theirs.keys().filter(|name| !ours.iter().any(|it| it.name == **name));
    found.only_in_b.extend(missing.map(|name| format!("buffer `{name}`")));
    Ok(())
}

fn aligned(bytes: &[u8], dtype: DType) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::zeroed(bytes.len() / dtype.size(), dtype);
    let len = buffer.len() * dtype.size();
    buffer.span_mut().as_bytes_mut().copy_from_slice(&bytes[..len]);
    buffer
}

/// Compares elements that are no floating-point numbers of ours: only whether they are equal.
fn compare_opaque(a: &[u8], b: &[u8], size: usize, found: &mut ValueDifference) {
    for (index, (x, y)) in a.chunks(size).zip(b.chunks(size)).enumerate() {
        found.elements += 1;
        if x != y {
            found.differing += 1;
            found.first = found.first.or(Some(index as u64));
        }
    }
}

/// Compares two states, field by field.
fn compare_state(path: &str, a: &Value, b: &Value, found: &mut Vec<StateDifference>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (a, b) {
        (Value::Object(one), Value::Object(two)) => {
            let more = two.keys().filter(|key| !one.contains_key(*key));
            for key in one.keys().chain(more) {
                let of = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
                compare_state(&below(key), &of(one), &of(two), found);
            }
        }
        (Value::Array(one), Value::Array(two)) if one.len() == two.len() => {
            for (index, (x, y)) in one.iter().zip(two).enumerate() {
                compare_state(&below(&index.to_string()), x, y, found);
            }
        }
        _ if a == b => {}
        _ => found.push(StateDifference { path: path.to_owned(), a: a.clone(), b: b.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(a: &[f32], b: &[f32]) -> ValueDifference {
        let mut comparison = Comparison::new("w", "weight", (DType::F32.into(), DType::F32.into()));
        comparison.add(Span::from(a), Span::from(b));
        comparison.found
    }

    #[test]
    fn numbers_are_compared_by_bits_and_by_value() {
        let found = compared(&[1.0, 2.0, 4.0, 0.0], &[1.0, 2.5, 3.0, -0.0]);
        assert_eq!((found.elements, found.differing, found.first), (4, 3, Some(1)));
        assert_eq!((found.max_abs, found.max_rel, found.not_finite), (1.0, 0.25, 0));
        assert_eq!(compared(&[f32::NAN], &[f32::NAN]).differing, 0);
        let found = compared(&[f32::NAN, 1.0], &[1.0, f32::INFINITY]);
        assert_eq!((found.differing, found.not_finite, found.max_abs), (2, 2, 0.0));
    }

    #[test]
    fn states_are_compared_field_by_field() {
        let a = serde_json::json!({"counters": {"steps": 3, "list": [1, 2]}, "gone": true});
        let b = serde_json::json!({"counters": {"steps": 4, "list": [1, 9]}, "new": {"x": 1}});
        let mut found = Vec::new();
        compare_state("", &a, &b, &mut found);
        let paths: Vec<&str> = found.iter().map(|it| it.path.as_str()).collect();
        assert_eq!(paths, ["counters.steps", "counters.list.1", "gone", "new"]);
        assert_eq!(found[3].a, Value::Null);
    }
}
