//! The optimizer's state in files of the original, whichever of its optimizers wrote it.
//!
//! What is cut as the parameters are goes into the [`Index`]; what is not (step counts, parameter groups, the loss
//! scale) is collected here.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde_json::{Value, json};

use super::{
    blob::Blob,
    index::{Index, Run},
    model::ModelStates,
    pickle::{Item, Object, TensorRef},
    torch::TorchFile,
};
use crate::{Result, kind, record::numel};

/// State of the optimizer that belongs to the run or to a whole parameter.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Updates made, by the optimizer's own count.
    pub(super) steps: Option<f64>,
    /// Its parameter groups without their parameters.
    pub(super) groups: Vec<Object>,
    /// Per parameter, the values that are not cut: step counts.
    pub(super) scalars: BTreeMap<String, Object>,
    /// Names of the state that is cut.
    pub(super) kinds: BTreeSet<String>,
    /// The loss scaler as the engine saves its own.
    pub(super) scaler: Option<Value>,
    /// Where tensors of `groups` and `scalars` lie.
    pub(super) blob: Blob,
}

/// The state of one parameter or of one flat run of parameters.
pub(super) struct Entry<'a> {
    /// Names and tensors of state that is cut.
    pub(super) tensors: Vec<(&'a str, TensorRef)>,
    scalars: Vec<(&'a str, Item<'a>)>,
}

impl<'a> Entry<'a> {
    /// Reads the state; what has the shape `is_cut` accepts is cut.
    pub(super) fn read(item: Item<'a>, is_cut: impl Fn(&[usize]) -> bool) -> Option<Self> {
        let (mut tensors, mut scalars) = (Vec::new(), Vec::new());
        for (name, value) in item.named()? {
            match value.tensor() {
                Some(tensor) if name != "step" && is_cut(&tensor.shape) => tensors.push((name, tensor)),
                _ => scalars.push((name, value)),
            }
        }
        Some(Self { tensors, scalars })
    }

    /// One value that is not cut.
    pub(super) fn scalar(name: &'a str, value: Item<'a>) -> Self {
        Self { tensors: Vec::new(), scalars: vec![(name, value)] }
    }
}

impl Facts {
    /// Takes note of what in `entry` belongs to the whole of the parameters `names`.
    ///
    /// # Errors
    /// A class that is no plain value.
    pub(super) fn note(&mut self, file: &TorchFile, entry: &Entry<'_>, names: &[&str]) -> Result<()> {
        let mut values = Vec::new();
        for (name, value) in &entry.scalars {
            let object = self.blob.plain(file, *value).map_err(|problem| file.damaged(problem))?;
            if *name == "step" {
                let steps = number(file, *value)?;
                self.steps = self.steps.into_iter().chain(steps).reduce(f64::max);
            }
            values.push((Object::from(*name), object));
        }
        self.kinds.extend(entry.tensors.iter().map(|(name, _)| (*name).to_owned()));
        if !values.is_empty() {
            for name in names {
                self.scalars.entry((*name).to_owned()).or_insert_with(|| Object::Dict(values.clone()));
            }
        }
        Ok(())
    }

    /// Takes note of the parameter groups.
    ///
    /// # Errors
    /// A class that is no plain value.
    pub(super) fn note_groups(&mut self, file: &TorchFile, groups: Option<Item<'_>>) -> Result<()> {
        for group in groups.and_then(Item::items).unwrap_or_default() {
            let mut options = Vec::new();
            for (name, value) in group.named().unwrap_or_default() {
                if !matches!(name, "params" | "step" | "param_names") {
                    let object = self.blob.plain(file, value).map_err(|problem| file.damaged(problem))?;
                    options.push((Object::from(name), object));
                }
            }
            self.groups.push(Object::Dict(options));
        }
        Ok(())
    }

    /// Takes note of the loss scale: a scaler, or the fields of the fp16 optimizers of stage 0.
    pub(super) fn note_scaler(&mut self, optimizer: Item<'_>, config: Option<Item<'_>>) {
        let holder = optimizer.some("loss_scaler").unwrap_or(optimizer);
        let Some(scale) = holder.get("cur_scale").and_then(Item::float) else { return };
        let dynamic =
            holder.some("dynamic").or_else(|| optimizer.some("dynamic_loss_scale")).and_then(Item::bool);
        if dynamic != Some(true) {
            self.scaler = Some(json!({ "type": "static", "scale": scale }));
            return;
        }
        let int = |key: &str, default: i64| holder.get(key).and_then(Item::int).unwrap_or(default);
        let configured = config.and_then(|it| it.some("fp16")).and_then(|it| it.get("initial_scale_power"));
        let hysteresis = int("delayed_shift", 1).max(1);
        self.scaler = Some(json!({
            "type": "dynamic",
            "settings": {
                "initial_scale_power": configured.and_then(Item::int).unwrap_or(16),
                "loss_scale_window": int("scale_window", 1000),
                "hysteresis": hysteresis,
                "consecutive_hysteresis": holder.get("consecutive_hysteresis").and_then(Item::bool).unwrap_or(false),
                "min_loss_scale": holder.get("min_scale").and_then(Item::float).unwrap_or(1.0),
            },
            "scale": scale,
            "iteration": int("cur_iter", 0),
            "last_overflow": int("last_overflow_iter", -1),
            "hysteresis_left": int("cur_hysteresis", hysteresis),
        }));
    }
}

/// A number, bare or as a tensor of one element.
fn number(file: &TorchFile, item: Item<'_>) -> Result<Option<f64>> {
    let Some(tensor) = item.tensor() else { return Ok(item.float()) };
    let view = file.view(&tensor)?;
    if view.numel != 1 {
        return Ok(None);
    }
    let bytes = file.bytes_of(&view)?;
    Ok(match (view.dtype.torch_name(), &bytes[..]) {
        (Some("float32"), [a, b, c, d]) => Some(f32::from_le_bytes([*a, *b, *c, *d]).into()),
        (Some("int64"), bytes) => {
            <[u8; 8]>::try_from(bytes).ok().map(|bytes| i64::from_le_bytes(bytes) as f64)
        }
        _ => None,
    })
}

/// Stages 1 and 2, and the BF16_Optimizer: one flat partition per parameter group and rank, and for each a table of
/// what lies where. `files` are numbered from `base_number` on.
pub(super) fn read_partitions(
    index: &mut Index,
    facts: &mut Facts,
    files: &[TorchFile],
    base_number: usize,
    model: &ModelStates<'_>,
) -> Result<()> {
    let mut next = vec![0; index.params.len()];
    let all = tables(files, model)?;
    for (rank, file) in files.iter().enumerate() {
        let number = base_number + rank;
        let state = optimizer_state(file)?;
        let masters = state.get("single_partition_of_fp32_groups").and_then(Item::items);
        let masters = masters.ok_or_else(|| file.damaged("it has no `single_partition_of_fp32_groups`"))?;
        let tables = &all[rank];
        let base = state.some("base_optimizer_state");
        for (group, master) in masters.into_iter().enumerate() {
            let table = tables.get(group);
            let table =
                table.ok_or_else(|| file.damaged(format!("it does not say what lies in group {group}")))?;
            // A list with `elastic_checkpoint`, a torch state dict without.
            let entry = base.and_then(|base| match base.items() {
                Some(groups) => groups.get(group).copied(),
                None => base.get("state")?.at(group as i64),
            });
            let entry = match entry {
                Some(item) => Entry::read(item, |shape| shape.len() == 1),
                None => Some(Entry { tensors: Vec::new(), scalars: Vec::new() }),
            };
            let entry =
                entry.ok_or_else(|| file.damaged(format!("the state of group {group} is no dict")))?;
            let names: Vec<&str> = table.iter().map(|(name, ..)| name.as_str()).collect();
            facts.note(file, &entry, &names)?;
            let master = master.tensor().ok_or_else(|| file.damaged("a partition is no tensor"))?;
            let master = (kind::MASTER, master);
            for (kind, tensor) in std::iter::once(master).chain(entry.tensors) {
                let view = file.view(&tensor)?;
                for (name, len, start) in table {
                    let param = index.position(name).ok_or_else(|| unknown(file, name))?;
                    let run = Run::new(number, &view, *start..start.saturating_add(*len), next[param]);
                    let run = run.ok_or_else(|| outside(file, kind, name))?;
                    index.add(param, kind, run);
                }
            }
            for (name, len, _) in table {
                if let Some(param) = index.position(name) {
                    next[param] += len;
                }
            }
        }
        if rank == 0 {
            facts.note_groups(file, base.and_then(|base| base.some("param_groups")))?;
            facts.note_scaler(state, file.root().some("ds_config"));
        }
    }
    Ok(())
}

/// Per parameter group, what lies where in a rank's partition: (name, elements, first element within the partition).
type Tables = Vec<Vec<(String, usize, usize)>>;

/// The tables of all ranks.
///
/// The files say what lies where, and with `round_robin_gradients` they say it wrong (0.19.8): the parameters are then in
/// another order, which is that of the model file's shapes. So what a file says counts only where it agrees with that.
fn tables(files: &[TorchFile], model: &ModelStates<'_>) -> Result<Vec<Tables>> {
    let told = files.iter().map(told).collect::<Result<Option<Vec<_>>>>()?;
    let order = model.groups.as_deref().unwrap_or_default();
    let agrees = |told: &Vec<Tables>| {
        order.iter().enumerate().all(|(group, shapes)| {
            let names = told.iter().flat_map(|tables| tables.get(group).into_iter().flatten());
            let mut names: Vec<&str> = names.map(|(name, ..)| name.as_str()).collect();
            names.dedup();
            let known: HashSet<&str> = names.iter().copied().collect();
            // Parameters without elements may be missing.
            names.iter().eq(shapes.iter().map(|(name, _)| name).filter(|name| known.contains(*name)))
        })
    };
    match told.filter(agrees) {
        Some(told) => Ok(told),
        None => (0..files.len()).map(|rank| computed(&files[rank], model, rank, files.len())).collect(),
    }
}

/// What a rank's file says.
fn told(file: &TorchFile) -> Result<Option<Tables>> {
    let Some(groups) = optimizer_state(file)?.some("param_slice_mappings").and_then(Item::items) else {
        return Ok(None);
    };
    let table = |group: Item<'_>| {
        let address = |(name, item): (&str, Item<'_>)| {
            Some((name.to_owned(), item.get("numel")?.size()?, item.get("start")?.size()?))
        };
        group.named()?.into_iter().map(address).collect::<Option<Vec<_>>>()
    };
    let tables = groups.into_iter().map(table).collect::<Option<Tables>>();
    tables.map(Some).ok_or_else(|| file.damaged("its `param_slice_mappings` cannot be read"))
}

/// The parameters of a group one after the other, each followed by its padding, cut into equal partitions.
fn computed(file: &TorchFile, model: &ModelStates<'_>, rank: usize, world: usize) -> Result<Tables> {
    let paddings = optimizer_state(file)?.some("param_alignment_paddings").and_then(Item::items);
    let too_large = || file.damaged("the model file's shapes are larger than any model");
    let mut tables = Vec::new();
    for (group, shapes) in model.groups.iter().flatten().enumerate() {
        let paddings = paddings.as_ref().and_then(|groups| groups.get(group)?.items());
        let padding = |index: usize| paddings.as_ref().and_then(|it| it.get(index)?.size()).unwrap_or(0);
        let mut places = Vec::new();
        let mut at = 0usize;
        for (index, (name, shape)) in shapes.iter().enumerate() {
            let end = numel(shape).and_then(|numel| at.checked_add(numel)).ok_or_else(too_large)?;
            places.push((*name, at, end));
            at = end.checked_add(padding(index)).ok_or_else(too_large)?;
        }
        // Partitions are equal, and the whole is padded to a multiple of twice their number.
        let partition = 2 * at.div_ceil(2 * world);
        let (first, end) = (rank * partition, (rank + 1) * partition);
        let cut = |(name, start, stop): (&str, usize, usize)| {
            let (from, to) = (start.max(first), stop.min(end));
            (from < to).then(|| (name.to_owned(), to - from, from - first))
        };
        tables.push(places.into_iter().filter_map(cut).collect());
    }
    Ok(tables)
}

/// Stage 3: of every parameter an equal slice per rank, in flat runs of a few parameters each. `files` as above.
pub(super) fn read_shards(
    index: &mut Index,
    facts: &mut Facts,
    files: &[TorchFile],
    base_number: usize,
    model: &ModelStates<'_>,
) -> Result<()> {
    let order: Vec<&str> = model.groups.iter().flatten().flatten().map(|(name, _)| *name).collect();
    for (rank, file) in files.iter().enumerate() {
        let number = base_number + rank;
        let state = optimizer_state(file)?;
        let masters = state.get("fp32_flat_groups").and_then(Item::items);
        let masters = masters.ok_or_else(|| file.damaged("it has no `fp32_flat_groups`"))?;
        let base = state.some("optimizer_state_dict");
        let mut params = order.iter().copied().peekable();
        // Where in the run before it a parameter's slice was cut off.
        let mut done = 0;
        for (group, master) in masters.into_iter().enumerate() {
            let entry = base.and_then(|base| base.get("state")?.at(group as i64));
            let entry = match entry {
                Some(item) => Entry::read(item, |shape| shape.len() == 1),
                None => Some(Entry { tensors: Vec::new(), scalars: Vec::new() }),
            };
            let entry = entry.ok_or_else(|| file.damaged(format!("the state of run {group} is no dict")))?;
            let master = master.tensor().ok_or_else(|| file.damaged("a run of masters is no tensor"))?;
            let len = file.view(&master)?.numel;
            let mut table = Vec::new();
            let mut at = 0;
            while at < len {
                let Some(name) = params.peek().copied() else {
                    return Err(
                        file.damaged(format!("{} elements in its runs belong to no parameter", len - at))
                    );
                };
                let param = index.position(name).ok_or_else(|| unknown(file, name))?;
                let slice = index.numel(param).div_ceil(files.len());
                let part = (slice - done).min(len - at);
                table.push((name, param, at..at + part, rank * slice + done));
                at += part;
                done += part;
                if done == slice {
                    params.next();
                    done = 0;
                }
            }
            let names: Vec<&str> = table.iter().map(|(name, ..)| *name).collect();
            facts.note(file, &entry, &names)?;
            let master = (kind::MASTER, master);
            for (kind, tensor) in std::iter::once(master).chain(entry.tensors) {
                let view = file.view(&tensor)?;
                for (name, param, range, start) in &table {
                    let run = Run::new(number, &view, range.clone(), *start);
                    index.add(*param, kind, run.ok_or_else(|| outside(file, kind, name))?);
                }
            }
        }
        if rank == 0 {
            facts.note_groups(file, base.and_then(|base| base.some("param_groups")))?;
            facts.note_scaler(state, file.root().some("ds_config"));
        }
    }
    Ok(())
}

/// The dict under `optimizer_state_dict` of an optimizer file.
fn optimizer_state(file: &TorchFile) -> Result<Item<'_>> {
    let state = file.root().some("optimizer_state_dict").filter(|item| item.pairs().is_some());
    state.ok_or_else(|| {
        let found = file.root().describe();
        file.damaged(format!("it holds {found} without an `optimizer_state_dict`"))
    })
}

fn unknown(file: &TorchFile, name: &str) -> crate::CheckpointError {
    file.damaged(format!("it has state of `{name}`, which the model file does not know"))
}

fn outside(file: &TorchFile, kind: &str, name: &str) -> crate::CheckpointError {
    file.damaged(format!("`{kind}` of `{name}` lies outside its partition, or is not of 16 or 32 bits"))
}
