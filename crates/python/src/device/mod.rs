//! An accelerator as torch sees it: the engine's units as flat torch tensors, and a few large operations of torch's for each.
//!
//! Everything is queued on the device's streams and nothing waits for it, except where bytes come to the host: the norms of
//! a step, once, and what checkpoints and updates on the host need. CUDA, ROCm and XPU come from torch; on CPU tensors the
//! same code runs without streams, which is how it is tested.

mod eviction;
mod gradients;
mod ops;
mod update;
mod weights;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use deepspeed_comm::{Group, Into};
use deepspeed_core::{DType, Layout, Rank, Span, SpanMut, Unit};
use deepspeed_engine::{Device, DeviceError, DevicePlan, Part, ShardHome, Source};
use deepspeed_optim::Hyper;
use deepspeed_zero::Exchange;
use pyo3::{exceptions::PyRuntimeError, prelude::*};

use self::ops::{Flat, Ops, Side, Tensor, copy_in, copy_out};
pub(crate) use self::weights::ClientTensors;
use crate::shared_weights::PySharedWeights;

/// The tensors of one unit.
struct UnitTensors {
    unit: Unit,
    /// Number of the unit's first layout's first parameter: parameters are numbered through, too.
    first_param: usize,
    trained: bool,
    /// Whether masters and state are here.
    resident: bool,
    /// fp32; in the host's memory where masters are.
    gradient: Option<Py<PyAny>>,
    master: Option<Py<PyAny>>,
    state: Vec<Py<PyAny>>,
    /// This rank's shard, in the model's dtype; a part of `whole`, if there is that.
    weight: Py<PyAny>,
    whole: Option<Py<PyAny>>,
}

/// Which of a device's tensors in the host's memory are pinned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pins {
    /// Gradients that the host updates with: `offload_optimizer.pin_memory`.
    pub(crate) gradients: bool,
    /// Shards of the weights: `offload_param.pin_memory`.
    pub(crate) weights: bool,
}

/// What torch.distributed moves.
#[derive(Clone, Copy, Debug)]
enum Exchanged {
    Gradients,
    Weights,
}

/// One device, the parameters that live on it, and the engine's memory there.
pub(crate) struct TorchDevice {
    ops: Ops,
    name: String,
    group: Arc<dyn Group>,
    /// `torch.distributed`, where that moves the device's memory itself.
    direct: Option<Py<PyAny>>,
    pins: Pins,
    /// By number: trained, then frozen.
    parameters: Vec<Py<PyAny>>,
    rank: OnceLock<Rank>,
    units: OnceLock<Vec<UnitTensors>>,
    /// By trained unit, the sum of unreduced gradients, fp32 and whole; none before the first.
    sums: Mutex<Vec<Py<PyAny>>>,
    /// By trained unit, the norm of its gradient shard: a tensor of one fp64.
    norms: Mutex<Vec<Option<Py<PyAny>>>>,
    /// By number of a unit that is gathered beside the program's work: when that is over.
    gathered: Mutex<HashMap<usize, Py<PyAny>>>,
    /// A running fingerprint of what torch.distributed has moved between ranks.
    exchanged: Mutex<u64>,
    /// Tensors without memory, with their values in the host's.
    evicted: Mutex<Vec<(Py<PyAny>, Py<PyAny>)>>,
}

impl fmt::Debug for TorchDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TorchDevice({})", self.name)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TorchDevice {
    /// `device` with these parameters. `direct` says that torch.distributed moves its memory; else `group` does, by way of
    /// the host's.
    pub(crate) fn new(
        device: &Bound<'_, PyAny>,
        parameters: Vec<Py<PyAny>>,
        group: Arc<dyn Group>,
        direct: bool,
        pins: Pins,
    ) -> PyResult<Self> {
        let py = device.py();
        let distributed =
            if direct { Some(py.import("torch.distributed")?.into_any().unbind()) } else { None };
        let moved = match (group.world(), direct) {
            (1, _) => "",
            (_, true) => ", moved by torch.distributed",
            (_, false) => ", moved through the host's memory",
        };
        Ok(Self {
            ops: Ops::new(device)?,
            name: format!("{device} by torch{moved}"),
            group,
            direct: distributed,
            pins,
            parameters,
            rank: OnceLock::new(),
            units: OnceLock::new(),
            sums: Mutex::default(),
            norms: Mutex::default(),
            gathered: Mutex::default(),
            exchanged: Mutex::default(),
            evicted: Mutex::default(),
        })
    }

    /// The `torch.device`.
    pub(crate) fn torch_device<'py>(&self, py: Python<'py>) -> &Bound<'py, PyAny> {
        self.ops.device(py)
    }

    /// Bytes that are free on an accelerator, or taken by the parameters that the engine's take the place of; none on a CPU.
    pub(crate) fn memory(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let Some(free) = self.ops.free_memory(py)? else { return Ok(None) };
        let bytes = self.parameters.iter().map(|it| it.bind(py).getattr("nbytes")?.extract::<u64>());
        Ok(Some(free + bytes.sum::<PyResult<u64>>()?))
    }

    /// All units, by number.
    fn units(&self) -> &[UnitTensors] {
        self.units.get().map_or(&[], Vec::as_slice)
    }

    fn trained(&self) -> impl Iterator<Item = &UnitTensors> {
        self.units().iter().filter(|tensors| tensors.trained)
    }

    /// The units whose masters and state are here.
    fn resident(&self) -> impl Iterator<Item = &UnitTensors> {
        self.units().iter().filter(|tensors| tensors.resident)
    }

    fn unit(&self, number: usize) -> PyResult<&UnitTensors> {
        let missing = || PyRuntimeError::new_err(format!("{} has no unit {number}", self.name));
        self.units().get(number).ok_or_else(missing)
    }

    /// torch.distributed is about to move something of unit `number`.
    fn note_exchange(&self, kind: Exchanged, number: usize) {
        if self.direct.is_some() {
            // FNV-1a, of numbers instead of bytes.
            const PRIME: u64 = 0x100_0000_01b3;
            let mut hash = lock(&self.exchanged);
            for word in [kind as u64 + 1, number as u64] {
                *hash = (*hash ^ word).wrapping_mul(PRIME).rotate_left(17);
            }
        }
    }

    fn rank(&self) -> Rank {
        self.rank.get().copied().unwrap_or(Rank(0))
    }

    fn tensor<'py>(&self, py: Python<'py>, number: usize, part: Part) -> PyResult<Tensor<'py>> {
        let unit = self.unit(number)?;
        let found = match part {
            Part::Gradient => unit.gradient.as_ref(),
            Part::Master => unit.master.as_ref(),
            Part::State(index) => unit.state.get(index),
            Part::Weight => Some(&unit.weight),
        };
        let missing = || PyRuntimeError::new_err(format!("{} has no {part:?} of unit {number}", self.name));
        Ok(found.ok_or_else(missing)?.bind(py).clone())
    }

    /// Runs `work` under the GIL.
    fn attached<T>(&self, work: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T, DeviceError> {
        let here = || match lock(&self.evicted).is_empty() {
            true => Ok(()),
            false => Err(PyRuntimeError::new_err(
                "the engine's state was moved off the device by offload_states(): call reload_states() first",
            )),
        };
        Python::attach(|py| here().and_then(|()| work(py)))
            .map_err(|error| DeviceError { device: self.name.clone(), source: Box::new(error) })
    }

    fn take_memory(&self, py: Python<'_>, plan: &DevicePlan<'_>) -> PyResult<Vec<UnitTensors>> {
        let trained = plan.trained.units.iter().map(|unit| (unit, 0, true));
        let first = plan.trained.params.len();
        let frozen = plan.frozen.units.iter().map(|unit| (unit, first, false));
        let away = !matches!(plan.weights, ShardHome::Device);
        let keeper = match plan.weights {
            ShardHome::Files(files) => {
                let regions = files.map(|units| Arc::clone(units.region()));
                Some(Py::new(py, PySharedWeights::new(regions.into()))?.into_any())
            }
            ShardHome::Device | ShardHome::Host => None,
        };
        let of_unit = |(unit, first_param, trained): (&Unit, usize, bool)| {
            let here = |len, dtype| self.ops.zeros(py, len, dtype);
            let resident = trained && unit.id.index() >= plan.host_units;
            let gradient = match (trained, resident) {
                (false, _) => None,
                (true, true) => Some(here(unit.shard_len, DType::F32)?),
                (true, false) => {
                    Some(self.ops.host_zeros(py, unit.shard_len, DType::F32, self.pins.gradients)?)
                }
            };
            let apart = unit.dtype != DType::F32 || away;
            let master = (resident && apart).then(|| here(unit.shard_len, DType::F32));
            let states = if resident { plan.states } else { 0 };
            let whole = if plan.whole_weights { Some(here(unit.len(), unit.dtype)?) } else { None };
            let weight = match (&whole, plan.weights) {
                (Some(whole), _) => {
                    whole.bind(py).part(unit.shard(plan.rank).start, unit.shard_len)?.unbind()
                }
                (None, ShardHome::Files(files)) => {
                    let own = files[usize::from(!trained)].own(unit);
                    let address = own.as_bytes().as_ptr().cast();
                    // SAFETY: the keeper has the mapping for as long as there is the tensor. The engine has no span of it while
                    // it asks something of the device, and the device uses it only then.
                    unsafe { ops::over(py, address, own.len(), own.dtype(), keeper.as_ref())? }.unbind()
                }
                (None, ShardHome::Host) => {
                    self.ops.host_zeros(py, unit.shard_len, unit.dtype, self.pins.weights)?
                }
                (None, ShardHome::Device) => here(unit.shard_len, unit.dtype)?,
            };
            Ok(UnitTensors {
                unit: unit.clone(),
                first_param,
                trained,
                resident,
                gradient,
                master: master.transpose()?,
                state: (0..states).map(|_| here(unit.shard_len, DType::F32)).collect::<PyResult<_>>()?,
                weight,
                whole,
            })
        };
        trained.chain(frozen).map(of_unit).collect()
    }
}

impl Device for TorchDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn lay_out(&self, plan: &DevicePlan<'_>) -> Result<(), DeviceError> {
        let units = self.attached(|py| self.take_memory(py, plan))?;
        *lock(&self.norms) = plan.trained.units.iter().map(|_| None).collect();
        let twice = self.rank.set(plan.rank).is_err() || self.units.set(units).is_err();
        assert!(!twice, "memory of a device is laid out once");
        Ok(())
    }

    fn accumulate(
        &self,
        layout: &Layout,
        present: &[bool],
        factor: f32,
        first: bool,
    ) -> Result<(), DeviceError> {
        self.attached(|py| self.add_gradients(py, layout, present, factor, first))
    }

    fn reduce(
        &self,
        unit: &Unit,
        what: &str,
        source: Source<'_>,
        exchange: &Exchange,
        into: Into,
    ) -> Result<(), DeviceError> {
        self.attached(|py| self.reduce_unit(py, unit, what, source, exchange, into))
    }

    fn square_sums(&self) -> Result<Vec<f64>, DeviceError> {
        self.attached(|py| self.norms_squared(py))
    }

    fn exchanges(&self) -> u64 {
        std::mem::take(&mut *lock(&self.exchanged))
    }

    fn scale_gradients(&self, factor: f32) -> Result<(), DeviceError> {
        self.attached(|py| {
            self.ops.join(py, Side::Reduce)?;
            for gradient in self.resident().filter_map(|unit| unit.gradient.as_ref()) {
                if factor != 1.0 {
                    gradient.bind(py).mul_(f64::from(factor))?;
                }
            }
            Ok(())
        })
    }

    fn update(
        &self,
        layout: &Layout,
        hypers: &[Hyper],
        step: u64,
        grad_scale: f32,
    ) -> Result<(), DeviceError> {
        self.attached(|py| {
            self.ops.join(py, Side::Reduce)?;
            self.take_replaced(py, self.trained())?;
            self.update_masters(py, layout, hypers, step, grad_scale)
        })
    }

    fn publish(&self) -> Result<(), DeviceError> {
        self.attached(|py| self.publish_weights(py))
    }

    fn read(&self, unit: usize, part: Part, target: SpanMut<'_>) -> Result<(), DeviceError> {
        self.attached(|py| {
            self.ops.join(py, Side::Reduce)?;
            if part == Part::Weight {
                self.take_replaced(py, std::iter::once(self.unit(unit)?))?;
            }
            let tensor = self.tensor(py, unit, part)?;
            if self.is_on_host(&tensor)? {
                // What the device copies there is queued.
                self.wait(py)?;
            }
            copy_out(&tensor, target)
        })
    }

    fn write(&self, unit: usize, part: Part, source: Span<'_>) -> Result<(), DeviceError> {
        self.attached(|py| {
            self.ops.join(py, Side::Reduce)?;
            let tensor = self.tensor(py, unit, part)?;
            if self.is_on_host(&tensor)? {
                // The device may still read what was there, or write to it.
                self.wait(py)?;
            }
            copy_in(&tensor, source)?;
            if part == Part::Gradient {
                self.note_norm(unit, &self.ops.here(&tensor)?)?;
            }
            Ok(())
        })
    }
}
