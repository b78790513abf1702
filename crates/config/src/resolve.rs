//! From a checked document to the typed config, and the rules that concern several settings at once.

use serde_json::{Map, Value as Json};

use crate::{
    Options,
    batch::{BatchRequest, Given},
    check::{self, Checked},
    config::{
        AioConfig, Bf16Config, CheckpointConfig, Config, DataTypes, Fp16Config, GatheringConfig,
        OptimizerConfig, Precision, SchedulerConfig, TagValidation, ZeroConfig, ZeroStage,
    },
    contradictions,
    diagnostic::{Code, ConfigError, Diagnostic, nearest},
    document::{self, Document, Origin},
    json::{Node, Value},
    offload,
    table::{self, Kind, Named},
};

/// A config and what is worth saying about it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Resolved {
    /// The config.
    pub config: Config,
    /// What is worth saying, in the order of the document.
    pub warnings: Vec<Diagnostic>,
}

impl Default for Config {
    fn default() -> Self {
        build(&check::check(&Document::empty(), Options::default()))
    }
}

impl Config {
    /// Judges a document as a whole.
    ///
    /// # Errors
    /// Every problem there is, in the order of the document.
    pub fn from_document(document: &Document, options: &Options) -> Result<Resolved, ConfigError> {
        let mut checked = check::check(document, *options);
        precision_rules(&mut checked);
        zero_rules(&mut checked);
        optimizer_rules(&mut checked);
        scheduler_rules(&mut checked);
        let place = |diagnostic: &Diagnostic| diagnostic.labels.first().map_or(0, |label| label.span.start);
        checked.errors.sort_by_key(place);
        checked.warnings.sort_by_key(place);
        checked.differences.sort_by_key(|(place, _)| *place);
        if !checked.errors.is_empty() {
            return Err(ConfigError::new(checked.errors));
        }
        Ok(Resolved { config: build(&checked), warnings: checked.warnings })
    }

    /// [`document::parse`] and [`Config::from_document`] in one.
    ///
    /// # Errors
    /// Those of both.
    pub fn from_text(text: &str, origin: Origin, options: &Options) -> Result<Resolved, ConfigError> {
        Self::from_document(&document::parse(text, origin)?, options)
    }

    /// [`document::load`] and [`Config::from_document`] in one.
    ///
    /// # Errors
    /// Those of both.
    pub fn load(spec: &str, options: &Options) -> Result<Resolved, ConfigError> {
        Self::from_document(&document::load(spec)?, options)
    }
}

fn build(checked: &Checked<'_>) -> Config {
    let int = |path| checked.integer(path).unwrap_or_default();
    let size = |path| usize::try_from(int(path)).unwrap_or(usize::MAX);
    let number = |path| checked.number(path).unwrap_or_default();
    let given = |path| {
        checked
            .member(path)
            .map(|member| Given { value: size(path), origin: checked.document.line_words(member) })
    };
    Config {
        batch: BatchRequest {
            train: given("train_batch_size"),
            micro: given("train_micro_batch_size_per_gpu"),
            accumulation: given("gradient_accumulation_steps"),
        },
        precision: match (checked.flag("fp16.enabled"), checked.flag("bf16.enabled")) {
            (true, _) => Precision::Fp16,
            (_, true) => Precision::Bf16,
            _ => Precision::Fp32,
        },
        fp16: Fp16Config {
            enabled: checked.flag("fp16.enabled"),
            loss_scale: number("fp16.loss_scale"),
            initial_scale_power: u32::try_from(int("fp16.initial_scale_power")).unwrap_or(u32::MAX),
            loss_scale_window: int("fp16.loss_scale_window"),
            hysteresis: int("fp16.hysteresis"),
            consecutive_hysteresis: checked.flag("fp16.consecutive_hysteresis"),
            min_loss_scale: number("fp16.min_loss_scale"),
            auto_cast: checked.flag("fp16.auto_cast"),
        },
        bf16: Bf16Config {
            enabled: checked.flag("bf16.enabled"),
            check_grad_overflow: checked.flag("bf16.check_grad_overflow"),
        },
        zero: ZeroConfig {
            stage: zero_stage(checked),
            reduce_bucket_size: size("zero_optimization.reduce_bucket_size"),
            sub_group_size: size("zero_optimization.sub_group_size"),
            allgather_bucket_size: size("zero_optimization.allgather_bucket_size"),
            overlap_comm: checked
                .member("zero_optimization.overlap_comm")
                .map(|member| member.value.value == Value::Bool(true)),
            contiguous_gradients: checked.flag("zero_optimization.contiguous_gradients"),
            reduce_scatter: checked.flag("zero_optimization.reduce_scatter"),
            ignore_unused_parameters: checked.flag("zero_optimization.ignore_unused_parameters"),
            gather_16bit_weights_on_model_save: checked
                .flag("zero_optimization.stage3_gather_16bit_weights_on_model_save"),
            gathering: GatheringConfig {
                prefetch_bucket_size: size("zero_optimization.stage3_prefetch_bucket_size"),
                param_persistence_threshold: size("zero_optimization.stage3_param_persistence_threshold"),
                model_persistence_threshold: size("zero_optimization.stage3_model_persistence_threshold"),
                max_live_parameters: size("zero_optimization.stage3_max_live_parameters"),
                max_reuse_distance: size("zero_optimization.stage3_max_reuse_distance"),
                module_granularity_threshold: size("zero_optimization.stage3_module_granularity_threshold"),
            },
            offload_optimizer: offload::optimizer(checked),
            offload_param: offload::param(checked),
        },
        optimizer: checked.text("optimizer.type").map(|kind| OptimizerConfig {
            params: optimizer_params(checked, &kind),
            kind,
            legacy_fusion: checked.flag("optimizer.legacy_fusion"),
        }),
        scheduler: checked.text("scheduler.type").map(|kind| SchedulerConfig {
            // A schedule may tell null from absent: WarmupDecayLR takes the optimizer's rate for null.
            params: params(checked, "scheduler.params", table::SCHEDULERS, &kind),
            kind,
        }),
        gradient_clipping: number("gradient_clipping"),
        prescale_gradients: checked.flag("prescale_gradients"),
        gradient_predivide_factor: number("gradient_predivide_factor"),
        communication_dtype: checked.dtype("communication_data_type"),
        grad_accum_dtype: checked.dtype("data_types.grad_accum_dtype"),
        data_types: DataTypes {
            param_dtype: checked.dtype("data_types.param_dtype"),
            buffer_dtype: checked.dtype("data_types.buffer_dtype"),
        },
        steps_per_print: checked.integer("steps_per_print"),
        wall_clock_breakdown: checked.flag("wall_clock_breakdown"),
        dump_state: checked.flag("dump_state"),
        zero_allow_untested_optimizer: checked.flag("zero_allow_untested_optimizer"),
        dataloader_drop_last: checked.flag("dataloader_drop_last"),
        memory_breakdown: checked.flag("memory_breakdown"),
        checkpoint: CheckpointConfig {
            tag_validation: match checked.text("checkpoint.tag_validation").unwrap_or_default() {
                word if word.eq_ignore_ascii_case("fail") => TagValidation::Fail,
                word if word.eq_ignore_ascii_case("ignore") => TagValidation::Ignore,
                _ => TagValidation::Warn,
            },
            load_universal: checked.flag("checkpoint.load_universal"),
            behind: checked.flag("checkpoint.async"),
            node_local: checked.flag("checkpoint.use_node_local_storage"),
            keep_last: checked.integer("checkpoint.keep_last").and_then(|count| usize::try_from(count).ok()),
        },
        aio: AioConfig {
            block_size: size("aio.block_size"),
            queue_depth: size("aio.queue_depth"),
            // The newer name wins where both are written.
            threads: match checked.member("aio.intra_op_parallelism") {
                Some(_) => size("aio.intra_op_parallelism"),
                None => size("aio.thread_count"),
            },
            single_submit: checked.flag("aio.single_submit"),
            overlap_events: checked.flag("aio.overlap_events"),
        },
        document: checked.document.clone(),
        differences: checked.differences.iter().map(|(_, difference)| difference.clone()).collect(),
    }
}

fn zero_stage(checked: &Checked<'_>) -> ZeroStage {
    match checked.member("zero_optimization").map(|member| &member.value.value) {
        Some(Value::Bool(true)) => ZeroStage::One,
        Some(Value::Bool(false)) => ZeroStage::Zero,
        _ => ZeroStage::from_number(checked.integer("zero_optimization.stage").unwrap_or_default()),
    }
}

/// The optimizer's parameters. Null means "not set" for ours; classes of torch may take it as a value.
fn optimizer_params(checked: &Checked<'_>, kind: &str) -> Map<String, Json> {
    let mut params = params(checked, "optimizer.params", table::OPTIMIZERS, kind);
    if table::find_named(table::OPTIMIZERS, kind).is_some() {
        params.retain(|_, value| !value.is_null());
    }
    params
}

/// The parameters of an optimizer or schedule as plain JSON. Those of ours get their canonical names, and whole numbers
/// and words their canonical form, so that `5e2` is an integer to whoever reads them.
fn params(
    checked: &Checked<'_>,
    path: &'static str,
    entries: &'static [Named],
    kind: &str,
) -> Map<String, Json> {
    let Some(member) = checked.member(path) else { return Map::new() };
    let entry = table::find_named(entries, kind);
    member
        .value
        .as_object()
        .unwrap_or_default()
        .iter()
        .filter(|member| member.value.as_text() != Some("auto"))
        .map(|member| match entry.and_then(|entry| entry.param(&member.key)) {
            Some(setting) => (setting.key().to_owned(), canonical(setting.kind, &member.value)),
            None => (member.key.clone(), member.value.to_json()),
        })
        .collect()
}

fn canonical(kind: Kind, node: &Node) -> Json {
    let canonical = match (kind, &node.value) {
        (Kind::Int { .. }, Value::Number(number)) => {
            number.as_integer().and_then(|n| i64::try_from(n).ok()).map(Json::from)
        }
        (Kind::Choice(words), Value::Text(text)) => {
            words.iter().find(|word| word.eq_ignore_ascii_case(text)).map(|word| Json::from(*word))
        }
        _ => None,
    };
    canonical.unwrap_or_else(|| node.to_json())
}

fn precision_rules(checked: &mut Checked<'_>) {
    if checked.flag("fp16.enabled")
        && checked.flag("bf16.enabled")
        && let (Some(fp16), Some(bf16)) = (checked.member("fp16.enabled"), checked.member("bf16.enabled"))
    {
        let mut diagnostic = checked.document.diagnostic(
            Code::Contradiction,
            "bf16.enabled",
            &bf16.value.span,
            "`fp16` and `bf16` are both enabled; a model trains in one of them",
            "bf16 is enabled here",
        );
        diagnostic.labels.push(checked.document.label(&fp16.value.span, "fp16 is enabled here"));
        checked.errors.push(diagnostic.hint("set the `enabled` of one of them to false"));
        return;
    }
    let precision = match (checked.flag("fp16.enabled"), checked.flag("bf16.enabled")) {
        (true, _) => Precision::Fp16,
        (_, true) => Precision::Bf16,
        _ => Precision::Fp32,
    };
    if let Some(dtype) = checked.dtype("data_types.param_dtype")
        && dtype != precision.dtype()
        && let Some(member) = checked.member("data_types.param_dtype")
    {
        let diagnostic = checked.document.diagnostic(
            Code::Contradiction,
            "data_types.param_dtype",
            &member.value.span,
            format!("`data_types.param_dtype` is {dtype}, but the model trains in {}", precision.dtype()),
            "the fp16 and bf16 blocks decide",
        );
        checked.errors.push(diagnostic.hint("delete it, or enable the block of that dtype"));
    }
}

fn zero_rules(checked: &mut Checked<'_>) {
    offload::rules(checked, zero_stage(checked));
    if let Some(member) = checked.member("zero_optimization")
        && member.value.value == Value::Bool(true)
    {
        checked.warnings.push(
            checked
                .document
                .diagnostic(
                    Code::Deprecated,
                    "zero_optimization",
                    &member.value.span,
                    "`\"zero_optimization\": true` is an old form and means stage 1",
                    "",
                )
                .hint("write \"zero_optimization\": {\"stage\": 1}"),
        );
    }
    if let Some(member) = checked.member("zero_optimization.allgather_bucket_size")
        && checked.integer("zero_optimization.allgather_bucket_size").is_some_and(|size| size % 2 == 1)
    {
        checked.errors.push(checked.document.diagnostic(
            Code::OutOfRange,
            "zero_optimization.allgather_bucket_size",
            &member.value.span,
            "`zero_optimization.allgather_bucket_size` must be even",
            "an odd number",
        ));
    }
}

/// The type and the parameters of the optimizer or of the schedule: known ones are checked, others belong to torch.
fn named<'d>(
    checked: &mut Checked<'d>,
    block: (&'static str, &'static str, &'static str),
    entries: &'static [Named],
    torch: (&'static str, &'static [&'static str]),
    judge: impl Fn(&str) -> Option<(Code, String, &'static str)>,
) -> Option<(&'static Named, Option<&'d Node>)> {
    let (block, type_path, params_path) = block;
    let member = checked.member(block)?;
    let params = checked.member(params_path).map(|member| &member.value);
    let Some(kind) = checked.member(type_path) else {
        // A wrong type has been reported; a params block without a type names nothing.
        let typeless = member.value.member("type").is_none_or(|member| member.value.value == Value::Null);
        if typeless && member.value.as_object().is_some_and(|members| !members.is_empty()) {
            checked.errors.push(checked.document.diagnostic(
                Code::Missing,
                type_path,
                &member.key_span,
                format!("`{block}` has no `type`"),
                "names nothing",
            ));
        }
        return None;
    };
    let name = kind.value.as_text()?;
    if let Some(entry) = table::find_named(entries, name) {
        if let Some(params) = params {
            checked.params(entry, params, params_path);
        }
        return Some((entry, params));
    }
    if let Some((code, message, hint)) = judge(name) {
        let diagnostic =
            checked.document.diagnostic(code, type_path, &kind.value.span, message, "").hint(hint);
        checked.errors.push(diagnostic);
        return None;
    }
    if let Some(params) = params {
        checked.foreign_params(params, params_path);
    }
    let (module, known) = torch;
    if !known.iter().any(|class| class.eq_ignore_ascii_case(name)) {
        let mut diagnostic = checked.document.diagnostic(
            Code::Doubtful,
            type_path,
            &kind.value.span,
            format!("`{name}` is not built in; a class of that name is looked up in {module}"),
            "",
        );
        let names = entries.iter().map(|entry| entry.name).chain(known.iter().copied());
        diagnostic.nearest = nearest(name, names).map(str::to_owned);
        checked.warnings.push(diagnostic);
    }
    None
}

fn optimizer_rules(checked: &mut Checked<'_>) {
    let found = named(
        checked,
        ("optimizer", "optimizer.type", "optimizer.params"),
        table::OPTIMIZERS,
        ("torch.optim", table::TORCH_OPTIMIZERS),
        |name| {
            let lower = name.to_ascii_lowercase();
            if ["onebitadam", "onebitlamb", "zerooneadam"].contains(&&*lower) {
                Some((
                    Code::Removed,
                    format!(
                        "the optimizer `{name}` is gone; DeepSpeed 0.19.8 has no 1-bit optimizers either"
                    ),
                    "use AdamW or Lamb",
                ))
            } else if lower == "muon" || lower.starts_with("mup") && lower.len() > 3 {
                Some((
                    Code::NotBuilt,
                    format!("`optimizer.type` asks for {name}, which is not built yet"),
                    "pass an optimizer object to initialize instead",
                ))
            } else {
                None
            }
        },
    );
    if let Some((entry, Some(params))) = found {
        contradictions::optimizer(checked, entry, params);
    }
}

fn scheduler_rules(checked: &mut Checked<'_>) {
    let found = named(
        checked,
        ("scheduler", "scheduler.type", "scheduler.params"),
        table::SCHEDULERS,
        ("torch.optim.lr_scheduler", table::TORCH_SCHEDULERS),
        |_| None,
    );
    let Some((entry, params)) = found else { return };
    if let Some(params) = params {
        contradictions::scheduler(checked, entry, params);
    }
    let required: &[&str] = match entry.name {
        "WarmupDecayLR" | "WarmupCosineLR" => &["total_num_steps"],
        "OneCycle" => &["cycle_min_lr", "cycle_max_lr"],
        _ => &[],
    };
    for key in required {
        let set = params
            .and_then(|params| params.member(key))
            .is_some_and(|member| member.value.value != Value::Null);
        if !set && let Some(kind) = checked.member("scheduler.type") {
            checked.errors.push(checked.document.diagnostic(
                Code::Missing,
                &format!("scheduler.params.{key}"),
                &kind.value.span,
                format!("the schedule {} needs `scheduler.params.{key}`", entry.name),
                "needs it",
            ));
        }
    }
}
