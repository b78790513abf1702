//! What torch says of itself when it is imported.

use std::{
    fmt::Write as _,
    process::{Command, Stdio},
};

use deepspeed_launch::facts::HostFacts;
use serde_json::Value;

/// Imports torch and prints what it finds.
const PROGRAM: &str = "
import json, time
began = time.perf_counter()
import torch
took = time.perf_counter() - began
import torch.distributed as dist
cuda = torch.cuda.is_available()
print(json.dumps({
    'version': torch.__version__,
    'import seconds': round(took, 2),
    'threads': torch.get_num_threads(),
    'distributed backends': [name for name in ('gloo', 'nccl', 'mpi', 'ucc')
                             if dist.is_available() and getattr(dist, f'is_{name}_available')()],
    'CUDA available': cuda,
    'GPUs': [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())] if cuda else [],
    'bf16 on GPU': torch.cuda.is_bf16_supported() if cuda else None,
    'NCCL': '.'.join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else None,
}))
";

/// What torch says, or why it cannot be imported.
pub(super) fn import(facts: &HostFacts) -> Result<Value, String> {
    let python = facts.python.as_ref().ok_or_else(|| "there is no python".to_owned())?;
    let output = Command::new(&python.path)
        .args(["-c", PROGRAM])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} cannot be started: {error}", python.path.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        return Err(format!("it cannot be imported: {last}"));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // A library may have its say before.
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).map_err(|error| format!("its answer makes no sense: {error}"))
}

/// The same as text.
pub(super) fn text(imported: &Result<Value, String>) -> String {
    let mut text = "\ntorch, imported\n".to_owned();
    match imported {
        Err(error) => {
            let _ = writeln!(text, "  {error}");
        }
        Ok(Value::Object(fields)) => {
            for (name, value) in fields {
                let value = match value {
                    Value::String(text) => text.clone(),
                    Value::Array(list) if list.is_empty() => "none".to_owned(),
                    Value::Array(list) => {
                        let words = list.iter().map(|word| word.as_str().unwrap_or_default());
                        words.collect::<Vec<_>>().join(", ")
                    }
                    Value::Null => "-".to_owned(),
                    other => other.to_string(),
                };
                let _ = writeln!(text, "  {name:<20}  {value}");
            }
        }
        Ok(other) => {
            let _ = writeln!(text, "  {other}");
        }
    }
    text
}
