//! The optimizers of `deepspeed.ops`: one call updates every tensor of a parameter group, on all threads.
//!
//! A 16-bit parameter has no fp32 master here (the engine keeps one, these optimizers do not): it is widened, updated
//! and rounded back in one pass.

use std::sync::{Arc, Mutex, PoisonError};

use deepspeed_core::{DType, Span, SpanMut};
use deepspeed_kernels::parallel::{Split, Workers};
use deepspeed_optim::{
    Hyper, LambSums, OptimizerKind, Shard, lamb_apply, lamb_direction, state_names, update,
};
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
    types::{PyDict, PyMapping},
};

use crate::{enter::enter, errors::IntoPyErr, json, tensors::TensorArg};

/// All hyperparameters of an optimizer, the given ones checked and the others at their defaults.
#[pyfunction]
fn optimizer_defaults<'py>(
    py: Python<'py>,
    kind: &str,
    params: &Bound<'py, PyMapping>,
) -> PyResult<Bound<'py, PyDict>> {
    let hyper = Hyper::from_config(kind, &json::map_from_python(params)?).map_err(IntoPyErr::into_py_err)?;
    json::map_to_python(py, &hyper.to_map())
}

/// The names of the fp32 state tensors that a group with these hyperparameters has beside `step`.
#[pyfunction]
fn optimizer_state_names(kind: &str, group: &Bound<'_, PyMapping>) -> PyResult<Vec<&'static str>> {
    Ok(state_names(&hyper_of(kind, group)?).to_vec())
}

/// One update of every parameter of a group, in place.
///
/// group   the `param_groups` element; keys that are no hyperparameters are left alone.
/// params, grads, states   one entry per parameter: contiguous CPU tensors of one length; states fp32.
/// steps   per parameter, how many updates it has had, this one included.
/// threads at most this many work at it.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "extracted from Python by value")]
fn optimizer_step(
    py: Python<'_>,
    kind: &str,
    group: &Bound<'_, PyMapping>,
    params: Vec<Bound<'_, PyAny>>,
    grads: Vec<Bound<'_, PyAny>>,
    states: Vec<Vec<Bound<'_, PyAny>>>,
    steps: Vec<u64>,
    threads: usize,
) -> PyResult<()> {
    let hyper = hyper_of(kind, group)?;
    let names = state_names(&hyper);
    if grads.len() != params.len() || states.len() != params.len() || steps.len() != params.len() {
        return Err(PyValueError::new_err(format!(
            "{} parameters, {} gradients, {} states and {} steps: expected as many of each",
            params.len(),
            grads.len(),
            states.len(),
            steps.len()
        )));
    }
    let mut tensors = Vec::with_capacity(params.len());
    for (index, (((param, grad), states), step)) in
        params.iter().zip(&grads).zip(&states).zip(&steps).enumerate()
    {
        tensors.push(Tensors::read(index, param, grad, states, names, *step)?);
    }
    refuse_overlaps(&tensors)?;
    let workers = workers(threads)?;
    enter(py, || -> Result<(), PyErr> {
        // SAFETY: the caller's lists keep the tensors alive, their lengths are equal and the written ones do not
        // overlap (both checked above); the GIL is free, but a program that changes a weight during `step()` is
        // wrong with any optimizer.
        let pieces = tensors.iter().map(|tensors| unsafe { tensors.piece() });
        match hyper.kind() {
            OptimizerKind::Lamb => pieces.for_each(|piece| lamb(&workers, &hyper, piece)),
            _ => {
                // Reversed, so that chunks are taken off the end.
                let pieces = Pieces(pieces.rev().collect());
                workers
                    .map_chunks(pieces, |pieces| pieces.0.into_iter().for_each(|piece| piece.update(&hyper)));
            }
        }
        Ok(())
    })
}

/// The hyperparameters among the entries of a `param_groups` element.
pub(crate) fn hyper_of(kind: &str, group: &Bound<'_, PyMapping>) -> PyResult<Hyper> {
    let Some((known, _)) = OptimizerKind::from_name(kind) else {
        return Err(PyValueError::new_err(format!("unknown optimizer `{kind}`")));
    };
    let mut hyper = Hyper::defaults(known);
    for key in Hyper::accepted_keys(known) {
        if group.contains(key)? {
            let value = json::from_python(&group.get_item(key)?)?;
            hyper.set(key, &value).map_err(IntoPyErr::into_py_err)?;
        }
    }
    hyper.validate().map_err(IntoPyErr::into_py_err)?;
    Ok(hyper)
}

/// The tensors of one parameter, checked to be of one length.
struct Tensors {
    param: TensorArg,
    grad: TensorArg,
    states: Vec<TensorArg>,
    step: u64,
}

impl Tensors {
    fn read(
        index: usize,
        param: &Bound<'_, PyAny>,
        grad: &Bound<'_, PyAny>,
        states: &[Bound<'_, PyAny>],
        names: &[&str],
        step: u64,
    ) -> PyResult<Self> {
        if states.len() != names.len() {
            return Err(PyValueError::new_err(format!(
                "parameter {index} has {} state tensors, expected {}",
                states.len(),
                names.join(" and ")
            )));
        }
        if step == 0 {
            return Err(PyValueError::new_err(format!("parameter {index}: steps count from 1, got 0")));
        }
        let read = Self {
            param: TensorArg::read(param, &format!("parameter {index}"))?,
            grad: TensorArg::read(grad, &format!("the gradient of parameter {index}"))?,
            states: states
                .iter()
                .zip(names)
                .map(|(state, name)| TensorArg::read(state, &format!("{name} of parameter {index}")))
                .collect::<PyResult<_>>()?,
            step,
        };
        for (state, name) in read.states.iter().zip(names) {
            if state.dtype() != DType::F32 {
                return Err(PyValueError::new_err(format!(
                    "{name} of parameter {index} is {}, optimizer state is fp32",
                    state.dtype()
                )));
            }
        }
        let len = read.param.len();
        if read.grad.len() != len || read.states.iter().any(|state| state.len() != len) {
            return Err(PyValueError::new_err(format!(
                "parameter {index} has {len} elements, its gradient {} and its states {:?}",
                read.grad.len(),
                read.states.iter().map(TensorArg::len).collect::<Vec<_>>()
            )));
        }
        Ok(read)
    }

    /// # Safety
    /// The tensors outlive `'a`; nothing else touches them meanwhile, and the written ones do not overlap.
    unsafe fn piece<'a>(&self) -> Piece<'a> {
        // SAFETY: the caller's.
        unsafe {
            Piece {
                param: self.param.span_mut(),
                grad: self.grad.span(),
                states: self.states.iter().map(|state| state.span_mut()).collect(),
                step: self.step,
            }
        }
    }
}

/// Refuses parameters and states that share memory: threads write them at the same time.
fn refuse_overlaps(tensors: &[Tensors]) -> PyResult<()> {
    let written = tensors.iter().flat_map(|tensors| std::iter::once(&tensors.param).chain(&tensors.states));
    let mut ranges: Vec<(usize, usize)> = written
        .map(|tensor| {
            // SAFETY: only the addresses are looked at.
            let range = unsafe { tensor.span() }.as_bytes().as_ptr_range();
            (range.start.addr(), range.end.addr())
        })
        .filter(|(start, end)| start != end)
        .collect();
    ranges.sort_unstable();
    if ranges.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(PyValueError::new_err(
            "two parameters or states of a group share memory; give each parameter once and do not expand views",
        ));
    }
    Ok(())
}

/// A parameter or a part of it, with the same part of everything that belongs to it.
struct Piece<'a> {
    param: SpanMut<'a>,
    grad: Span<'a>,
    states: Vec<SpanMut<'a>>,
    step: u64,
}

impl<'a> Piece<'a> {
    fn cut(self, mid: usize) -> (Self, Self) {
        let ((param, grad), (param_rest, grad_rest)) = (self.param, self.grad).split(mid);
        let (states, states_rest) = self.states.split(mid);
        (
            Self { param, grad, states, step: self.step },
            Self { param: param_rest, grad: grad_rest, states: states_rest, step: self.step },
        )
    }

    /// Calls `work` with the parameter in fp32, the gradient, the states and where a 16-bit parameter goes.
    fn with_fp32<R>(
        mut self,
        work: impl FnOnce(&mut [f32], Span<'_>, &mut [&mut [f32]], Option<SpanMut<'_>>) -> R,
    ) -> R {
        let mut states: Vec<&mut [f32]> = self
            .states
            .iter_mut()
            .map(|state| state.as_f32_mut().expect("invariant: states are fp32"))
            .collect();
        if let Some(param) = self.param.as_f32_mut() {
            return work(param, self.grad, &mut states, None);
        }
        let mut widened = vec![0.0; self.param.len()];
        deepspeed_kernels::cast(self.param.as_span(), SpanMut::from(&mut widened[..]));
        work(&mut widened, self.grad, &mut states, Some(self.param))
    }

    fn update(self, hyper: &Hyper) {
        let step = self.step;
        self.with_fp32(|param, grad, state, out| {
            update(hyper, step, Shard { param, grad, state, grad_scale: 1.0, out });
        });
    }
}

/// Parameters one after the other, the first at the end.
struct Pieces<'a>(Vec<Piece<'a>>);

impl Split for Pieces<'_> {
    fn elements(&self) -> Option<usize> {
        Some(self.0.iter().map(|piece| piece.param.len()).sum())
    }

    fn split(mut self, mid: usize) -> (Self, Self) {
        let mut taken = Vec::new();
        let mut missing = mid;
        while missing > 0 {
            let piece = self.0.pop().expect("invariant: a cut lies within the elements");
            let len = piece.param.len();
            if len > missing {
                let (piece, rest) = piece.cut(missing);
                taken.push(piece);
                self.0.push(rest);
                break;
            }
            missing -= len;
            taken.push(piece);
        }
        taken.reverse();
        (Self(taken), self)
    }
}

/// One Lamb update of a whole parameter: direction, norms over all of it, application.
fn lamb(workers: &Workers, hyper: &Hyper, piece: Piece<'_>) {
    let step = piece.step;
    piece.with_fp32(|param, grad, state, out| {
        let [exp_avg, exp_avg_sq] = state else {
            unreachable!("invariant: Lamb has two state tensors");
        };
        let mut direction = vec![0.0f32; param.len()];
        let parts = ((&mut *param, grad), (&mut **exp_avg, &mut **exp_avg_sq), &mut direction[..]);
        let partial = workers.map_chunks(parts, |((param, grad), (exp_avg, exp_avg_sq), direction)| {
            let state = &mut [exp_avg, exp_avg_sq];
            lamb_direction(
                hyper,
                step,
                &mut Shard { param, grad, state, grad_scale: 1.0, out: None },
                direction,
            )
        });
        let mut sums = LambSums::default();
        for part in partial {
            sums += part;
        }
        workers.map_chunks((param, &direction[..], out), |(param, direction, out)| {
            lamb_apply(hyper, step, sums, param, direction, out);
        });
    });
}

/// The threads for updates, started at the first use and again after a fork, which leaves them behind.
fn workers(threads: usize) -> PyResult<Arc<Workers>> {
    static CACHE: Mutex<Option<(u32, usize, Arc<Workers>)>> = Mutex::new(None);
    let process = std::process::id();
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    match cache.take() {
        Some((owner, count, workers)) if owner == process && count == threads => {
            *cache = Some((owner, count, Arc::clone(&workers)));
            return Ok(workers);
        }
        // Ending another process's threads would wait for locks that nobody holds here.
        Some((owner, _, workers)) if owner != process => std::mem::forget(workers),
        _ => {}
    }
    let workers = Workers::new(threads).map_err(|error| {
        PyRuntimeError::new_err(format!("cannot start {threads} threads for optimizer updates: {error}"))
    })?;
    let workers = Arc::new(workers);
    *cache = Some((process, threads, Arc::clone(&workers)));
    Ok(workers)
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(optimizer_defaults, m)?)?;
    m.add_function(wrap_pyfunction!(optimizer_state_names, m)?)?;
    m.add_function(wrap_pyfunction!(optimizer_step, m)?)
}
