//! Variables of the environment that change what a job does.

use crate::plan::env_file;
use crate::plan::surroundings::read_env_files;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Names that matter, by how they begin.
const PREFIXES: [&str; 12] = [
    "DS_",
    "DEEPSPEED_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "CUDA_",
    "OMP_",
    "MKL_",
    "UCX_",
    "MV2_",
    "KMP_",
    "PYTORCH_",
];

/// And by their whole names.
const NAMES: [&str; 12] = [
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "PYTHONPATH",
    "PDSH_SSH_ARGS_APPEND",
    "SLURM_JOB_ID",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
];

/// Parts of names whose values are nobody's business: reports are pasted into public issues.
const SECRET: [&str; 5] = ["SECRET", "TOKEN", "PASSWORD", "KEY", "CREDENTIAL"];

/// Those that are set, with their values.
pub(super) fn relevant() -> BTreeMap<String, String> {
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, _)| matters(name))
        .map(|(name, value)| {
            let hidden = SECRET.iter().any(|part| name.contains(part));
            (name, if hidden { "(hidden)".to_owned() } else { value })
        })
        .collect()
}

fn matters(name: &str) -> bool {
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The environment files that a launch from this folder would read, each with the names that it sets.
pub(super) fn files() -> Vec<(PathBuf, Vec<String>)> {
    // One that cannot be read fails the launch, with its reason; here it is left out.
    let files = read_env_files().unwrap_or_default();
    let names = |text: &str| env_file::parse(text).variables.into_iter().map(|(name, _)| name).collect();
    files.into_iter().map(|(path, text)| (path, names(&text))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_matters() {
        assert!(matters("NCCL_DEBUG") && matters("RANK") && matters("DS_ACCELERATOR"));
        assert!(!matters("HOME") && !matters("RANKLE") && !matters("AWS_SECRET_ACCESS_KEY"));
    }
}
