//! Writing the universal format: a folder per parameter, which the original loads at any number of ranks.
//!
//! ```text
//! PARENT/latest_universal                            the name of OUT
//!        OUT/mp_rank_00_model_states.pt              as in an ordinary checkpoint; at stage 3 one for each rank
//!        OUT/zero/optimizer_state.pt                 loss scaler and parameter groups
//!        OUT/zero/NAME/{fp32,exp_avg,...}.pt         stage 1 and 2: {cat_dim, param: in its shape}; stage 3: flat
//!        OUT/zero/NAME/step.pt                       stage 1 and 2
//! ```
//!
//! The original loads of it what was trained; frozen parameters and buffers, which lie in the model file, it leaves as the
//! script has made them.

use std::{collections::BTreeSet, path::Path};

use deepspeed_core::DType;

use super::{
    LAYOUT_VERSION, OriginalOptions,
    model::{Facts, model_plans},
    plan::{Piece, Plan, Storages},
    shards::{kinds, options},
};
use crate::{
    CheckpointError, ParamRecord, Progress, Result, Source, kind, original::pickle::Object, output::Output,
};

/// The folder of parameters.
const ZERO: &str = "zero";
/// The file that names the latest checkpoint of this format.
const LATEST_UNIVERSAL: &str = "latest_universal";

/// Writes `source` as a checkpoint of the universal format in the folder `out`, for engines of the ZeRO stage of
/// `options`, and makes `latest_universal` beside it name it. A checkpoint of that format in `out` is replaced if
/// `overwrite` is set.
///
/// # Errors
/// As [`super::write_original`]; [`CheckpointError::Exists`] if there is something called `out`.
pub fn write_universal(
    source: &dyn Source,
    out: &Path,
    options: OriginalOptions,
    overwrite: bool,
    progress: &dyn Progress,
) -> Result<()> {
    let unsupported = |reason: String| CheckpointError::Unsupported { folder: out.to_owned(), reason };
    let name = out.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
        unsupported("the universal format keeps one checkpoint in one folder: give its name".to_owned())
    })?;
    if !(1..=3).contains(&options.stage) || options.world == 0 {
        return Err(unsupported(format!(
            "the universal format is written for ZeRO stages 1 to 3 and at least one rank, not for stage {} and {} ranks",
            options.stage, options.world
        )));
    }
    if out.exists() && !(overwrite && out.join(ZERO).is_dir()) {
        return Err(CheckpointError::Exists { path: out.to_owned() });
    }
    let facts = Facts::read(source, options).map_err(unsupported)?;
    let mut plans = model_plans(source, &facts)?;
    for group in &facts.groups {
        let kinds = kinds(source, group);
        for (param, numel) in group {
            if param.name.contains('/') || param.name.starts_with('.') {
                let reason = format!("a parameter called `{}` cannot have a folder of its own", param.name);
                return Err(unsupported(reason));
            }
            plans.extend(param_plans(source, &facts, param, *numel, &kinds));
        }
    }
    plans.push(optimizer_plan(&facts));
    let mut output = Output::begin_whole(out)?;
    progress.begin("converting", plans.iter().map(Plan::bytes).sum());
    for plan in &plans {
        plan.write(source, &output.place(&plan.name)?, progress)?;
    }
    output.commit(&[])?;
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut latest = Output::begin(parent)?;
    latest.write(LATEST_UNIVERSAL, name.as_bytes())?;
    latest.commit(&[])
}

/// The files of a parameter.
fn param_plans(
    source: &dyn Source,
    facts: &Facts,
    param: &ParamRecord,
    numel: usize,
    kinds: &BTreeSet<String>,
) -> Vec<Plan> {
    let name = &param.name;
    let file = |stem: &str, piece: Piece| {
        let mut storages = Storages::default();
        let object = if facts.stage == 3 {
            storages.tensor(DType::F32.into(), &[numel], vec![piece])
        } else {
            let tensor = storages.tensor(DType::F32.into(), &param.shape, vec![piece]);
            Object::dict([("cat_dim", Object::Int(0)), ("param", tensor)])
        };
        Plan { name: format!("{ZERO}/{name}/{stem}.pt"), object, storages }
    };
    let master = if source.dtype(name, kind::MASTER).is_some() { kind::MASTER } else { kind::WEIGHT };
    let mut plans = vec![file("fp32", Piece::elements(name, master, 0..numel))];
    for kind in kinds.iter().filter(|kind| source.dtype(name, kind).is_some()) {
        plans.push(file(facts.name_of(kind), Piece::elements(name, kind, 0..numel)));
    }
    if facts.stage < 3 {
        let mut storages = Storages::default();
        let object = step(facts, &mut storages);
        plans.push(Plan { name: format!("{ZERO}/{name}/step.pt"), object, storages });
    }
    plans
}

/// The number of updates as a tensor without dimensions.
fn step(facts: &Facts, storages: &mut Storages) -> Object {
    let bytes = (facts.updates as f32).to_le_bytes().to_vec();
    storages.tensor(DType::F32.into(), &[], vec![Piece::Bytes(bytes)])
}

/// What belongs to no parameter.
fn optimizer_plan(facts: &Facts) -> Plan {
    let mut storages = Storages::default();
    let (scaler, dynamic) = facts.loss_scaler();
    let stage = Object::Int(facts.stage.into());
    let groups: Vec<Object> =
        (0..facts.groups.len()).map(|group| options(facts, group, vec![group.into()])).collect();
    let mut entries = vec![
        ("loss_scaler", scaler),
        ("dynamic_loss_scale", Object::Bool(dynamic)),
        ("overflow", Object::Bool(false)),
        ("zero_stage", Object::Call("deepspeed.runtime.zero.config", "ZeroStageEnum", vec![stage])),
    ];
    if facts.stage == 3 {
        let states = (0..facts.groups.len())
            .map(|group| {
                let step = step(facts, &mut storages);
                (Object::from(group), Object::dict([("step", step)]))
            })
            .collect();
        let nested =
            Object::dict([("state", Object::Dict(states)), ("param_groups", Object::List(groups.clone()))]);
        entries.push(("partition_count", facts.world.into()));
        entries.push(("optimizer_state_dict", nested));
    } else {
        let each =
            |value: &dyn Fn(usize) -> Object| Object::List((0..facts.groups.len()).map(value).collect());
        entries.push(("clip_grad", Object::Float(facts.clip)));
        entries.push(("group_paddings", each(&|_| Object::Int(0))));
        entries.push((
            "param_alignment_paddings",
            each(&|group| Object::List(vec![Object::Int(0); facts.groups[group].len()])),
        ));
        entries.push(("partition_count", each(&|_| facts.world.into())));
        entries.push(("ds_version", LAYOUT_VERSION.into()));
    }
    entries.push(("param_groups", Object::List(groups)));
    Plan { name: format!("{ZERO}/optimizer_state.pt"), object: Object::dict(entries), storages }
}
