//! The fp32 state of single parameters, for scripts that look at it or change it.

use deepspeed_core::{ParamId, SpanMut};
use deepspeed_engine::StateKind;
use deepspeed_optim::state_names;
use pyo3::{exceptions::PyValueError, prelude::*, types::PyMapping};

use crate::{
    engine::{PyEngine, hypers},
    enter::enter,
    errors::IntoPyErr,
    tensors::TensorArg,
};

/// "fp32", "grad", or the name of one of the optimizer's state tensors; None where there is no such state.
fn kind_of(
    engine: &PyEngine,
    kind: &str,
    param_groups: &[Bound<'_, PyMapping>],
) -> PyResult<Option<StateKind>> {
    let found = match kind {
        "fp32" => StateKind::Master,
        "grad" => StateKind::Gradient,
        name => {
            let hypers = hypers(engine.kind(), param_groups)?;
            let names = hypers.first().map_or(&[] as &[&str], state_names);
            let Some(index) = names.iter().position(|known| *known == name) else {
                return Err(PyValueError::new_err(format!(
                    "this engine's optimizer has no state {name:?}, it has {names:?}"
                )));
            };
            StateKind::Optimizer(index)
        }
    };
    Ok((matches!(found, StateKind::Master) || engine.engine.has_state(&found)).then_some(found))
}

/// The whole of `kind` of parameter `index` into `output` (fp32, as many elements). False where there is no such state.
/// Collective.
#[pyfunction]
fn read_whole_state(
    py: Python<'_>,
    engine: PyRef<'_, PyEngine>,
    index: usize,
    kind: &str,
    param_groups: Vec<Bound<'_, PyMapping>>,
    output: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    let Some(kind) = kind_of(&engine, kind, &param_groups)? else { return Ok(false) };
    let native = &engine.engine;
    let values = enter(py, || native.whole_state(ParamId::from_index(index), &kind))?;
    copy_to(&values, output)?;
    Ok(true)
}

/// This rank's part of `kind` of parameter `index`, the elements of `own_range`, into `output`.
#[pyfunction]
fn read_own_state(
    engine: PyRef<'_, PyEngine>,
    index: usize,
    kind: &str,
    param_groups: Vec<Bound<'_, PyMapping>>,
    output: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    let Some(kind) = kind_of(&engine, kind, &param_groups)? else { return Ok(false) };
    let values =
        engine.engine.own_state(ParamId::from_index(index), &kind).map_err(IntoPyErr::into_py_err)?;
    copy_to(&values, output)?;
    Ok(true)
}

/// Sets this rank's part of `kind` of parameter `index` to `values` (fp32), the elements of `own_range`.
#[pyfunction]
fn write_own_state(
    mut engine: PyRefMut<'_, PyEngine>,
    index: usize,
    kind: &str,
    param_groups: Vec<Bound<'_, PyMapping>>,
    values: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    let Some(kind) = kind_of(&engine, kind, &param_groups)? else { return Ok(false) };
    let source = TensorArg::read(values, "values")?;
    // SAFETY: the caller holds the tensor for the length of this call, under the GIL.
    let span = unsafe { source.span() };
    let values = span.as_f32().ok_or_else(|| PyValueError::new_err("values must be a float32 tensor"))?;
    engine.engine.set_own_state(ParamId::from_index(index), &kind, values).map_err(IntoPyErr::into_py_err)?;
    Ok(true)
}

/// First element, and number of elements, of parameter `index` whose state this rank keeps.
#[pyfunction]
fn own_range(engine: PyRef<'_, PyEngine>, index: usize) -> (usize, usize) {
    engine.engine.own_range(ParamId::from_index(index))
}

fn copy_to(values: &[f32], output: &Bound<'_, PyAny>) -> PyResult<()> {
    let target = TensorArg::read(output, "output")?;
    if target.len() != values.len() {
        return Err(PyValueError::new_err(format!(
            "the output has {} elements, the state {}",
            target.len(),
            values.len()
        )));
    }
    // SAFETY: the caller holds the tensor for the length of this call, under the GIL, and nobody else writes to it.
    let mut span: SpanMut<'_> = unsafe { target.span_mut() };
    deepspeed_kernels::cast(values.into(), span.slice_mut(0, values.len()));
    Ok(())
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(read_whole_state, module)?)?;
    module.add_function(wrap_pyfunction!(read_own_state, module)?)?;
    module.add_function(wrap_pyfunction!(write_own_state, module)?)?;
    module.add_function(wrap_pyfunction!(own_range, module)?)?;
    Ok(())
}
