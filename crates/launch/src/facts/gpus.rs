//! NVIDIA GPUs by the files of the driver: no CUDA context, no library, no program.

use serde::{Deserialize, Serialize};
use std::path::Path;

/// One GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its place on the bus.
    pub bus: String,
    /// Its model, if the driver says.
    pub model: Option<String>,
    /// Its unique id, if the driver says.
    pub uuid: Option<String>,
}

/// The GPUs of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuFacts {
    /// How many a job can use, whatever `CUDA_VISIBLE_DEVICES` says.
    pub count: usize,
    /// The driver's version, where it is loaded.
    pub driver: Option<String>,
    /// Those that the driver describes; in a container these may be more than can be used.
    pub described: Vec<Gpu>,
}

impl GpuFacts {
    /// Reads them below `root`; `count` is how many the launcher counts.
    pub(super) fn read(root: &Path, count: usize) -> Self {
        let driver = fs_err::read_to_string(root.join("proc/driver/nvidia/version"));
        let folder = root.join("proc/driver/nvidia/gpus");
        let mut described: Vec<Gpu> = fs_err::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| {
                let text = fs_err::read_to_string(entry.path().join("information")).unwrap_or_default();
                let value = |name: &str| {
                    text.lines().find_map(|line| {
                        let (key, value) = line.split_once(':')?;
                        (key.trim() == name).then(|| value.trim().to_owned())
                    })
                };
                Gpu {
                    bus: entry.file_name().to_string_lossy().into_owned(),
                    model: value("Model"),
                    uuid: value("GPU UUID"),
                }
            })
            .collect();
        described.sort_by(|a, b| a.bus.cmp(&b.bus));
        Self { count, driver: driver.ok().and_then(|text| driver_version(&text)), described }
    }
}

/// The number in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue ...`.
fn driver_version(text: &str) -> Option<String> {
    let is_number = |word: &&str| {
        word.contains('.')
            && word.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
    };
    text.lines().next()?.split_whitespace().find(is_number).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_err as fs;

    #[test]
    fn the_drivers_files_are_read() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(GpuFacts::read(root.path(), 0), GpuFacts::default());
        let gpu = root.path().join("proc/driver/nvidia/gpus/0000:01:00.0");
        fs::create_dir_all(&gpu).unwrap();
        fs::write(gpu.join("information"), "Model: \t\t NVIDIA H200\nIRQ: 7\nGPU UUID: \t GPU-1\n").unwrap();
        let version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.2.0\n";
        fs::write(root.path().join("proc/driver/nvidia/version"), version).unwrap();
        let facts = GpuFacts::read(root.path(), 1);
        assert_eq!(facts.driver.as_deref(), Some("580.95.05"));
        assert_eq!(facts.described[0].model.as_deref(), Some("NVIDIA H200"));
        assert_eq!(facts.described[0].uuid.as_deref(), Some("GPU-1"));
    }
}
