//! Stage 3 where ranks share no memory, for Python: units of torch parameters become whole and are released again.
//!
//! A unit's weights live in one flat tensor whose storage is emptied on release, so that the views which autograd saved
//! see the memory again after the next gathering. A released parameter is an empty tensor: misuse is an error of shapes.

use std::sync::Arc;

use deepspeed_comm::PiecesMut;
use deepspeed_core::{DType, Rank, Span, SpanMut};
use deepspeed_engine::{Afterwards, GatheredUnit};
use deepspeed_zero::{Action, BackwardCall, Circumstances, ModuleFacts, ResidentUnits, gathering_modules};
use pyo3::{exceptions::PyValueError, intern, prelude::*, types::PyDict};

use crate::{
    device::TorchDevice,
    engine::{PyEngine, on_host},
    enter::enter,
    errors::IntoPyErr,
    group::PyGroup,
    tensors::{TensorArg, torch_dtype},
};

/// A parameter of a unit: what it is made of while the unit is whole, and while it is not.
struct Member {
    number: usize,
    parameter: Py<PyAny>,
    offset: usize,
    len: usize,
    whole: Py<PyAny>,
}

/// The memory of one unit.
struct UnitMemory {
    name: String,
    flat: Py<PyAny>,
    storage: Py<PyAny>,
    bytes: usize,
    empty: Py<PyAny>,
    members: Vec<Member>,
}

/// The units of an engine that gathers its weights, and which of them are whole.
#[pyclass(name = "Gathering", module = "deepspeed._native", weakref)]
pub(crate) struct PyGathering {
    engine: Py<PyEngine>,
    state: ResidentUnits,
    device: Option<Arc<TorchDevice>>,
    /// On a device: units that were gathered beside the program's own work, which has not waited for them yet.
    early: Vec<usize>,
    units: Vec<UnitMemory>,
    /// By parameter, its unit; none for one without elements.
    unit_of: Vec<Option<usize>>,
    modules: Vec<(usize, usize, bool)>,
    available: Py<PyAny>,
    released: Py<PyAny>,
}

#[pymethods]
impl PyGathering {
    /// Releases `parameters`, trained and then frozen, whose weights `engine` has. `modules` are those of the tree, the
    /// root first: path, whether it can be called, whether it is a leaf, the numbers of its own parameters. `statuses` are
    /// what `ds_status` says of a whole and of a released parameter.
    #[new]
    fn new(
        py: Python<'_>,
        engine: Py<PyEngine>,
        parameters: Vec<Bound<'_, PyAny>>,
        modules: Vec<(String, bool, bool, Vec<usize>)>,
        statuses: (Py<PyAny>, Py<PyAny>),
    ) -> PyResult<Self> {
        let (described, limits, device) = {
            let engine = engine.borrow(py);
            let device = engine.device.clone();
            (engine.engine.gathered_units(), engine.engine.settings().gathering, device)
        };
        let mut unit_of = vec![None; parameters.len()];
        let mut sizes = vec![0; parameters.len()];
        for (index, unit) in described.iter().enumerate() {
            for (number, _, len) in &unit.slots {
                let Some(place) = unit_of.get_mut(*number) else {
                    return Err(PyValueError::new_err(format!("no parameter number {number} was given")));
                };
                (*place, sizes[*number]) = (Some(index), *len);
            }
        }
        let facts: Vec<ModuleFacts> = modules
            .into_iter()
            .map(|(path, callable, leaf, own)| ModuleFacts {
                path,
                callable,
                leaf,
                units: own.iter().filter_map(|number| unit_of[*number]).collect(),
                elements: own.iter().map(|number| sizes[*number]).sum(),
            })
            .collect();
        let trained: Vec<bool> = described.iter().map(|unit| unit.facts.trained).collect();
        let unit_facts: Vec<_> = described.iter().map(|unit| unit.facts).collect();
        let mut state = ResidentUnits::new(&unit_facts, limits);
        let modules = gathering_modules(&facts, &trained, limits.module_granularity_threshold)
            .into_iter()
            .map(|it| {
                let gathers = it.module == 0 || !it.gathers.is_empty();
                (it.module, state.add_module(it.gathers, it.watches), gathers)
            })
            .collect();
        let units = described
            .into_iter()
            .map(|unit| UnitMemory::new(py, unit, &parameters, device.as_deref()))
            .collect::<PyResult<_>>()?;
        let (available, released) = statuses;
        let early = Vec::new();
        let mut this = Self { engine, state, device, early, units, unit_of, modules, available, released };
        for unit in 0..this.units.len() {
            this.release(py, unit)?;
        }
        Ok(this)
    }

    /// The modules to watch: index in the tree, number, whether it gathers units (or only needs them in backward).
    fn modules(&self) -> Vec<(usize, usize, bool)> {
        self.modules.clone()
    }

    /// By parameter, its unit.
    fn param_units(&self) -> Vec<Option<usize>> {
        self.unit_of.clone()
    }

    /// By parameter, the address and the number of the elements that this rank keeps.
    fn own_parts(&self, py: Python<'_>) -> Vec<(usize, usize)> {
        self.engine.borrow_mut(py).engine.own_parts()
    }

    /// Whether a running module uses `unit`.
    fn is_active(&self, unit: usize) -> bool {
        self.state.is_active(unit)
    }

    /// Whether a module is running.
    fn is_running(&self) -> bool {
        self.state.is_running()
    }

    /// Elements that are whole now.
    fn live(&self) -> usize {
        self.state.live()
    }

    /// The forward of module `number` begins.
    fn enter(&mut self, py: Python<'_>, number: usize, grad: bool, in_backward: bool) -> PyResult<()> {
        let actions = self.state.enter(number, Circumstances { grad, in_backward });
        self.perform(py, &actions)
    }

    /// The forward of module `number` is over.
    fn leave(
        &mut self,
        py: Python<'_>,
        number: usize,
        grad: bool,
        in_backward: bool,
        hidden: bool,
    ) -> PyResult<()> {
        let actions = self.state.leave(number, Circumstances { grad, in_backward }, hidden);
        self.perform(py, &actions)
    }

    /// A parameter of `unit` is read by a module that does not gather it.
    fn borrow(&mut self, py: Python<'_>, unit: usize, grad: bool, in_backward: bool) -> PyResult<()> {
        let actions = self.state.borrow(unit, Circumstances { grad, in_backward });
        self.perform(py, &actions)
    }

    /// The backward of a call of module `number` begins; `visible` says whether `leave_backward` will be called.
    fn enter_backward(&mut self, py: Python<'_>, number: usize, visible: bool) -> PyResult<u64> {
        let (call, actions) = self.state.enter_backward(number, visible);
        self.perform(py, &actions)?;
        Ok(call.0)
    }

    /// The gradients of everything that went into the call are there.
    fn leave_backward(&mut self, py: Python<'_>, call: u64) -> PyResult<()> {
        let actions = self.state.leave_backward(BackwardCall(call));
        self.perform(py, &actions)
    }

    /// A gradient of `unit` has come, perhaps the last.
    fn gradient(&mut self, py: Python<'_>, unit: usize) -> PyResult<()> {
        let attribute = intern!(py, "grad");
        for member in &self.units[unit].members {
            if member.parameter.bind(py).getattr(attribute)?.is_none() {
                return Ok(());
            }
        }
        let actions = self.state.delivered(unit);
        self.perform(py, &actions)
    }

    /// The backward pass is over.
    fn end_pass(&mut self, py: Python<'_>) -> PyResult<()> {
        let actions = self.state.end_pass();
        self.perform(py, &actions)?;
        // What stays is read by programs that tell nobody.
        self.wait_for(py, |_, _| true)
    }

    /// The engine's shards have new values.
    fn updated(&mut self, py: Python<'_>) -> PyResult<()> {
        let actions = self.state.updated();
        self.perform(py, &actions)
    }

    /// Makes these parameters whole until `unpin`. Collective.
    fn pin(&mut self, py: Python<'_>, numbers: Vec<usize>) -> PyResult<()> {
        let units = self.units_of(&numbers);
        let actions = self.state.pin(&units);
        self.perform(py, &actions)
    }

    /// Takes `pin` back.
    fn unpin(&mut self, py: Python<'_>, numbers: Vec<usize>) -> PyResult<()> {
        let units = self.units_of(&numbers);
        let actions = self.state.unpin(&units);
        self.perform(py, &actions)
    }

    /// Takes what a program has written to these pinned parameters into the shards, and their masters: what rank `root`
    /// has written, or, with None, what every rank has.
    fn store(&mut self, py: Python<'_>, mut numbers: Vec<usize>, root: Option<u32>) -> PyResult<()> {
        numbers.sort_unstable();
        numbers.dedup();
        let units = self.units_of(&numbers);
        let mut engine = self.engine.borrow_mut(py);
        let on_device = engine.device.is_some();
        let members =
            self.units.iter().flat_map(|unit| unit.members.iter().map(move |member| (unit, member)));
        let mut written = Vec::new();
        let mut copies = Vec::new();
        for (unit, member) in members.filter(|(_, member)| numbers.binary_search(&member.number).is_ok()) {
            let here = on_host(member.parameter.bind(py), on_device)?;
            written.push((member.number, &unit.name, TensorArg::read(&here, &unit.name)?));
            copies.push(here);
        }
        let engine = &mut engine.engine;
        let stored = enter(py, || {
            let group = engine.group().clone();
            if let Some(root) = root {
                for (number, name, tensor) in &written {
                    let what = format!("what was written to parameter {number}, of {name}");
                    // SAFETY: `self` holds the parameters; nobody else uses them during this call.
                    group.broadcast(&what, Rank(root), unsafe { tensor.span_mut() })?;
                }
            }
            let spans: Vec<(usize, Span<'_>)> =
                // SAFETY: as above.
                written.iter().map(|(number, _, tensor)| (*number, unsafe { tensor.span() })).collect();
            engine.on_host(Some(&units), Afterwards::WriteBack, |engine| engine.store_weights(&spans))
        });
        drop(copies);
        stored
    }
}

impl PyGathering {
    fn units_of(&self, numbers: &[usize]) -> Vec<usize> {
        let mut units: Vec<usize> =
            numbers.iter().filter_map(|number| self.unit_of.get(*number).copied().flatten()).collect();
        units.sort_unstable();
        units.dedup();
        units
    }

    fn perform(&mut self, py: Python<'_>, actions: &[Action]) -> PyResult<()> {
        for action in actions {
            match action {
                Action::Release(unit) => self.release(py, *unit)?,
                Action::Gather(unit) => self.gather(py, *unit)?,
            }
        }
        self.wait_for(py, ResidentUnits::is_needed)
    }

    /// Has the program's own work wait for units that were gathered beside it.
    fn wait_for(&mut self, py: Python<'_>, wanted: impl Fn(&ResidentUnits, usize) -> bool) -> PyResult<()> {
        let Some(device) = self.device.as_ref().filter(|_| !self.early.is_empty()) else { return Ok(()) };
        let (now, later) = self.early.iter().partition(|unit| wanted(&self.state, **unit));
        self.early = later;
        let now: Vec<usize> = now;
        now.into_iter().try_for_each(|unit| device.wait_for_gathered(py, unit))
    }

    fn gather(&mut self, py: Python<'_>, index: usize) -> PyResult<()> {
        let unit = &self.units[index];
        unit.storage.call_method1(py, intern!(py, "resize_"), (unit.bytes,))?;
        if let Some(device) = &self.device {
            device.gather_unit(py, index, unit.flat.bind(py))?;
            self.early.push(index);
            self.engine.borrow(py).engine.give_back_unit(index).map_err(IntoPyErr::into_py_err)?;
        } else {
            let mut engine = self.engine.borrow_mut(py);
            let target = TensorArg::read(unit.flat.bind(py), &unit.name)?;
            let engine = &mut engine.engine;
            enter(py, move || {
                // SAFETY: `self` holds the tensor, and nobody looks at it before it is filled.
                engine.gather_unit(index, unsafe { target.span_mut() })
            })?;
        }
        for member in &unit.members {
            let parameter = member.parameter.bind(py);
            parameter.setattr(intern!(py, "data"), &member.whole)?;
            parameter.setattr(intern!(py, "ds_status"), &self.available)?;
        }
        Ok(())
    }

    fn release(&mut self, py: Python<'_>, index: usize) -> PyResult<()> {
        self.wait_for(py, |_, unit| unit == index)?;
        let unit = &mut self.units[index];
        for member in &unit.members {
            let parameter = member.parameter.bind(py);
            parameter.setattr(intern!(py, "data"), &unit.empty)?;
            parameter.setattr(intern!(py, "ds_status"), &self.released)?;
        }
        if !unit.storage.call_method0(py, intern!(py, "resizable"))?.extract::<bool>(py)? {
            unit.renew(py)?;
        }
        unit.storage.call_method1(py, intern!(py, "resize_"), (0,))?;
        Ok(())
    }
}

impl UnitMemory {
    fn new(
        py: Python<'_>,
        unit: GatheredUnit,
        parameters: &[Bound<'_, PyAny>],
        device: Option<&TorchDevice>,
    ) -> PyResult<Self> {
        let torch = py.import("torch")?;
        let options = PyDict::new(py);
        options.set_item("dtype", torch_dtype(py, unit.dtype)?)?;
        // A device gathers whole shards, with their padding.
        let elements = if device.is_some() { unit.padded } else { unit.facts.elements };
        if let Some(device) = device {
            options.set_item("device", device.torch_device(py))?;
        }
        let flat = torch.call_method("empty", (elements,), Some(&options))?;
        let empty = torch.call_method("empty", (0,), Some(&options))?;
        let mut members = Vec::with_capacity(unit.slots.len());
        for (number, offset, len) in unit.slots {
            let parameter = &parameters[number];
            let whole = part_of(&flat, offset, len, &parameter.getattr("ds_shape")?)?;
            members.push(Member { number, parameter: parameter.clone().unbind(), offset, len, whole });
        }
        let storage = flat.call_method0("untyped_storage")?;
        // At once: no moment has the memory of all units.
        storage.call_method1("resize_", (0,))?;
        Ok(Self {
            name: unit.name,
            storage: storage.unbind(),
            bytes: elements * unit.dtype.size(),
            flat: flat.unbind(),
            empty: empty.unbind(),
            members,
        })
    }

    /// Takes other memory: somebody, a numpy array say, holds on to this.
    fn renew(&mut self, py: Python<'_>) -> PyResult<()> {
        let flat = py.import("torch")?.call_method1("empty_like", (&self.flat,))?;
        for member in &mut self.members {
            let shape = member.whole.getattr(py, "shape")?;
            member.whole = part_of(&flat, member.offset, member.len, shape.bind(py))?;
        }
        self.storage = flat.call_method0("untyped_storage")?.unbind();
        self.flat = flat.unbind();
        Ok(())
    }
}

/// Elements of `flat` in the shape of a parameter.
fn part_of(
    flat: &Bound<'_, PyAny>,
    offset: usize,
    len: usize,
    shape: &Bound<'_, PyAny>,
) -> PyResult<Py<PyAny>> {
    Ok(flat.call_method1("narrow", (0, offset, len))?.call_method1("view", (shape,))?.unbind())
}

/// Whether a parameter's elements are elsewhere: it was built under `zero.Init` where ranks share no memory.
pub(crate) fn is_released(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = tensor.py();
    let Some(elements) = tensor.getattr_opt(intern!(py, "ds_numel"))? else { return Ok(false) };
    let here: usize = tensor.call_method0(intern!(py, "numel"))?.extract()?;
    Ok(here == 0 && elements.extract::<usize>()? > 0)
}

/// Gives the engine a whole parameter, by number: this rank keeps its part.
#[pyfunction]
fn load_weight(
    py: Python<'_>,
    mut engine: PyRefMut<'_, PyEngine>,
    number: usize,
    whole: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut on_device = false;
    if let Some(device) = &engine.device {
        device.load_weight(py, number, whole)?;
        if !engine.engine.state_on_host() {
            return engine.engine.give_back_units().map_err(IntoPyErr::into_py_err);
        }
        on_device = true;
    }
    let here = on_host(whole, on_device)?;
    let source = TensorArg::read(&here, "weights")?;
    let engine = &mut engine.engine;
    enter(py, || {
        // SAFETY: the caller holds the tensor for the length of this call and leaves it alone.
        engine.load_weight(number, unsafe { source.span() })
    })
}

/// Fills `whole` with the equally long parts of all ranks, one after another, as far as it reaches. Collective.
#[pyfunction]
fn gather_parts(
    py: Python<'_>,
    group: &PyGroup,
    what: &str,
    part: &Bound<'_, PyAny>,
    whole: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (source, target) = (TensorArg::read(part, what)?, TensorArg::read(whole, what)?);
    let group = group.inner();
    let (len, dtype): (usize, DType) = (source.len() * group.world(), source.dtype());
    if target.dtype() != dtype || target.len() > len {
        return Err(PyValueError::new_err(format!("{what}: the parts do not fit the whole")));
    }
    enter(py, || {
        // SAFETY: the caller holds both tensors for the length of this call, and they are apart.
        let (source, target) = unsafe { (source.span(), target.span_mut()) };
        let mut produce = |range: std::ops::Range<usize>, slot: SpanMut<'_>| {
            deepspeed_kernels::cast(source.slice(range.start, range.len()), slot);
        };
        group.all_gather(what, dtype, &mut produce, &mut PiecesMut { len, runs: vec![(0, target)] })
    })
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyGathering>()?;
    module.add_function(wrap_pyfunction!(load_weight, module)?)?;
    module.add_function(wrap_pyfunction!(gather_parts, module)?)?;
    Ok(())
}
