//! The crate through its public door.

mod batch;
mod clients;
mod contradictions;
mod errors;
mod generated;
mod offload;
mod properties;
mod sources;
mod values;

use deepspeed_config::{Config, Options, Origin, Resolved};

/// Judges text as if it were the file ds_config.json.
fn resolve(text: &str) -> Result<Resolved, deepspeed_config::ConfigError> {
    Config::from_text(text, Origin::File("ds_config.json".into()), &Options::default())
}

/// The config of text that is right.
fn config(text: &str) -> Config {
    match resolve(text) {
        Ok(resolved) => resolved.config,
        Err(error) => panic!("{error}"),
    }
}

/// The report on text that is wrong.
fn report(text: &str) -> String {
    match resolve(text) {
        Ok(_) => panic!("accepted: {text}"),
        Err(error) => error.to_string(),
    }
}

/// The codes and paths of what is wrong with text.
fn problems(text: &str) -> Vec<(&'static str, String)> {
    match resolve(text) {
        Ok(_) => Vec::new(),
        Err(error) => error
            .diagnostics()
            .iter()
            .map(|diagnostic| (diagnostic.code.as_str(), diagnostic.path.clone()))
            .collect(),
    }
}
