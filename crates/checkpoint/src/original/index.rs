//! Which elements of which parameter lie in which file.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
};

use deepspeed_core::{AlignedBuffer, DType, Span, SpanMut};
use half::{bf16, f16};

use super::torch::{TorchFile, View};
use crate::{ElementType, ParamRecord, Result, kind, record::numel};

/// Bytes handed out at a time.
const VISIT_BYTES: usize = 1 << 20;

/// A run of elements of one kind of one parameter.
#[derive(Clone, Debug)]
pub(super) struct Run {
    /// First element within the parameter.
    pub(super) start: usize,
    /// Number of elements.
    pub(super) len: usize,
    /// Number of the file.
    pub(super) file: usize,
    /// First byte within the file; of the first element of `strided`, where there is one.
    at: u64,
    /// The whole tensor, where its elements do not lie one after the other.
    strided: Option<Arc<View>>,
    dtype: DType,
}

impl Run {
    /// Elements `range` of `view`, which are the parameter's from `start` on. None for elements that are not floats of
    /// 16 or 32 bits, and for a range outside the view.
    pub(super) fn new(file: usize, view: &View, range: Range<usize>, start: usize) -> Option<Self> {
        let dtype = view.dtype.dtype()?;
        if range.start > range.end || range.end > view.numel {
            return None;
        }
        let len = range.len();
        if view.is_dense() {
            let at = view.at + (range.start * dtype.size()) as u64;
            return Some(Self { start, len, file, at, strided: None, dtype });
        }
        let whole = range.start == 0 && range.end == view.numel && start == 0;
        whole.then(|| Self { start, len, file, at: view.at, strided: Some(Arc::new(view.clone())), dtype })
    }
}

/// What is stored of one kind of one parameter.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// In what dtype it is handed out: that of the file, or of the parameter where fp32 masters stand for its weights.
    pub(super) dtype: DType,
    runs: Vec<Run>,
}

/// The parameters and all that is stored of them.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) params: Vec<ParamRecord>,
    /// Also by their other names.
    by_name: HashMap<String, usize>,
    stored: Vec<BTreeMap<String, Stored>>,
}

impl Index {
    /// An index of parameters of which nothing is known yet; `tied` are (other name, name).
    pub(super) fn new(params: Vec<ParamRecord>, tied: &[(String, String)]) -> Self {
        let mut by_name: HashMap<String, usize> =
            params.iter().enumerate().map(|(index, param)| (param.name.clone(), index)).collect();
        for (other, name) in tied {
            if let Some(index) = by_name.get(name).copied() {
                by_name.entry(other.clone()).or_insert(index);
            }
        }
        let stored = vec![BTreeMap::new(); params.len()];
        Self { params, by_name, stored }
    }

    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    pub(super) fn numel(&self, param: usize) -> usize {
        numel(&self.params[param].shape).unwrap_or(0)
    }

    pub(super) fn has(&self, param: usize, kind: &str) -> bool {
        self.stored[param].contains_key(kind)
    }

    pub(super) fn kinds(&self, param: usize) -> impl Iterator<Item = &str> {
        self.stored[param].keys().map(String::as_str)
    }

    pub(super) fn stored(&self, param: usize, kind: &str) -> Option<&Stored> {
        self.stored[param].get(kind)
    }

    /// Adds a run of `kind`. Elements past the parameter's end are padding and left out.
    pub(super) fn add(&mut self, param: usize, kind: &str, mut run: Run) {
        let numel = self.numel(param);
        run.len = run.len.min(numel.saturating_sub(run.start));
        let stored = self.stored[param]
            .entry(kind.to_owned())
            .or_insert_with(|| Stored { dtype: run.dtype, runs: Vec::new() });
        if run.len > 0 {
            stored.runs.push(run);
        }
    }

    /// Names things as this software does, and checks that every kind is there whole.
    ///
    /// - Weights that were saved only as masters are read from these, rounded to the parameter's dtype.
    /// - fp32 weights are their own masters.
    /// - Adagrad's sum is called `sum`.
    ///
    /// # Errors
    /// The first kind of which elements are missing, in words.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        for (param, kinds) in self.params.iter().zip(&mut self.stored) {
            if !kinds.contains_key("exp_avg")
                && let Some(sum) = kinds.remove("exp_avg_sq")
            {
                kinds.insert("sum".to_owned(), sum);
            }
            let dtype = param.dtype.dtype();
            if let (None, Some(master), Some(dtype)) =
                (kinds.get(kind::WEIGHT), kinds.get(kind::MASTER), dtype)
            {
                let weight = Stored { dtype, runs: master.runs.clone() };
                kinds.insert(kind::WEIGHT.to_owned(), weight);
            }
            if dtype == Some(DType::F32) {
                kinds.remove(kind::MASTER);
            }
            let numel = numel(&param.shape).unwrap_or(0);
            for (kind, stored) in kinds {
                stored.runs.sort_by_key(|run| run.start);
                let mut next = 0;
                for run in &stored.runs {
                    if run.start != next {
                        break;
                    }
                    next += run.len;
                }
                let total: usize = stored.runs.iter().map(|run| run.len).sum();
                if next != numel || total != numel {
                    return Err(format!(
                        "the files hold {total} elements of `{kind}` of parameter `{}` {:?}, not {numel} that follow \
                         each other",
                        param.name, param.shape
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Stored {
    /// One run, handed out in `dtype`.
    pub(super) fn rounded_to(dtype: DType, run: Run) -> Self {
        Self { dtype, runs: vec![run] }
    }

    /// Hands out the elements of `range`, in order and in pieces; see [`crate::Source::visit`].
    ///
    /// # Errors
    /// [`crate::CheckpointError::Io`], [`crate::CheckpointError::Damaged`].
    pub(super) fn visit(
        &self,
        files: &[TorchFile],
        range: &Range<usize>,
        visit: &mut dyn FnMut(usize, Span<'_>),
    ) -> Result<()> {
        for run in &self.runs {
            let (start, end) = (range.start.max(run.start), range.end.min(run.start + run.len));
            if start >= end {
                continue;
            }
            let file = &files[run.file];
            if let Some(view) = &run.strided {
                self.visit_strided(file, run, view, start..end, visit)?;
                continue;
            }
            let most = (VISIT_BYTES / run.dtype.size()).min(end - start);
            let mut buffer = AlignedBuffer::zeroed(most, run.dtype);
            let mut done = start;
            while done < end {
                let len = most.min(end - done);
                let at = run.at + ((done - run.start) * run.dtype.size()) as u64;
                file.read_at(at, buffer.span_mut().slice_mut(0, len).as_bytes_mut())?;
                rounded(buffer.span().slice(0, len), self.dtype, |span| visit(done, span));
                done += len;
            }
        }
        Ok(())
    }

    fn visit_strided(
        &self,
        file: &TorchFile,
        run: &Run,
        view: &View,
        range: Range<usize>,
        visit: &mut dyn FnMut(usize, Span<'_>),
    ) -> Result<()> {
        let size = run.dtype.size();
        let mut memory = vec![0; view.extent() * size];
        file.read_at(view.at, &mut memory)?;
        let most = (VISIT_BYTES / size).min(range.len());
        let mut buffer = AlignedBuffer::zeroed(most, run.dtype);
        let mut done = range.start;
        while done < range.end {
            let len = most.min(range.end - done);
            let mut span = buffer.span_mut();
            for (index, element) in span.as_bytes_mut().chunks_exact_mut(size).take(len).enumerate() {
                let at = view.place(done + index) * size;
                element.copy_from_slice(&memory[at..at + size]);
            }
            rounded(buffer.span().slice(0, len), self.dtype, |span| visit(done, span));
            done += len;
        }
        Ok(())
    }

    /// Reads the elements of `range` into `dst`, which is made for them.
    ///
    /// # Errors
    /// As [`Stored::visit`].
    pub(super) fn read(&self, files: &[TorchFile], range: &Range<usize>, mut dst: SpanMut<'_>) -> Result<()> {
        self.visit(files, range, &mut |at, elements| {
            let mut part = dst.slice_mut(at - range.start, elements.len());
            part.as_bytes_mut().copy_from_slice(elements.as_bytes());
        })
    }
}

/// Gives `visit` the elements in `dtype`: as they are, or fp32 rounded to nearest even, as the original rounds masters.
fn rounded(elements: Span<'_>, dtype: DType, mut visit: impl FnMut(Span<'_>)) {
    match (elements.as_f32(), dtype) {
        (Some(wide), DType::BF16) => {
            let narrow: Vec<bf16> = wide.iter().map(|value| bf16::from_f32(*value)).collect();
            visit(Span::from(&narrow[..]));
        }
        (Some(wide), DType::F16) => {
            let narrow: Vec<f16> = wide.iter().map(|value| f16::from_f32(*value)).collect();
            visit(Span::from(&narrow[..]));
        }
        _ => visit(elements),
    }
}

/// The element type of a tensor, as a parameter's dtype.
pub(super) fn record(name: &str, shape: Vec<usize>, dtype: ElementType, group: Option<usize>) -> ParamRecord {
    ParamRecord { name: name.to_owned(), shape, dtype, group }
}
