//! Where optimizer state and parameters lie while they are not used: the blocks `offload_optimizer` and `offload_param`,
//! and their old forms.

use std::{fmt, path::PathBuf};

use crate::{check::Checked, config::ZeroStage, diagnostic::Code};

/// A place for state that is not used at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum OffloadDevice {
    /// It stays on the device that computes.
    #[default]
    None,
    /// The host's memory.
    Cpu,
    /// Files in a folder, meant to be on a local NVMe disk.
    Nvme,
}

impl OffloadDevice {
    /// The word in the config.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Cpu => "cpu",
            Self::Nvme => "nvme",
        }
    }
}

impl fmt::Display for OffloadDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The block `zero_optimization.offload_optimizer`.
#[derive(Debug, Clone, PartialEq)]
pub struct OffloadOptimizerConfig {
    /// Where the state lies.
    pub device: OffloadDevice,
    /// The folder for nvme; given whenever the device is nvme.
    pub nvme_path: Option<PathBuf>,
    /// Slots between the disk and the update, where it is pipelined; each holds one unit's state.
    pub buffer_count: usize,
    /// Use pinned host memory where there is an accelerator.
    pub pin_memory: bool,
    /// Read the next piece during the update.
    pub pipeline_read: bool,
    /// Write the last piece during the update.
    pub pipeline_write: bool,
    /// As given; no effect.
    pub fast_init: bool,
    /// The part of the state that is offloaded, 0 to 1.
    pub ratio: f64,
}

impl Default for OffloadOptimizerConfig {
    fn default() -> Self {
        crate::Config::default().zero.offload_optimizer
    }
}

/// The block `zero_optimization.offload_param`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffloadParamConfig {
    /// Where the shards of the parameters lie.
    pub device: OffloadDevice,
    /// The folder for nvme; given whenever the device is nvme.
    pub nvme_path: Option<PathBuf>,
    /// As given; no effect.
    pub buffer_count: usize,
    /// As given; no effect.
    pub buffer_size: usize,
    /// Elements of a rank's part that stay in the host's memory with nvme.
    pub max_in_cpu: usize,
    /// Use pinned host memory where there is an accelerator.
    pub pin_memory: bool,
}

impl Default for OffloadParamConfig {
    fn default() -> Self {
        crate::Config::default().zero.offload_param
    }
}

/// The settings that both blocks have, and what differs between them.
struct Block {
    path: &'static str,
    device: &'static str,
    nvme_path: &'static str,
    legacy: &'static str,
    /// What the device moves.
    moves: &'static str,
    /// The stage from which there is something to move.
    from: ZeroStage,
}

const OPTIMIZER: Block = Block {
    path: "zero_optimization.offload_optimizer",
    device: "zero_optimization.offload_optimizer.device",
    nvme_path: "zero_optimization.offload_optimizer.nvme_path",
    legacy: "zero_optimization.cpu_offload",
    moves: "shards of the optimizer state",
    from: ZeroStage::One,
};

const PARAM: Block = Block {
    path: "zero_optimization.offload_param",
    device: "zero_optimization.offload_param.device",
    nvme_path: "zero_optimization.offload_param.nvme_path",
    legacy: "zero_optimization.cpu_offload_param",
    moves: "shards of the parameters",
    from: ZeroStage::Three,
};

const LEGACY_PIN: &str = "zero_optimization.cpu_offload_use_pin_memory";

impl Block {
    fn device(&self, checked: &Checked<'_>) -> OffloadDevice {
        match checked.text(self.device).map(|word| word.to_ascii_lowercase()).as_deref() {
            Some("cpu") => OffloadDevice::Cpu,
            Some("nvme") => OffloadDevice::Nvme,
            _ if checked.flag(self.legacy) => OffloadDevice::Cpu,
            _ => OffloadDevice::None,
        }
    }

    fn nvme_path(&self, checked: &Checked<'_>) -> Option<PathBuf> {
        checked.text(self.nvme_path).filter(|path| !path.trim().is_empty()).map(PathBuf::from)
    }

    fn pin_memory(&self, checked: &Checked<'_>, path: &'static str) -> bool {
        match checked.member(LEGACY_PIN) {
            Some(_) if checked.flag(self.legacy) => checked.flag(LEGACY_PIN),
            _ => checked.flag(path),
        }
    }
}

fn size(checked: &Checked<'_>, path: &'static str) -> usize {
    checked.integer(path).map_or(0, |number| usize::try_from(number).unwrap_or(usize::MAX))
}

pub(crate) fn optimizer(checked: &Checked<'_>) -> OffloadOptimizerConfig {
    OffloadOptimizerConfig {
        device: OPTIMIZER.device(checked),
        nvme_path: OPTIMIZER.nvme_path(checked),
        buffer_count: size(checked, "zero_optimization.offload_optimizer.buffer_count"),
        pin_memory: OPTIMIZER.pin_memory(checked, "zero_optimization.offload_optimizer.pin_memory"),
        pipeline_read: checked.flag("zero_optimization.offload_optimizer.pipeline_read"),
        pipeline_write: checked.flag("zero_optimization.offload_optimizer.pipeline_write"),
        fast_init: checked.flag("zero_optimization.offload_optimizer.fast_init"),
        ratio: checked.number("zero_optimization.offload_optimizer.ratio").unwrap_or(1.0),
    }
}

pub(crate) fn param(checked: &Checked<'_>) -> OffloadParamConfig {
    OffloadParamConfig {
        device: PARAM.device(checked),
        nvme_path: PARAM.nvme_path(checked),
        buffer_count: size(checked, "zero_optimization.offload_param.buffer_count"),
        buffer_size: size(checked, "zero_optimization.offload_param.buffer_size"),
        max_in_cpu: size(checked, "zero_optimization.offload_param.max_in_cpu"),
        pin_memory: PARAM.pin_memory(checked, "zero_optimization.offload_param.pin_memory"),
    }
}

/// What the two blocks ask of each other and of the stage.
pub(crate) fn rules(checked: &mut Checked<'_>, stage: ZeroStage) {
    for block in [&OPTIMIZER, &PARAM] {
        legacy(checked, block);
        let device = block.device(checked);
        if device == OffloadDevice::None {
            continue;
        }
        let Some((path, member)) =
            [block.device, block.legacy].into_iter().find_map(|path| Some((path, checked.member(path)?)))
        else {
            continue;
        };
        if stage < block.from {
            let message = format!(
                "`{path}` moves {}, and there are none below stage {}; `zero_optimization.stage` is {stage}",
                block.moves, block.from
            );
            let diagnostic =
                checked.document.diagnostic(Code::Contradiction, path, &member.value.span, message, "");
            checked.errors.push(
                diagnostic
                    .hint(format!("set `zero_optimization.stage` to {} or more", block.from))
                    .hint(format!("or delete `{}`", if path == block.legacy { path } else { block.path })),
            );
        }
        if device == OffloadDevice::Nvme && block.nvme_path(checked).is_none() {
            let message = format!("`{}` is nvme, but `{}` is not given", block.device, block.nvme_path);
            let diagnostic = checked.document.diagnostic(
                Code::Missing,
                block.nvme_path,
                &member.value.span,
                message,
                "needs a folder",
            );
            checked.errors.push(diagnostic.hint("name a folder on a local disk that every host has"));
        }
    }
}

/// The old form of a block.
fn legacy(checked: &mut Checked<'_>, block: &Block) {
    let Some(old) = checked.member(block.legacy) else { return };
    if !checked.flag(block.legacy) {
        return;
    }
    let document = checked.document;
    if let Some(new) = checked.member(block.device) {
        let message = format!("`{}` and `{}` are two forms of one setting", block.legacy, block.device);
        let mut diagnostic =
            document.diagnostic(Code::Contradiction, block.legacy, &old.key_span, message, "the old form");
        diagnostic.labels.push(document.label(&new.key_span, "the new form"));
        checked.errors.push(diagnostic.hint(format!("delete `{}`", block.legacy)));
        return;
    }
    let message = format!("`{}` is an old form of `{}`", block.legacy, block.path);
    let diagnostic = document.diagnostic(Code::Deprecated, block.legacy, &old.key_span, message, "");
    let key = block.path.rsplit('.').next().unwrap_or(block.path);
    checked.warnings.push(diagnostic.hint(format!("write \"{key}\": {{\"device\": \"cpu\"}}")));
}
