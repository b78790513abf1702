//! ds_config.json to a typed, position-aware configuration.
//!
//! ```text
//! path | dict | base64 -> Document (tree, every key and value with its bytes)
//!                           |  check   against the table: names, types, ranges, what is built
//!                           |  resolve rules over several settings, defaults, "auto"
//!                           v
//!                         Config + warnings     or ConfigError: every problem, each with its place and what to do
//! ```
//!
//! ```
//! use deepspeed_config::{Config, Options, Origin};
//!
//! let text = r#"{"train_batch_size": 8, "bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}"#;
//! let config = Config::from_text(text, Origin::Dict, &Options::default())?.config;
//! let batch = config.resolve_batch(2, "2 slots on localhost")?;
//! assert_eq!((batch.micro, batch.accumulation), (4, 1));
//!
//! let error = Config::from_text(r#"{"gradient_clipp1ng": 1}"#, Origin::Dict, &Options::default()).unwrap_err();
//! assert!(error.to_string().contains("did you mean `gradient_clipping`?"));
//! # Ok::<(), deepspeed_config::ConfigError>(())
//! ```

mod batch;
mod check;
mod config;
mod contradictions;
mod diagnostic;
mod document;
pub mod explain;
pub mod json;
mod judge;
mod offload;
pub mod reference;
mod resolve;
mod schema;
pub mod table;

pub use batch::{Batch, BatchProblem, BatchRequest, Given};
pub use config::{
    AioConfig, Bf16Config, CheckpointConfig, Config, DataTypes, Difference, Fp16Config, GatheringConfig,
    OptimizerConfig, Precision, SchedulerConfig, TagValidation, ZeroConfig, ZeroStage,
};
pub use diagnostic::{Code, ConfigError, Diagnostic, Label};
pub use document::{Document, Origin, load, parse};
pub use offload::{OffloadDevice, OffloadOptimizerConfig, OffloadParamConfig};
pub use resolve::Resolved;
pub use schema::json_schema;

/// How a document is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whether an unknown setting is an error; otherwise it is a warning.
    pub strict: bool,
    /// Whether "auto" may be left where somebody else fills it in: for a config that is still a template. Such settings
    /// count as not set.
    pub allow_auto: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { strict: true, allow_auto: false }
    }
}

impl Options {
    /// The options for a value of the environment variable `DS_CONFIG_STRICT`: `0`, `false`, `no` and `off` are not
    /// strict.
    pub fn from_strict_variable(value: Option<&str>) -> Self {
        let lax = value.is_some_and(|value| {
            ["0", "false", "no", "off"].contains(&value.trim().to_ascii_lowercase().as_str())
        });
        Self { strict: !lax, ..Self::default() }
    }
}
