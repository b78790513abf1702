//! The model files, and the facts about the run that all files are made from.

use deepspeed_core::{DType, Rank};
use serde_json::Value;

use super::{
    LAYOUT_VERSION, OriginalOptions, WholeState,
    plan::{Piece, Plan, Storages},
    whole::whole_optimizer,
};
use crate::{
    ElementType, ParamRecord, Result, Source, kind,
    original::{
        blob::Blob,
        damage::Damage,
        model::RESERVED,
        pickle::{Item, Object},
        torch::{TorchFile, storage_class},
    },
    record::numel,
};

/// What all files are made from.
pub(super) struct Facts {
    pub(super) stage: u8,
    pub(super) world: usize,
    /// What the model computes in.
    pub(super) dtype: DType,
    /// Per parameter group, its parameters with their numbers of elements, in order.
    pub(super) groups: Vec<Vec<(ParamRecord, usize)>>,
    frozen: Vec<(ParamRecord, usize)>,
    /// Per group, the optimizer's options.
    pub(super) options: Vec<Vec<(Object, Object)>>,
    schedule: Object,
    counters: [i64; 3],
    /// Updates made.
    pub(super) updates: i64,
    /// The gradient norm that is not exceeded; 0 where that is not known or not wanted.
    pub(super) clip: f64,
    /// Whose optimizer it is; so a 16-bit model keeps its state at stage 0.
    pub(super) state: WholeState,
    scaler: Value,
    config: Object,
}

impl Facts {
    pub(super) fn read(source: &dyn Source, options: OriginalOptions) -> std::result::Result<Self, String> {
        let first = source.params().iter().find(|param| param.group.is_some());
        let stored = first.and_then(|param| param.dtype.dtype());
        let dtype = options.dtype.or(stored).ok_or("no parameter in it is trained")?;
        let count = source.params().iter().filter_map(|param| param.group).max().map_or(0, |last| last + 1);
        let mut groups = vec![Vec::new(); count];
        let mut frozen = Vec::new();
        for param in source.params() {
            let numel =
                numel(&param.shape).ok_or_else(|| format!("`{}` has shape {:?}", param.name, param.shape))?;
            match param.group {
                // The original leaves parameters without elements out of its flat memory.
                Some(group) if numel > 0 || options.stage == 0 => groups[group].push((param.clone(), numel)),
                _ => frozen.push((param.clone(), numel)),
            }
        }
        let python = source.blob(Rank(0), "python").map_err(|error| error.to_string())?;
        let (mut saved, mut schedule) = (Vec::new(), Object::None);
        if let Some(file) = python.as_deref().map(|bytes| blob_file(source, bytes)).transpose()? {
            let mut scratch = Blob::default();
            let mut plain = |item: Item<'_>| scratch.plain(&file, item);
            for group in file.root().some("param_groups").and_then(Item::items).unwrap_or_default() {
                let Object::Dict(options) = plain(group)? else {
                    return Err("a parameter group is no dict".to_owned());
                };
                saved.push(options);
            }
            if let Some(item) = file.root().some("lr_scheduler") {
                schedule = plain(item)?;
            }
            if scratch.has_tensors() {
                return Err("its parameter groups or its schedule hold tensors".to_owned());
            }
        }
        saved.resize(count, Vec::new());
        let of_torch =
            saved.iter().flatten().any(|(key, _)| matches!(key, Object::Text(key) if key == "foreach"));
        let told = if of_torch { WholeState::PerParameter } else { WholeState::Flat };
        let state = source.state();
        let int = |value: &Value| value.as_i64().unwrap_or(0);
        let counters = &state["counters"];
        Ok(Self {
            stage: options.stage,
            world: options.world,
            dtype,
            groups,
            frozen,
            options: saved,
            schedule,
            counters: [
                int(&counters["skipped_steps"]),
                int(&counters["global_steps"]),
                int(&counters["global_samples"]),
            ],
            updates: int(&counters["optimizer_steps"]),
            clip: state["gradient_clipping"].as_f64().unwrap_or(0.0),
            state: options.state.unwrap_or(told),
            scaler: state["loss_scaler"].clone(),
            config: config(state, dtype, options),
        })
    }

    /// What the optimizer that loads it calls a kind of state: the original's own Adagrad has another name for torch's `sum`.
    pub(super) fn name_of<'a>(&self, kind: &'a str) -> &'a str {
        if kind == "sum" && self.state == WholeState::Flat { kind::EXP_AVG_SQ } else { kind }
    }

    /// The prefix of optimizer files.
    pub(super) fn prefix(&self) -> &'static str {
        if self.dtype == DType::BF16 { "bf16_" } else { "" }
    }

    pub(super) fn config(&self) -> Object {
        self.config.clone()
    }

    /// The loss scaler as entries of an optimizer that has no object for it.
    pub(super) fn loss_scale_entries(&self) -> Vec<(&'static str, Object)> {
        let [_, steps, _] = self.counters;
        let scaler = &self.scaler;
        let dynamic = self.dtype == DType::F16 && scaler["type"] == "dynamic";
        let scale = if self.dtype == DType::F16 { scaler["scale"].as_f64().unwrap_or(1.0) } else { 1.0 };
        let iteration = if dynamic { scaler["iteration"].as_i64().unwrap_or(steps) } else { steps };
        let mut entries = vec![
            ("dynamic_loss_scale", Object::Bool(dynamic)),
            ("cur_scale", Object::Float(scale)),
            ("cur_iter", Object::Int(iteration)),
        ];
        if dynamic {
            let window = scaler["settings"]["loss_scale_window"].as_i64().unwrap_or(1000);
            entries.push(("last_overflow_iter", Object::Int(scaler["last_overflow"].as_i64().unwrap_or(-1))));
            entries.push(("scale_factor", Object::Float(2.0)));
            entries.push(("scale_window", Object::Int(window)));
        }
        entries
    }

    /// The loss scaler as the original's object.
    pub(super) fn loss_scaler(&self) -> (Object, bool) {
        const MODULE: &str = "deepspeed.runtime.fp16.loss_scaler";
        let scaler = &self.scaler;
        let float = |value: &Value, default: f64| Object::Float(value.as_f64().unwrap_or(default));
        let int = |value: &Value, default: i64| Object::Int(value.as_i64().unwrap_or(default));
        let scale = float(&scaler["scale"], 1.0);
        let text = |attributes: Vec<(&str, Object)>| -> Vec<(Object, Object)> {
            attributes.into_iter().map(|(name, value)| (name.into(), value)).collect()
        };
        if scaler["type"] != "dynamic" || self.dtype != DType::F16 {
            let scale = if self.dtype == DType::F16 { scale } else { Object::Float(1.0) };
            let attributes = text(vec![("cur_scale", scale), ("dynamic", Object::Bool(false))]);
            return (Object::New(MODULE, "LossScaler", attributes), false);
        }
        let settings = &scaler["settings"];
        let attributes = text(vec![
            ("cur_scale", scale),
            ("dynamic", Object::Bool(true)),
            ("cur_iter", int(&scaler["iteration"], 0)),
            ("last_overflow_iter", int(&scaler["last_overflow"], -1)),
            ("scale_factor", Object::Float(2.0)),
            ("scale_window", int(&settings["loss_scale_window"], 1000)),
            ("min_scale", float(&settings["min_loss_scale"], 1.0)),
            ("delayed_shift", int(&settings["hysteresis"], 2)),
            ("cur_hysteresis", int(&scaler["hysteresis_left"], 2)),
            ("consecutive_hysteresis", Object::Bool(settings["consecutive_hysteresis"] == Value::Bool(true))),
            ("raise_error_at_min_scale", Object::Bool(true)),
            ("dtype", Object::Global("torch", "float16")),
        ]);
        (Object::New(MODULE, "DynamicLossScaler", attributes), true)
    }
}

/// The least of a config that says how the checkpoint was written.
fn config(state: &Value, dtype: DType, options: OriginalOptions) -> Object {
    let mut entries = Vec::new();
    if let Some(batch) = state["train_batch_size"].as_i64() {
        entries.push(("train_batch_size", Object::Int(batch)));
    }
    let clip = state["gradient_clipping"].as_f64();
    if let Some(clip) = clip {
        entries.push(("gradient_clipping", Object::Float(clip)));
    }
    entries.push(("zero_optimization", Object::dict([("stage", Object::Int(options.stage.into()))])));
    let enabled = || Object::dict([("enabled", Object::Bool(true))]);
    match dtype {
        DType::F32 => {}
        DType::BF16 => entries.push(("bf16", enabled())),
        DType::F16 => entries.push(("fp16", enabled())),
    }
    Object::dict(entries)
}

/// A torch file in memory.
fn blob_file(source: &dyn Source, bytes: &[u8]) -> std::result::Result<TorchFile, String> {
    let (dir, tag) = (source.folder().parent().unwrap_or(source.folder()), source.tag());
    TorchFile::in_memory(&Damage::new(dir, tag), "what Python saved", bytes)
        .map_err(|error| error.to_string())
}

/// The model file; at stage 3 one for each rank.
pub(super) fn model_plans(source: &dyn Source, facts: &Facts) -> Result<Vec<Plan>> {
    let ranks = if facts.stage == 3 { facts.world } else { 1 };
    (0..ranks).map(|rank| model_plan(source, facts, rank)).collect()
}

fn model_plan(source: &dyn Source, facts: &Facts, rank: usize) -> Result<Plan> {
    let unsupported =
        |reason: String| crate::CheckpointError::Unsupported { folder: source.folder().to_owned(), reason };
    let mut storages = Storages::default();
    let mut module: Vec<(Object, Object)> = Vec::new();
    let mut buffer_names = Vec::new();
    for tensor in source.tensors() {
        if storage_class(tensor.dtype).is_none() {
            return Err(unsupported(format!(
                "torch has no storage for buffer `{}` of {}",
                tensor.name, tensor.dtype
            )));
        }
        let bytes = source.tensor(&tensor.name)?;
        let object = storages.tensor(tensor.dtype, &tensor.shape, vec![Piece::Bytes(bytes)]);
        module.push((Object::from(tensor.name.as_str()), object));
        buffer_names.push(Object::from(tensor.name.as_str()));
    }
    for param in source.params() {
        let name = Object::from(param.name.as_str());
        if facts.stage == 3 {
            let dtype = weight_dtype(facts, param);
            module.push((name, storages.tensor(dtype, &[0], Vec::new())));
        } else if source.dtype(&param.name, kind::WEIGHT).is_some() {
            module.push((name, whole(&mut storages, source, facts, param)));
        }
    }
    for (other, name) in source.tied() {
        let found = module.iter().find(|(key, _)| matches!(key, Object::Text(text) if text == name));
        if let Some((_, tensor)) = found.cloned() {
            module.push((other.as_str().into(), tensor));
        }
    }
    let shapes = |params: &[(ParamRecord, usize)]| {
        let entry = |(param, _): &(ParamRecord, usize)| {
            (Object::from(param.name.as_str()), Object::size(&param.shape))
        };
        Object::OrderedDict(params.iter().map(entry).collect())
    };
    let stored: Vec<(ParamRecord, usize)> = facts
        .frozen
        .iter()
        .filter(|(param, _)| param.group.is_none() && source.dtype(&param.name, kind::WEIGHT).is_some())
        .cloned()
        .collect();
    let (frozen_shapes, frozen_fragments) = if facts.stage < 2 {
        (Object::None, Object::None)
    } else {
        let mut fragments = Vec::new();
        for (param, numel) in &stored {
            let tensor = if facts.stage == 2 {
                whole(&mut storages, source, facts, param)
            } else {
                let slice = numel.div_ceil(facts.world);
                let range = (rank * slice).min(*numel)..((rank + 1) * slice).min(*numel);
                let padding = Piece::Padding(slice - range.len());
                let pieces = vec![weight(param, range), padding];
                storages.tensor(weight_dtype(facts, param), &[slice], pieces)
            };
            fragments.push((Object::from(param.name.as_str()), tensor));
        }
        (shapes(&stored), Object::OrderedDict(fragments))
    };
    let tied = source.tied().iter().filter(|_| facts.stage < 3 || rank == 0);
    let shared =
        tied.map(|(other, name)| (Object::from(other.as_str()), Object::from(name.as_str()))).collect();
    // At stage 0 the model is as torch has it, and so is what the file says of it.
    let (optimizer, param_shapes, shared) = if facts.stage == 0 {
        (whole_optimizer(source, facts, &mut storages), Object::None, Object::None)
    } else {
        let param_shapes = Object::List(facts.groups.iter().map(|group| shapes(group)).collect());
        (Object::None, param_shapes, Object::Dict(shared))
    };
    let [skipped, steps, samples] = facts.counters;
    let mut entries = vec![
        ("module", Object::OrderedDict(module)),
        ("buffer_names", Object::List(buffer_names)),
        ("optimizer", optimizer),
        ("param_shapes", param_shapes),
        ("frozen_param_shapes", frozen_shapes),
        ("shared_params", shared),
        ("frozen_param_fragments", frozen_fragments),
        ("lr_scheduler", facts.schedule.clone()),
        ("data_sampler", Object::None),
        ("random_ltd", Object::None),
        ("skipped_steps", Object::Int(skipped)),
        ("global_steps", Object::Int(steps)),
        ("global_samples", Object::Int(samples)),
        ("dp_world_size", facts.world.into()),
        ("mp_world_size", Object::Int(1)),
        (
            "checkpoint_parallel_dimensions",
            Object::dict([("pp_degree", Object::Int(1)), ("tp_degree", Object::Int(1))]),
        ),
        ("ds_config", facts.config()),
        ("ds_version", LAYOUT_VERSION.into()),
    ];
    let Object::Dict(mut all) = Object::dict(entries.drain(..)) else { unreachable!("a dict is a dict") };
    all.extend(client_state(source, &mut storages, rank)?);
    let name = if facts.stage == 3 {
        format!("zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    } else {
        "mp_rank_00_model_states.pt".to_owned()
    };
    Ok(Plan { name, object: Object::Dict(all), storages })
}

/// The client's entries, of `rank` where the source has that many and of rank 0 otherwise.
fn client_state(source: &dyn Source, storages: &mut Storages, rank: usize) -> Result<Vec<(Object, Object)>> {
    let own = if rank < source.world() { source.blob(Rank::from_index(rank), "client_state")? } else { None };
    let bytes = match own {
        Some(bytes) => Some(bytes),
        None => source.blob(Rank(0), "client_state")?,
    };
    // A program without a client state may have said so in its own way.
    let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty() && bytes != b"{}") else {
        return Ok(Vec::new());
    };
    let unsupported = |reason: String| crate::CheckpointError::Unsupported {
        folder: source.folder().to_owned(),
        reason: format!("its client state: {reason}"),
    };
    let file = blob_file(source, &bytes).map_err(unsupported)?;
    let mut entries = Vec::new();
    for (key, value) in file.root().pairs().unwrap_or_default() {
        if key.text().is_some_and(|key| RESERVED.contains(&key)) {
            return Err(unsupported(format!(
                "`{}` is a name that the original uses itself",
                key.text().unwrap_or_default()
            )));
        }
        let mut tensor = |tensor: &crate::original::pickle::TensorRef| {
            let view = file.try_view(tensor)?;
            let bytes = file.bytes_of(&view).map_err(|error| error.to_string())?;
            if storage_class(view.dtype).is_none() {
                return Err(format!("torch has no storage for {}", view.dtype));
            }
            Ok(storages.tensor(view.dtype, &view.shape, vec![Piece::Bytes(bytes)]))
        };
        let mut plain = |item| crate::original::pickle::plain(item, &mut tensor).map_err(unsupported);
        entries.push((plain(key)?, plain(value)?));
    }
    Ok(entries)
}

/// What a parameter's weights are written in: the model's dtype if the engine trains in it.
fn weight_dtype(facts: &Facts, param: &ParamRecord) -> ElementType {
    if param.dtype.dtype().is_some() { facts.dtype.into() } else { param.dtype }
}

fn whole(storages: &mut Storages, source: &dyn Source, facts: &Facts, param: &ParamRecord) -> Object {
    let numel = numel(&param.shape).unwrap_or(0);
    // Masters are what the weights are rounded from.
    let kind = if source.dtype(&param.name, kind::MASTER).is_some() { kind::MASTER } else { kind::WEIGHT };
    let piece = Piece::elements(&param.name, kind, 0..numel);
    storages.tensor(weight_dtype(facts, param), &param.shape, vec![piece])
}

fn weight(param: &ParamRecord, range: std::ops::Range<usize>) -> Piece {
    Piece::elements(&param.name, kind::WEIGHT, range)
}
