//! ds_config.json for Python: parsing, judging and reading it are `deepspeed-config`'s.

use std::path::PathBuf;

use deepspeed_config::{Code, Config, ConfigError, OffloadDevice, Options, Origin, Resolved, TagValidation};
use deepspeed_core::DType;
use deepspeed_optim::{Hyper, OptimizerKind, Schedule};
use pyo3::{create_exception, exceptions::PyValueError, prelude::*, types::PyDict};

use crate::{errors::IntoPyErr, json, tensors::torch_dtype};

create_exception!(
    deepspeed,
    DeepSpeedConfigError,
    PyValueError,
    "A config that cannot be used: every problem in it, each with its place and what to do."
);

impl IntoPyErr for ConfigError {
    fn into_py_err(self) -> PyErr {
        DeepSpeedConfigError::new_err(self.to_string())
    }
}

/// A judged config.
#[pyclass(frozen, name = "Config", module = "deepspeed._native")]
pub(crate) struct PyConfig {
    pub(crate) config: Config,
    /// What is worth saying about it, one text each.
    #[pyo3(get)]
    warnings: Vec<String>,
}

#[pymethods]
impl PyConfig {
    /// From the path of a file or base64 of JSON. `strict` is the value of DS_CONFIG_STRICT; in a `template` "auto" may be
    /// left where somebody else fills it in later.
    #[staticmethod]
    #[pyo3(signature = (spec, strict=None, template=false))]
    fn load(spec: &str, strict: Option<&str>, template: bool) -> PyResult<Self> {
        Self::wrap(Config::load(spec, &options(strict, template)))
    }

    /// From a dict that Python's json module has written.
    #[staticmethod]
    #[pyo3(signature = (text, strict=None, template=false))]
    fn from_dict_text(text: &str, strict: Option<&str>, template: bool) -> PyResult<Self> {
        Self::wrap(Config::from_text(text, Origin::Dict, &options(strict, template)))
    }

    /// The config as it was written, defaults not filled in, as Python's json module would read it: infinities are floats.
    fn raw<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::node_to_python(py, self.config.document().root())
    }

    /// `(train_batch_size, micro batch size, accumulation steps)` for `world` data-parallel ranks; `world_origin` says
    /// where that number came from.
    fn resolve_batch(&self, world: usize, world_origin: &str) -> PyResult<(usize, usize, usize)> {
        let batch = self.config.resolve_batch(world, world_origin).map_err(IntoPyErr::into_py_err)?;
        Ok((batch.train, batch.micro, batch.accumulation))
    }

    /// The torch dtype in which a floating-point tensor of `dtype` is trained: that of the precision in bf16 and fp16,
    /// its own in fp32.
    fn compute_dtype<'py>(&self, dtype: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        match self.config.precision.dtype() {
            DType::F32 => Ok(dtype),
            narrow => torch_dtype(dtype.py(), narrow),
        }
    }

    /// The class that `optimizer` names: (`deepspeed.ops` or `torch.optim` class as "module:class", its arguments).
    /// None where the config has no optimizer.
    fn optimizer_class<'py>(&self, py: Python<'py>) -> PyResult<Option<(String, Bound<'py, PyDict>)>> {
        let Some(optimizer) = &self.config.optimizer else { return Ok(None) };
        let class = match OptimizerKind::from_name(&optimizer.kind).map(|(kind, _)| kind) {
            Some(OptimizerKind::Adam | OptimizerKind::AdamW) => "deepspeed.ops.adam:FusedAdam".to_owned(),
            Some(OptimizerKind::Lamb) => "deepspeed.ops.lamb:FusedLamb".to_owned(),
            Some(OptimizerKind::Lion) => "deepspeed.ops.lion:FusedLion".to_owned(),
            Some(OptimizerKind::Adagrad) => "deepspeed.ops.adagrad:DeepSpeedCPUAdagrad".to_owned(),
            Some(OptimizerKind::Sgd) => "deepspeed.ops.sgd:FusedSGD".to_owned(),
            None => format!("torch.optim:{}", optimizer.kind),
        };
        let params = if class.starts_with("deepspeed") {
            let hyper =
                Hyper::from_config(&optimizer.kind, &optimizer.params).map_err(IntoPyErr::into_py_err)?;
            hyper.to_map()
        } else {
            optimizer.params.clone()
        };
        Ok(Some((class, json::map_to_python(py, &params)?)))
    }

    /// The class that `scheduler` names: one of `deepspeed.runtime.lr_schedules` or of `torch.optim.lr_scheduler`, and
    /// its arguments. None where the config has no scheduler.
    fn scheduler_class<'py>(&self, py: Python<'py>) -> PyResult<Option<(String, Bound<'py, PyDict>)>> {
        let Some(scheduler) = &self.config.scheduler else { return Ok(None) };
        let ours = Schedule::NAMES.contains(&scheduler.kind.as_str());
        let module = if ours { "deepspeed.runtime.lr_schedules" } else { "torch.optim.lr_scheduler" };
        let params = json::map_to_python(py, &scheduler.params)?;
        Ok(Some((format!("{module}:{}", scheduler.kind), params)))
    }

    /// A block of plain settings, as "tensorboard": every key with its value or its default.
    fn block<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        json::map_to_python(py, &self.config.block(name))
    }

    /// The folder in which weights lie while they are not used; None unless offload_param.device is nvme.
    fn weights_folder(&self) -> Option<PathBuf> {
        let offload = &self.config.zero.offload_param;
        offload.nvme_path.clone().filter(|_| offload.device == OffloadDevice::Nvme)
    }

    /// The settings that differ from their defaults, a line each.
    fn differences(&self) -> String {
        let lines = self.config.differences_from_default().iter();
        lines
            .map(|it| format!("{} = {} (default {})", it.path, it.value, it.default))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// The settings under the attribute names of DeepSpeedConfig.
    fn attributes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let config = &self.config;
        let dict = PyDict::new(py);
        let dtype = |dtype: Option<DType>| dtype.map(|dtype| torch_dtype(py, dtype)).transpose();
        dict.set_item("fp16_enabled", config.fp16.enabled)?;
        dict.set_item("fp16_auto_cast", config.fp16.auto_cast)?;
        dict.set_item("loss_scale", config.fp16.loss_scale)?;
        dict.set_item("dynamic_loss_scale", config.fp16.dynamic())?;
        dict.set_item("initial_dynamic_scale", f64::from(config.fp16.initial_scale_power).exp2())?;
        dict.set_item("dynamic_loss_scale_args", scale_args(py, config)?)?;
        dict.set_item("bfloat16_enabled", config.bf16.enabled)?;
        dict.set_item("check_grad_overflow", config.bf16.check_grad_overflow)?;
        dict.set_item("zero_enabled", config.zero.stage.number() > 0)?;
        dict.set_item("zero_optimization_stage", config.zero.stage.number())?;
        dict.set_item("zero_settings", zero_settings(py, config)?)?;
        let optimizer = config.optimizer.as_ref();
        dict.set_item("optimizer_name", optimizer.map(|optimizer| optimizer.kind.as_str()))?;
        let params = optimizer.map(|optimizer| json::map_to_python(py, &optimizer.params)).transpose()?;
        dict.set_item("optimizer_params", params)?;
        dict.set_item("optimizer_legacy_fusion", optimizer.is_some_and(|optimizer| optimizer.legacy_fusion))?;
        let scheduler = config.scheduler.as_ref();
        dict.set_item("scheduler_name", scheduler.map(|scheduler| scheduler.kind.as_str()))?;
        let params = scheduler.map(|scheduler| json::map_to_python(py, &scheduler.params)).transpose()?;
        dict.set_item("scheduler_params", params)?;
        dict.set_item("gradient_clipping", config.gradient_clipping)?;
        dict.set_item("prescale_gradients", config.prescale_gradients)?;
        dict.set_item("gradient_predivide_factor", config.gradient_predivide_factor)?;
        dict.set_item("communication_data_type", dtype(config.communication_dtype)?)?;
        dict.set_item("grad_accum_dtype", dtype(config.grad_accum_dtype)?)?;
        dict.set_item("param_dtype", dtype(config.data_types.param_dtype)?)?;
        dict.set_item("buffer_dtype", dtype(config.data_types.buffer_dtype)?)?;
        dict.set_item("steps_per_print", config.steps_per_print)?;
        dict.set_item("wall_clock_breakdown", config.wall_clock_breakdown)?;
        dict.set_item("memory_breakdown", config.memory_breakdown)?;
        dict.set_item("dump_state", config.dump_state)?;
        dict.set_item("dataloader_drop_last", config.dataloader_drop_last)?;
        dict.set_item("zero_allow_untested_optimizer", config.zero_allow_untested_optimizer)?;
        let validation = config.checkpoint.tag_validation;
        dict.set_item("checkpoint_tag_validation_enabled", validation != TagValidation::Ignore)?;
        dict.set_item("checkpoint_tag_validation_fail", validation == TagValidation::Fail)?;
        dict.set_item("load_universal_checkpoint", config.checkpoint.load_universal)?;
        Ok(dict)
    }
}

fn options(strict: Option<&str>, template: bool) -> Options {
    Options { allow_auto: template, ..Options::from_strict_variable(strict) }
}

impl PyConfig {
    fn wrap(judged: Result<Resolved, ConfigError>) -> PyResult<Self> {
        let resolved = judged.map_err(IntoPyErr::into_py_err)?;
        // Configs that libraries write are full of these: one line for all.
        let (idle, others): (Vec<_>, Vec<_>) =
            resolved.warnings.iter().partition(|warning| warning.code == Code::NoEffect);
        let mut warnings: Vec<String> = others.iter().map(ToString::to_string).collect();
        if !idle.is_empty() {
            let paths: Vec<&str> = idle.iter().map(|warning| warning.path.as_str()).collect();
            let s = if paths.len() == 1 { " has" } else { "s have" };
            warnings.push(format!(
                "setting{s} no effect here: {}; `deepspeed config check FILE` says why",
                paths.join(", ")
            ));
        }
        Ok(Self { config: resolved.config, warnings })
    }
}

fn scale_args<'py>(py: Python<'py>, config: &Config) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("init_scale", f64::from(config.fp16.initial_scale_power).exp2())?;
    dict.set_item("scale_window", config.fp16.loss_scale_window)?;
    dict.set_item("min_scale", config.fp16.min_loss_scale)?;
    dict.set_item("delayed_shift", config.fp16.hysteresis)?;
    dict.set_item("consecutive_hysteresis", config.fp16.consecutive_hysteresis)?;
    Ok(dict)
}

fn zero_settings<'py>(py: Python<'py>, config: &Config) -> PyResult<Bound<'py, PyDict>> {
    let zero = &config.zero;
    let dict = PyDict::new(py);
    dict.set_item("stage", zero.stage.number())?;
    dict.set_item("reduce_bucket_size", zero.reduce_bucket_size)?;
    dict.set_item("allgather_bucket_size", zero.allgather_bucket_size)?;
    dict.set_item("overlap_comm", zero.overlap_comm)?;
    dict.set_item("contiguous_gradients", zero.contiguous_gradients)?;
    dict.set_item("reduce_scatter", zero.reduce_scatter)?;
    dict.set_item("ignore_unused_parameters", zero.ignore_unused_parameters)?;
    dict.set_item("gather_16bit_weights_on_model_save", zero.gather_16bit_weights_on_model_save)?;
    Ok(dict)
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("DeepSpeedConfigError", m.py().get_type::<DeepSpeedConfigError>())?;
    m.add_class::<PyConfig>()
}
