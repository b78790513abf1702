//! Python values as JSON values and back, for settings and state that cross by name.

use deepspeed_config::json as config;
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PySequence, PyString},
};
use serde_json::{Map, Number, Value};

/// A Python value as JSON: None, booleans, numbers (anything with `__float__`, such as a tensor of one element),
/// strings, sequences and mappings with string keys.
pub(crate) fn from_python(value: &Bound<'_, PyAny>) -> PyResult<Value> {
    if value.is_none() {
        Ok(Value::Null)
    } else if let Ok(boolean) = value.cast::<PyBool>() {
        Ok(Value::Bool(boolean.is_true()))
    } else if value.is_instance_of::<PyInt>() {
        Ok(match value.extract::<i64>() {
            Ok(number) => number.into(),
            Err(_) => value.extract::<u64>()?.into(),
        })
    } else if value.is_instance_of::<PyFloat>() {
        float(value)
    } else if value.is_instance_of::<PyString>() {
        Ok(Value::String(value.extract()?))
    } else if let Ok(mapping) = value.cast::<PyMapping>() {
        Ok(Value::Object(map_from_python(mapping)?))
    } else if value.hasattr("__float__")? {
        float(value)
    } else if let Ok(sequence) = value.cast::<PySequence>() {
        let items = sequence.try_iter()?.map(|item| from_python(&item?));
        Ok(Value::Array(items.collect::<PyResult<_>>()?))
    } else {
        Err(PyTypeError::new_err(format!("a setting cannot be a {}: {value}", value.get_type().name()?)))
    }
}

/// The entries of a mapping with string keys, in its order.
pub(crate) fn map_from_python(mapping: &Bound<'_, PyMapping>) -> PyResult<Map<String, Value>> {
    let mut out = Map::new();
    for pair in mapping.items()? {
        let (key, value): (String, Bound<'_, PyAny>) = pair.extract()?;
        out.insert(key, from_python(&value)?);
    }
    Ok(out)
}

/// A JSON value as Python's json module would give it.
pub(crate) fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(boolean) => PyBool::new(py, *boolean).to_owned().into_any(),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => number.into_pyobject(py)?.into_any(),
            (None, Some(number)) => number.into_pyobject(py)?.into_any(),
            (None, None) => number.as_f64().into_pyobject(py)?.into_any(),
        },
        Value::String(text) => PyString::new(py, text).into_any(),
        Value::Array(items) => {
            let list = PyList::empty(py);
            for item in items {
                list.append(to_python(py, item)?)?;
            }
            list.into_any()
        }
        Value::Object(entries) => map_to_python(py, entries)?.into_any(),
    })
}

/// A value of a config's document as Python's json module would give it, infinities and NaN included.
pub(crate) fn node_to_python<'py>(py: Python<'py>, node: &config::Node) -> PyResult<Bound<'py, PyAny>> {
    Ok(match &node.value {
        config::Value::Null => py.None().into_bound(py),
        config::Value::Bool(boolean) => PyBool::new(py, *boolean).to_owned().into_any(),
        config::Value::Number(config::Number::Unsigned(number)) => number.into_pyobject(py)?.into_any(),
        config::Value::Number(config::Number::Signed(number)) => number.into_pyobject(py)?.into_any(),
        config::Value::Number(config::Number::Float(number)) => PyFloat::new(py, *number).into_any(),
        config::Value::Text(text) => PyString::new(py, text).into_any(),
        config::Value::List(items) => {
            let list = PyList::empty(py);
            for item in items {
                list.append(node_to_python(py, item)?)?;
            }
            list.into_any()
        }
        config::Value::Object(members) => {
            let dict = PyDict::new(py);
            for member in members {
                dict.set_item(&member.key, node_to_python(py, &member.value)?)?;
            }
            dict.into_any()
        }
    })
}

/// A JSON object as a dict, in its order.
pub(crate) fn map_to_python<'py>(
    py: Python<'py>,
    entries: &Map<String, Value>,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (key, value) in entries {
        dict.set_item(key, to_python(py, value)?)?;
    }
    Ok(dict)
}

fn float(value: &Bound<'_, PyAny>) -> PyResult<Value> {
    let number: f64 = value.extract()?;
    Number::from_f64(number)
        .map(Value::Number)
        .ok_or_else(|| PyValueError::new_err(format!("a setting cannot be {number}")))
}
