//! The processor: what it offers, and which of our kernels run on it.

use crate::plan::surroundings::Surroundings;
use deepspeed_kernels::Isa;
use serde::{Deserialize, Serialize};

/// Extensions that matter to training, as `/proc/cpuinfo` calls them.
const EXTENSIONS: [&str; 14] = [
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_tile",
];

/// The same on ARM.
const EXTENSIONS_ARM: [&str; 6] = ["asimd", "fphp", "asimdhp", "bf16", "sve", "sve2"];

/// A processor and the kernels on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFacts {
    /// What it calls itself.
    pub model: String,
    /// Cores that this process may keep busy: its affinity mask, cut to the control group's quota.
    pub cores: usize,
    /// Cores of the affinity mask.
    pub cores_allowed: usize,
    /// Extensions that matter to training, of those that the processor has.
    pub extensions: Vec<String>,
    /// Instruction sets that our kernels can run on here.
    pub kernels: Vec<String>,
    /// The one in use.
    pub kernel_in_use: String,
    /// What is wrong with `DS_ISA`; ranks refuse to start then.
    pub kernel_problem: Option<String>,
}

impl CpuFacts {
    pub(super) fn read(surroundings: &Surroundings) -> Self {
        let text = fs_err::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let (model, extensions) = parse(&text);
        let (isa, problem) = match Isa::from_env() {
            Ok(isa) => (isa, None),
            Err(error) => (Isa::at_most(Isa::Avx512), Some(format!("environment variable DS_ISA: {error}"))),
        };
        Self {
            model,
            cores: surroundings.cores,
            cores_allowed: surroundings.core_ids.len(),
            extensions,
            kernels: Isa::supported().map(|isa| isa.name().to_owned()).collect(),
            kernel_in_use: isa.name().to_owned(),
            kernel_problem: problem,
        }
    }
}

/// Model and known extensions of the first processor in a `/proc/cpuinfo`.
fn parse(text: &str) -> (String, Vec<String>) {
    let value = |names: &[&str]| {
        text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            names.contains(&name.trim()).then(|| value.trim())
        })
    };
    let model = value(&["model name", "Model", "CPU part"]).unwrap_or("unknown").to_owned();
    let flags: Vec<&str> = value(&["flags", "Features"]).unwrap_or_default().split_whitespace().collect();
    let known = EXTENSIONS.iter().chain(&EXTENSIONS_ARM).filter(|name| flags.contains(*name));
    (model, known.map(|name| (*name).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_processor_speaks_for_all() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx avx2 amx_bf16 x\n\nprocessor : 1\n";
        let (model, extensions) = parse(text);
        assert_eq!(model, "Some CPU @ 2 GHz");
        assert_eq!(extensions, ["avx", "avx2", "amx_bf16"]);
        assert_eq!(parse("").0, "unknown");
    }
}
