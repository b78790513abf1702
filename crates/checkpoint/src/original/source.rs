//! A checkpoint of the original as a [`Source`].

use std::{fmt, ops::Range, path::Path};

use deepspeed_core::{DType, Rank, Span, SpanMut};
use serde_json::{Value, json};

use super::{
    blob::Blob,
    damage::Damage,
    files::{Listing, list},
    index::{Index, Run, record},
    model::ModelStates,
    optimizer::{Facts, read_partitions, read_shards},
    pickle::{Item, Object, TensorRef},
    torch::{TorchFile, View},
    universal::read_universal,
    whole::read_whole,
};
use crate::{CheckpointError, ParamRecord, Result, Source, TensorFacts, TrustedFile, kind};

/// A checkpoint of the original DeepSpeed, opened for reading.
pub struct OriginalCheckpoint {
    damage: Damage,
    files: Vec<TorchFile>,
    /// Number of model files, which come first: one, or one per rank.
    models: usize,
    world: usize,
    stage: u8,
    universal: bool,
    index: Index,
    tied: Vec<(String, String)>,
    tensors: Vec<(TensorFacts, View)>,
    state: Value,
    /// What the Python face continues from, as a torch file.
    python: Vec<u8>,
    /// Why there is no optimizer state.
    withheld: Option<String>,
}

impl fmt::Debug for OriginalCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OriginalCheckpoint({}, {})", self.damage.folder().display(), self.format())
    }
}

impl OriginalCheckpoint {
    /// Opens the checkpoint `tag` of `dir`: reads the pickles of all its files and checks that what they describe is in
    /// them.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] for what is missing or makes no sense, [`CheckpointError::Unsupported`] for
    /// checkpoints of tensor, pipeline and expert parallelism, [`CheckpointError::Io`].
    pub fn open(dir: &Path, tag: &str) -> Result<Self> {
        crate::validate_tag(tag)?;
        let damage = Damage::new(dir, tag);
        let listing = list(damage.folder())?;
        if let Some((file, parallelism)) = &listing.other {
            return Err(damage.unsupported(format!(
                "it was written with {parallelism} ({file}), whose parts only the original puts together"
            )));
        }
        let (mut files, models) = open_models(&damage, &listing)?;
        let mut facts = Facts::default();
        let (index, tensors, tied, world, stage, withheld);
        let counters;
        {
            let mut more = Vec::new();
            let model = ModelStates::read(&files[0])?;
            let sharded = listing.model.is_none();
            world = model.world().filter(|world| *world > 0).unwrap_or(models);
            if sharded && models != world {
                return Err(damage.of(
                    files[0].name(),
                    format!("{world} ranks wrote the checkpoint, and there are model files of {models}"),
                ));
            }
            if model.root.get("mp_world_size").and_then(Item::size).is_some_and(|world| world != 1) {
                return Err(damage.unsupported("it was written with tensor parallelism"));
            }
            tied = model.tied();
            let mut found = Index::new(parameters(&files[0], &model, sharded, &tied)?, &tied);
            if sharded {
                index_fragments(&mut found, &files, &model)?;
            } else {
                index_weights(&mut found, &files[0], &model)?;
            }
            let mut why = None;
            if listing.universal {
                read_universal(&mut found, &mut facts, &mut more, files.len(), &damage)?;
                stage = model_stage(&model).unwrap_or(if sharded { 3 } else { 1 });
            } else if model.groups.is_none() {
                why = read_whole(&mut found, &mut facts, &files[..1], &model, None)?;
                stage = 0;
            } else if listing.optimizers.is_empty() {
                stage = if sharded { 3 } else { model_stage(&model).unwrap_or(1) };
            } else {
                let ranks: Vec<usize> = listing.optimizers.iter().map(|(rank, _)| *rank).collect();
                if ranks != (0..world).collect::<Vec<_>>() {
                    return Err(damage.of(
                        files[0].name(),
                        format!("{world} ranks wrote the checkpoint, and there are optimizer files of ranks {ranks:?}"),
                    ));
                }
                for (_, name) in &listing.optimizers {
                    more.push(TorchFile::open(&damage, name)?);
                }
                let first = more[0].root().some("optimizer_state_dict");
                let told = first.and_then(|state| state.get("zero_stage")?.int());
                stage = match told {
                    Some(stage @ 0..=3) => stage as u8,
                    Some(stage) => return Err(more[0].damaged(format!("it was written at stage {stage}"))),
                    // The BF16_Optimizer, which is stage 1.
                    None => 1,
                };
                let base = files.len();
                if stage == 3 {
                    read_shards(&mut found, &mut facts, &more, base, &model)?;
                } else {
                    read_partitions(&mut found, &mut facts, &more, base, &model)?;
                }
            }
            found.finish().map_err(|problem| damage.of(files[0].name(), problem))?;
            if sharded {
                check_sharded(&found, &damage, &listing)?;
            }
            counters = read_counters(&files[0], &model, &facts, world)?;
            tensors = buffers(&files[0], &model)?;
            withheld = why;
            index = found;
            for file in files.iter().chain(&more) {
                file.close();
            }
            files.extend(more);
        }
        let python = python_state(&files[0], &mut facts, withheld.as_deref())?;
        let universal = listing.universal;
        let state = counters;
        Ok(Self {
            damage,
            files,
            models,
            world,
            stage,
            universal,
            index,
            tied,
            tensors,
            state,
            python,
            withheld,
        })
    }

    /// Whether it is in the universal format.
    pub fn is_universal(&self) -> bool {
        self.universal
    }

    fn stored(&self, name: &str, kind: &str, range: &Range<usize>) -> Result<Option<&super::index::Stored>> {
        let missing = |what: String| self.damage.missing(what);
        let Some(param) = self.index.position(name) else {
            return Err(missing(format!("parameter `{name}`")));
        };
        if range.start > range.end || range.end > self.index.numel(param) {
            let numel = self.index.numel(param);
            return Err(missing(format!("elements {range:?} of parameter `{name}`, which has {numel}")));
        }
        if range.is_empty() {
            return Ok(None);
        }
        match (self.index.stored(param, kind), &self.withheld) {
            (Some(stored), _) => Ok(Some(stored)),
            (None, Some(reason)) if kind != kind::WEIGHT => Err(self.damage.unsupported(reason.clone())),
            (None, _) => Err(missing(format!("`{kind}` of parameter `{name}`"))),
        }
    }
}

/// Opens the model files.
fn open_models(damage: &Damage, listing: &Listing) -> Result<(Vec<TorchFile>, usize)> {
    let names: Vec<&String> = match &listing.model {
        Some(name) => vec![name],
        None => listing.sharded_models.iter().map(|(_, name)| name).collect(),
    };
    let expected: Vec<usize> = (0..listing.sharded_models.len()).collect();
    let ranks: Vec<usize> = listing.sharded_models.iter().map(|(rank, _)| *rank).collect();
    if names.is_empty() || (listing.model.is_none() && ranks != expected) {
        let file = "mp_rank_00_model_states.pt";
        return Err(damage.of(file, format!("it is missing, and there are model files of ranks {ranks:?}")));
    }
    let files = names.iter().map(|name| TorchFile::open(damage, name)).collect::<Result<Vec<_>>>()?;
    let models = files.len();
    Ok((files, models))
}

/// The parameters in the order of the module, each once.
fn parameters(
    file: &TorchFile,
    model: &ModelStates<'_>,
    sharded: bool,
    tied: &[(String, String)],
) -> Result<Vec<ParamRecord>> {
    let mut shapes = std::collections::HashMap::new();
    for (group, members) in model.groups.iter().flatten().enumerate() {
        shapes.extend(members.iter().map(|(name, shape)| (*name, (shape, Some(group)))));
    }
    for (name, shape) in &model.frozen {
        shapes.entry(*name).or_insert((shape, None));
    }
    let mut params = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (name, tensor) in &model.module {
        if model.buffers.contains(name) || tied.iter().any(|(other, _)| other == name) || !seen.insert(*name)
        {
            continue;
        }
        let dtype = tensor.storage.dtype;
        match shapes.get(name) {
            Some((shape, group)) => params.push(record(name, (*shape).clone(), dtype, *group)),
            // Frozen parameters that were left out are still named, without their shape.
            None if sharded => {}
            None => {
                params.push(record(name, tensor.shape.clone(), dtype, model.groups.is_none().then_some(0)));
            }
        }
    }
    let lost = |name: &str| !seen.contains(name) && !tied.iter().any(|(other, _)| other == name);
    let trained = model.groups.iter().flatten().flatten();
    if let Some((name, _)) = trained.into_iter().find(|(name, _)| lost(name)) {
        return Err(file.damaged(format!("`{name}` was trained and is not in the module")));
    }
    for param in &params {
        if crate::record::numel(&param.shape).is_none() {
            return Err(file.damaged(format!("parameter `{}` has shape {:?}", param.name, param.shape)));
        }
    }
    Ok(params)
}

/// Weights that lie whole in the model file.
fn index_weights(index: &mut Index, file: &TorchFile, model: &ModelStates<'_>) -> Result<()> {
    for (name, tensor) in &model.module {
        let Some(param) = index.position(name) else { continue };
        if index.has(param, kind::WEIGHT) || model.buffers.contains(name) {
            continue;
        }
        let view = file.view(tensor)?;
        if view.numel != index.numel(param) {
            return Err(file.damaged(format!(
                "`{name}` is {:?} in the module and {:?} in its `param_shapes`",
                view.shape, index.params[param].shape
            )));
        }
        // Weights that are no floats are not the engine's, which leaves them as they are.
        if let Some(run) = Run::new(0, &view, 0..view.numel, 0) {
            index.add(param, kind::WEIGHT, run);
        }
    }
    Ok(())
}

/// Weights of frozen parameters of which every rank has a part.
fn index_fragments(index: &mut Index, files: &[TorchFile], first: &ModelStates<'_>) -> Result<()> {
    let names: Vec<&str> = first.frozen.iter().map(|(name, _)| *name).collect();
    let mut next = vec![0; index.params.len()];
    for (number, file) in files.iter().enumerate() {
        let fragments: std::collections::HashMap<&str, TensorRef> = ModelStates::read(file)?.frozen_fragments;
        for name in &names {
            let (Some(param), Some(tensor)) = (index.position(name), fragments.get(name)) else { continue };
            let view = file.view(tensor)?;
            if let Some(run) = Run::new(number, &view, 0..view.numel, next[param]) {
                index.add(param, kind::WEIGHT, run);
            }
            next[param] += view.numel;
        }
    }
    Ok(())
}

/// At stage 3 the weights of trained parameters are in the optimizer files or nowhere.
fn check_sharded(index: &Index, damage: &Damage, listing: &Listing) -> Result<()> {
    let without = (0..index.params.len()).find(|param| {
        index.params[*param].group.is_some() && index.numel(*param) > 0 && !index.has(*param, kind::WEIGHT)
    });
    match without {
        Some(param) => {
            let name = &index.params[param].name;
            let file =
                listing.optimizers.first().map_or("zero_pp_rank_0_mp_rank_00_optim_states.pt", |it| &it.1);
            Err(damage.of(file, format!("the weights of `{name}` are in no file")))
        }
        None => Ok(()),
    }
}

fn buffers(file: &TorchFile, model: &ModelStates<'_>) -> Result<Vec<(TensorFacts, View)>> {
    let mut found = Vec::new();
    for (name, tensor) in &model.module {
        if model.buffers.contains(name) {
            let view = file.view(tensor)?;
            let facts =
                TensorFacts { name: (*name).to_owned(), dtype: view.dtype, shape: view.shape.clone() };
            found.push((facts, view));
        }
    }
    Ok(found)
}

/// The stage that the saved config asks for.
fn model_stage(model: &ModelStates<'_>) -> Option<u8> {
    let zero = model.root.some("ds_config")?.some("zero_optimization")?;
    zero.get("stage")?.int()?.try_into().ok().filter(|stage| *stage <= 3)
}

/// Counters and loss scale, as the engine saves its own.
fn read_counters(file: &TorchFile, model: &ModelStates<'_>, facts: &Facts, world: usize) -> Result<Value> {
    let config = model.root.some("ds_config");
    let setting =
        |key: &str| config.and_then(|it| it.get(key)).and_then(Item::size).filter(|value| *value > 0);
    let count = |key: &str| match model.root.some(key) {
        None => Ok(0),
        Some(item) => {
            let value = item.int().and_then(|value| u64::try_from(value).ok());
            value.ok_or_else(|| file.damaged(format!("its `{key}` is {}", item.describe())))
        }
    };
    let (steps, skipped) = (count("global_steps")?, count("skipped_steps")?);
    let micro = setting("train_micro_batch_size_per_gpu");
    let accumulation = setting("gradient_accumulation_steps").or_else(|| {
        let (total, micro) = (setting("train_batch_size")?, micro?);
        Some((total / micro / world).max(1))
    });
    let accumulation = accumulation.unwrap_or(1) as u64;
    let updates = match facts.steps {
        Some(updates) if updates >= 0.0 => updates as u64,
        _ => steps.saturating_sub(skipped),
    };
    let batch = setting("train_batch_size").or_else(|| Some(micro? * accumulation as usize * world));
    Ok(json!({
        "counters": {
            "micro_steps": steps.saturating_mul(accumulation),
            "global_steps": steps,
            "global_samples": count("global_samples")?,
            "skipped_steps": skipped,
            "optimizer_steps": updates,
        },
        "loss_scaler": facts.scaler.clone().unwrap_or_else(|| json!({ "type": "static", "scale": 1.0 })),
        "train_batch_size": batch,
        "accumulation_steps": accumulation,
        "gradient_clipping": config.and_then(|it| it.some("gradient_clipping")).and_then(Item::float),
        "face": Value::Null,
    }))
}

/// Parameter groups, schedule, and what a client's optimizer keeps per parameter.
fn python_state(file: &TorchFile, facts: &mut Facts, withheld: Option<&str>) -> Result<Vec<u8>> {
    let mut blob = std::mem::take(&mut facts.blob);
    let mut entries = vec![("param_groups", Object::List(std::mem::take(&mut facts.groups)))];
    if let Some(schedule) = file.root().some("lr_scheduler") {
        let schedule = blob.plain(file, schedule).map_err(|problem| file.damaged(problem))?;
        entries.push(("lr_scheduler", schedule));
    }
    match withheld {
        Some(reason) => entries.push(("withheld", reason.into())),
        None => {
            let scalars = std::mem::take(&mut facts.scalars).into_iter();
            let scalars = scalars.map(|(name, values)| (Object::Text(name), values)).collect();
            let kinds = facts.kinds.iter().map(|kind| Object::from(kind.as_str())).collect();
            entries.push(("client_scalars", Object::Dict(scalars)));
            entries.push(("client_kinds", Object::List(kinds)));
        }
    }
    Ok(blob.finish(&Object::dict(entries)))
}

impl Source for OriginalCheckpoint {
    fn format(&self) -> String {
        let version =
            self.files[0].root().get("ds_version").and_then(Item::text).unwrap_or("of unknown version");
        let universal = if self.universal { ", universal" } else { "" };
        format!("DeepSpeed {version}{universal}")
    }

    fn tag(&self) -> &str {
        self.damage.tag()
    }

    fn folder(&self) -> &Path {
        self.damage.folder()
    }

    fn world(&self) -> usize {
        self.world
    }

    fn stage(&self) -> Option<u8> {
        Some(self.stage)
    }

    fn params(&self) -> &[ParamRecord] {
        &self.index.params
    }

    fn param(&self, name: &str) -> Option<&ParamRecord> {
        self.index.position(name).map(|param| &self.index.params[param])
    }

    fn tied(&self) -> &[(String, String)] {
        &self.tied
    }

    fn kinds(&self, name: &str) -> Vec<&str> {
        self.index.position(name).map(|param| self.index.kinds(param).collect()).unwrap_or_default()
    }

    fn dtype(&self, name: &str, kind: &str) -> Option<DType> {
        let param = self.index.position(name)?;
        match self.index.stored(param, kind) {
            Some(stored) => Some(stored.dtype),
            None if kind == kind::WEIGHT && self.index.numel(param) == 0 => {
                self.index.params[param].dtype.dtype()
            }
            None => None,
        }
    }

    fn read(&self, name: &str, kind: &str, range: Range<usize>, dst: SpanMut<'_>) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        if dst.len() != len {
            let (name, kind) = (name.to_owned(), kind.to_owned());
            return Err(CheckpointError::Length { name, kind, len, dst: dst.len() });
        }
        let Some(stored) = self.stored(name, kind, &range)? else { return Ok(()) };
        if stored.dtype != dst.dtype() {
            let (name, kind, stored) = (name.to_owned(), kind.to_owned(), stored.dtype);
            return Err(CheckpointError::DType { name, kind, stored, dst: dst.dtype() });
        }
        stored.read(&self.files, &range, dst)
    }

    fn visit(
        &self,
        name: &str,
        kind: &str,
        range: Range<usize>,
        visit: &mut dyn FnMut(usize, Span<'_>),
    ) -> Result<()> {
        match self.stored(name, kind, &range)? {
            Some(stored) => stored.visit(&self.files, &range, visit),
            None => Ok(()),
        }
    }

    fn tensors(&self) -> Vec<TensorFacts> {
        self.tensors.iter().map(|(facts, _)| facts.clone()).collect()
    }

    fn tensor(&self, name: &str) -> Result<Vec<u8>> {
        let found = self.tensors.iter().find(|(facts, _)| facts.name == name);
        let (_, view) = found.ok_or_else(|| self.damage.missing(format!("tensor `{name}`")))?;
        self.files[0].bytes_of(view)
    }

    fn state(&self) -> &Value {
        &self.state
    }

    /// `client_state`: the client's entries of the rank's model file (rank 0's where there is one file), and `python`:
    /// parameter groups and schedule, both as torch files of plain values.
    fn blob(&self, rank: Rank, name: &str) -> Result<Option<Vec<u8>>> {
        if rank.index() >= self.world {
            return Ok(None);
        }
        match name {
            "python" => Ok(Some(self.python.clone())),
            "client_state" => {
                let file = &self.files[if rank.index() < self.models { rank.index() } else { 0 }];
                let mut blob = Blob::default();
                let mut entries = Vec::new();
                for (key, value) in ModelStates::read(file)?.client() {
                    let whose = key.text().unwrap_or("a key").to_owned();
                    let refused = |problem: String| {
                        self.damage.unsupported(format!(
                        "the client state `{whose}` in {} cannot be read: {problem}; call load_checkpoint(..., \
                         trust_client_state=True) if you trust whoever wrote it",
                        file.name()
                    ))
                    };
                    let key = blob.plain(file, key).map_err(refused)?;
                    entries.push((key, blob.plain(file, value).map_err(refused)?));
                }
                Ok(Some(blob.finish(&Object::Dict(entries))))
            }
            _ => Ok(None),
        }
    }

    fn resolve(&mut self, trained: &[(&str, usize)]) -> Result<()> {
        if self.withheld.is_none() {
            return Ok(());
        }
        let mut facts = Facts::default();
        let model = ModelStates::read(&self.files[0])?;
        let withheld = read_whole(&mut self.index, &mut facts, &self.files[..1], &model, Some(trained))?;
        self.index.finish().map_err(|problem| self.damage.of(self.files[0].name(), problem))?;
        self.state = read_counters(&self.files[0], &model, &facts, self.world)?;
        self.python = python_state(&self.files[0], &mut facts, withheld.as_deref())?;
        self.withheld = withheld;
        Ok(())
    }

    fn trusted_file(&self, rank: Rank) -> Option<TrustedFile> {
        let file = &self.files[if rank.index() < self.models { rank.index() } else { 0 }];
        let client = ModelStates::read(file).ok()?.client();
        let keys = client.into_iter().filter_map(|(key, _)| Some(key.text()?.to_owned())).collect();
        Some(TrustedFile { path: file.path().to_owned(), keys })
    }

    fn verify_share(&self, rank: Rank, world: usize) -> Result<()> {
        // Files are of about one size, so that whole ones are shares good enough.
        for file in self.files.iter().skip(rank.index()).step_by(world.max(1)) {
            file.verify()?;
            file.close();
        }
        Ok(())
    }
}
