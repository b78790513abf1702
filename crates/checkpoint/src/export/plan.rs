//! What an exported model consists of, before a byte of it is read.

use std::collections::HashSet;

use deepspeed_core::DType;

use crate::{ElementType, Source, kind, record::numel};

/// One tensor of an exported model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportTensor {
    /// Its name in the model.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The dtype in which it is written.
    pub dtype: ElementType,
    /// Where it comes from.
    pub(crate) content: Content,
}

/// Where a tensor comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// This kind of a parameter.
    Param(&'static str),
    /// A whole tensor, stored in this dtype.
    Tensor(ElementType),
}

impl ExportTensor {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        numel(&self.shape).unwrap_or(0)
    }

    /// Bytes as it is written.
    pub fn bytes(&self) -> u64 {
        self.numel() as u64 * self.dtype.size() as u64
    }
}

/// All tensors of an exported model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportPlan {
    /// The tensors: parameters in the model's order, then buffers.
    pub tensors: Vec<ExportTensor>,
    /// Other names: (other name, name of one of `tensors`).
    pub tied: Vec<(String, String)>,
    /// Parameters whose weights the checkpoint does not have.
    pub absent: Vec<String>,
}

impl ExportPlan {
    /// The model of `source` with weights in `dtype`, without parameters that were not trained if `exclude_frozen`.
    ///
    /// Weights come from the fp32 masters, but where the model itself computes in `dtype`, they are what it computes
    /// with. Buffers keep their dtype; only in an fp32 model 16-bit ones become fp32 as well.
    pub fn new(source: &dyn Source, dtype: DType, exclude_frozen: bool) -> Self {
        let mut tensors = Vec::new();
        let mut absent = Vec::new();
        for param in source.params() {
            if exclude_frozen && param.group.is_none() {
                continue;
            }
            let empty = numel(&param.shape) == Some(0);
            match kind_for(source, &param.name, dtype).or(empty.then_some(kind::WEIGHT)) {
                Some(kind) => tensors.push(ExportTensor {
                    name: param.name.clone(),
                    shape: param.shape.clone(),
                    dtype: dtype.into(),
                    content: Content::Param(kind),
                }),
                None => absent.push(param.name.clone()),
            }
        }
        tensors.extend(source.tensors().into_iter().map(|tensor| {
            let widened = dtype == DType::F32 && tensor.dtype.dtype().is_some();
            ExportTensor {
                name: tensor.name,
                shape: tensor.shape,
                dtype: if widened { dtype.into() } else { tensor.dtype },
                content: Content::Tensor(tensor.dtype),
            }
        }));
        let there: HashSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let tied = source.tied().iter().filter(|(_, name)| there.contains(name.as_str())).cloned().collect();
        Self { tensors, tied, absent }
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(ExportTensor::bytes).sum()
    }

    /// The tensors in files of at most `max_bytes` each, in order. A larger tensor has a file of its own.
    pub fn shards(&self, max_bytes: u64) -> Vec<Vec<&ExportTensor>> {
        let mut shards: Vec<Vec<&ExportTensor>> = Vec::new();
        let mut current: Vec<&ExportTensor> = Vec::new();
        let mut filled = 0;
        for tensor in &self.tensors {
            if tensor.bytes() > max_bytes {
                shards.push(vec![tensor]);
                continue;
            }
            if filled + tensor.bytes() > max_bytes {
                shards.push(std::mem::take(&mut current));
                filled = 0;
            }
            filled += tensor.bytes();
            current.push(tensor);
        }
        if !current.is_empty() || shards.is_empty() {
            shards.push(current);
        }
        shards
    }
}

/// Which stored kind of a parameter gives its weights in `dtype` with the least rounding.
fn kind_for(source: &dyn Source, name: &str, dtype: DType) -> Option<&'static str> {
    let stored = |kind| source.dtype(name, kind);
    if dtype != DType::F32 && stored(kind::WEIGHT) == Some(dtype) {
        return Some(kind::WEIGHT);
    }
    [kind::MASTER, kind::WEIGHT].into_iter().find(|kind| stored(kind).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(bytes: &[usize]) -> ExportPlan {
        let tensors = bytes.iter().enumerate().map(|(i, bytes)| ExportTensor {
            name: i.to_string(),
            shape: vec![*bytes],
            dtype: ElementType::U8,
            content: Content::Tensor(ElementType::U8),
        });
        ExportPlan { tensors: tensors.collect(), tied: Vec::new(), absent: Vec::new() }
    }

    #[test]
    fn shards_are_filled_in_order_and_never_too_large() {
        let sizes = |bytes: &[usize], max| -> Vec<Vec<usize>> {
            let plan = plan(bytes);
            plan.shards(max).iter().map(|shard| shard.iter().map(|it| it.shape[0]).collect()).collect()
        };
        assert_eq!(sizes(&[3, 4, 5, 1], 8), [vec![3, 4], vec![5, 1]]);
        assert_eq!(sizes(&[3, 9, 4], 8), [vec![9], vec![3, 4]]);
        assert_eq!(sizes(&[8, 8], 8), [[8], [8]]);
        assert_eq!(sizes(&[], 8), [Vec::<usize>::new()]);
    }
}
