//! The operations that the original compiles one by one, and what stands for them here.

use deepspeed_launch::facts::HostFacts;
use serde::Serialize;

/// One operation, by the original's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Operation {
    /// Its name.
    pub(super) name: &'static str,
    /// Whether this version has it. Nothing is compiled later.
    pub(super) installed: bool,
    /// Whether it can work on this host.
    pub(super) compatible: bool,
    /// What serves it, or why it cannot work.
    pub(super) note: String,
}

/// Those that are kernels of the Rust core.
const KERNELS: [&str; 3] = ["cpu_adam", "cpu_adagrad", "cpu_lion"];

/// Those that are kernels of the Rust core on a CPU, and torch's operations on a GPU.
const FUSED: [&str; 3] = ["fused_adam", "fused_lamb", "fused_lion"];

/// Those of the original that this version does not have.
const NOT_BUILT: [&str; 15] = [
    "dc",
    "deepspeed_ccl_comm",
    "evoformer_attn",
    "fp_quantizer",
    "gds",
    "inference_core_ops",
    "inference_cutlass_ops",
    "quantizer",
    "ragged_device_ops",
    "ragged_ops",
    "random_ltd",
    "spatial_inference",
    "transformer",
    "transformer_inference",
    "utils",
];

/// All of them.
pub(super) fn table(facts: &HostFacts) -> Vec<Operation> {
    let built =
        |name, note: &str| Operation { name, installed: true, compatible: true, note: note.to_owned() };
    let kernel = format!("{} kernel", facts.cpu.kernel_in_use);
    let io = match &facts.io_uring_refused {
        None => "io_uring".to_owned(),
        Some(why) => format!("thread pool; io_uring is refused: {why}"),
    };
    let mut table: Vec<Operation> = Vec::new();
    table.push(built("async_io", &io));
    table.extend(KERNELS.map(|name| built(name, &kernel)));
    table.push(built("deepspeed_shm_comm", "shared memory of the Rust core"));
    table.extend(FUSED.map(|name| built(name, &format!("{kernel} on a CPU, torch's operations on a GPU"))));
    table.push(built("pin_memory", "torch's pinned memory, on a GPU"));
    let not_built = |name| Operation {
        name,
        installed: false,
        compatible: false,
        note: "not in this version".to_owned(),
    };
    table.extend(NOT_BUILT.map(not_built));
    table
}
