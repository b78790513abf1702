//! Optimizers on a device: torch's fused operations where it has them, else a few operations on flat tensors.
//!
//! The formulas are those of `deepspeed-kernels`, from whose results these differ by rounding.

use std::collections::BTreeMap;

use deepspeed_core::{DType, Layout, ParamId};
use deepspeed_kernels::update::trust_ratio;
use deepspeed_optim::{Hyper, LambSums, OptimizerKind};
use pyo3::{exceptions::PyRuntimeError, intern, prelude::*, types::PyDict};

use super::{
    TorchDevice, UnitTensors,
    ops::{Flat, Tensor},
};
use crate::enter::enter;

/// Consecutive elements of a shard that one parameter group updates; all tensors are equally long.
struct Run<'py> {
    param: ParamId,
    master: Tensor<'py>,
    gradient: Tensor<'py>,
    state: Vec<Tensor<'py>>,
}

impl<'py> Run<'py> {
    fn state(&self, index: usize) -> PyResult<&Tensor<'py>> {
        let missing = || PyRuntimeError::new_err(format!("the optimizer has no state tensor {index}"));
        self.state.get(index).ok_or_else(missing)
    }
}

impl TorchDevice {
    pub(super) fn update_masters(
        &self,
        py: Python<'_>,
        layout: &Layout,
        hypers: &[Hyper],
        step: u64,
        grad_scale: f32,
    ) -> PyResult<()> {
        let merge = hypers.iter().all(|hyper| hyper.kind().is_elementwise());
        let mut groups: BTreeMap<usize, Vec<Run<'_>>> = BTreeMap::new();
        for tensors in self.resident() {
            for (group, run) in self.runs(py, layout, tensors, merge)? {
                groups.entry(group).or_default().push(run);
            }
        }
        if !merge {
            return self.lamb(py, layout, hypers, step, grad_scale, &groups);
        }
        for (group, runs) in &groups {
            let hyper = hypers.get(*group).ok_or_else(|| {
                PyRuntimeError::new_err(format!("no hyperparameters for parameter group {group}"))
            })?;
            if !self.fused(py, hyper, step, grad_scale, runs)? {
                for run in runs {
                    if grad_scale != 1.0 {
                        run.gradient.mul_(f64::from(grad_scale))?;
                    }
                    elementwise(hyper, step, run)?;
                }
            }
        }
        Ok(())
    }

    /// What each parameter group has of this rank's shard; neighbours of one group in one run, if `merge`.
    fn runs<'py>(
        &self,
        py: Python<'py>,
        layout: &Layout,
        tensors: &UnitTensors,
        merge: bool,
    ) -> PyResult<Vec<(usize, Run<'py>)>> {
        let shard = tensors.unit.shard(self.rank());
        let mut places: Vec<(usize, ParamId, usize, usize)> = Vec::new();
        for fragment in tensors.unit.fragments(shard.clone()) {
            let (group, start) = (layout.param(fragment.param).group, fragment.unit_offset - shard.start);
            match places.last_mut() {
                Some((last, _, first, len)) if merge && *last == group && *first + *len == start => {
                    *len += fragment.len;
                }
                _ => places.push((group, fragment.param, start, fragment.len)),
            }
        }
        let missing = || PyRuntimeError::new_err("a trained unit has gradients");
        let master = tensors.master.as_ref().unwrap_or(&tensors.weight).bind(py);
        let gradient = tensors.gradient.as_ref().ok_or_else(missing)?.bind(py);
        let run = |(group, param, start, len)| {
            let state = tensors.state.iter().map(|state| state.bind(py).part(start, len));
            let state = state.collect::<PyResult<_>>()?;
            let (master, gradient) = (master.part(start, len)?, gradient.part(start, len)?);
            Ok((group, Run { param, master, gradient, state }))
        };
        places.into_iter().map(run).collect()
    }

    /// All runs of a group in one call of torch's, if it has that.
    fn fused(
        &self,
        py: Python<'_>,
        hyper: &Hyper,
        step: u64,
        grad_scale: f32,
        runs: &[Run<'_>],
    ) -> PyResult<bool> {
        let torch = self.ops.torch(py);
        let name = match hyper.kind() {
            OptimizerKind::Adam | OptimizerKind::AdamW if !hyper.bias_correction => return Ok(false),
            OptimizerKind::Adam | OptimizerKind::AdamW if hyper.adam_w_mode => "_fused_adamw_",
            OptimizerKind::Adam | OptimizerKind::AdamW => "_fused_adam_",
            OptimizerKind::Sgd => "_fused_sgd_",
            OptimizerKind::Adagrad | OptimizerKind::Lion | OptimizerKind::Lamb => return Ok(false),
        };
        let Some(function) = torch.getattr_opt(name)? else { return Ok(false) };
        let masters: Vec<_> = runs.iter().map(|run| &run.master).collect();
        let gradients: Vec<_> = runs.iter().map(|run| &run.gradient).collect();
        let options = PyDict::new(py);
        let scalar = |value: f64| self.scalar(py, value);
        // torch divides by it.
        options.set_item(
            "grad_scale",
            if grad_scale == 1.0 { None } else { Some(scalar(1.0 / f64::from(grad_scale))?) },
        )?;
        options.set_item("found_inf", py.None())?;
        options.set_item("lr", hyper.lr)?;
        options.set_item("weight_decay", hyper.weight_decay)?;
        options.set_item("maximize", false)?;
        if hyper.kind() == OptimizerKind::Sgd {
            let buffers = match hyper.momentum {
                0.0 => Vec::new(),
                _ => runs.iter().map(|run| run.state(0)).collect::<PyResult<Vec<_>>>()?,
            };
            options.set_item("momentum", hyper.momentum)?;
            options.set_item("dampening", hyper.dampening)?;
            options.set_item("nesterov", hyper.nesterov)?;
            options.set_item("is_first_step", step <= 1)?;
            function.call((masters, gradients, buffers), Some(&options))?;
            return Ok(true);
        }
        let first = runs.iter().map(|run| run.state(0)).collect::<PyResult<Vec<_>>>()?;
        let second = runs.iter().map(|run| run.state(1)).collect::<PyResult<Vec<_>>>()?;
        let steps = vec![scalar(step as f64)?; runs.len()];
        options.set_item("beta1", hyper.betas.0)?;
        options.set_item("beta2", hyper.betas.1)?;
        options.set_item("eps", hyper.eps)?;
        options.set_item("amsgrad", false)?;
        let none: Vec<Tensor<'_>> = Vec::new();
        function.call((masters, gradients, first, second, none, steps), Some(&options))?;
        Ok(true)
    }

    /// A number in fp32 on the device.
    fn scalar<'py>(&self, py: Python<'py>, value: f64) -> PyResult<Tensor<'py>> {
        let one = self.ops.empty(py, 1, DType::F32)?;
        one.call_method1(intern!(py, "fill_"), (value,))?;
        one.call_method1(intern!(py, "view"), (pyo3::types::PyTuple::empty(py),))
    }

    /// Lamb: the direction of every element, the norms of whole parameters, then the update.
    fn lamb(
        &self,
        py: Python<'_>,
        layout: &Layout,
        hypers: &[Hyper],
        step: u64,
        grad_scale: f32,
        groups: &BTreeMap<usize, Vec<Run<'_>>>,
    ) -> PyResult<()> {
        let mut norms = Vec::new();
        let mut owners = Vec::new();
        for (group, runs) in groups {
            let Hyper { betas: (beta1, beta2), eps, weight_decay, .. } = hypers[*group];
            for run in runs {
                let (first, second) = (run.state(0)?, run.state(1)?);
                if grad_scale != 1.0 {
                    run.gradient.mul_(f64::from(grad_scale))?;
                }
                first.mul_(beta1)?;
                first.add_scaled_(&run.gradient, 1.0 - beta1)?;
                second.mul_(beta2)?;
                add_product(second, &run.gradient, &run.gradient, 1.0 - beta2)?;
                let denominator = root(second)?;
                denominator.call_method1(intern!(py, "add_"), (eps,))?;
                run.gradient.copy_(&first.div(&denominator)?)?;
                run.gradient.add_scaled_(&run.master, weight_decay)?;
                norms.push(self.norm(&run.master)?);
                norms.push(self.norm(&run.gradient)?);
                owners.push(run.param);
            }
        }
        let sums = self.lamb_sums(py, layout, &norms, &owners)?;
        for (group, runs) in groups {
            let hyper = &hypers[*group];
            for run in runs {
                let ratio = trust_ratio(sums[run.param.index()], hyper.min_coeff, hyper.max_coeff);
                let length = deepspeed_optim::lamb_step_size(hyper, step) * ratio;
                run.master.add_scaled_(&run.gradient, -length)?;
            }
        }
        Ok(())
    }

    fn norm<'py>(&self, tensor: &Tensor<'py>) -> PyResult<Tensor<'py>> {
        let py = tensor.py();
        let torch = self.ops.torch(py);
        let options = PyDict::new(py);
        options.set_item("dtype", torch.getattr(intern!(py, "float64"))?)?;
        let linalg = torch.getattr(intern!(py, "linalg"))?;
        linalg.call_method(intern!(py, "vector_norm"), (tensor,), Some(&options))
    }

    /// By parameter, the sums over all ranks, in rank order. `norms` are two for each of `owners`.
    fn lamb_sums(
        &self,
        py: Python<'_>,
        layout: &Layout,
        norms: &[Tensor<'_>],
        owners: &[ParamId],
    ) -> PyResult<Vec<LambSums>> {
        let mut mine = vec![LambSums::default(); layout.params.len()];
        if !owners.is_empty() {
            let all = self.ops.torch(py).call_method1(intern!(py, "stack"), (norms.to_vec(),))?;
            let values: Vec<f64> = all.call_method0(intern!(py, "tolist"))?.extract()?;
            for (pair, owner) in values.chunks_exact(2).zip(owners) {
                mine[owner.index()] += LambSums { param: pair[0] * pair[0], direction: pair[1] * pair[1] };
            }
        }
        let bytes: Vec<u8> =
            mine.iter().flat_map(|sums| [sums.param, sums.direction]).flat_map(f64::to_le_bytes).collect();
        let group = &self.group;
        let ranks = enter(py, || group.all_gather_bytes("LAMB parameter norms", &bytes))?;
        let mut sums = vec![LambSums::default(); layout.params.len()];
        for rank in ranks {
            let mut numbers = rank.as_chunks::<8>().0.iter().map(|word| f64::from_le_bytes(*word));
            for total in &mut sums {
                if let (Some(param), Some(direction)) = (numbers.next(), numbers.next()) {
                    *total += LambSums { param, direction };
                }
            }
        }
        Ok(sums)
    }
}

/// One step of an elementwise optimizer on unscaled, clipped gradients.
fn elementwise(hyper: &Hyper, step: u64, run: &Run<'_>) -> PyResult<()> {
    let Hyper { lr, betas: (beta1, beta2), eps, weight_decay, .. } = *hyper;
    let Run { master, gradient, .. } = run;
    let py = master.py();
    let correction = |beta: f64| match (hyper.bias_correction, i32::try_from(step)) {
        (true, Ok(step)) => 1.0 - beta.powi(step),
        _ => 1.0,
    };
    match hyper.kind() {
        OptimizerKind::Adam | OptimizerKind::AdamW => {
            let (first, second) = (run.state(0)?, run.state(1)?);
            if hyper.adam_w_mode {
                master.mul_(1.0 - lr * weight_decay)?;
            } else if weight_decay != 0.0 {
                gradient.add_scaled_(master, weight_decay)?;
            }
            first.mul_(beta1)?;
            first.add_scaled_(gradient, 1.0 - beta1)?;
            second.mul_(beta2)?;
            add_product(second, gradient, gradient, 1.0 - beta2)?;
            let denominator = root(second)?;
            denominator.mul_(correction(beta2).sqrt().recip())?;
            denominator.call_method1(intern!(py, "add_"), (eps,))?;
            add_quotient(master, first, &denominator, -lr / correction(beta1))
        }
        OptimizerKind::Sgd => {
            if weight_decay != 0.0 {
                gradient.add_scaled_(master, weight_decay)?;
            }
            if hyper.momentum == 0.0 {
                return master.add_scaled_(gradient, -lr);
            }
            let buffer = run.state(0)?;
            buffer.mul_(hyper.momentum)?;
            buffer.add_scaled_(gradient, if step <= 1 { 1.0 } else { 1.0 - hyper.dampening })?;
            if hyper.nesterov {
                gradient.add_scaled_(buffer, hyper.momentum)?;
                return master.add_scaled_(gradient, -lr);
            }
            master.add_scaled_(buffer, -lr)
        }
        OptimizerKind::Adagrad => {
            let sum = run.state(0)?;
            if weight_decay != 0.0 {
                gradient.add_scaled_(master, weight_decay)?;
            }
            add_product(sum, gradient, gradient, 1.0)?;
            let denominator = root(sum)?;
            denominator.call_method1(intern!(py, "add_"), (eps,))?;
            let lr = lr / (1.0 + step.saturating_sub(1) as f64 * hyper.lr_decay);
            add_quotient(master, gradient, &denominator, -lr)
        }
        OptimizerKind::Lion => {
            let moment = run.state(0)?;
            let direction = moment.times(beta1)?;
            direction.add_scaled_(gradient, 1.0 - beta1)?;
            direction.call_method0(intern!(py, "sign_"))?;
            master.mul_(1.0 - lr * weight_decay)?;
            master.add_scaled_(&direction, -lr)?;
            moment.mul_(beta2)?;
            moment.add_scaled_(gradient, 1.0 - beta2)
        }
        OptimizerKind::Lamb => Err(PyRuntimeError::new_err("Lamb does not look at each element alone")),
    }
}

/// `target += factor * a * b`.
fn add_product<'py>(target: &Tensor<'py>, a: &Tensor<'py>, b: &Tensor<'py>, factor: f64) -> PyResult<()> {
    let options = PyDict::new(target.py());
    options.set_item("value", factor)?;
    target.call_method(intern!(target.py(), "addcmul_"), (a, b), Some(&options)).map(drop)
}

/// `target += factor * a / b`.
fn add_quotient<'py>(target: &Tensor<'py>, a: &Tensor<'py>, b: &Tensor<'py>, factor: f64) -> PyResult<()> {
    let options = PyDict::new(target.py());
    options.set_item("value", factor)?;
    target.call_method(intern!(target.py(), "addcdiv_"), (a, b), Some(&options)).map(drop)
}

fn root<'py>(tensor: &Tensor<'py>) -> PyResult<Tensor<'py>> {
    tensor.call_method0(intern!(tensor.py(), "sqrt"))
}
