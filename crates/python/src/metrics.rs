//! Metrics of training, timers, counts of collectives and of operations, for `deepspeed.monitor`, `deepspeed.utils.timer`,
//! `deepspeed.comm` and `deepspeed.profiling`.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use deepspeed_monitor::{
    CommsLog, ModuleProfile, ReportOptions, Timer,
    metrics::{CsvFolder, Metric, Sink, StepMetrics, TensorBoardFile},
    shown, shown_seconds,
};
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
};

use crate::engine::PyEngine;

/// (tag, value, samples of all ranks so far).
type Event = (String, f64, u64);

fn events(metrics: Vec<Metric>) -> Vec<Event> {
    metrics.into_iter().map(|Metric { tag, value, samples }| (tag, value, samples)).collect()
}

/// A file, or a folder of files, to which metrics are written.
#[pyclass(name = "MetricFile", module = "deepspeed._native", frozen)]
struct PyMetricFile {
    sink: Mutex<Box<dyn Sink>>,
}

#[pymethods]
impl PyMetricFile {
    /// A folder with a CSV file for each metric.
    #[staticmethod]
    fn csv(folder: PathBuf) -> PyResult<Self> {
        Ok(Self { sink: Mutex::new(Box::new(CsvFolder::create(&folder)?)) })
    }

    /// A file for TensorBoard in a folder.
    #[staticmethod]
    fn tensorboard(folder: PathBuf) -> PyResult<Self> {
        let file = TensorBoardFile::of_this_process(&folder, now())?;
        Ok(Self { sink: Mutex::new(Box::new(file)) })
    }

    /// Writes metrics: (tag, value, samples of all ranks so far).
    fn write(&self, py: Python<'_>, events: Vec<Event>) -> PyResult<()> {
        let metrics: Vec<Metric> =
            events.into_iter().map(|(tag, value, samples)| Metric { tag, value, samples }).collect();
        py.detach(|| {
            let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
            sink.write(&metrics, now())
        })?;
        Ok(())
    }
}

fn now() -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64()
}

/// What is known of the engine's last boundary, as metrics: (tag, value, samples of all ranks so far). `loss` is this
/// rank's.
#[pyfunction]
#[pyo3(signature = (engine, learning_rate, loss=None))]
fn step_metrics(engine: &mut PyEngine, learning_rate: f64, loss: Option<f64>) -> Vec<Event> {
    let known: StepMetrics = engine.engine.step_metrics(learning_rate, loss);
    events(known.metrics())
}

/// A stopwatch that adds up.
#[pyclass(name = "Timer", module = "deepspeed._native")]
struct PyTimer {
    timer: Timer,
}

#[pymethods]
impl PyTimer {
    /// A timer that has not run.
    #[new]
    fn new() -> Self {
        Self { timer: Timer::default() }
    }

    /// Begins an interval; the timer must not be running.
    fn start(&mut self) -> PyResult<()> {
        self.timer.start(Instant::now()).map_err(PyRuntimeError::new_err)
    }

    /// Ends the interval; `record` says whether it counts for the mean.
    #[pyo3(signature = (record=true))]
    fn stop(&mut self, record: bool) -> PyResult<()> {
        self.timer.stop(Instant::now(), record).map_err(PyRuntimeError::new_err)
    }

    /// Whether an interval is open.
    #[getter]
    fn running(&self) -> bool {
        self.timer.is_running()
    }

    /// Milliseconds so far, an open interval included; with `reset` counting starts again.
    #[pyo3(signature = (reset=true))]
    fn elapsed(&mut self, reset: bool) -> f64 {
        self.timer.elapsed(Instant::now(), reset).as_secs_f64() * 1e3
    }

    /// Mean of the recorded intervals in milliseconds; 0 before the first.
    fn mean(&self) -> f64 {
        self.timer.mean().as_secs_f64() * 1e3
    }

    /// Forgets everything.
    fn reset(&mut self) {
        self.timer = Timer::default();
    }
}

/// How often each collective ran, on how many bytes, and for how long.
#[pyclass(name = "CommsLog", module = "deepspeed._native", frozen)]
pub(crate) struct PyCommsLog {
    log: Arc<Mutex<CommsLog>>,
}

impl PyCommsLog {
    pub(crate) fn shared(&self) -> Arc<Mutex<CommsLog>> {
        self.log.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, CommsLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl PyCommsLog {
    /// An empty log of a group of `world` ranks, for the operations `only`, or for all.
    #[new]
    #[pyo3(signature = (world, only=None))]
    fn new(world: usize, only: Option<Vec<String>>) -> Self {
        Self { log: Arc::new(Mutex::new(CommsLog::new(world, only))) }
    }

    /// Adds a call of `operation` that moved `bytes` of one rank in `seconds`; returns a line that says so, or None where
    /// the operation is not recorded.
    fn add(&self, operation: &str, bytes: u64, seconds: f64) -> Option<String> {
        self.lock().add(operation, bytes, Duration::try_from_secs_f64(seconds).unwrap_or_default())
    }

    /// The table of all calls.
    fn summary(&self) -> String {
        self.lock().to_string()
    }

    /// By operation and bytes of one rank: the seconds of each call.
    fn calls(&self) -> Vec<(String, u64, Vec<f64>)> {
        let log = self.lock();
        log.calls().map(|(operation, bytes, times)| (operation.to_owned(), bytes, times)).collect()
    }

    /// Forgets all calls.
    fn reset(&self) {
        self.lock().reset();
    }
}

/// Operations, parameters and time of a model, module by module.
#[pyclass(name = "ModuleProfile", module = "deepspeed._native")]
struct PyModuleProfile {
    profile: ModuleProfile,
}

#[pymethods]
impl PyModuleProfile {
    /// Modules in the order of the tree, the whole model first: path, class, parameters with those inside.
    #[new]
    fn new(modules: Vec<(String, String, u64)>) -> Self {
        Self { profile: ModuleProfile::new(modules) }
    }

    /// Adds floating-point operations of the module at `path`, those inside it included.
    fn add_operations(&mut self, path: &str, operations: u64) {
        self.profile.add_flops(path, operations);
    }

    /// Adds a call of a module, by its number.
    fn add_time(&mut self, number: usize, seconds: f64) {
        self.profile.add_time(number, seconds);
    }

    /// Forgets operations and times.
    fn reset(&mut self) {
        self.profile.reset();
    }

    /// "flops", "macs", "params" or "seconds" of the whole model; as text with its unit if `as_text`.
    fn total<'py>(&self, py: Python<'py>, what: &str, as_text: bool) -> PyResult<Bound<'py, PyAny>> {
        let flops = self.profile.flops();
        let (value, unit) = match what {
            "flops" => (flops, "FLOPs"),
            "macs" => (flops / 2, "MACs"),
            "params" => (self.profile.params(), ""),
            "seconds" if as_text => {
                return Ok(shown_seconds(self.profile.seconds()).into_pyobject(py)?.into_any());
            }
            "seconds" => return Ok(self.profile.seconds().into_pyobject(py)?.into_any()),
            other => return Err(PyValueError::new_err(format!("unknown total {other:?}"))),
        };
        if as_text {
            return Ok(shown(value as f64, unit).into_pyobject(py)?.into_any());
        }
        Ok(value.into_pyobject(py)?.into_any())
    }

    /// The report: totals, the `top` modules at each depth, and with `detailed` all down to `depth` (-1 is all).
    fn report(&self, step: u64, depth: i64, top: usize, detailed: bool, recompute: f64) -> String {
        let depth = usize::try_from(depth).ok();
        self.profile.report(ReportOptions { step, depth, top, detailed, recompute })
    }
}

/// Samples per second, from milliseconds; -inf where there is no time.
#[pyfunction]
fn samples_per_second(samples: u64, milliseconds: f64) -> f64 {
    if milliseconds > 0.0 { 1e3 * samples as f64 / milliseconds } else { f64::NEG_INFINITY }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyMetricFile>()?;
    module.add_class::<PyTimer>()?;
    module.add_class::<PyCommsLog>()?;
    module.add_class::<PyModuleProfile>()?;
    module.add_function(wrap_pyfunction!(samples_per_second, module)?)?;
    module.add_function(wrap_pyfunction!(step_metrics, module)?)
}
