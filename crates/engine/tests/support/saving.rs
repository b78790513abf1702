//! Saving and loading a replica.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

use std::path::Path;

use deepspeed_core::{Span, SpanMut};
use deepspeed_engine::{LoadOptions, SaveRequest, Saved, TagRule};

use super::Replica;

pub fn save(replica: &mut Replica, dir: &Path, tag: &str) -> Result<Saved, String> {
    let weights: Vec<Span<'_>> = replica.weights.iter().map(|it| it.span()).collect();
    let request = SaveRequest {
        dir,
        tag,
        rule: TagRule::Fail,
        save_latest: true,
        weights: &weights,
        hypers: &replica.hypers,
        slices: &[],
        frozen: &[],
        exclude_frozen: false,
        tied: &[],
        tensors: &[],
        blobs: &[],
        face: serde_json::json!({ "micro": replica.micro }),
    };
    replica.engine.save_checkpoint(&request).map_err(|error| error.to_string())
}

pub fn load(replica: &mut Replica, dir: &Path, tag: Option<&str>) -> Result<(), String> {
    let options = LoadOptions { weights: true, module_only: false, optimizer_states: true, strict: true };
    let mut weights: Vec<SpanMut<'_>> = replica.weights.iter_mut().map(|it| it.span_mut()).collect();
    let loaded = replica
        .engine
        .load_checkpoint(dir, tag, options, &replica.hypers, &mut weights, &mut [])
        .map_err(|error| error.to_string())?;
    let micro = loaded.ok_or("nothing to load")?.state()["face"]["micro"].as_u64();
    replica.micro = usize::try_from(micro.unwrap()).unwrap();
    replica.look_at_shared_weights();
    Ok(())
}
